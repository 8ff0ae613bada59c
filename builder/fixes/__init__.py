"""Known defects of exporters and pipelines, one per file: each is looked for in every draft, and cured if it is there.

A published recipe lists its cures; here each is a `Fix` with evidence. Most of them cannot occur, because config.json
comes from the base and no one-layer template is exported: their entries say so, and still look for traces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from builder.artifact import Draft
from builder.errors import BuildError, ManifestError, nearest, raise_all
from builder.fixes import (
    dynamic_input_activations,
    gather_parts,
    inject_input_scale,
    keep_calibrator,
    keep_chat_template,
    keep_edges_once,
    keep_generation_config,
    keep_lm_head_bf16,
    keep_tokenizer_files,
    renumber_layers,
    reset_layer_index,
    restore_config,
    template_token_ids,
    template_vocab_size,
)
from builder.fixes.fix import Fix
from builder.manifest import Manifest, Scheme

__all__ = ["FIXES", "Fix", "FixRecord", "apply_fixes", "bind_fixes", "default_fixes"]

FIXES: dict[str, Fix] = {
    fix.name: fix
    for fix in (
        template_vocab_size.FIX,
        template_token_ids.FIX,
        keep_calibrator.FIX,
        inject_input_scale.FIX,
        dynamic_input_activations.FIX,
        restore_config.FIX,
        keep_lm_head_bf16.FIX,
        keep_generation_config.FIX,
        keep_chat_template.FIX,
        keep_tokenizer_files.FIX,
        reset_layer_index.FIX,
        renumber_layers.FIX,
        keep_edges_once.FIX,
        gather_parts.FIX,
    )
}


@dataclass(frozen=True)
class FixRecord:
    """What became of a fix in one build; status: "applied", "not needed" or "avoided by design"."""

    name: str
    title: str
    status: str
    evidence: str


def default_fixes(scheme: str, layout: str, input_scale: str | None) -> tuple[str, ...]:
    """The names of all fixes that are for a release in such a scheme, in the table's order."""
    return tuple(name for name, fix in FIXES.items() if fix.is_for(scheme, layout, input_scale))


def bind_fixes(manifest: Manifest) -> tuple[Fix, ...]:
    """The fixes a manifest lists, in its order, or else the default ones.

    Raises ManifestError (Problems for several) for a name without a fix, or a fix that is not for such a release.
    """
    specs, names = manifest.release.scheme, manifest.release.fixes
    if names is None:
        wanted = {name for spec in specs for name in default_fixes(spec.name, spec.layout, spec.input_scale)}
        names = tuple(name for name in FIXES if name in wanted)
    problems: list[BuildError] = []
    for position, name in enumerate(names):
        where = manifest.where("fixes", position)
        fix = FIXES.get(name)
        if fix is None:
            problems.append(ManifestError(f"unknown fix: {name}", where, nearest(name, FIXES)))
        elif not any(fix.is_for(spec.name, spec.layout, spec.input_scale) for spec in specs):
            problems.append(explain_misfit(fix, specs[0], where))
    raise_all(problems)
    return tuple(FIXES[name] for name in names)


def explain_misfit(fix: Fix, scheme: Scheme, where: str) -> ManifestError:
    """Why a fix is not for a scheme, and for which it is."""
    if fix.schemes is not None and scheme.name not in fix.schemes:
        what, whose = f"the scheme {scheme.name}", f"the scheme {' or '.join(fix.schemes)}"
    elif scheme.layout not in fix.layouts:
        what, whose = f"the layout {scheme.layout}", f"the layout {' or '.join(fix.layouts)}"
    else:
        what, whose = f"{scheme.input_scale} input scales", f"scheme.input_scale: {' or '.join(fix.input_scales)}"
    return ManifestError(f"{fix.name} is not for {what}", where, f"remove it; it is for {whose}")


def apply_fixes(draft: Draft, fixes: Sequence[Fix]) -> tuple[FixRecord, ...]:
    """Look for each defect in turn, and cure what is found.

    Raises BuildError if a cure did not help, or if a defect shows that the design should have kept out.
    """
    return tuple(apply_fix(draft, fix) for fix in fixes)


def apply_fix(draft: Draft, fix: Fix) -> FixRecord:
    evidence = fix.detect(draft)
    if evidence is None:
        status = "avoided by design" if fix.avoided else "not needed"
        return FixRecord(fix.name, fix.title, status, fix.avoided or fix.healthy)
    where, report = f"{draft.folder}: {fix.name}", "report this as a defect of the release builder"
    if fix.apply is None:
        raise BuildError(evidence, where, f"build the release anew; if that does not help, {report}")
    fix.apply(draft)
    left = fix.detect(draft)
    if left is not None:
        raise BuildError(f"the cure did not help: {left}", where, report)
    return FixRecord(fix.name, fix.title, "applied", evidence)
