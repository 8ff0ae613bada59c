"""The card shows what was recorded or says that nothing was, and no text breaks out of its place."""

from __future__ import annotations

import ast
import copy
import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from builder.licenses import Obligations, collect_obligations
from builder.lock import CARD_FILES, HUB_RESULTS
from builder.manifest import Manifest, load_manifest
from builder.render import (
    FILTERS,
    FORMATS,
    NOT_MEASURED,
    STAGES,
    TEMPLATES,
    Measured,
    render_card,
    render_notice,
    spell_duration,
    templates,
)
from builder.serving import llama_swap_entry, serve_command

GOLDEN = Path(__file__).parent / "golden" / "README.md"
REVISION = "0123456789abcdef0123456789abcdef01234567"
MANIFEST: dict[str, Any] = {
    "manifest": 1,
    "title": "DeepSeek-R1-Distill-Llama-70B — NVFP4",
    "repo": "Kaleto/DeepSeek-R1-Distill-Llama-70B-NVFP4",
    "base": {
        "model": "deepseek-ai/DeepSeek-R1-Distill-Llama-70B",
        "revision": REVISION,
        "licenses": ["mit", "llama3.3"],
    },
    "scheme": {"name": "nvfp4"},
    "shards": 2,
    "calibration": {
        "dataset": "abisee/cnn_dailymail",
        "config": "3.0.0",
        "revision": REVISION[::-1],
        "column": "article",
        "samples": 256,
        "tokens": [150, 1200],
    },
    "serve": {
        "version": "0.32",
        "model_path": "/models/DeepSeek-R1-Distill-Llama-70B-NVFP4",
        "python": "/opt/vllm/bin/python3",
        "port": 9007,
        "args": {
            "attention-backend": "flashinfer",
            "kv-cache-dtype": "fp8",
            "max-model-len": "32768",
            "gpu-memory-utilization": "0.80",
            "enable-prefix-caching": True,
        },
        "env": {"VLLM_MARLIN_USE_ATOMIC_ADD": "1"},
        "hardware": "dgx-spark",
    },
    "sampling": {
        "temperature": 0.6,
        "top_p": 0.95,
        "notes": ["No system prompt: put everything into the user's turn.", "Let the <think> block grow."],
    },
    "card": {
        "why": "A 70B reasoning model that fits a **single** DGX Spark, `<think>` blocks and all.",
        "acknowledgments": ["DeepSeek-AI for the original model", "vLLM, https://github.com/vllm-project/vllm"],
        "notes": ["Issues are welcome."],
    },
}
HEX = "0123456789abcdef" * 4


def circumstances(number: int, **more: Any) -> dict[str, Any]:
    return {
        "seconds": 100.0 * number + 3,
        "started": f"2026-11-{20 + number}T08:00:00+00:00",
        "finished": f"2026-11-{20 + number}T09:00:00+00:00",
        "peak_bytes": 3_000_000_000 * number,
        "machine": "aarch64, NVIDIA Grace, 20 cores",
        **more,
    }


def counts(**more: int) -> dict[str, int]:
    return {"planned": 280, "good": 277, "zero": 1, "nan": 0, "missing": 2, **more}


FACTS: dict[str, dict[str, Any]] = {
    "plan": {
        "architecture": "LlamaForCausalLM",
        "num_parameters": 70_553_706_496,
        "num_layers": 80,
        "numbers": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "head_dim": 128},
        "scheme": "nvfp4",
        "layout": "compressed-tensors",
        "ignore": ["lm_head"],
        "num_tensors": 2403,
        "num_bytes": 42_723_456_789,
        "base_num_bytes": 141_107_412_992,
        "bits_per_parameter": 4.8443,
        "quantized": [f"model.layers.{layer}.mlp.up_proj" for layer in range(80)],
        "files": [{"name": f"model-0000{n}-of-00002.safetensors", "num_bytes": 21_361_728_000} for n in (1, 2)],
    },
    "fetch": {"model": MANIFEST["base"]["model"], "revision": REVISION, "files": {}},
    "calibrate": {
        "rows": {"count": 256, "num_tokens": 203_411, "shortest": 151, "longest": 1200, "digest": HEX},
        "amax": {},
    },
    "quantize": {"parts": HEX},
    "assemble": {
        "payload": {
            "LICENSE": {"sha256": HEX[1:] + "0", "num_bytes": 1064},
            "config.json": {"sha256": HEX[2:] + "01", "num_bytes": 2211},
            "model-00001-of-00002.safetensors": {"sha256": HEX[3:] + "012", "num_bytes": 21_361_728_000},
        },
        "payload_sha256": HEX[4:] + "0123",
        "fixes": [
            {
                "name": "restore-config",
                "title": "The template's numbers leak into config.json",
                "status": "avoided by design",
                "evidence": "config.json is the base's, apart from quantization_config",
            },
            {
                "name": "inject-input-scale",
                "title": "Input scales are missing",
                "status": "not needed",
                "evidence": "560 of 560 linears have one",
            },
        ],
    },
    "verify": {
        "findings": [
            {
                "check": "input scales",
                "severity": "warning",
                "where": "model.layers.3.mlp.down_proj",
                "what": "its input scale is far from its neighbours'",
                "fix": "",
            }
        ],
        "checks": {"files": 12, "bits": 560, "reference": 32, "loading": 0},
        "loaded_whole": False,
        "reference_sampled": ["model.layers.0.mlp.up_proj", "model.layers.9.mlp.up_proj"],
    },
    "perplexity": {
        "measured": True,
        "base": 6.1234,
        "artifact": 6.2891,
        "recovery_percent": 97.3653,
        "num_tokens": 40_960,
        "window": 2048,
        "beginning": ["<|begin_of_text|>"],
        "arithmetic": "exact",
    },
    "lock": {
        "path": "releases/deepseek-r1-70b.lock.json",
        "sha256": HEX[5:] + "01234",
        "payload_sha256": HEX[4:] + "0123",
        "versions": {"nvidia-modelopt": "0.47.0", "torch": "2.13.0"},
        "machine_class": "NVIDIA GB10, CUDA 13.0",
    },
}
CIRCUMSTANCES: dict[str, dict[str, Any]] = {
    "plan": {
        "shards": [
            {"index": n, "first_layer": 40 * n, "last_layer": 40 * n + 40, "num_quantizers": 280 + n} for n in (0, 1)
        ],
        "serving": {
            "name": "NVIDIA DGX Spark (GB10)",
            "share": 0.8,
            "budget_bytes": 104_453_604_638,
            "weight_bytes": 42_709_336_480,
            "read_bytes": 40_607_699_328,
            "pool_bytes": 61_744_268_158,
            "kv_bytes_per_token": 163_840,
            "pool_tokens": 376_857,
            "context": 32768,
            "num_sequences": 11,
            "speeds": [{"num_devices": n, "fits": True, "at_start": 6.7 * n, "at_context": 5.9 * n} for n in (1, 2)],
        },
    },
    "calibrate": {
        "executor": "ray",
        "device": "cuda",
        "jobs": [{"seconds": 1.0}, {"seconds": 2.0}],
        "health": [
            {
                "shard": n,
                "first_layer": 40 * n,
                "last_layer": 40 * n + 40,
                "weights": counts(good=280 - n),
                "inputs": counts(zero=n),
            }
            for n in (0, 1)
        ],
    },
    "quantize": {"executor": "ray", "device": "cuda", "jobs": [{"seconds": 1.0}, {"seconds": 2.0}]},
    "lock": {"comparison": "every file of the payload is the same, bit for bit", "verdict": "equal"},
}
RECEIPTS: dict[str, dict[str, Any]] = {
    stage: {
        "stage": stage,
        "key": HEX,
        "facts": FACTS[stage],
        "circumstances": circumstances(number, **CIRCUMSTANCES.get(stage, {})),
    }
    for number, stage in enumerate(STAGES, 1)
}


def write_manifest(folder: Path, **changes: Any) -> Manifest:
    """The manifest with some of its keys changed, or left out where None is given."""
    content = {key: value for key, value in {**MANIFEST, **changes}.items() if value is not None}
    path = folder / "deepseek-r1-70b.yaml"
    path.write_text(json.dumps(content), "utf-8")
    return load_manifest(path)


def write_obligations(folder: Path, licenses: tuple[str, ...] = ("mit", "llama3.3"), notice: str = "") -> Obligations:
    base = {"LICENSE": "MIT License\n\nPermission is hereby granted, free of charge, to any person obtaining a copy\n"}
    base |= {"NOTICE": notice} if notice else {}
    for name, text in base.items():
        (folder / name).write_text(text, "utf-8")
    return collect_obligations(
        licenses,
        repo_name=MANIFEST["repo"],
        acknowledged=("name-prefix",),
        base_files={name: folder / name for name in base},
        license_files={},
        where=lambda *keys: ".".join(keys),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("release")


@pytest.fixture(scope="module")
def obligations(folder: Path) -> Obligations:
    return write_obligations(folder)


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Manifest:
    return write_manifest(folder)


def change(manifest: Manifest, **sections: Any) -> Manifest:
    """The manifest with values put past its reader: whatever text it let through would come through here."""
    release = manifest.release
    for keys, value in sections.items():
        section, _, key = keys.rpartition("__")
        changed = getattr(release, section).model_copy(update={key: value}) if section else value
        release = release.model_copy(update={section or key: changed})
    return Manifest(manifest.name, manifest.path, release, manifest.root)


# --- reading a card as the Hub does -----------------------------------------------------------------------------------


def split_card(card: str) -> tuple[dict[str, Any], str]:
    opening, front_matter, body = card.split("---\n", 2)
    assert opening == ""
    return yaml.safe_load(front_matter), body


def parse(markdown: str) -> list[Any]:
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(markdown)


def plain(token: Any) -> str:
    """What a reader sees of an inline token."""
    shown = [
        " " if child.type in ("softbreak", "hardbreak") else child.content
        for child in token.children
        if child.type not in ("html_inline",)
    ]
    return "".join(shown)


def read_structure(body: str) -> list[tuple[str, str]]:
    """Everything at the top level of a card that a text could break: headings, tables, code, HTML, lists."""
    tokens = parse(body)
    structure = []
    for place, token in enumerate(tokens):
        if token.type in ("heading_open", "table_open", "tr_open", "fence", "html_block", "code_block", "hr"):
            text = plain(tokens[place + 1]) if token.tag in ("h2", "h3") else ""
            structure.append((token.type + token.tag, text))
    return structure


def read_headings(body: str) -> list[tuple[str, str]]:
    return [part for part in read_structure(body) if part[0].startswith("heading")]


def read_title(body: str) -> str:
    tokens = parse(body)
    place = next(place for place, token in enumerate(tokens) if token.type == "heading_open" and token.tag == "h1")
    return plain(tokens[place + 1])


def flat(text: str) -> str:
    """A text on one line, as HTML shows it."""
    return " ".join(re.split(r"[\x00-\x20\x7f-\x9f\u2028\u2029]+", text)).strip()


# --- the card as a whole ----------------------------------------------------------------------------------------------


def test_the_card_is_the_golden_one(manifest: Manifest, obligations: Obligations, refresh_goldens: bool) -> None:
    card = render_card(manifest, RECEIPTS, obligations)["README.md"]
    if refresh_goldens:
        GOLDEN.write_text(card, "utf-8")
    assert card == GOLDEN.read_text("utf-8")


def test_the_front_matter_tells_the_hub_licence_and_base(manifest: Manifest, obligations: Obligations) -> None:
    front_matter, _ = split_card(render_card(manifest, RECEIPTS, obligations)["README.md"])
    assert front_matter == {
        "license": "other",
        "license_name": "mit-and-llama3.3",
        "license_link": "LICENSE",
        "base_model": "deepseek-ai/DeepSeek-R1-Distill-Llama-70B",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "quantized_by": "Kaleto",
        "tags": ["nvfp4", "w4a4", "compressed-tensors", "vllm"],
    }


def test_a_local_base_is_not_linked_to_the_hub(tmp_path: Path, obligations: Obligations) -> None:
    local = write_manifest(tmp_path, base={"path": "tiny/base", "licenses": ["mit", "llama3.3"]})
    card = render_card(local, RECEIPTS, obligations)["README.md"]
    assert not {"base_model", "base_model_relation"} & split_card(card)[0].keys()
    assert "quantization of `tiny/base`" in card and "huggingface.co/tiny" not in card


def test_the_modelopt_layout_names_the_library_that_reads_it(tmp_path: Path, obligations: Obligations) -> None:
    modelopt = write_manifest(tmp_path, scheme={"name": "nvfp4", "layout": "modelopt"})
    front_matter, body = split_card(render_card(modelopt, RECEIPTS, obligations)["README.md"])
    assert front_matter["library_name"] == "Model Optimizer"
    assert front_matter["tags"] == ["nvfp4", "w4a4", "modelopt", "vllm"]
    assert "| Layout | `modelopt` |" in body


def test_what_a_licence_wants_displayed_stands_above_the_title(manifest: Manifest, obligations: Obligations) -> None:
    _, body = split_card(render_card(manifest, RECEIPTS, obligations)["README.md"])
    assert body.startswith("\n**Built with Llama**\n\n# DeepSeek-R1-Distill-Llama-70B — NVFP4\n")


def test_the_card_repeats_every_notice_condition_link_and_text(manifest: Manifest, obligations: Obligations) -> None:
    card = render_card(manifest, RECEIPTS, obligations)["README.md"]
    shown = [plain(token) for token in parse(card) if token.type == "inline"]
    assert [warning.id for warning in obligations.acknowledged] == ["name-prefix"]
    acknowledged = [f"Known to the publisher: {warning.text}." for warning in obligations.acknowledged]
    for line in (*obligations.notice_lines, *obligations.conditions, *acknowledged):
        assert line in shown
    for text, address in obligations.links:
        assert f"[{text}]({address})" in card
    assert "`LICENSE`, `LICENSE.llama3.3`, `NOTICE`." in card


def test_a_release_with_the_least_of_a_manifest_has_a_card_too(tmp_path: Path, obligations: Obligations) -> None:
    least = write_manifest(
        tmp_path,
        serve=None,
        sampling=None,
        card=None,
        calibration=None,
        scheme={"name": "nvfp4", "input_scale": "unit"},
    )
    receipts = copy.deepcopy(RECEIPTS)
    receipts["calibrate"]["facts"]["rows"] = None
    receipts["assemble"]["facts"]["fixes"] = []
    files = render_card(least, receipts, obligations)
    assert files.keys() == {"README.md"}
    body = split_card(files["README.md"])[1]
    assert {"Why this release", "Recommended sampling", "Acknowledgments", "Notes"}.isdisjoint(
        text for _, text in read_headings(body)
    )
    assert "| Calibration | none: no activations were measured |" in body
    assert "No fix is listed for this layout." in body
    assert "Calibrated on" not in body
    assert "```bash\nvllm serve Kaleto/DeepSeek-R1-Distill-Llama-70B-NVFP4\n```" in body


# --- every figure is measured -----------------------------------------------------------------------------------------

# What the card does not claim to show: parts of what it sums up, and the plan's own numbers said a second time.
UNSHOWN = re.compile(
    r"plan\.facts\.files\.\d+\.|(calibrate|quantize)\.circumstances\.jobs\.\d+\."
    r"|plan\.circumstances\.shards\.\d+\."
)


def find_numbers(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from find_numbers(inner, (*path, key))
    elif isinstance(value, int | float):
        yield path


NUMBERS = [path for path in find_numbers(RECEIPTS) if not UNSHOWN.match(".".join(map(str, path)))]


def replace_at(path: tuple[str | int, ...], change: Any) -> dict[str, Any]:
    """The receipts with one value changed; None is left out."""
    receipts = copy.deepcopy(RECEIPTS)
    parent: Any = receipts
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = change(parent[path[-1]])
    if parent[path[-1]] is None:
        del parent[path[-1]]
    return receipts


def change_number(number: int | float | bool) -> int | float | bool:
    return not number if isinstance(number, bool) else number * 2 + 1


def test_there_are_numbers_to_change() -> None:
    assert len(NUMBERS) > 60
    assert {path[0] for path in NUMBERS} == set(STAGES)


@pytest.mark.parametrize("path", NUMBERS, ids=lambda path: ".".join(map(str, path)))
def test_a_card_follows_every_number_of_the_receipts(
    path: tuple[str | int, ...], manifest: Manifest, obligations: Obligations
) -> None:
    card = render_card(manifest, RECEIPTS, obligations)["README.md"]
    changed = render_card(manifest, replace_at(path, change_number), obligations)["README.md"]
    assert changed != card


@pytest.mark.parametrize("path", NUMBERS, ids=lambda path: ".".join(map(str, path)))
def test_a_number_that_a_receipt_lacks_is_called_not_measured(
    path: tuple[str | int, ...], manifest: Manifest, obligations: Obligations
) -> None:
    card = render_card(manifest, RECEIPTS, obligations)["README.md"]
    lacking = render_card(manifest, replace_at(path, lambda number: None), obligations)["README.md"]
    if path[-2] in ("numbers", "checks"):  # of these there may be any number
        assert lacking != card
    else:
        assert lacking.count(NOT_MEASURED) > card.count(NOT_MEASURED)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_without_a_receipt_costs_the_card_its_figures_alone(
    stage: str, manifest: Manifest, obligations: Obligations
) -> None:
    whole = render_card(manifest, RECEIPTS, obligations)["README.md"]
    lacking = render_card(manifest, {s: r for s, r in RECEIPTS.items() if s != stage}, obligations)["README.md"]
    assert read_headings(lacking) == read_headings(whole)
    assert lacking.count(NOT_MEASURED) > whole.count(NOT_MEASURED)


def test_a_card_without_receipts_has_no_figure_at_all(tmp_path: Path) -> None:
    path = tmp_path / "plain.yaml"
    path.write_text("{manifest: 1, title: Plain, repo: a/b, base: {path: c, licenses: [mit]}, scheme: {name: nvfp4}}")
    card = render_card(load_manifest(path), {}, write_obligations(tmp_path, ("mit",)))["README.md"]
    for row in ("Architecture", "Dimensions", "Parameters", "Original size", "Quantized size", "Calibration data"):
        assert re.search(rf"^\| {row} \| .*not measured", card, re.MULTILINE), row
    assert "> **Nothing has been built yet: this card is a preview.**" in card and "| Date | not built yet |" in card
    card = re.sub(r"```python.*?```", "", card, flags=re.DOTALL)  # numbers of a program are no figures
    assert re.findall(r"\d+", re.sub(r"NVFP4|W4A4|E2M1|FP8|FP32|sha256|nvfp4|w4a4|bf16", "", card)) == [
        "4",
        "16",
        "16",
    ]  # "4-bit floats in blocks of 16" and "activations stay in 16 bits", of the format itself


def test_the_card_tells_the_range_of_the_scales_of_a_kv_cache(folder: Path, obligations: Obligations) -> None:
    table = {f"model.layers.{n}.self_attn": {"key": (2.0 + n).hex(), "value": (9.0 - n).hex()} for n in range(3)}
    table["model.layers.0.mlp.up_proj"] = {"weight": (0.001).hex(), "input": (900.0).hex()}
    receipts = replace_at(("calibrate", "facts", "amax"), lambda _: table)
    rows = [{"shard": 0, "first_layer": 0, "last_layer": 3, "keys": counts(good=3), "values": counts(good=2)}]

    def row(serve: dict[str, Any] | None) -> str:
        card = render_card(write_manifest(folder, kv_cache="fp8", serve=serve), receipts, obligations)["README.md"]
        return next(line for line in card.splitlines() if line.startswith("| KV cache |"))

    plain = (
        "| KV cache | `fp8`; scales measured on the calibration rows: keys 0.00446 to 0.00893, "
        "values 0.0156 to 0.0201. vLLM takes them from config.json"
    )
    assert row(None) == row(MANIFEST["serve"]) == f"{plain} |"
    other = {**MANIFEST["serve"], "args": {"kv-cache-dtype": "bfloat16"}}
    assert row(other) == f"{plain}, but not as it is served below, with `bfloat16` |"
    cached = write_manifest(folder, kv_cache="fp8")
    unmeasured = render_card(cached, {}, obligations)["README.md"]
    assert "`fp8`; scales to be measured on the calibration rows. vLLM takes them from config.json" in unmeasured
    alone = replace_at(("calibrate", "circumstances", "health"), lambda _: rows)
    card = render_card(cached, alone, obligations)["README.md"]
    assert "| 1 | 0 to 2 | 3 of 280 | 1 / 0 / 2 | 2 of 280 | 1 / 0 / 2 |" in card
    assert "Inputs good" not in card and "Keys good" in card


def test_no_template_has_a_figure_typed_in() -> None:
    programs = {path for path in TEMPLATES.iterdir() if path.name.endswith(".py.j2")}
    sources = {path.name: path.read_text("utf-8") for path in set(TEMPLATES.iterdir()) - programs}
    assert sources.keys() == {f"{name}.j2" for name in (*CARD_FILES, "NOTICE") if name != HUB_RESULTS}
    for name, source in sources.items():
        assert "{{" in source
        known = re.sub(r"sha256|partition\(\"/\"\)\[0\]|fixed\(\d\)", "", source)
        assert re.findall(r"\d+", known) == [], name


def test_a_value_without_a_filter_and_a_name_that_is_not_there_are_refused() -> None:
    with pytest.raises(TypeError, match="writes 'raw' without a filter"):
        templates().from_string("{{ value }}").render(value="raw")
    with pytest.raises(jinja2.UndefinedError, match="'valeu' is undefined"):
        templates().from_string("{{ valeu | markdown }}").render(value="raw")
    assert templates().from_string("{{ value | markdown }}").render(value="*") == r"\*"


@pytest.mark.parametrize("name", sorted(FILTERS))
def test_every_filter_says_that_nothing_was_measured(name: str) -> None:
    assert FILTERS[name](Measured()) == NOT_MEASURED


@pytest.mark.parametrize(
    ("filter", "value", "shown"),
    [
        ("size", 0, "0 B"),
        ("size", 999, "999 B"),
        ("size", 1064, "1.06 kB"),
        ("size", 999_600, "1.00 MB"),
        ("size", 42_723_456_789, "42.7 GB"),
        ("size", 141_107_412_992, "141 GB"),
        ("amount", 70_553_706_496, "70.6 billion"),
        ("amount", 12, "12"),
        ("count", 8192, "8192"),
        ("count", 128_256, "128,256"),
        ("duration", 0.004, "4 ms"),
        ("duration", 3.21, "3.2 s"),
        ("duration", 59.6, "1 min 0 s"),
        ("duration", 1503, "25 min 3 s"),
        ("duration", 3719, "1 h 1 min"),
        ("percent", 97.3653, "97.4 %"),
        ("number", 0.95, "0.95"),
        ("layers", {"first_layer": 40, "last_layer": 80}, "40 to 79"),
        ("layers", {"first_layer": 3, "last_layer": 4}, "3"),
        ("names", ["a", "b", "c"], "`a`, `b` and `c`"),
        ("names", list("abcdefgh"), "`a`, `b`, `c`, `d`, `e`, `f` and 2 more"),
    ],
)
def test_numbers_are_spelled_for_people(filter: str, value: Any, shown: str) -> None:
    assert FILTERS[filter](value) == shown


@given(st.floats(0, 1e7))
def test_a_duration_is_never_off_by_more_than_its_last_unit(seconds: float) -> None:
    units = {"h": 3600, "min": 60, "s": 1, "ms": 0.001}
    words = spell_duration(seconds).replace(",", "").split()
    parts = [(float(number), units[unit]) for number, unit in zip(words[::2], words[1::2], strict=True)]
    assert abs(sum(number * unit for number, unit in parts) - seconds) <= parts[-1][1]
    assert all(number < 60 for number, unit in parts[1:])


# --- text stays text --------------------------------------------------------------------------------------------------

ODD = [
    'Say "so"\n---\n## no heading',
    "{{ 7 * 7 }} {% raw %} ${x} $(id) `id` | cell |",
    "<script>alert(1)</script> <!-- <details> &amp; &lt;",
    "# *a* _b_ __c__ ~~d~~ [e](f) ![g](h) <i>",
    "größe 大小 👍 \\ \\| \\` ``` ~~~",
    "above\n```\n````\n~~~", "above\n===", "~~~\ninside",
    "- item", "1. one", "+ plus", "===", "    code", "> quote",
    "a | b\n---|---\n1 | 2",
    "https://example.org/a_b_c?d=1&e=2. And https://müller.de/ü (www)",
    "`a|b`", "''' \"\"\" %s \x85 \u2028 \u202e end",
]  # fmt: skip
TEXT = st.text(
    st.one_of(
        st.sampled_from(list("#*_`~[]()<>|\\-=+!&$'\"{}%:;/.\n\t 1a")),
        st.characters(exclude_categories=("Cs",), exclude_characters="\0"),
    ),
    min_size=1,
    max_size=40,
)
EXAMPLES = settings(max_examples=40, deadline=None)


def with_odd(test: Any) -> Any:
    for text in ODD:
        test = example(text=text)(test)
    return test


@EXAMPLES
@given(text=TEXT)
@with_odd
def test_no_title_note_or_finding_changes_the_structure_of_a_card(
    text: str, manifest: Manifest, obligations: Obligations
) -> None:
    receipts = copy.deepcopy(RECEIPTS)
    receipts["verify"]["facts"]["findings"][0] |= {"what": text, "where": text, "check": text}
    receipts["assemble"]["facts"]["fixes"][0] |= {"evidence": text, "title": text, "name": text}
    receipts["quantize"]["circumstances"]["machine"] = text
    changed = change(
        manifest,
        title=text,
        card__acknowledgments=(text, text),
        sampling__notes=(text,),
        calibration__column=text,
        calibration__split=text,
    )
    card = render_card(changed, receipts, obligations)["README.md"]
    plain_card = render_card(manifest, RECEIPTS, obligations)["README.md"]
    front_matter, body = split_card(card)
    assert front_matter == split_card(plain_card)[0]
    assert read_structure(body) == read_structure(split_card(plain_card)[1])
    assert " ".join(read_title(body).split(" ")) == flat(text)
    shown = [plain(token) for token in parse(body) if token.type == "inline"]
    assert shown.count(flat(text)) >= 3 or not flat(text)  # acknowledged twice, noted once


@EXAMPLES
@given(text=TEXT)
@with_odd
def test_the_publishers_own_markdown_stays_in_its_place(
    text: str, manifest: Manifest, obligations: Obligations
) -> None:
    changed = change(manifest, card__why=text, card__notes=(text, text))
    _, body = split_card(render_card(changed, RECEIPTS, obligations)["README.md"])
    _, plain_body = split_card(render_card(manifest, RECEIPTS, obligations)["README.md"])
    assert read_headings(body) == read_headings(plain_body)
    for kind in ("fence", "html_block"):
        assert [part for part in read_structure(body) if part[0].startswith(kind)] == [
            part for part in read_structure(plain_body) if part[0].startswith(kind)
        ]
    tags = {child.content for token in parse(body) for child in token.children or () if child.type == "html_inline"}
    assert tags <= {"<code>", "</code>"}


def test_the_publishers_markdown_works_where_it_is_wanted() -> None:
    prose = FILTERS["prose"]
    assert prose("It **fits**, see [there](https://x.org) and `code`.\n\n- one\n- two") == (
        "It **fits**, see [there](https://x.org) and `code`.\n\n- one\n- two"
    )
    assert prose("Let `<think>` grow, not <b>this</b>") == r"Let <code>\<think\></code> grow, not &lt;b>this&lt;/b>"
    assert prose("a\n---\n# b\n```\nc") == "a\n\\---\n\\# b\n\\`\\`\\`\nc"


@EXAMPLES
@given(text=TEXT)
@with_odd
def test_a_scalar_of_front_matter_reads_back_as_the_text(text: str) -> None:
    assert yaml.safe_load(f"key: {FILTERS['yaml'](text)}\nnext: 1") == {"key": text, "next": 1}


@pytest.mark.parametrize("text", ["mit", "true", "null", "1e3", "Yes", "on", "a: b", "a/b-c.d", "2026-01-01", ""])
def test_a_scalar_is_quoted_only_where_yaml_would_read_something_else(text: str) -> None:
    assert yaml.safe_load(FILTERS["yaml"](text)) == text
    assert FILTERS["yaml"](text).startswith('"') == (text not in ("mit", "a/b-c.d"))


@EXAMPLES
@given(text=TEXT)
@with_odd
def test_a_fence_holds_any_text_and_a_code_span_too(text: str) -> None:
    block = parse("before\n\n" + FILTERS["fence"](text, "yaml") + "\n\nafter")
    fences = [token for token in block if token.type == "fence"]
    assert len(fences) == 1 and fences[0].info == "yaml" and block[-2].content == "after"
    cells = parse(f"| a | b |\n|---|---|\n| {FILTERS['code'](text)} | c |")
    shown = [plain(token) for token in cells if token.type == "inline"]
    assert shown == ["a", "b", flat(text), "c"]


# --- the files beside the card ----------------------------------------------------------------------------------------

WORD = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp"), exclude_characters="\0"), max_size=20)


@settings(max_examples=25, deadline=None)
@given(word=WORD.filter(lambda word: "${" not in word))
@example(word='it\'s $(id) `id` "x" # | ; && \\ größe')
@example(word="-1")
def test_a_profiles_words_reach_llama_swap_and_a_shell_as_they_are(
    word: str, manifest: Manifest, obligations: Obligations
) -> None:
    changed = change(
        manifest,
        serve__args={"chat-template": word, "enforce-eager": True, "api-key": ("a b", "c")},
        serve__env={"SOME_VARIABLE": word},
    )
    files = render_card(changed, RECEIPTS, obligations)
    serve = changed.release.serve
    assert serve is not None
    name = "DeepSeek-R1-Distill-Llama-70B-NVFP4"
    entry = llama_swap_entry(serve, changed.release.llama_swap, served_name=name, num_bytes=42_723_456_789)
    assert yaml.safe_load(files["llama-swap.yaml"]) == entry
    command = next(token.content for token in parse(files["README.md"]) if token.type == "fence")
    variable, *from_hub = shlex.split(command.replace("\\\n", ""))
    assert variable == f"SOME_VARIABLE={word}"
    assert from_hub[3:] == [*serve_command(serve, served_name=name)[3:]]
    assert "exec /opt/vllm/bin/vllm serve" in files["serve.sh"]
    subprocess.run(["bash", "-n"], input=files["serve.sh"].encode(), check=True)
    script = files["serve.sh"].replace("exec /opt/vllm/bin/vllm", "exec_vllm", 1)
    function = 'exec_vllm() { printf "%s\\0" "$SOME_VARIABLE" "$@"; }\n'
    shell = {"input": (function + script).encode(), "capture_output": True, "check": True}
    said = subprocess.run(["sh", "-s", "--", "--more"], env={"PATH": os.environ["PATH"]}, **shell).stdout.decode()  # type: ignore[call-overload]
    words = serve_command(serve, served_name=name)[1:]
    assert said.split("\0")[:-1] == [word, *words, "--more"]


def test_the_cards_command_takes_the_model_from_the_hub(manifest: Manifest, obligations: Obligations) -> None:
    files = render_card(manifest, RECEIPTS, obligations)
    command = next(token.content for token in parse(files["README.md"]) if token.type == "fence")
    assert shlex.split(command.replace("\\\n", ""))[:4] == [
        "VLLM_MARLIN_USE_ATOMIC_ADD=1", "vllm", "serve", MANIFEST["repo"],
    ]  # fmt: skip
    assert "serve /models/DeepSeek-R1-Distill-Llama-70B-NVFP4" in files["serve.sh"]
    assert files["llama-swap.yaml"].split("\nhealth", 1)[1].rstrip() in files["README.md"]


# --- the notice -------------------------------------------------------------------------------------------------------


def test_the_notice_says_what_was_changed_and_what_the_licences_want_said(tmp_path: Path) -> None:
    notice = render_notice(write_manifest(tmp_path), write_obligations(tmp_path, notice="  Made by\r\n\tSomeone\n\n"))
    assert notice == (
        "This work modifies deepseek-ai/DeepSeek-R1-Distill-Llama-70B: its weights were quantized to NVFP4.\n\n"
        "Llama 3.3 is licensed under the Llama 3.3 Community License, Copyright © Meta Platforms, Inc. All Rights "
        "Reserved.\n\n"
        "It is made from deepseek-ai/DeepSeek-R1-Distill-Llama-70B, whose lineage is licensed under:\n"
        "- MIT License\n- Llama 3.3 Community License Agreement\n\n"
        "See also:\n- Llama 3.3 Acceptable Use Policy: https://www.llama.com/llama3_3/use-policy\n\n"
        "The texts are in:\n- LICENSE\n- LICENSE.llama3.3\n\n"
        "------------------------------------------------------------------------\n"
        "Notice of deepseek-ai/DeepSeek-R1-Distill-Llama-70B:\n\nMade by\n\tSomeone\n"
    )


def test_the_notice_is_a_function_of_base_licences_and_scheme_alone(tmp_path: Path, obligations: Obligations) -> None:
    notice = render_notice(write_manifest(tmp_path), obligations)
    base = {**MANIFEST["base"], "revision": REVISION[::-1]}
    others = {"title": "Other", "repo": "other/Llama-other", "card": None, "serve": None, "shards": 5, "base": base}
    assert render_notice(write_manifest(tmp_path, **others), obligations) == notice
    assert render_notice(write_manifest(tmp_path, scheme={"name": "w4a16"}), obligations) != notice
    assert render_notice(write_manifest(tmp_path, base={**base, "model": "a/b"}), obligations) != notice


# --- programs on the card ---------------------------------------------------------------------------------------------


def read_programs(card: str) -> list[str]:
    return [token.content for token in parse(card) if token.type == "fence" and token.info == "python"]


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_every_program_on_a_card_is_python_and_names_this_release(
    tmp_path: Path, obligations: Obligations, name: str
) -> None:
    manifest = write_manifest(tmp_path, scheme={"name": name})
    offline, *creation = read_programs(render_card(manifest, RECEIPTS, obligations)["README.md"])
    assert [len(creation), *(compile(program, "card", "exec").co_name for program in (offline, *creation))] == [
        0 if name == "nvfp4a16" else 1,
        *["<module>"] * (1 + len(creation)),
    ]
    for argument in ('model="Kaleto/DeepSeek-R1-Distill-Llama-70B-NVFP4"', "max_model_len=32768", "max_tokens=256"):
        assert argument in offline
    for program in creation:
        assert 'base = "deepseek-ai/DeepSeek-R1-Distill-Llama-70B"' in program and f'revision="{REVISION}"' in program
        assert '"DeepSeek-R1-Distill-Llama-70B-NVFP4"' in program
    presets = {"fp8_dynamic": '"FP8_DYNAMIC"', "w8a8": '"W8A8"', "w4a16": '"W4A16"', "nvfp4": "mtq.NVFP4_DEFAULT_CFG"}
    assert all(presets[name] in program for program in creation)


def test_a_card_promises_no_librarys_weights_where_they_would_differ(tmp_path: Path, obligations: Obligations) -> None:
    mixed = [{"name": "fp8_dynamic", "match": "re:.*down_proj"}, {"name": "w8a8"}]
    for scheme in (mixed, {"name": "nvfp4", "input_scale": "unit"}, {"name": "nvfp4", "ignore": ["lm_head", "a"]}):
        card = render_card(write_manifest(tmp_path, scheme=scheme), RECEIPTS, obligations)["README.md"]
        assert len(read_programs(card)) == 1 and "## Creation" not in card


@pytest.mark.parametrize("text", ['"', "\\", "'''", "\n", "{{ x }}", "ü𝔘", "\u2028", "```"])
def test_any_text_arrives_in_a_program_as_it_is(tmp_path: Path, obligations: Obligations, text: str) -> None:
    manifest = change(write_manifest(tmp_path), calibration__column=text)
    _, program = read_programs(render_card(manifest, RECEIPTS, obligations)["README.md"])
    literals = [node.value for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Constant)]
    assert text in literals
