"""A release built again from its lock alone, into a folder of its own, and every file compared.

It is no stage, but made of them. Tier 1 is exact anywhere: from the recorded amax table, and under exact arithmetic
calibrated again too. Native arithmetic has two more: 2, calibrated again on the same class of machine, is exact; 3,
calibrated again elsewhere, agrees within `RECALIBRATED`. The recorded table shows that the export is honest, not that
the calibration was.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from builder import lock
from builder.base import find_dtype, open_checkpoint
from builder.differences import Difference, trace_file
from builder.digests import DIGESTER
from builder.errors import BuildError, CalibrationError, Problems, VerifyError, raise_all
from builder.files import digest, read_receipt, write_receipt
from builder.floats import FLOATS, STORED
from builder.manifest import load_manifest, show_path
from builder.published import Place, Verdict, compare_published
from builder.recorded import RECALIBRATED, count_inputs, list_deviations, require_agreement
from builder.schemes import bind_scheme, list_measured
from builder.stages import assemble, calibrate, fetch, plan, quantize
from builder.stages.jobs import choose_device, name_executor
from builder.stages.leavings import count_freed, remove_leavings
from builder.stages.plan import make_plan
from builder.stages.stage import BUILDER, Outcome, Stage, hold, hold_folder, is_current, keep_nothing, run_stage
from builder.stages.workspace import Workspace

FOLDER = "_reproduced"  # below the build folder; a release's name cannot begin so
RECEIPT = "reproduce"
LISTED = 5  # differences that are told one by one


def reproduce(
    path: Path,
    build: Path,
    *,
    recalibrate: bool = False,
    base: Path | None = None,
    original: Path | None = None,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Build a release from its lock, compare every file, and leave a receipt. Returns what it came to.

    path: the lock. build: the folder that builds are in. base: where the base is on this machine, if not where the lock
    says. original: the published files, to which a difference is traced; else those of this release's own build.
    Raises BuildError, before anything large is read, if inputs or tools differ in a way that can change bytes, and
    VerifyError or Problems if the files do.
    """
    clock, locked = time.monotonic(), lock.require_lock(path)
    for line in lock.warn_of_format(locked):
        tell(line)
    compare_tools(locked, path, 2 if recalibrate else 1, tell)
    manifest = lock.restore_manifest(locked, path, how=read_how(path), base=base)
    workspace = Workspace(manifest, build / FOLDER / manifest.name)
    compare_texts(workspace, locked, path, recalibrate)
    with hold(workspace):
        if workspace.receipt(RECEIPT):  # the last one came to its end: this is another one
            clean(workspace)
        for stage in list_stages(locked, recalibrate):
            if not is_current(workspace, stage):
                tell(f"  {stage.name}: {stage.title}")
                run_stage(workspace, stage)
        artifact = build / manifest.name / "artifact"
        original = original or (artifact if artifact.is_dir() else None)
        result = judge(workspace, locked, path, original)
        result |= {
            "lock_sha256": digest(locked),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - clock, 1),
            "executor": name_executor(workspace),
        }
        write_receipt(
            workspace.receipt_path(RECEIPT), {"stage": RECEIPT, "key": result["payload_sha256"], "facts": result}
        )
    record(build / manifest.name, result)
    return result


def read_how(path: Path) -> dict[str, Any]:
    """Shards, executor and device of the release's manifest if it is there; they change no byte."""
    try:
        release = load_manifest(path.with_name(f"{lock.name_release(path)}.yaml")).release
    except BuildError:
        return {}
    return {"shards": release.shards, "executor": release.executor, "device": release.device}


def clean(workspace: Workspace) -> None:
    """Take away what an earlier reproduction left."""
    for receipt in sorted(workspace.receipts.glob("*.json"), reverse=True):
        receipt.unlink()
        remove_leavings(workspace, receipt.stem)


def clean_reproduction(build: Path, name: str, *, dry_run: bool) -> tuple[list[Path], int]:
    """Take away what was built from a lock, and the record of it; or only look. Returns what goes, and its bytes."""
    folder, links = build / FOLDER / name, Counter[int]()
    removed = [path for path in (build / name / "receipts" / f"{RECEIPT}.json", folder) if path.exists()]
    freed = sum(count_freed(path, links) for path in removed)
    if removed and not dry_run:
        with hold_folder(folder, name):
            (build / name / "receipts" / f"{RECEIPT}.json").unlink(missing_ok=True)
            shutil.rmtree(folder)
    return removed, freed


def record(folder: Path, result: Mapping[str, Any]) -> None:
    """Leave the result where the card finds it, which shows those of its payload: the latest of each tier and class."""
    path = folder / "receipts" / f"{RECEIPT}.json"
    receipt = read_receipt(path)
    before = receipt["facts"]["results"] if receipt else []
    latest = {
        (other["tier"], other.get("recalibrated", other["tier"] > 1), other["machine_class"]): other
        for other in [*before, dict(result)]
    }
    results = [latest[key] for key in sorted(latest)]
    facts = {"results": results}
    write_receipt(path, {"stage": RECEIPT, "key": digest(facts), "facts": facts, "circumstances": {}})


# --- before any work --------------------------------------------------------------------------------------------------


def compare_tools(locked: Mapping[str, Any], path: Path, tier: int, tell: Callable[[str], None]) -> None:
    """Say which tools differ from the lock's; refuse those that may change the bytes of this tier."""
    problems: list[BuildError] = []
    for change in lock.compare_versions(locked, lock.list_versions(), BUILDER):
        if change.tier is None or change.tier > tier:
            tell(f"  {change}; that is no hindrance")
            continue
        fix = f"install what it was made with: `doit pin:{lock.name_release(path)}` writes the versions and says how"
        keys = ("versions", change.tool) if change.tool in locked["versions"] else ("builder",)
        problems.append(BuildError(str(change), lock.point_at(path, *keys), fix))
    raise_all(problems)


def compare_texts(workspace: Workspace, locked: Mapping[str, Any], path: Path, recalibrate: bool) -> None:
    """Refuse calibration data or licence texts that are not the locked ones; `fetch` compares the base's files."""
    release, inputs = workspace.manifest.release, locked["inputs"]
    wanted: list[tuple[tuple[str, ...], str, str | None]] = [
        (("license_files", name), file, inputs.get("license_files", {}).get(name))
        for name, file in release.base.license_files.items()
    ]
    if recalibrate and release.calibration and release.calibration.path and "calibration_sha256" in inputs:
        wanted.append((("calibration_sha256",), release.calibration.path, inputs["calibration_sha256"]))
    problems: list[BuildError] = []
    for keys, file, sha256 in wanted:
        found = workspace.digest_file(file)
        if found != sha256:
            ours, theirs = (text[:12] if text else "absent" for text in (found, sha256))
            where = lock.point_at(path, "inputs", *keys)
            what = f"{file} is not the locked one (sha256 {ours}, locked {theirs})"
            problems.append(BuildError(what, where, f"restore {workspace.manifest.resolve(file)}"))
    raise_all(problems)


# --- the build --------------------------------------------------------------------------------------------------------


def list_stages(locked: Mapping[str, Any], recalibrate: bool) -> tuple[Stage, ...]:
    """The stages that make the payload; in tier 1 the lock's table stands in for a calibration."""
    measure = replace(calibrate.STAGE, run=partial(measure_again, locked), intact=keep_nothing)
    if not recalibrate:
        measure = Stage(
            "calibrate",
            "take the recorded magnitudes, and compare those of weights with the base",
            lambda workspace: {"recorded": locked["amax"], "base": workspace.facts("fetch")["files"]},
            partial(take_recorded, locked),
            keep_nothing,
        )
    lay_out = replace(plan.STAGE, run=partial(plan.run, with_data=recalibrate))
    return (lay_out, fetch.STAGE, measure, quantize.STAGE, assemble.STAGE)


def measure_again(locked: Mapping[str, Any], workspace: Workspace) -> Outcome:
    """A calibration of this machine, where it is what its tier promises.

    Raises CalibrationError naming the worst magnitude if it is not, VerifyError for other rows.
    """
    outcome = calibrate.measure(workspace)
    if outcome.facts["rows"] is None:
        return outcome
    compare_rows(outcome.facts, locked, workspace.lock_path)
    circumstances = calibrate.list_circumstances(workspace, locked, outcome, publishes=False)
    tolerance = RECALIBRATED if find_tier(workspace, locked, outcome.facts) == 3 else 0.0
    deviations = list_deviations(locked["amax"], outcome.facts["amax"])
    require_agreement(workspace.lock_path, deviations, circumstances, tolerance)
    return outcome


def find_tier(workspace: Workspace, locked: Mapping[str, Any], measured: Mapping[str, Any]) -> int:
    """The tier of magnitudes that were measured again: facts of a calibration."""
    if workspace.manifest.release.arithmetic == "exact":
        return 1
    same_class = measured["machine_classes"] == locked["machine_classes"]
    same_torch = lock.list_versions()["torch"] == locked["versions"].get("torch")
    return 2 if same_class and same_torch else 3


def take_recorded(locked: Mapping[str, Any], workspace: Workspace) -> Outcome:
    """The lock's amax table in place of a calibration's, where the scheme needs one."""
    layout, scheme = make_plan(workspace, workspace.base_folder()), bind_scheme(workspace.manifest)
    if not layout.measures:
        return calibrate.run(workspace)
    amax = {
        linear: {kind: float.fromhex(text) for kind, text in kinds.items()} for linear, kinds in locked["amax"].items()
    }
    measured = list_measured(scheme, layout.quantized)
    calibrate.check_health(layout, amax, measured)
    compare_weights(workspace, measured, amax)
    return Outcome({"rows": None, "amax": locked["amax"], "machine_classes": locked["machine_classes"]}, {})


def compare_weights(workspace: Workspace, linears: Sequence[str], amax: Mapping[str, Mapping[str, float]]) -> None:
    """Refuse a table whose weights are not the base's: their largest magnitudes are the same on any machine.

    They were measured in the model's dtype, to which a weight of another one was rounded.
    """
    from builder.kernels import max_magnitude

    base = open_checkpoint(workspace.base_folder(), "the base model")
    dtype = FLOATS[STORED[find_dtype(base.config)]]
    for linear in linears:
        largest = np.array(max_magnitude(base.load_array(f"{linear}.weight")), np.float32)
        found = dtype.read(dtype.round(largest))
        if found != amax[linear]["weight"]:
            raise CalibrationError(
                f"the largest weight of {linear} is {found}, but the lock's table has {amax[linear]['weight']}",
                lock.point_at(workspace.lock_path, "amax", linear, "weight"),
                lock.RESTORE,
            )


# --- what it came to --------------------------------------------------------------------------------------------------


def judge(workspace: Workspace, locked: Mapping[str, Any], path: Path, original: Path | None) -> dict[str, Any]:
    """Tier and outcome of a rebuild. Raises VerifyError, or Problems, if it is not what that tier promises."""
    payload, found = locked["payload"], hash_files(workspace)
    different = sorted(name for name in payload.keys() | found.keys() if payload.get(name) != found.get(name))
    measured, machines = workspace.facts("calibrate"), workspace.circumstances("calibrate").get("machines")
    recalibrated = machines is not None
    tier = find_tier(workspace, locked, measured) if recalibrated else 1
    machine = ", ".join(machines) if machines else describe_machine(workspace)
    result = {"tier": tier, "machine_class": machine, "payload_sha256": locked["payload_sha256"]}
    result |= {"recalibrated": recalibrated, "num_files": len(payload), "different": different}
    if not different:
        text = f"all {len(payload)} files are the same, bit for bit"
        text = f"calibrated again, {text}" if recalibrated else text
        return result | {"verdict": "equal", "largest_difference": 0.0, "text": text}
    deviations = list_deviations(locked["amax"], measured["amax"])
    unexplained = [name for name in different if not (tier == 3 and deviations and name.endswith(".safetensors"))]
    if unexplained:
        raise explain_differences(workspace, locked, path, found, unexplained, original)
    largest = deviations[0].relative
    text = (
        f"calibrated again, {len(deviations)} of {count_inputs(locked['amax'])} input magnitudes differ from those of "
        f"{', '.join(locked['machine_classes'])}, by {100 * largest:.2f} % at most at {deviations[0].module}; "
        f"{len(payload) - len(different)} of {len(payload)} files are the same, bit for bit"
    )
    return result | {"verdict": "within tolerance", "largest_difference": largest, "text": text}


def hash_files(workspace: Workspace) -> dict[str, dict[str, Any]]:
    """Every file of the rebuilt payload, read back from the disk."""
    names = sorted(workspace.facts("assemble")["payload"])
    DIGESTER.begin(workspace.artifact / name for name in names)
    return {
        name: {
            "sha256": DIGESTER.sha256(workspace.artifact / name),
            "num_bytes": (workspace.artifact / name).stat().st_size,
        }
        for name in names
    }


def describe_machine(workspace: Workspace) -> str:
    from builder import machine_class

    return machine_class.describe_machine(choose_device(workspace.manifest))


def compare_rows(measured: Mapping[str, Any], locked: Mapping[str, Any], path: Path) -> None:
    """Refuse a calibration on other token ids."""
    found, wanted = measured["rows"]["digest"], locked["inputs"].get("token_ids_sha256")
    if found != wanted:
        raise VerifyError(
            f"the calibration rows are not the locked ones (sha256 of the token ids {found[:12]}, locked {wanted})",
            lock.point_at(path, "inputs", "token_ids_sha256"),
            "see that calibration data and tokenizers are those of the lock",
        )


def explain_differences(
    workspace: Workspace,
    locked: Mapping[str, Any],
    path: Path,
    found: Mapping[str, Mapping[str, Any]],
    different: list[str],
    original: Path | None,
) -> Problems:
    """Where the rebuilt files differ from the locked ones, as far as the originals are there to be looked at."""
    payload, problems = locked["payload"], list[BuildError]()
    summary = f"{len(different)} of {len(payload.keys() | found.keys())} files are not the locked ones"
    for name in different:
        where = lock.point_at(path, "payload", name)
        theirs = original / name if original else None
        if name not in found or name not in payload:
            what = f"{name} is {'locked, but is not made' if name in payload else 'made, but is not locked'}"
            problems.append(VerifyError(what, where, "see whether licences and fixes are those of the lock"))
        elif theirs and theirs.is_file() and DIGESTER.sha256(theirs) == payload[name]["sha256"]:
            traced = trace_file(name, workspace.artifact / name, theirs)
            problems += [describe(one, workspace.artifact) for one in traced]
        else:
            ours, was = found[name]["sha256"][:12], payload[name]["sha256"][:12]
            what = f"{name} is not the locked one (sha256 {ours}, locked {was})"
            fix = "inputs and tools are the lock's, so the lock was changed, or the builder is at fault: "
            problems.append(VerifyError(what, where, fix + "--with=FOLDER of the published files shows what differs"))
    more = len(problems) - LISTED
    if more > 0:
        del problems[LISTED:]
    last = VerifyError(
        summary + (f"; {more} more differences are not listed" if more > 0 else ""),
        show_path(path.absolute()),
        f"the rebuilt files are in {show_path(workspace.artifact.absolute())}; `doit diff` compares folders and locks",
    )
    return Problems([*problems, last])


def describe(difference: Difference, folder: Path) -> VerifyError:
    return VerifyError(
        f"{difference.place} of {difference.file}: {difference.text}",
        show_path((folder / difference.file).absolute()),
        f"likely cause: {difference.cause}",
    )


# --- against what was published ---------------------------------------------------------------------------------------


def compare_with_place(path: Path, place: Place) -> Verdict:
    """Compare a lock's payload with what was published. Raises VerifyError or Problems naming what differs."""
    locked = lock.require_lock(path)
    verdict = compare_published(locked, place)
    raise_all(
        [
            VerifyError(f"{name} {what}", str(place), "see that place and lock are of the same release")
            for name, what in verdict.wrong.items()
        ]
    )
    return verdict
