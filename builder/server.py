"""A vLLM server: started in its own environment, waited for, asked, and stopped with all that it started."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from builder.endpoint import open_url
from builder.engine import MAIN, Engine, last_line, make_environment, tether
from builder.errors import BuildError, VerifyError

POLL_S: Final = 0.5
ANSWER_S: Final = 600


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server that answers.

    context: tokens of prompt and answer together, at most. seconds: from its start until it was ready.
    """

    address: str
    served_name: str
    context: int
    seconds: float
    log: Path

    def ask(self, path: str, body: Mapping[str, Any]) -> Any:
        """The answer to a request, as JSON. Raises VerifyError for any but a good one."""
        return read_reply(f"{self.address}{path}", self.log, {"model": self.served_name, **body})


@contextmanager
def run_server(
    engine: Engine,
    words: Sequence[str],
    *,
    port: int,
    served_name: str,
    variables: Mapping[str, str],
    timeout_s: float,
    log: Path,
) -> Iterator[Server]:
    """`vllm serve ...` for as long as the block runs; then it is ended, and whatever it started with it.

    words: `serve`, the model's folder, and options. Raises VerifyError if it ends by itself, or is not ready within
    `timeout_s`; BuildError if another server answers at the port.
    """
    address, started = f"http://127.0.0.1:{port}", time.monotonic()
    environment = make_environment(**variables)
    environment.pop("VLLM_API_KEY", None)  # nobody else reaches it
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            tether(engine, *MAIN, *words),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        try:
            wait_for_health(process, address, started + timeout_s, timeout_s, log)
            seconds = time.monotonic() - started
            context = identify_server(address, words[1], log)
            yield Server(address=address, served_name=served_name, context=context, seconds=seconds, log=log)
        finally:
            process.terminate()  # whoever holds the tether ends all the rest
            process.wait()


def wait_for_health(process: subprocess.Popen[bytes], address: str, end: float, timeout_s: float, log: Path) -> None:
    while True:
        with suppress(OSError, http.client.HTTPException), open_url(f"{address}/health", 5) as answer:
            if answer.status == 200:
                return
        if process.poll() is not None:
            what = f"the server ended with exit code {process.returncode}: {last_line(log)}"
            raise VerifyError(what, str(log), "see what it says there, and mend the serve profile or the artifact")
        if time.monotonic() > end:
            what = f"the server was not ready within {timeout_s:.0f} s"
            raise VerifyError(what, str(log), "see what it says there; a slow disk needs longer")
        time.sleep(POLL_S)


def find_port() -> int:
    """A port that is free on this machine now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def identify_server(address: str, folder: str, log: Path) -> int:
    """The context of the server that has the model in `folder`.

    Raises BuildError if another answers: a port that was free may be taken before vLLM has it.
    """
    reply = read_reply(f"{address}/v1/models", log)
    try:
        [model] = [model for model in reply["data"] if model["root"] == folder]
        return int(model["max_model_len"])
    except (KeyError, TypeError, ValueError):
        what = f"another server answers at {address}, without {Path(folder).name}"
        raise BuildError(what, str(log), "run the same command again: it takes another port") from None


def read_reply(url: str, log: Path, body: Mapping[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with open_url(asked, ANSWER_S) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        said = error.read().decode("utf-8", "replace")[:300]
        raise VerifyError(f"the server answered {error.code}: {said}", url, f"its log is {log}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        what = f"the server did not answer: {error or type(error).__name__}"
        raise VerifyError(what, url, f"its log is {log}") from error
