"""Scales of the KV cache are those of modelopt and of compressed-tensors, of what goes into the cache and no other."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from conftest import build
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_families import make_config
from test_rounded import digest_tensors

from builder.errors import BuildError, CalibrationError
from builder.manifest import load_manifest
from builder.parts import view_bytes
from builder.recorded import RECALIBRATED
from builder.schemes import bind_scheme
from builder.schemes.cache import describe_cache, make_scales, observe_cache, plan_scales

WriteRelease = Callable[..., Path]
LLM_COMPRESSOR = json.loads((Path(__file__).parent / "golden" / "llm-compressor.json").read_text("utf-8"))
GOLDEN = LLM_COMPRESSOR["kv_cache"]
ATTENTION = "model.layers.0.self_attn"


# ------------------------------------------------------------------------------------------------------ the arithmetic


def as_tensors(scales: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(scale).view(torch.bfloat16) if scale.dtype.itemsize == 2 else torch.tensor(scale)
        for name, scale in scales.items()
    }


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
def test_what_is_planned_is_made_in_order_name_dtype_and_shape(layout: str) -> None:
    made = make_scales(ATTENTION, layout, {"key": 3.0, "value": 5.0})
    planned = plan_scales(ATTENTION, layout)
    assert [(name, scale.shape, scale.nbytes) for name, scale in made.items()] == [
        (tensor.name, tensor.shape, tensor.num_bytes) for tensor in planned
    ]
    assert {tensor.dtype for tensor in planned} == {"BF16" if layout == "compressed-tensors" else "F32"}
    assert all(bytes(view_bytes(scale)) for scale in made.values())


@given(key=st.floats(2.0**-60, 2.0**60, width=32), value=st.floats(2.0**-60, 2.0**60, width=32))
def test_scales_are_those_of_either_library_to_the_last_bit(key: float, value: float) -> None:
    largest = [torch.tensor([magnitude]).bfloat16() for magnitude in (key, value)]
    amax = {"key": float(largest[0]), "value": float(largest[1])}
    arguments = QuantizationArgs(num_bits=8, type="float", strategy="tensor", symmetric=True)
    wanted = [calculate_qparams(-magnitude, magnitude, arguments)[0] for magnitude in largest]
    ours = as_tensors(make_scales(ATTENTION, "compressed-tensors", amax))
    assert [ours[f"{ATTENTION}.{kind}_scale"].item() for kind in "kv"] == [scale.item() for scale in wanted]
    assert {scale.dtype for scale in (*wanted, *ours.values())} == {torch.bfloat16}
    ours = as_tensors(make_scales(ATTENTION, "modelopt", amax))
    for kind, magnitude in zip("kv", largest, strict=True):
        assert torch.equal(ours[f"{ATTENTION}.{kind}_proj.{kind}_scale"], (magnitude.float() / 448)[0])


def test_llm_compressors_scales_come_from_the_magnitudes_it_saw() -> None:
    found = GOLDEN["scales"]
    assert len(found) == 8
    for layer in range(4):
        attention = f"model.layers.{layer}.self_attn"
        kinds = {"key": f"{attention}.k_scale", "value": f"{attention}.v_scale"}
        amax = {kind: float.fromhex(found[name]["amax"]) for kind, name in kinds.items()}
        ours = as_tensors(make_scales(attention, "compressed-tensors", amax))
        for name in kinds.values():
            wanted = found[name]
            assert str(ours[name].dtype) == wanted["dtype"] and list(ours[name].shape) == wanted["shape"]
            assert float(ours[name]).hex() == float.fromhex(wanted["scale"]).hex(), name


def test_the_config_is_the_one_llm_compressor_writes() -> None:
    plain = {**LLM_COMPRESSOR["fp8_dynamic"]["quantization_config"]}
    assert describe_cache(plain, "compressed-tensors") == GOLDEN["quantization_config"]


# ---------------------------------------------------------------------------------------------------- what is observed

FAMILIES = [
    ("LlamaForCausalLM", "llama"),
    ("Qwen3ForCausalLM", "qwen3"),
    ("Gemma2ForCausalLM", "gemma2"),
    ("Cohere2ForCausalLM", "cohere2"),
    ("Phi3ForCausalLM", "phi3"),
    ("Olmo2ForCausalLM", "olmo2"),
]


@pytest.mark.parametrize(("architecture", "model_type"), FAMILIES)
def test_the_largest_key_and_value_of_a_cache_are_observed_and_change_nothing(
    architecture: str, model_type: str
) -> None:
    torch.manual_seed(1)
    config = transformers.CONFIG_MAPPING[model_type].from_dict(make_config(architecture, model_type))
    model = getattr(transformers, architecture)._from_config(config, dtype=torch.bfloat16).eval()
    rows = [torch.randint(0, 60, (1, length)) for length in (11, 5)]
    wanted: dict[str, dict[str, float]] = {}
    with torch.inference_mode():
        plain = [model(row, use_cache=False).logits for row in rows]
        caches = [model(row, past_key_values=transformers.DynamicCache()).past_key_values for row in rows]
    for index in range(2):
        states = {"key": [c.layers[index].keys for c in caches], "value": [c.layers[index].values for c in caches]}
        wanted[f"model.layers.{index}.self_attn"] = {
            kind: max(float(state.abs().max()) for state in seen) for kind, seen in states.items()
        }
    with torch.inference_mode(), ExitStack() as observers:
        reads = [
            observers.enter_context(observe_cache(model, "", f"model.layers.{index}.self_attn")) for index in range(2)
        ]
        assert [read() for read in reads] == [{}, {}], "nothing has passed yet"
        observed = [model(row, use_cache=False).logits for row in rows]
        assert {name: kinds for read in reads for name, kinds in read().items()} == wanted
    assert all(torch.equal(one, other) for one, other in zip(plain, observed, strict=True))
    with torch.inference_mode():
        model(100 * torch.ones(1, 1, dtype=torch.long) % 60, use_cache=False)
    assert {name: kinds for read in reads for name, kinds in read().items()} == wanted, "it is watched no more"


def test_keys_that_are_not_numbers_name_their_attention() -> None:
    config = transformers.LlamaConfig(**make_config("LlamaForCausalLM", "llama"))
    model = transformers.LlamaForCausalLM(config).eval()
    model.model.layers[0].self_attn.k_proj.weight.data[3, 3] = float("nan")
    with torch.inference_mode(), observe_cache(model, "", ATTENTION) as read:
        model(torch.ones(1, 3, dtype=torch.long), use_cache=False)
        with pytest.raises(CalibrationError) as caught:
            read()
    assert caught.value.what == f"there is a NaN or an infinity in the key of {ATTENTION}"


# --------------------------------------------------------------------------------------------------------- in a release


def read_scales(artifact: Path) -> dict[str, torch.Tensor]:
    tensors = {name: tensor for path in artifact.glob("*.safetensors") for name, tensor in load_file(path).items()}
    return {name: tensor for name, tensor in tensors.items() if name.endswith(("k_scale", "v_scale"))}


def test_a_release_has_llm_compressors_tensors_and_scales_of_the_same_rows(
    write_release: WriteRelease, tmp_path: Path
) -> None:
    """Weights are equal bit for bit; scales as near as keys and values are on another machine and another library."""
    rows, tokens = GOLDEN["rows"], GOLDEN["tokens"]
    changes = {"kv_cache": "fp8", "calibration.samples": rows, "calibration.tokens": [1, tokens]}
    manifest = write_release(**{"scheme.name": "fp8_dynamic", "shards": 3, **changes})
    data = manifest.with_name("calibration.jsonl")
    data.write_text("".join(data.read_text("utf-8").splitlines(keepends=True)[:rows]), "utf-8")
    workspace = build(manifest, tmp_path / "build")
    digests, found = digest_tensors(workspace.artifact), read_scales(workspace.artifact)
    assert found.keys() == GOLDEN["scales"].keys()
    plain = {name: digest for name, digest in digests.items() if name not in found}
    assert plain == LLM_COMPRESSOR["fp8_dynamic"]["tensors"]
    for name, wanted in GOLDEN["scales"].items():
        assert (str(found[name].dtype), list(found[name].shape)) == (wanted["dtype"], wanted["shape"])
        assert float(found[name]) == pytest.approx(float.fromhex(wanted["scale"]), rel=RECALIBRATED)
    config = json.loads((workspace.artifact / "config.json").read_text("utf-8"))["quantization_config"]
    assert config | {"version": ""} == GOLDEN["quantization_config"] | {"version": ""}
    assert {frozenset(kinds) for kinds in workspace.facts("calibrate")["amax"].values()} == {
        frozenset({"key", "value"})
    }


def test_scales_do_not_depend_on_who_ran_which_rows(write_release: WriteRelease, tmp_path: Path) -> None:
    payloads = set()
    for shards in (1, 4):
        changes = {"scheme.name": "nvfp4a16", "kv_cache": "fp8", "calibration.samples": 5, "shards": shards}
        workspace = build(write_release(**changes), tmp_path / f"build-{shards}")
        payloads.add(workspace.facts("assemble")["payload_sha256"])
        assert len(read_scales(workspace.artifact)) == 8
    assert len(payloads) == 1


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
def test_schemes_that_it_is_not_proven_with_are_refused(write_release: WriteRelease, scheme: str) -> None:
    manifest = load_manifest(write_release(**{"scheme.name": scheme, "kv_cache": "fp8"}))
    with pytest.raises(BuildError) as caught:
        bind_scheme(manifest)
    assert str(caught.value) == (
        f"kv_cache: fp8 does not go with {scheme}\n"
        f"  in {manifest.where('kv_cache')}\n"
        "  fix: remove it, or use nvfp4, nvfp4a16, fp8_dynamic alone"
    )
    allowed = [{"match": "re:.*mlp", "name": "fp8_dynamic"}, {"name": "nvfp4"}]
    assert bind_scheme(load_manifest(write_release(scheme=allowed, kv_cache="fp8"))).name == "mixed"
