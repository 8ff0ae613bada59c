"""Two releases side by side, from their headers, configs, locks and receipts: what was added, removed and changed."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from builder.base import INDEX, Stored
from builder.differences import compare_maps, compare_values
from builder.errors import BuildError, nearest
from builder.files import read_receipt
from builder.lock import ATTESTATIONS, BESIDE, ENDING, name_release, read_lock, require_lock
from builder.published import HUB_PLACE, Place, find_place

MAX_CONFIG_BYTES = 1 << 18
NO_CONFIGS = (INDEX, "tokenizer.json", "vocab.json")  # large, and no settings
FIGURES = {
    "plan": ("num_bytes", "num_tensors", "num_parameters", "bits_per_parameter"),
    "perplexity": ("base", "artifact", "recovery_percent"),
}
WHERE = "the command line"


@dataclass(frozen=True)
class Side:
    """One of two releases, as far as it is there; what is not is None or empty.

    sizes: bytes by file. tensors: dtype, shape and file by name. scales: the values of tensors of one float.
    """

    name: str
    sizes: Mapping[str, int] | None = None
    tensors: Mapping[str, Stored] | None = None
    scales: Mapping[str, float] | None = None
    configs: Mapping[str, Any] | None = None
    lock: Mapping[str, Any] | None = None
    figures: Mapping[str, float] = field(default_factory=dict)


def load_side(text: str, releases: Path, build: Path) -> Side:
    """What a user names: a release, an artifact's folder, a lock, or owner/name@commit on the Hub.

    releases, build: the folders that locks and builds are in. Raises BuildError for what is none of these.
    """
    own_lock, own_build = releases / f"{text}{ENDING}", build / text
    if "/" not in text and (own_lock.is_file() or (own_build / "artifact").is_dir()):
        return load_release(text, own_lock, own_build)
    if text.endswith(".json") and Path(text).is_file():
        lock = require_lock(Path(text))
        return Side(text, sizes={name: file["num_bytes"] for name, file in lock["payload"].items()}, lock=lock)
    if Path(text).is_dir():
        folder = Path(text)
        return load_place(text, find_place(text, WHERE), read_lock(folder / ATTESTATIONS[0]), folder.parent)
    if HUB_PLACE.fullmatch(text):
        return load_place(text, find_place(text, WHERE), None, None)
    names = {name_release(path) for path in releases.glob(f"*{ENDING}")}
    fix = "give a release, a folder, a lock or owner/name@commit" + (f"; {nearest(text, names)}" if names else "")
    raise BuildError(f"{text} is nothing that can be compared", WHERE, fix)


def load_release(name: str, lock_path: Path, build: Path) -> Side:
    """A release of this checkout: its artifact where it is built, its lock alone where it is not."""
    lock, artifact = read_lock(lock_path), build / "artifact"
    if artifact.is_dir():
        return load_place(name, Place(WHERE, folder=artifact), lock, build)
    assert lock is not None
    return Side(name, sizes={file: entry["num_bytes"] for file, entry in lock["payload"].items()}, lock=lock)


def load_place(name: str, place: Place, lock: Mapping[str, Any] | None, build: Path | None) -> Side:
    """The headers and configs of a finished artifact. build: the folder with its receipts, if there is one."""
    sizes = place.list_sizes()
    headers = place.read_headers([file for file in sizes if file.endswith(".safetensors")])
    tensors = {tensor.name: tensor for stored in headers.values() for tensor in stored}
    names = [file for file in sizes if file.endswith(".json") and "/" not in file and file not in NO_CONFIGS]
    return Side(
        name,
        sizes={file: num_bytes for file, num_bytes in sizes.items() if file not in BESIDE},
        tensors=tensors,
        scales=read_scales(place.folder, tensors) if place.folder else None,
        configs=place.read_configs([file for file in names if sizes[file] <= MAX_CONFIG_BYTES]),
        lock=lock,
        figures=read_figures(build) if build else {},
    )


def read_scales(folder: Path, tensors: Mapping[str, Stored]) -> dict[str, float]:
    """The values of all tensors of one 32-bit float."""
    scales = {}
    for tensor in tensors.values():
        if tensor.dtype == "F32" and tensor.num_elements == 1:
            with (folder / tensor.file).open("rb") as file:
                file.seek(tensor.start)
                (scales[tensor.name],) = struct.unpack("<f", file.read(4))
    return scales


def read_figures(build: Path) -> dict[str, float]:
    """The figures that the card shows, out of the receipts of a build."""
    figures = {}
    for stage, keys in FIGURES.items():
        receipt = read_receipt(build / "receipts" / f"{stage}.json") or {"facts": {}}
        for key in keys:
            if isinstance(value := receipt["facts"].get(key), int | float):
                figures[f"{stage}.{key}"] = value
    return figures


def compare_sides(one: Side, two: Side) -> dict[str, Any]:
    """What differs, section by section, as JSON-able values; `not_compared` names what one of the sides lacks."""
    found: dict[str, Any] = {"one": one.name, "two": two.name, "not_compared": []}
    for section, compare in (
        ("sizes", compare_maps),
        ("tensors", compare_tensors),
        ("scales", compare_numbers),
        ("configs", compare_configs),
        ("lock", compare_locks),
    ):
        values = getattr(one, section), getattr(two, section)
        if None in values:
            lacking = [side.name for side, value in zip((one, two), values, strict=True) if value is None]
            found["not_compared"].append(f"{section}: there are none of {' and '.join(lacking)}")
            continue
        found[section] = compare(*values)
    both = one.figures.keys() & two.figures.keys()  # what one of them did not measure is no difference
    found["figures"] = compare_maps(*({name: side.figures[name] for name in both} for side in (one, two)))
    return found


def compare_tensors(one: Mapping[str, Stored], two: Mapping[str, Stored]) -> dict[str, Any]:
    """By dtype and shape; `moved` counts those that are in another file."""
    kinds = [{name: f"{stored.dtype} {list(stored.shape)}" for name, stored in side.items()} for side in (one, two)]
    moved = sum(one[name].file != two[name].file for name in one.keys() & two.keys())
    return {**compare_maps(*kinds), "moved": moved, "num_tensors": [len(one), len(two)]}


def compare_numbers(one: Mapping[str, float], two: Mapping[str, float]) -> dict[str, Any]:
    """With the largest relative difference, absent if nothing changed."""
    compared: dict[str, Any] = compare_maps(one, two)
    ratios = [abs(first - second) / abs(first) for first, second in compared["changed"].values() if first]
    return compared | ({"largest_relative": max(ratios)} if ratios else {})


def compare_configs(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, Any]:
    """By file and dotted key; a file that only one side has counts as an empty one."""
    compared = {name: compare_values(one.get(name, {}), two.get(name, {})) for name in sorted(one.keys() | two.keys())}
    return {name: changes for name, changes in compared.items() if any(changes.values())}


def compare_locks(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, Any]:
    """By part: what, inputs, versions, machine classes, statistics, digests of the payload."""
    parts: dict[str, Any] = {
        part: compare_values(one[part], two[part]) for part in ("what", "inputs", "versions", "machine_classes")
    }
    parts["amax"] = compare_numbers(*({f"{a}.{b}": float.fromhex(c) for a, b, c in list_amax(x)} for x in (one, two)))
    parts["payload"] = compare_maps(
        *({name: file["sha256"] for name, file in lock["payload"].items()} for lock in (one, two))
    )
    return {part: changes for part, changes in parts.items() if any(changes.values())}


def list_amax(lock: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    return [(linear, kind, text) for linear, kinds in lock["amax"].items() for kind, text in kinds.items()]


def is_same(found: Mapping[str, Any]) -> bool:
    """Whether nothing differs in what was compared, but for tensors that are in another file."""
    sections = [found.get(section, {}) for section in ("sizes", "tensors", "scales", "figures")]
    maps = any(section.get(kind) for section in sections for kind in ("added", "removed", "changed"))
    return not maps and not found.get("configs") and not found.get("lock")


def fold_layers(names: Mapping[str, Any]) -> dict[tuple[str, str], int]:
    """Changes of tensors, those of a decoder layer's kind in one: {(name with * for numbers, change): how many}."""
    folded: dict[tuple[str, str], int] = {}
    for name, change in names.items():
        key = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), " -> ".join(change) if isinstance(change, list) else str(change)
        folded[key] = folded.get(key, 0) + 1
    return folded
