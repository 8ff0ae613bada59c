"""Bases in float16, float32, or several dtypes at once give what the reference libraries make of them, bit for bit."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from cast_base import cast_base
from conftest import TINY_LLAMA, build
from safetensors.torch import load_file
from test_channel_kernels import reference
from test_kernels import reference_0_47
from test_verify import edit_bytes

from builder.base import open_checkpoint
from builder.errors import BaseError
from builder.schemes.rounded import ROUNDED
from builder.stages import Workspace
from builder.stages.verify import describe_expected
from builder.verify import verify_artifact

pytestmark = pytest.mark.xdist_group("modelopt")

WriteRelease = Callable[..., Path]
LLM_COMPRESSOR = json.loads((Path(__file__).parent / "golden" / "llm-compressor.json").read_text("utf-8"))
UNIT = {"scheme.input_scale": "unit", "calibration": None}
OTHER_DTYPES = ("float16", "float32")
QUERY, KEY = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"
OTHERS = {  # one linear of a group, all of a group, one by itself; what is kept, too
    f"{QUERY}.weight": torch.float16,
    f"{KEY}.weight": torch.float32,
    "model.layers.2.mlp.gate_proj.weight": torch.float16,
    "model.layers.2.mlp.up_proj.weight": torch.float16,
    "model.layers.3.mlp.down_proj.weight": torch.float32,
    "model.layers.0.input_layernorm.weight": torch.float32,
    "model.embed_tokens.weight": torch.float16,
}


@pytest.fixture
def write_in(write_release: WriteRelease) -> WriteRelease:
    """Writes a release whose base has a dtype, or, for "mixed", is bfloat16 with others among it."""

    def write(dtype: str, said: str | None = None, **changes: Any) -> Path:
        path = write_release(**changes)
        base = path.parent / "base"
        shutil.rmtree(base)
        plain = torch.bfloat16 if dtype == "mixed" else getattr(torch, dtype)
        others = OTHERS if dtype == "mixed" else {}
        said = "bfloat16" if dtype == "mixed" else dtype if said is None else said
        cast_base(TINY_LLAMA / "base", base, lambda name: others.get(name, plain), said or None)
        return path

    return write


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()


# ------------------------------------------------------------------------------------------ beside the whole libraries


@pytest.mark.parametrize("dtype", OTHER_DTYPES)
def test_every_tensor_is_the_one_modelopt_exports_of_the_whole_model_in_its_dtype(
    write_in: WriteRelease, tmp_path: Path, dtype: str
) -> None:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    path = write_in(dtype, **UNIT, **{"scheme.layout": "modelopt"})
    model = AutoModelForCausalLM.from_pretrained(path.parent / "base", dtype="auto").eval()
    assert model.dtype == getattr(torch, dtype)
    with redirect_stdout(io.StringIO()):
        mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, lambda model: model(torch.arange(11)[None]))
        export_hf_checkpoint(model, export_dir=str(tmp_path / "modelopt"))
    wanted = read(tmp_path / "modelopt")
    artifact = build(path, tmp_path / "build").artifact
    found = read(artifact)
    for name in [name for name in wanted if name.endswith(".input_scale")]:
        assert wanted[name].dtype == found[name].dtype and found[name] == 1, "no rows were run here"
        wanted[name] = found[name]
    assert_same(found, wanted)
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (artifact, tmp_path / "modelopt"))
    assert ours["dtype"] == theirs["dtype"] == dtype


@pytest.mark.parametrize("dtype", OTHER_DTYPES)
@pytest.mark.parametrize("name", ROUNDED)
def test_every_tensor_is_the_one_llm_compressor_makes_in_its_dtype(
    write_in: WriteRelease, tmp_path: Path, dtype: str, name: str
) -> None:
    artifact = build(write_in(dtype, **{"scheme.name": name, "calibration": None}), tmp_path / "build").artifact
    found, wanted = read(artifact), LLM_COMPRESSOR[dtype][name]
    assert {name: str(tensor.dtype) for name, tensor in sorted(found.items())} == wanted["dtypes"]
    assert {name: digest(tensor) for name, tensor in sorted(found.items())} == wanted["tensors"]
    config = json.loads((artifact / "config.json").read_text())
    assert config["dtype"] == wanted["dtype"]
    assert config["quantization_config"] | {"version": ""} == wanted["quantization_config"] | {"version": ""}


# ---------------------------------------------------------------------------------------------- several dtypes at once


def group_of(linear: str) -> list[str]:
    """The linears that share a global scale with one."""
    groups = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
    parent, _, name = linear.rpartition(".")
    return [f"{parent}.{other}" for group in groups if name in group for other in group] or [linear]


def test_each_linear_of_a_mixed_base_is_quantized_from_its_own_values_by_modelopts_arithmetic(
    write_in: WriteRelease, tmp_path: Path
) -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    path = write_in("mixed", **UNIT, **{"scheme.layout": "modelopt"})
    found, base = read(build(path, tmp_path / "build").artifact), read(path.parent / "base")
    wanted = dict(base)
    for name in [name for name in found if name.endswith(".weight_scale_2")]:
        linear = name.removesuffix(".weight_scale_2")
        amax = torch.stack([base[f"{other}.weight"].abs().amax().float() for other in group_of(linear)]).amax()
        wanted[name] = amax / 2688.0
        codes, scales = reference_0_47(NVFP4QTensor, base[f"{linear}.weight"], wanted[name].item())
        wanted |= {f"{linear}.weight": codes, f"{linear}.weight_scale": scales}
        wanted[f"{linear}.input_scale"] = torch.tensor(1.0)
    assert {base[name].dtype for name in base} == {torch.bfloat16, torch.float16, torch.float32}
    assert_same(found, wanted)


@pytest.mark.parametrize(("name", "preset"), zip(ROUNDED, ("FP8_DYNAMIC", "W8A8", "W4A16"), strict=True))
def test_each_linear_of_a_mixed_base_is_quantized_from_its_own_values_by_compressed_tensors_arithmetic(
    write_in: WriteRelease, tmp_path: Path, name: str, preset: str
) -> None:
    path = write_in("mixed", **{"scheme.name": name, "calibration": None})
    found, base = read(build(path, tmp_path / "build").artifact), read(path.parent / "base")
    wanted = {}
    for key, weight in base.items():
        linear = key.removesuffix(".weight")
        if f"{linear}.weight_scale" not in found:
            wanted[key] = weight
            continue
        codes, wanted[f"{linear}.weight_scale"] = reference(preset, weight)
        wanted[f"{linear}.weight_packed" if name == "w4a16" else key] = codes
        if name == "w4a16":
            wanted[f"{linear}.weight_shape"] = torch.tensor(weight.shape)
    assert {found[f"{linear}.weight_scale"].dtype for linear in (QUERY, KEY)} == {torch.float16, torch.float32}
    assert_same(found, wanted)


def test_the_plan_says_which_tensors_have_another_dtype(write_in: WriteRelease, tmp_path: Path) -> None:
    path = write_in("mixed", **UNIT)
    assert tell_dtypes(build(path, tmp_path / "mixed", "plan")) == [
        "warning (dtype): 4 in float16 and 3 in float32 of 39 tensors, but config.json says bfloat16: "
        "each is quantized or kept as it is stored"
    ]
    assert tell_dtypes(build(write_in("float16", **UNIT), tmp_path / "float16", "plan")) == []


def tell_dtypes(workspace: Workspace) -> list[str]:
    from builder.stages.plan import make_plan, warn_of_dtypes

    return list(warn_of_dtypes(make_plan(workspace)))


# ------------------------------------------------------------------------------------------- whatever reads it after us

EVERY_SCHEME = [
    {"match": "re:.*(q|k|v)_proj", "name": "fp8_dynamic"},
    {"match": "re:.*(gate|up)_proj", "name": "w8a8"},
    {"match": "re:.*o_proj", "name": "w4a16"},
    {"name": "nvfp4", "input_scale": "unit"},
]


def judge(workspace: Workspace, **options: Any) -> list[tuple[str, str]]:
    """Check and place of whatever is found in an artifact."""
    expected = {**describe_expected(workspace), "payload": None}  # files are damaged here without a new digest
    report = verify_artifact(workspace.artifact, workspace.base_folder(), expected, **options)
    return [(finding.check, finding.where) for finding in report.findings]


@pytest.mark.parametrize("dtype", [*OTHER_DTYPES, "mixed"])
def test_nothing_is_found_in_such_a_release_but_what_was_damaged(
    write_in: WriteRelease, tmp_path: Path, dtype: str
) -> None:
    workspace = build(write_in(dtype, scheme=EVERY_SCHEME, calibration=None), tmp_path / "build")
    assert judge(workspace, whole_model=True) == []
    for linear in (KEY, QUERY.replace("q_proj", "o_proj"), QUERY.replace("self_attn.q", "mlp.up")):
        edit_bytes(workspace.artifact, f"{linear}.weight_scale", lambda raw: raw.__setitem__(4, raw[4] ^ 1))
        found = judge(workspace, sample=0, whole_model=False)
        assert ("scales", f"{linear}.weight_scale") in found and {check for check, _ in found} <= {
            "scales",
            "dequantized",
        }
        edit_bytes(workspace.artifact, f"{linear}.weight_scale", lambda raw: raw.__setitem__(4, raw[4] ^ 1))
    assert judge(workspace, sample=0, whole_model=False) == []


@pytest.mark.parametrize("dtype", OTHER_DTYPES)
def test_scales_of_its_kv_cache_have_its_dtype(write_in: WriteRelease, tmp_path: Path, dtype: str) -> None:
    workspace = build(write_in(dtype, **{"scheme.name": "fp8_dynamic", "kv_cache": "fp8"}), tmp_path / "build")
    found, amax = read(workspace.artifact), workspace.facts("calibrate")["amax"]
    for name, wanted in LLM_COMPRESSOR[dtype]["kv_cache"]["scales"].items():
        assert (str(found[name].dtype), list(found[name].shape)) == (wanted["dtype"], wanted["shape"])
        attention, _, suffix = name.rpartition(".")
        largest = float.fromhex(amax[attention][{"k_scale": "key", "v_scale": "value"}[suffix]])
        assert torch.equal(found[name], torch.tensor([largest]).to(found[name].dtype) / 448)
    assert judge(workspace, sample=0, whole_model=False) == []


# -------------------------------------------------------------------------------------------------- a config without it


def test_a_base_whose_config_names_no_dtype_has_that_of_most_of_its_weights(
    write_in: WriteRelease, tmp_path: Path
) -> None:
    path = write_in("float16", said="", **UNIT)
    base = path.parent / "base"
    assert "dtype" not in json.loads((base / "config.json").read_text())
    assert open_checkpoint(base, "the base").config["dtype"] == "float16"
    workspace = build(path, tmp_path / "build")
    config = json.loads((workspace.artifact / "config.json").read_text())
    assert config["dtype"] == "float16"  # as both libraries write it then
    assert judge(workspace, sample=0, whole_model=False) == []
    records = {record["name"]: record["status"] for record in workspace.facts("assemble")["fixes"]}
    assert records["restore-config"] == "not needed"
    config["dtype"] = "bfloat16"
    (workspace.artifact / "config.json").write_text(json.dumps(config))
    assert judge(workspace, sample=0, whole_model=False) == [("config", "config.json: dtype")]


def test_a_config_that_names_no_dtype_is_refused_where_no_weights_tell_it(
    write_release: WriteRelease, tmp_path: Path
) -> None:
    changes = {"base.path": None, "base.model": "o/n", "base.revision": "0" * 40, "base.config": "config.json"}
    path = write_release(**changes, **UNIT)
    config = json.loads((path.parent / "base" / "config.json").read_text())
    del config["dtype"]
    (path.parent / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseError) as caught:
        build(path, tmp_path / "build", "plan")
    assert (caught.value.what, caught.value.fix) == (
        "config.json names no dtype, and there are no weights at hand that tell it",
        'add "dtype" to config.json: bfloat16, float16 or float32',
    )


def test_any_base_dtype_gives_one_payload_whatever_the_shards_and_files(write_in: WriteRelease, tmp_path: Path) -> None:
    digests = set()
    for shards, files in ((1, "2MiB"), (3, "700kB"), ([1, 3], "700kB")):
        path = write_in("mixed", **UNIT, **{"shards": shards, "files.max_bytes": files})
        artifact = build(path, tmp_path / f"build-{shards}").artifact
        digests.add(tuple(sorted((name, digest(tensor)) for name, tensor in read(artifact).items())))
    assert len(digests) == 1


# ----------------------------------------------------------------------------------------------- measured and read back


@pytest.mark.parametrize("dtype", ["float16", "float32", "mixed"])
@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
def test_a_base_of_any_dtype_goes_the_whole_way(
    write_in: WriteRelease, tmp_path: Path, dtype: str, layout: str
) -> None:
    """The magnitudes of 1.1 times a model's weights are not far from the model's; nor is what quantizing costs."""
    few = {"calibration.samples": 2, "scheme.layout": layout}
    path = write_in(dtype, **few)
    text = path.parent / "heldout.txt"
    text.write_text(text.read_text("utf-8")[:1500], "utf-8")
    workspace = build(path, tmp_path / "build", "lock")
    measured = workspace.facts("perplexity")
    assert measured["base"] < 100 and 0.95 < measured["artifact"] / measured["base"] < 1.1
    assert all(0 < float.fromhex(kinds["input"]) < 500 for kinds in workspace.facts("calibrate")["amax"].values())
