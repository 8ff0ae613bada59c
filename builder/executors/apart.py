"""Jobs on machines that do not see the builder's folder: what they make travels back, file by file.

Such a job works in a scratch folder of its own machine. Each file that is finished there is sent in chunks, a piece
before the record that vouches for it, and removed once it is on its way; the builder puts it into place when it is
whole. A job that is done again, here or on another machine, is told which units the builder has.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from builder.errors import BuildError, ExecutorError
from builder.executors import Call, Job, perform
from builder.files import CHUNK_BYTES, digest, open_atomic, read_receipt, write_atomic
from builder.parts import RECORD, UNITS, read_record

UNFINISHED = (".partial", ".journal", ".tmp")
STAYS = ".states."  # hidden states, which are large and of use only where they were made
WATCH_EVERY_S = 0.2
OLD_S = 14 * 24 * 3600.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Errand:
    """A job for a machine apart. origin: the builder's machine; have: units that are there; notes: its receipts."""

    call: Call
    origin: str
    have: list[str]
    notes: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """Bytes of a file, to be appended. sha256: of the whole file, with its last chunk."""

    name: str
    content: bytes
    sha256: str | None


def make_errand(call: Call, job: Job) -> Errand:
    """The job as the builder's folder stands now."""
    folder, key = Path(job["folder"]), job.get("key")
    notes = {}
    for path in folder.glob("*.json"):
        receipt = None if path.name.endswith(RECORD) or STAYS in path.name else read_receipt(path)
        if receipt is not None and key is not None and receipt.get("key") == key:
            notes[path.name] = path.read_text("utf-8")
    return Errand(call=call, origin=socket.gethostname(), have=find_units(job) if key else [], notes=notes)


def find_units(job: Job) -> list[str]:
    """The units whose bytes are in the builder's folder, in a piece or in finished files."""
    folder, key, files = Path(job["folder"]), job["key"], job.get("files", ())
    finished = {file["name"] for file in files if read_record(folder / file["name"], key)}
    lacking = {unit for file in files if file["name"] not in finished for unit in file["units"]}
    pieces = {path.stem for path in (folder / UNITS).glob("*.safetensors") if read_record(path, key)}
    return sorted(pieces | ({unit for file in files for unit in file["units"]} - lacking))


def perform_apart(errand: Errand) -> Iterator[Chunk | str | BuildError]:
    """Do a job in this machine's scratch folder; yields the files it finishes, then what `perform` gives."""
    with open_scratch(digest({"origin": errand.origin, "job": errand.call.job})) as scratch:
        for name, note in errand.notes.items():
            write_atomic(scratch / name, note)
        outbox = Outbox(scratch)
        outbox.skip(errand.notes)
        job = json.loads(errand.call.job) | {"folder": str(scratch), "apart": True, "have": errand.have}
        call = dataclasses.replace(errand.call, job=json.dumps(job, ensure_ascii=False))
        outcome: list[str | BuildError] = []
        thread = threading.Thread(target=lambda: outcome.append(perform(call)), daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(WATCH_EVERY_S)
            yield from outbox.send()
        yield from outbox.send()
        if isinstance(outcome[0], str):
            shutil.rmtree(scratch)
        yield outcome[0]


class Outbox:
    """The finished files of a folder, each sent when it appears; JSON that may change is sent whenever it did."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sent: dict[str, tuple[int, int]] = {}

    def skip(self, names: Iterator[str] | dict[str, str]) -> None:
        """Do not send these as they are now."""
        for name in names:
            self.sent[name] = identify((self.folder / name).stat())

    def send(self) -> Iterator[Chunk]:
        for path in sorted(path for path in self.folder.rglob("*") if is_finished(path)):
            name = path.relative_to(self.folder).as_posix()
            if name.endswith(RECORD) and path.with_name(path.name.removesuffix(RECORD)).exists():
                continue  # both appeared while we looked; the piece goes first
            try:
                file = path.open("rb")
            except FileNotFoundError:  # the worker took it back
                continue
            with file:
                identity, sha256 = identify(os.fstat(file.fileno())), hashlib.sha256()
                if self.sent.get(name) == identity:
                    continue
                content, following = file.read(CHUNK_BYTES), file.read(CHUNK_BYTES)
                while following:
                    sha256.update(content)
                    yield Chunk(name=name, content=content, sha256=None)
                    content, following = following, file.read(CHUNK_BYTES)
                sha256.update(content)
                yield Chunk(name=name, content=content, sha256=sha256.hexdigest())
            self.sent[name] = identity
            if path.suffix != ".json" or name.endswith(RECORD):
                path.unlink()


def is_finished(path: Path) -> bool:
    hidden = path.name.startswith(".") or STAYS in path.name
    return not hidden and not path.name.endswith(UNFINISHED) and path.is_file()


def identify(status: os.stat_result) -> tuple[int, int]:
    return status.st_mtime_ns, status.st_ino


def receive_files(folder: Path) -> Generator[None, Chunk, None]:
    """Send it chunks, each file's in a row: a file appears in the folder when it is whole, and as it was sent.

    Raises ExecutorError if it is not; close it, and an unfinished file leaves no trace.
    """
    while True:
        chunk = yield
        with open_atomic(folder / chunk.name) as file:
            sha256 = hashlib.sha256()
            while True:
                file.write(chunk.content)
                sha256.update(chunk.content)
                if chunk.sha256 is not None:
                    break
                chunk = yield
            if sha256.hexdigest() != chunk.sha256:
                raise ExecutorError(
                    f"{chunk.name} arrived damaged", str(folder), "see to the network, then run the same command again"
                )


@contextmanager
def open_scratch(name: str) -> Iterator[Path]:
    """A folder of this machine's own, for one job; held until the block ends. What nobody came back for is removed."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "release-builder")
    root = Path(os.environ.get("RELEASE_BUILDER_SCRATCH") or default)
    (root / name).mkdir(mode=0o700, parents=True, exist_ok=True)
    os.utime(root / name)
    for old in root.iterdir():
        if old.is_dir() and old.stat().st_mtime < time.time() - OLD_S:
            with suppress(OSError), hold(old, fcntl.LOCK_NB):
                shutil.rmtree(old)
    with hold(root / name):
        yield root / name


@contextmanager
def hold(folder: Path, more: int = 0) -> Iterator[None]:
    with (folder / ".held").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | more)
        yield
