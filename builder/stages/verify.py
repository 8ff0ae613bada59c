"""Stage `verify`: the artifact read as a stranger would read it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from builder.digests import identify_file
from builder.errors import Problems, VerifyError
from builder.lock import BESIDE
from builder.schemes import bind_scheme, divide_linears
from builder.stages.stage import Outcome, Stage, keep_nothing
from builder.stages.workspace import Workspace

SAMPLE = 8


def read(workspace: Workspace) -> Any:
    return {
        "payload": workspace.facts("assemble")["payload"],
        "files": {name: identify_file(workspace.artifact / name) for name in workspace.facts("assemble")["payload"]},
        "base": workspace.facts("fetch")["files"],
        "scheme": [spec.model_dump(mode="json") for spec in workspace.manifest.release.scheme],
        "compatibility": workspace.manifest.release.compatibility.model_dump(mode="json"),
    }


def describe_expected(workspace: Workspace) -> dict[str, Any]:
    """What the artifact is compared with: the plan, the manifest, and what earlier stages recorded."""
    plan, release = workspace.facts("plan"), workspace.manifest.release
    specs = release.scheme
    divided = divide_linears(bind_scheme(workspace.manifest), plan["quantized"])
    return {
        "layout": specs[0].layout,
        "parts": [
            {
                "scheme": spec.name,
                "input_scale": spec.input_scale,
                "block_scale_floor": spec.block_scale_floor is not False,
                "modules": modules,
            }
            for spec, modules in zip(specs, divided, strict=True)
        ],
        "tensors": {
            tensor["name"]: {"dtype": tensor["dtype"], "shape": tensor["shape"], "file": file["name"]}
            for file in plan["files"]
            for tensor in file["tensors"]
        },
        "quantized": plan["quantized"],
        "fused": plan["fused"],
        "ignore": plan["ignore"],
        "unused": plan["unused"],
        "payload": {name: entry["sha256"] for name, entry in workspace.facts("assemble")["payload"].items()},
        "beside": list(BESIDE),
        "input_amax": {
            linear: kinds["input"] for linear, kinds in workspace.facts("calibrate")["amax"].items() if "input" in kinds
        },
        "cache_amax": {
            module: kinds for module, kinds in workspace.facts("calibrate")["amax"].items() if "key" in kinds
        },
        "from_template": release.compatibility.export_template is not None,
        "copied_files": release.compatibility.copied_files,
    }


def run(workspace: Workspace) -> Outcome:
    from builder.verify import verify_artifact

    expected = describe_expected(workspace)
    report = verify_artifact(workspace.artifact, workspace.base_folder(), expected, sample=SAMPLE)
    if report.errors:
        raise Problems(VerifyError(f"{f.check}: {f.what}", f.where, f.fix) for f in report.errors)
    facts = {
        "findings": [asdict(finding) for finding in report.findings],
        "checks": report.checks,
        "loaded_whole": report.loaded_whole,
        "reference_sampled": list(report.reference_sampled),
    }
    return Outcome(facts, {}, tuple(str(finding) for finding in report.findings))


STAGE = Stage("verify", "read the artifact as a stranger would", read, run, keep_nothing)
