"""A good artifact gives no finding in either layout; every kind of damage gives the finding of its own check."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from builder.errors import BaseError, VerifyError
from builder.readback import FLOAT8, Entry, read_amax, read_header
from builder.verify import Finding, list_checks, spread, verify_artifact

pytestmark = pytest.mark.xdist_group("verify")  # one export serves all

LAYOUTS = ("compressed-tensors", "modelopt")
INDEX = "model.safetensors.index.json"
QUERY, UP, DOWN = (f"model.layers.1.{name}" for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"))
SIDE_FILES = {
    "tokenizer.json": '{"version": "1.0"}',
    "tokenizer_config.json": "{}",
    "special_tokens_map.json": '{"bos_token": "<s>"}',
    "chat_template.jinja": "{{ messages[0].content }}",
}

# ------------------------------------------------------------------------- a tiny model, quantized by the reference


@pytest.fixture(scope="session")
def releases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, the artifacts `modelopt` (exported by the reference library) and `compressed-tensors`."""
    folder = tmp_path_factory.mktemp("verify")
    export_with_modelopt(folder / "base", folder / "modelopt")
    base_config = read(folder / "base/config.json")
    quantization = read(folder / "modelopt/config.json")["quantization_config"]
    write(folder / "modelopt/config.json", base_config | {"quantization_config": quantization})
    for name, text in SIDE_FILES.items():
        (folder / "base" / name).write_text(text)
    for name in (*SIDE_FILES, "generation_config.json"):
        shutil.copyfile(folder / "base" / name, folder / "modelopt" / name)
    convert_to_compressed_tensors(folder / "modelopt", folder / "compressed-tensors")
    return folder


def export_with_modelopt(base: Path, artifact: Path) -> None:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(base, max_shard_size="100KB")
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    rows = torch.randint(0, config.vocab_size, (4, 16))
    mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, lambda quantized: quantized(rows))
    export_hf_checkpoint(model, export_dir=artifact, max_shard_size="60KB")
    publish_modes(artifact)


def convert_to_compressed_tensors(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    (target / "hf_quant_config.json").unlink()

    def rename(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        if name.endswith("weight_scale_2"):
            return name.replace("weight_scale_2", "weight_global_scale"), (1 / tensor).reshape(1)
        if name.endswith("input_scale"):
            return name.replace("input_scale", "input_global_scale"), (1 / tensor).reshape(1)
        return (f"{name}_packed" if tensor.dtype == torch.uint8 else name), tensor

    weight_map = {}
    for path in sorted(target.glob("*.safetensors")):
        tensors = dict(rename(*item) for item in load_file(path).items())
        save_file(tensors, path, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, path.name)
    write(target / INDEX, read(target / INDEX) | {"weight_map": weight_map})
    arguments = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": arguments | {"dynamic": False},
        "input_activations": arguments | {"dynamic": "local"},
    }
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    write(target / "config.json", read(target / "config.json") | {"quantization_config": quantization})
    publish_modes(target)


def plan_of(artifact: Path, layout: str) -> dict[str, Any]:
    """What the planner would have said of a good artifact."""
    entries = {name: entry for path in artifact.glob("*.safetensors") for name, entry in read_header(path).items()}
    fused = [
        [f"model.layers.{layer}.{name}_proj" for name in names]
        for layer in range(2)
        for names in (
            ["self_attn.q", "self_attn.k", "self_attn.v"],
            ["self_attn.o"],
            ["mlp.gate", "mlp.up"],
            ["mlp.down"],
        )
    ]
    return {
        "scheme": "nvfp4",
        "layout": layout,
        "input_scale": "calibrated",
        "block_scale_floor": True,
        "tensors": {
            name: {"dtype": entry.dtype, "shape": list(entry.shape), "file": entry.file.name}
            for name, entry in entries.items()
        },
        "quantized": [module for group in fused for module in group],
        "fused": fused,
        "ignore": ["lm_head"],
    }


# ------------------------------------------------------------------------------------------ ways to damage a release


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True))


def publish_modes(folder: Path) -> None:
    for path in folder.iterdir():
        path.chmod(0o644)


def holder(artifact: Path, name: str) -> Path:
    return artifact / read(artifact / INDEX)["weight_map"][name]


def edit(
    artifact: Path, change: Callable[[dict[str, torch.Tensor]], None], name: str = f"{QUERY}.weight_scale"
) -> None:
    """Rewrite the file that holds `name`, its size in the index included."""
    path = holder(artifact, name)
    tensors = load_file(path)
    before = sum(tensor.nbytes for tensor in tensors.values())
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    path.chmod(0o644)
    index = read(artifact / INDEX)
    index["metadata"]["total_size"] += sum(tensor.nbytes for tensor in tensors.values()) - before
    kept = {key: file for key, file in index["weight_map"].items() if file != path.name}
    write(artifact / INDEX, index | {"weight_map": kept | dict.fromkeys(tensors, path.name)})


def edit_json(artifact: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    value = read(artifact / name)
    change(value)
    write(artifact / name, value)


def edit_bytes(artifact: Path, name: str, change: Callable[[np.ndarray], None]) -> None:
    """Change the bytes of one tensor in place."""
    entry = read_header(holder(artifact, name))[name]
    raw = entry.read(0, entry.num_bytes)
    change(raw)
    content = bytearray(entry.file.read_bytes())
    content[entry.begin : entry.begin + entry.num_bytes] = raw.tobytes()
    entry.file.write_bytes(content)


def set_bytes(name: str, value: int, count: int = 1) -> Callable[[Path], None]:
    def change(raw: np.ndarray) -> None:
        raw[:count] = value

    return lambda artifact: edit_bytes(artifact, name, change)


def scale_floats(suffix: str, change: Callable[[np.ndarray, int], Any]) -> Callable[[Path], None]:
    """Give every scalar of that suffix the value `change(its value, its number)`."""

    def mutate(artifact: Path) -> None:
        names = sorted(name for name in read(artifact / INDEX)["weight_map"] if name.endswith(suffix))
        assert names
        for number, name in enumerate(names):

            def replace(raw: np.ndarray, number: int = number) -> None:
                raw.view(np.float32)[:] = change(raw.view(np.float32).copy(), number)

            edit_bytes(artifact, name, replace)

    return mutate


def add_file(name: str, content: bytes = b"x", mode: int = 0o644) -> Callable[[Path], None]:
    def mutate(artifact: Path) -> None:
        (artifact / name).write_bytes(content)
        (artifact / name).chmod(mode)

    return mutate


def link_file(artifact: Path) -> None:
    elsewhere = (artifact / "tokenizer.json").rename(artifact.parent / "tokenizer.json")
    (artifact / "tokenizer.json").symlink_to(elsewhere)


def rename_tensor(artifact: Path) -> None:
    edit(artifact, lambda tensors: tensors.update({f"{QUERY}.weight_scales": tensors.pop(f"{QUERY}.weight_scale")}))


def widen_block_scales(artifact: Path) -> None:
    name = f"{QUERY}.weight_scale"
    edit(artifact, lambda tensors: tensors.update({name: tensors[name].float()}))


def flatten_scalar(artifact: Path) -> None:
    name = f"{QUERY}.weight_global_scale"
    edit(artifact, lambda tensors: tensors.update({name: tensors[name].reshape(())}), name)


def drop_norm(artifact: Path) -> None:
    edit(artifact, lambda tensors: tensors.pop("model.norm.weight"), "model.norm.weight")


def truncate(artifact: Path) -> None:
    path = holder(artifact, "lm_head.weight")
    path.write_bytes(path.read_bytes()[:-2])


def move_in_index(artifact: Path) -> None:
    other = holder(artifact, "lm_head.weight").name
    edit_json(artifact, INDEX, lambda index: index["weight_map"].update({f"{QUERY}.weight_scale": other}))


def config_change(**changes: Any) -> Callable[[Path], None]:
    return lambda artifact: edit_json(artifact, "config.json", lambda config: config.update(changes))


def quantization_change(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda artifact: edit_json(artifact, "config.json", lambda config: change(config["quantization_config"]))


def invert(value: np.ndarray, _number: int) -> Any:
    return 1 / value


CT, MO = ((layout,) for layout in LAYOUTS)
DAMAGE: dict[str, tuple[tuple[str, ...], Callable[[Path], None], set[str]]] = {
    "a leftover of an interrupted write": (LAYOUTS, add_file("model-00001-of-00002.safetensors.partial"), {"files"}),
    "a hidden temporary file": (LAYOUTS, add_file(".config.json.17.tmp"), {"files"}),
    "a pickle": (LAYOUTS, add_file("pytorch_model.bin"), {"files"}),
    "a pickle under another name": (LAYOUTS, add_file("notes.txt", b"\x80\x04\x95rest"), {"files"}),
    "program code": (LAYOUTS, add_file("modeling_llama.py"), {"files"}),
    "a file only its owner can read": (LAYOUTS, lambda artifact: (artifact / INDEX).chmod(0o600), {"files"}),
    "a link instead of a file": (LAYOUTS, link_file, {"files"}),
    "weights that the index does not name": (
        LAYOUTS,
        lambda artifact: save_file({"x": torch.zeros(1)}, artifact / "extra.safetensors") or publish_modes(artifact),
        {"files", "index", "plan", "layout"},
    ),
    "a truncated file": (LAYOUTS, truncate, {"headers", "index", "plan", "unquantized"}),
    "a wrong total size": (
        LAYOUTS,
        lambda artifact: edit_json(artifact, INDEX, lambda index: index["metadata"].update(total_size=1)),
        {"index"},
    ),
    "a tensor said to be in another file": (LAYOUTS, move_in_index, {"index"}),
    "a tensor missing in the index": (
        LAYOUTS,
        lambda artifact: edit_json(artifact, INDEX, lambda index: index["weight_map"].pop("lm_head.weight")),
        {"index", "files"},
    ),
    "an index that leads out of the folder": (
        LAYOUTS,
        lambda artifact: edit_json(
            artifact,
            INDEX,
            lambda index: index["weight_map"].update({"model.norm.weight": "../base/model.safetensors"}),
        ),
        {"index"},
    ),
    "no index": (LAYOUTS, lambda artifact: (artifact / INDEX).unlink(), {"index", "files"}),
    "a misnamed tensor": (LAYOUTS, rename_tensor, {"plan", "layout", "bits"}),
    "block scales in float32": (LAYOUTS, widen_block_scales, {"plan", "layout", "bits"}),
    "a global scale without its dimension": (CT, flatten_scalar, {"plan", "layout"}),
    "a lost norm": (LAYOUTS, drop_norm, {"plan", "unquantized"}),
    "one changed bit in a norm": (LAYOUTS, set_bytes("model.norm.weight", 0x81), {"unquantized"}),
    "a block scale that is NaN": (LAYOUTS, set_bytes(f"{QUERY}.weight_scale", 0x7F), {"block scales", "dequantized"}),
    "a negative block scale": (LAYOUTS, set_bytes(f"{QUERY}.weight_scale", 0xA8), {"block scales"}),
    "a block scale of zero": (LAYOUTS, set_bytes(f"{QUERY}.weight_scale", 0), {"block scales"}),
    "halved block scales": (
        LAYOUTS,
        lambda artifact: edit_bytes(artifact, f"{DOWN}.weight_scale", lambda raw: np.subtract(raw, 8, out=raw)),
        {"block scales", "dequantized"},
    ),
    "inverted weight scales": (MO, scale_floats("weight_scale_2", invert), {"global scales", "dequantized"}),
    "inverted global scales": (CT, scale_floats("weight_global_scale", invert), {"global scales", "dequantized"}),
    "a global scale rounded through bfloat16": (
        CT,
        scale_floats("mlp.down_proj.weight_global_scale", lambda value, _: torch.tensor(value).bfloat16().float()),
        {"global scales"},
    ),
    "one global scale of a fused set doubled": (
        CT,
        scale_floats("1.mlp.up_proj.weight_global_scale", lambda value, _: value * 2),
        {"global scales", "dequantized", "fused"},
    ),
    "one input scale of a fused set doubled": (
        MO,
        scale_floats("1.self_attn.k_proj.input_scale", lambda value, _: value * 2),
        {"fused"},
    ),
    "codes that were never written": (MO, set_bytes(f"{UP}.weight", 0, 64), {"codes"}),
    "codes of other rows": (
        CT,
        lambda artifact: edit_bytes(
            artifact, f"{UP}.weight_packed", lambda raw: raw.__setitem__(slice(None), raw[::-1])
        ),
        {"dequantized"},
    ),
    "injected input scales": (MO, scale_floats("input_scale", lambda *_: 1.0), {"input scales"}),
    "injected input global scales": (CT, scale_floats("input_global_scale", lambda *_: 1.0), {"input scales"}),
    "one constant for all input scales": (CT, scale_floats("input_global_scale", lambda *_: 55.0), {"input scales"}),
    "inverted input scales": (MO, scale_floats("input_scale", invert), {"input scales"}),
    "inverted input global scales": (CT, scale_floats("input_global_scale", invert), {"input scales"}),
    "an infinite input scale": (
        CT,
        scale_floats("1.mlp.down_proj.input_global_scale", lambda *_: np.inf),
        {"input scales"},
    ),
    "use_cache leaked from a template": (LAYOUTS, config_change(use_cache=False), {"config"}),
    "num_hidden_layers of a template": (LAYOUTS, config_change(num_hidden_layers=1), {"config"}),
    "an added config key": (LAYOUTS, config_change(auto_map={}), {"config"}),
    "a config that is no JSON": (LAYOUTS, add_file("config.json", b"{"), {"config", "quantization config"}),
    "the other layout's method": (
        LAYOUTS,
        quantization_change(lambda quantization: quantization.update(quant_method="fp8")),
        {"quantization config"},
    ),
    "a group size of 32": (
        LAYOUTS,
        quantization_change(
            lambda quantization: quantization["config_groups"]["group_0"]["weights"].update(group_size=32)
        ),
        {"quantization config"},
    ),
    "static input scales": (
        CT,
        quantization_change(
            lambda quantization: quantization["config_groups"]["group_0"]["input_activations"].update(dynamic=False)
        ),
        {"quantization config"},
    ),
    "an unlisted lm_head": (
        LAYOUTS,
        quantization_change(lambda quantization: quantization["ignore"].remove("lm_head")),
        {"quantization config"},
    ),
    "a quantized linear that is left out": (
        CT,
        quantization_change(lambda quantization: quantization["ignore"].append("re:.*down_proj")),
        {"quantization config"},
    ),
    "no hf_quant_config.json": (
        MO,
        lambda artifact: (artifact / "hf_quant_config.json").unlink(),
        {"quantization config"},
    ),
    "a forgotten chat template": (
        LAYOUTS,
        lambda artifact: (artifact / "chat_template.jinja").unlink(),
        {"copied files"},
    ),
    "an altered tokenizer": (LAYOUTS, add_file("tokenizer.json", b"{}"), {"copied files"}),
    "a generation config of a template": (LAYOUTS, add_file("generation_config.json", b"{}"), {"copied files"}),
    "a vocabulary that the base has not": (LAYOUTS, add_file("tokenizer.model"), {"copied files"}),
}
CASES = [pytest.param(layout, name, id=f"{layout}: {name}") for name, case in DAMAGE.items() for layout in case[0]]


@pytest.fixture
def copy_of(releases: Path, tmp_path: Path) -> Callable[[str], tuple[Path, Path, dict[str, Any]]]:
    """(artifact, base, expected) of a layout, the artifact a copy to damage."""

    def copy(layout: str) -> tuple[Path, Path, dict[str, Any]]:
        artifact = tmp_path / layout
        shutil.copytree(releases / layout, artifact)
        return artifact, releases / "base", plan_of(releases / layout, layout)

    return copy


Copier = Callable[[str], tuple[Path, Path, dict[str, Any]]]

# --------------------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_the_reference_library_exports_has_no_finding_and_every_check_looked_at_something(
    releases: Path, layout: str
) -> None:
    expected = plan_of(releases / layout, layout) | {"payload": record(releases / layout)}
    report = verify_artifact(releases / layout, releases / "base", expected, whole_model=True)
    assert report.findings == ()
    assert tuple(report.checks) == list_checks("nvfp4")
    assert all(number > 0 for number in report.checks.values()), report.checks
    assert report.loaded_whole
    assert len(report.reference_sampled) == 14  # eight fused sets


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_damage_is_found_by_its_own_check(copy_of: Copier, layout: str, name: str) -> None:
    artifact, base, expected = copy_of(layout)
    _, mutate, checks = DAMAGE[name]
    mutate(artifact)
    report = verify_artifact(artifact, base, expected, sample=0, whole_model=False)
    assert {finding.check for finding in report.errors} == checks
    assert not report.loaded_whole
    assert report.reference_sampled == ()


def test_only_the_reference_and_transformers_see_a_wrong_code_and_an_architecture_without_a_class(
    copy_of: Copier,
) -> None:
    artifact, base, expected = copy_of("compressed-tensors")
    entry = read_header(holder(artifact, f"{UP}.weight_packed"))[f"{UP}.weight_packed"]
    codes = entry.read(0, entry.num_bytes)
    place = int(np.flatnonzero(codes & 0x77 == 0x11)[0])
    edit_bytes(artifact, f"{UP}.weight_packed", lambda raw: raw.__setitem__(place, raw[place] ^ 0x08))
    config_change(architectures=["LlamaForCausalLM"], model_type="no_such_model")(artifact)
    report = verify_artifact(artifact, base, expected, sample=8, whole_model=True)
    assert {(finding.check, finding.where) for finding in report.errors} == {
        ("reference", f"{UP}.weight_packed"),
        ("config", "config.json: model_type"),
        ("loading", "compressed-tensors"),
    }


def test_a_forward_shows_an_input_scale_that_no_rule_about_numbers_can_tell(copy_of: Copier) -> None:
    artifact, base, expected = copy_of("modelopt")
    scale_floats("1.mlp.down_proj.input_scale", lambda value, _: value * 5000)(artifact)
    assert verify_artifact(artifact, base, expected, sample=0, whole_model=False).findings == ()
    report = verify_artifact(artifact, base, expected, sample=0, whole_model=True)
    assert {(finding.check, finding.where) for finding in report.errors} == {("input scales", f"{DOWN}.input_scale")}


def test_every_check_is_shown_to_fail() -> None:
    shown = {check for _, _, checks in DAMAGE.values() for check in checks} | {"reference", "loading", "digests"}
    assert shown == set(list_checks("nvfp4"))  # that of KV caches is in test_verify_schemes


def record(artifact: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in artifact.iterdir()}


@pytest.mark.parametrize("name", ["tokenizer.json", "model-00001-of-00002.safetensors", "config.json"])
def test_a_file_that_is_not_as_it_was_recorded_is_found_by_its_digest(copy_of: Copier, name: str) -> None:
    artifact, base, expected = copy_of("compressed-tensors")
    expected |= {"payload": record(artifact), "beside": ["README.md"]}
    (artifact / "README.md").write_text("the card is no part of the payload")
    assert verify_artifact(artifact, base, expected, sample=0, whole_model=False).findings == ()
    content = bytearray((artifact / name).read_bytes())
    content[-2] ^= 1
    (artifact / name).write_bytes(content)
    found = verify_artifact(artifact, base, expected, sample=0, whole_model=False).errors
    assert ("digests", f"{name} is not as it was written") in {(finding.check, finding.what) for finding in found}


def test_files_that_are_missing_or_foreign_are_found(copy_of: Copier) -> None:
    artifact, base, expected = copy_of("compressed-tensors")
    expected |= {"payload": record(artifact) | {"LICENSE": "0" * 64}}
    (artifact / "adapter_config.json").write_text("{}")
    found = verify_artifact(artifact, base, expected, sample=0, whole_model=False).errors
    assert {(finding.check, finding.what) for finding in found} == {
        ("digests", "LICENSE is missing"),
        ("digests", "adapter_config.json is no file of this release"),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_input_scales_are_those_that_were_measured_to_the_last_bit(copy_of: Copier, layout: str) -> None:
    artifact, base, expected = copy_of(layout)
    suffix = "input_scale" if layout == "modelopt" else "input_global_scale"
    tensors = {name: value for file in artifact.glob("*.safetensors") for name, value in load_file(file).items()}
    scales = {module: tensors[f"{module}.{suffix}"].item() for module in expected["quantized"]}
    measured = {module: scale * 2688 if layout == "modelopt" else 2688 / scale for module, scale in scales.items()}
    amax = {module: float(torch.tensor(value).to(torch.bfloat16)).hex() for module, value in measured.items()}
    expected |= {"input_amax": amax}
    assert verify_artifact(artifact, base, expected, sample=0, whole_model=False).findings == ()
    scale_floats(f"1.mlp.down_proj.{suffix}", lambda value, _: value * (1 + 2**-20))(artifact)
    found = verify_artifact(artifact, base, expected, sample=0, whole_model=False).errors
    assert {(finding.check, finding.where) for finding in found} == {("input scales", f"{DOWN}.{suffix}")}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_plan_of_unit_scales_wants_every_input_scale_to_be_one(copy_of: Copier, layout: str) -> None:
    artifact, base, expected = copy_of(layout)
    unit = expected | {"input_scale": "unit"}
    measured = verify_artifact(artifact, base, unit, sample=0, whole_model=False)
    assert len(measured.errors) == 14
    scale_floats("input_scale" if layout == "modelopt" else "input_global_scale", lambda *_: 1.0)(artifact)
    assert verify_artifact(artifact, base, unit, sample=0, whole_model=False).findings == ()


def test_zero_block_scales_are_allowed_where_the_plan_has_no_floor(copy_of: Copier) -> None:
    artifact, base, expected = copy_of("modelopt")
    set_bytes(f"{QUERY}.weight_scale", 0)(artifact)
    without = expected | {"block_scale_floor": False}
    assert verify_artifact(artifact, base, without, sample=0, whole_model=False).findings == ()


def test_a_tensor_that_the_model_has_no_place_for_may_be_left_out_with_a_warning(copy_of: Copier) -> None:
    artifact, base, expected = copy_of("modelopt")
    drop_norm(artifact)
    del expected["tensors"]["model.norm.weight"]
    lost = verify_artifact(artifact, base, expected, sample=0, whole_model=False)
    assert [finding.check for finding in lost.errors] == ["unquantized"]
    planned = expected | {"unused": ["model.norm.weight"]}
    report = verify_artifact(artifact, base, planned, sample=0, whole_model=False)
    assert report.errors == ()
    assert [(finding.severity, finding.where) for finding in report.findings] == [("warning", "model.norm.weight")]


def test_a_single_file_needs_no_index(copy_of: Copier) -> None:
    artifact, base, expected = copy_of("compressed-tensors")
    tensors = {name: tensor for path in artifact.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for path in artifact.glob("model*"):
        path.unlink()
    save_file(tensors, artifact / "model.safetensors", {"format": "pt"})
    publish_modes(artifact)
    for tensor in expected["tensors"].values():
        tensor["file"] = "model.safetensors"
    report = verify_artifact(artifact, base, expected, sample=0, whole_model=False)
    assert report.findings == ()
    assert report.checks["index"] == len(tensors)


def test_a_finding_prints_as_three_lines_that_name_place_and_remedy(copy_of: Copier) -> None:
    artifact, base, expected = copy_of("compressed-tensors")
    config_change(use_cache=False)(artifact)
    (finding,) = verify_artifact(artifact, base, expected, sample=0, whole_model=False).findings
    assert finding == Finding(
        "config", "error", "config.json: use_cache", "false, in the base true", "add the fix restore-config"
    )
    assert str(finding) == (
        "error (config): false, in the base true\n  in config.json: use_cache\n  fix: add the fix restore-config"
    )


def test_a_base_that_cannot_be_read_is_not_blamed_on_the_artifact(copy_of: Copier, tmp_path: Path) -> None:
    artifact, _, expected = copy_of("modelopt")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(BaseError, match=r"model\.safetensors is missing"):
        verify_artifact(artifact, tmp_path / "nothing", expected)


def test_an_unknown_scheme_is_refused_rather_than_passed(copy_of: Copier) -> None:
    artifact, base, expected = copy_of("modelopt")
    with pytest.raises(VerifyError, match="no check knows the scheme mxfp4"):
        verify_artifact(artifact, base, expected | {"scheme": "mxfp4"})


def test_our_reading_of_float8_is_that_of_torch() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(FLOAT8, values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("special", [0.0, -3.5, 1e-7, float("inf"), float("nan")])
def test_amax_read_from_the_bits_is_that_of_torch(tmp_path: Path, dtype: torch.dtype, special: float) -> None:
    tensor = torch.randn(7, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    tensor[3, 5] = special
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    entry: Entry = read_header(tmp_path / "x.safetensors")["x"]
    np.testing.assert_equal(read_amax(entry), float(tensor.abs().amax()))


def test_a_sample_reaches_first_and_last_layer_and_every_kind() -> None:
    groups = [[f"model.layers.{layer}.{kind}"] for layer in range(80) for kind in ("qkv", "o", "gate_up", "down")]
    sample = spread(groups, 8)
    assert sample == spread(groups, 8)
    assert len(sample) == 8
    names = [group[0] for group in sample]
    assert {name.rpartition(".")[2] for name in names} == {"qkv", "o", "gate_up", "down"}
    assert names[0].startswith("model.layers.0.")
    assert names[-1].startswith("model.layers.79.")
