"""Schemes without data give the bytes and the config of llm-compressor, whatever a release is built with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build

from builder.base import Tensor, read_tensors
from builder.errors import BuildError, LayoutError, ManifestError, Problems
from builder.manifest import load_manifest
from builder.parts import view_bytes
from builder.schemes import SCHEMES, Scheme, bind_scheme
from builder.schemes.nvfp4 import Nvfp4
from builder.schemes.rounded import ROUNDED, W4A16

WriteRelease = Callable[..., Path]
LLM_COMPRESSOR = json.loads((Path(__file__).parent / "golden" / "llm-compressor.json").read_text("utf-8"))
NVFP4A16 = Nvfp4(name="nvfp4a16", quantizes_inputs=False)
DATA_FREE: dict[str, Scheme] = {**ROUNDED, "nvfp4a16": NVFP4A16}
WEIGHT = Tensor(name="q_proj.weight", dtype="BF16", shape=(24, 256))
DTYPES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.float32: "F32",
}


def make_weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def as_words(weight: torch.Tensor) -> np.ndarray[Any, Any]:
    return weight.view(torch.uint16).numpy()


def digest_tensors(folder: Path) -> dict[str, str]:
    found = {}
    for name, tensor in read_tensors(folder, str(folder)).items():
        content = (folder / tensor.file).read_bytes()[tensor.start : tensor.end]
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def build_scheme(write_release: WriteRelease, folder: Path, name: str, **changes: Any) -> Path:
    manifest = write_release(name.replace("_", "-"), **{"scheme.name": name, "calibration": None, **changes})
    return build(manifest, folder / name).artifact


# ------------------------------------------------------------------------------------------------ beside llm-compressor


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("shards", [1, [1, 2, 1]])
def test_every_tensor_of_a_release_is_llm_compressors(
    write_release: WriteRelease, tmp_path: Path, name: str, shards: Any
) -> None:
    assert digest_tensors(build_scheme(write_release, tmp_path, name, shards=shards)) == LLM_COMPRESSOR[name]["tensors"]


@pytest.mark.parametrize("name", DATA_FREE)
def test_the_config_is_the_one_llm_compressor_writes_key_for_key(name: str) -> None:
    ours, theirs = DATA_FREE[name].quantization_config(["lm_head"]), LLM_COMPRESSOR[name]["quantization_config"]
    assert ours["version"].split(".")[:2] == ["0", "20"]
    assert theirs["version"].split(".")[:2] == ["0", "19"]
    assert ours | {"version": ""} == theirs | {"version": ""}


def test_nvfp4a16_has_the_weights_of_nvfp4_under_the_names_of_llm_compressor(
    write_release: WriteRelease, tmp_path: Path
) -> None:
    ours = digest_tensors(build_scheme(write_release, tmp_path, "nvfp4a16"))
    nvfp4 = digest_tensors(build_scheme(write_release, tmp_path, "nvfp4", **{"scheme.input_scale": "unit"}))
    assert ours == {name: digest for name, digest in nvfp4.items() if not name.endswith("input_global_scale")}
    assert len(nvfp4) - len(ours) == 28
    assert ours.keys() == LLM_COMPRESSOR["nvfp4a16"]["tensors"].keys()


# ------------------------------------------------------------------------------------------------------- a linear


@pytest.mark.parametrize("name", DATA_FREE)
@pytest.mark.parametrize(("out_features", "in_features"), [(24, 256), (1, 128), (7, 384)])
@pytest.mark.parametrize("kind", [torch.Tensor, np.ndarray])
def test_what_is_planned_is_made_in_order_name_dtype_and_shape(
    name: str, out_features: int, in_features: int, kind: type
) -> None:
    scheme = DATA_FREE[name]
    linears = ("a.q_proj", "a.k_proj")
    planned = [
        tensor
        for linear in linears
        for tensor in scheme.plan_linear(linear, replace(WEIGHT, shape=(out_features, in_features)))
    ]
    weights = {linear: make_weight(out_features, in_features, seed=seed) for seed, linear in enumerate(linears)}
    before = {linear: weight.clone() for linear, weight in weights.items()}
    given: Any = weights if kind is torch.Tensor else {linear: as_words(weight) for linear, weight in weights.items()}
    made = scheme.quantize_group(given, {})
    assert [(name, tuple(made[name].shape), made[name].nbytes) for name in made] == [
        (tensor.name, tensor.shape, tensor.num_bytes) for tensor in planned
    ]
    assert all(isinstance(tensor, kind) for tensor in made.values())
    if kind is torch.Tensor:
        assert [DTYPES[tensor.dtype] for tensor in made.values()] == [tensor.dtype for tensor in planned]
    assert all(torch.equal(weights[linear], before[linear]) for linear in linears), "a weight was modified"


@pytest.mark.parametrize("name", DATA_FREE)
def test_words_and_tensors_give_the_same_bytes(name: str) -> None:
    weight = make_weight(6, 256)
    tensors = DATA_FREE[name].quantize_group({"q_proj": weight}, {})
    words = DATA_FREE[name].quantize_group({"q_proj": as_words(weight)}, {})
    assert tensors.keys() == words.keys()
    for key, tensor in tensors.items():
        assert bytes(view_bytes(tensor)) == bytes(view_bytes(words[key])), key


def test_the_shape_of_a_packed_weight_is_stored_with_it() -> None:
    made = W4A16.quantize_group({"q_proj": make_weight(6, 256)}, {})
    assert made["q_proj.weight_shape"].tolist() == [6, 256]


@pytest.mark.parametrize("name", ROUNDED)
def test_linears_that_read_the_same_input_are_quantized_each_by_itself(name: str) -> None:
    small, large = make_weight(4, 128), 9 * make_weight(4, 128, seed=1)
    together = ROUNDED[name].quantize_group({"q_proj": small, "k_proj": large}, {})
    for key, tensor in ROUNDED[name].quantize_group({"q_proj": small}, {}).items():
        assert bytes(view_bytes(together[key])) == bytes(view_bytes(tensor)), key


@pytest.mark.parametrize("name", ROUNDED)
def test_a_weight_that_is_all_zero_stays_so(name: str) -> None:
    made = ROUNDED[name].quantize_group({"q_proj": torch.zeros(2, 128).bfloat16()}, {})
    assert set(made["q_proj.weight_scale"].flatten().tolist()) == {2.0**-7}
    codes = made["q_proj.weight_packed" if name == "w4a16" else "q_proj.weight"]
    assert set(codes.view(torch.uint8).flatten().tolist()) == {0x88 if name == "w4a16" else 0}


@pytest.mark.parametrize("name", DATA_FREE)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(name: str, value: float) -> None:
    weight = make_weight(4, 128)
    weight[2, 77] = value
    with pytest.raises(LayoutError) as caught:
        DATA_FREE[name].quantize_group({"q_proj": make_weight(4, 128), "k_proj": weight}, {})
    assert (caught.value.what, caught.value.where) == ("the weights of k_proj are not finite", "k_proj.weight")


# ------------------------------------------------------------------------------------------------------- manifests


def plan(manifest: Path, folder: Path) -> BuildError:
    with pytest.raises(BuildError) as caught:
        build(manifest, folder, "plan")
    return caught.value


def test_columns_that_do_not_divide_into_groups_are_refused_by_name_before_any_weight_is_read(
    write_release: WriteRelease, tmp_path: Path
) -> None:
    base = {"base.path": None, "base.model": "o/n", "base.revision": "0" * 40, "base.config": "config.json"}
    manifest = write_release(**base, **{"scheme.name": "w4a16", "calibration": None})
    config = json.loads((manifest.parent / "base" / "config.json").read_text())
    (manifest.parent / "config.json").write_text(json.dumps({**config, "intermediate_size": 704}))
    assert str(plan(manifest, tmp_path / "build")) == (
        "model.layers.0.mlp.down_proj has 704 input features, which is not a multiple of 128\n"
        "  in model.layers.0.mlp.down_proj.weight\n"
        "  fix: add model.layers.0.mlp.down_proj to scheme.ignore"
    )


@pytest.mark.parametrize("name", DATA_FREE)
def test_nothing_is_calibrated_and_no_data_is_asked_for(write_release: WriteRelease, tmp_path: Path, name: str) -> None:
    workspace = build(write_release(**{"scheme.name": name, "calibration": None}), tmp_path / "build", "calibrate")
    assert workspace.facts("calibrate") == {"rows": None, "amax": {}, "machine_classes": []}
    assert not workspace.calibration.exists()


REFUSED = {
    "layout": ("modelopt", "it is written in the layout compressed-tensors"),
    "input_scale": ("unit", "no scales of inputs are stored"),
    "block_scale_floor": (False, "there are no block scales"),
}


@pytest.mark.parametrize("name", DATA_FREE)
@pytest.mark.parametrize("option", REFUSED)
def test_what_means_nothing_to_a_scheme_is_refused_with_its_line(
    write_release: WriteRelease, name: str, option: str
) -> None:
    value, why = REFUSED[option]
    manifest = write_release(**{"scheme.name": name, f"scheme.{option}": value})
    source = load_manifest(manifest)
    if (name, option) == ("nvfp4a16", "block_scale_floor"):
        assert bind_scheme(source) == replace(NVFP4A16, block_scale_floor=False)
        return
    with pytest.raises(ManifestError) as caught:
        bind_scheme(source)
    line = manifest.read_text("utf-8").splitlines().index(f"  {option}: {str(value).lower()}") + 1
    assert caught.value.what == f"{option} means nothing to {name}: {why}"
    assert caught.value.where.startswith(f"{manifest}:{line}:")
    assert caught.value.fix == "remove it"


def test_all_that_means_nothing_is_told_together(write_release: WriteRelease) -> None:
    changes = {"scheme.name": "w8a8", "scheme.input_scale": "calibrated", "scheme.block_scale_floor": True}
    with pytest.raises(Problems) as caught:
        bind_scheme(load_manifest(write_release(**changes)))
    assert len(caught.value.problems) == 2


def test_a_manifest_records_the_options_of_the_schemes_that_have_them(write_release: WriteRelease) -> None:
    chosen = {}
    for name in SCHEMES:
        (spec,) = load_manifest(write_release(**{"scheme.name": name})).what()["scheme"]
        chosen[name] = (spec["input_scale"], spec["block_scale_floor"])
    assert chosen == {
        "nvfp4": ("calibrated", True),
        "nvfp4a16": (None, True),
        "fp8_dynamic": (None, None),
        "w8a8": (None, None),
        "w4a16": (None, None),
    }
