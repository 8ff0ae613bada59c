"""What a fix is: one known defect, how it shows in a draft, and its cure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from builder.artifact import Draft

LAYOUTS = ("compressed-tensors", "modelopt")
INPUT_SCALES = ("calibrated", "unit")
NVFP4 = ("nvfp4", "nvfp4a16")


def leave_no_trace(draft: Draft) -> str | None:
    """For defects that end in an error or in another fix's symptom: nothing of their own can be seen in a draft."""
    return None


@dataclass(frozen=True, kw_only=True)
class Fix:
    """A defect and what is done about it. Every text but `name` is a sentence that a card can print.

    name: what a manifest calls it. title: the cure. symptom: what a user meets where it is missing.
    upstream: where the defect is, as a link or to the function.
    layouts, input_scales: the releases it is for; input_scales matters where a scheme has any.
    schemes: those it is for, None for all.
    healthy: what can be said of a draft without the defect.
    avoided: how the builder's design keeps the defect from occurring; then there is no cure to apply.
    detect: evidence of the defect in one sentence, None if it is not there; the draft is not changed.
    apply: the cure; applied twice it changes nothing more.
    """

    name: str
    title: str
    symptom: str
    upstream: str
    layouts: tuple[str, ...] = LAYOUTS
    input_scales: tuple[str, ...] = INPUT_SCALES
    schemes: tuple[str, ...] | None = None
    healthy: str = ""
    avoided: str = ""
    detect: Callable[[Draft], str | None] = leave_no_trace
    apply: Callable[[Draft], None] | None = None

    def is_for(self, scheme: str, layout: str, input_scale: str | None) -> bool:
        fits = (self.schemes is None or scheme in self.schemes) and layout in self.layouts
        return fits and (input_scale is None or input_scale in self.input_scales)


def list_briefly(items: list[str], most: int = 3) -> str:
    """The first few of many, in a sentence; never empty."""
    more = [f"and {len(items) - most} more"] if len(items) > most else []
    return "; ".join([*items[:most], *more])
