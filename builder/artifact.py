"""The planned files, written and read: safetensors in one pass, pieces spliced together, the draft that fixes work on.

While a release is built, `parts/` holds three kinds of things, each with a record beside it that is written last:

    NAME.safetensors           a finished file of the release
    NAME.safetensors.partial   a file that a worker is writing in place, unit after unit
    units/UNIT.safetensors     what one unit yields for files that are not written in place
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from builder.base import INDEX, Tensor, read_header
from builder.errors import BuildError
from builder.files import (
    CHUNK_BYTES,
    PUBLISHED_MODE,
    canonical_json,
    explain_disk_errors,
    open_atomic,
    read_json,
    read_receipt,
    sha256_file,
    sync_folder,
    write_atomic,
    write_json,
    write_receipt,
)
from builder.plan import PlannedFile, is_scalar

if TYPE_CHECKING:
    import torch

RECORD = ".record.json"
HELD_WAIT_S = 0.5
HELD_TRIES = 120


def view_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor as they stand in memory (a contiguous copy of them if they are not in one piece)."""
    import torch

    array: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(array)


class HashedFile:
    """A binary file that is hashed while it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.num_bytes = file, hashlib.sha256(), 0

    def write(self, content: bytes | memoryview) -> None:
        self.file.write(content)
        self.digest.update(content)
        self.num_bytes += len(content)


class FileInPlace:
    """A planned file written where it will stay, one unit after another; a journal lets it go on after a crash.

    Large tensors are appended as they come; global scales wait in the journal and close the file.
    key: what the file's bytes are a function of; a journal or record under another key is not believed.
    """

    def __init__(self, folder: Path, planned: PlannedFile, key: str) -> None:
        self.planned, self.key = planned, key
        self.path = folder / planned.name
        self.partial = folder / f"{planned.name}.partial"
        self.journal = folder / f"{planned.name}.partial.journal"
        self.units: list[str] = []
        self.scalars: dict[str, str] = {}
        self.resume()

    def resume(self) -> None:
        """Go on behind the last unit in the journal, or start anew."""
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        with explain_disk_errors(self.partial):
            file = open_alone(self.partial)
            self.out = HashedFile(file)
            journal = read_receipt(self.journal)
            if journal and journal["key"] == self.key:
                position = journal["num_bytes"]
                if self.partial.stat().st_size >= position:
                    self.units, self.scalars = journal["units"], journal["scalars"]
                    for chunk in read_chunks(file, position, self.partial):
                        self.out.digest.update(chunk)
                    self.out.num_bytes = position
            file.truncate(self.out.num_bytes)
            file.seek(self.out.num_bytes)
            if not self.out.num_bytes:
                self.journal.unlink(missing_ok=True)
                self.out.write(self.planned.header)

    def add_unit(self, unit: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Append one unit's tensors that belong to this file, then note it in the journal, both on disk."""
        with explain_disk_errors(self.partial):
            for planned in self.planned.tensors:
                if planned.name not in tensors:
                    continue
                content = view_bytes(tensors[planned.name])
                if is_scalar(planned):
                    self.scalars[planned.name] = bytes(content).hex()
                else:
                    self.out.write(content)
            self.out.file.flush()
            os.fsync(self.out.file.fileno())
        self.units.append(unit)
        state = {"key": self.key, "units": self.units, "scalars": self.scalars, "num_bytes": self.out.num_bytes}
        write_receipt(self.journal, state)

    def finish(self) -> dict[str, Any]:
        """Close the file with its scalars, move it to its name, and record it."""
        with explain_disk_errors(self.partial):
            for planned in self.planned.tensors:
                if is_scalar(planned):
                    self.out.write(bytes.fromhex(self.scalars[planned.name]))
            self.out.file.flush()
            os.fchmod(self.out.file.fileno(), PUBLISHED_MODE)
            os.fsync(self.out.file.fileno())
        self.out.file.close()
        self.partial.replace(self.path)
        record = record_file(self.path, self.key, self.out.digest.hexdigest(), self.out.num_bytes)
        self.journal.unlink(missing_ok=True)
        return record

    def close(self) -> None:
        """Let go of the file as it is; the journal knows how far it came."""
        with suppress(OSError):  # on a full disk the last flush fails once more; nobody needs what it holds
            self.out.file.close()


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


def record_file(path: Path, key: str, sha256: str, num_bytes: int) -> dict[str, Any]:
    """Say of a file that it is finished; written after it."""
    sync_folder(path.parent)
    record = {"key": key, "name": path.name, "sha256": sha256, "num_bytes": num_bytes}
    write_receipt(path.with_name(path.name + RECORD), record)
    return record


def read_record(path: Path, key: str) -> dict[str, Any] | None:
    """The record of a finished file; None unless it was made under this key and is there in full."""
    record = read_receipt(path.with_name(path.name + RECORD))
    if record is None or record["key"] != key or not path.is_file():
        return None
    return record if path.stat().st_size == record["num_bytes"] else None


def write_unit(path: Path, planned: Sequence[Tensor], tensors: Mapping[str, torch.Tensor], key: str) -> dict[str, Any]:
    """Write what a unit yields for files that are spliced later, as a safetensors file of its own."""
    piece = PlannedFile(name=path.name, units=(), tensors=tuple(planned), in_place=False)
    with open_atomic(path) as file:
        out = HashedFile(file)
        out.write(piece.header)
        for tensor in planned:
            out.write(view_bytes(tensors[tensor.name]))
    return record_file(path, key, out.digest.hexdigest(), out.num_bytes)


def splice_file(path: Path, planned: PlannedFile, pieces: Sequence[Path], key: str) -> dict[str, Any]:
    """Make a planned file from the units' pieces, its bytes hashed as they pass.

    Raises BuildError if a piece is not as it was recorded; it is removed, so that the next run makes it anew.
    """
    for piece in pieces:
        record = read_record(piece, key)
        if record is None or sha256_file(piece) != record["sha256"]:
            piece.unlink(missing_ok=True)
            raise BuildError(f"{piece.name} was damaged on the disk", str(piece.parent), "run the same command again")
    places = {tensor.name: (piece, tensor) for piece in pieces for tensor in read_header(piece)}
    with open_atomic(path) as file:
        out = HashedFile(file)
        out.write(planned.header)
        for tensor in planned.tensors:
            piece, stored = places[tensor.name]
            with piece.open("rb") as source:
                source.seek(stored.start)
                for chunk in read_chunks(source, stored.end - stored.start, piece):
                    out.write(chunk)
    return record_file(path, key, out.digest.hexdigest(), out.num_bytes)


def read_chunks(file: BinaryIO, num_bytes: int, path: Path) -> Iterator[bytes]:
    """Exactly `num_bytes` of an open file, in chunks. Raises BuildError, naming `path`, if it ends before."""
    while num_bytes:
        chunk = file.read(min(CHUNK_BYTES, num_bytes))
        if not chunk:
            raise BuildError(f"{path.name} ends too early", str(path.parent), "delete it, and run again")
        num_bytes -= len(chunk)
        yield chunk


def link_file(source: Path, target: Path) -> None:
    """The same file under a second name, without moving a byte where the disk can; a copy elsewhere."""
    try:
        os.link(source, target)
    except OSError:
        with source.open("rb") as whole, open_atomic(target) as file:
            shutil.copyfileobj(whole, file, CHUNK_BYTES)


def write_index(folder: Path, weight_map: Mapping[str, str], num_bytes: int, num_parameters: int) -> None:
    """model.safetensors.index.json; num_bytes counts tensor data alone."""
    metadata = {"total_parameters": num_parameters, "total_size": num_bytes}
    write_json(folder / INDEX, {"metadata": metadata, "weight_map": dict(weight_map)})


@dataclass(frozen=True)
class Draft:
    """An artifact that is complete but not yet accepted: what fixes look at and cure.

    folder: all files of the payload. base: the base model's folder. layout and input_scale: the scheme's.
    """

    folder: Path
    base: Path
    layout: str
    input_scale: str
    ignore: tuple[str, ...]

    def read_json(self, name: str) -> Any:
        """A JSON file of the draft; None if there is none."""
        return read_json(self.folder / name)

    def read_base_json(self, name: str) -> Any:
        """A JSON file of the base model; None if there is none."""
        return read_json(self.base / name)

    def write_json(self, name: str, value: Any) -> None:
        """Replace a JSON file; a hard link to the old one keeps the old content."""
        write_json(self.folder / name, value)

    def copy_from_base(self, name: str) -> None:
        """Take a file of the base model as it is, byte for byte."""
        write_atomic(self.folder / name, (self.base / name).read_bytes())

    def has_base_file(self, name: str) -> bool:
        """Whether a file of the base model is here, byte for byte."""
        ours, theirs = self.folder / name, self.base / name
        return ours.is_file() and theirs.is_file() and ours.read_bytes() == theirs.read_bytes()

    def remove(self, name: str) -> None:
        """Take away a file that the base model does not have."""
        (self.folder / name).unlink()
        sync_folder((self.folder / name).parent)

    def tensor_names(self) -> dict[str, str]:
        """tensor -> file, from the files' own headers."""
        files = sorted(self.folder.glob("*.safetensors"))
        return {tensor.name: file.name for file in files for tensor in read_header(file)}

    def add_tensors(self, file: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Rewrite one weight file with further tensors, in the safetensors library's order, and the index with it."""
        from safetensors import safe_open
        from safetensors.torch import save

        with safe_open(self.folder / file, framework="pt") as handle:
            whole = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        more = {**whole, **tensors}
        write_atomic(self.folder / file, save(more, metadata={"format": "pt"}))
        index = self.read_json(INDEX)
        if index is not None:
            index["weight_map"].update(dict.fromkeys(tensors, file))
            grown = sum(tensor.nbytes for tensor in more.values()) - sum(tensor.nbytes for tensor in whole.values())
            index["metadata"]["total_size"] += grown
            self.write_json(INDEX, index)


def write_config(path: Path, base_config: Mapping[str, Any], quantization_config: Mapping[str, Any]) -> None:
    """config.json: the base's own, and how the weights are quantized."""
    write_atomic(path, canonical_json({**base_config, "quantization_config": dict(quantization_config)}))


def hash_payload(folder: Path, names: Sequence[str], known: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """{name: {sha256, num_bytes}} of a payload's files; known: digests taken while writing, by name."""
    payload = {}
    for name in sorted(names):
        path = folder / name
        payload[name] = {"sha256": known.get(name) or sha256_file(path), "num_bytes": path.stat().st_size}
    return payload
