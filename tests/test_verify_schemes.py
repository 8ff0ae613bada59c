"""Releases without data have no finding; every kind of damage to one gives the finding of its own check."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import build, release_writer
from test_verify import edit, edit_bytes, quantization_change

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
