"""How weights and activations are quantized: one file per scheme, each of them pure and ignorant of files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from builder import manifest
from builder.base import Tensor
from builder.errors import ManifestError, nearest
from builder.schemes.magnitudes import Amax

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    Weight = torch.Tensor | NDArray[Any]

__all__ = ["SCHEMES", "Amax", "Scheme", "bind_scheme"]


class Scheme(Protocol):
    """What the other modules may ask of a scheme."""

    @property
    def name(self) -> str: ...

    @property
    def layout(self) -> str: ...

    @property
    def measures_inputs(self) -> bool:
        """Whether quantizing needs the inputs' amax, and so a calibration."""

    def plan_linear(self, linear: str, weight: Tensor) -> tuple[Tensor, ...]:
        """The tensors that take the place of one linear's weight, in the order they are written."""

    def observe(
        self, layer: torch.nn.Module, prefix: str, linears: Sequence[str]
    ) -> AbstractContextManager[Callable[[], Amax]]:
        """Collect statistics of the named linears of a decoder layer while the block runs; it computes as before.

        prefix: what comes before a linear's name within the layer. Yields a function that reads what was collected:
        {linear: {"weight": amax, "input": amax}}; what nothing passed through is absent. It raises CalibrationError
        naming a linear that met a NaN.
        """

    def quantize_group(self, weights: Mapping[str, Weight], input_amax: Mapping[str, float]) -> dict[str, Any]:
        """Quantize linears that read the same input. Returns the planned tensors; the weights are not modified.

        weights: bf16 tensors, or numpy arrays of their bits; what is returned is of the same kind.
        """

    def quantization_config(self, ignore: Sequence[str], embeddings: Sequence[str] = ()) -> dict[str, Any]:
        """The `quantization_config` of config.json.

        ignore: every linear that stays as it was. embeddings: every plain torch.nn.Embedding, which also does.
        """

    def extra_configs(self, ignore: Sequence[str], embeddings: Sequence[str] = ()) -> dict[str, Any]:
        """Further JSON files that the layout needs, by name."""


def bind_nvfp4(spec: manifest.Scheme) -> Scheme:
    """The `nvfp4` scheme with a manifest's options."""
    from builder.schemes.nvfp4 import Nvfp4

    return Nvfp4(layout=spec.layout, input_scale=spec.input_scale, block_scale_floor=spec.block_scale_floor)


SCHEMES: dict[str, Callable[[manifest.Scheme], Scheme]] = {"nvfp4": bind_nvfp4}


def bind_scheme(source: manifest.Manifest) -> Scheme:
    """The scheme a manifest names. Raises ManifestError for a name, or a number of schemes, there is no code for."""
    specs = source.release.scheme
    if len(specs) != 1 or specs[0].match is not None:
        given = f"{len(specs)} schemes" if len(specs) != 1 else f"a scheme for {specs[0].match} alone"
        raise ManifestError(
            f"{given}, but a release has one scheme for all its linears",
            source.where("scheme"),
            "give one scheme, without `match`",
        )
    if specs[0].name not in SCHEMES:
        raise ManifestError(
            f"unknown scheme: {specs[0].name}", source.where("scheme", "name"), nearest(specs[0].name, SCHEMES)
        )
    return SCHEMES[specs[0].name](specs[0])
