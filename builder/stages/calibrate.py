"""Stage `calibrate`: the unquantized model measured, and the health of what was measured."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from builder import lock
from builder.errors import CalibrationError
from builder.files import digest
from builder.plan import Plan
from builder.recorded import (
    RECALIBRATED,
    Circumstances,
    describe_deviations,
    list_deviations,
    require_agreement,
)
from builder.schemes import bind_scheme, list_measured
from builder.schemes.cache import KINDS
from builder.stages.jobs import common_job, describe_jobs, run_jobs
from builder.stages.locked import find_recorded
from builder.stages.plan import make_plan, require_disk
from builder.stages.stage import BUILDER, Outcome, Stage
from builder.stages.workspace import Workspace

SAVE_STATES_EVERY_S = 60.0
TOOLS = ("tokenizers", "torch", "transformers")


def read(workspace: Workspace) -> Any:
    scheme, release = bind_scheme(workspace.manifest), workspace.manifest.release
    if not scheme.measures_inputs and not release.kv_cache:
        return {"measures": False}
    spec = release.calibration
    versions = lock.list_versions()
    cache = {"kv_cache": release.kv_cache} if release.kv_cache else {}
    return cache | {
        "measures": scheme.measures_inputs,
        "calibration": spec and spec.model_dump(mode="json"),
        "data": spec and spec.path and workspace.digest_file(spec.path),
        "base": workspace.facts("fetch")["files"],
        "schemes": [[spec.match, spec.name, spec.ignore] for spec in release.scheme],
        "device": release.device,
        "versions": {tool: versions[tool] for tool in TOOLS},
    }


def run(workspace: Workspace) -> Outcome:
    outcome = measure(workspace)
    locked = find_recorded(workspace, outcome.facts["rows"]) if outcome.facts["rows"] else None
    return take_recorded(workspace, locked, outcome) if locked else outcome


def measure(workspace: Workspace) -> Outcome:
    """What this machine measures, whatever a lock records."""
    scheme = bind_scheme(workspace.manifest)
    if not scheme.measures_inputs and not workspace.manifest.release.kv_cache:
        return Outcome(
            {"rows": None, "amax": {}, "machine_classes": []},
            {"health": [], "skipped": "the scheme needs no statistics of activations"},
        )
    from builder.calibration import Rows, choose_rows
    from builder.worker import merge_amax, read_amax, write_amax

    plan = make_plan(workspace, workspace.base_folder())
    require_disk(workspace, plan)
    folder = workspace.base_folder()
    rows = choose_rows(workspace.manifest, folder)
    reads = read(workspace)
    num_blocks = min(len(plan.shards), len(rows.tokens))
    measured = set(list_measured(scheme, plan.quantized))
    shared = common_job(workspace, folder) | {
        "folder": str(workspace.calibration),
        "save_every_s": SAVE_STATES_EVERY_S,
        "arithmetic": workspace.manifest.release.arithmetic,
        "linears": [[name for name in layer.linears if name in measured] for layer in plan.architecture.layers],
        "attentions": [layer.attention if plan.measures_cache else None for layer in plan.architecture.layers],
    }
    jobs = []
    for block in range(num_blocks):
        own = Rows(rows.tokens[block::num_blocks])
        key = digest({"measured": BUILDER, "rows": own.digest, "reads": reads})  # a block of other rows is another
        job = {"block": block, "num_blocks": num_blocks, "key": key, "rows": [list(row) for row in own.tokens]}
        jobs.append(shared | job | {"weight": sum(map(len, own.tokens)), "memory_bytes": plan.calibrate_memory})
    records = run_jobs(workspace, "builder.worker:measure_rows", jobs)
    amax = merge_amax([read_amax(record["amax"]) for record in records])
    health = check_health(plan, amax, measured)
    lengths = [len(row) for row in rows.tokens]
    machines = sorted({record["machine"] for record in records})
    facts = {
        "rows": {
            "count": len(lengths),
            "num_tokens": sum(lengths),
            "shortest": min(lengths),
            "longest": max(lengths),
            "digest": rows.digest,
        },
        "amax": write_amax(amax),
        "machine_classes": machines if workspace.manifest.release.arithmetic == "native" else [],
    }
    return Outcome(facts, {"health": health, "machines": machines, **describe_jobs(workspace, records)})


def list_circumstances(
    workspace: Workspace, locked: Mapping[str, Any], outcome: Outcome, *, publishes: bool
) -> Circumstances:
    """What may have made the magnitudes that were measured here others than a lock's."""
    changes = lock.compare_versions(locked, lock.list_versions(), BUILDER)
    machines = outcome.circumstances["machines"]
    return Circumstances(workspace.manifest.release.arithmetic, changes, locked["machine_classes"], machines, publishes)


def take_recorded(workspace: Workspace, locked: Mapping[str, Any], outcome: Outcome) -> Outcome:
    """The magnitudes of the release's lock, which make its bytes; those that were measured here are compared with them.

    Raises CalibrationError if they differ at all, or by more than RECALIBRATED under native arithmetic.
    """
    deviations = list_deviations(locked["amax"], outcome.facts["amax"])
    circumstances = list_circumstances(workspace, locked, outcome, publishes=True)
    tolerance = RECALIBRATED if circumstances.arithmetic == "native" else 0.0
    require_agreement(workspace.lock_path, deviations, circumstances, tolerance)
    text = describe_deviations(locked["amax"], deviations)
    found: dict[str, Any] = {"text": text, "num_different": len(deviations)}
    if deviations:
        found |= {"largest_difference": deviations[0].relative, **asdict(deviations[0])}
    recorded = {"amax": locked["amax"], "machine_classes": locked["machine_classes"]}
    return Outcome({**outcome.facts, **recorded}, {**outcome.circumstances, "against_lock": found}, (text,))


def is_intact(workspace: Workspace) -> bool:
    """Whether the magnitudes are still those of the lock, if it is of this release; else, those measured here."""
    facts = workspace.facts("calibrate")
    if facts["rows"] is None:
        return True
    locked = find_recorded(workspace, facts["rows"])
    if locked is None:
        here = workspace.circumstances("calibrate")
        moved = here.get("against_lock", {}).get("num_different", 0) > 0
        return not moved and facts["machine_classes"] in ([], here.get("machines"))
    return all(locked[key] == facts[key] for key in ("amax", "machine_classes"))


def check_health(plan: Plan, amax: Mapping[str, Mapping[str, float]], linears: Collection[str]) -> list[dict[str, Any]]:
    """Count good, zero, nan and missing statistics of each shard: of linears and of KV caches, where they are measured.

    linears: those that have to have some.
    Raises CalibrationError naming the first module whose statistic is not good.
    """
    health: list[dict[str, Any]] = []
    for shard in plan.shards:
        units = [plan.find_unit(name) for name in shard.units]
        measured: dict[str, list[str]] = {}
        if linears:
            own = [linear for unit in units for group in unit.groups for linear in group if linear in linears]
            measured |= {"weight": own, "input": own}
        if plan.measures_cache:
            attentions = [unit.attention for unit in units if unit.attention]
            measured |= dict.fromkeys(KINDS, attentions)
        row: dict[str, Any] = {
            "shard": shard.index,
            "first_layer": shard.first_layer,
            "last_layer": shard.last_layer,
        }
        for kind, modules in measured.items():
            counts = {"planned": len(modules), "good": 0, "zero": 0, "nan": 0, "missing": 0}
            for module in modules:
                value = amax.get(module, {}).get(kind)
                state = judge_amax(value)
                counts[state] += 1
                if state != "good":
                    raise CalibrationError(
                        f"the {kind} statistic of {module} is {state}" + (f" ({value})" if state == "nan" else ""),
                        f"{module}, shard {shard.index + 1} of {len(plan.shards)}",
                        f"see whether the base model's {name_weights(kind, module)} and those before it are sound, "
                        "or give other calibration rows",
                    )
            row[f"{kind}s"] = counts
        health.append(row)
    return health


def name_weights(kind: str, module: str) -> str:
    """What of the base a statistic comes from."""
    return f"weights in {module}" if kind in KINDS else f"{module}.weight"


def judge_amax(value: float | None) -> str:
    """good | zero | nan (or infinite) | missing."""
    if value is None:
        return "missing"
    if value != value or value == float("inf"):
        return "nan"
    return "good" if value > 0 else "zero"


STAGE = Stage("calibrate", "measure the unquantized model, layer by layer", read, run, is_intact)
