"""The planned weight files, written: hashed in the same pass, resumed after a crash, spliced where shards share one.

While a release is built, `parts/` holds three kinds of things, each with a record beside it that is written last:

    NAME.safetensors           a finished file of the release
    NAME.safetensors.partial   a file that a worker is writing in place, unit after unit
    units/UNIT.safetensors     what one unit yields for files that are not written in place

Whoever quantizes never waits for the disk: bytes are hashed, written and made durable in threads of their own, with a
bounded number of them in memory.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from builder.base import Stored, Tensor, read_header
from builder.errors import BuildError
from builder.files import (
    CHUNK_BYTES,
    PUBLISHED_MODE,
    explain_disk_errors,
    open_atomic,
    read_exactly,
    read_receipt,
    sync_folder,
    write_receipt,
)
from builder.plan import PlannedFile, Unit, is_scalar

if TYPE_CHECKING:
    import torch

    Content = Iterable[bytes | memoryview]  # a tensor's bytes, in chunks

RECORD = ".record.json"
UNITS = "units"
AHEAD_BYTES = 8 * CHUNK_BYTES  # what may wait to be hashed and written, for each open file
PAGE = 4096
HELD_WAIT_S = 0.5
HELD_TRIES = 120


def view_bytes(tensor: torch.Tensor | NDArray[Any]) -> memoryview:
    """The bytes of a tensor as they stand in memory (a contiguous copy of them if they are not in one piece)."""
    if isinstance(tensor, np.ndarray):
        bits: Any = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
        return memoryview(bits)
    import torch

    array: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(array)


class HashedFile:
    """A file that is hashed while it is written, each in a thread of its own; calls keep their order.

    Bytes go past the system's page cache where the file system allows it: that spares a core, and the memory in which
    the base model's pages lie. An error shows at a later call, `settle` at the latest.
    written: how many bytes are in the file already, and in `digest`.
    """

    def __init__(self, file: BinaryIO, digest: Any = None, written: int = 0) -> None:
        self.file, self.digest, self.num_bytes = file, digest or hashlib.sha256(), written
        self.hasher, self.writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self.waiting: deque[tuple[int, Future[Any], Future[Any]]] = deque()
        self.waiting_bytes = 0
        self.error: BaseException | None = None  # the first one; nothing is written after it
        self.staging = memoryview(mmap.mmap(-1, CHUNK_BYTES))  # holds what is in the file from `offset` on
        self.offset = written // PAGE * PAGE
        self.staged = written - self.offset
        if self.staged:
            os.preadv(file.fileno(), [self.staging[:PAGE]], self.offset)
        bypass_cache(file, True)

    def write(self, content: bytes | memoryview) -> None:
        """Take bytes that do not change afterwards; waits while too many are in memory."""
        for chunk in cut(memoryview(content)):
            hashed, written = self.hasher.submit(self.digest.update, chunk), self.writer.submit(self.put, chunk)
            self.waiting.append((len(chunk), hashed, written))
            self.waiting_bytes += len(chunk)
            self.num_bytes += len(chunk)
            while self.waiting_bytes > AHEAD_BYTES:
                self.settle_one()

    def put(self, chunk: memoryview) -> None:
        while chunk:
            num_bytes = min(len(chunk), len(self.staging) - self.staged)
            self.staging[self.staged : self.staged + num_bytes] = chunk[:num_bytes]
            self.staged += num_bytes
            chunk = chunk[num_bytes:]
            if self.staged == len(self.staging):
                self.push()
                self.offset += self.staged
                self.staged = 0

    def push(self) -> None:
        """Write what is staged, up to the end of its last page; `settle` cuts off what is too much."""
        start, end = 0, -(-self.staged // PAGE) * PAGE
        if self.error:  # what follows a failed write would leave a hole
            return
        try:
            while start < end:
                start += os.pwrite(self.file.fileno(), self.staging[start:end], self.offset + start)
                if start % PAGE:  # cut short: what is left tells why, by another way
                    bypass_cache(self.file, False)
        except BaseException as error:
            self.error = error
            raise

    def mark(self) -> Future[None]:
        """Done, or failed, when everything given until now is handed to the system."""
        return self.writer.submit(self.push)

    def settle_one(self) -> None:
        num_bytes, hashed, written = self.waiting.popleft()
        self.waiting_bytes -= num_bytes
        hashed.result()
        written.result()

    def settle(self) -> str:
        """Wait until all is hashed and handed to the system; returns the sha256 in hex."""
        while self.waiting:
            self.settle_one()
        self.mark().result()
        if self.error:  # it may have shown in a call of `mark` that nobody waited for
            raise self.error
        os.ftruncate(self.file.fileno(), self.num_bytes)
        hexdigest: str = self.digest.hexdigest()
        return hexdigest

    def close(self) -> None:
        """End the threads, whatever they were at."""
        self.error = self.error or ValueError("the file is closed")
        self.hasher.shutdown(cancel_futures=True)
        self.writer.shutdown(cancel_futures=True)


def bypass_cache(file: BinaryIO, wanted: bool) -> None:
    """Have writes at multiples of a page go straight to the disk, where that can be had, or no longer."""
    with suppress(OSError, AttributeError):  # not every file system can; not every system has the flag
        flags = fcntl.fcntl(file, fcntl.F_GETFL)
        fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT if wanted else flags & ~os.O_DIRECT)


def cut(view: memoryview) -> Iterator[memoryview]:
    """A view in chunks."""
    return (view[start : start + CHUNK_BYTES] for start in range(0, len(view), CHUNK_BYTES))


class FileInPlace:
    """A planned file written where it will stay, one unit after another; a journal lets it go on after a crash.

    Large tensors are appended as they come; global scales wait in the journal and close the file. The journal tells of
    a unit only when its bytes are on disk; one thread sees to that, over and over, as fast as the disk allows.
    key: what the file's bytes are a function of; a journal or record under another key is not believed.
    """

    def __init__(self, folder: Path, planned: PlannedFile, key: str) -> None:
        self.planned, self.key = planned, key
        self.path = folder / planned.name
        self.partial = folder / f"{planned.name}.partial"
        self.journal = folder / f"{planned.name}.partial.journal"
        self.units: list[str] = []
        self.scalars: dict[str, str] = {}
        self.keeper = ThreadPoolExecutor(1)
        self.keeping: Future[Any] | None = None
        self.state = self.kept = dict[str, Any]()  # what the journal could say, and what it says
        self.finished: Future[dict[str, Any]] | None = None
        self.resume()

    def resume(self) -> None:
        """Go on behind the last unit in the journal, or start anew."""
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        with explain_disk_errors(self.partial):
            file = open_alone(self.partial)
            sha256, position = hashlib.sha256(), 0
            journal = read_receipt(self.journal)
            if journal and journal["key"] == self.key and self.partial.stat().st_size >= journal["num_bytes"]:
                self.units, self.scalars, position = journal["units"], journal["scalars"], journal["num_bytes"]
                for chunk in read_exactly(file, position, self.partial):
                    sha256.update(chunk)
            file.truncate(position)
            self.out = HashedFile(file, sha256, position)
            if not position:
                self.journal.unlink(missing_ok=True)
                self.out.write(self.planned.header)

    @property
    def is_whole(self) -> bool:
        """Whether every unit is in it."""
        return self.units == list(self.planned.units)

    def add(self, tensor: Tensor, content: Content) -> None:
        """Append a tensor, in the order of the plan."""
        with explain_disk_errors(self.partial):
            if is_scalar(tensor):
                self.scalars[tensor.name] = b"".join(content).hex()
                return
            for chunk in content:
                self.out.write(chunk)

    def end_unit(self, unit: str) -> None:
        """All tensors of a unit were added: the journal may say so, as soon as they are on disk."""
        self.units.append(unit)
        self.state = {
            "key": self.key,
            "units": list(self.units),
            "scalars": dict(self.scalars),
            "num_bytes": self.out.num_bytes,
        }
        if self.keeping and not self.keeping.done():
            return  # a later entry will tell of this unit too
        if self.keeping:
            self.keeping.result()
        self.keeping = self.keeper.submit(self.keep, self.out.mark(), self.state)

    def keep(self, written: Future[None], state: dict[str, Any]) -> None:
        with explain_disk_errors(self.partial):
            written.result()
            if not self.out.error:
                os.fsync(self.out.file.fileno())
                write_receipt(self.journal, state)
                self.kept = state

    def finish(self) -> Future[dict[str, Any]]:
        """Close the file with its scalars, move it to its name, and record it: all behind the caller's back."""
        for tensor in self.planned.tensors:
            if is_scalar(tensor):
                self.out.write(bytes.fromhex(self.scalars[tensor.name]))
        self.finished = self.keeper.submit(self.complete)
        return self.finished

    def complete(self) -> dict[str, Any]:
        with explain_disk_errors(self.partial):
            sha256 = self.out.settle()
            os.fchmod(self.out.file.fileno(), PUBLISHED_MODE)
            os.fsync(self.out.file.fileno())
        self.partial.replace(self.path)
        record = record_file(self.path, self.key, sha256, self.out.num_bytes)
        self.journal.unlink(missing_ok=True)
        return record

    def close(self) -> None:
        """Let go of the file as it is; the journal knows how far it came."""
        with suppress(OSError, BuildError):  # on a full disk the last flush fails once more; nobody needs what it holds
            if self.finished is None and self.keeper.submit(lambda: self.kept).result() is not self.state:
                self.keep(self.out.mark(), self.state)
        self.keeper.shutdown()
        self.out.close()
        with suppress(OSError):
            self.out.file.close()


class Parts:
    """Where one worker's tensors go: files that its units alone make up are written in place, the rest as pieces.

    apart: write pieces only, for whoever gathers them on another machine.
    have: units whose pieces are there already, though not here.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[PlannedFile],
        units: Sequence[Unit],
        key: str,
        *,
        apart: bool = False,
        have: Iterable[str] = (),
    ) -> None:
        self.folder, self.key, self.have = folder, key, frozenset(have)
        own = [] if apart else own_files(files, units)
        self.in_place = {tensor.name: file.name for file in own for tensor in file.tensors}
        self.open: dict[str, FileInPlace] = {}
        self.finishing: list[FileInPlace] = []
        self.piece: dict[str, Content] = {}
        self.piece_writer = ThreadPoolExecutor(1)
        self.pieces: deque[Future[Any]] = deque()
        try:
            for file in own:
                if not read_record(folder / file.name, key):
                    self.open[file.name] = FileInPlace(folder, file, key)
            self.finish_whole_files()
        except BaseException:
            self.close()
            raise

    def lacking(self, unit: Unit) -> frozenset[str]:
        """The unit's tensors that are not on disk yet, by name."""
        piece = self.folder / UNITS / f"{unit.name}.safetensors"
        has_piece = unit.name in self.have or bool(read_record(piece, self.key))
        names = []
        for tensor in unit.tensors:
            file = self.in_place.get(tensor.name)
            if not has_piece if file is None else file in self.open and unit.name not in self.open[file].units:
                names.append(tensor.name)
        return frozenset(names)

    def add(self, tensor: Tensor, content: Content) -> None:
        """Take a tensor of the unit at hand, in the order of the plan."""
        file = self.in_place.get(tensor.name)
        if file is None:
            self.piece[tensor.name] = content
        else:
            self.open[file].add(tensor, content)

    def end_unit(self, unit: Unit, lacking: frozenset[str]) -> None:
        """All that a unit lacked was added."""
        planned = [tensor for tensor in unit.tensors if tensor.name in self.piece]
        if planned:
            path = self.folder / UNITS / f"{unit.name}.safetensors"
            self.pieces.append(self.piece_writer.submit(write_unit, path, planned, self.piece, self.key))
            self.piece = {}
            while len(self.pieces) > 1:  # one is written while the next is made
                self.pieces.popleft().result()
        for name in {self.in_place[name] for name in lacking if name in self.in_place}:
            self.open[name].end_unit(unit.name)
        self.finish_whole_files()

    def finish_whole_files(self) -> None:
        for name in [name for name, file in self.open.items() if file.is_whole]:
            self.finishing.append(self.open.pop(name))
            self.finishing[-1].finish()

    def settle(self) -> None:
        """Wait until everything is on disk. Raises what went wrong while it was written."""
        while self.pieces:
            self.pieces.popleft().result()
        while self.finishing:
            finished = self.finishing[0].finished
            assert finished is not None
            finished.result()
            self.finishing.pop(0).close()

    def close(self) -> None:
        """Let go of all files, finished or not."""
        self.piece_writer.shutdown()
        for file in [*self.open.values(), *self.finishing]:
            file.close()


def own_files(files: Sequence[PlannedFile], units: Sequence[Unit]) -> list[PlannedFile]:
    """The files that these units alone make up, and that can be written in one pass."""
    mine = {unit.name for unit in units}
    return [file for file in files if file.in_place and mine.issuperset(file.units)]


def open_alone(path: Path) -> BinaryIO:
    """Open a file to read and write, made if need be, that no other process holds open in this way.

    A worker of a build that was killed may live on for some seconds; it is waited for.
    Raises BuildError if it is still there after a minute.
    """
    for _ in range(HELD_TRIES):
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, PUBLISHED_MODE), "r+b")
        with suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):  # else it was finished meanwhile, and renamed
                return file
        file.close()
        time.sleep(HELD_WAIT_S)
    raise BuildError(f"another process is writing {path.name}", str(path.parent), "end it, and run again")


def record_file(path: Path, key: str, sha256: str, num_bytes: int, **more: Any) -> dict[str, Any]:
    """Say of a file that it is finished; written after it."""
    sync_folder(path.parent)
    record = {"key": key, "name": path.name, "sha256": sha256, "num_bytes": num_bytes, **more}
    write_receipt(path.with_name(path.name + RECORD), record)
    return record


def read_record(path: Path, key: str) -> dict[str, Any] | None:
    """The record of a finished file; None unless it was made under this key and is there in full."""
    record = read_receipt(path.with_name(path.name + RECORD))
    if record is None or record["key"] != key or not path.is_file():
        return None
    return record if path.stat().st_size == record["num_bytes"] else None


def write_unit(path: Path, planned: Sequence[Tensor], contents: Mapping[str, Content], key: str) -> dict[str, Any]:
    """Write what a unit yields for files that are spliced later, as a safetensors file of its own.

    Its record holds each tensor's sha256 besides the file's.
    """
    piece = PlannedFile(name=path.name, units=(), tensors=tuple(planned), in_place=False)
    digests = {}
    with open_hashed(path) as out:
        out.write(piece.header)
        for tensor in planned:
            own = hashlib.sha256()
            for chunk in contents[tensor.name]:
                out.write(chunk)
                own.update(chunk)
            digests[tensor.name] = own.hexdigest()
        sha256 = out.settle()
    return record_file(path, key, sha256, out.num_bytes, tensors=digests)


@contextmanager
def open_hashed(path: Path) -> Iterator[HashedFile]:
    """A file hashed while it is written, which appears under `path` only if the block succeeds."""
    with open_atomic(path) as file:
        out = HashedFile(file)
        try:
            yield out
        finally:
            out.close()


def splice_file(path: Path, planned: PlannedFile, pieces: Sequence[Path], key: str) -> dict[str, Any]:
    """Make a planned file from the units' pieces in one pass: read, compared with the pieces' digests, hashed, written.

    Raises BuildError if a piece is not as it was recorded; it is removed, so that the next run makes it anew.
    """
    places: dict[str, tuple[Path, Stored, str]] = {}
    for piece in pieces:
        record = read_record(piece, key)
        if record is None:
            raise refuse_piece(piece)
        places |= {tensor.name: (piece, tensor, record["tensors"][tensor.name]) for tensor in read_header(piece)}
    with open_hashed(path) as out:
        out.write(planned.header)
        for tensor in planned.tensors:
            piece, stored, expected = places[tensor.name]
            own = hashlib.sha256()
            with piece.open("rb") as source:
                source.seek(stored.start)
                for chunk in read_exactly(source, stored.end - stored.start, piece):
                    out.write(chunk)
                    own.update(chunk)
            if own.hexdigest() != expected:
                raise refuse_piece(piece)
        sha256 = out.settle()
    return record_file(path, key, sha256, out.num_bytes)


def refuse_piece(piece: Path) -> BuildError:
    """Take away a piece that is damaged, and say so."""
    piece.unlink(missing_ok=True)
    return BuildError(f"{piece.name} was damaged on the disk", str(piece.parent), "run the same command again")
