"""Stage `lock`: the facts written down, or compared with those of an earlier build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from builder import lock
from builder.errors import BuildError
from builder.files import sha256_file, write_json
from builder.rebuild import compare_lock, renew_lock, upgrade_lock
from builder.stages.locked import describe_inputs, describe_what
from builder.stages.stage import BUILDER, Outcome, Stage
from builder.stages.workspace import Workspace


def read(workspace: Workspace) -> Any:
    return {
        "format": lock.FORMAT,
        "what": lock.describe_what(workspace.manifest),
        "facts": {stage: workspace.facts(stage) for stage in ("fetch", "calibrate", "assemble")},
    }


def gather_lock(workspace: Workspace) -> dict[str, Any]:
    """The lock of what was built, from the receipts."""
    calibrate = workspace.facts("calibrate")
    return lock.make_lock(
        workspace.manifest,
        fixes=tuple(describe_what(workspace)["fixes"]),
        inputs=describe_inputs(workspace, calibrate["rows"]),
        machine_classes=calibrate["machine_classes"],
        amax=calibrate["amax"],
        payload=workspace.facts("assemble")["payload"],
        builder=BUILDER,
    )


def run(workspace: Workspace) -> Outcome:
    path, new = workspace.lock_path, gather_lock(workspace)
    old = read_replaced(path) if workspace.renews else lock.read_lock(path)
    comparison = renew_lock(old, new) if workspace.renews else compare_lock(old, new, path)
    if old and comparison.verdict == "upgraded":
        new = upgrade_lock(old, new)
    if comparison.writes:
        write_json(path, new)
    facts = {
        "path": f"releases/{path.name}",
        "sha256": sha256_file(path),
        "payload_sha256": new["payload_sha256"],
        "versions": new["versions"],
        "machine_class": ", ".join(new["machine_classes"]),
    }
    circumstances = {"verdict": comparison.verdict, "comparison": comparison.text}
    return Outcome(facts, circumstances, (f"lock: {comparison.text}", *(lock.warn_of_format(old) if old else ())))


def read_replaced(path: Path) -> dict[str, Any] | None:
    """A lock that is about to be replaced; None if nothing can be read in it."""
    try:
        return lock.read_lock(path)
    except BuildError:
        return None


def is_intact(workspace: Workspace) -> bool:
    path = workspace.lock_path
    return path.is_file() and sha256_file(path) == workspace.facts("lock")["sha256"]


STAGE = Stage("lock", "write the lock, or compare with it", read, run, is_intact)
