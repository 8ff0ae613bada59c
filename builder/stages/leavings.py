"""What stages leave in a release's own folder besides their receipts, and how the disk gets it back."""

from __future__ import annotations

import shutil
from collections import Counter
from contextlib import suppress
from pathlib import Path

from builder.errors import BuildError
from builder.lock import BESIDE
from builder.progress import SUFFIX
from builder.stages.workspace import Workspace

PREVIEW = "preview"
LEFT = {
    "calibrate": ("calibration",),
    "quantize": ("parts",),
    "assemble": ("draft", "artifact.old", "artifact"),
    "card": (*(f"artifact/{name}" for name in BESIDE), PREVIEW),
}
HELD = ".held"
TRIFLES = {HELD, "traceback.txt"}


def list_leavings(workspace: Workspace, stage: str) -> list[Path]:
    """What a stage left, as far as it is there. Raises BuildError if it is a link to another place."""
    found = [path for name in LEFT.get(stage, ()) if (path := workspace.folder / name).exists()]
    for path in found:
        if path.is_symlink():
            fix = "empty the place it leads to yourself, and remove the link"
            raise BuildError(f"{path.name} is a link to {path.readlink()}, where nothing is removed", str(path), fix)
    return found


def remove_leavings(workspace: Workspace, stage: str) -> None:
    """Take away what a stage left; nothing outside the release's own folder is touched."""
    for path in list_leavings(workspace, stage):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def count_freed(path: Path, links: Counter[int]) -> int:
    """Bytes that the disk has back when a file or folder is removed: a file counts when its last name goes.

    links: how many names of each inode went before; these are added.
    """
    freed = 0
    for file in [path, *path.rglob("*")]:
        status = file.lstat()
        links[status.st_ino] += 1
        if file.is_dir() or links[status.st_ino] >= status.st_nlink:
            freed += status.st_blocks * 512
    return freed


def remove_empty_folder(workspace: Workspace) -> None:
    """Take away a release's own folder if nothing that stages left is in it any more."""
    with suppress(OSError):  # there are other receipts
        workspace.receipts.rmdir()
    if all(path.name in TRIFLES or path.name.endswith(SUFFIX) for path in workspace.folder.iterdir()):
        for path in workspace.folder.iterdir():
            path.unlink()
        workspace.folder.rmdir()
