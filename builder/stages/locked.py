"""The lock that a build finds: whether it is of the same release, and what it records then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from builder import lock
from builder.rebuild import list_changed
from builder.stages.workspace import Workspace


def find_lock(workspace: Workspace) -> dict[str, Any] | None:
    """The lock that a build is compared with; none where it is to be written again from the build.

    Raises BuildError if there is one that cannot be read.
    """
    return None if workspace.renews else lock.read_lock(workspace.lock_path)


def describe_what(workspace: Workspace) -> dict[str, Any]:
    """The release as a lock describes it, with the fixes that belong to its scheme."""
    from builder.fixes import bind_fixes

    return lock.describe_what(workspace.manifest) | {"fixes": [fix.name for fix in bind_fixes(workspace.manifest)]}


def describe_inputs(workspace: Workspace, rows: Mapping[str, Any] | None) -> dict[str, Any]:
    """The digests of what goes into a release.

    rows: what is known of the calibration rows (count, digest of their token ids), if there are any.
    """
    release, inputs = workspace.manifest.release, dict[str, Any](base=workspace.facts("fetch")["files"])
    if rows is not None:
        inputs |= {"token_ids_sha256": rows["digest"], "num_rows": rows["count"]}
        if release.calibration and release.calibration.path:
            inputs["calibration_sha256"] = workspace.digest_file(release.calibration.path)
    if release.base.license_files:
        texts = release.base.license_files.items()
        inputs["license_files"] = {name: workspace.digest_file(path) for name, path in texts}
    return inputs


def find_recorded(workspace: Workspace, rows: Mapping[str, Any]) -> dict[str, Any] | None:
    """The lock, if it is of this very release and these inputs: then what it records of calibration holds."""
    locked = find_lock(workspace)
    if locked is None or list_changed(locked, describe_what(workspace), describe_inputs(workspace, rows)):
        return None
    return locked
