"""Stage `fetch`: the base model's files, at hand and verified."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from builder import lock
from builder.base import begin_hashing, fetch_base, hash_files, list_base_files, locate_base, preview_legal_files
from builder.calibration import require_revision
from builder.digests import identify_file
from builder.errors import BuildError
from builder.rebuild import without_places
from builder.stages.jobs import name_executor
from builder.stages.locked import find_lock
from builder.stages.plan import gather_obligations, make_plan, require_disk
from builder.stages.stage import Outcome, Stage
from builder.stages.workspace import Workspace

LARGE = 1 << 30


def read(workspace: Workspace) -> Any:
    base = locate_base(workspace.manifest)
    files = {name: identify_file(base / name) for name in list_base_files(base)} if base else None
    spec = workspace.manifest.release.base
    return {"model": spec.model, "revision": spec.revision, "path": spec.path, "files": files}


def run(workspace: Workspace) -> Outcome:
    known = workspace.circumstances("fetch").get("files", {})
    if locate_base(workspace.manifest) is None:  # a download of hours
        check_beforehand(workspace)
    folder = fetch_base(workspace.manifest)
    begin_hashing(folder, known)
    if name_executor(workspace) == "in_process":
        import builder.kernels  # noqa: F401  # this process will need it, and has to wait for the digests anyway
    files = dict(hash_files(folder, known, tell_large))
    facts = {name: {"sha256": entry["sha256"], "num_bytes": entry["num_bytes"]} for name, entry in files.items()}
    compare_inputs(workspace, facts)
    changed = sorted(
        name for name, entry in known.items() if name in facts and facts[name]["sha256"] != entry["sha256"]
    )
    base = workspace.manifest.release.base
    return Outcome(
        {"model": base.model, "revision": base.revision, "files": facts},
        {"folder": str(folder.absolute()), "files": files},
        tuple(f"{name} has changed since the last build: what was made from it is made anew" for name in changed),
    )


def check_beforehand(workspace: Workspace) -> None:
    """Refuse what a later stage would stop at: a data set that is not pinned, a disk without room for the result, a
    licence whose text is missing."""
    calibration, plan = workspace.manifest.release.calibration, make_plan(workspace)
    if calibration and calibration.dataset and plan.measures_inputs:
        require_revision(workspace.manifest, calibration)
    require_disk(workspace, plan)
    gather_obligations(workspace, preview_legal_files(workspace.manifest))


def tell_large(name: str, num_bytes: int) -> None:
    """Say what is being read where that takes a while."""
    if num_bytes > LARGE:
        print(f"  reading {name} ({num_bytes / 1e9:.1f} GB) for its digest", flush=True)


def compare_inputs(workspace: Workspace, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a base that differs from the locked one, before any work. Raises BuildError naming the file."""
    locked = find_lock(workspace)
    if locked is None:
        return
    was, now = locked["what"]["base"], lock.describe_what(workspace.manifest)["base"]
    restored = isinstance(workspace.manifest, lock.LockedManifest)
    if not restored and without_places("base", was) != without_places("base", now):
        return
    wanted, renew = locked["inputs"]["base"], f"doit relock:{workspace.manifest.name}"
    for name in sorted(wanted.keys() | files.keys()):
        if name not in files or name not in wanted or files[name]["sha256"] != wanted[name]["sha256"]:
            locked_sha = wanted[name]["sha256"][:12] if name in wanted else "absent"
            found = files[name]["sha256"][:12] if name in files else "absent"
            raise BuildError(
                f"{name} of the base model is not the locked one (sha256 {found}, locked {locked_sha})",
                str(workspace.lock_path),
                f"restore {name}" + ("" if restored else f", or release from the base as it is now: {renew}"),
            )


def is_intact(workspace: Workspace) -> bool:
    files: dict[str, dict[str, Any]] = workspace.circumstances("fetch")["files"]
    folder = workspace.base_folder()
    return all(
        (folder / name).is_file() and identify_file(folder / name) == entry["identity"] for name, entry in files.items()
    )


STAGE = Stage("fetch", "get the base model and verify its files", read, run, is_intact)
