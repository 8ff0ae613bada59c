"""The program as its users meet it: doit on the command line."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import build
from doit.doit_cmd import DoitMain
from fake_hub import serve_fake_hub

from builder.base import open_checkpoint

ROOT = Path(__file__).parents[1]
STEPS = ["plan", "fetch", "calibrate", "quantize", "assemble", "verify", "perplexity", "lock", "card"]
QUICK = {"scheme.input_scale": "unit", "calibration": None, "perplexity": None}

Run = Callable[..., "Told"]


class Told:
    """What a command printed, and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def ran(self) -> list[str]:
        """The steps that did something, in order."""
        return re.findall(rf"^({'|'.join(STEPS)}):\S+: (?!up to date)", self.out, flags=re.M)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that doit can be run in, with the project's own configuration."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "releases").mkdir(exist_ok=True)
    (tmp_path / "releases").rmdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EXECUTOR", raising=False)
    return tmp_path


@pytest.fixture
def doit(project: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a doit command line in this process."""

    def run(*args: str) -> Told:
        capfd.readouterr()
        code = DoitMain().run(list(args)) or 0
        captured = capfd.readouterr()
        assert "Traceback" not in captured.out + captured.err, captured.out + captured.err
        return Told(code, captured.out, captured.err)

    return run


def digest_payload(build: Path) -> str:
    digest: str = json.loads((build / "receipts" / "assemble.json").read_text())["facts"]["payload_sha256"]
    return digest


def list_files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ------------------------------------------------------------------------------------------------ the whole road


def test_a_release_is_built_once_and_afterwards_only_what_changed(
    doit: Run, project: Path, write_release: Callable[..., Path]
) -> None:
    templates = write_release().parent / "base" / "additional_chat_templates"
    templates.mkdir()
    (templates / "tools.jinja").write_text("{{ messages }}")
    first = doit("release:tiny")
    assert (first.code, first.ran) == (0, STEPS)
    assert "tiny is finished" in first.out
    assert re.search(r"^quality   \d+\.\d % of the base \(perplexity \d+\.\d+ -> \d+\.\d+\)$", first.out, flags=re.M)
    artifact = project / "build" / "tiny" / "artifact"
    assert {"README.md", "config.json", "NOTICE", "LICENSE", "tokenizer.json", "chat_template.jinja"} <= list_files(
        artifact
    )
    assert (project / "releases" / "tiny.lock.json").is_file()
    assert (artifact / "additional_chat_templates" / "tools.jinja").read_text() == "{{ messages }}"
    payload = digest_payload(project / "build" / "tiny")

    again = doit("release:tiny")
    assert (again.code, again.ran) == (0, [])

    write_release(title="Another title")
    retitled = doit("release:tiny")
    assert retitled.ran == ["card"]
    assert "# Another title" in (artifact / "README.md").read_text()
    assert digest_payload(project / "build" / "tiny") == payload

    write_release(shards=3)
    assert doit("release:tiny").ran == ["plan", "card"], "shards say how, not what; the card tells of them"
    assert digest_payload(project / "build" / "tiny") == payload

    write_release(**{"calibration.samples": 6})
    assert doit("assemble:tiny").ran == ["plan", "calibrate", "quantize", "assemble"]
    assert digest_payload(project / "build" / "tiny") != payload

    write_release()
    assert doit("assemble:tiny").ran == ["plan", "calibrate", "quantize", "assemble"]
    assert digest_payload(project / "build" / "tiny") == payload


def test_a_second_build_from_nothing_is_the_first_bit_for_bit(
    doit: Run, project: Path, write_release: Callable[..., Path]
) -> None:
    write_release(**QUICK)
    assert doit("release:tiny").code == 0
    lock = (project / "releases" / "tiny.lock.json").read_bytes()
    shutil.rmtree(project / "build")
    second = doit("release:tiny")
    assert "lock: every file of the payload is the same, bit for bit" in second.out
    assert (project / "releases" / "tiny.lock.json").read_bytes() == lock


def test_a_lock_is_written_again_where_the_publisher_asks_for_it(
    doit: Run, project: Path, write_release: Callable[..., Path]
) -> None:
    path = write_release(**QUICK)
    refused = doit("relock:tiny")
    assert "tiny has no lock, which relock works from" in refused.err
    assert "fix: doit release:tiny writes it" in refused.err
    doit("release:tiny")
    lock = path.with_suffix(".lock.json")
    own = lock.read_bytes()
    lock.write_text("{}")
    assert "fix: restore it from version control, or write it again from a build: doit relock:tiny" in (
        doit("release:tiny").err
    )
    again = doit("relock:tiny")
    assert (again.code, again.ran) == (0, ["lock", "card"])
    assert "  lock: rewritten; the one before could not be read\n" in again.out
    assert "  `git diff releases/tiny.lock.json` shows what changed in it\n" in again.out
    assert lock.read_bytes() == own
    assert doit("release:tiny").ran == []


def test_what_was_deleted_is_made_again_and_no_more(
    doit: Run, project: Path, write_release: Callable[..., Path]
) -> None:
    write_release(**QUICK)
    doit("release:tiny")
    build = project / "build" / "tiny"
    (build / "artifact" / "config.json").unlink()
    assert doit("release:tiny").ran == ["assemble", "verify", "card"], "the files are others, so they are read again"
    (build / "artifact" / "README.md").unlink()
    assert doit("release:tiny").ran == ["card"]
    (build / "receipts" / "lock.json").write_text('{"stage": "lo')  # torn
    assert doit("release:tiny").ran == ["lock", "card"]
    assert not list((build / "parts").glob("*.safetensors")), "they are in the artifact alone"
    (build / "artifact" / "model-00001-of-00002.safetensors").unlink()
    assert doit("assemble:tiny").ran == ["quantize", "assemble"]
    assert json.loads((build / "receipts" / "quantize.json").read_text())["circumstances"]["jobs"][-1]["num_skipped"]


def flip_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def test_an_artifact_that_was_tampered_with_is_not_called_finished(
    doit: Run, project: Path, write_release: Callable[..., Path]
) -> None:
    write_release(**QUICK)
    doit("release:tiny")
    build = project / "build" / "tiny"
    (build / "artifact" / "config.json").write_bytes(
        (build / "artifact" / "config.json").read_bytes().replace(b'"vocab_size": 2048', b'"vocab_size": 2049')
    )
    assert doit("release:tiny").ran == ["assemble", "verify", "card"]
    payload = digest_payload(build)
    flip_byte(build / "artifact" / "model-00001-of-00002.safetensors")
    assert doit("assemble:tiny").ran == ["quantize", "assemble"]
    assert digest_payload(build) == payload
    for name, entry in json.loads((build / "receipts" / "assemble.json").read_text())["facts"]["payload"].items():
        assert hashlib.sha256((build / "artifact" / name).read_bytes()).hexdigest() == entry["sha256"], name
    shutil.rmtree(build / "artifact")
    assert doit("assemble:tiny").ran == ["quantize", "assemble"]


def test_a_receipt_that_was_altered_is_not_believed(
    doit: Run, project: Path, write_release: Callable[..., Path]
) -> None:
    write_release(perplexity=None)
    doit("assemble:tiny")
    payload = digest_payload(project / "build" / "tiny")
    receipt = project / "build" / "tiny" / "receipts" / "calibrate.json"
    receipt.write_text(receipt.read_text().replace("0x1.", "0x1.8", 1))
    assert doit("assemble:tiny").ran == ["calibrate"], "and what came after it holds again"
    assert digest_payload(project / "build" / "tiny") == payload


def test_a_build_that_ended_between_the_artifact_and_its_receipt_is_not_taken_for_the_one_before(
    doit: Run, project: Path, write_release: Callable[..., Path]
) -> None:
    from builder.manifest import load_manifest
    from builder.stages import STAGES, Workspace, run_stage

    path = write_release(perplexity=None)
    doit("assemble:tiny")
    build = project / "build" / "tiny"
    payload = digest_payload(build)
    write_release(perplexity=None, **{"calibration.seed": 7})  # other bytes in files of the same sizes
    assert doit("quantize:tiny").code == 0
    workspace = Workspace(load_manifest(path), build)
    (assemble,) = [stage for stage in STAGES if stage.name == "assemble"]

    def run_and_fail(workspace: Workspace) -> Any:
        assemble.run(workspace)
        raise InterruptedError("the power fails")

    with pytest.raises(InterruptedError):
        run_stage(workspace, dataclasses.replace(assemble, run=run_and_fail))
    write_release(perplexity=None)
    assert doit("assemble:tiny").ran[-1] == "assemble"
    assert digest_payload(build) == payload
    recorded = json.loads((build / "receipts" / "assemble.json").read_text())["facts"]["payload"]
    for name, entry in recorded.items():
        assert hashlib.sha256((build / "artifact" / name).read_bytes()).hexdigest() == entry["sha256"], name


def test_a_new_model_is_a_new_file(doit: Run, project: Path, write_release: Callable[..., Path]) -> None:
    write_release("one", **QUICK)
    write_release("two", **QUICK, **{"scheme.layout": "modelopt"})
    listed = doit("list")
    assert re.findall(r"^release:(\w+) +Tiny Llama — NVFP4", listed.out, flags=re.M) == ["one", "two"]
    assert doit("release:two").code == 0
    assert (project / "build" / "two" / "artifact" / "hf_quant_config.json").is_file()
    assert not (project / "build" / "one").exists()


def test_a_release_of_a_hub_model_is_built_from_its_pinned_revision(
    doit: Run, project: Path, write_release: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fake_hub import serve_fake_hub

    path = write_release()
    base = path.parent / "base"
    with serve_fake_hub(project, monkeypatch) as fake:
        revision = fake.add("org/tiny", {file.name: file.read_bytes() for file in base.iterdir()})
        write_release("hub", **QUICK, **{"base.path": None, "base.model": "org/tiny", "base.revision": revision})
        planned = doit("plan:hub")
        assert planned.code == 0, planned.err
        weights = sum(file.stat().st_size for file in base.glob("*.safetensors"))
        assert fake.num_bytes_sent("model-00001-of-00002.safetensors") < weights / 10, "planning reads headers alone"
        assert doit("release:hub").code == 0
    write_release("local", **QUICK)
    assert doit("release:local").code == 0
    assert doit("release:hub").ran == [], "what is done needs no Hub"
    weights_of = [
        {name: entry["sha256"] for name, entry in facts["payload"].items() if name.endswith(".safetensors")}
        for facts in (
            json.loads((project / "build" / name / "receipts" / "assemble.json").read_text())["facts"]
            for name in ("hub", "local")
        )
    ]
    assert weights_of[0] == weights_of[1]


# ------------------------------------------------------------------------------------------------ killed


def is_done(build: Path, stage: str) -> bool:
    receipt = build / "receipts" / f"{stage}.json"
    return receipt.exists() and bool(json.loads(receipt.read_text())["key"])


def run_and_kill(project: Path, env: dict[str, str], is_time: Callable[[], bool]) -> None:
    """Start a build in a process of its own and kill it, with SIGKILL, when the moment has come."""
    command = [sys.executable, "-m", "doit", "release:tiny"]
    process = subprocess.Popen(command, cwd=project, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not is_time():
        assert process.poll() is None, "the build ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("moment", ["calibrate", "quantize"])
def test_a_build_killed_in_the_middle_goes_on_to_the_same_bytes(
    doit: Run, project: Path, write_release: Callable[..., Path], moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"executor": "processes", "perplexity": None, "files.max_bytes": "1500kB"}
    path = write_release("undisturbed", **{**changes, "executor": "in_process"})
    assert doit("assemble:undisturbed").code == 0
    path.unlink()
    write_release(**changes)
    build = project / "build" / "tiny"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}

    def in_calibrate() -> bool:
        return any((build / "calibration").glob("block-*.json"))  # one worker is done, the other is not

    def in_quantize() -> bool:
        return any((build / "parts").glob("*.journal"))  # a layer is done

    run_and_kill(project, env, in_calibrate if moment == "calibrate" else in_quantize)
    assert is_done(build, "calibrate") == (moment == "quantize")
    assert not is_done(build, "quantize")
    monkeypatch.setenv("EXECUTOR", "in_process")
    resumed = doit("assemble:tiny")
    assert resumed.code == 0
    assert ("calibrate" in resumed.ran) == (moment == "calibrate")
    assert digest_payload(build) == digest_payload(project / "build" / "undisturbed")
    assert not [path for path in build.rglob("*") if path.name.endswith((".tmp", ".partial", ".journal"))]


# ------------------------------------------------------------------------------------------------ mistakes


def edit(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text("utf-8")), "utf-8")


def base_of(path: Path) -> Path:
    return path.parent / "base"


def truncate_weights(path: Path) -> None:
    with (base_of(path) / "model-00002-of-00002.safetensors").open("r+b") as file:
        file.truncate(1_000_000)


def point_index_outside(path: Path) -> None:
    index = base_of(path) / "model.safetensors.index.json"
    edit(index, lambda text: text.replace("model-00002-of-00002.safetensors", "../x.safetensors"))


def write_nan(path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    stored = open_checkpoint(base_of(path), "").tensors[name]
    with (base_of(path) / stored.file).open("r+b") as file:
        file.seek(stored.start)
        file.write(torch.tensor([float("nan")], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())


def make_narrow(path: Path) -> None:
    """A base whose intermediate size is no multiple of 16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=2048, hidden_size=64, intermediate_size=72, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, dtype="bfloat16", tie_word_embeddings=False,
    )  # fmt: skip
    for weights in base_of(path).glob("model*"):
        weights.unlink()
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(base_of(path))


def spoil(name: str) -> tuple[dict[str, Any], Callable[[Path], None]]:
    """Changes to the manifest, and damage to what it names, for each mistake."""
    nothing = lambda path: None  # noqa: E731
    changes: dict[str, tuple[dict[str, Any], Callable[[Path], None]]] = {
        "YAML syntax": ({}, lambda path: edit(path, lambda text: text.replace("title: Tiny", "title: [Tiny"))),
        "unknown key": ({"shard": 2}, nothing),
        "wrong type": ({"calibration.samples": "many"}, nothing),
        "no shards": ({"shards": 0}, nothing),
        "too many shards": ({"shards": 96}, nothing),
        "uneven shards": ({"shards": [3, 2]}, nothing),
        "ignore matches nothing": ({"scheme.ignore": ["lm_head", "re:.*router"]}, nothing),
        "missing folder": ({"base.path": "nowhere"}, nothing),
        "truncated weights": ({}, truncate_weights),
        "NaN": ({}, write_nan),
        "in_features": ({}, make_narrow),
        "empty calibration": ({}, lambda path: (path.parent / "calibration.jsonl").write_text("") and None),
        "few long rows": ({"calibration.tokens": [400, 500], "calibration.samples": 200}, nothing),
        "unknown fix": ({"fixes": ["restore-confg"]}, nothing),
        "unknown executor": ({"executor": "slurm"}, nothing),
        "unknown scheme": ({"scheme.name": "nvfp5"}, nothing),
        "unknown licence": ({"base.licenses": ["mitt"]}, nothing),
        "index outside": ({}, point_index_outside),
        "duplicate key": ({}, lambda path: edit(path, lambda text: text + "shards: 3\n")),
    }
    return changes[name]


MISTAKES = {
    "YAML syntax": """\
not YAML: expected ',' or ']', but got ':' while parsing a flow sequence that begins in line 2
  in releases/tiny.yaml:3:5
  fix: indent with spaces, close quotes and brackets, quote text that has `: ` or ` #`
""",
    "unknown key": """\
unknown key shard
  in releases/tiny.yaml:23:8: shard: 2
  fix: did you mean shards? Valid: base, benchmarks, calibration, card, compatibility, device, evaluation, executor, \
files, fixes, kv_cache, llama_swap, manifest, perplexity, repo, sampling, scheme, serve, shards, title
""",
    "wrong type": """\
calibration.samples must be a whole number, not many
  in releases/tiny.yaml:15:12: calibration.samples: many
  fix: write for example samples: 256
""",
    "no shards": """\
shards must be a count of at least 1, or a list of the layers of each shard, not 0
  in releases/tiny.yaml:22:9: shards: 0
  fix: write for example shards: 2
""",
    "too many shards": """\
96 shards, but the model has 4 layers
  in releases/tiny.yaml:22:9: shards: 96
  fix: use a count from 1 to 4
""",
    "uneven shards": """\
shards of [3, 2] layers make 5, but the model has 4
  in releases/tiny.yaml:22:1: shards: [3, 2]
  fix: give numbers that add up to 4, or a count
""",
    "ignore matches nothing": """\
re:.*router matches no linear of LlamaForCausalLM
  in releases/tiny.yaml:12:5: scheme.ignore[1]: re:.*router
  fix: give a whole name, such as model.layers.3.mlp.down_proj, or a pattern, such as re:.*down_proj
""",
    "missing folder": """\
the base model's folder does not exist: PROJECT/releases/nowhere
  in releases/tiny.yaml:7:9: base.path: nowhere
  fix: give a folder relative to the manifest, or an absolute one
""",
    "truncated weights": """\
model-00002-of-00002.safetensors has 1000000 bytes, but its header needs 3412032
  in PROJECT/releases/base
  fix: the file is truncated or damaged: fetch it again
""",
    "NaN": """\
there is a NaN or an infinity in the weight of model.layers.1.mlp.down_proj
  in model.layers.1.mlp.down_proj
  fix: fetch the base model again, or use a sound one
""",
    "in_features": """\
model.layers.0.mlp.down_proj has 72 input features, which is not a multiple of 16
  in model.layers.0.mlp.down_proj.weight
  fix: add model.layers.0.mlp.down_proj to scheme.ignore
""",
    "empty calibration": """\
the calibration data has no rows
  in releases/tiny.yaml:11:9: calibration.path: calibration.jsonl
  fix: give a data set with text in it
""",
    "few long rows": """\
only 8 of 230 rows have 400 tokens or more, but samples is 200
  in releases/tiny.yaml:15:12: calibration.samples: 200
  fix: set samples to 8 or less, lower tokens[0], or give more rows
""",
    "unknown fix": """\
unknown fix: restore-confg
  in releases/tiny.yaml:24:3: fixes[0]: restore-confg
  fix: did you mean restore-config? Valid: dynamic-input-activations, gather-parts, inject-input-scale, \
keep-calibrator, keep-chat-template, keep-edges-once, keep-generation-config, keep-lm-head-bf16, \
keep-tokenizer-files, renumber-layers, reset-layer-index, restore-config, template-token-ids, template-vocab-size
""",
    "unknown executor": """\
unknown executor: slurm
  in releases/tiny.yaml:22:11: executor: slurm
  fix: use one of in_process, processes, ray
""",
    "unknown scheme": """\
unknown scheme: nvfp5
  in releases/tiny.yaml:9:9: scheme.name: nvfp5
  fix: did you mean nvfp4? Valid: fp8_dynamic, nvfp4, nvfp4a16, w4a16, w8a8
""",
    "unknown licence": """\
unknown licence: mitt
  in releases/tiny.yaml:6:3: base.licenses: [mitt]
  fix: did you mean mit? Valid: apache-2.0, bsd-3-clause, cc-by-4.0, cc-by-nc-4.0, cohere, gemma, llama3, llama3.1, \
llama3.2, llama3.3, mit, mrl, nvidia-open-model, psf-2.0, qwen
""",
    "index outside": """\
PROJECT/releases/base/model.safetensors.index.json names a file outside the folder: ../x.safetensors
  in PROJECT/releases/base
  fix: do not use this base model
""",
    "duplicate key": """\
shards is written twice, in lines 22 and 23
  in releases/tiny.yaml:23:1: shards
  fix: keep one of them
""",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_three_lines_and_leaves_nothing_half_written(
    doit: Run, project: Path, write_release: Callable[..., Path], mistake: str
) -> None:
    changes, damage = spoil(mistake)
    path = write_release(**changes)
    damage(path)
    told = doit("release:tiny")
    assert told.code != 0
    assert told.err.replace(str(project), "PROJECT") == MISTAKES[mistake]
    artifact = project / "build" / "tiny" / "artifact"
    assert not artifact.exists()
    assert not list((project / "build").rglob("*.tmp"))


def test_ray_at_an_address_that_does_not_answer_is_told_soon(
    doit: Run, project: Path, write_release: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_release(executor="ray", **QUICK)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    started = time.monotonic()
    told = doit("release:tiny")
    assert time.monotonic() - started < 30
    assert told.code != 0
    assert (
        told.err
        == """\
no answer from the Ray cluster: [Errno 111] Connection refused
  in RAY_ADDRESS=127.0.0.1:9
  fix: start Ray there with `ray start --head`, or unset RAY_ADDRESS to use this machine alone
"""
    )


def test_a_misspelled_task_gets_the_nearest_name(doit: Run, write_release: Callable[..., Path]) -> None:
    write_release()
    assert (
        doit("release:tyni").err
        == """\
ERROR: there is no task release:tyni
  in the command line
  fix: did you mean release:tiny? Valid: release:tiny
"""
    )
    assert "did you mean release:tiny?" in doit("relase:tiny").err
    assert "did you mean release:tiny?" in doit("tiny").err


def test_what_needs_a_lock_says_so_of_a_release_without_one(doit: Run, write_release: Callable[..., Path]) -> None:
    manifest = write_release()
    manifest.with_name("other.yaml").write_bytes(manifest.read_bytes())
    manifest.with_name("other.lock.json").write_text("{}")
    assert doit("reproduce:tiny").err == (
        "ERROR: tiny has no lock, which reproduce works from\n"
        "  in the command line\n  fix: doit release:tiny writes it\n"
    )


def test_names_that_lead_out_of_the_folder_are_no_tasks(
    doit: Run, project: Path, write_release: Callable[..., Path]
) -> None:
    write_release()
    for name in ("release:../tiny", "release:a/b", "release:.."):
        told = doit(name)
        assert told.code == 3 and f"there is no task {name}" in told.err
    assert not (project / "build").exists()


def test_one_broken_manifest_does_not_keep_another_release_from_building(
    doit: Run, project: Path, write_release: Callable[..., Path]
) -> None:
    write_release("good", **QUICK)
    broken = write_release("broken", shard=2)
    assert doit("release:good").code == 0
    told = doit("release:broken")
    assert told.code != 0 and "unknown key" in told.err
    assert re.search(r"^release:broken +cannot be read: ", doit("list").out, flags=re.M)
    assert "unknown key shard" in doit("plan:broken").err
    broken.rename(broken.with_suffix(".yml"))
    assert "fix: rename it to broken.yaml" in doit("release:broken").err
    assert doit("release:broken", "plan:good").ran == ["plan"], "one that fails does not keep the other from going on"


def test_bare_doit_lists_releases_and_builds_nothing(
    doit: Run, project: Path, write_release: Callable[..., Path]
) -> None:
    write_release()
    told = doit()
    assert told.code == 0
    assert "release:tiny  Tiny Llama — NVFP4" in told.out and "Nothing was built." in told.out
    assert not (project / "build").exists()
    assert not list(project.glob(".doit*"))


NASTY = 'He said "no"; it\'s $(touch pwned) `x` ${HOME} {{ 7*7 }} {% raw %} # not a comment\n---\n| a | <b>&amp;\n'


def test_a_nasty_title_comes_through_every_file_as_text(
    doit: Run, project: Path, write_release: Callable[..., Path]
) -> None:
    serve = {"engine": "vllm", "version": "0.32", "model_path": "/models/with space/$x", "port": 9007}
    write_release(**QUICK, title=NASTY, serve={**serve, "env": {"GREETING": 'a "b" $(c) # d'}})
    told = doit("release:tiny")
    assert told.code == 0, told.err
    artifact = project / "build" / "tiny" / "artifact"
    card = (artifact / "README.md").read_text("utf-8")
    front = card.split("---\n")[1]
    assert yaml.safe_load(front)["library_name"]
    assert "49" not in card.splitlines()[card.splitlines().index("---", 1) + 2], "templates in a title are not run"
    entry = yaml.safe_load((artifact / "llama-swap.yaml").read_text("utf-8"))
    (model,) = entry["models"].values()
    assert 'GREETING=a "b" $(c) # d' in model["env"]
    script = (artifact / "serve.sh").read_text("utf-8")
    fake = project / "bin" / "vllm"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$GREETING" "$@"\n')
    fake.chmod(0o755)
    env = {**os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, cwd=project, check=True)
    assert done.stdout.splitlines()[0] == 'a "b" $(c) # d'
    assert "/models/with space/$x" in done.stdout.splitlines()
    assert not (project / "pwned").exists()


# ------------------------------------------------------------------------------------------------ on request


def test_a_release_is_reproduced_compared_pinned_and_diffed_from_the_command_line(
    doit: Run, project: Path, write_release: Callable[..., Path]
) -> None:
    path = write_release(**QUICK)
    build(path, project / "build" / "tiny", "card", without=("verify", "perplexity"))
    path.unlink()
    artifact = project / "build" / "tiny" / "artifact"
    payload = digest_payload(project / "build" / "tiny")

    told = doit("reproduce:tiny", "--with=build/tiny/artifact")
    assert told.code == 0, told.err
    assert re.search(r"^  tier 1 on .+: all \d+ files are the same, bit for bit$", told.out, flags=re.M)
    assert f"  payload sha256 {payload}, in " in told.out
    assert "  build/tiny/artifact: all " in told.out
    assert digest_payload(project / "build" / "_reproduced" / "tiny") == payload

    told = doit("compare:tiny", "--with", "build/tiny/artifact", "pin:tiny")
    assert (told.code, told.err) == (0, "")
    assert "beside them: README.md, attestations/lock.json, attestations/provenance.json" in told.out
    assert "build/_reproduced/tiny/constraints.txt: its first lines say how to install them" in told.out
    assert "the environment that runs now is the lock's" in told.out
    assert "torch==" in (project / "build" / "_reproduced" / "tiny" / "constraints.txt").read_text()

    told = doit("diff", "tiny", "tiny")
    assert (told.code, told.err) == (0, "")
    (artifact / "NOTICE").write_text("other")
    told = doit("compare:tiny", "--with=build/tiny/artifact")
    assert told.code == 1
    assert told.err.startswith("NOTICE has 5 bytes, and the locked one ")
    told = doit("diff", "tiny", "build/_reproduced/tiny/artifact")
    assert told.out.startswith("tiny -> build/_reproduced")
    assert (told.code, told.err) == (1, ""), "as diff(1) has it"
    told = doit("diff", "tiny", "build/_reproduced/tiny/artifact", "--json")
    assert (told.code, told.err) == (1, "")
    found = json.loads(told.out)
    assert found["sizes"]["changed"].keys() == {"NOTICE"}
    assert json.loads(doit("diff", "--json", "tiny", "build/_reproduced/tiny/artifact").out) == found

    assert "would remove build/tiny/receipts/reproduce.json, build/_reproduced/tiny" in (
        doit("clean", "-n", "reproduce:tiny").out
    )
    assert doit("clean", "reproduce:tiny").code == 0
    assert not list((project / "build" / "_reproduced").iterdir())
    assert artifact.exists()


def test_open_revisions_are_pinned_from_the_command_line(
    doit: Run, project: Path, write_release: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_release(**QUICK, **{"base.path": None, "base.model": "owner/model"})
    with serve_fake_hub(tmp_path, monkeypatch) as fake:
        assert "has no model owner/model, or does not show it to you" in doit("pin:tiny").err
        commit = fake.add("owner/model", {"config.json": b"{}"})
        told = doit("pin:tiny")
        assert (told.code, told.err) == (0, "")
        assert told.out == f"  owner/model: revision {commit}, written into releases/tiny.yaml\n"
        assert f"  model: owner/model\n  revision: {commit}\n" in path.read_text()
    assert doit("pin:tiny").out == "  nothing is open: revisions are pinned, and there is no lock yet\n"
    path.write_text("manifest: 2")
    assert doit("pin:tiny").code == 1


def test_mistakes_in_what_is_requested_are_told(doit: Run, project: Path, write_release: Callable[..., Path]) -> None:
    build(write_release(**QUICK), project / "build" / "tiny", "lock", without=("verify", "perplexity"))
    assert "did you mean reproduce:tiny? Valid: reproduce, reproduce:tiny" in doit("reproduce:tyni").err
    assert doit("compare:tiny").err == (
        "it is not said what to compare with\n"
        "  in the command line: --with\n"
        "  fix: give a folder, or owner/name@ and the 40 hexadecimal digits of the commit\n"
    )
    assert doit("diff", "tiny").err == (
        "diff compares two things, not 1\n"
        "  in the command line\n"
        "  fix: doit diff ONE TWO: releases, folders, locks or owner/name@commit; --json for a program\n"
    )
    told = doit("reproduce:tiny", "--recalibate")
    assert told.code == 3
    assert told.err == (
        "ERROR: no task takes --recalibate\n"
        "  in the command line\n"
        "  fix: did you mean --recalibrate? Valid: --base, --json, --key, --of-base, --prompts, --public-key, "
        "--recalibrate, --single, --size, --url, --with\n"
    )
    assert "fix: write --recalibrate alone" in doit("reproduce:tiny", "--recalibrate=yes").err
    assert doit("benchmark:tiny").err == (
        "tiny does not say how it is served\n"
        "  in releases/tiny.yaml\n"
        "  fix: add serve: to the manifest, or give --url=http://HOST:PORT\n"
    )
    assert "fix: write --single alone" in doit("benchmark:tiny", "--single=yes").err
    assert "tasks take no argument such as recalibrate=" in doit("reproduce:tiny", "recalibrate=1").err
    assert not (project / "build" / "_reproduced").exists()
