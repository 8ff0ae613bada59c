"""What a scheme plans is what it makes, and its configs are those that readers and the reference library know."""

from __future__ import annotations

import io
import json
import math
import struct
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build

from builder.base import DTYPE_BYTES, Tensor
from builder.errors import LayoutError, ManifestError, Problems
from builder.families import describe_architecture
from builder.manifest import load_manifest
from builder.parts import view_bytes
from builder.schemes import Mixed, bind_scheme
from builder.schemes.nvfp4 import Nvfp4
from builder.schemes.rounded import FP8_DYNAMIC

pytestmark = pytest.mark.xdist_group("modelopt")

WriteRelease = Callable[..., Path]
LAYOUTS = ("compressed-tensors", "modelopt")
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 64,
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
    "pad_token_id": 0,
}
TORCH_NAMES = {torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32"}
WEIGHT = Tensor(name="q_proj.weight", dtype="BF16", shape=(24, 48))


def float32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def make_weight(*shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


# -------------------------------------------------------------------------------------------------------- binding


def refuse(manifest: Path) -> str:
    with pytest.raises(ManifestError) as caught:
        bind_scheme(load_manifest(manifest))
    assert caught.value.where.startswith(str(manifest))
    return "\n".join((caught.value.what, caught.value.where.removeprefix(f"{manifest}:"), caught.value.fix))


def test_a_scheme_is_bound_with_the_manifests_options(write_release: WriteRelease) -> None:
    assert bind_scheme(load_manifest(write_release())) == Nvfp4()
    changes = {"scheme.layout": "modelopt", "scheme.input_scale": "unit", "scheme.block_scale_floor": False}
    bound = bind_scheme(load_manifest(write_release(**changes)))
    assert bound == Nvfp4(layout="modelopt", input_scale="unit", block_scale_floor=False)
    assert (bound.measures_inputs, Nvfp4().measures_inputs) == (False, True)


def test_an_unknown_scheme_gets_the_nearest_name(write_release: WriteRelease) -> None:
    assert refuse(write_release(**{"scheme.name": "nvpf4"})) == (
        "unknown scheme: nvpf4\n9:9: scheme.name: nvpf4\n"
        "did you mean nvfp4? Valid: fp8_dynamic, nvfp4, nvfp4a16, w4a16, w8a8"
    )


def bind_list(write_release: WriteRelease, *schemes: dict[str, Any]) -> list[str]:
    """What is said of a list of schemes, each problem as its sentence and its key."""
    path = write_release(scheme=list(schemes))
    with pytest.raises((ManifestError, Problems)) as caught:
        bind_scheme(load_manifest(path))
    problems = caught.value.problems if isinstance(caught.value, Problems) else [caught.value]
    return [f"{problem.what} ({problem.where.split(': ')[1]})" for problem in problems]


def test_a_list_of_schemes_ends_with_the_one_for_all_other_linears(write_release: WriteRelease) -> None:
    schemes = [{"match": "re:.*down_proj", "name": "fp8_dynamic"}, {"name": "nvfp4", "input_scale": "unit"}]
    bound = bind_scheme(load_manifest(write_release(scheme=schemes)))
    assert bound == Mixed(parts=(("re:.*down_proj", FP8_DYNAMIC), (None, Nvfp4(input_scale="unit"))))
    assert not bound.measures_inputs
    del schemes[1]["input_scale"]
    assert bind_scheme(load_manifest(write_release(scheme=schemes))).measures_inputs


def test_a_list_that_leaves_linears_without_a_scheme_is_refused(write_release: WriteRelease) -> None:
    assert bind_list(write_release, {"match": "re:.*mlp", "name": "w8a8"}) == [
        "the last scheme is for re:.*mlp alone, and other linears have none (scheme[0].match)"
    ]


def test_a_scheme_that_leaves_nothing_to_those_after_it_is_refused(write_release: WriteRelease) -> None:
    assert bind_list(write_release, {"name": "w8a8"}, {"name": "nvfp4a16"}) == [
        "a scheme without match takes all linears, and leaves none to those after it (scheme[0])"
    ]


def test_every_scheme_of_a_list_is_looked_at(write_release: WriteRelease) -> None:
    several = [
        {"match": "re:(", "name": "w8a8", "block_scale_floor": True},
        {"match": "re:.*mlp", "name": "fp8"},
        {"name": "nvfp4", "layout": "modelopt"},
    ]
    assert bind_list(write_release, *several) == [
        "block_scale_floor means nothing to w8a8: there are no block scales (scheme[0].block_scale_floor)",
        "re:( is not a regular expression: missing ), unterminated subpattern at position 0 (scheme[0].match)",
        "unknown scheme: fp8 (scheme[1].name)",
        "layout is for a single scheme: several are written in the layout compressed-tensors (scheme[2].layout)",
    ]


# ------------------------------------------------------------------------------------------------------- planning


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("input_scale", ["calibrated", "unit"])
@pytest.mark.parametrize(("out_features", "in_features"), [(24, 48), (1, 16), (7, 160), (64, 16)])
def test_what_is_planned_is_made_in_order_name_dtype_and_shape(
    layout: str, input_scale: str, out_features: int, in_features: int
) -> None:
    scheme = Nvfp4(layout=layout, input_scale=input_scale)
    linears = ("a.q_proj", "a.k_proj")
    planned = [
        tensor
        for linear in linears
        for tensor in scheme.plan_linear(linear, replace(WEIGHT, shape=(out_features, in_features)))
    ]
    weights = {linear: make_weight(out_features, in_features, seed=seed) for seed, linear in enumerate(linears)}
    made = scheme.quantize_group(weights, dict.fromkeys(linears, 3.0))
    assert [(name, TORCH_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in made.items()] == [
        (tensor.name, tensor.dtype, tensor.shape) for tensor in planned
    ]
    assert sum(tensor.nbytes for tensor in made.values()) == sum(tensor.num_bytes for tensor in planned)
    assert {tensor.dtype for tensor in planned} <= DTYPE_BYTES.keys()


def test_nine_sixteenths_of_a_byte_are_planned_for_each_weight() -> None:
    packed, scale, *scalars = Nvfp4().plan_linear("q_proj", WEIGHT)
    assert (packed.num_bytes + scale.num_bytes) / WEIGHT.num_elements == 0.5625
    assert [tensor.num_bytes for tensor in scalars] == [4, 4]


def test_a_weight_that_cannot_be_cut_into_blocks_is_refused() -> None:
    with pytest.raises(LayoutError) as caught:
        Nvfp4().plan_linear("q_proj", replace(WEIGHT, shape=(24, 40)))
    assert str(caught.value) == (
        "q_proj has 40 input features, which is not a multiple of 16\n"
        "  in q_proj.weight\n"
        "  fix: add q_proj to scheme.ignore"
    )


# --------------------------------------------------------------------------------------------------- global scales


def quantize(layout: str, weight: torch.Tensor, amax: float = 1.0, input_scale: str = "calibrated") -> Any:
    scheme = Nvfp4(layout=layout, input_scale=input_scale)
    made = scheme.quantize_group({"q_proj": weight}, {"q_proj": amax})
    return [tensor for name, tensor in made.items() if TORCH_NAMES[tensor.dtype] == "F32"]


def with_amax(value: float) -> torch.Tensor:
    weight = torch.zeros(2, 32, dtype=torch.bfloat16)
    weight[1, 3] = -value
    assert float(weight.abs().max()) == value, "the test's value is a bfloat16 number"
    return weight


@pytest.mark.parametrize("value", [1.0, 2688.0, 2**-126, 2**-133, 3.3895313892515355e38, 0.10009765625])
def test_the_weights_scale_is_a_float32_quotient(value: float) -> None:
    scale, _ = quantize("modelopt", with_amax(value))
    assert (scale.dtype, scale.shape) == (torch.float32, ())
    assert float(scale) == float32(value / 2688) > 0


@pytest.mark.parametrize("amax", [1.0, 2688.0, 116.0, 2**-126, 2**-133, 3.3895313892515355e38])
def test_the_inputs_scale_is_a_float32_quotient(amax: float) -> None:
    _, scale = quantize("modelopt", make_weight(2, 32), amax)
    assert (scale.dtype, scale.shape) == (torch.float32, ())
    assert float(scale) == float32(amax / 2688) > 0


@pytest.mark.parametrize("value", [1.0, 2688.0, 0.10009765625, 2**-113, 3.3895313892515355e38])
def test_compressed_tensors_stores_the_float32_reciprocals(value: float) -> None:
    for weight, amax in ((with_amax(value), 1.0), (with_amax(1.0), value)):
        plain, inverse = quantize("modelopt", weight, amax), quantize("compressed-tensors", weight, amax)
        for ours, stored in zip(plain, inverse, strict=True):
            assert (stored.dtype, stored.shape) == (torch.float32, (1,))
            assert float(stored) == float32(1 / float(ours)) < math.inf


@pytest.mark.parametrize(("weight", "amax", "kind"), [(2**-133, 1.0, "weight"), (1.0, 2**-133, "input")])
def test_a_scale_whose_reciprocal_is_infinite_is_refused(weight: float, amax: float, kind: str) -> None:
    with pytest.raises(LayoutError) as caught:
        quantize("compressed-tensors", with_amax(weight), amax)
    assert str(caught.value) == (
        f"the {kind} scale of q_proj would be inf\n"
        "  in q_proj.weight\n"
        "  fix: add q_proj to scheme.ignore, or see whether the base model is sound"
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unit_scales_are_one_and_need_no_amax(layout: str) -> None:
    scheme = Nvfp4(layout=layout, input_scale="unit")
    made = scheme.quantize_group({"q_proj": make_weight(4, 32)}, {})
    found = made["q_proj.input_scale" if layout == "modelopt" else "q_proj.input_global_scale"]
    assert found.dtype == torch.float32 and found.tolist() == (1.0 if layout == "modelopt" else [1.0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_group_shares_the_scales_of_its_largest_weight_and_input(layout: str) -> None:
    scheme = Nvfp4(layout=layout)
    weights = {"q_proj": make_weight(4, 32), "k_proj": make_weight(2, 32, scale=7.0, seed=1)}
    together = scheme.quantize_group(weights, {"q_proj": 5.0, "k_proj": 3.0})
    largest = scheme.quantize_group({"k_proj": weights["k_proj"]}, {"k_proj": 5.0})
    for name, tensor in largest.items():
        assert bytes(view_bytes(together[name])) == bytes(view_bytes(tensor)), name
    for name, tensor in together.items():
        if tensor.dtype == torch.float32:
            assert tensor == together[name.replace("q_proj", "k_proj")], name


def test_weights_are_not_modified() -> None:
    weight = make_weight(4, 32)
    before = weight.clone()
    quantize("modelopt", weight)
    assert torch.equal(weight, before)


# ---------------------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize("input_scale", ["calibrated", "unit"])
def test_compressed_tensors_reads_its_config_as_its_own_nvfp4(input_scale: str) -> None:
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

    config = Nvfp4(input_scale=input_scale).quantization_config(["lm_head"])
    parsed = QuantizationConfig.model_validate(config)
    wanted = preset_name_to_scheme("NVFP4", ["Linear"])
    (group,) = parsed.config_groups.values()
    assert group.format == parsed.format == "nvfp4-pack-quantized"
    assert group.targets == ["Linear"]
    for part in ("weights", "input_activations"):
        ours, theirs = getattr(group, part).model_dump(), getattr(wanted, part).model_dump()
        assert {**ours, "observer": None} == {**theirs, "observer": None}, part
    assert parsed.quantization_status == "compressed"
    assert parsed.ignore == ["lm_head"]


def test_compressed_tensors_would_write_the_same_config() -> None:
    """But for what it leaves to its defaults: how weights were observed, and caches that are not quantized."""
    from compressed_tensors.quantization import QuantizationConfig

    config = Nvfp4().quantization_config(["lm_head"])
    written = json.loads(QuantizationConfig.model_validate(config).model_dump_json())
    assert_contains(written, {key: value for key, value in config.items() if key != "version"})


def assert_contains(whole: Any, part: Any, where: str = "") -> None:
    if isinstance(part, dict):
        for key, value in part.items():
            assert key in whole, f"{where}.{key}"
            assert_contains(whole[key], value, f"{where}.{key}")
    else:
        assert whole == part, where


def test_lists_of_what_stays_are_sorted_and_name_no_embeddings_for_compressed_tensors() -> None:
    ignore, embeddings = ["model.layers.1.mlp.down_proj", "lm_head"], ["model.embed_tokens"]
    assert Nvfp4().quantization_config(ignore, embeddings)["ignore"] == sorted(ignore)
    assert Nvfp4().extra_configs(ignore, embeddings) == {}
    modelopt = Nvfp4(layout="modelopt")
    wanted = ["lm_head", "model.embed_tokens", "model.layers.1.mlp.down_proj"]
    assert modelopt.quantization_config(ignore, embeddings)["ignore"] == wanted
    beside = modelopt.extra_configs(ignore, embeddings)
    assert beside["hf_quant_config.json"]["quantization"]["exclude_modules"] == wanted


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Path]]:
    """modelopt's own export of a tiny model with random weights."""
    import modelopt.torch.quantization as mtq
    import transformers
    from modelopt.torch.export import export_hf_checkpoint

    def run(model_type: str, *disabled: str, **changes: Any) -> Path:
        config = transformers.CONFIG_MAPPING[model_type](**{**LLAMA, **changes})
        model = getattr(transformers, config.architectures[0])(config).to(torch.bfloat16)
        folder = tmp_path_factory.mktemp("modelopt")
        quantizers = [{"quantizer_name": f"*{name}*", "enable": False} for name in disabled]
        quant_cfg = {**mtq.NVFP4_DEFAULT_CFG, "quant_cfg": [*mtq.NVFP4_DEFAULT_CFG["quant_cfg"], *quantizers]}
        with redirect_stdout(io.StringIO()):
            mtq.quantize(model, quant_cfg, lambda model: model(torch.arange(11)[None]))
            export_hf_checkpoint(model, export_dir=str(folder))
        return folder

    yield run


@pytest.mark.parametrize(
    ("model_type", "disabled", "changes"),
    [
        ("llama", (), {}),
        ("llama", (), {"tie_word_embeddings": True}),
        ("llama", ("layers.1.mlp.down_proj",), {}),
        ("gemma2", (), {"architectures": ["Gemma2ForCausalLM"]}),
    ],
    ids=["llama", "tied", "with an ignored linear", "gemma"],
)
def test_configs_of_the_modelopt_layout_are_those_modelopt_writes(
    export: Callable[..., Path], model_type: str, disabled: tuple[str, ...], changes: dict[str, Any]
) -> None:
    folder = export(model_type, *disabled, **changes)
    scheme = Nvfp4(layout="modelopt")
    theirs = json.loads((folder / "config.json").read_text())
    architecture = describe_architecture({**LLAMA, "model_type": model_type, **changes}, "config.json")
    ignore = [*architecture.other_linears, *(f"model.{name}" for name in disabled)]
    ours = scheme.quantization_config(ignore, architecture.embeddings)
    assert ours == theirs["quantization_config"]
    beside = scheme.extra_configs(ignore, architecture.embeddings)
    assert beside == {"hf_quant_config.json": json.loads((folder / "hf_quant_config.json").read_text())}


def test_a_built_release_carries_the_configs_modelopt_writes(
    export: Callable[..., Path], write_release: WriteRelease, tmp_path: Path
) -> None:
    manifest = write_release(**{"scheme.layout": "modelopt", "scheme.input_scale": "unit", "calibration": None})
    artifact = build(manifest, tmp_path / "build").artifact
    folder = export("llama")
    ours, theirs = (
        json.loads((path / "config.json").read_text())["quantization_config"] for path in (artifact, folder)
    )
    # the one thing that a release with unit scales says otherwise, by the fix dynamic-input-activations
    assert ours["config_groups"]["group_0"]["input_activations"].pop("dynamic") is True
    assert theirs["config_groups"]["group_0"]["input_activations"].pop("dynamic") is False
    assert ours == theirs
    name = "hf_quant_config.json"
    assert json.loads((artifact / name).read_text()) == json.loads((folder / name).read_text())
