"""A server is started, told from others, asked and ended, whatever becomes of it; a stand-in for vLLM plays it."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import build, hear_signals, release_writer, wait_until
from test_endpoint import serve
from test_graph import ROOT

from builder.engine import Engine, Refusal, find_engine, read_artifacts
from builder.errors import BuildError, VerifyError
from builder.manifest import load_manifest
from builder.server import Server, find_port, run_server
from builder.stages import Workspace, run_stage
from builder.stages import card as card_stage
from builder.stages.check_serving import RECEIPT, check_serving, list_results

# What a check asks of vLLM 0.32. STAND_IN is JSON: how it behaves.
PACKAGE = {
    "__init__.py": """
import json, os, time
from types import SimpleNamespace as Made
__version__ = "0.32.0"
behaviour = json.loads(os.environ.get("STAND_IN", "{}"))
def SamplingParams(**options):
    return options
class LLM:
    def __init__(self, folder, **options):
        print("loading", flush=True)
        time.sleep(behaviour.get("loading_s", 0))
        if behaviour.get("killed_at") == folder:
            print("terribly sorry", flush=True)
            os._exit(137)
        if "refusal" in behaviour:
            raise ValueError(behaviour["refusal"] + folder)
        self.llm_engine = Made(engine_core=Made(shutdown=lambda: None))
    def generate(self, prompts, sampling, use_tqdm):
        told = lambda token: {token: Made(logprob=-behaviour["loss"])}
        return [Made(prompt_logprobs=[None, *map(told, p["prompt_token_ids"][1:])]) for p in prompts]
    def apply_model(self, function):
        return [{"Kernel": 16}]
""",
    "platforms.py": """
from types import SimpleNamespace as Made
current_platform = Made(is_cpu=lambda: True, device_type="cpu")
print("vLLM has something to say on its standard output")
""",
    "entrypoints/cli/main.py": """
import json, os, pathlib, shutil, signal, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
from vllm import behaviour
words = sys.argv
option = lambda name: words[words.index(name) + 1]
if words[1] == "bench":
    time.sleep(behaviour.get("bench_s", 0))
    if "bench_exit" in behaviour:
        sys.exit(behaviour["bench_exit"])
    shutil.copy(behaviour["bench"], option("--result-dir") + "/" + option("--result-filename"))
    sys.exit(0)
print("serving", flush=True)
if "exit" in behaviour:
    sys.exit(behaviour["exit"])
time.sleep(behaviour.get("start_s", 0))
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "helper of the server"])
pathlib.Path(os.environ["TMPDIR"], "socket").touch()
class Handler(BaseHTTPRequestHandler):
    def reply(self, value):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())
    def do_GET(self):
        named = {"id": option("--served-model-name"), "root": words[2], "max_model_len": 512}
        self.reply({"data": [named]} if self.path == "/v1/models" else {})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if behaviour.get("stopped"):
            os.kill(os.getpid(), signal.SIGSTOP)
        told = {"tokens": ["a", "b"], "token_logprobs": [-1, -1]}
        choice = {"text": " a b", "finish_reason": "length", "logprobs": told}
        if asked.get("echo"):
            loss = behaviour.get("served_loss", behaviour["loss"])
            choice["prompt_logprobs"] = [None, *({str(t): {"logprob": loss and -loss}} for t in asked["prompt"][1:])]
        if "messages" in asked:
            content = [{"token": token, "logprob": -1} for token in "ab"]
            choice = {**choice, "message": {"content": "a b"}, "logprobs": {"content": content}}
        kind = "echo" if asked.get("echo") else "chat" if "messages" in asked else "completion"
        self.reply({"choices": [{**choice, **behaviour.get(kind, {})}]})
    def log_message(self, *arguments):
        pass
HTTPServer(("127.0.0.1", int(option("--port"))), Handler).serve_forever()
""",
    "../torch.py": "",  # vLLM's; importing ours takes seconds
    "entrypoints/__init__.py": "",
    "entrypoints/cli/__init__.py": "",
}
RESULT = str(Path(__file__).parent / "results" / "vllm-bench-serve-0.32.json")
Behave = Callable[..., None]


@pytest.fixture
def behave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Behave:
    """Sets how the stand-in behaves; it is the vLLM that is found."""
    folder, python = tmp_path / "a vllm", tmp_path / "a vllm" / "python"  # a path with a space in it
    for name, text in PACKAGE.items():
        (folder / "vllm" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "vllm" / name).write_text(text, "utf-8")
    python.write_text(f'#!/bin/sh\nPYTHONPATH=\'{folder}\':"$PYTHONPATH" exec {sys.executable} "$@"\n', "utf-8")
    python.chmod(0o755)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("SERVING_PYTHON", str(python))

    def set_behaviour(**changes: Any) -> None:
        monkeypatch.setenv("STAND_IN", json.dumps({"loss": 3.0, "bench": RESULT, **changes}))

    set_behaviour()
    return set_behaviour


@pytest.fixture
def engine(tmp_path: Path, behave: Behave) -> Engine:
    return Engine(python=tmp_path / "a vllm" / "python", version="0.32.0", platform="cpu", devices=())


@contextmanager
def start(engine: Engine, tmp_path: Path, port: int | None = None, timeout_s: float = 60) -> Iterator[Server]:
    port = port or find_port()
    words = ("serve", "/models/a", "--served-model-name", "a b", "--port", str(port))
    log = tmp_path / "server.log"
    with run_server(engine, words, port=port, served_name="a b", variables={}, timeout_s=timeout_s, log=log) as server:
        yield server


def list_running(tmp_path: Path) -> list[str]:
    """The commands of processes that have the test's temporary folder in their environment, without our own."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if int(path.parent.name) != os.getpid() and os.fsencode(tmp_path / "tmp") in path.read_bytes():
                found.append(path.with_name("cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # it has just ended
            continue
    return found


def nothing_is_left(tmp_path: Path) -> bool:
    return not list_running(tmp_path) and not list((tmp_path / "tmp").iterdir())


# --- started, told from others, and ended -----------------------------------------------------------------------------


def test_a_server_is_ready_asked_and_ended_with_all_that_it_started(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # where nobody answers
    with start(engine, tmp_path) as server:
        assert server.context == 512
        assert server.ask("/v1/completions", {"prompt": "a"})["choices"][0]["text"] == " a b"
        assert any("helper of the server" in words for words in list_running(tmp_path))
        [scratch] = (tmp_path / "tmp").iterdir()
        assert (scratch / "socket").exists()
    assert nothing_is_left(tmp_path)


@pytest.mark.parametrize(
    "models", [{"data": [{"id": "a b", "root": "/models/b", "max_model_len": 9}]}, {"data": []}, [1]]
)
def test_another_server_at_the_port_is_not_taken_for_ours(
    engine: Engine, behave: Behave, tmp_path: Path, models: Any
) -> None:
    behave(start_s=600)
    with serve(json.dumps(models)) as url:
        port = int(url.rpartition(":")[2])
        with pytest.raises(BuildError) as caught, start(engine, tmp_path, port):
            raise AssertionError
    assert not isinstance(caught.value, VerifyError)  # the artifact is not to blame
    assert caught.value.what == f"another server answers at {url}, without a"
    assert nothing_is_left(tmp_path)


NO_SERVER = """
import socket
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
while True:
    taken, _ = listener.accept()
    taken.recv(999)
    taken.sendall(b"SSH-2.0\\r\\n")
    taken.close()
"""


def test_what_speaks_no_http_is_waited_for_no_longer_than_ours(engine: Engine, behave: Behave, tmp_path: Path) -> None:
    behave(start_s=600)
    with subprocess.Popen([sys.executable, "-c", NO_SERVER], stdout=subprocess.PIPE, env={}) as other:
        try:
            assert other.stdout
            port = int(other.stdout.readline())
            with pytest.raises(VerifyError) as caught, start(engine, tmp_path, port, timeout_s=1):
                raise AssertionError
        finally:
            other.kill()
    assert caught.value.what == "the server was not ready within 1 s"
    assert nothing_is_left(tmp_path)


def test_a_server_that_ends_by_itself_is_told_in_its_last_words(engine: Engine, behave: Behave, tmp_path: Path) -> None:
    behave(exit="the port is not mine")
    with pytest.raises(VerifyError) as caught, start(engine, tmp_path):
        raise AssertionError
    assert caught.value.what == "the server ended with exit code 1: the port is not mine"
    assert nothing_is_left(tmp_path)


def test_a_server_that_hangs_is_waited_for_and_ended(
    engine: Engine, behave: Behave, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    behave(stopped=True)
    monkeypatch.setattr("builder.server.ANSWER_S", 0.5)
    began = time.monotonic()
    with pytest.raises(VerifyError) as caught, start(engine, tmp_path) as server:
        server.ask("/v1/completions", {})
    assert caught.value.what == "the server did not answer: timed out"
    assert time.monotonic() - began < 25  # it was not waited for until it had to be killed
    assert nothing_is_left(tmp_path)


# --- loaded -----------------------------------------------------------------------------------------------------------


def test_an_engine_that_talks_is_described(behave: Behave, engine: Engine) -> None:
    assert find_engine() == engine


def test_losses_and_refusals_come_back_from_the_engines_process(engine: Engine, behave: Behave, tmp_path: Path) -> None:
    [found] = read_artifacts(engine, [tmp_path / "x"], [[1, 2, 3], [4, 5]], tmp_path / "log")
    assert not isinstance(found, Refusal)
    assert found.losses == [[3.0, 3.0], [3.0]]
    behave(refusal="no such thing: ")
    [refused] = read_artifacts(engine, [tmp_path / "x"], [], tmp_path / "log")
    assert refused == Refusal(error=f"ValueError: no such thing: {tmp_path / 'x'}")
    assert nothing_is_left(tmp_path)


def test_an_engine_that_dies_is_told_with_the_artifact_that_it_had(
    engine: Engine, behave: Behave, tmp_path: Path
) -> None:
    behave(killed_at=str(tmp_path / "second"))
    folders = [tmp_path / "first", tmp_path / "second", tmp_path / "third"]
    with pytest.raises(BuildError) as caught:
        read_artifacts(engine, folders, [], tmp_path / "log")
    assert caught.value.what == "vLLM ended with exit code 137 while it had second: terribly sorry"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_reader_that_is_interrupted_leaves_neither_processes_nor_files(
    engine: Engine, behave: Behave, tmp_path: Path, number: int
) -> None:
    behave(loading_s=600)
    read = "import sys; from pathlib import Path; from builder.engine import find_engine, read_artifacts; " + (
        "read_artifacts(find_engine(), [Path('x')], [], Path(sys.argv[1]))"
    )
    log = tmp_path / "log"
    with subprocess.Popen(
        [sys.executable, "-c", read, str(log)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
        preexec_fn=hear_signals,
    ) as reader:
        wait_until(lambda: log.exists() and "loading" in log.read_text())
        reader.send_signal(number)
    wait_until(lambda: nothing_is_left(tmp_path))


# --- a whole check ----------------------------------------------------------------------------------------------------

SAMPLING = {"temperature": 0.7, "max_tokens": 48}
PROFILE = {"version": "0.32", "model_path": "/models/tiny", "args": {"max-num-seqs": "4"}}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("built")
    changes = {"scheme.name": "fp8_dynamic", "calibration": None, "shards": 1, "serve": PROFILE, "sampling": SAMPLING}
    manifest = release_writer(folder / "releases")(**changes)
    text = manifest.with_name("heldout.txt")
    text.write_text(text.read_text("utf-8")[:3000], "utf-8")  # two windows
    return build(manifest, folder / "build", "card")


@pytest.fixture
def release(built: Workspace, behave: Behave) -> Iterator[tuple[Workspace, Behave]]:
    """A built release, and a vLLM that reads it as transformers does unless it is told to do otherwise."""
    loss = math.log(built.facts("perplexity")["artifact"])
    behave(loss=loss)
    yield built, lambda **changes: behave(**{"loss": loss, **changes})
    built.receipt_path(RECEIPT).unlink(missing_ok=True)


def show_row(workspace: Workspace) -> str:
    run_stage(workspace, card_stage.STAGE)
    lines = (workspace.artifact / "README.md").read_text("utf-8").splitlines()
    return next(line for line in lines if line.startswith("| Served by vLLM"))


def test_a_check_is_about_the_payload_and_what_the_manifest_asks_of_the_server(
    release: tuple[Workspace, Behave], write_release: Callable[..., Path], tmp_path: Path
) -> None:
    workspace, _ = release
    result = check_serving(workspace, lambda line: None)
    assert (result["verdict"], list_results(workspace)) == ("good", [result])
    assert show_row(workspace) == "| Served by vLLM 0.32.0 on a CPU | loads, reads and serves it |"
    text = workspace.manifest.path.read_text("utf-8")
    for before, after in (("max-num-seqs: '4'", "max-num-seqs: '8'"), ("temperature: 0.7", "temperature: 1.7")):
        other = workspace.manifest.path.with_name("other.yaml")
        other.write_text(text.replace(before, after), "utf-8")
        assert list_results(Workspace(load_manifest(other), workspace.folder)) == []
    other.write_text(text.replace("port: 8000", "port: 9000"), "utf-8")
    assert list_results(Workspace(load_manifest(other), workspace.folder)) == [result]
    assert nothing_is_left(tmp_path)


CIRCLE = {"tokens": ["!"] * 32, "token_logprobs": [-1] * 32}
SAID = [
    ({"loss": 9.0}, "times the base's"),
    ({"loss": 1.0}, "more than 1% apart"),
    ({"served_loss": 1.0}, "more than 5% apart"),
    ({"served_loss": None}, "the server reads a perplexity of nan"),
    ({"echo": {"prompt_logprobs": None}}, "the server's reply lacks what was asked for: TypeError"),
    ({"echo": {"prompt_logprobs": [None, {}]}}, "the server's reply lacks what was asked for"),
    ({"chat": {"message": None}}, "the server's reply lacks what was asked for: AttributeError"),
    ({"chat": {"message": {"content": None}}}, "the answer to a chat request is empty"),
    ({"completion": {"logprobs": None}}, "a completion request came without the likelihoods of its tokens"),
    ({"completion": {"logprobs": CIRCLE}}, "a completion request repeats '!': 32 of 32 tokens"),
    ({"bench_exit": "no"}, "vllm bench serve failed with exit code 1"),
    ({"bench": os.devnull}, "benchmark.json is not JSON"),
    ({"bench_s": 600}, "vllm bench serve took longer than 1 s"),
    ({"exit": "out of memory"}, "the server ended with exit code 1: out of memory"),
    ({"refusal": "lacks a scale: "}, "vLLM does not load it: ValueError: lacks a scale: artifact"),
]


@pytest.mark.parametrize(("behaviour", "said"), SAID)
def test_what_is_wrong_is_told_written_down_and_on_the_card(
    release: tuple[Workspace, Behave],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    behaviour: dict[str, Any],
    said: str,
) -> None:
    workspace, behave = release
    if "bench_s" in behaviour:
        monkeypatch.setattr("builder.stages.check_serving.BENCHMARK_S", 1)
    behave(**behaviour)
    with pytest.raises(BuildError, match=r"(?s)."):
        check_serving(workspace, lambda line: None)
    [result] = list_results(workspace)
    assert result["verdict"] == "failed"
    assert any(said in problem for problem in result["problems"]), result["problems"]
    assert str(tmp_path) not in json.dumps(result) and str(workspace.folder) not in json.dumps(result)
    assert show_row(workspace) == "| Served by vLLM 0.32.0 on a CPU | failed |"
    assert nothing_is_left(tmp_path)


def test_thoughts_that_the_server_takes_out_are_part_of_an_answer(release: tuple[Workspace, Behave]) -> None:
    workspace, behave = release
    behave(chat={"message": {"content": None, "reasoning": "Let me see"}})
    answers = check_serving(workspace, lambda line: None)["served"]["answers"]
    assert answers[0]["text"] == "Let me see"


def test_a_release_of_which_a_step_is_missing_is_not_checked(release: tuple[Workspace, Behave]) -> None:
    workspace, _ = release
    other = workspace.manifest.path.with_name("other.yaml")
    other.write_text(workspace.manifest.path.read_text("utf-8").replace("heldout.txt", "calibration.jsonl"), "utf-8")
    with pytest.raises(BuildError) as caught:
        check_serving(Workspace(load_manifest(other), workspace.folder), lambda line: None)
    assert str(caught.value) == (
        "other is not built: perplexity has not been done, or what it reads has changed since\n"
        f"  in {workspace.folder}\n"
        "  fix: doit release:other"
    )


def test_a_command_that_is_interrupted_ends_the_server_and_takes_its_files_away(
    release: tuple[Workspace, Behave], tmp_path: Path
) -> None:
    workspace, behave = release
    behave(bench_s=600)
    project = tmp_path / "project"
    project.mkdir()
    (project / "releases").symlink_to(workspace.manifest.path.parent)
    (project / "build").mkdir()
    (project / "build" / "tiny").symlink_to(workspace.folder)
    (project / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    with subprocess.Popen(
        [sys.executable, "-m", "doit", "check-serving:tiny"],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=hear_signals,
    ) as doit:
        wait_until(lambda: doit.poll() is not None or any(" bench serve " in line for line in list_running(tmp_path)))
        doit.send_signal(signal.SIGINT)
        assert doit.stdout
        assert "interrupted; what is done is kept" in doit.stdout.read()
    wait_until(lambda: nothing_is_left(tmp_path))
