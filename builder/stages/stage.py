"""What a stage is, when it is current, and how it is run."""

from __future__ import annotations

import fcntl
import os
import platform
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from builder.digests import identify_file
from builder.errors import BaseError, BuildError
from builder.files import digest, explain_disk_errors, sha256_file, sync_folder, write_receipt
from builder.machine import measure_peak
from builder.stages.leavings import HELD, count_freed, list_leavings, remove_empty_folder, remove_leavings
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
    settle: what it does last, when its receipt is on disk.
    """

    name: str
    title: str
    reads: Callable[[Workspace], Any]
    run: Callable[[Workspace], Outcome]
    intact: Callable[[Workspace], bool]
    settle: Callable[[Workspace], None] = lambda workspace: None


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
    with same_base(workspace, stage):
        outcome = stage.run(workspace)
    circumstances = {
        "started": started.isoformat(timespec="seconds"),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - clock, 3),
        "peak_bytes": measure_peak(),
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
    stage.settle(workspace)
    return outcome.lines


def mark_running(workspace: Workspace, stage: Stage, key: str) -> bool:
    """Withdraw the stage's receipt, for what it vouches for is about to change; its circumstances stay readable.

    Returns whether an earlier run of the same work did not come to its end. What that one left is not used if the base
    was touched since: it may have been another base for a while.
    """
    before = workspace.receipt(stage.name) or {"facts": {}, "circumstances": {}}
    resumed = before.get("running") == key
    mark: dict[str, Any] = {"stage": stage.name, "key": "", "running": key}
    if base := identify_base(workspace):
        touched = {name: identity and identity[:2] for name, identity in base.items()}  # inodes may change alone
        if resumed and before.get("base", touched) != touched:
            remove_leavings(workspace, stage.name)
            resumed = False
        mark["base"] = touched
    write_receipt(workspace.receipt_path(stage.name), {**before, **mark})
    return resumed


def identify_base(workspace: Workspace) -> dict[str, list[int] | None]:
    """Size, mtime and inode of each file of the base, None for one that is gone; empty before it is fetched."""
    try:
        folder, names = workspace.base_folder(), workspace.facts("fetch")["files"]
    except NotYetError:
        return {}
    return {name: identify(folder / name) for name in names}


def identify(path: Path) -> list[int] | None:
    """Size, mtime and inode of a file, None if there is none."""
    return identify_file(path) if path.is_file() else None


@contextmanager
def same_base(workspace: Workspace, stage: Stage) -> Iterator[None]:
    """Take away what the block left, and raise BaseError, if the base's files did not stay the same all the while."""
    before = identify_base(workspace)
    if not before:
        yield
        return
    folder, fetched = workspace.base_folder(), workspace.facts("fetch")["files"]
    try:
        yield
    finally:
        for name, identity in before.items():
            path = folder / name
            if identify(path) == identity or (path.is_file() and sha256_file(path) == fetched[name]["sha256"]):
                continue
            remove_leavings(workspace, stage.name)
            raise BaseError(
                f"{name} changed while {stage.name} was reading it",
                str(folder),
                "leave it alone, and run the same command again; what was made from it meanwhile is removed",
            )


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


def clean_stage(workspace: Workspace, stage: Stage, links: Counter[int], *, dry_run: bool) -> tuple[list[Path], int]:
    """Take away a stage's receipt and what it left, or only look. Raises BuildError while the release is being built.

    links: how many names of each inode went already, when several stages are cleaned.
    Returns what is removed, and the bytes that the disk has back: those of files whose last name went.
    """
    if not workspace.folder.is_dir():
        return [], 0
    with hold(workspace):
        receipt = workspace.receipt_path(stage.name)
        removed = [*([receipt] if receipt.exists() else []), *list_leavings(workspace, stage.name)]
        freed = sum(count_freed(path, links) for path in removed)
        if not dry_run:
            receipt.unlink(missing_ok=True)  # first, for what it vouches for goes
            remove_leavings(workspace, stage.name)
            sync_folder(workspace.folder)
            remove_empty_folder(workspace)
    return removed, freed


@contextmanager
def hold(workspace: Workspace) -> Iterator[None]:
    """Keep a second build of the same release out. Raises BuildError naming the process that is at it, and since when.

    The system lets go of the file when its process ends, however it ends; what is written in it is for people alone.
    """
    with hold_folder(workspace.folder, workspace.manifest.name):
        yield


@contextmanager
def hold_folder(folder: Path, name: str) -> Iterator[None]:
    """The same, by the folder that the release called `name` is built in."""
    path = folder / HELD
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise BuildError(
                    f"{name} is being built already, by {file.read().strip() or 'another process'}",
                    str(folder),
                    "wait for it, or end it and run the same command again",
                ) from error
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                continue  # whoever held it has just removed it, with the folder
            since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
            holder = f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode()
            with explain_disk_errors(path):
                os.pwrite(file.fileno(), holder, 0)
                os.ftruncate(file.fileno(), len(holder))
            yield
            return


def keep_nothing(workspace: Workspace) -> bool:
    """For stages whose receipt is all they leave."""
    return True
