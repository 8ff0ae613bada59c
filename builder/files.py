"""Files that are either finished or absent: atomic writes, digests, canonical JSON, receipts."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from builder.errors import BuildError

CHUNK_BYTES = 8 << 20
PUBLISHED_MODE = 0o644
OWN_CACHE = "release-builder"
SEAL = "content_sha256"


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, two-space indent and a final newline; NaN is refused."""
    return json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def digest(value: Any) -> str:
    """sha256, in hex, of a JSON-able value's canonical form."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """sha256, in hex, of a file's bytes, read once in chunks."""
    with explain_disk_errors(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_exactly(file: BinaryIO | FileIO, num_bytes: int, path: Path) -> Iterator[bytes]:
    """Exactly `num_bytes` of an open file, in chunks. Raises BuildError, naming `path`, if it ends before."""
    while num_bytes:
        with explain_disk_errors(path):
            chunk = file.read(min(CHUNK_BYTES, num_bytes))
        if not chunk:
            raise BuildError(f"{path.name} ends too early", str(path.parent), "restore it, and run again")
        num_bytes -= len(chunk)
        yield chunk


@contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears under `path`, mode 0644 and on disk, only if the block succeeds.

    Raises BuildError when the disk is full; whatever happens, no temporary file is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with explain_disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fchmod(file.fileno(), PUBLISHED_MODE)
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a whole file at once: it is there complete, or as it was before."""
    with open_atomic(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON-able value in canonical form, atomically."""
    write_atomic(path, canonical_json(value))


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explain_disk_errors(path: Path) -> Iterator[None]:
    """Turn what a full, limited or failing disk says into a BuildError that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = f"no space left while writing {path.name}"
            fix = "free some space there and run the same command again; finished work is kept"
        elif error.errno == errno.EFBIG:
            what = f"{path.name} grows larger than a file may be"
            fix = "raise the limit (`ulimit -f`), or build on another file system; finished work is kept"
        elif error.errno == errno.EIO:
            what = f"the disk failed while {path.name} was read or written"
            fix = "see the system's log (`dmesg`), restore the file, and run the same command again"
        else:
            raise
        raise BuildError(what, str(path.parent), fix) from error


def read_json(path: Path) -> Any:
    """A JSON file of ours; None if it is missing, torn or not JSON at all."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        return None


def cache_folder() -> Path:
    """This user's folder for what can be made again; it need not be there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / OWN_CACHE


def write_receipt(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file of ours that says, by a digest of its content, that it is whole and as we wrote it."""
    write_json(path, {**value, SEAL: digest(value)})


def read_receipt(path: Path) -> dict[str, Any] | None:
    """What `write_receipt` wrote; None if it is missing, torn, or altered since."""
    found = read_json(path)
    if not isinstance(found, dict):
        return None
    seal = found.pop(SEAL, None)
    try:
        return found if seal == digest(found) else None
    except ValueError:  # a NaN, which is none of ours
        return None
