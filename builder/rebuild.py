"""A build beside the lock of an earlier one: whether it is of the same release, and whether it is the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.errors import VerifyError
from builder.files import digest
from builder.lock import FORMAT, fill_what, is_older, name_release

LOCAL = {"base": ("path", "config"), "calibration": ("path",)}  # where local files lie; their digests are inputs


@dataclass(frozen=True)
class Comparison:
    """How a build relates to the lock there was.

    verdict: first | equal | replaced (by that of another release or other inputs) | upgraded (to a later format) |
    renewed (because that was asked for). All but an equal one are written.
    """

    verdict: str
    text: str

    @property
    def writes(self) -> bool:
        return self.verdict != "equal"


def compare_lock(old: Mapping[str, Any] | None, new: Mapping[str, Any], path: Path) -> Comparison:
    """Compare a build with the lock of an earlier one.

    Raises VerifyError if the same release from the same inputs has another payload.
    """
    if old is None:
        return Comparison("first", "the first build of this release")
    if changed := list_changed(old, new["what"], new["inputs"]):
        return Comparison("replaced", f"rewritten, for {', '.join(changed)} changed since the last build")
    different, num_files = list_different(old, new)
    same = "every file of the payload is the same, bit for bit"
    if not different:
        older = is_older(old)
        return Comparison("upgraded", f"{same}; rewritten in format {FORMAT}") if older else Comparison("equal", same)
    name, versions = name_release(path), list_new_versions(old, new)
    renew = f"doit relock:{name} releases this build as a new one"
    if versions:
        why, fix = f"versions differ: {', '.join(versions)}", f"install the locked versions: `doit pin:{name}` says how"
    else:
        why, fix = (
            "inputs and versions are the same",
            f"build from scratch: doit clean release:{name}",
        )
    raise VerifyError(
        f"{different[0]} is not what the lock says ({len(different)} of {num_files} files differ; {why})",
        str(path),
        f"{fix}; if the change is meant, {renew}",
    )


def renew_lock(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> Comparison:
    """What becomes another in a lock that is written again from a build, whatever it said.

    old: None if it could not be read.
    """
    if old is None:
        return Comparison("renewed", "rewritten; the one before could not be read")
    different, num_files = list_different(old, new)
    both = old["amax"].keys() & new["amax"].keys()
    moved = [name for name in old["amax"].keys() | new["amax"].keys() if name not in both]
    moved += [name for name in both if old["amax"][name] != new["amax"][name]]
    changes = [
        *list_changed(old, new["what"], new["inputs"]),
        *list_new_versions(old, new),
        *([f"the magnitudes of {len(moved)} of {len(new['amax'])} modules"] if moved else []),
        *([f"{len(different)} of {num_files} files of the payload"] if different else []),
    ]
    text = f"with other values of {', '.join(changes)}" if changes else "and says what it said"
    return Comparison("renewed", f"rewritten, {text}")


def upgrade_lock(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """A lock of an earlier format in this one; its magnitudes are still what its own versions measured."""
    lock = {**new, "versions": old["versions"], "builder": old.get("builder", new["builder"])}
    lock.pop("lock_sha256")
    return {**lock, "lock_sha256": digest(lock)}


def list_changed(old: Mapping[str, Any], what: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[str]:
    """The keys in which a lock is of another release than `what`, or of other inputs; empty if it is of the same."""
    changed = []
    for part, before, now in (("what", fill_what(old["what"]), what), ("inputs", old["inputs"], inputs)):
        for key in sorted(before.keys() | now.keys()):
            one, two = (without_places(key, side.get(key)) for side in (before, now))
            if one == two:
                continue
            if part == "what" and isinstance(one, Mapping) and isinstance(two, Mapping):
                inner = sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
                changed += [f"{part}.{key}.{name}" for name in inner]
            else:
                changed.append(f"{part}.{key}")
    return changed


def list_different(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[str], int]:
    """The files of two payloads that are not the same, and how many there are in all."""
    files = sorted(old["payload"].keys() | new["payload"].keys())
    return [name for name in files if old["payload"].get(name) != new["payload"].get(name)], len(files)


def list_new_versions(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The tools that differ between two locks: name, was -> is."""
    before = {**old["versions"], "the builder's number": old.get("builder", new["builder"])}
    now = {**new["versions"], "the builder's number": new["builder"]}
    return [f"{name} {before.get(name)} -> {found}" for name, found in now.items() if before.get(name) != found]


def without_places(section: str, value: Any) -> Any:
    """A section of a lock without the places of local files, which their digests identify wherever they lie."""
    if section not in LOCAL or not isinstance(value, dict):
        return value
    return {key: content for key, content in value.items() if key not in LOCAL[section]}
