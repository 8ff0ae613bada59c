"""A release of several schemes has, for each linear, what its own scheme alone would make of it, and says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import build
from test_rounded import digest_tensors

from builder.errors import BuildError, Problems
from builder.manifest import load_manifest
from builder.perplexity import measure_perplexity, open_artifact
from builder.render import describe_format, list_tags
from builder.schemes import bind_specs
from builder.stages import calibrate, make_key
from builder.stages.perplexity import read_layout
from builder.stages.verify import describe_expected
from builder.verify import CHECKS, verify_artifact

WriteRelease = Callable[..., Path]
DOWN, ATTENTION = "re:.*down_proj", r"re:model\.layers\.[01]\.self_attn"
MIXED = [
    {"match": DOWN, "name": "fp8_dynamic"},
    {"match": ATTENTION, "name": "w4a16"},
    {"match": "model.layers.3.self_attn.o_proj", "name": "nvfp4a16"},
    {"name": "nvfp4", "ignore": ["lm_head", "re:.*2.mlp.(gate|up)_proj"]},
]
UNIT = [*MIXED[:-1], {**MIXED[-1], "input_scale": "unit"}]


def find_scheme(linear: str) -> str:
    """Which scheme of MIXED a linear has; written anew."""
    if linear.endswith("down_proj"):
        return "fp8_dynamic"
    if "self_attn" in linear and linear.split(".")[2] in "01":
        return "w4a16"
    return "nvfp4a16" if linear.endswith("3.self_attn.o_proj") else "nvfp4"


def refuse(manifest: Path, folder: Path) -> list[tuple[str, str]]:
    with pytest.raises((BuildError, Problems)) as caught:
        build(manifest, folder, "plan")
    problems = caught.value.problems if isinstance(caught.value, Problems) else [caught.value]
    return [(problem.what, problem.where.split(": ")[1]) for problem in problems]


def test_every_tensor_is_what_its_scheme_alone_makes(write_release: WriteRelease, tmp_path: Path) -> None:
    mixed = build(write_release("mixed", scheme=UNIT, calibration=None), tmp_path / "mixed")
    found = digest_tensors(mixed.artifact)
    alone = {}
    for name in ("fp8_dynamic", "w4a16", "nvfp4a16", "nvfp4"):
        scheme = {"name": name, **({"input_scale": "unit"} if name == "nvfp4" else {})}
        manifest = write_release(name.replace("_", "-"), scheme=scheme, calibration=None)
        alone[name] = digest_tensors(build(manifest, tmp_path / name).artifact)
    quantized = set(mixed.facts("plan")["quantized"])
    assert len(quantized) == 26
    for name, digest in found.items():
        linear = name.rpartition(".")[0]
        if linear in quantized:
            assert digest == alone[find_scheme(linear)][name], name
    assert {name.rpartition(".")[0] for name in found} >= quantized
    for linear in quantized:
        own = {name for name in alone[find_scheme(linear)] if name.rpartition(".")[0] == linear}
        assert own == {name for name in found if name.rpartition(".")[0] == linear}
    assert "model.layers.2.mlp.up_proj.weight" in found


def test_the_config_names_the_linears_of_each_scheme_and_no_class(write_release: WriteRelease, tmp_path: Path) -> None:
    mixed = build(write_release(scheme=UNIT, calibration=None), tmp_path / "mixed")
    config = json.loads((mixed.artifact / "config.json").read_text())["quantization_config"]
    targets = {group["format"]: group["targets"] for group in list(config["config_groups"].values())[:2]}
    quantized = mixed.facts("plan")["quantized"]
    assert targets == {
        "float-quantized": sorted(name for name in quantized if find_scheme(name) == "fp8_dynamic"),
        "pack-quantized": sorted(name for name in quantized if find_scheme(name) == "w4a16"),
    }
    assert sorted(name for group in config["config_groups"].values() for name in group["targets"]) == sorted(quantized)
    assert config["format"] == "mixed-precision"
    assert config["ignore"] == ["lm_head", "model.layers.2.mlp.gate_proj", "model.layers.2.mlp.up_proj"]


def test_schemes_that_share_a_format_are_no_mixed_precision(write_release: WriteRelease) -> None:
    spec = load_manifest(write_release(scheme=[{"match": DOWN, "name": "nvfp4a16"}, {"name": "nvfp4"}])).release.scheme
    config = bind_specs(spec).quantization_config(["lm_head"], linears=["a.down_proj", "a.up_proj"])
    assert {group["format"] for group in config["config_groups"].values()} == {config["format"]}
    assert config["format"] == "nvfp4-pack-quantized"


def test_a_mixed_release_is_sound_to_every_reader(write_release: WriteRelease, tmp_path: Path) -> None:
    mixed = build(write_release(scheme=MIXED), tmp_path / "mixed")
    quantized = mixed.facts("plan")["quantized"]
    read = {linear for linear in quantized if find_scheme(linear) == "nvfp4"}
    assert set(mixed.facts("calibrate")["amax"]) == read, "inputs are measured where a scheme has scales of them"
    assert 0 < len(read) < len(quantized)
    assert sum(shard["inputs"]["good"] for shard in mixed.circumstances("calibrate")["health"]) == len(read)
    expected = describe_expected(mixed)
    report = verify_artifact(mixed.artifact, mixed.base_folder(), expected, sample=16, whole_model=True)
    assert report.findings == ()
    assert set(report.checks) == set(CHECKS) - {"kv cache"}
    assert all(report.checks.values()), report.checks
    stream = open_artifact(mixed.artifact, read_layout(mixed))
    assert 1 < measure_perplexity(stream, [list(range(3, 40))]) < 1e6


def test_a_mixed_release_has_scales_of_its_kv_cache_where_its_schemes_go_with_it(
    write_release: WriteRelease, tmp_path: Path
) -> None:
    schemes = [MIXED[0], {"name": "nvfp4"}]
    mixed = build(write_release(scheme=schemes, kv_cache="fp8"), tmp_path / "mixed")
    attentions = {f"model.layers.{layer}.self_attn" for layer in range(4)}
    scaled = {name for name in mixed.facts("plan")["quantized"] if not name.endswith("down_proj")}
    assert set(mixed.facts("calibrate")["amax"]) == scaled | attentions
    expected = describe_expected(mixed)
    report = verify_artifact(mixed.artifact, mixed.base_folder(), expected, sample=0, whole_model=False)
    assert report.findings == () and report.checks["kv cache"] == 8


def test_another_pattern_is_another_measurement(write_release: WriteRelease, tmp_path: Path) -> None:
    keys = []
    for match in (DOWN, "re:.*o_proj"):
        workspace = build(write_release(scheme=[{**MIXED[0], "match": match}, MIXED[-1]]), tmp_path / "mixed", "fetch")
        keys.append(make_key(workspace, calibrate.STAGE))
    assert keys[0] != keys[1], "other linears have inputs to measure"


def test_a_linear_listed_under_another_scheme_is_found(write_release: WriteRelease, tmp_path: Path) -> None:
    mixed = build(write_release(scheme=UNIT, calibration=None), tmp_path / "mixed")
    expected = {key: value for key, value in describe_expected(mixed).items() if key != "payload"}
    path = mixed.artifact / "config.json"
    config = json.loads(path.read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_1"]["targets"].append(groups["group_0"]["targets"].pop())
    path.write_text(json.dumps(config))
    report = verify_artifact(mixed.artifact, mixed.base_folder(), expected, sample=0, whole_model=False)
    assert {finding.check for finding in report.errors} == {"quantization config"}


def test_schemes_that_part_what_engines_run_as_one_are_refused(write_release: WriteRelease, tmp_path: Path) -> None:
    schemes = [{"match": "re:.*k_proj", "name": "fp8_dynamic"}, {"name": "w8a8"}]
    manifest = write_release(scheme=schemes, calibration=None)
    ((what, where),) = refuse(manifest, tmp_path / "build")
    first, other = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
    assert what == f"{first} and {other} get different schemes, but engines run them as one"
    assert where == "scheme[0].match"


def test_a_scheme_that_is_for_no_linear_is_refused(write_release: WriteRelease, tmp_path: Path) -> None:
    schemes: list[dict[str, Any]] = [
        {"match": "re:.*experts", "name": "w4a16"},
        {"match": "re:.*_proj", "name": "fp8_dynamic"},
        {"name": "w8a8"},
    ]
    assert refuse(write_release(scheme=schemes, calibration=None), tmp_path / "build") == [
        ("re:.*experts matches no linear that is left", "scheme[0].match"),
        ("no linear is left for the last scheme", "scheme[2]"),
    ]


def test_the_card_tells_of_every_scheme(write_release: WriteRelease) -> None:
    release = load_manifest(write_release(scheme=MIXED[1:])).release
    told = describe_format(release)
    assert told.label == "INT4, NVFP4A16 and NVFP4"
    assert told.bits == "W4A16 and W4A4"
    assert list_tags(release) == ["w4a16", "nvfp4a16", "nvfp4", "w4a4", "compressed-tensors", "vllm"]
