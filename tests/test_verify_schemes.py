"""Releases without data have no finding; every kind of damage to one gives the finding of its own check."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import build, release_writer
from test_verify import edit, edit_bytes, edit_json, quantization_change

from builder.stages import Workspace
from builder.stages.verify import describe_expected
from builder.verify import list_checks, verify_artifact

pytestmark = pytest.mark.xdist_group("verify schemes")  # one build of each serves all

QUERY, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"
CHANNELS, PACKED, BLOCKS = ("fp8_dynamic", "w8a8"), ("w4a16",), ("nvfp4a16",)
ROUNDED = (*CHANNELS, *PACKED)
SCHEMES = (*ROUNDED, *BLOCKS)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Workspace]:
    """The release of a scheme, assembled; built when it is first asked for."""
    folder, workspaces = tmp_path_factory.mktemp("schemes"), dict[str, Workspace]()
    write = release_writer(folder / "releases")

    def find(scheme: str) -> Workspace:
        if scheme not in workspaces:
            manifest = write(scheme.replace("_", "-"), **{"scheme.name": scheme, "calibration": None})
            workspaces[scheme] = build(manifest, folder / scheme)
        return workspaces[scheme]

    return find


def codes(scheme: str) -> str:
    return "weight" if scheme in CHANNELS else "weight_packed"


Damage = Callable[[Path, str], None]


def change_bytes(linear: str, suffix: str | None, change: Callable[[np.ndarray], object]) -> Damage:
    """suffix: None for the codes."""
    return lambda artifact, scheme: edit_bytes(artifact, f"{linear}.{suffix or codes(scheme)}", change)


def next_scale(raw: np.ndarray) -> None:
    raw.view(np.uint16)[5] += 1


def fill(value: int, count: int | None = None) -> Callable[[np.ndarray], None]:
    return lambda raw: raw.__setitem__(slice(None, count), value)


def reverse(raw: np.ndarray) -> None:
    raw[:] = raw[::-1].copy()


def swap_width_and_height(raw: np.ndarray) -> None:
    raw.view(np.int64)[:] = raw.view(np.int64)[::-1].copy()


def widen_scales(artifact: Path, scheme: str) -> None:
    name = f"{QUERY}.weight_scale"
    edit(artifact, lambda tensors: tensors.update({name: tensors[name].float()}), name)


def drop(suffix: str) -> Damage:
    return lambda artifact, scheme: edit(
        artifact, lambda tensors: tensors.pop(f"{QUERY}.{suffix}"), f"{QUERY}.{suffix}"
    )


def add_input_scale(artifact: Path, scheme: str) -> None:
    like = f"{QUERY}.weight_scale"
    edit(artifact, lambda tensors: tensors.update({f"{QUERY}.input_scale": tensors[like].clone()}), like)


def change_group(part: str, **changes: Any) -> Damage:
    def change(quantization: dict[str, Any]) -> None:
        group = quantization["config_groups"]["group_0"]
        group[part] = {**(group[part] or {"num_bits": 8}), **changes}

    return lambda artifact, scheme: quantization_change(change)(artifact)


def rename_format(artifact: Path, scheme: str) -> None:
    quantization_change(lambda quantization: quantization.update(format="naive-quantized"))(artifact)


def leave_out(artifact: Path, scheme: str) -> None:
    quantization_change(lambda quantization: quantization["ignore"].append(DOWN))(artifact)


DAMAGE: dict[str, tuple[tuple[str, ...], Damage, set[str]]] = {
    "a scale off by its last bit": (PACKED, change_bytes(QUERY, "weight_scale", next_scale), {"scales"}),
    "a row's scale off by its last bit": (
        ("w8a8",),
        change_bytes(QUERY, "weight_scale", next_scale),
        {"scales", "dequantized"},
    ),
    "scales that are NaN": (
        ROUNDED,
        change_bytes(QUERY, "weight_scale", lambda raw: raw.view(np.uint16).__setitem__(slice(4), 0x7FC0)),
        {"scales"},
    ),
    "rows left unwritten": (CHANNELS, change_bytes(QUERY, None, fill(0, 1024)), {"codes", "dequantized"}),
    "packed rows left unwritten": (PACKED, change_bytes(QUERY, None, fill(0x88, 1024)), {"codes", "dequantized"}),
    "codes of other rows": (CHANNELS, change_bytes(DOWN, None, reverse), {"dequantized"}),
    "packed codes of other rows": (PACKED, change_bytes(DOWN, None, reverse), {"dequantized"}),
    "a height for a width": (PACKED, change_bytes(DOWN, "weight_shape", swap_width_and_height), {"layout"}),
    "no shape beside packed codes": (PACKED, drop("weight_shape"), {"plan", "layout"}),
    "scales of rows in float32": (CHANNELS, widen_scales, {"plan", "layout"}),
    "scales of groups in float32": (PACKED, widen_scales, {"plan", "layout", "bits"}),
    "no scales of rows": (CHANNELS, drop("weight_scale"), {"plan", "layout"}),
    "no scales of groups": ((*PACKED, *BLOCKS), drop("weight_scale"), {"plan", "layout", "bits"}),
    "an input scale that no loader reads": (SCHEMES, add_input_scale, {"plan", "layout"}),
    "another strategy": (SCHEMES, change_group("weights", strategy="tensor"), {"quantization config"}),
    "weights called dynamic": (SCHEMES, change_group("weights", dynamic=True), {"quantization config"}),
    "activations called static": (
        CHANNELS,
        change_group("input_activations", dynamic=False),
        {"quantization config"},
    ),
    "activations said to be quantized": (
        (*PACKED, *BLOCKS),
        change_group("input_activations", dynamic=True),
        {"quantization config"},
    ),
    "another format": (SCHEMES, rename_format, {"quantization config"}),
    "a quantized linear that is left out": (SCHEMES, leave_out, {"quantization config"}),
    "an inverted global scale": (
        BLOCKS,
        change_bytes(
            DOWN, "weight_global_scale", lambda raw: raw.view(np.float32).__setitem__(0, 1 / raw.view(np.float32)[0])
        ),
        {"global scales", "dequantized"},
    ),
    "a global scale of its own": (
        BLOCKS,
        change_bytes(QUERY, "weight_global_scale", lambda raw: raw.view(np.float32).__imul__(2)),
        {"global scales", "fused", "dequantized"},
    ),
}
CASES = [pytest.param(scheme, name, id=f"{scheme}: {name}") for name, case in DAMAGE.items() for scheme in case[0]]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_good_release_has_no_finding_and_every_check_looked_at_something(
    built: Callable[[str], Workspace], scheme: str
) -> None:
    workspace = built(scheme)
    report = verify_artifact(
        workspace.artifact, workspace.base_folder(), describe_expected(workspace), sample=8, whole_model=True
    )
    assert report.findings == ()
    assert tuple(report.checks) == list_checks(scheme)
    assert all(number > 0 for number in report.checks.values()), report.checks
    assert report.loaded_whole
    assert len(report.reference_sampled) == 14


@pytest.mark.parametrize(("scheme", "name"), CASES)
def test_damage_is_found_by_its_own_check(
    built: Callable[[str], Workspace], tmp_path: Path, scheme: str, name: str
) -> None:
    workspace, (_, mutate, checks) = built(scheme), DAMAGE[name]
    artifact = tmp_path / "artifact"
    shutil.copytree(workspace.artifact, artifact)
    mutate(artifact, scheme)
    expected = {key: value for key, value in describe_expected(workspace).items() if key != "payload"}
    report = verify_artifact(artifact, workspace.base_folder(), expected, sample=0, whole_model=False)
    assert {finding.check for finding in report.errors} == checks


KEYS = "model.layers.1.self_attn"
KEY_SCALE = {"compressed-tensors": "k_scale", "modelopt": "k_proj.k_scale"}
CACHE, CONFIG = {"kv cache"}, {"quantization config"}


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Workspace]:
    """A release with scales of its KV cache in a layout, assembled; built when it is first asked for."""
    folder, workspaces = tmp_path_factory.mktemp("cached"), dict[str, Workspace]()
    write = release_writer(folder / "releases")

    def find(layout: str) -> Workspace:
        if layout not in workspaces:
            name = "nvfp4" if layout == "modelopt" else "fp8_dynamic"
            changes = {"scheme.name": name, "scheme.layout": layout, "calibration.samples": 3}
            workspaces[layout] = build(write(layout, kv_cache="fp8", **changes), folder / layout)
        return workspaces[layout]

    return find


def change_key_scale(change: Callable[[np.ndarray], object]) -> Callable[[Path, str], None]:
    """change: is given the numbers' bits."""
    return lambda artifact, layout: edit_bytes(
        artifact,
        f"{KEYS}.{KEY_SCALE[layout]}",
        lambda raw: change(raw.view(np.uint32 if layout == "modelopt" else np.uint16)),
    )


def invert_key_scale(artifact: Path, layout: str) -> None:
    name = f"{KEYS}.{KEY_SCALE[layout]}"
    edit(artifact, lambda tensors: tensors.update({name: 1 / tensors[name]}), name)


def make_all_alike(artifact: Path, layout: str) -> None:
    for layer in range(4):
        for suffix in ("k_scale", "v_scale"):
            name = f"model.layers.{layer}.self_attn.{suffix}"
            edit(artifact, lambda tensors, name=name: tensors.update({name: 0 * tensors[name] + 1}), name)


def drop_key_scale(artifact: Path, layout: str) -> None:
    name = f"{KEYS}.{KEY_SCALE[layout]}"
    edit(artifact, lambda tensors: tensors.pop(name), name)


def widen_key_scale(artifact: Path, layout: str) -> None:
    name = f"{KEYS}.{KEY_SCALE[layout]}"
    edit(artifact, lambda tensors: tensors.update({name: tensors[name].double()}), name)


def change_cache(**changes: Any) -> Callable[[Path, str], None]:
    def change(quantization: dict[str, Any]) -> None:
        quantization["kv_cache_scheme"] = {**quantization["kv_cache_scheme"], **changes} if changes else None

    return lambda artifact, layout: quantization_change(change)(artifact)


def forget_in_the_other_file(artifact: Path, layout: str) -> None:
    edit_json(artifact, "hf_quant_config.json", lambda config: config["quantization"].update(kv_cache_quant_algo=None))


BOTH = ("compressed-tensors", "modelopt")
CACHE_DAMAGE: dict[str, tuple[tuple[str, ...], Callable[[Path, str], None], set[str]]] = {
    "a scale off by its last bit": (BOTH, change_key_scale(lambda bits: bits.__iadd__(1)), CACHE),
    "a scale that is zero": (BOTH, change_key_scale(lambda bits: bits.__imul__(0)), CACHE),
    "a scale that is negative": (("compressed-tensors",), change_key_scale(lambda bits: bits.__ior__(0x8000)), CACHE),
    "a scale that is infinite": (("modelopt",), change_key_scale(lambda bits: bits.fill(0x7F800000)), CACHE),
    "a scale the wrong way round": (BOTH, invert_key_scale, CACHE),
    "scales that are all alike": (("compressed-tensors",), make_all_alike, CACHE),
    "a scale that is missing": (BOTH, drop_key_scale, {"kv cache", "plan"}),
    "a scale in another dtype": (BOTH, widen_key_scale, {"kv cache", "plan"}),
    "a config that does not speak of it": (BOTH, change_cache(), CONFIG),
    "a config that speaks of integers": (BOTH, change_cache(type="int"), CONFIG),
    "a config that calls it dynamic": (BOTH, change_cache(dynamic=True), CONFIG),
    "another config that does not speak of it": (("modelopt",), forget_in_the_other_file, CONFIG),
}


@pytest.mark.parametrize("layout", BOTH)
def test_a_good_release_with_scales_of_its_kv_cache_has_no_finding(
    cached: Callable[[str], Workspace], layout: str
) -> None:
    workspace = cached(layout)
    report = verify_artifact(
        workspace.artifact, workspace.base_folder(), describe_expected(workspace), sample=1, whole_model=True
    )
    assert report.findings == ()
    assert report.checks["kv cache"] == 8 and report.loaded_whole
    assert all(number > 0 for number in report.checks.values()), report.checks


@pytest.mark.parametrize(
    ("layout", "name"), [(layout, name) for name, case in CACHE_DAMAGE.items() for layout in case[0]]
)
def test_damage_to_scales_of_a_kv_cache_is_found(
    cached: Callable[[str], Workspace], tmp_path: Path, layout: str, name: str
) -> None:
    workspace, (_, mutate, checks) = cached(layout), CACHE_DAMAGE[name]
    artifact = tmp_path / "artifact"
    shutil.copytree(workspace.artifact, artifact)
    mutate(artifact, layout)
    expected = {key: value for key, value in describe_expected(workspace).items() if key != "payload"}
    report = verify_artifact(artifact, workspace.base_folder(), expected, sample=0, whole_model=False)
    assert {finding.check for finding in report.errors} == checks
    told = " ".join(finding.what for finding in report.errors)
    assert ("it is the inverse" in told) == (name == "a scale the wrong way round")
    assert ("injected, not measured" in told) == (name == "scales that are all alike")
    assert ("is F64 " in told and ", not " in told) == (name == "a scale in another dtype")


def test_scales_of_a_kv_cache_that_nobody_planned_are_found(
    cached: Callable[[str], Workspace], built: Callable[[str], Workspace]
) -> None:
    workspace, plain = cached("compressed-tensors"), describe_expected(built("fp8_dynamic"))
    expected = {key: value for key, value in plain.items() if key != "payload"}
    report = verify_artifact(workspace.artifact, workspace.base_folder(), expected, sample=0, whole_model=False)
    assert {finding.check for finding in report.errors} == {"plan", "layout", "quantization config"}


@pytest.mark.parametrize("scheme", PACKED)
def test_a_code_beside_the_right_one_is_found_by_the_reference(
    built: Callable[[str], Workspace], tmp_path: Path, scheme: str
) -> None:
    workspace, artifact = built(scheme), tmp_path / "artifact"
    shutil.copytree(workspace.artifact, artifact)
    name = f"{QUERY}.{codes(scheme)}"

    def change(raw: np.ndarray) -> None:
        raw[np.flatnonzero(raw & 0x0F == 3)[0]] ^= 1  # from 3 of the lowest bits to 2

    edit_bytes(artifact, name, change)
    expected = {key: value for key, value in describe_expected(workspace).items() if key != "payload"}
    report = verify_artifact(artifact, workspace.base_folder(), expected, sample=16, whole_model=False)
    assert ("reference", name) in {(finding.check, finding.where) for finding in report.errors}
