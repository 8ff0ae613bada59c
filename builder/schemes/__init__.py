"""How weights and activations are quantized: one file per scheme, each of them pure and ignorant of files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from builder import manifest
from builder.base import Tensor
from builder.errors import BuildError, ManifestError, nearest, raise_all
from builder.schemes.magnitudes import Amax
from builder.schemes.mixed import Mixed, matches

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    Weight = torch.Tensor | NDArray[Any]

__all__ = ["SCHEMES", "Amax", "Mixed", "Scheme", "bind_scheme", "bind_specs", "divide_linears", "matches"]


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

        weights: torch tensors, or numpy arrays as `builder.floats` has them; what is returned is of the same kind.
        """

    def quantization_config(
        self, ignore: Sequence[str], embeddings: Sequence[str] = (), linears: Sequence[str] = ()
    ) -> dict[str, Any]:
        """The `quantization_config` of config.json.

        ignore: every linear that stays as it was. embeddings: every plain torch.nn.Embedding, which also does.
        linears: every one that is quantized, which only mixed precision has to name.
        """

    def extra_configs(self, ignore: Sequence[str], embeddings: Sequence[str] = ()) -> dict[str, Any]:
        """Further JSON files that the layout needs, by name."""


def bind_nvfp4(spec: manifest.Scheme) -> Scheme:
    """The `nvfp4` scheme with a manifest's options."""
    from builder.schemes.nvfp4 import Nvfp4

    return Nvfp4(
        layout=spec.layout,
        input_scale=spec.input_scale or "calibrated",
        block_scale_floor=spec.block_scale_floor is not False,
    )


def bind_nvfp4a16(spec: manifest.Scheme) -> Scheme:
    """The `nvfp4a16` scheme: the weights of `nvfp4`, and no scales of inputs."""
    from builder.schemes.nvfp4 import Nvfp4

    floor = spec.block_scale_floor is not False
    return Nvfp4(name="nvfp4a16", quantizes_inputs=False, block_scale_floor=floor)


def bind_rounded(spec: manifest.Scheme) -> Scheme:
    """A scheme of 8 or 4 bits with scales of rows or groups, which has no options."""
    from builder.schemes.rounded import ROUNDED

    return ROUNDED[spec.name]


SCHEMES: dict[str, Callable[[manifest.Scheme], Scheme]] = {
    "nvfp4": bind_nvfp4,
    "nvfp4a16": bind_nvfp4a16,
    "fp8_dynamic": bind_rounded,
    "w8a8": bind_rounded,
    "w4a16": bind_rounded,
}


CACHED = ("nvfp4", "nvfp4a16", "fp8_dynamic")  # the schemes that an FP8 KV cache goes with


def bind_specs(specs: Sequence[manifest.Scheme]) -> Scheme:
    """The scheme that one or several descriptions make together; they have been found sound."""
    schemes = [(spec.match, SCHEMES[spec.name](spec)) for spec in specs]
    return schemes[0][1] if len(schemes) == 1 else Mixed(parts=tuple(schemes))


def divide_linears(scheme: Scheme, linears: Sequence[str]) -> list[list[str]]:
    """The linears of each of the manifest's schemes, in their order."""
    return scheme.divide(linears) if isinstance(scheme, Mixed) else [list(linears)]


def list_measured(scheme: Scheme, linears: Sequence[str]) -> list[str]:
    """The linears whose inputs calibration has to measure."""
    if isinstance(scheme, Mixed):
        return [linear for linear in linears if scheme.parts[scheme.find_part(linear)][1].measures_inputs]
    return list(linears) if scheme.measures_inputs else []


def bind_scheme(source: manifest.Manifest) -> Scheme:
    """The scheme a manifest names, or the schemes together.

    Raises ManifestError (Problems for several) for a name there is no code for, an option that means nothing to its
    scheme, or a list of which the last, and it alone, is not for all other linears.
    """
    specs = source.release.scheme
    problems: list[BuildError] = []
    for index, spec in enumerate(specs):
        if spec.name not in SCHEMES:
            where = source.where("scheme", index, "name")
            problems.append(ManifestError(f"unknown scheme: {spec.name}", where, nearest(spec.name, SCHEMES)))
            continue
        problems += find_meaningless(source, index, alone=len(specs) == 1)
        problems += find_unmatched(source, index, last=index + 1 == len(specs))
        if source.release.kv_cache and spec.name not in CACHED:
            what = f"kv_cache: {source.release.kv_cache} does not go with {spec.name}"
            fix = f"remove it, or use {', '.join(CACHED)} alone"
            problems.append(ManifestError(what, source.where("kv_cache"), fix))
    raise_all(problems)
    return bind_specs(specs)


def find_meaningless(source: manifest.Manifest, index: int, *, alone: bool) -> Iterator[ManifestError]:
    """What is chosen for a scheme that does not have the choice."""
    spec = source.release.scheme[index]
    meaningless = {}
    if spec.layout == "modelopt" and spec.name != "nvfp4":
        meaningless["layout"] = f"means nothing to {spec.name}: it is written in the layout compressed-tensors"
    elif spec.layout == "modelopt" and not alone:
        meaningless["layout"] = "is for a single scheme: several are written in the layout compressed-tensors"
    if spec.input_scale is not None and spec.name != "nvfp4":
        meaningless["input_scale"] = f"means nothing to {spec.name}: no scales of inputs are stored"
    if spec.block_scale_floor is not None and spec.name not in manifest.NVFP4:
        meaningless["block_scale_floor"] = f"means nothing to {spec.name}: there are no block scales"
    for key, why in meaningless.items():
        yield ManifestError(f"{key} {why}", source.where("scheme", index, key), "remove it")


def find_unmatched(source: manifest.Manifest, index: int, *, last: bool) -> Iterator[ManifestError]:
    """A `match` that is missing, or not a regular expression, or that leaves linears without a scheme."""
    pattern, where = source.release.scheme[index].match, source.where("scheme", index, "match")
    if pattern is None:
        if not last:
            what = "a scheme without match takes all linears, and leaves none to those after it"
            yield ManifestError(what, where, "put it last, or say in match which linears it is for")
        return
    if last:
        what = f"the last scheme is for {pattern} alone, and other linears have none"
        yield ManifestError(what, where, "end with a scheme without match; scheme.ignore keeps linears as they are")
    try:
        matches(pattern, "")
    except re.error as error:
        yield ManifestError(f"{pattern} is not a regular expression: {error}", where, "mend it")
