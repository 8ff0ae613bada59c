"""A served endpoint -> the result file of a benchmark against it; the benchmark is vLLM's own."""

from __future__ import annotations

import json
import subprocess
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from builder.benchmarks import ASKED, Load, Size, read_vllm_bench
from builder.engine import MAIN, VARIABLE, make_environment
from builder.errors import BuildError

ANSWER_S = 10
THIS_MACHINE = ("127.0.0.1", "localhost", "::1")
TAIL = 12  # lines of a failed benchmark that are shown


def open_url(request: str | urllib.request.Request, timeout_s: float) -> Any:
    """`urlopen`, but never through a proxy to this very machine."""
    url = request if isinstance(request, str) else request.full_url
    proxies = urllib.request.ProxyHandler({} if urlsplit(url).hostname in THIS_MACHINE else None)
    return urllib.request.build_opener(proxies).open(request, timeout=timeout_s)


def ask_models(url: str) -> tuple[str, ...]:
    """The names of the models that an OpenAI-compatible server has. Raises BuildError if none answers at `url`."""
    fix = "start the server (`serve.sh`), wait until it has loaded the weights, and give its address with --url"
    address = f"{url.rstrip('/')}/v1/models"
    try:
        with open_url(address, ANSWER_S) as answer:
            return tuple(str(model["id"]) for model in json.load(answer)["data"])
    except urllib.error.HTTPError as error:
        raise BuildError(f"{address} answers {error.code} {error.reason}", url, fix) from None
    except (OSError, ValueError) as error:
        raise BuildError(f"nothing answers at {url}: {getattr(error, 'reason', error)}", address, fix) from None
    except (KeyError, TypeError):
        raise BuildError(f"{address} does not answer as OpenAI's API does", url, fix) from None


def bench_command(
    python: str, url: str, model: str, tokenizer: str, size: Size, *, num_prompts: int, single: bool, file: Path
) -> tuple[str, ...]:
    """The words of `vllm bench serve`: random prompts of one size, alone or all at once, their result into `file`."""
    prompt, output = size
    return (
        *(python, *MAIN, "bench", "serve"),
        *("--backend", "openai", "--base-url", url, "--endpoint", "/v1/completions"),
        *("--model", model, "--tokenizer", tokenizer),
        *("--dataset-name", "random", "--random-input-len", str(prompt), "--random-output-len", str(output)),
        *("--num-prompts", str(num_prompts), "--temperature", "0", "--seed", "0", "--ignore-eos", "--num-warmups", "1"),
        *(("--max-concurrency", "1") if single else ()),
        *("--percentile-metrics", "ttft,tpot,itl,e2el", "--disable-tqdm"),
        *("--save-result", "--result-dir", str(file.parent), "--result-filename", file.name),
        *("--metadata", f"{ASKED[0]}={prompt}", f"{ASKED[1]}={output}"),
    )


def run_vllm_bench(
    python: str,
    url: str,
    size: Size,
    *,
    tokenizer: str,
    num_prompts: int,
    single: bool,
    file: Path,
    model: str = "",
    timeout_s: float | None = None,
) -> Load:
    """Measure a served model, and leave the result in `file`, which is replaced.

    python: an interpreter that has vLLM. url: of the server, without /v1. size: prompt and output tokens.
    tokenizer: a folder or Hub id. model: its name at the server; the only one there, if empty.
    Raises BuildError if nothing answers, if the benchmark fails, or if it gave no result.
    """
    names = ask_models(url)
    if not model and len(names) != 1:
        fix = "give the name of one of them"
        raise BuildError(f"the server has {len(names)} models: {', '.join(names) or 'none'}", url, fix)
    if model and model not in names:
        fix = f"ask for {' or '.join(names) or 'a model that is served'}, or set serve.served_name"
        raise BuildError(f"the server has no model {model}", url, fix)
    command = bench_command(
        python, url, model or names[0], tokenizer, size, num_prompts=num_prompts, single=single, file=file
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    run_command(command, timeout_s)
    if not file.is_file():
        raise BuildError("vllm bench serve left no result", str(file), "run it by hand: " + " ".join(command[1:5]))
    return read_vllm_bench(file).loads[0]


def run_command(command: Sequence[str], timeout_s: float | None = None) -> None:
    """Run a command to its end. Raises BuildError with its last lines if it fails or takes too long."""
    try:
        done = subprocess.run(
            command,
            env=make_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        fix = "see whether the server still answers"
        raise BuildError(f"vllm bench serve took longer than {timeout_s:.0f} s", command[0], fix) from None
    except OSError as error:
        fix = f"set the environment variable {VARIABLE} to a Python that has vLLM"
        raise BuildError(f"{command[0]} cannot be started: {error.strerror}", "serve.python", fix) from None
    if done.returncode:
        tail = "\n  | ".join(done.stdout.strip().splitlines()[-TAIL:])
        what = f"vllm bench serve failed with exit code {done.returncode}"
        raise BuildError(what, command[0], f"see what it said last\n  | {tail}")
