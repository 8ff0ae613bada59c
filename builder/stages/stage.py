"""What a stage is, when it is current, and how it is run."""

from __future__ import annotations

import fcntl
import os
import platform
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from builder.errors import BuildError
from builder.files import digest, write_receipt
from builder.stages.workspace import NotYetError, Workspace

BUILDER = "1"  # raise it when a change of code changes what a stage yields


@dataclass(frozen=True)
class Outcome:
    """What a stage gives back: facts for its receipt, circumstances beside them, lines for whoever watches."""

    facts: Mapping[str, Any]
    circumstances: Mapping[str, Any]
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """One step of a build.

    reads: all that its facts are a function of, JSON-able. intact: whether what it left is still there.
    """

    name: str
    title: str
    reads: Callable[[Workspace], Any]
    run: Callable[[Workspace], Outcome]
    intact: Callable[[Workspace], bool]


def is_current(workspace: Workspace, stage: Stage) -> bool:
    """Whether a stage need not run: its receipt matches what it reads, and its outputs are there."""
    receipt = workspace.receipt(stage.name)
    if receipt is None:
        return False
    try:
        return bool(receipt["key"] == make_key(workspace, stage) and stage.intact(workspace))
    except (NotYetError, BuildError, OSError):
        return False  # running the stage tells what is wrong


def make_key(workspace: Workspace, stage: Stage) -> str:
    """The digest that a stage's receipt has to bear."""
    return digest({"stage": stage.name, "builder": BUILDER, "reads": stage.reads(workspace)})


def run_stage(workspace: Workspace, stage: Stage) -> tuple[str, ...]:
    """Run a stage and leave its receipt. Returns lines for whoever watches."""
    started, clock = datetime.now(UTC), time.monotonic()
    sweep(workspace)
    key = make_key(workspace, stage)
    resumed = mark_running(workspace, stage, key)
    outcome = stage.run(workspace)
    circumstances = {
        "started": started.isoformat(timespec="seconds"),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - clock, 3),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "machine": describe_host(),
        "resumed": resumed,
    }
    receipt = {
        "stage": stage.name,
        "key": key,
        "facts": dict(outcome.facts),
        "circumstances": circumstances | dict(outcome.circumstances),
    }
    write_receipt(workspace.receipt_path(stage.name), receipt)
    return outcome.lines


def mark_running(workspace: Workspace, stage: Stage, key: str) -> bool:
    """Withdraw the stage's receipt, for what it vouches for is about to change; its circumstances stay readable.

    Returns whether an earlier run of the same work did not come to its end.
    """
    before = workspace.receipt(stage.name) or {"facts": {}, "circumstances": {}}
    resumed = before.get("running") == key
    write_receipt(workspace.receipt_path(stage.name), {**before, "stage": stage.name, "key": "", "running": key})
    return resumed


def sweep(workspace: Workspace) -> None:
    """Remove temporary files that killed workers left behind; the release is held, so nobody needs them."""
    for leftover in workspace.folder.glob("**/.*.tmp"):
        leftover.unlink(missing_ok=True)


def describe_host() -> str:
    """The machine in words, for the card."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    return f"{platform.machine()}, {model}, {os.cpu_count()} cores"


@contextmanager
def hold(workspace: Workspace) -> Iterator[None]:
    """Keep a second build of the same release out. Raises BuildError naming the process that is at it."""
    workspace.folder.mkdir(parents=True, exist_ok=True)
    with (workspace.folder / ".held").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise BuildError(
                f"{workspace.manifest.name} is being built already, by process {file.read().strip()}",
                str(workspace.folder),
                "wait for it, or end it and run the same command again",
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def keep_nothing(workspace: Workspace) -> bool:
    """For stages whose receipt is all they leave."""
    return True
