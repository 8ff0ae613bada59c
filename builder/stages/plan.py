"""Stage `plan`: everything decided, and everything refused that can be, before a weight is read."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from builder.base import (
    Stored,
    begin_hashing,
    list_base_files,
    locate_base,
    preview_base,
    read_config,
    read_tensors,
)
from builder.calibration import read_texts
from builder.digests import identify_file
from builder.errors import BuildError, ManifestError, Problems, nearest, raise_all
from builder.manifest import Manifest
from builder.plan import Plan, plan_release
from builder.schemes import bind_scheme
from builder.stages.jobs import name_executor
from builder.stages.stage import Outcome, Stage, keep_nothing
from builder.stages.workspace import Workspace


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
    return plan


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
    return read_config(folder, str(folder)), read_tensors(folder, str(folder))


def bind_names(workspace: Workspace) -> None:
    """Resolve every name a manifest holds as text: scheme, fixes, executor, licences. Reports all problems together."""
    from builder.fixes import bind_fixes
    from builder.licenses import bind_licenses

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


def warn_of_names(workspace: Workspace) -> tuple[str, ...]:
    """What the licences say of the release's name, unless the publisher has acknowledged it."""
    from builder.licenses import LICENSES, name_warnings

    base = workspace.manifest.release.base
    warnings = name_warnings([LICENSES[name] for name in base.licenses], workspace.manifest.release.repo)
    return tuple(
        f"warning ({warning.id}): {warning.text}; acknowledge it in base.acknowledge"
        for warning in warnings
        if warning.id not in base.acknowledge
    )


def run(workspace: Workspace, *, with_data: bool = True) -> Outcome:
    """with_data: whether calibration rows and held-out text will be read, and so have to be there."""
    if base := locate_base(workspace.manifest):
        begin_hashing(base, workspace.circumstances("fetch").get("files", {}))  # for `fetch`; the plan takes a while
    plan = make_plan(workspace)
    if with_data:
        check_inputs(workspace, plan)
    needed, free = measure_disk(workspace, plan)
    if needed > free:
        raise BuildError(
            f"the build needs {needed / 1e9:.3g} GB of disk, and {free / 1e9:.3g} GB are free",
            str(workspace.folder.absolute()),
            "free some space there",
        )
    circumstances = {
        "shards": plan.describe_shards(),
        "calibrate_memory": plan.calibrate_memory,
        "quantize_memory": plan.quantize_memory,
        "disk_needed": needed,
        "disk_free": free,
    }
    warnings = (*warn_of_names(workspace), *warn_of_compromises(workspace.manifest))
    return Outcome(plan.facts(), circumstances, warnings)


def measure_disk(workspace: Workspace, plan: Plan) -> tuple[int, int]:
    """Bytes that the build has still to write, and bytes that are free where it writes."""
    workspace.folder.mkdir(parents=True, exist_ok=True)
    owned = {shard.index: set(shard.units) for shard in plan.shards}
    twice = [f for f in plan.files if not (f.in_place and any(units.issuperset(f.units) for units in owned.values()))]
    written = [*workspace.parts.glob("**/*.safetensors*"), *workspace.artifact.glob("*.safetensors")]
    present = sum(
        {status.st_ino: status.st_size for path in written if path.is_file() and (status := path.stat())}.values()
    )
    needed = plan.num_bytes + sum(file.num_bytes for file in twice) - present
    return max(0, needed), shutil.disk_usage(workspace.folder).free


STAGE = Stage("plan", "lay out every shard, tensor and file from the config alone", read, run, keep_nothing)
