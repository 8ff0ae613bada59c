"""A finished release signed with the publisher's key; on request alone, for it needs what only the publisher has.

A receipt keeps the signature, and the stage `card` puts it beside the payload it is of: a release that is built again
to the same bytes is still signed, and one whose bytes changed is not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from builder.errors import BuildError
from builder.files import digest, write_receipt
from builder.lock import SIGNATURE, name_release, require_lock
from builder.manifest import load_manifest, show_path
from builder.published import Place
from builder.signing import check_folder, sign_folder
from builder.stages import STAGES, card
from builder.stages.stage import hold, hold_folder, is_current, run_stage
from builder.stages.workspace import Workspace

RECEIPT = "sign"


def sign(manifest: Path, build: Path, key: Path, password: str | None) -> dict[str, Any]:
    """Sign a release that is finished and equals its lock, and render its card anew. Returns what the receipt says.

    build: the folder that builds are in. key: a private key, PEM; password: its own, if it is encrypted.
    Raises BuildError if the release is not finished, or for the key; VerifyError if the files are not the locked ones.
    """
    workspace = Workspace(load_manifest(manifest), build / manifest.stem)
    locked = require_lock(workspace.lock_path)
    with hold(workspace):
        require_finished(workspace, locked)
        bundle, key_sha256 = sign_folder(workspace.artifact, list_digests(locked), key, password)
        facts = {"payload_sha256": locked["payload_sha256"], "key_sha256": key_sha256, "bundle": bundle}
        receipt = {"stage": RECEIPT, "key": digest(facts), "facts": facts, "circumstances": {}}
        write_receipt(workspace.receipt_path(RECEIPT), receipt)
        run_stage(workspace, card.STAGE)
    return facts


def require_finished(workspace: Workspace, locked: dict[str, Any]) -> None:
    """Refuse a release of which a step is not done as its manifest says now, or that is not what its lock says."""
    name, where = workspace.manifest.name, show_path(workspace.folder.absolute())
    for stage in STAGES:
        if stage != card.STAGE and not is_current(workspace, stage):
            what = f"{name} is not finished: {stage.name} has not been done, or what it reads has changed since"
            raise BuildError(what, where, f"doit release:{name}")
    if workspace.facts("assemble")["payload_sha256"] != locked["payload_sha256"]:
        fix = f"build it again (doit release:{name}), or release this build as a new one: doit relock:{name}"
        raise BuildError(f"the build of {name} is not the locked one, so it is not signed", where, fix)


def list_digests(locked: dict[str, Any]) -> dict[str, str]:
    return {name: file["sha256"] for name, file in locked["payload"].items()}


def check_signature(lock: Path, build: Path, key: Path, place: Place | None) -> tuple[Path, str]:
    """Check that a folder is a lock's payload and signed by a key. Returns the folder, and the sha256 of the key.

    place: where the files are, if not in the release's own build. Raises BuildError or a child saying what is wrong.
    """
    locked = require_lock(lock)
    if place and place.folder is None:
        fix = f"hf download {place.repo} --revision {place.revision} --local-dir FOLDER, then --with=FOLDER"
        raise BuildError("a signature is checked in a folder, for every file is read", place.where, fix)
    folder = place.folder if place and place.folder else build / name_release(lock) / "artifact"
    return folder, check_folder(folder, list_digests(locked), key)


def clean_signature(build: Path, name: str, *, dry_run: bool) -> tuple[list[Path], int]:
    """Take away a signature, or only look. Returns what goes, and its bytes."""
    left = (build / name / "receipts" / f"{RECEIPT}.json", build / name / "artifact" / SIGNATURE)
    removed = [path for path in left if path.exists()]
    freed = sum(path.stat().st_blocks * 512 for path in removed)
    if removed and not dry_run:
        with hold_folder(build / name, name):
            for path in removed:
                path.unlink(missing_ok=True)
    return removed, freed
