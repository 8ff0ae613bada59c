"""A manifest is read strictly, and every mistake in it is told with its place and its remedy."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from builder import manifest
from builder.errors import BuildError, ManifestError, Problems
from builder.files import digest
from builder.manifest import EXAMPLE, Manifest, Release, Scheme, Section, json_schema, list_releases, load_manifest

RELEASES = Path(__file__).parent.parent / "releases"
MINIMAL = """\
manifest: 1
title: Tiny
repo: someone/tiny
base: {path: base, licenses: [mit]}
scheme: {name: nvfp4}
"""

Load = Callable[[str], Manifest]
in_one_folder = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Reads a text as releases/tiny.yaml below the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("releases").mkdir()

    def write_and_load(text: str) -> Manifest:
        Path("releases/tiny.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
        return load_manifest(Path("releases/tiny.yaml"))

    return write_and_load


def refusal(load: Load, text: str) -> str:
    with pytest.raises(BuildError) as caught:
        load(text)
    return str(caught.value)


def sections() -> list[type[Section]]:
    return [found for found in vars(manifest).values() if isinstance(found, type) and issubclass(found, Section)][1:]


# --- what is read -----------------------------------------------------------------------------------------------------


def test_five_keys_make_a_manifest_and_the_rest_has_defaults(load: Load) -> None:
    release = load(MINIMAL).release
    assert (release.shards, release.executor, release.device) == (1, "in_process", "auto")
    assert release.scheme == (Scheme(name="nvfp4"),)
    assert (release.scheme[0].layout, release.scheme[0].ignore) == ("compressed-tensors", ("lm_head",))
    assert (release.files.max_bytes, release.files.packing) == (5 * 2**30, "sequential")
    assert (release.calibration, release.fixes, release.serve, release.llama_swap.ttl) == (None, None, None, 0)


def test_every_key_of_the_example_arrives_as_its_own_type(load: Load) -> None:
    release = load(EXAMPLE).release
    assert release.calibration is not None and release.serve is not None and release.sampling is not None
    assert release.calibration.config == "3.0.0"
    assert release.calibration.tokens == (150, 1200)
    assert release.calibration.add_special_tokens is True
    assert release.serve.version == "0.32"
    assert release.serve.args == {"max-model-len": "32768", "gpu-memory-utilization": "0.80"}
    assert release.serve.env == {"VLLM_MARLIN_USE_ATOMIC_ADD": "1"}
    assert (release.serve.port, release.sampling.temperature) == (9007, 0.6)
    assert release.benchmarks[0].price_date == "2026-11-01"


def test_the_example_shows_every_key_but_the_one_that_excludes_another() -> None:
    def keys_of(data: Any, name: str) -> set[str]:
        if isinstance(data, dict):
            return {f"{name}.{key}" for key in data}.union(*(keys_of(item, key) for key, item in data.items()))
        return set().union(*(keys_of(item, name) for item in data)) if isinstance(data, list) else set()

    names = {"Release": "", "LlamaSwap": "llama_swap", "Benchmark": "benchmarks"}
    keys = {f"{names.get(s.__name__, s.__name__.lower())}.{key}" for s in sections() for key in s.model_fields}
    assert keys - keys_of(yaml.safe_load(EXAMPLE), "") == {"calibration.path"}


def test_every_key_tells_its_user_what_it_is() -> None:
    untold = [f"{s.__name__}.{key}" for s in sections() for key, info in s.model_fields.items() if not info.description]
    assert len(sections()) == 15 and untold == []


@pytest.mark.parametrize(
    "written", ["0.10", "1e3", "0x10", "010", "yes", "no", "on", "true", "null_", "2026-01-01", "1_0"]
)
def test_what_yaml_would_guess_stays_text_where_text_belongs(load: Load, written: str) -> None:
    assert load(MINIMAL.replace("Tiny", written)).release.title == written


def test_a_revision_of_digits_alone_stays_text(load: Load) -> None:
    release = load(MINIMAL.replace("path: base", f"model: a/b, revision: {'0123456789' * 4}")).release
    assert release.base.revision == "0123456789" * 4


def test_arguments_keep_their_digits_and_only_bare_true_and_false_are_switches(load: Load) -> None:
    args = "{a: 0.80, b: true, c: 'true', d: no, e: [1, 0.10], f: '{\"level\": 3}', g: false, h: 'null'}"
    release = load(MINIMAL + f"serve: {{version: 0.10, model_path: /m, args: {args}}}\n").release
    assert release.serve is not None and release.serve.version == "0.10"
    assert release.serve.args == {
        "a": "0.80",
        "b": True,
        "c": "true",
        "d": "no",
        "e": ("1", "0.10"),
        "f": '{"level": 3}',
        "g": False,
        "h": "null",
    }


@pytest.mark.parametrize(
    ("written", "num_bytes"),
    [("5GiB", 5 * 2**30), ("5GB", 5 * 10**9), ("400000", 400_000), ("1.5 MiB", 3 * 2**19), ("7B", 7), ("2kB", 2000)],
)
def test_sizes_are_read_as_people_write_them(load: Load, written: str, num_bytes: int) -> None:
    assert load(MINIMAL + f"files: {{max_bytes: {written}}}\n").release.files.max_bytes == num_bytes


@pytest.mark.parametrize(("written", "shards"), [("3", 3), ("[41, 41, 6]", (41, 41, 6)), ("[5]", (5,))])
def test_shards_are_a_count_or_the_layers_of_each(load: Load, written: str, shards: object) -> None:
    assert load(MINIMAL + f"shards: {written}\n").release.shards == shards


def test_one_scheme_and_a_list_of_one_are_the_same(load: Load) -> None:
    one, listed = load(MINIMAL), load(MINIMAL.replace("{name: nvfp4}", "[{name: nvfp4}]"))
    assert one.what() == listed.what()
    two = load(MINIMAL.replace("{name: nvfp4}", "[{match: mlp, name: nvfp4}, {name: fp8_dynamic}]"))
    assert [scheme.name for scheme in two.release.scheme] == ["nvfp4", "fp8_dynamic"]


@pytest.mark.parametrize("nothing", ["", "~", "null"])
def test_an_optional_key_without_a_value_counts_as_not_written(load: Load, nothing: str) -> None:
    bare = load(MINIMAL).what()
    for key in ("card", "shards", "files", "fixes", "serve", "evaluation"):
        assert load(MINIMAL + f"{key}: {nothing}\n").what() == bare


def test_an_alias_stands_for_what_it_names(load: Load) -> None:
    text = MINIMAL + "perplexity: {path: &rows rows.txt}\ncalibration: {path: *rows}\n"
    release = load(text).release
    assert release.calibration is not None and release.calibration.path == "rows.txt"


def test_a_byte_order_mark_and_windows_line_ends_are_read(load: Load) -> None:
    assert load("\ufeff" + MINIMAL.replace("\n", "\r\n")).what() == load(MINIMAL).what()


def test_a_release_cannot_be_changed(load: Load) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load(MINIMAL).release.title = "other"


def test_a_manifest_travels_to_other_processes(load: Load) -> None:
    loaded = load(MINIMAL)
    assert pickle.loads(pickle.dumps(loaded)) == loaded


# --- what decides the content -----------------------------------------------------------------------------------------


def test_how_a_release_is_built_is_not_part_of_what_it_is(load: Load) -> None:
    assert load(MINIMAL + "shards: [1, 2]\nexecutor: ray\ndevice: cuda\n").what() == load(MINIMAL).what()
    assert load(MINIMAL + "files: {packing: balanced}\n").what() != load(MINIMAL).what()


def test_neither_order_nor_comments_nor_written_defaults_change_what_a_release_is(load: Load) -> None:
    turned = "# a comment\n" + "\n".join(reversed(MINIMAL.strip().split("\n"))) + "\nfiles: {max_bytes: 5368709120}\n"
    turned = turned.replace("{path: base, licenses: [mit]}", "{licenses: ['mit'], path: base} # another")
    assert digest(load(turned).what()) == digest(load(MINIMAL).what())


def test_what_a_release_is_survives_json(load: Load) -> None:
    what = load(EXAMPLE).what()
    assert json.loads(json.dumps(what, allow_nan=False)) == what
    assert what["scheme"][0]["name"] == "nvfp4" and what["calibration"]["tokens"] == [150, 1200]


def test_paths_are_relative_to_the_manifest(load: Load, tmp_path: Path) -> None:
    assert load(MINIMAL).resolve("rows.txt") == tmp_path / "releases" / "rows.txt"
    assert load(MINIMAL).resolve("/rows.txt") == Path("/rows.txt")


# --- where things are -------------------------------------------------------------------------------------------------


def test_where_points_at_the_value_or_at_the_nearest_key_above_it(load: Load) -> None:
    loaded = load(MINIMAL + "shards: [41, 41, 6]\nserve:\n  version: 1\n  model_path: /m\n  args:\n    a: 1\n")
    assert loaded.where("title") == "releases/tiny.yaml:2:8: title: Tiny"
    assert loaded.where("shards") == "releases/tiny.yaml:6:1: shards: [41, 41, 6]"
    assert loaded.where("shards", 2) == "releases/tiny.yaml:6:18: shards[2]: 6"
    assert loaded.where("scheme", 0, "name") == "releases/tiny.yaml:5:16: scheme.name: nvfp4"
    assert loaded.where("serve", "args", "a") == "releases/tiny.yaml:11:8: serve.args.a: 1"
    assert loaded.where("serve", "port") == "releases/tiny.yaml:7:1: serve"
    assert loaded.where("device") == "releases/tiny.yaml:1:1"
    assert loaded.where() == "releases/tiny.yaml:1:1"


def test_where_shows_a_long_or_broken_value_on_one_short_line(load: Load) -> None:
    loaded = load(MINIMAL.replace("Tiny", '"a\\nb\\e[31m' + "c" * 100 + '"'))
    where = loaded.where("title")
    assert where == "releases/tiny.yaml:2:8: title: a b [31m" + "c" * 51 + "…"


def test_a_manifest_elsewhere_is_shown_with_its_whole_path(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(MINIMAL)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert loaded.where("title") == f"{tmp_path}/releases/tiny.yaml:2:8: title: Tiny"


# --- what is refused: the schema --------------------------------------------------------------------------------------

WRONG = {
    "shards: two": """\
shards must be a count of at least 1, or a list of the layers of each shard, not two
  in releases/tiny.yaml:6:9: shards: two
  fix: write for example shards: 2""",
    "shards: [4, 0]": """\
shards must be a count of at least 1, or a list of the layers of each shard, not [4, 0]
  in releases/tiny.yaml:6:1: shards: [4, 0]
  fix: write for example shards: 2""",
    "device: gpu": """\
device cannot be gpu
  in releases/tiny.yaml:6:9: device: gpu
  fix: did you mean cpu? Valid: auto, cpu, cuda""",
    "exekutor: ray": """\
unknown key exekutor
  in releases/tiny.yaml:6:11: exekutor: ray
  fix: did you mean executor? Valid: base, benchmarks, calibration, card, compatibility, device, evaluation, executor, \
files, fixes, kv_cache, llama_swap, manifest, perplexity, repo, sampling, scheme, serve, shards, title""",
    "files:\n  max_byte: 1": """\
unknown key files.max_byte
  in releases/tiny.yaml:7:13: files.max_byte: 1
  fix: did you mean max_bytes? Valid: max_bytes, packing""",
    "compatibility: {producr: old}": """\
unknown key compatibility.producr
  in releases/tiny.yaml:6:26: compatibility.producr: old
  fix: did you mean producer? Valid: copied_files, export_template, final_newline, header_metadata, license_texts, \
producer, total_parameters""",
    "compatibility: {producer: old}": """\
compatibility.producer must be a tool and its version, such as modelopt 0.43.0, not old
  in releases/tiny.yaml:6:27: compatibility.producer: old
  fix: write for example producer: modelopt 0.43.0""",
    "compatibility: {export_template: transformers 4.56.0}": """\
compatibility.export_template must be transformers 4.57.0 or a later 4.57, not transformers 4.56.0
  in releases/tiny.yaml:6:34: compatibility.export_template: transformers 4.56.0
  fix: write for example export_template: transformers 4.57.6""",
    "files: {max_bytes: 5 gigs}": """\
files.max_bytes must be a number of bytes, or a size in kB, MB, GB, KiB, MiB or GiB, not 5 gigs
  in releases/tiny.yaml:6:20: files.max_bytes: 5 gigs
  fix: write for example max_bytes: 5GiB""",
    "files: 5GiB": """\
files must be keys and values, not 5GiB
  in releases/tiny.yaml:6:8: files: 5GiB
  fix: write for example files: {max_bytes: 5GiB, packing: sequential}""",
    "fixes: restore-config": """\
fixes must be a list, not restore-config
  in releases/tiny.yaml:6:8: fixes: restore-config
  fix: write for example fixes: [restore-config]""",
    "fixes: [a, b, a]": """\
fixes must be a list without repetitions, not [a, b, a]
  in releases/tiny.yaml:6:1: fixes: [a, b, a]
  fix: write for example fixes: [restore-config]""",
    "fixes: [../x]": """\
fixes[0] must be a name of letters, digits and . _ + -, not ../x
  in releases/tiny.yaml:6:9: fixes[0]: ../x
  fix: write for example fixes: [restore-config]""",
    "perplexity: {}": """\
perplexity lacks the key path
  in releases/tiny.yaml:6:1: perplexity
  fix: add for example path: heldout.txt. Held-out text, relative to this file""",
    "calibration: {samples: 2}": """\
calibration has neither dataset nor path
  in releases/tiny.yaml:6:1: calibration
  fix: give one of them: dataset: a Hub id, or path: a JSON Lines file beside the manifest""",
    "calibration: {dataset: a/b, path: c}": """\
calibration has both dataset and path
  in releases/tiny.yaml:6:35: calibration.path: c
  fix: give one of them: dataset: a Hub id, or path: a JSON Lines file beside the manifest""",
    "calibration: {path: c, samples: 1.5}": """\
calibration.samples must be a whole number, not 1.5
  in releases/tiny.yaml:6:33: calibration.samples: 1.5
  fix: write for example samples: 256""",
    "calibration: {path: c, samples: 0}": """\
calibration.samples must be at least 1, not 0
  in releases/tiny.yaml:6:33: calibration.samples: 0
  fix: write for example samples: 256""",
    "calibration: {path: c, chat_template: yes}": """\
calibration.chat_template must be true or false, not yes
  in releases/tiny.yaml:6:39: calibration.chat_template: yes
  fix: write for example chat_template: false""",
    "calibration: {path: c, revision: main}": """\
calibration.revision must be the 40 lowercase hexadecimal digits of a commit, not main
  in releases/tiny.yaml:6:34: calibration.revision: main
  fix: write for example revision: 0123456789abcdef0123456789abcdef01234567""",
    "calibration: {path: c, tokens: 5}": """\
calibration.tokens must be a list, not 5
  in releases/tiny.yaml:6:32: calibration.tokens: 5
  fix: write for example tokens: [150, 1200]""",
    "calibration: {path: c, tokens: [5]}": """\
calibration.tokens must be two whole numbers, the shortest and the longest row, not [5]
  in releases/tiny.yaml:6:24: calibration.tokens: [5]
  fix: write for example tokens: [150, 1200]""",
    "calibration: {path: c, tokens: [9, 5]}": """\
calibration.tokens must be two whole numbers, the smaller one first, not [9, 5]
  in releases/tiny.yaml:6:24: calibration.tokens: [9, 5]
  fix: write for example tokens: [150, 1200]""",
    "calibration: {path: c, tokens: [few, 5]}": """\
calibration.tokens[0] must be a whole number, not few
  in releases/tiny.yaml:6:33: calibration.tokens[0]: few
  fix: write for example tokens: [150, 1200]""",
    "sampling: {temperature: .inf}": """\
sampling.temperature must be a finite number, not .inf
  in releases/tiny.yaml:6:25: sampling.temperature: .inf
  fix: write for example temperature: 0.6""",
    "sampling: {temperature: 1e999}": """\
sampling.temperature must be a finite number, not 1e999
  in releases/tiny.yaml:6:25: sampling.temperature: 1e999
  fix: write for example temperature: 0.6""",
    "sampling: {top_p: 2}": """\
sampling.top_p must be at most 1, not 2
  in releases/tiny.yaml:6:19: sampling.top_p: 2
  fix: write for example top_p: 0.95""",
    "sampling: {top_p: 0}": """\
sampling.top_p must be above 0, not 0
  in releases/tiny.yaml:6:19: sampling.top_p: 0
  fix: write for example top_p: 0.95""",
    "serve: {version: 1, model_path: '', port: 1}": """\
serve.model_path must be a text that is not empty, not an empty text
  in releases/tiny.yaml:6:33: serve.model_path: an empty text
  fix: write for example model_path: /models/DeepSeek-R1-Distill-Llama-70B-NVFP4""",
    "serve: {version: 1, model_path: m, port: 65536}": """\
serve.port must be at most 65535, not 65536
  in releases/tiny.yaml:6:42: serve.port: 65536
  fix: write for example port: 9007""",
    "serve: {version: 1, model_path: m, args: {--a: 1}}": """\
a key of serve.args must be the name of an option without its leading dashes, not --a
  in releases/tiny.yaml:6:48: serve.args.--a: 1
  fix: write for example args: {max-model-len: 32768, gpu-memory-utilization: 0.80}""",
    "serve: {version: 1, model_path: m, args: {a: {b: c}}}": """\
serve.args.a must be a text, true, false or a list of texts (JSON goes in single quotes), not {b: c}
  in releases/tiny.yaml:6:43: serve.args.a
  fix: write for example args: {max-model-len: 32768, gpu-memory-utilization: 0.80}""",
    "serve: {version: 1, model_path: m, env: {path: c}}": """\
a key of serve.env must be the name of a variable in capitals, digits and _, not path
  in releases/tiny.yaml:6:48: serve.env.path: c
  fix: write for example env: {VLLM_MARLIN_USE_ATOMIC_ADD: 1}""",
    "llama_swap: {name: " + "x" * 129 + "}": f"""\
llama_swap.name must be a text of at most 128 characters, not {"x" * 59}…
  in releases/tiny.yaml:6:20: llama_swap.name: {"x" * 59}…
  fix: write for example name: DeepSeek R1 70B""",
    "benchmarks: [{file: f, gpu: g, price_per_hour: 1, price_date: 2026-02-30, price_source: s}]": """\
benchmarks[0].price_date must be a date, YYYY-MM-DD, not 2026-02-30
  in releases/tiny.yaml:6:63: benchmarks[0].price_date: 2026-02-30
  fix: write for example price_date: 2026-11-01""",
    "benchmarks: [{file: f, gpu: g, price_per_hour: 1, price_date: 2026-02-28}]": """\
price_per_hour without price_source
  in releases/tiny.yaml:6:14: benchmarks[0]
  fix: give the price with its date and source""",
}


@pytest.mark.parametrize("added", WRONG)
def test_a_wrong_value_is_told_with_its_place_and_its_remedy(load: Load, added: str) -> None:
    assert refusal(load, f"{MINIMAL}{added}\n") == WRONG[added]


CHANGED = {
    ("manifest: 1", "manifest: 2"): """\
manifest cannot be 2
  in releases/tiny.yaml:1:11: manifest: 2
  fix: write manifest: 1""",
    ("title: Tiny", "# none"): """\
the manifest lacks the key title
  in releases/tiny.yaml:1:1
  fix: add for example title: DeepSeek-R1-Distill-Llama-70B — NVFP4. Title of the release""",
    ("Tiny", ""): """\
title must be a text, not nothing
  in releases/tiny.yaml:2:1: title
  fix: write for example title: DeepSeek-R1-Distill-Llama-70B — NVFP4""",
    ("Tiny", "[a, b]"): """\
title must be a text, not [a, b]
  in releases/tiny.yaml:2:1: title: [a, b]
  fix: write for example title: DeepSeek-R1-Distill-Llama-70B — NVFP4""",
    ("someone/tiny", "tiny"): """\
repo must be a Hub id, owner/name, not tiny
  in releases/tiny.yaml:3:7: repo: tiny
  fix: write for example repo: Kaleto/DeepSeek-R1-Distill-Llama-70B-NVFP4""",
    ("someone/tiny", "someone/../tiny"): """\
repo must be a Hub id, owner/name, not someone/../tiny
  in releases/tiny.yaml:3:7: repo: someone/../tiny
  fix: write for example repo: Kaleto/DeepSeek-R1-Distill-Llama-70B-NVFP4""",
    (", licenses: [mit]", ""): """\
base lacks the key licenses
  in releases/tiny.yaml:4:1: base
  fix: add for example licenses: [mit, llama3.3]. Licence ids of the base and of every model it was made from""",
    ("[mit]", "[]"): """\
base.licenses must be a list that is not empty, not []
  in releases/tiny.yaml:4:20: base.licenses: []
  fix: write for example licenses: [mit, llama3.3]""",
    ("path: base, ", ""): """\
base has neither model nor path
  in releases/tiny.yaml:4:1: base
  fix: add model: a Hub id, or path: a folder beside the manifest""",
    ("{name: nvfp4}", "nvfp4"): """\
scheme must be keys and values, or a list of these, not nvfp4
  in releases/tiny.yaml:5:9: scheme: nvfp4
  fix: write for example scheme: {name: nvfp4, layout: compressed-tensors, ...}""",
    ("{name: nvfp4}", "[]"): """\
scheme must be a list that is not empty, not []
  in releases/tiny.yaml:5:1: scheme: []
  fix: write for example scheme: {name: nvfp4, layout: compressed-tensors, ...}""",
    ("{name: nvfp4}", "{nmae: nvfp4}"): """\
scheme lacks the key name
  in releases/tiny.yaml:5:1: scheme
  fix: add for example name: nvfp4. How weights and activations are quantized
unknown key scheme.nmae
  in releases/tiny.yaml:5:16: scheme.nmae: nvfp4
  fix: did you mean name? Valid: block_scale_floor, ignore, input_scale, layout, match, name""",
    ("{name: nvfp4}", "{name: nvfp4, layout: modelop}"): """\
scheme.layout cannot be modelop
  in releases/tiny.yaml:5:31: scheme.layout: modelop
  fix: did you mean modelopt? Valid: compressed-tensors, modelopt""",
}


@pytest.mark.parametrize(("old", "new"), CHANGED)
def test_a_broken_key_is_told_with_its_place_and_its_remedy(load: Load, old: str, new: str) -> None:
    assert old in MINIMAL
    assert refusal(load, MINIMAL.replace(old, new)) == CHANGED[old, new]


def test_all_problems_are_reported_together_in_the_order_of_the_file(load: Load) -> None:
    text = "manifest: 1\ntitle: a\ntitle: b\nbase: {revision: main}\nscheme: {name: !!str x}\nshards: 0\nbogus: 1\n"
    with pytest.raises(Problems) as caught:
        load(text)
    assert all(isinstance(problem, ManifestError) for problem in caught.value.problems)
    assert [problem.what for problem in caught.value.problems] == [
        "the manifest lacks the key repo",
        "title is written twice, in lines 2 and 3",
        "base has neither model nor path",
        "base lacks the key licenses",
        "base.revision must be the 40 lowercase hexadecimal digits of a commit, not main",
        "the tag !!str in a manifest",
        "shards must be a count of at least 1, or a list of the layers of each shard, not 0",
        "unknown key bogus",
    ]


# --- what is refused: the file ----------------------------------------------------------------------------------------

UNREADABLE = {
    "": """\
the manifest is empty
  in releases/tiny.yaml
  fix: start from a copy of another manifest""",
    "# only a comment\n": """\
the manifest is empty
  in releases/tiny.yaml
  fix: start from a copy of another manifest""",
    "- a\n- b\n": """\
the manifest is not made of keys and values
  in releases/tiny.yaml:1:1: [a, b]
  fix: write `key: value` lines, beginning with manifest: 1""",
    MINIMAL + "---\n" + MINIMAL: """\
a second YAML document
  in releases/tiny.yaml:6:1
  fix: keep one manifest in a file: delete the line ---""",
    MINIMAL + "shards: 2\nfiles: {}\nshards: 3\n": """\
shards is written twice, in lines 6 and 8
  in releases/tiny.yaml:8:1: shards
  fix: keep one of them""",
    MINIMAL + "files:\n  packing: balanced\n  'packing': balanced\n": """\
packing is written twice, in lines 7 and 8
  in releases/tiny.yaml:8:3: files.packing
  fix: keep one of them""",
    MINIMAL + "card: !!python/object/apply:os.system {}\n": """\
the tag !!python/object/apply:os.system in a manifest
  in releases/tiny.yaml:6:7: card
  fix: remove it: the key decides the type""",
    MINIMAL + "shards: !!int 2\n": """\
the tag !!int in a manifest
  in releases/tiny.yaml:6:9: shards
  fix: remove it: the key decides the type""",
    MINIMAL + "executor: *ray\n": """\
*ray stands for nothing written before it
  in releases/tiny.yaml:6:11
  fix: write the value itself""",
    MINIMAL + "fixes: &all [*all]\n": """\
*all stands for nothing written before it
  in releases/tiny.yaml:6:14
  fix: write the value itself""",
    MINIMAL + "? [a]\n: b\n": """\
a key that is a list or a mapping
  in releases/tiny.yaml:6:3
  fix: write a name before the colon""",
    MINIMAL + "files:\n\tpacking: balanced\n": """\
not YAML: found character '\\t' that cannot start any token
  in releases/tiny.yaml:7:1
  fix: indent with spaces, close quotes and brackets, quote text that has `: ` or ` #`""",
    "manifest: 1\ntitle: a: b\n": """\
not YAML: mapping values are not allowed here
  in releases/tiny.yaml:2:9
  fix: indent with spaces, close quotes and brackets, quote text that has `: ` or ` #`""",
    "manifest: 1\ntitle: 'a\nrepo: a/b\n": """\
not YAML: found unexpected end of stream while scanning a quoted scalar that begins in line 2
  in releases/tiny.yaml:4:1
  fix: indent with spaces, close quotes and brackets, quote text that has `: ` or ` #`""",
    "manifest: 1\ntitle: a\x07b\n": """\
the character U+0007 is not allowed in YAML
  in releases/tiny.yaml:2
  fix: remove it""",
    "manifest: 1\ntitle: a\udcffb\n": """\
byte 0xff is not UTF-8
  in releases/tiny.yaml:2
  fix: save the file as UTF-8""",
    'manifest: 1\ntitle: "\\UFFFFFFFF"\n': """\
not YAML: an escape or a version that is out of bounds
  in releases/tiny.yaml:2
  fix: write the character itself""",
    MINIMAL.replace("Tiny", '"a\\0b"'): """\
the character U+0000 in a text
  in releases/tiny.yaml:2:8: title
  fix: remove it""",
    MINIMAL + "fixes: " + "[" * 40 + "]" * 40 + "\n": """\
more than 32 levels of nesting
  in releases/tiny.yaml:6:39
  fix: no key of a manifest has so many""",
    MINIMAL + "#" * 1_000_000: """\
more than 1000000 bytes in a manifest
  in releases/tiny.yaml
  fix: refer to files instead""",
}


@pytest.mark.parametrize("text", UNREADABLE, ids=range(len(UNREADABLE)))
def test_a_file_that_cannot_be_read_as_a_manifest_is_told_with_its_place_and_its_remedy(load: Load, text: str) -> None:
    report = refusal(load, text)
    if "\\0" in text:
        report = "\n".join(report.split("\n")[:3])  # the text is also too short
    assert report == UNREADABLE[text]


def test_a_billion_laughs_are_refused_before_they_are_written_out(load: Load) -> None:
    laughs = "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True):
        laughs += f"{name}: &{name} [{', '.join(['*' + before] * 10)}]\n"
    assert refusal(load, laughs) == (
        "more than 20000 values, aliases written out\n  in releases/tiny.yaml:5:8\n  fix: write fewer; use no aliases"
    )


def test_a_missing_release_is_told_with_the_nearest_name(load: Load) -> None:
    load(MINIMAL)
    with pytest.raises(ManifestError) as caught:
        load_manifest(Path("releases/tniy.yaml"))
    assert str(caught.value) == (
        "there is no release tniy\n  in releases/tniy.yaml\n  fix: did you mean tiny? Valid: tiny"
    )


def test_a_folder_is_not_a_manifest(load: Load) -> None:
    Path("releases/folder.yaml").mkdir()
    with pytest.raises(ManifestError) as caught:
        load_manifest(Path("releases/folder.yaml"))
    assert str(caught.value) == (
        "folder.yaml cannot be read: Is a directory\n  in releases/folder.yaml\n  fix: make it a readable file"
    )


@pytest.mark.parametrize("name", ["a b.yaml", "-a.yaml", "a..b.yaml", ".yaml", "a.yml", "a$(id).yaml", "ä.yaml"])
def test_a_name_that_would_not_be_safe_everywhere_is_refused(load: Load, name: str) -> None:
    Path("releases", name).write_text(MINIMAL)
    with pytest.raises(ManifestError) as caught:
        load_manifest(Path("releases", name))
    assert str(caught.value) == (
        f"{name} cannot name a release\n  in releases/{name}\n"
        "  fix: name it by letters, digits and . _ -, beginning with a letter or digit, and end it with .yaml"
    )


def test_releases_are_listed_sorted_and_only_manifests(tmp_path: Path) -> None:
    for name in ("b.yaml", "a.yaml", "a.lock.json", ".c.yaml", "notes.md"):
        (tmp_path / name).touch()
    assert list_releases(tmp_path) == ("a", "b")


# --- whatever is written ----------------------------------------------------------------------------------------------

hostile = st.sampled_from(
    ["---", "a: b", "{{ x }}", "$(id)", '"', "'", "a\nb\n", " # c", "*a", "&a", "!!x", "| ", "{%"]
)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\x85"), min_size=1) | hostile


@in_one_folder
@given(title=texts, note=texts)
def test_any_text_survives_the_way_through_yaml(load: Load, title: str, note: str) -> None:
    # but for \0, which is refused, and \x85, which PyYAML writes as a line end
    data = yaml.safe_load(MINIMAL) | {"title": title, "card": {"notes": [note]}}
    for flow in (True, False):
        release = load(yaml.safe_dump(data, default_flow_style=flow, allow_unicode=flow)).release
        assert (release.title, release.card.notes) == (title, (note,))


@in_one_folder
@given(st.binary(max_size=200) | st.text(st.characters(exclude_categories=["Cs"])).map(str.encode))
def test_any_bytes_are_read_or_refused_in_plain_words(load: Load, data: bytes) -> None:
    path = Path("releases/tiny.yaml")
    path.write_bytes(data)
    with pytest.raises(BuildError):
        load_manifest(path)


signs = "a:-[]{},'\"&*!|>#?%\\~ \n\t\r\u2028\ufeff"
pieces = [
    ": ",
    "- ",
    "&a ",
    "*a",
    "!!int ",
    "<<",
    "\\xff",
    "\\ud800",
    "---\n",
    "...\n",
    "%YAML 1.1\n",
    "files: ",
    "\n  ",
]
fragments = st.sampled_from([*signs, *pieces])


@settings(in_one_folder, max_examples=300)
@given(st.lists(fragments, max_size=30).map("".join))
def test_any_yaml_is_read_or_refused_in_plain_words(load: Load, text: str) -> None:
    for whole in (text, MINIMAL + text):
        try:
            assert load(whole).release.repo == "someone/tiny"
        except BuildError as error:
            assert "  fix: " in str(error)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec="utf-8")) | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), inner)
    ),
    max_leaves=5,
)


@settings(in_one_folder, max_examples=100)
@given(data=st.data())
def test_any_value_of_any_key_is_read_or_refused_in_plain_words(load: Load, data: st.DataObject) -> None:
    content = yaml.safe_load(EXAMPLE)
    place = content
    key = data.draw(st.sampled_from(sorted(place)))
    while isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    place[key] = data.draw(values)
    try:
        load(yaml.safe_dump(content))
    except BuildError as error:
        assert "  fix: " in str(error)
        assert "Input should" not in str(error)


# --- the schema for editors -------------------------------------------------------------------------------------------


def schema_refusals(text: str) -> list[str]:
    content = json.loads(json.dumps(yaml.safe_load(text), default=date.isoformat))  # an editor's YAML has no dates
    validator = jsonschema.Draft7Validator(json_schema())
    return [error.message for error in validator.iter_errors(content)]


def test_the_json_schema_is_one() -> None:
    jsonschema.Draft7Validator.check_schema(json_schema())


def test_the_json_schema_accepts_every_release_and_the_example() -> None:
    assert "tiny-llama" in list_releases(RELEASES)
    for name in list_releases(RELEASES):
        assert schema_refusals((RELEASES / f"{name}.yaml").read_text()) == [], name
    assert schema_refusals(EXAMPLE) == []


@pytest.mark.parametrize(
    "added",
    [
        "shards: [1, 2]",
        "card:",
        "files: {max_bytes: 400000}",
        "serve: {version: 0.32, model_path: /m, args: {a: true}}",
    ],
)
def test_the_json_schema_accepts_what_people_write(load: Load, added: str) -> None:
    text = MINIMAL.replace("{name: nvfp4}", "[{name: nvfp4}]") + added
    assert load(text) and schema_refusals(text) == []


@pytest.mark.parametrize(
    "added",
    [
        "bogus: 1",
        "files: {bogus: 1}",
        "shards: 0",
        "shards: two",
        "device: gpu",
        "serve: {version: 1}",
        "serve: {version: 1, model_path: m, port: 99999}",
        "serve: {version: 1, model_path: m, env: {a: b}}",
        "calibration: {path: a, tokens: [1]}",
        "sampling: {top_p: 1.5}",
        "perplexity: {}",
    ],
)
def test_the_json_schema_refuses_what_the_manifest_refuses(load: Load, added: str) -> None:
    text = MINIMAL + added
    assert refusal(load, text) and schema_refusals(text) != []


def test_every_release_is_valid_and_the_schema_in_step() -> None:
    assert manifest.check(RELEASES) == []


def test_the_check_names_broken_manifests_and_a_stale_schema(load: Load) -> None:
    refusal(load, MINIMAL + "bogus: 1\n")
    here = {**os.environ, "PYTHONPATH": str(RELEASES.parent)}
    command = [sys.executable, "-m", "builder.manifest"]
    checked = subprocess.run([*command, "--check"], env=here, capture_output=True, text=True)
    assert checked.returncode == 1
    assert checked.stderr.startswith(
        "unknown key bogus\n  in releases/tiny.yaml:6:8: bogus: 1\n  fix: use one of base,"
    )
    assert checked.stderr.endswith(
        "the JSON Schema is not the manifest's\n  in releases/manifest.schema.json\n"
        "  fix: run python -m builder.manifest --write-schema\n"
    )
    load(MINIMAL)
    subprocess.run([*command, "--write-schema"], env=here, check=True)
    assert subprocess.run([*command, "--check"], env=here, capture_output=True).returncode == 0


@pytest.mark.parametrize("name", list_releases(RELEASES))
def test_every_release_tells_editors_its_schema(name: str) -> None:
    first = (RELEASES / f"{name}.yaml").read_text().splitlines()[0]
    assert first == "# yaml-language-server: $schema=manifest.schema.json"


# --- the module -------------------------------------------------------------------------------------------------------


def test_reading_manifests_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'ray', 'modelopt', 'numba', 'doit', 'numpy'}"
    code = f"import sys, builder.manifest; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=RELEASES.parent)
    assert done.stdout == "[]\n"


def test_every_section_refuses_unknown_keys_and_changes() -> None:
    assert Release in sections()
    for section in sections():
        assert section.model_config["extra"] == "forbid" and section.model_config["frozen"] is True
