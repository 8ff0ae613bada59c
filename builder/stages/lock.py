"""Stage `lock`: the facts written down, or compared with those of an earlier build."""

from __future__ import annotations

from typing import Any

from builder import lock
from builder.files import sha256_file, write_json
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
    from builder.fixes import bind_fixes

    calibrate, assemble = workspace.facts("calibrate"), workspace.facts("assemble")
    release, rows = workspace.manifest.release, calibrate["rows"]
    inputs: dict[str, Any] = {"base": workspace.facts("fetch")["files"]}
    if rows is not None:
        inputs["token_ids_sha256"] = rows["digest"]
        inputs["num_rows"] = rows["count"]
    if rows is not None and release.calibration and release.calibration.path:
        inputs["calibration_sha256"] = workspace.digest_file(release.calibration.path)
    if release.base.license_files:
        texts = release.base.license_files.items()
        inputs["license_files"] = {name: workspace.digest_file(path) for name, path in texts}
    return lock.make_lock(
        workspace.manifest,
        fixes=tuple(fix.name for fix in bind_fixes(workspace.manifest)),
        inputs=inputs,
        machine_classes=calibrate["machine_classes"],
        amax=calibrate["amax"],
        payload=assemble["payload"],
        builder=BUILDER,
    )


def run(workspace: Workspace) -> Outcome:
    old, new = lock.read_lock(workspace.lock_path), gather_lock(workspace)
    comparison = lock.compare_lock(old, new, workspace.lock_path)
    if comparison.writes:
        write_json(workspace.lock_path, new)
    facts = {
        "path": f"releases/{workspace.lock_path.name}",
        "sha256": sha256_file(workspace.lock_path),
        "payload_sha256": new["payload_sha256"],
        "versions": new["versions"],
        "machine_class": ", ".join(new["machine_classes"]),
    }
    circumstances = {"verdict": comparison.verdict, "comparison": comparison.text}
    return Outcome(facts, circumstances, (f"lock: {comparison.text}", *(lock.warn_of_format(old) if old else ())))


def is_intact(workspace: Workspace) -> bool:
    path = workspace.lock_path
    return path.is_file() and sha256_file(path) == workspace.facts("lock")["sha256"]


STAGE = Stage("lock", "write the lock, or compare with it", read, run, is_intact)
