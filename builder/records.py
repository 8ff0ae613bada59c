"""Published figures, written down as YAML with source and date -> values; read as strictly as a manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails

from builder.errors import BuildError, nearest, raise_all
from builder.manifest import EXPECTED, Date, Node, Section, Text, find_field, read_nodes, show_path


class Record(Section):
    """What every record says of itself; its figures are its subclasses' own."""

    source: Annotated[Text, Field(pattern=r"^https?://[^\s]+$")]
    """Where the figures were published."""
    date: Date
    """Day of that publication."""
    notes: tuple[Text, ...] = ()
    """What a reader of the figures has to know, a sentence each."""


Kind = TypeVar("Kind", bound=Record)


def read_record(path: Path, kind: type[Kind]) -> Kind:
    """Read a record. Raises BuildError, or Problems, each with file, line and key."""
    file = show_path(path.absolute())
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BuildError(f"{path.name} cannot be read: {error.strerror}", file, "give a file that is there") from None
    root, problems = read_nodes(data, file)
    if not problems:
        try:
            return kind.model_validate(root.content)
        except ValidationError as error:
            findings = error.errors(include_url=False)
            counted = [found for found in findings if found["type"] != "too_short" or not found["input"]]
            raise_all([explain(finding, root, file, kind) for finding in counted])  # pydantic counts only valid items
    raise_all([problem for _, problem in problems])
    raise AssertionError


def explain(error: ErrorDetails, root: Node, file: str, kind: type[Record]) -> BuildError:
    """One of pydantic's findings in our words, with its place."""
    keys, context = error["loc"], error.get("ctx", {})
    dotted, node = root.find(keys)
    section, _, info = find_field(keys, kind)
    where = f"{file}:{node.line}: {dotted}"
    if error["type"] == "extra_forbidden":
        return BuildError(f"unknown key {dotted}", where, nearest(str(keys[-1]), section.model_fields))
    hint = (info.description or "").rstrip(".") if info else ""
    if error["type"] == "missing":
        return BuildError(f"{dotted or 'the record'} lacks the key {keys[-1]}", where, f"add {keys[-1]}: {hint}")
    if error["type"] == "rule":
        return BuildError(context["rule"], where, context["fix"])
    phrase = EXPECTED.get(error["type"])
    what = f"{dotted} must be {phrase.format(**context)}, not {node}" if phrase else f"{dotted} cannot be {node}"
    return BuildError(what, where, f"write {hint}" if hint else "write what the key asks for")
