"""The vLLM that lives in an environment of its own: found there, and asked to read artifacts.

It is run as a program, and what runs inside it is in `inside_vllm/`, which imports nothing of this package.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from builder.errors import BuildError
from builder.files import read_json, write_json

INSIDE: Final = Path(__file__).parent / "inside_vllm"
TETHER: Final = INSIDE / "tethered.py"
VARIABLE: Final = "SERVING_PYTHON"
MAIN: Final = ("-m", "vllm.entrypoints.cli.main")  # the `vllm` command
OWN: Final = Path(__file__).parents[1] / ".venv-serving" / "bin" / "python"
LONGEST_LOG: Final = 2000  # characters at its end that an error quotes
KV_CACHE_GB: Final = 1  # that vLLM's CPU build sets aside


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A vLLM. platform: as vLLM names it, `cpu` or `cuda`; devices: the names of its GPUs, none on a CPU."""

    python: Path
    version: str
    platform: str
    devices: tuple[str, ...]

    @property
    def on_cpu(self) -> bool:
        return self.platform == "cpu"

    def __str__(self) -> str:
        kinds = sorted(set(self.devices))
        where = (
            ", ".join(f"{self.devices.count(kind)} x {kind}" for kind in kinds)
            if kinds
            else f"the {self.platform.upper()}"
        )
        return f"vLLM {self.version} on {where}"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What came of loading an artifact and reading windows of text through it.

    losses: by window, the negative log-likelihood of each token but the first; NaN where it was none.
    kernels: what multiplies -> the number of (fused) linears that it serves.
    """

    losses: Sequence[Sequence[float]]
    kernels: Mapping[str, int]
    seconds: float
    peak_bytes: int

    @property
    def perplexity(self) -> float:
        return average_losses(self.losses)


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """vLLM did not load the artifact, or could not run it. error: in its own words."""

    error: str


def find_engine(python: str | None = None) -> Engine:
    """The vLLM of `find_python`. Raises BuildError if there is none, or if it does not run."""
    return describe_engine(find_python(python))


def find_python(python: str | None = None) -> Path:
    """The Python that has vLLM: of the variable SERVING_PYTHON, of the serve profile, or of `make serving-env`.

    python: the serve profile's interpreter; it counts if it is a path to one on this machine.
    Raises BuildError if there is none.
    """
    named = os.environ.get(VARIABLE)
    if named:
        if not os.access(named, os.X_OK) or Path(named).is_dir():
            fix = "set it to the Python of an environment that has vLLM"
            raise BuildError(f"{named} is no program", f"the environment variable {VARIABLE}", fix)
        return Path(named)
    for path in (Path(python or ""), OWN):
        if path.is_absolute() and os.access(path, os.X_OK) and not path.is_dir():
            return path
    raise BuildError(
        "there is no vLLM to be found",
        f"{VARIABLE}, serve.python, {OWN.parents[1].name}",
        f"`make serving-env` installs one for the CPU; or set {VARIABLE} to the Python of an environment that has vLLM",
    )


def describe_engine(python: Path) -> Engine:
    """Version and platform of an environment's vLLM. Raises BuildError if it has none that runs."""
    command = [str(python), str(INSIDE / "describe_engine.py")]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", env=make_environment(), check=False
        )
    except OSError as error:
        fix = "set it to the Python of an environment that has vLLM"
        raise BuildError(f"{python} cannot be started: {error.strerror}", VARIABLE, fix) from None
    try:
        found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
    except (ValueError, IndexError):
        found = None
    if found is None:
        said = (done.stderr.strip().splitlines() or [f"it ended with exit code {done.returncode}"])[-1]
        raise BuildError(
            f"no vLLM runs there: {said}",
            str(python),
            "`make serving-env` installs one for the CPU, afresh if .venv-serving is removed before",
        )
    return Engine(python=python, version=found["version"], platform=found["platform"], devices=tuple(found["devices"]))


def make_environment(**more: str) -> dict[str, str]:
    """The variables that every program in vLLM's environment gets: ours, without our Python's, offline and silent.

    Variables of vLLM that are set already stay as they are.
    """
    kept = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }
    preset = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GB),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else two servers share a core and leave others idle
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2)),
    }
    direct = [kept.get("no_proxy") or kept.get("NO_PROXY", ""), "127.0.0.1", "localhost"]
    more = {"no_proxy": ",".join(filter(None, direct)), **more}  # else the benchmark asks a proxy for our server
    return preset | kept | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(INSIDE), "PYTHONUNBUFFERED": "1"} | more


def tether(engine: Engine, *words: str) -> list[str]:
    """A command in the engine's environment that ends, with all it started, when this process does."""
    return [str(engine.python), str(TETHER), str(engine.python), *words]


def is_tethered(process: int) -> bool:
    """Whether a process is what `tether` started: it ends all the rest when this one is gone, and takes its time."""
    try:
        return os.fsencode(TETHER) in Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:  # it has just ended
        return False


def read_artifacts(
    engine: Engine,
    folders: Sequence[Path],
    windows: Sequence[Sequence[int]],
    log: Path,
    options: Mapping[str, Any] | None = None,
    *,
    first: int = 1,
) -> list[Reading | Refusal]:
    """Load each artifact with every weight accounted for, and read windows of token ids through it.

    folders: of artifacts, read one after the other in one process. windows: may be none, then loading is all.
    first: the first token of a window whose loss is asked for. log: what vLLM says goes there. options: of vLLM's LLM
    class, beyond those that strict loading needs.
    Raises BuildError if vLLM ends before it has told about all of them.
    """
    variables = make_environment(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_ALLOW_LONG_MAX_MODEL_LEN="1",  # for the one token that is asked for after a full window
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # to be asked which kernels run
    )
    longest = max(map(len, windows), default=31) + 1
    job = {
        "folders": [str(folder.absolute()) for folder in folders],
        "windows": [list(window) for window in windows],
        "first": first,
        "options": {"max_model_len": longest, "max_num_batched_tokens": max(4096, longest), **(options or {})},
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=log.parent) as scratch, log.open("wb") as output:
        paths = [Path(scratch) / name for name in ("job.json", "results.json")]
        write_json(paths[0], job)
        command = tether(engine, str(INSIDE / "read_artifacts.py"), *map(str, paths))
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=variables)
        try:
            code = process.wait()
        finally:
            process.terminate()  # not killed: whoever holds the tether ends all the rest
            process.wait()
        results = read_json(paths[1]) or []
    if len(results) < len(folders):
        raise BuildError(
            f"vLLM ended with exit code {code} while it had {folders[len(results)].name}: {last_line(log)}",
            str(log),
            "see what it says there; exit code 137 means that memory ran out",
        )
    return [conclude(result) for result in results]


def conclude(result: Mapping[str, Any]) -> Reading | Refusal:
    if "error" in result:
        return Refusal(error=result["error"])
    losses = [[math.nan if loss is None else loss for loss in window] for window in result["losses"]]
    return Reading(losses=losses, **{name: result[name] for name in ("kernels", "seconds", "peak_bytes")})


def average_losses(losses: Sequence[Sequence[float]]) -> float:
    """The perplexity of windows, exp of the mean loss; NaN for none, and where it is not finite."""
    flat = [loss for window in losses for loss in window]
    mean = math.fsum(flat) / len(flat) if flat else math.nan
    return math.exp(mean) if mean < math.log(sys.float_info.max) else math.nan


def last_line(log: Path) -> str:
    """The last thing a program wrote that is not empty."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace")[-LONGEST_LOG:].splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
