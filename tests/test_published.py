"""A manifest asks for a published pipeline's artifact, and gets it byte for byte; what is worse for that is told.

`published/published80.json` has the digests of an artifact of 80 layers that the pipeline's own steps made of
`published/base80`; `published/releases.json` those of smaller ones, made by `published/record.py` with the same tools.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save

from builder.errors import BuildError, Problems
from builder.manifest import Compatibility, load_manifest
from builder.render import list_compromises
from builder.stages import STAGES, Workspace, run_stage

PUBLISHED = Path(__file__).parent / "published"
sys.path.append(str(PUBLISHED))

from bases import make_base  # noqa: E402

DIGESTS: dict[str, str] = json.loads((PUBLISHED / "published80.json").read_text())
RELEASES: list[dict[str, Any]] = json.loads((PUBLISHED / "releases.json").read_text("utf-8"))
MANIFEST = """\
manifest: 1
title: Published again — NVFP4
repo: release-builder/published-NVFP4
base: {path: base, licenses: [apache-2.0]}
scheme: {name: nvfp4, layout: modelopt, input_scale: unit, block_scale_floor: false}
fixes:
- template-vocab-size
- template-token-ids
- keep-calibrator
- inject-input-scale
- dynamic-input-activations
- restore-config
files: {packing: balanced, max_bytes: 400000}
compatibility:
  header_metadata: false
  total_parameters: false
  final_newline: false
  producer: modelopt 0.43.0
  export_template: transformers 4.57.6
  copied_files: [tokenizer.json, tokenizer_config.json, special_tokens_map.json, tokenizer.model]
  license_texts: false
executor: in_process
device: cpu
"""


@pytest.fixture(scope="module")
def base80(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    shutil.copytree(PUBLISHED / "base80", folder / "base")
    return folder


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A small release of the same kind, up to its card."""
    folder = tmp_path_factory.mktemp("described")
    make_base(folder / "base", RELEASES[0]["config"], RELEASES[0]["seed"])
    return build(write_manifest(folder), folder / "build", "card")


def write_manifest(folder: Path, name: str = "published", **changes: Any) -> Path:
    """The published manifest; changes are dotted keys with their new values, None for none at all."""
    content = yaml.safe_load(MANIFEST)
    for dotted, value in changes.items():
        *sections, key = dotted.split(".")
        section = content
        for part in sections:
            section = section[part]
        section.pop(key, None)
        if value is not None:
            section[key] = value
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def digest_files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


# ------------------------------------------------------------------------------------------------ the bytes


@pytest.mark.parametrize(("shards", "executor"), [(1, "in_process"), (2, "processes"), (3, "processes")])
def test_the_published_artifact_of_80_layers_comes_out_byte_for_byte(
    base80: Path, tmp_path: Path, shards: int, executor: str
) -> None:
    workspace = build(write_manifest(base80, f"published-{shards}", shards=shards, executor=executor), tmp_path)
    assert digest_files(workspace.artifact) == DIGESTS
    assert {name: entry["sha256"] for name, entry in workspace.facts("assemble")["payload"].items()} == DIGESTS
    assert workspace.facts("plan")["num_tensors"] == 2403
    counts = [shard["num_quantizers"] for shard in workspace.circumstances("plan")["shards"]]
    assert counts == {1: [560], 2: [280, 280], 3: [189, 189, 182]}[shards]


@pytest.mark.parametrize("published", RELEASES, ids=lambda published: published["config"]["model_type"])
def test_another_base_comes_out_as_the_pipelines_own_tools_made_it(tmp_path: Path, published: dict[str, Any]) -> None:
    make_base(tmp_path / "base", published["config"], published["seed"])
    changes = {"shards": published["shards"], "files.max_bytes": published["max_bytes"]}
    workspace = build(write_manifest(tmp_path, **changes), tmp_path / "build")
    assert digest_files(workspace.artifact) == published["files"]


@st.composite
def make_configs(draw: st.DrawFn) -> dict[str, Any]:
    """A whole config of a Llama as transformers 4.57.6 saves it, with some token ids or none."""
    heads = draw(st.sampled_from([1, 2, 4]))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": draw(st.booleans()),
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "head_dim": draw(st.sampled_from([16, 32])),
        "hidden_act": "silu",
        "hidden_size": 16 * heads * draw(st.integers(1, 2)),
        "initializer_range": 0.02,
        "intermediate_size": 16 * draw(st.integers(1, 4)),
        "max_position_embeddings": 512,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": draw(st.integers(1, 4)),
        "num_key_value_heads": draw(st.sampled_from([number for number in (1, 2, 4) if heads % number == 0])),
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": draw(st.sampled_from([None, {"factor": 2.0, "rope_type": "linear"}])),
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "transformers_version": "4.57.6",
        "use_cache": True,
        "vocab_size": draw(st.integers(8, 80)),
    }
    ids = {"pad_token_id": st.integers(0, 7) | st.none(), "bos_token_id": st.integers(0, 7)}
    for key, values in (ids | {"eos_token_id": st.integers(0, 7) | st.lists(st.integers(0, 7), min_size=1)}).items():
        if draw(st.booleans()):
            config[key] = draw(values)
    return config


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(config=make_configs(), seed=st.integers(0, 999), max_bytes=st.integers(2_000, 60_000), data=st.data())
def test_any_base_comes_out_as_the_pipeline_is_described_to_write_it(
    tmp_path: Path, config: dict[str, Any], seed: int, max_bytes: int, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory(dir=tmp_path) as name:
        folder = Path(name)
        make_base(folder / "base", config, seed)
        shards = data.draw(st.integers(1, config["num_hidden_layers"]))
        workspace = build(write_manifest(folder, shards=shards, **{"files.max_bytes": max_bytes}), folder / "build")
        found = {path.name: path.read_bytes() for path in workspace.artifact.iterdir()}
        expected = publish_as_described(folder / "base", max_bytes)
        assert found.keys() == expected.keys()
        assert [name for name in found if found[name] != expected[name]] == []


def publish_as_described(base: Path, max_bytes: int) -> dict[str, bytes]:
    """The files that the pipeline is described to write, made without a line of the builder's."""
    tensors = quantize_as_described(load_file(base / "model.safetensors"))
    total, files = sum(tensor.nbytes for tensor in tensors.values()), {}
    if total <= 1.05 * max_bytes:
        files["model.safetensors"] = save(tensors)
    else:
        count = math.ceil(total / max_bytes)
        bins: list[dict[str, torch.Tensor]] = [{} for _ in range(count)]
        names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        weight_map = {}
        for name in sorted(tensors):
            emptiest = min(range(count), key=lambda index: sum(tensor.nbytes for tensor in bins[index].values()))
            bins[emptiest][name] = tensors[name]
            weight_map[name] = names[emptiest]
        files = {name: save(held) for name, held in zip(names, bins, strict=True)}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        files["model.safetensors.index.json"] = json.dumps(index, indent=2).encode()
    source = json.loads((base / "config.json").read_text())
    producer = {"name": "modelopt", "version": "0.43.0"}
    arguments = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    group = {"input_activations": arguments | {"dynamic": True}, "weights": arguments, "targets": ["Linear"]}
    config = {"bos_token_id": None, "eos_token_id": None} | source | {"use_cache": False}
    config.pop("pad_token_id", None)
    config = {key: config[key] for key in sorted(config)}
    config["quantization_config"] = {
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quant_algo": "NVFP4",
        "producer": producer,
        "quant_method": "modelopt",
    }
    if "pad_token_id" in source:
        config["pad_token_id"] = source["pad_token_id"]
    quantization = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": []}
    generation = {"_from_model_config": True, "transformers_version": "4.57.6", "use_cache": False}
    files |= {
        "config.json": json.dumps(config, indent=2).encode(),
        "generation_config.json": (json.dumps(generation, indent=2) + "\n").encode(),
        "hf_quant_config.json": json.dumps({"producer": producer, "quantization": quantization}, indent=4).encode(),
    }
    copied = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    return files | {name: (base / name).read_bytes() for name in copied}


def quantize_as_described(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, weight in weights.items():
        linear = name.removesuffix(".weight")
        if not linear.endswith("_proj") or name == linear:
            tensors[name] = weight
            continue
        fused = next(
            (
                kinds
                for kinds in (("q_", "k_", "v_"), ("gate_", "up_"))
                if linear.endswith(tuple(f"{k}proj" for k in kinds))
            ),
            None,
        )
        parent = linear.rpartition(".")[0]
        siblings = [f"{parent}.{kind}proj.weight" for kind in fused] if fused else [name]
        scale = max(weights[sibling].abs().max().float() for sibling in siblings) / (6.0 * 448.0)
        blocks = weight.float().reshape(weight.shape[0], -1, 16)
        block_scales = (blocks.abs().amax(-1) / (6.0 * scale)).to(torch.float8_e4m3fn)
        values = blocks / (block_scales.float() * scale)[..., None]
        size = values.abs()
        codes = sum((size > bound).int() for bound in (0.25, 1.25, 2.5, 5.0))
        codes += sum((size >= bound).int() for bound in (0.75, 1.75, 3.5))
        codes = (codes + 8 * (values < 0)).to(torch.uint8).reshape(weight.shape[0], -1)
        tensors[name] = codes[:, ::2] | codes[:, 1::2] << 4
        tensors[f"{linear}.weight_scale"] = block_scales
        tensors[f"{linear}.weight_scale_2"] = scale
        tensors[f"{linear}.input_scale"] = torch.tensor(1.0)
    return tensors


# ------------------------------------------------------------------------------------------------ what is told of it


@pytest.mark.xdist_group("described")
def test_verify_takes_it_for_what_it_is_and_warns_of_what_could_be_better(described: Workspace) -> None:
    findings = described.facts("verify")["findings"]
    assert {finding["severity"] for finding in findings} == {"warning"}
    added = ("attention_bias", "attention_dropout", "head_dim", "initializer_range", "mlp_bias", "pretraining_tp")
    assert [finding["where"] for finding in findings[:6]] == [f"config.json: {key}" for key in added]
    assert findings[2]["what"] == "16, in the base absent"
    assert [(finding["where"], finding["what"]) for finding in findings[6:]] == [
        ("config.json: use_cache", "false, in the base true"),
        ("hf_quant_config.json: exclude_modules", "lm_head is not quantized, but not listed"),
        ("chat_template.jinja", "the base has this file, the artifact has not"),
        ("generation_config.json", "its bytes differ from the base's"),
    ]
    assert described.facts("verify")["loaded_whole"] and all(described.facts("verify")["checks"].values())


@pytest.mark.xdist_group("described")
def test_the_fixes_of_the_published_list_cure_what_the_template_left(described: Workspace) -> None:
    found = {fix["name"]: (fix["status"], fix["evidence"]) for fix in described.facts("assemble")["fixes"]}
    assert found["restore-config"] == (
        "applied",
        "In config.json num_hidden_layers is 1, but 5 in the base; vocab_size is 2, but 160 in the base; "
        "bos_token_id is null, but 128000 in the base; and 1 more.",
    )
    assert found["dynamic-input-activations"][0] == "applied"
    assert {status for status, _ in found.values()} == {"applied", "not needed", "avoided by design"}


@pytest.mark.xdist_group("described")
def test_the_card_says_where_a_new_release_differs(described: Workspace) -> None:
    card = (described.artifact / "README.md").read_text()
    _, told, rest = card.partition("This release reproduces the files of an older tool. Where a new release differs:")
    section = rest.partition("\n## ")[0]
    assert told
    for words in (
        "The input scales are the constant 1; a new release measures them on calibration rows.",
        "says use_cache: false",
        "generation_config.json is an export template's",
        "only these are taken along: tokenizer.json, tokenizer_config.json, special_tokens_map.json, tokenizer.model;",
        "the chat template with them",
        "The licences' texts and the notice they ask for are not here",
    ):
        assert words in section, words
    assert "The texts are not in this repository. Before it is passed on, it needs `LICENSE`, `NOTICE`." in card
    assert "The texts are in this repository" not in card


@pytest.mark.xdist_group("described")
def test_the_same_is_told_while_planning(described: Workspace, tmp_path: Path) -> None:
    workspace = Workspace(described.manifest, tmp_path)
    lines = run_stage(workspace, STAGES[0])
    assert len(lines) == len(list_compromises(workspace.manifest.release)) == 11
    assert all(line.startswith("warning (compatibility): ") for line in lines)


# ------------------------------------------------------------------------------------------------ one switch at a time


def test_without_a_switch_a_release_has_the_better_way_of_it(tmp_path: Path) -> None:
    make_base(tmp_path / "base", RELEASES[0]["config"], 1)
    better: dict[str, Any] = dict.fromkeys([f"compatibility.{name}" for name in Compatibility.model_fields])
    artifact = build(write_manifest(tmp_path, "better", fixes=None, **better), tmp_path / "better").artifact
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer.model"):
        assert (artifact / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
    config = json.loads((artifact / "config.json").read_text())
    assert config["use_cache"] is True and config["quantization_config"]["producer"]["version"] != "0.43.0"
    assert "lm_head" in json.loads((artifact / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    assert (artifact / "LICENSE").is_file() and (artifact / "NOTICE").is_file()
    with safe_open(artifact / "model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert list_compromises(load_manifest(tmp_path / "better.yaml").release) == []


def test_a_template_is_refused_where_its_pipeline_would_have_done_otherwise(tmp_path: Path) -> None:
    make_base(tmp_path / "base", RELEASES[0]["config"], 1)
    manifest = write_manifest(tmp_path, **{"scheme.ignore": ["lm_head", "re:.*down_proj"]})
    with pytest.raises(BuildError) as caught:
        build(manifest, tmp_path / "build")
    assert str(caught.value) == (
        "an export template is not for this release: its pipeline quantized all but lm_head, "
        "model.layers.0.mlp.down_proj too\n"
        f"  in {manifest}:31:20: compatibility.export_template: transformers 4.57.6\n"
        "  fix: remove export_template: the configs are then the base's own"
    )


def test_switches_of_one_layout_are_refused_for_the_other(tmp_path: Path) -> None:
    make_base(tmp_path / "base", RELEASES[0]["config"], 1)
    manifest = write_manifest(tmp_path, **{"scheme.layout": "compressed-tensors", "fixes": None})
    with pytest.raises(Problems) as caught:
        build(manifest, tmp_path / "build")
    producer, template = caught.value.problems
    assert str(producer) == (
        "compatibility.producer is for the layout modelopt, not for compressed-tensors\n"
        f"  in {manifest}:20:13: compatibility.producer: modelopt 0.43.0\n"
        "  fix: set scheme.layout: modelopt, or remove it"
    )
    assert template.what == "compatibility.export_template is for the layout modelopt, not for compressed-tensors"
