"""A lock written again from a build of its release, where the publisher wants another than there is.

The release is built as if it had no lock: measured here, compared with nothing. The lock itself is replaced at the end,
in one step, so that an interrupted run leaves it as it was. What it said is in version control.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from builder.manifest import load_manifest
from builder.stages import STAGES, lock
from builder.stages.stage import hold, is_current, run_stage
from builder.stages.workspace import Workspace


def relock(manifest: Path, build: Path, *, tell: Callable[[str], None] = print) -> str:
    """Build a release without regard to its lock, and replace that. Returns what became another in it.

    build: the folder that builds are in. Raises BuildError as the stages do.
    """
    workspace = Workspace(load_manifest(manifest), build / manifest.stem, renews=True)
    with hold(workspace):
        for stage in STAGES:
            if stage != lock.STAGE and is_current(workspace, stage):
                continue
            tell(f"{stage.name}:{workspace.manifest.name}: {stage.title}")
            for line in run_stage(workspace, stage):
                tell(f"  {line}")
    text: str = workspace.circumstances(lock.STAGE.name)["comparison"]
    return text
