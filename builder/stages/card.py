"""Stage `card`: model card and snippets rendered from the receipts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from builder.base import find_legal_files
from builder.files import canonical_json, sha256_file, write_atomic
from builder.lock import BESIDE, RECORDS, SIGNATURE, require_lock
from builder.provenance import make_statement
from builder.stages.check_serving import list_results
from builder.stages.plan import gather_obligations
from builder.stages.stage import Outcome, Stage
from builder.stages.workspace import Workspace

CARD_AFTER = ("plan", "fetch", "calibrate", "quantize", "assemble", "verify", "perplexity", "lock")


def read(workspace: Workspace) -> Any:
    from builder.render import TEMPLATES

    return {
        "what": workspace.manifest.what(),
        "receipts": {stage: workspace.receipt(stage) for stage in CARD_AFTER},
        "reproductions": list_reproductions(workspace),
        "engines": list_results(workspace),
        "results": {name: workspace.digest_file(name) for name in sorted(list_result_files(workspace))},
        "signature": find_signature(workspace),
        "templates": {path.name: sha256_file(path) for path in sorted(TEMPLATES.iterdir()) if path.is_file()},
    }


def list_result_files(workspace: Workspace) -> set[str]:
    """The files of results that the manifest names."""
    release = workspace.manifest.release
    evaluated = {name for entry in release.evaluation for name in (entry.base, entry.quantized)}
    return evaluated | {entry.file for entry in release.benchmarks}


def list_reproductions(workspace: Workspace) -> list[dict[str, Any]]:
    """What rebuilds of this very payload came to, the latest of each tier."""
    receipt = workspace.receipt("reproduce")
    results = receipt["facts"]["results"] if receipt else []
    payload = workspace.facts("assemble")["payload_sha256"]
    return [result for result in results if result["payload_sha256"] == payload]


def find_signature(workspace: Workspace) -> dict[str, Any] | None:
    """The signature of this very payload. One of another payload stays in its receipt and goes nowhere."""
    receipt = workspace.receipt("sign")
    payload = workspace.facts("assemble")["payload_sha256"]
    return receipt["facts"] if receipt and receipt["facts"]["payload_sha256"] == payload else None


def attest(workspace: Workspace) -> dict[str, str]:
    """The files about the payload that are no part of it: lock, provenance, what others made of it, signature."""
    lock = require_lock(workspace.lock_path)
    reproductions, engines = list_reproductions(workspace), list_results(workspace)
    contents = (
        lock,
        make_statement(lock),
        {"reproductions": reproductions} if reproductions else None,
        {"engines": engines} if engines else None,
    )
    files = {name: canonical_json(content) for name, content in zip(RECORDS, contents, strict=True) if content}
    signature = find_signature(workspace)
    return files | ({SIGNATURE: signature["bundle"]} if signature else {})


def run(workspace: Workspace) -> Outcome:
    from builder.render import render_card

    receipts = {stage: receipt for stage in CARD_AFTER if (receipt := workspace.receipt(stage))}
    obligations = gather_obligations(workspace, find_legal_files(workspace.base_folder()))
    signature, engines = find_signature(workspace), list_results(workspace)
    files = render_card(workspace.manifest, receipts, obligations, list_reproductions(workspace), engines, signature)
    files |= attest(workspace)
    for name in set(BESIDE) - files.keys():
        (workspace.artifact / name).unlink(missing_ok=True)
    write_files(workspace.artifact, files)
    name = workspace.manifest.name
    lines = (f"warning: the signature there is was of another payload; `doit sign:{name}` makes a new one",)
    stale = signature is None and workspace.receipt("sign") is not None
    facts = {"files": {name: sha256_file(workspace.artifact / name) for name in sorted(files)}}
    return Outcome(facts, {}, lines if stale else ())


def write_files(folder: Path, files: Mapping[str, str]) -> None:
    """Write rendered files into a folder; scripts can be run."""
    for name, text in files.items():
        write_atomic(folder / name, text)
        if name.endswith(".sh"):
            (folder / name).chmod(0o755)


def is_intact(workspace: Workspace) -> bool:
    files = workspace.facts("card")["files"]
    return all(
        (workspace.artifact / name).is_file() and sha256_file(workspace.artifact / name) == sha
        for name, sha in files.items()
    )


STAGE = Stage("card", "render model card, snippets and notices", read, run, is_intact)
