"""Stage `assemble`: the artifact's payload complete, fixed and in place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from builder import lock
from builder.base import INDEX, find_dtype, find_legal_files, list_base_files
from builder.digests import identify_file
from builder.errors import BuildError
from builder.files import canonical_json, read_json, sha256_file, sync_folder, write_atomic, write_json
from builder.floats import FLOATS
from builder.manifest import Compatibility
from builder.plan import Plan
from builder.schemes import Scheme, bind_scheme
from builder.schemes.cache import describe_cache, describe_cache_beside
from builder.stages.plan import gather_obligations, make_plan
from builder.stages.quantize import drop_parts, key_of_parts, take_back
from builder.stages.stage import Outcome, Stage
from builder.stages.workspace import Workspace


def read(workspace: Workspace) -> Any:
    from builder.fixes import bind_fixes
    from builder.render import name_base

    release = workspace.manifest.release
    texts = {name: workspace.digest_file(path) for name, path in release.base.license_files.items()}
    return {
        "parts": key_of_parts(workspace),
        "fixes": [fix.name for fix in bind_fixes(workspace.manifest)],
        "licenses": release.base.licenses,
        "license_files": texts,
        "base_name": name_base(release),
        "compatibility": release.compatibility.model_dump(mode="json"),
        "versions": lock.list_versions()["compressed-tensors"],
    }


def run(workspace: Workspace) -> Outcome:
    from builder.artifact import Draft, hash_payload
    from builder.fixes import apply_fixes, bind_fixes

    plan, scheme = make_plan(workspace, workspace.base_folder()), bind_scheme(workspace.manifest)
    take_back(workspace, key_of_parts(workspace))
    known = splice_files(workspace, plan)
    draft = workspace.folder / "draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    base = workspace.base_folder()
    write_draft(workspace, plan, scheme, draft, base)
    release = workspace.manifest.release
    input_scales = {spec.input_scale for spec in release.scheme} - {None}
    folder = Draft(
        draft,
        base,
        scheme.layout,
        "calibrated" if "calibrated" in input_scales else next(iter(input_scales), None),
        plan.ignore,
        from_template=release.compatibility.export_template is not None,
        spell=choose_spelling(release.compatibility),
    )
    records = apply_fixes(folder, bind_fixes(workspace.manifest))
    if release.compatibility.license_texts:
        write_licenses(workspace, draft, base)
    untouched = {name: sha for name, sha in known.items() if (draft / name).samefile(workspace.parts / name)}
    compare_with_plan(plan, draft)
    payload = hash_payload(
        draft, [path.relative_to(draft).as_posix() for path in draft.rglob("*") if path.is_file()], untouched
    )
    old = workspace.folder / "artifact.old"
    shutil.rmtree(old, ignore_errors=True)
    if workspace.artifact.exists():
        workspace.artifact.rename(old)
    draft.rename(workspace.artifact)
    sync_folder(workspace.folder)
    shutil.rmtree(old, ignore_errors=True)
    facts = {
        "payload": payload,
        "payload_sha256": lock.digest_payload(payload),
        "fixes": [asdict(record) for record in records],
    }
    warnings = gather_obligations(workspace, find_legal_files(base)).warnings
    identities = {name: identify_file(workspace.artifact / name) for name in payload}
    whole = {name: {"sha256": sha256, "identity": identities[name]} for name, sha256 in untouched.items()}
    parts = {"key": key_of_parts(workspace), "files": whole}
    return Outcome(
        facts,
        {"identities": identities, "parts": parts},
        tuple(map(str, warnings)),
    )


def splice_files(workspace: Workspace, plan: Plan) -> dict[str, str]:
    """Make the files that no worker owned from the units' pieces; returns every weight file's digest."""
    from builder.parts import UNITS, read_record, splice_file

    key, known = key_of_parts(workspace), {}
    for file in plan.files:
        path = workspace.parts / file.name
        record = read_record(path, key)
        if record is None:
            pieces = [workspace.parts / UNITS / f"{unit}.safetensors" for unit in file.units]
            record = splice_file(path, file, pieces, key)
        known[file.name] = record["sha256"]
    shutil.rmtree(workspace.parts / UNITS, ignore_errors=True)
    return known


def write_draft(workspace: Workspace, plan: Plan, scheme: Scheme, draft: Path, base: Path) -> None:
    """Weights, index, configs, and the base's own companions byte for byte."""
    from builder.artifact import link_file, write_index

    compatibility = workspace.manifest.release.compatibility
    for file in plan.files:
        link_file(workspace.parts / file.name, draft / file.name)
    if len(plan.files) > 1:
        data_bytes = sum(tensor.num_bytes for tensor in plan.tensors.values())
        num_parameters = plan.architecture.num_parameters if compatibility.total_parameters else None
        write_index(draft, plan.weight_map, data_bytes, num_parameters, choose_spelling(compatibility))
    for name in list_base_files(base):
        if name in compatibility.copied_files if compatibility.copied_files is not None else is_companion(name):
            write_atomic(draft / name, (base / name).read_bytes())
    write_configs(compatibility, plan, scheme, draft, base)


def write_configs(compatibility: Compatibility, plan: Plan, scheme: Scheme, draft: Path, base: Path) -> None:
    """config.json and what the layout needs beside it: the base's own, or those of an export template."""
    from builder.artifact import write_config
    from builder.export_template import describe_generation, describe_template

    config, embeddings = read_json(base / "config.json"), plan.architecture.embeddings
    if not find_dtype(config):  # both reference tools write it then; nobody could tell it from quantized weights
        config["dtype"] = FLOATS[plan.architecture.dtype].name
    quantization = scheme.quantization_config(plan.ignore, embeddings, plan.quantized)
    beside = scheme.extra_configs(plan.ignore, embeddings)
    if template := compatibility.export_template:
        config = describe_template(config, template, str(base / "config.json"))
        # Of its linears the template leaves none out; the pipeline adds lm_head to one file and forgets the other.
        quantization, beside = scheme.quantization_config(["lm_head"]), scheme.extra_configs([])
        write_json(draft / "generation_config.json", describe_generation(template))
    if plan.measures_cache:
        quantization, beside = describe_cache(quantization, scheme.layout), describe_cache_beside(beside)
    producer = compatibility.producer
    write_config(draft / "config.json", config, name_producer(quantization, producer), choose_spelling(compatibility))
    for name, content in beside.items():
        write_atomic(draft / name, choose_spelling(compatibility, indent=4)(name_producer(content, producer)))


def name_producer(config: dict[str, Any], producer: str | None) -> dict[str, Any]:
    """A config of the modelopt layout under another exporter's name and version; as it is if None."""
    if producer is None:
        return config
    name, _, version = producer.partition(" ")
    return {**config, "producer": {"name": name, "version": version}}


def choose_spelling(compatibility: Compatibility, indent: int = 2) -> Callable[[Any], str]:
    """How configs and index are written: keys sorted, or as an exporter put them, then with this indent."""
    end = "\n" if compatibility.final_newline else ""
    if compatibility.export_template:
        return lambda value: json.dumps(value, indent=indent) + end
    return lambda value: canonical_json(value).rstrip("\n") + end


def is_companion(name: str) -> bool:
    """Whether a file of the base goes into the artifact as it is: tokenizer, template, generation and other configs."""
    from builder.licenses import is_legal

    own = name in ("config.json", INDEX) or name.endswith((".safetensors", ".md", ".index.json"))
    return not own and not is_legal(name)


def write_licenses(workspace: Workspace, draft: Path, base: Path) -> None:
    """The texts that must accompany a copy, and the notice."""
    from builder.render import render_notice

    obligations = gather_obligations(workspace, find_legal_files(base))
    for text in obligations.texts:
        write_atomic(draft / text.name, text.path.read_bytes())
    write_atomic(draft / "NOTICE", render_notice(workspace.manifest, obligations))


def compare_with_plan(plan: Plan, draft: Path) -> None:
    """Refuse a draft whose weight files differ from the plan in any tensor's name, dtype, shape or file."""
    from builder.base import read_header

    for file in plan.files:
        written = [(tensor.name, tensor.dtype, tensor.shape) for tensor in read_header(draft / file.name)]
        planned = [(tensor.name, tensor.dtype, tensor.shape) for tensor in file.tensors]
        if written != planned:
            different = sorted({*written} ^ {*planned})[:1] or [("the order of tensors", "", ())]
            raise BuildError(
                f"{file.name} is not as planned: {different[0][0]}",
                str(draft),
                "a fix changed it, or this is a defect of the builder: please report it",
            )


def is_intact(workspace: Workspace) -> bool:
    """Whether the payload's files are those that were put there; one that was touched is read again."""
    payload, identities = workspace.facts("assemble")["payload"], workspace.circumstances("assemble")["identities"]
    for name, entry in payload.items():
        path = workspace.artifact / name
        if not path.is_file():
            return False
        if identify_file(path) != identities[name] and sha256_file(path) != entry["sha256"]:
            return False
    return True


STAGE = Stage("assemble", "put files together, apply fixes", read, run, is_intact, drop_parts)
