"""Stage `card`: model card and snippets rendered from the receipts."""

from __future__ import annotations

from typing import Any

from builder.files import sha256_file, write_atomic
from builder.stages.assemble import gather_obligations
from builder.stages.stage import Outcome, Stage
from builder.stages.workspace import Workspace

CARD_AFTER = ("plan", "fetch", "calibrate", "quantize", "assemble", "verify", "perplexity", "lock")


def read(workspace: Workspace) -> Any:
    from builder.render import TEMPLATES

    return {
        "what": workspace.manifest.what(),
        "receipts": {stage: workspace.receipt(stage) for stage in CARD_AFTER},
        "templates": {path.name: sha256_file(path) for path in sorted(TEMPLATES.iterdir()) if path.is_file()},
    }


def run(workspace: Workspace) -> Outcome:
    from builder.render import render_card

    receipts = {stage: receipt for stage in CARD_AFTER if (receipt := workspace.receipt(stage))}
    files = render_card(workspace.manifest, receipts, gather_obligations(workspace, workspace.base_folder()))
    for name, text in files.items():
        write_atomic(workspace.artifact / name, text)
        if name.endswith(".sh"):
            (workspace.artifact / name).chmod(0o755)
    return Outcome({"files": {name: sha256_file(workspace.artifact / name) for name in sorted(files)}}, {})


def is_intact(workspace: Workspace) -> bool:
    files = workspace.facts("card")["files"]
    return all(
        (workspace.artifact / name).is_file() and sha256_file(workspace.artifact / name) == sha
        for name, sha in files.items()
    )


STAGE = Stage("card", "render model card, snippets and notices", read, run, is_intact)
