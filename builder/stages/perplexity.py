"""Stage `perplexity`: base and artifact measured on the same held-out text."""

from __future__ import annotations

from typing import Any

from builder.progress import Progress, watch
from builder.stages.jobs import choose_device
from builder.stages.stage import Outcome, Stage, keep_nothing
from builder.stages.workspace import Workspace


def read(workspace: Workspace) -> Any:
    spec = workspace.manifest.release.perplexity
    if spec is None:
        return {"measured": False}
    return {
        "measured": True,
        "text": workspace.digest_file(spec.path),
        "path": spec.path,
        "arithmetic": workspace.manifest.release.arithmetic,
        "payload": workspace.facts("assemble")["payload"],
        "base": workspace.facts("fetch")["files"],
    }


def run(workspace: Workspace) -> Outcome:
    manifest = workspace.manifest
    if manifest.release.perplexity is None:
        return Outcome({"measured": False}, {"skipped": "the manifest gives no held-out text"})
    from builder.perplexity import LONGEST_WINDOW, measure_perplexity, open_artifact, open_base, split_text

    device, base = choose_device(manifest), workspace.base_folder()
    context = workspace.facts("plan")["numbers"].get("max_position_embeddings")
    longest = min(LONGEST_WINDOW, context or LONGEST_WINDOW)
    text = manifest.resolve(manifest.release.perplexity.path)
    held_out = split_text(text, base, longest, manifest.where("perplexity", "path"))
    with watch(workspace.folder):
        stream = open_base(base, device, workspace.manifest.release.arithmetic)
        progress = Progress(workspace.folder, "perplexity of the base", len(stream.layers))
        of_base = measure_perplexity(stream, held_out.windows, progress, first=held_out.first)
        stream = open_artifact(
            workspace.artifact, read_layout(workspace), device, workspace.manifest.release.arithmetic
        )
        progress = Progress(workspace.folder, "perplexity of the artifact", len(stream.layers))
        of_artifact = measure_perplexity(stream, held_out.windows, progress, first=held_out.first)
    facts = {
        "measured": True,
        "base": of_base,
        "artifact": of_artifact,
        "recovery_percent": 100 * of_base / of_artifact,
        "num_tokens": held_out.num_measured,
        "window": longest,
        "beginning": held_out.names,
        "arithmetic": workspace.manifest.release.arithmetic,
    }
    recovery = f"recovery {facts['recovery_percent']:.1f} %"
    line = f"perplexity {of_base:.3f} of the base, {of_artifact:.3f} of the artifact: {recovery}"
    return Outcome(facts, {"device": device}, (line,))


def read_layout(workspace: Workspace) -> dict[str, Any]:
    """How compressed-tensors reads the artifact, whatever its layout."""
    from builder.schemes import bind_specs
    from builder.schemes.cache import describe_cache

    specs = [spec.model_copy(update={"layout": "compressed-tensors"}) for spec in workspace.manifest.release.scheme]
    plan = workspace.facts("plan")
    config = bind_specs(specs).quantization_config(plan["ignore"], linears=plan["quantized"])
    return describe_cache(config, "compressed-tensors") if workspace.manifest.release.kv_cache else config


STAGE = Stage("perplexity", "measure base and artifact on held-out text", read, run, keep_nothing)
