"""A served endpoint is measured with vLLM's own benchmark, and everything that keeps it from being so is told."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from builder.endpoint import ask_models, bench_command, run_vllm_bench
from builder.errors import BuildError
from builder.manifest import load_manifest
from builder.stages import Workspace
from builder.stages.benchmark import benchmark

RESULT = Path(__file__).parent / "results" / "vllm-bench-serve-0.32.json"


@contextmanager
def serve(answer: str, code: int = 200) -> Iterator[str]:
    """A server that answers every request so. Gives its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(answer.encode())

        def log_message(self, *arguments: object) -> None:
            """Says nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def models(*names: str) -> str:
    return json.dumps({"object": "list", "data": [{"id": name} for name in names]})


@pytest.fixture
def python(tmp_path: Path) -> Callable[[str], str]:
    """Writes a stand-in for a Python that has vLLM: the program it runs in place of the benchmark."""

    def write(program: str) -> str:
        script, path = tmp_path / "program.py", tmp_path / "python"
        script.write_text(f"import shutil, sys\n{program}\n", "utf-8")
        path.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n', "utf-8")
        path.chmod(0o755)
        return str(path)

    return write


KEEP = f"""
options = dict(zip(sys.argv, sys.argv[1:]))
shutil.copy({str(RESULT)!r}, options["--result-dir"] + "/" + options["--result-filename"])
print("its words:", *sys.argv[1:])
"""


def run(python: str, url: str, file: Path, model: str = "") -> None:
    run_vllm_bench(python, url, (64, 16), tokenizer="t", num_prompts=4, single=False, file=file, model=model)


def test_the_benchmark_is_asked_for_one_size_and_for_all_that_the_card_shows(tmp_path: Path) -> None:
    words = bench_command("p", "http://h:1", "m", "t", (256, 128), num_prompts=9, single=True, file=tmp_path / "f.json")
    options = {word: words[place + 1] for place, word in enumerate(words[:-1]) if word.startswith("--")}
    assert words[:5] == ("p", "-m", "vllm.entrypoints.cli.main", "bench", "serve")
    assert (options["--random-input-len"], options["--random-output-len"], options["--num-prompts"]) == (
        "256",
        "128",
        "9",
    )
    assert (options["--base-url"], options["--model"], options["--tokenizer"]) == ("http://h:1", "m", "t")
    assert options["--percentile-metrics"] == "ttft,tpot,itl,e2el" and options["--max-concurrency"] == "1"
    assert words[-3:] == ("--metadata", "prompt_tokens=256", "output_tokens=128")
    many = bench_command("p", "http://h:1", "m", "t", (256, 128), num_prompts=9, single=False, file=tmp_path / "f.json")
    assert "--max-concurrency" not in many


def test_what_the_benchmark_leaves_is_read(tmp_path: Path, python: Callable[[str], str]) -> None:
    with serve(models("one")) as url:
        file = tmp_path / "new" / "result.json"
        load = run_vllm_bench(python(KEEP), url, (64, 16), tokenizer="t", num_prompts=4, single=False, file=file)
        assert ask_models(url) == ask_models(f"{url}/") == ("one",)
    assert (load.num_requests, load.first_token_ms, load.output_tokens_per_s) == (
        16,
        66.40417149992572,
        174.37406552615772,
    )
    assert file.read_bytes() == RESULT.read_bytes()


def test_a_server_that_does_not_answer_is_told(tmp_path: Path) -> None:
    with serve("") as url:
        gone = url
    with pytest.raises(BuildError) as caught:
        run("python", gone, tmp_path / "f.json")
    assert str(caught.value) == (
        f"nothing answers at {gone}: [Errno 111] Connection refused\n"
        f"  in {gone}/v1/models\n"
        "  fix: start the server (`serve.sh`), wait until it has loaded the weights, and give its address with --url"
    )


@pytest.mark.parametrize(
    ("answer", "code", "what"),
    [
        ("gone", 503, "{url}/v1/models answers 503 Service Unavailable"),
        ("{}", 200, "{url}/v1/models does not answer as OpenAI's API does"),
        ("<html>", 200, "nothing answers at {url}: Expecting value: line 1 column 1 (char 0)"),
    ],
)
def test_a_server_that_is_none_of_models_is_told(answer: str, code: int, what: str) -> None:
    with serve(answer, code) as url, pytest.raises(BuildError) as caught:
        ask_models(url)
    assert caught.value.what == what.format(url=url)


def test_the_model_is_the_one_that_is_named_or_the_only_one(tmp_path: Path) -> None:
    with serve(models("one", "two")) as url:
        with pytest.raises(BuildError, match="the server has 2 models: one, two"):
            run("python", url, tmp_path / "f.json")
        with pytest.raises(BuildError) as caught:
            run("python", url, tmp_path / "f.json", model="three")
    assert caught.value.what == "the server has no model three"
    assert caught.value.fix == "ask for one or two, or set serve.served_name"


def test_a_benchmark_that_fails_is_told_with_what_it_said_last(tmp_path: Path, python: Callable[[str], str]) -> None:
    file = tmp_path / "f.json"
    file.write_text("old", "utf-8")
    with serve(models("one")) as url, pytest.raises(BuildError) as caught:
        run(python('print("working"); sys.exit("out of memory")'), url, file)
    assert caught.value.what == "vllm bench serve failed with exit code 1"
    assert caught.value.fix.splitlines()[0] == "see what it said last"
    assert {line.strip() for line in caught.value.fix.splitlines()[1:]} == {"| working", "| out of memory"}
    assert not file.exists()  # an old result is not taken for a new one


def test_a_benchmark_without_a_result_and_a_python_that_is_not_there_are_told(
    tmp_path: Path, python: Callable[[str], str]
) -> None:
    with serve(models("one")) as url:
        with pytest.raises(BuildError, match="vllm bench serve left no result"):
            run(python("pass"), url, tmp_path / "f.json")
        with pytest.raises(BuildError) as caught:
            run(str(tmp_path / "gone"), url, tmp_path / "f.json")
    assert str(caught.value).splitlines()[0].endswith("gone cannot be started: No such file or directory")
    assert "SERVING_PYTHON" in caught.value.fix


# --- the task ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def workspace(write_release: Callable[..., Path], tmp_path: Path) -> Workspace:
    serve_profile = {"version": "0.32", "model_path": "/models/tiny", "port": 1, "served_name": "tiny"}
    return Workspace(load_manifest(write_release(serve=serve_profile)), tmp_path / "build" / "tiny")


def measure(workspace: Workspace, url: str, size: str = "64/16", of_base: bool = False) -> str:
    return benchmark(workspace, url=url, size=size, num_prompts=4, single=True, of_base=of_base)[1]


def test_the_result_is_kept_beside_the_manifest_with_the_entry_for_it(
    workspace: Workspace, python: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = "print(*sys.argv[1:], file=open(sys.argv[0] + '.told', 'w'))"
    monkeypatch.setenv("SERVING_PYTHON", python(KEEP + told))
    releases = workspace.manifest.path.parent
    with serve(models("tiny")) as url:
        entry = measure(workspace, url)
        assert entry == "- {file: tiny/speed-quantized-64-16-one.json, model: quantized, gpu: GPU, num_gpus: 1}"
        assert (releases / "tiny" / "speed-quantized-64-16-one.json").read_bytes() == RESULT.read_bytes()
        words = (releases.parent / "program.py.told").read_text("utf-8")
        assert "--model tiny --tokenizer release-builder/tiny-llama-NVFP4 " in words  # nothing is built yet
        assert measure(workspace, url, of_base=True).startswith("- {file: tiny/speed-base-64-16-one.json, model: base,")
        assert f"--tokenizer {(releases / 'base').absolute()} " in (releases.parent / "program.py.told").read_text(
            "utf-8"
        )
    manifest = releases / "tiny.yaml"
    manifest.write_text(manifest.read_text("utf-8") + "benchmarks:\n" + entry + "\n", "utf-8")
    assert load_manifest(manifest).release.benchmarks[0].file == "tiny/speed-quantized-64-16-one.json"


def test_what_cannot_be_asked_for_is_told(
    workspace: Workspace, write_release: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVING_PYTHON", sys.executable)
    for size in ("64", "0/16", "a/b", "1/2/3"):
        with pytest.raises(BuildError, match="4 prompts of size"):
            measure(workspace, "", size)
    with pytest.raises(BuildError, match=r"nothing answers at http://127\.0\.0\.1:1:"):
        measure(workspace, "")  # the profile's own address
    bare = Workspace(load_manifest(write_release("bare")), workspace.folder)
    with pytest.raises(BuildError, match="bare does not say how it is served"):
        measure(bare, "")
