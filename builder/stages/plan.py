"""Stage `plan`: everything decided, and everything refused that can be, before a weight is read."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from builder.base import (
    Stored,
    begin_hashing,
    list_base_files,
    locate_base,
    open_checkpoint,
    preview_base,
    preview_legal_files,
)
from builder.calibration import read_texts
from builder.digests import identify_file
from builder.errors import BuildError, ManifestError, Problems, nearest, raise_all
from builder.files import read_receipt
from builder.floats import FLOATS
from builder.licenses import LICENSES, WARNING_IDS, Obligations, bind_licenses, collect_obligations, name_warnings
from builder.manifest import Manifest
from builder.plan import Plan, PlannedFile, plan_release
from builder.schemes import bind_scheme
from builder.sizing import (
    REFERENCE,
    Rates,
    check_context,
    check_heads,
    find_hardware,
    size_build,
    size_serving,
    warn_of_serving,
)
from builder.stages.jobs import name_executor
from builder.stages.stage import Outcome, Stage, describe_host, keep_nothing
from builder.stages.workspace import Workspace

TELLING_BYTES = 1_000_000_000  # of a base: the build of a smaller one is its start, and tells no rate


def read(workspace: Workspace) -> Any:
    release = workspace.manifest.release
    base = locate_base(workspace.manifest)
    files = {name: identify_file(base / name) for name in list_base_files(base)} if base else None
    return {
        "base": release.base.model_dump(mode="json"),
        "base_files": files,
        "scheme": [spec.model_dump(mode="json") for spec in release.scheme],
        "kv_cache": release.kv_cache,
        "shards": release.shards,
        "executor": name_executor(workspace),
        "files": release.files.model_dump(mode="json"),
        "compatibility": release.compatibility.model_dump(mode="json"),
        "calibration": release.calibration and release.calibration.model_dump(mode="json"),
        "data": release.calibration and release.calibration.path and workspace.digest_file(release.calibration.path),
        "perplexity": release.perplexity and workspace.digest_file(release.perplexity.path),
        "fixes": release.fixes,
        "repo": release.repo,
        "serve": release.serve and release.serve.model_dump(mode="json"),
        "llama_swap": release.llama_swap.model_dump(mode="json"),
        "acknowledge": release.base.acknowledge,
        "device": release.device,
    }


def make_plan(workspace: Workspace, base: Path | None = None) -> Plan:
    """The plan, from manifest, config and headers; whatever can be checked before any weight is read is checked.

    base: the fetched base's folder; before it is fetched, config and headers come from wherever they can be had.
    """
    bind_names(workspace)
    manifest = workspace.manifest
    config, headers = preview_base(manifest) if base is None else read_base(base)
    from builder.families import recall_architecture

    where = manifest.where("base", "path" if manifest.release.base.path else "model")
    plan = plan_release(manifest, bind_scheme(manifest), recall_architecture(config, where), headers)
    check_template(manifest, config, plan)
    check_arithmetic(manifest, plan)
    if serve := manifest.release.serve:
        facts = plan.architecture.facts
        check_context(serve, config, facts.get("max_position_embeddings"), manifest.where)
        check_heads(serve, facts.get("num_attention_heads"), manifest.where)
    return plan


def check_arithmetic(manifest: Manifest, plan: Plan) -> None:
    """Refuse a model that exact arithmetic cannot run, where something is to be measured in it."""
    calibration, exact = manifest.release.calibration, manifest.release.arithmetic == "exact"
    if exact and plan.architecture.inexact and (plan.measures or manifest.release.perplexity):
        raise ManifestError(
            f"{plan.architecture.name} runs {', '.join(plan.architecture.inexact)}, which have no exact form here",
            manifest.where("calibration", "arithmetic") if calibration else manifest.where("perplexity"),
            "set calibration.arithmetic: native" if calibration else "leave perplexity out",
        )


def check_template(manifest: Manifest, config: dict[str, Any], plan: Plan) -> None:
    """Refuse a base whose configs an export template would have left in a way that is not known here."""
    from builder.export_template import describe_template

    template = manifest.release.compatibility.export_template
    if template is None:
        return
    where = manifest.where("compatibility", "export_template")
    describe_template(config, template, where)
    if plan.architecture.tied or plan.ignore != ("lm_head",):
        why = "lm_head is tied, and its pipeline stored a copy"
        if not plan.architecture.tied:
            why = f"its pipeline quantized all but lm_head, {', '.join(sorted({*plan.ignore} - {'lm_head'})[:1])} too"
        raise ManifestError(
            f"an export template is not for this release: {why}",
            where,
            "remove export_template: the configs are then the base's own",
        )


def read_base(folder: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """Config and headers of a base that was fetched."""
    checkpoint = open_checkpoint(folder, str(folder))
    return dict(checkpoint.config), dict(checkpoint.tensors)


def bind_names(workspace: Workspace) -> None:
    """Resolve every name a manifest holds as text: scheme, fixes, executor, licences. Reports all problems together."""
    from builder.benchmarks import load_benchmarks
    from builder.evaluation import load_evaluations
    from builder.fixes import bind_fixes

    manifest = workspace.manifest
    base = manifest.release.base
    license_files = {name: manifest.resolve(path) for name, path in base.license_files.items()}
    problems: list[BuildError] = []
    for bind in (
        lambda: bind_scheme(manifest),
        lambda: bind_fixes(manifest),
        lambda: check_layout(manifest),
        lambda: bind_executor(workspace),
        lambda: bind_licenses(
            base.licenses, acknowledged=base.acknowledge, license_files=license_files, where=manifest.where
        ),
        lambda: bind_serving(manifest),
        lambda: load_evaluations(manifest),
        lambda: load_benchmarks(manifest),
    ):
        try:
            bind()
        except Problems as several:
            problems += several.problems
        except BuildError as error:
            problems.append(error)
    raise_all(problems)


def check_layout(manifest: Manifest) -> None:
    """Refuse switches for the configs of the modelopt layout where another one is written."""
    compatibility = manifest.release.compatibility
    layout = next((spec.layout for spec in manifest.release.scheme if spec.layout != "modelopt"), None)
    problems = [
        ManifestError(
            f"compatibility.{switch} is for the layout modelopt, not for {layout}",
            manifest.where("compatibility", switch),
            "set scheme.layout: modelopt, or remove it",
        )
        for switch in ("producer", "export_template")
        if layout and getattr(compatibility, switch)
    ]
    raise_all(problems)


def bind_serving(manifest: Manifest) -> None:
    """Refuse a serve profile that would not arrive as it is written."""
    from builder.render import describe_serving

    if manifest.release.serve:
        describe_serving(manifest, manifest.release.serve, None)
        find_hardware(manifest.release.serve, manifest.where)


def bind_executor(workspace: Workspace) -> None:
    """Refuse an executor there is none of. Raises ManifestError, or BuildError if EXECUTOR names it."""
    from builder.executors import EXECUTORS

    name = name_executor(workspace)
    if name not in EXECUTORS:
        where = "the environment: EXECUTOR" if os.environ.get("EXECUTOR") else workspace.manifest.where("executor")
        raise ManifestError(f"unknown executor: {name}", where, nearest(name, EXECUTORS))


def check_inputs(workspace: Workspace, plan: Plan) -> None:
    """Refuse data that a later stage would miss. Raises ManifestError, CalibrationError, or Problems with several."""
    manifest = workspace.manifest
    calibration, perplexity = manifest.release.calibration, manifest.release.perplexity
    context = plan.architecture.facts.get("max_position_embeddings")
    problems: list[BuildError] = []
    if perplexity and not manifest.resolve(perplexity.path).is_file():
        what = f"no such file: {manifest.resolve(perplexity.path)}"
        where = manifest.where("perplexity", "path")
        problems.append(ManifestError(what, where, "give a text file relative to the manifest, or leave it out"))
    if calibration and plan.measures:
        if context and calibration.tokens[1] > context:
            what = f"calibration rows of up to {calibration.tokens[1]} tokens, but the model was made for {context}"
            problems.append(ManifestError(what, manifest.where("calibration", "tokens"), f"use {context} at most"))
        if calibration.path:
            try:
                read_texts(manifest, calibration, manifest.where("calibration", "path"))
            except BuildError as error:
                problems.append(error)
    raise_all(problems)


def warn_of_compromises(manifest: Manifest) -> tuple[str, ...]:
    """What is worse than it need be, because an older tool's files are reproduced."""
    from builder.render import list_compromises

    return tuple(f"warning (compatibility): {sentence}" for sentence in list_compromises(manifest.release))


def warn_of_dtypes(plan: Plan) -> tuple[str, ...]:
    """That not all weights have the dtype in which config.json runs the model."""
    own = FLOATS[plan.architecture.dtype]
    others = Counter(tensor.dtype for tensor in plan.architecture.tensors if tensor.dtype != own.stored)
    if not others:
        return ()
    told = " and ".join(f"{count} in {FLOATS[dtype].name}" for dtype, count in sorted(others.items()))
    return (
        f"warning (dtype): {told} of {len(plan.architecture.tensors)} tensors, but config.json says {own.name}: "
        "each is quantized or kept as it is stored",
    )


def warn_of_engine(manifest: Manifest) -> tuple[str, ...]:
    """That options and variables of the profile could not be checked."""
    from builder.options import find_options, list_versions

    serve = manifest.release.serve
    if serve is None or find_options(serve.version):
        return ()
    known = ", ".join(list_versions())
    return (f"warning (serve): no list of vLLM {serve.version} is here ({known}): its options are not checked",)


def warn_of_licenses(workspace: Workspace) -> tuple[str, ...]:
    """What only the publisher can judge: the release's name, and, once the base's licence files are there, those.

    Raises what `gather_obligations` does, if they are there.
    """
    manifest = workspace.manifest
    if locate_base(manifest):
        return tuple(map(str, gather_obligations(workspace, preview_legal_files(manifest)).warnings))
    base = manifest.release.base
    warnings = name_warnings([LICENSES[name] for name in base.licenses], manifest.release.repo, manifest.where)
    return tuple(str(warning) for warning in warnings if warning.id not in base.acknowledge)


def gather_obligations(workspace: Workspace, base_files: Mapping[str, Path]) -> Obligations:
    """What the licences of the declared lineage ask of this release; base_files: the base's own legal files, by name.

    A lock has no acknowledgements, and needs none: whoever builds from it again publishes nothing new.
    """
    from builder.lock import LockedManifest

    manifest = workspace.manifest
    base = manifest.release.base
    return collect_obligations(
        base.licenses,
        repo_name=manifest.release.repo,
        acknowledged=WARNING_IDS if isinstance(manifest, LockedManifest) else base.acknowledge,
        base_files=base_files,
        license_files={name: manifest.resolve(path) for name, path in base.license_files.items()},
        where=manifest.where,
    )


def run(workspace: Workspace, *, with_data: bool = True) -> Outcome:
    """with_data: whether calibration rows and held-out text will be read, and so have to be there."""
    if base := locate_base(workspace.manifest):
        begin_hashing(base, workspace.circumstances("fetch").get("files", {}))  # for `fetch`; the plan takes a while
    return lay_out(workspace, with_data=with_data)


def lay_out(workspace: Workspace, *, with_data: bool) -> Outcome:
    """The plan and what it takes, from small files alone; see `run`."""
    plan = make_plan(workspace)
    of_licenses = warn_of_licenses(workspace)
    if with_data:
        check_inputs(workspace, plan)
    needed, free = measure_disk(workspace, plan)
    size = size_release(workspace, plan)
    circumstances = {
        **size,
        "shards": plan.describe_shards(),
        "calibrate_memory": plan.calibrate_memory,
        "quantize_memory": plan.quantize_memory,
        "disk_needed": needed,
        "disk_free": free,
    }
    warnings = (
        *([f"warning (disk): {tell_shortage(needed, free)}"] if needed > free else []),
        *of_licenses,
        *warn_of_dtypes(plan),
        *warn_of_engine(workspace.manifest),
        *warn_of_serving(size["serving"]),
        *warn_of_compromises(workspace.manifest),
    )
    return Outcome(plan.facts(), circumstances, warnings)


def size_release(workspace: Workspace, plan: Plan) -> dict[str, Any]:
    """What building and serving take. Raises ManifestError for a serve profile that cannot fit."""
    release = workspace.manifest.release
    serve, calibration = release.serve, release.calibration
    rows = (calibration.samples, calibration.tokens[1]) if calibration else (0, 0)
    joined = sum(file.num_bytes for file in list_joined(plan))
    return {
        "work": size_build(
            plan, joined_bytes=joined, rows=rows, held_out=release.perplexity is not None, rates=find_rates(workspace)
        ),
        "serving": size_serving(plan, serve, workspace.manifest.where) if serve else None,
    }


def find_rates(workspace: Workspace) -> Rates:
    """How fast this machine built the largest release beside this one; a reference machine's rates if none tells."""
    found: list[tuple[int, Rates]] = []
    for path in sorted(workspace.folder.parent.glob("*/receipts/quantize.json")):
        plan, calibrate, quantize = (
            read_receipt(path.with_name(f"{stage}.json")) for stage in ("plan", "calibrate", "quantize")
        )
        if not (plan and calibrate and quantize) or quantize["circumstances"].get("machine") != describe_host():
            continue
        base, seconds = plan["facts"]["base_num_bytes"], quantize["circumstances"]["seconds"]
        if base < TELLING_BYTES or quantize["circumstances"].get("resumed"):
            continue
        rows, rate = calibrate["facts"]["rows"], None
        if rows and not calibrate["circumstances"].get("resumed"):
            rate = plan["facts"]["num_parameters"] * rows["num_tokens"] / calibrate["circumstances"]["seconds"]
        source = f"this machine, where {path.parent.parent.name} was built"
        found.append((base, Rates(quantize=base / seconds, calibrate=rate, source=source)))
    return max(found, key=lambda pair: pair[0])[1] if found else REFERENCE


def list_joined(plan: Plan) -> list[PlannedFile]:
    """The files that several workers share, or that no worker can write in one pass: they go through parts."""
    owned = [set(shard.units) for shard in plan.shards]
    return [file for file in plan.files if not (file.in_place and any(own.issuperset(file.units) for own in owned))]


def require_disk(workspace: Workspace, plan: Plan) -> None:
    """Refuse to begin long work whose result the disk has no room for; a plan alone only tells it."""
    needed, free = measure_disk(workspace, plan)
    if needed > free:
        raise BuildError(tell_shortage(needed, free), str(workspace.folder.absolute()), "free some space there")


def tell_shortage(needed: int, free: int) -> str:
    return f"the build needs {needed / 1e9:.3g} GB of disk, and {free / 1e9:.3g} GB are free"


def measure_disk(workspace: Workspace, plan: Plan) -> tuple[int, int]:
    """Bytes that the build has still to write, and bytes that are free where it writes."""
    workspace.folder.mkdir(parents=True, exist_ok=True)
    written = [*workspace.parts.glob("**/*.safetensors*"), *workspace.artifact.glob("*.safetensors")]
    present = sum(
        {status.st_ino: status.st_size for path in written if path.is_file() and (status := path.stat())}.values()
    )
    needed = plan.num_bytes + sum(file.num_bytes for file in list_joined(plan)) - present
    return max(0, needed), shutil.disk_usage(workspace.folder).free


STAGE = Stage("plan", "lay out every shard, tensor and file from the config alone", read, run, keep_nothing)
