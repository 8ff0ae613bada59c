"""The revisions that a manifest leaves open: asked of the Hub, and written into the manifest's own text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import ValidationError

from builder import hub
from builder.errors import BuildError, ManifestError
from builder.files import write_atomic
from builder.manifest import Manifest, Release, read_nodes, show_path

MARK = re.compile(r"(?P<indent>\s*)(# revision: to be pinned.*|revision:\s*(#.*)?)")


@dataclass(frozen=True)
class Pin:
    """A repository that a section of the manifest names by `key`, without a revision."""

    section: str
    key: str
    repo: str
    kind: hub.Kind


def find_open(manifest: Manifest) -> Iterator[Pin]:
    """What has no revision yet: the base unless it is a folder, and a data set of the Hub."""
    base, calibration = manifest.release.base, manifest.release.calibration
    if base.model and not base.path and not base.revision:
        yield Pin("base", "model", base.model, "model")
    if calibration and calibration.dataset and not calibration.revision:
        yield Pin("calibration", "dataset", calibration.dataset, "dataset")


def pin_manifest(manifest: Manifest) -> dict[str, str]:
    """Write the Hub's current commit of everything that is open into the manifest: {repository: commit}.

    All else in the file stays as it is, but for lines that say "# revision: to be pinned", which these take the place
    of. Nothing is written unless the manifest then reads as before, with these revisions.
    Raises BaseError if the Hub cannot be asked, ManifestError if the text has no place for a revision.
    """
    pins = list(find_open(manifest))
    found = {pin: hub.find_commit(pin.repo, kind=pin.kind, where=manifest.where(pin.section, pin.key)) for pin in pins}
    text = manifest.path.read_bytes().decode("utf-8")
    for pin, commit in found.items():
        text = write_revision(manifest, text, pin, commit)
    if text.encode() != manifest.path.read_bytes():
        write_atomic(manifest.path, text)
    return {pin.repo: commit for pin, commit in found.items()}


def write_revision(manifest: Manifest, text: str, pin: Pin, commit: str) -> str:
    """The manifest's text with one more revision."""
    root, _ = read_nodes(text.encode(), show_path(manifest.path))
    before = Release.model_validate(root.content)
    section = getattr(before, pin.section).model_copy(update={"revision": commit})
    for changed in propose_texts(text, root.find((pin.section, pin.key))[1].line, pin, commit):
        try:
            after = Release.model_validate(read_nodes(changed.encode(), "")[0].content)
        except (BuildError, ValidationError):
            continue
        if after == before.model_copy(update={pin.section: section}):
            return changed
    raise ManifestError(
        f"there is no line for the revision of {pin.repo}",
        manifest.where(pin.section, pin.key),
        f"add to {pin.section}: revision: {commit}",
    )


def propose_texts(text: str, line: int, pin: Pin, commit: str) -> Iterator[str]:
    """Where a revision could stand: in a marked or empty line, below the repository's name, behind it.

    line: of the repository's name, from 1.
    """
    lines = text.splitlines(keepends=True)
    for index, found in enumerate(lines):
        if match := MARK.fullmatch(found.rstrip("\r\n")):
            yield "".join([*lines[:index], f"{match['indent']}revision: {commit}{end_of(found)}", *lines[index + 1 :]])
    found = lines[line - 1]
    indent = found[: len(found) - len(found.lstrip())]
    yield "".join([*lines[:line], f"{indent}revision: {commit}{end_of(found)}", *lines[line:]])
    behind = re.sub(rf"(\b{pin.key}:\s*[\"']?{re.escape(pin.repo)}[\"']?)", rf"\1, revision: {commit}", found, count=1)
    yield "".join([*lines[: line - 1], behind, *lines[line:]])


def end_of(line: str) -> str:
    """A line's own end; a last line that has none gets one."""
    return line[len(line.rstrip("\r\n")) :] or "\n"
