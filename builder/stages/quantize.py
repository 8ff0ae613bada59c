"""Stage `quantize`: every planned file finished, or its pieces at hand."""

from __future__ import annotations

import shutil
from typing import Any

from builder.digests import identify_file
from builder.errors import BuildError
from builder.files import digest, read_json, write_json
from builder.stages.jobs import common_job, describe_jobs, run_jobs
from builder.stages.plan import make_plan, require_disk
from builder.stages.stage import BUILDER, Outcome, Stage
from builder.stages.workspace import Workspace


def read(workspace: Workspace) -> Any:
    release = workspace.manifest.release
    cache = {"kv_cache": release.kv_cache} if release.kv_cache else {}  # parts from before there was any stay valid
    return cache | {
        "base": workspace.facts("fetch")["files"],
        "scheme": [spec.model_dump(mode="json") for spec in release.scheme],
        "files": release.files.model_dump(mode="json"),
        "header_metadata": release.compatibility.header_metadata,
        "amax": workspace.facts("calibrate")["amax"],
    }


def key_of_parts(workspace: Workspace) -> str:
    """The key that finished files and pieces bear; it knows nothing of shards or executors."""
    return digest({"parts": BUILDER, "reads": read(workspace)})


def run(workspace: Workspace) -> Outcome:
    from builder.worker import FILE, UNIT

    plan, key = make_plan(workspace, workspace.base_folder()), key_of_parts(workspace)
    drop_stale_parts(workspace, key)
    take_back(workspace, key)
    require_disk(workspace, plan)
    shared = common_job(workspace, workspace.base_folder()) | {"folder": str(workspace.parts), "key": key}
    amax, jobs = workspace.facts("calibrate")["amax"], []
    for shard in plan.shards:
        units = [plan.find_unit(name) for name in shard.units]
        measured = {linear for unit in units for group in unit.groups for linear in group}
        measured |= {unit.attention for unit in units if unit.attention}
        jobs.append(
            shared
            | {
                "shard": shard.index,
                "num_shards": len(plan.shards),
                "weight": sum(unit.num_bytes for unit in units),
                "memory_bytes": plan.quantize_memory,
                "units": [UNIT.dump_python(unit, mode="json") for unit in units],
                "files": [FILE.dump_python(file, mode="json") for file in plan.files],
                "amax": {module: kinds for module, kinds in amax.items() if module in measured},
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


def find_placed(workspace: Workspace, key: str) -> dict[str, str]:
    """The sha256 of finished files that are where `assemble` put them, untouched since, by name."""
    left = workspace.circumstances("assemble").get("parts", {"key": None})
    if left["key"] != key:
        return {}
    return {
        name: entry["sha256"]
        for name, entry in left["files"].items()
        if (workspace.artifact / name).is_file() and identify_file(workspace.artifact / name) == entry["identity"]
    }


def take_back(workspace: Workspace, key: str) -> None:
    """Let finished files that only the artifact has be parts again, without moving a byte."""
    from builder.artifact import link_file
    from builder.parts import read_record, record_file

    for name, sha256 in find_placed(workspace, key).items():
        part = workspace.parts / name
        if read_record(part, key) is None:
            part.unlink(missing_ok=True)
            link_file(workspace.artifact / name, part)
            record_file(part, key, sha256, part.stat().st_size)


def drop_parts(workspace: Workspace) -> None:
    """Take away the parts that the artifact has."""
    from builder.parts import RECORD

    for name in find_placed(workspace, key_of_parts(workspace)):
        (workspace.parts / f"{name}{RECORD}").unlink(missing_ok=True)
        (workspace.parts / name).unlink(missing_ok=True)


def is_intact(workspace: Workspace) -> bool:
    """Whether every planned file is there: finished, in pieces, or in the artifact."""
    from builder.parts import UNITS, read_record

    key, parts = workspace.facts("quantize")["parts"], workspace.parts
    placed = find_placed(workspace, key)
    return all(
        file["name"] in placed
        or read_record(parts / file["name"], key)
        or all(read_record(parts / UNITS / f"{unit}.safetensors", key) for unit in file["units"])
        for file in workspace.facts("plan")["files"]
    )


STAGE = Stage("quantize", "quantize layer by layer into the planned files", read, run, is_intact)
