"""FP8, INT8 and INT4: weights rounded to codes of 8 or 4 bits, with a scale for each row or group of columns.

Scales have the dtype of their weight.

The arithmetic is compressed-tensors', bit for bit as llm-compressor's `oneshot` runs it on the CPU
(`compressed_tensors.quantization.utils.calculate_qparams` and `quantization.lifecycle.forward.quantize`). Nothing is
measured: where activations are quantized, their scales are found while serving.

Shapes: O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from builder.base import Tensor
from builder.errors import LayoutError
from builder.schemes.compressed import describe_arguments, describe_compressed
from builder.schemes.loops import as_given, check_matrix, find_loops, max_magnitude
from builder.schemes.magnitudes import Amax, observe_magnitudes

if TYPE_CHECKING:
    import torch

    Weight = torch.Tensor | NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """One of the schemes below; see `builder.schemes.Scheme`.

    format: compressed-tensors' name of what is stored. loop: the function of `builder.kernels` that makes it.
    codes: what codes are called and stored as; codes_per_item: how many of them in one stored number.
    group: columns that share a scale, None for whole rows.
    weights, inputs: compressed-tensors' quantization arguments; no inputs where activations stay in 16 bits.
    """

    name: str
    format: str
    loop: str
    codes: str
    dtype: str
    codes_per_item: int = 1
    group: int | None = None
    weights: Mapping[str, Any]
    inputs: Mapping[str, Any] | None
    layout: str = "compressed-tensors"
    measures_inputs: bool = False

    def plan_linear(self, linear: str, weight: Tensor) -> tuple[Tensor, ...]:
        check_matrix(linear, weight, self.group or 1)
        out_features, in_features = weight.shape
        num_scales = in_features // self.group if self.group else 1
        codes = Tensor(
            name=f"{linear}.{self.codes}", dtype=self.dtype, shape=(out_features, in_features // self.codes_per_item)
        )
        scale = Tensor(name=f"{linear}.weight_scale", dtype=weight.dtype, shape=(out_features, num_scales))
        if self.codes_per_item == 1:
            return codes, scale
        return codes, scale, Tensor(name=f"{linear}.weight_shape", dtype="I64", shape=(2,))

    def observe(
        self, layer: torch.nn.Module, prefix: str, linears: Sequence[str]
    ) -> AbstractContextManager[Callable[[], Amax]]:
        return observe_magnitudes(layer, prefix, linears)

    def quantize_group(self, weights: Mapping[str, Weight], input_amax: Mapping[str, float]) -> dict[str, Any]:
        """weights: [O, I] by linear, each quantized by itself; input_amax: unused.

        Raises LayoutError naming a linear if a weight is not finite. One that is all zero stays so.
        """
        tensors: dict[str, Any] = {}
        for linear in weights:
            weight_OI = weights[linear]
            if not max_magnitude(weight_OI) < float("inf"):
                raise LayoutError(
                    f"the weights of {linear} are not finite",
                    f"{linear}.weight",
                    f"fetch the base model again, or add {linear} to scheme.ignore",
                )
            codes, scales = getattr(find_loops(weight_OI), self.loop)(weight_OI)
            tensors |= {f"{linear}.{self.codes}": codes, f"{linear}.weight_scale": scales}
            if self.codes_per_item > 1:
                tensors[f"{linear}.weight_shape"] = as_given(weight_OI, np.array(weight_OI.shape, np.int64))
        return tensors

    def quantization_config(
        self, ignore: Sequence[str], embeddings: Sequence[str] = (), linears: Sequence[str] = ()
    ) -> dict[str, Any]:
        return describe_compressed(self.format, self.weights, self.inputs, ignore)

    def extra_configs(self, ignore: Sequence[str], embeddings: Sequence[str] = ()) -> dict[str, Any]:
        return {}


def by_token(kind: str) -> dict[str, Any]:
    """Activations in 8 bits, a scale to each token, found while serving."""
    return describe_arguments(num_bits=8, type=kind, strategy="token", dynamic=True, observer=None)


FP8_DYNAMIC = Rounded(
    name="fp8_dynamic",
    format="float-quantized",
    loop="quantize_fp8",
    codes="weight",
    dtype="F8_E4M3",
    weights=describe_arguments(num_bits=8, type="float", strategy="channel"),
    inputs=by_token("float"),
)
W8A8 = Rounded(
    name="w8a8",
    format="int-quantized",
    loop="quantize_int8",
    codes="weight",
    dtype="I8",
    weights=describe_arguments(num_bits=8, type="int", strategy="channel"),
    inputs=by_token("int"),
)
W4A16 = Rounded(
    name="w4a16",
    format="pack-quantized",
    loop="pack_int4",
    codes="weight_packed",
    dtype="I32",
    codes_per_item=8,
    group=128,
    weights=describe_arguments(num_bits=4, type="int", strategy="group", group_size=128),
    inputs=None,
)
ROUNDED = {scheme.name: scheme for scheme in (FP8_DYNAMIC, W8A8, W4A16)}
