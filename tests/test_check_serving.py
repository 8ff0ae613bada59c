"""What a real vLLM makes of every scheme, of damaged artifacts, and of a release's serve profile.

These tests need vLLM in an environment of its own: `make serving-env`, then `make test-serving`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build, release_writer, wait_until
from safetensors.torch import load_file, save_file

from builder.answers import find_degeneration, read_chat
from builder.engine import Engine, Reading, Refusal, find_engine, make_environment, read_artifacts, tether
from builder.errors import BuildError
from builder.perplexity import measure_perplexity, open_artifact, open_base, split_text
from builder.server import Server, find_port
from builder.stages import Workspace, run_stage
from builder.stages import card as card_stage
from builder.stages.check_serving import RECEIPT, TOLERANCE, check_serving, judge_reading, list_results
from builder.stages.perplexity import read_layout
from builder.stages.verify import describe_expected
from builder.verify import verify_artifact

pytestmark = pytest.mark.serving

NUM_WINDOWS = 2
DATA_FREE: dict[str, Any] = {"calibration": None, "shards": 1}
MIXED = [{"name": "fp8_dynamic", "match": "re:.*down_proj"}, {"name": "nvfp4"}]
RELEASES: dict[str, dict[str, Any]] = {
    "nvfp4": {},
    "nvfp4-modelopt": {"scheme.layout": "modelopt"},
    "nvfp4a16": {"scheme.name": "nvfp4a16", **DATA_FREE},
    "fp8_dynamic": {"scheme.name": "fp8_dynamic", **DATA_FREE},
    "w8a8": {"scheme.name": "w8a8", **DATA_FREE},
    "w4a16": {"scheme.name": "w4a16", **DATA_FREE},
    "mixed": {"scheme": MIXED},
    "fp8_dynamic-kv": {"scheme.name": "fp8_dynamic", "kv_cache": "fp8"},
    "nvfp4-modelopt-kv": {"scheme.layout": "modelopt", "kv_cache": "fp8"},
}
PROFILE = {
    "version": "0.32",
    "model_path": "/models/tiny",
    "args": {"max-model-len": "512", "max-num-seqs": "4", "kv-cache-dtype": "fp8", "gpu-memory-utilization": "0.8"},
}


@pytest.fixture(scope="session")
def engine() -> Engine:
    try:
        return find_engine()
    except BuildError as error:
        pytest.skip(f"{error.what}: {error.fix}")


@pytest.fixture(scope="session")
def releases(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Workspace]:
    """A small release of every scheme."""
    folder = tmp_path_factory.mktemp("schemes")
    write = release_writer(folder / "releases")
    return {name: build(write(name, **changes), folder / "build" / name) for name, changes in RELEASES.items()}


@pytest.fixture(scope="session")
def windows(releases: dict[str, Workspace]) -> list[list[int]]:
    base = releases["nvfp4"].base_folder()
    return split_text(base.parent / "heldout.txt", base, 512, "the test").windows[:NUM_WINDOWS]


@pytest.fixture(scope="session")
def of_base(releases: dict[str, Workspace], windows: list[list[int]]) -> float:
    return measure_perplexity(open_base(releases["nvfp4"].base_folder()), windows)


def read_with_transformers(workspace: Workspace, windows: list[list[int]]) -> float:
    return measure_perplexity(open_artifact(workspace.artifact, read_layout(workspace)), windows)


def test_vllm_reads_every_scheme_as_transformers_does_and_the_base_no_better(
    engine: Engine, releases: dict[str, Workspace], windows: list[list[int]], of_base: float, tmp_path: Path
) -> None:
    folders = [releases["nvfp4"].base_folder(), *(workspace.artifact for workspace in releases.values())]
    base, *found = read_artifacts(engine, folders, windows, tmp_path / "log")
    assert isinstance(base, Reading)
    assert base.perplexity == pytest.approx(of_base, rel=TOLERANCE)
    for (name, workspace), reading in zip(releases.items(), found, strict=True):
        assert isinstance(reading, Reading), (name, reading)
        expected = {"artifact": read_with_transformers(workspace, windows), "base": of_base}
        assert judge_reading(reading, expected, workspace.artifact) == [], name
        quantized = [kernel for kernel in reading.kernels if not kernel.startswith("Unquantized")]
        assert sum(reading.kernels[kernel] for kernel in quantized) == 16, name  # of 4 layers: qkv, o, gate_up, down


# --- silent defects ---------------------------------------------------------------------------------------------------

Tensors = dict[str, torch.Tensor]
Damage = Callable[[Tensors], None]


def drop(name: str) -> Damage:
    def damage(tensors: Tensors) -> None:
        tensors.pop(name, None)

    return damage


def invert(suffix: str) -> Damage:
    def damage(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith(suffix):
                tensors[name] = 1 / tensors[name]

    return damage


def scale(suffix: str, factor: float) -> Damage:
    def damage(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith(suffix):
                tensors[name] *= factor

    return damage


def inject(suffix: str) -> Damage:
    def damage(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith(suffix):
                tensors[name].fill_(1)

    return damage


FIRST = "model.layers.0.self_attn"
# release, damage, what `verify` finds it by, how `check-serving` shows it: the README's table has the same rows
DEFECTS: dict[str, tuple[str, Damage, str, str]] = {
    "an activation scale is missing": ("nvfp4", drop(f"{FIRST}.o_proj.input_global_scale"), "plan", "not loaded"),
    "an activation scale is missing (modelopt)": (
        "nvfp4-modelopt",
        drop(f"{FIRST}.o_proj.input_scale"),
        "plan",
        "not loaded",
    ),
    "an FP8 weight scale is missing": ("fp8_dynamic", drop(f"{FIRST}.o_proj.weight_scale"), "plan", "not loaded"),
    "packed weights are missing": ("nvfp4", drop(f"{FIRST}.o_proj.weight_packed"), "plan", "not loaded"),
    "activation scales are reciprocals": ("nvfp4", invert("input_global_scale"), "input scales", "perplexity"),
    "weight scales are reciprocals": ("nvfp4", invert("weight_global_scale"), "global scales", "perplexity"),
    "fused weights differ in their scale": (
        "nvfp4",
        scale("k_proj.weight_global_scale", 16),
        "fused",
        "perplexity",
    ),
    "activation scales are 1, injected": ("nvfp4", inject("input_global_scale"), "input scales", "nothing"),
}


def damage_copy(artifact: Path, copy: Path, damage: Damage) -> Path:
    """A copy of an artifact whose tensors were changed, its index kept in step."""
    shutil.copytree(artifact, copy)
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    for file in sorted(set(index["weight_map"].values())):
        tensors = load_file(copy / file)
        names = set(tensors)
        damage(tensors)
        for gone in names - tensors.keys():
            del index["weight_map"][gone]
        save_file(tensors, copy / file, {"format": "pt"})
        (copy / file).chmod(0o644)
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    return copy


def test_every_silent_defect_is_caught_by_verify_or_by_vllm(
    engine: Engine, releases: dict[str, Workspace], windows: list[list[int]], of_base: float, tmp_path: Path
) -> None:
    copies = {
        name: damage_copy(releases[release].artifact, tmp_path / str(number), damage)
        for number, (name, (release, damage, _, _)) in enumerate(DEFECTS.items())
    }
    read = dict(zip(copies, read_artifacts(engine, list(copies.values()), windows, tmp_path / "log"), strict=True))
    table = {}
    for name, (release, _, _, _) in DEFECTS.items():
        workspace = releases[release]
        expected = describe_expected(workspace)
        del expected["payload"], expected["beside"]  # as if the builder itself had made it so
        report = verify_artifact(copies[name], workspace.base_folder(), expected, sample=0, whole_model=False)
        sound = {"artifact": read_with_transformers(workspace, windows), "base": of_base}
        problems = judge_reading(read[name], sound, copies[name])
        shown = "nothing" if not problems else "not loaded" if isinstance(read[name], Refusal) else "perplexity"
        table[name] = ({finding.check for finding in report.errors}, shown)
    for name, (_, _, check, shown) in DEFECTS.items():
        assert check in table[name][0], (name, table[name], check)
        assert table[name][1] == shown, (name, table[name], read[name])
    readme = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    for name, (_, _, check, shown) in DEFECTS.items():
        assert f"| {name} | {check} | {shown} |" in readme


# --- a server ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    return release_writer(tmp_path / "releases")


@pytest.fixture
def leftovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[str]]]:
    """What is left of servers that the test started: temporary folders, and processes, known by where they work."""
    folder = Path(tempfile.mkdtemp())  # of a short path, for sockets are made in it
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.chdir(tmp_path)

    def find() -> list[str]:
        return [path.name for path in folder.iterdir()] + [words for pid, words in list_commands(tmp_path)]

    yield find
    shutil.rmtree(folder)


def list_commands(folder: Path) -> Iterator[tuple[int, str]]:
    """The other processes that work in a folder."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink() == folder and int(process.name) != os.getpid():
                yield (
                    int(process.name),
                    (process / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"),
                )
        except OSError:  # it has just ended
            continue


def test_a_release_is_loaded_read_served_and_measured_and_its_card_says_so(
    engine: Engine, write: Callable[..., Path], leftovers: Callable[[], list[str]], tmp_path: Path
) -> None:
    sampling = {"temperature": 0.7, "top_p": 0.9, "max_tokens": 48}
    workspace = build(write(serve=PROFILE, sampling=sampling, **RELEASES["fp8_dynamic"]), tmp_path / "build", "card")
    assert "Served by vLLM | not checked" in (workspace.artifact / "README.md").read_text()
    told = list[str]()
    result = check_serving(workspace, told.append)
    assert leftovers() == []
    assert result["verdict"] == "good" and result["problems"] == []
    assert result["perplexity"]["vllm"] == pytest.approx(result["perplexity"]["transformers"], rel=TOLERANCE)
    served = result["served"]
    assert [answer["kind"] for answer in served["answers"]] == ["chat", "completion"]
    assert all(0 < answer["num_tokens"] <= 48 for answer in served["answers"])
    assert served["speed"]["ttft_ms"] > 0 and served["speed"]["tokens_per_s"] > 0
    assert served["words"][:3] == ["vllm", "serve", "artifact"]
    assert served["words"][served["words"].index("--max-model-len") + 1] == "512"
    assert any("gpu-memory-utilization" in line for line in served["adapted"])
    assert list_results(workspace) == [result]
    run_stage(workspace, card_stage.STAGE)
    card = (workspace.artifact / "README.md").read_text()
    assert f"| Served by vLLM {engine.version} on a CPU | loads, reads and serves it |" in card
    assert "No GPU kernel was exercised" in card
    assert f"{result['perplexity']['vllm']:.3f}" in card
    assert str(tmp_path) not in card
    attested = json.loads((workspace.artifact / "attestations" / "serving.json").read_text())
    assert attested["engines"] == [result]


def test_a_profile_that_vllm_refuses_is_told_recorded_and_leaves_nothing_behind(
    engine: Engine, write: Callable[..., Path], leftovers: Callable[[], list[str]], tmp_path: Path
) -> None:
    profile = {**PROFILE, "args": {"max-num-seqs": "4", "chat-template": "/nowhere/template.jinja"}}
    path = write(serve=profile, perplexity=None, **RELEASES["fp8_dynamic"])
    workspace = build(path, tmp_path / "build", "card")
    with pytest.raises(BuildError, match="the server ended with exit code 1"):
        check_serving(workspace, lambda line: None)
    assert leftovers() == []
    [result] = list_results(workspace)
    assert result["verdict"] == "failed" and "the server ended" in result["problems"][0]
    run_stage(workspace, card_stage.STAGE)
    assert f"| Served by vLLM {engine.version} on a CPU | failed |" in (workspace.artifact / "README.md").read_text()


def test_a_builder_that_is_killed_takes_its_server_with_it(
    engine: Engine, write: Callable[..., Path], leftovers: Callable[[], list[str]], tmp_path: Path
) -> None:
    path = write(serve=PROFILE, perplexity=None, **RELEASES["fp8_dynamic"])
    workspace = build(path, tmp_path / "build", "perplexity")
    check = "import sys; from pathlib import Path; from builder.manifest import load_manifest; " + (
        "from builder.stages import Workspace; from builder.stages.check_serving import check_serving; "
        "check_serving(Workspace(load_manifest(Path(sys.argv[1])), Path(sys.argv[2])))"
    )
    log = workspace.folder / RECEIPT / "server.log"
    environment = {**os.environ, "SERVING_PYTHON": str(engine.python)}
    command = [sys.executable, "-c", check, str(path), str(workspace.folder)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as builder:
        wait_until(
            lambda: builder.poll() is not None or (log.exists() and "Starting to load model" in log.read_text()), 180
        )
        assert builder.poll() is None
        builder.send_signal(signal.SIGKILL)
    wait_until(lambda: leftovers() == [], 180)


def test_llama_swap_starts_our_entry_and_passes_a_chat_on(
    engine: Engine, write: Callable[..., Path], leftovers: Callable[[], list[str]], tmp_path: Path
) -> None:
    if not (program := shutil.which("llama-swap")):
        pytest.skip("llama-swap is not on this machine: its entry is proven by schema and loader rules alone")
    port, front = find_port(), find_port()
    args = {"max-model-len": "512", "max-num-seqs": "4", "enforce-eager": True}
    profile = {**PROFILE, "model_path": str(tmp_path / "build" / "artifact"), "port": port, "args": args}
    profile["python"] = str(engine.python)
    workspace = build(write(serve=profile, perplexity=None, **RELEASES["fp8_dynamic"]), tmp_path / "build", "card")
    words = ["--config", str(workspace.artifact / "llama-swap.yaml")]
    command = tether(engine, program, *words, "--listen", f"127.0.0.1:{front}")
    del command[2]  # llama-swap is a program of its own
    with subprocess.Popen(command, env=make_environment()) as proxy:
        server = Server(
            address=f"http://127.0.0.1:{front}", served_name="tiny-llama-NVFP4", context=512, seconds=0, log=tmp_path
        )
        try:
            wait_until(lambda: answers(f"{server.address}/v1/models"), 180)
            body = {"messages": [{"role": "user", "content": "What is a list?"}], "max_tokens": 16, "logprobs": True}
            assert find_degeneration(read_chat("", server.ask("/v1/chat/completions", body))) is None
        finally:
            proxy.terminate()
    assert leftovers() == []


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def test_losses_that_are_no_numbers_are_no_perplexity() -> None:
    reading = Reading(losses=[[1.0, math.nan]], kernels={}, seconds=1, peak_bytes=1)
    [problem, other] = judge_reading(reading, {"artifact": 3.0, "base": 3.0}, Path("artifact"))
    assert problem.what == "vLLM reads a perplexity of nan, transformers 3.000: more than 1% apart"
    assert other.what == "vLLM reads a perplexity of nan, more than 1.25 times the base's 3.000"
