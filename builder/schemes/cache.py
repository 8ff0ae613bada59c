"""FP8 scales of the KV cache: one for the keys of a layer and one for its values, the largest magnitude over 448.

Keys are observed as they go into the cache, after their rotation, in the unquantized model. The `modelopt` layout holds
what nvidia-modelopt's export does (`FP8_KV_CFG`): float32 quotients. The `compressed-tensors` layout holds what
llm-compressor's `oneshot` stores with a static maximum: quotients rounded to the model's dtype. Engines take them for
multipliers, and make the cache FP8 because config.json speaks of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from builder.base import Tensor
from builder.families import watch_cache
from builder.floats import FLOATS
from builder.schemes.compressed import describe_arguments
from builder.schemes.magnitudes import Amax, finite, max_magnitude

if TYPE_CHECKING:
    import torch

LARGEST = np.float32(448)  # of E4M3
KINDS = ("key", "value")


def name_scales(attention: str, layout: str) -> tuple[str, str]:
    """The names of the scales of keys and values."""
    if layout == "modelopt":
        return f"{attention}.k_proj.k_scale", f"{attention}.v_proj.v_scale"
    return f"{attention}.k_scale", f"{attention}.v_scale"


def plan_scales(attention: str, layout: str, dtype: str) -> tuple[Tensor, ...]:
    """The tensors that a layer has besides. dtype: what the model computes in."""
    own, shape = ("F32", ()) if layout == "modelopt" else (dtype, (1,))
    return tuple(Tensor(name=name, dtype=own, shape=shape) for name in name_scales(attention, layout))


def make_scales(attention: str, layout: str, dtype: str, amax: Mapping[str, float]) -> dict[str, NDArray[Any]]:
    """The planned tensors, in the dtype that was planned; bfloat16 as uint16, by its bits.

    amax: {"key": float, "value": float}, exact in float32.
    """
    scales = {}
    for name, kind in zip(name_scales(attention, layout), KINDS, strict=True):
        quotient = np.array(np.float32(amax[kind]) / LARGEST)
        if layout != "modelopt":
            rounded = FLOATS[dtype].round(quotient.reshape(1))
            # llm-compressor's way with a maximum that is too small for a scale in this dtype
            quotient = rounded if rounded else FLOATS[dtype].round(np.array([FLOATS[dtype].epsilon], np.float32))
        scales[name] = quotient
    return scales


@contextmanager
def observe_cache(layer: torch.nn.Module, prefix: str, attention: str) -> Iterator[Callable[[], Amax]]:
    """Note max |k| and max |v| of what goes into an attention's cache while the block runs; it computes as before.

    prefix: what comes before a module's name within the layer. Yields a function that reads {attention: {"key": amax,
    "value": amax}}, or nothing if nothing passed. It raises CalibrationError naming an attention that met a NaN or an
    infinity.
    """
    largest: dict[str, torch.Tensor] = {}

    def note(*states: torch.Tensor) -> None:
        for kind, state in zip(KINDS, states, strict=True):
            seen = max_magnitude(state)
            largest[kind] = seen if kind not in largest else largest[kind].maximum(seen)  # a NaN stays

    def read() -> Amax:
        found = {kind: finite(seen, attention, kind) for kind, seen in largest.items()}
        return {attention: found} if found else {}

    handle = watch_cache(layer.get_submodule(attention.removeprefix(prefix)), note)
    try:
        yield read
    finally:
        handle.remove()


def describe_cache(quantization: Mapping[str, Any], layout: str) -> dict[str, Any]:
    """A `quantization_config` that speaks of the cache."""
    if layout == "modelopt":
        return {**quantization, "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}}
    scheme = describe_arguments(num_bits=8, type="float", strategy="tensor", observer="static_minmax")
    return {**quantization, "kv_cache_scheme": scheme}


def describe_cache_beside(configs: Mapping[str, Any]) -> dict[str, Any]:
    """The further files of a layout, by name, that speak of the cache."""
    return {
        name: {**config, "quantization": {**config["quantization"], "kv_cache_quant_algo": "FP8"}}
        for name, config in configs.items()
    }
