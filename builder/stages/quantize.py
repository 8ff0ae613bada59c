"""Stage `quantize`: every planned file finished, or its pieces at hand."""

from __future__ import annotations

import shutil
from typing import Any

from builder.errors import BuildError
from builder.files import digest, read_json, write_json
from builder.stages.jobs import common_job, describe_jobs, run_jobs
from builder.stages.plan import make_plan
from builder.stages.stage import BUILDER, Outcome, Stage
from builder.stages.workspace import Workspace


def read(workspace: Workspace) -> Any:
    release = workspace.manifest.release
    return {
        "base": workspace.facts("fetch")["files"],
        "scheme": [spec.model_dump(mode="json") for spec in release.scheme],
        "files": release.files.model_dump(mode="json"),
        "amax": workspace.facts("calibrate")["amax"],
    }


def key_of_parts(workspace: Workspace) -> str:
    """The key that finished files and pieces bear; it knows nothing of shards or executors."""
    return digest({"parts": BUILDER, "reads": read(workspace)})


def run(workspace: Workspace) -> Outcome:
    from builder.worker import FILE, UNIT

    plan, key = make_plan(workspace, workspace.base_folder()), key_of_parts(workspace)
    drop_stale_parts(workspace, key)
    shared = common_job(workspace, workspace.base_folder()) | {"folder": str(workspace.parts), "key": key}
    amax, jobs = workspace.facts("calibrate")["amax"], []
    for shard in plan.shards:
        units = [plan.find_unit(name) for name in shard.units]
        linears = {linear for unit in units for group in unit.groups for linear in group}
        jobs.append(
            shared
            | {
                "shard": shard.index,
                "num_shards": len(plan.shards),
                "units": [UNIT.dump_python(unit, mode="json") for unit in units],
                "files": [FILE.dump_python(file, mode="json") for file in plan.files],
                "amax": {linear: kinds for linear, kinds in amax.items() if linear in linears},
            }
        )
    records = run_jobs(workspace, "builder.worker:quantize_layers", jobs)
    for shard, record in zip(plan.shards, records, strict=True):
        if record["num_quantizers"] != shard.num_quantizers:
            raise BuildError(
                f"shard {shard.index + 1} quantized {record['num_quantizers']} linears, not {shard.num_quantizers}",
                "quantize",
                "this is a defect of the builder: please report it",
            )
    return Outcome({"parts": key}, describe_jobs(workspace, records))


def drop_stale_parts(workspace: Workspace, key: str) -> None:
    """Remove finished files and pieces of another release under this name."""
    mark = workspace.parts / "key.json"
    if read_json(mark) != {"key": key} and workspace.parts.exists():
        shutil.rmtree(workspace.parts)
    write_json(mark, {"key": key})


def is_intact(workspace: Workspace) -> bool:
    """Whether every planned file is there, finished or in pieces."""
    from builder.artifact import read_record
    from builder.worker import UNITS

    key, parts = workspace.facts("quantize")["parts"], workspace.parts
    return all(
        read_record(parts / file["name"], key)
        or all(read_record(parts / UNITS / f"{unit}.safetensors", key) for unit in file["units"])
        for file in workspace.facts("plan")["files"]
    )


STAGE = Stage("quantize", "quantize layer by layer into the planned files", read, run, is_intact)
