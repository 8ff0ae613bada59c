"""Mixed precision: several schemes in one release, each for the linears that its pattern matches first."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from builder.base import Tensor
from builder.schemes.magnitudes import Amax, observe_magnitudes

if TYPE_CHECKING:
    import torch

    from builder.schemes import Scheme, Weight


def matches(pattern: str, name: str) -> bool:
    """As compressed-tensors: the whole name, or a regular expression after `re:` that matches from its start."""
    return re.match(pattern[3:], name) is not None if pattern.startswith("re:") else pattern == name


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """See `builder.schemes.Scheme`.

    parts: schemes with their patterns, in order; the last has none and is for all other linears.
    """

    parts: tuple[tuple[str | None, Scheme], ...]
    name: str = "mixed"
    layout: str = "compressed-tensors"

    @property
    def measures_inputs(self) -> bool:
        return any(scheme.measures_inputs for _, scheme in self.parts)

    def find_part(self, linear: str) -> int:
        """Which of the parts a linear belongs to."""
        return next(i for i, (pattern, _) in enumerate(self.parts) if pattern is None or matches(pattern, linear))

    def plan_linear(self, linear: str, weight: Tensor) -> tuple[Tensor, ...]:
        return self.parts[self.find_part(linear)][1].plan_linear(linear, weight)

    def observe(
        self, layer: torch.nn.Module, prefix: str, linears: Sequence[str]
    ) -> AbstractContextManager[Callable[[], Amax]]:
        return observe_magnitudes(layer, prefix, linears)

    def quantize_group(self, weights: Mapping[str, Weight], input_amax: Mapping[str, float]) -> dict[str, Any]:
        """The plan sees to it that linears which read the same input belong to one part."""
        return self.parts[self.find_part(next(iter(weights)))][1].quantize_group(weights, input_amax)

    def quantization_config(
        self, ignore: Sequence[str], embeddings: Sequence[str] = (), linears: Sequence[str] = ()
    ) -> dict[str, Any]:
        """A group for each part, with the whole names of its linears.

        A pattern would not do: engines look for the class of a fused linear, which is `Linear` in another group's
        targets, before they look for the names of those it is made of.
        """
        configs = [scheme.quantization_config(ignore, embeddings) for _, scheme in self.parts]
        targets = {index: sorted(own) for index, own in enumerate(self.divide(linears)) if own}
        groups = {
            f"group_{number}": {**configs[index]["config_groups"]["group_0"], "targets": own}
            for number, (index, own) in enumerate(targets.items())
        }
        formats = {group["format"] for group in groups.values()}
        return {
            **configs[0],
            "config_groups": groups,
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        }

    def divide(self, linears: Sequence[str]) -> list[list[str]]:
        """The linears of each part."""
        divided: list[list[str]] = [[] for _ in self.parts]
        for linear in linears:
            divided[self.find_part(linear)].append(linear)
        return divided

    def extra_configs(self, ignore: Sequence[str], embeddings: Sequence[str] = ()) -> dict[str, Any]:
        return {}
