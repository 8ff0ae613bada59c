"""Files that are either finished or absent: atomic writes, digests, canonical JSON, receipts."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from builder.errors import BuildError

CHUNK_BYTES = 8 << 20
PUBLISHED_MODE = 0o644
SEAL = "content_sha256"


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, two-space indent and a final newline; NaN is refused."""
    return json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def digest(value: Any) -> str:
    """sha256, in hex, of a JSON-able value's canonical form."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """sha256, in hex, of a file's bytes, read once in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    """Turn "no space left" and "over quota" into a BuildError that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise BuildError(
            f"no space left while writing {path.name}",
            str(path.parent),
            "free some space there and run the same command again; finished work is kept",
        ) from error


def read_json(path: Path) -> Any:
    """A JSON file of ours; None if it is missing, torn or not JSON at all."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        return None


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
