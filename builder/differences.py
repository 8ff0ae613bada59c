"""Where two files, or two releases, differ: by tensor, key and line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.base import DTYPE_BYTES, Stored, read_header
from builder.errors import BaseError
from builder.files import CHUNK_BYTES, read_json
from builder.floats import FLOATS


@dataclass(frozen=True)
class Difference:
    """One thing that two files do not share. place: a tensor, a key or a line; cause: the likely one."""

    file: str
    place: str
    text: str
    cause: str


# --- two files, byte by byte ------------------------------------------------------------------------------------------


def trace_file(name: str, ours: Path, theirs: Path) -> list[Difference]:
    """What differs between two files of one name; empty if nothing does."""
    if name.endswith(".safetensors"):
        try:
            return trace_weights(name, ours, theirs)
        except BaseError as error:
            return [Difference(name, "its header", error.what, "the file is damaged")]
    one, two = ours.read_bytes(), theirs.read_bytes()
    if one == two:
        return []
    contents = read_json(ours), read_json(theirs)
    if name.endswith(".json") and None not in contents and contents[0] != contents[1]:
        texts = {"removed": "{0} should not be there", "added": "is missing ({1})", "changed": "{0} instead of {1}"}
        return [
            Difference(name, place, texts[kind].format(*map(show_value, values)), explain_key(place))
            for kind, place, values in list_changes(compare_values(*contents))
        ]
    first = next((index for index, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    line = one.count(b"\n", 0, first) + 1
    text = f"differs from byte {first} on ({len(one)} and {len(two)} bytes)"
    return [Difference(name, f"line {line}", text, "another base, licence text or builder")]


def trace_weights(name: str, ours: Path, theirs: Path) -> list[Difference]:
    """The tensors that differ, in the order of our file's bytes."""
    first, second = ({tensor.name: tensor for tensor in read_header(path)} for path in (ours, theirs))
    found = []
    for tensor in [*first, *(tensor for tensor in second if tensor not in first)]:
        one, two = first.get(tensor), second.get(tensor)
        if one is None or two is None:
            text = "is there and should not be" if two is None else "is missing"
            found.append(Difference(name, tensor, text, "another scheme, packing or builder"))
        elif (one.dtype, one.shape) != (two.dtype, two.shape):
            text = f"is {show_kind(one)}, and should be {show_kind(two)}"
            found.append(Difference(name, tensor, text, "another scheme or base"))
        elif told := compare_bytes(one, ours, two, theirs):
            found.append(Difference(name, tensor, told, explain_tensor(one)))
    if not found and read_head(ours) != read_head(theirs):
        text = "differs, and no tensor does"
        found.append(Difference(name, "the header", text, "another order of tensors, or other metadata"))
    return found


def read_head(path: Path) -> bytes:
    """A safetensors file's header as it is written."""
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def compare_bytes(one: Stored, ours: Path, two: Stored, theirs: Path) -> str | None:
    """How many bytes of a tensor differ, and its first element that does."""
    import numpy as np

    count, first, step = 0, None, CHUNK_BYTES
    num_bytes = one.end - one.start
    if not num_bytes:
        return None
    maps = [np.memmap(path, np.uint8, "r", stored.start, (num_bytes,)) for path, stored in ((ours, one), (theirs, two))]
    for start in range(0, num_bytes, step):
        places = np.flatnonzero(maps[0][start : start + step] != maps[1][start : start + step])
        count += len(places)
        if first is None and len(places):
            first = (start + int(places[0])) // DTYPE_BYTES[one.dtype]
    if first is None:
        return None
    index = [int(number) for number in np.unravel_index(first, one.shape)] if one.shape else []
    return f"{count:,} of {num_bytes:,} bytes differ, first at {index}"


def show_kind(tensor: Stored) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def explain_tensor(tensor: Stored) -> str:
    """What makes such a tensor come out differently."""
    role = tensor.name.rpartition(".")[2]
    if role.startswith("input"):
        return "other statistics of activations: calibrated elsewhere, or another amax table"
    if role.startswith("weight_") or tensor.dtype not in FLOATS:
        return "another weight in the base, or another version of what quantizes it"
    return "another base: this tensor is copied from it"


def explain_key(place: str) -> str:
    if re.search(r"version|producer", place):
        return "another version of the tool that is named there"
    if place.startswith("quantization"):
        return "another scheme, or another builder"
    return "another base, or another fix"


# --- two values -------------------------------------------------------------------------------------------------------


def compare_values(one: Any, two: Any) -> dict[str, dict[str, Any]]:
    """{added, removed, changed} of two JSON-able values by dotted key; `changed` holds pairs."""
    first, second = dict(flatten(one)), dict(flatten(two))
    return compare_maps(first, second)


def compare_maps(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{added, removed, changed} of two mappings; `changed` holds pairs."""
    return {
        "added": {key: second[key] for key in sorted(second.keys() - first.keys())},
        "removed": {key: first[key] for key in sorted(first.keys() - second.keys())},
        "changed": {
            key: [first[key], second[key]] for key in sorted(first.keys() & second.keys()) if first[key] != second[key]
        },
    }


def list_changes(compared: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, tuple[Any, Any]]]:
    """(kind, key, (one, two)) of what `compare_maps` found; None for what is not there."""
    for key, value in compared["removed"].items():
        yield "removed", key, (value, None)
    for key, value in compared["added"].items():
        yield "added", key, (None, value)
    for key, pair in compared["changed"].items():
        yield "changed", key, (pair[0], pair[1])


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in a JSON-able value; a list of plain values, or an empty one, is a value."""
    if isinstance(value, Mapping) and value:
        for key, content in value.items():
            yield from flatten(content, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        for index, content in enumerate(value):
            yield from flatten(content, f"{path}[{index}]")
    else:
        yield path, value


def show_value(value: Any) -> str:
    """A value on one short line."""
    text = " ".join((value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).split())
    return text if len(text) <= 60 else f"{text[:59]}…"
