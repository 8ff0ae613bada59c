"""A release where it was published, a folder or a Hub repository at a commit: its files' digests, headers, configs."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder import hub
from builder.base import Stored, check_length, parse_header, read_header
from builder.digests import DIGESTER
from builder.errors import BaseError, BuildError
from builder.manifest import HUB_ID, show_path

MAX_SMALL_BYTES = 32 << 20  # what is fetched for its digest where the Hub keeps none; it takes 10 MB without LFS
HUB_PLACE = re.compile(rf"(?P<repo>{HUB_ID.strip('^$')})@(?P<revision>[^@]+)")


@dataclass(frozen=True)
class Place:
    """Where a release lies: in a folder, or in a Hub repository at a commit. where: what named it."""

    where: str
    folder: Path | None = None
    repo: str = ""
    revision: str = ""

    def __str__(self) -> str:
        return show_path(self.folder.absolute()) if self.folder else f"{self.repo}@{self.revision[:12]}"

    def list_sizes(self) -> dict[str, int]:
        """Every file's size by name."""
        if self.folder:
            paths = (path for path in self.folder.rglob("*") if path.is_file())
            return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in sorted(paths)}
        return {file.name: file.num_bytes for file in self.list_remote()}

    def list_remote(self) -> tuple[hub.RemoteFile, ...]:
        return hub.list_files(self.repo, self.revision, where=self.where)

    def read_headers(self, names: Collection[str]) -> dict[str, tuple[Stored, ...]]:
        """The tensors of safetensors files, by file; of the Hub's, no more than the headers is fetched."""
        if self.folder:
            return {name: read_header(self.folder / name) for name in names}
        sizes, found = self.list_sizes(), {}
        for name, header in hub.read_headers(self.repo, self.revision, sorted(names), where=self.where).items():
            found[name] = parse_header(header, name, 8 + len(header), self.where)
            check_length(found[name], name, 8 + len(header), sizes[name], self.where)
        return found

    def read_files(self, names: Collection[str]) -> dict[str, bytes]:
        """The contents of small files; the Hub's are fetched and go to no cache."""
        if self.folder:
            return {name: (self.folder / name).read_bytes() for name in names}
        if not names:
            return {}
        with tempfile.TemporaryDirectory() as folder:
            hub.download_files(self.repo, self.revision, sorted(names), where=self.where, folder=Path(folder))
            return {name: (Path(folder) / name).read_bytes() for name in names}

    def read_configs(self, names: Collection[str]) -> dict[str, Any]:
        """The contents of small JSON files; what is not JSON is left out."""
        found = {}
        for name, content in self.read_files(names).items():
            try:
                found[name] = json.loads(content)
            except (ValueError, RecursionError):
                continue
        return found


def find_place(text: str, where: str) -> Place:
    """The place that a user names: a folder, or owner/name@commit. Raises BuildError for what is neither."""
    if text and Path(text).is_dir():
        return Place(where, folder=Path(text))
    if match := HUB_PLACE.fullmatch(text):
        return Place(where, repo=match["repo"], revision=match["revision"])
    raise BuildError(
        f"{text} is neither a folder nor a Hub repository at a commit"
        if text
        else "it is not said what to compare with",
        where,
        "give a folder, or owner/name@ and the 40 hexadecimal digits of the commit",
    )


@dataclass(frozen=True)
class Verdict:
    """What a published release is, beside a lock.

    wrong: what differs, a sentence by file. extra: files that are no part of the payload.
    by_hub, fetched: how many files are known by the Hub's own sha256, and the bytes fetched for all others.
    """

    wrong: Mapping[str, str]
    extra: tuple[str, ...]
    num_files: int
    by_hub: int = 0
    fetched: int = 0


def compare_published(lock: Mapping[str, Any], place: Place) -> Verdict:
    """Compare a published release with the payload of a lock, file by file; nothing large is fetched."""
    payload, sizes = lock["payload"], place.list_sizes()
    wrong = {}
    for name, entry in payload.items():
        if name not in sizes:
            wrong[name] = "is missing"
        elif sizes[name] != entry["num_bytes"]:
            wrong[name] = f"has {sizes[name]} bytes, and the locked one {entry['num_bytes']}"
    same_size = [name for name in payload if name not in wrong]
    found, by_hub, fetched = digest_files(place, same_size, sizes)
    for name in same_size:
        if found[name] != payload[name]["sha256"]:
            wrong[name] = f"has sha256 {found[name][:12]}, and the locked one {payload[name]['sha256'][:12]}"
    extra = tuple(sorted(sizes.keys() - payload.keys()))
    return Verdict(dict(sorted(wrong.items())), extra, len(payload), by_hub, fetched)


def digest_files(place: Place, names: Collection[str], sizes: Mapping[str, int]) -> tuple[dict[str, str], int, int]:
    """Each file's sha256; how many of them the Hub itself told, and how many bytes were fetched for the others."""
    if place.folder:
        DIGESTER.begin(place.folder / name for name in names)
        return {name: DIGESTER.sha256(place.folder / name) for name in names}, 0, 0
    remote = {file.name: file for file in place.list_remote()}
    digests = {name: sha256 for name in names if (sha256 := remote[name].sha256)}
    rest = [name for name in names if name not in digests]
    for name in rest:
        if sizes[name] > MAX_SMALL_BYTES:
            raise BaseError(f"the Hub keeps no sha256 of {name}", place.where, "compare with a folder instead")
    small = {name: hash_bytes(content) for name, content in place.read_files(rest).items()}
    return {**digests, **small}, len(digests), sum(sizes[name] for name in rest)


def hash_bytes(content: bytes) -> str:
    import hashlib

    return hashlib.sha256(content).hexdigest()
