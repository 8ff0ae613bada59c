"""NVFP4 (W4A4, or W4A16): 4-bit floats in blocks of 16 with an FP8 scale each, and a float32 scale per fused group.

The arithmetic is nvidia-modelopt's, bit for bit (`modelopt.torch.quantization.qtensor.NVFP4QTensor` and
`modelopt.torch.export`): a group's weight scale is max |W| / (6 * 448) over its linears, its input scale
max |x| / (6 * 448). The `compressed-tensors` layout stores the same bytes under other names and both scales as
reciprocals.

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

BLOCK = 16
LARGEST = 6.0 * 448.0  # the largest E2M1 magnitude times the largest E4M3 magnitude
UNIT_SCALE = 1.0
KINDS = ("weight", "input")


@dataclass(frozen=True, kw_only=True)
class Nvfp4:
    """NVFP4 in one of its two layouts; see `builder.schemes.Scheme`.

    quantizes_inputs: False for `nvfp4a16`, which has the same weights and no input scales.
    input_scale: "calibrated", or "unit" for the constant 1.0 that needs no calibration.
    block_scale_floor: whether block scales are held at 2^-9 or more, as modelopt does since 0.47.
    """

    layout: str = "compressed-tensors"
    quantizes_inputs: bool = True
    input_scale: str = "calibrated"
    block_scale_floor: bool = True
    name: str = "nvfp4"

    @property
    def measures_inputs(self) -> bool:
        return self.quantizes_inputs and self.input_scale == "calibrated"

    @property
    def names(self) -> tuple[str, str, tuple[str, ...]]:
        """What the layout calls packed weights, block scales, and the global scales: the weights', the inputs'."""
        if self.layout == "modelopt":
            packed, scale, global_scales = "weight", "weight_scale", ("weight_scale_2", "input_scale")
        else:
            packed, scale = "weight_packed", "weight_scale"
            global_scales = ("weight_global_scale", "input_global_scale")
        return packed, scale, global_scales if self.quantizes_inputs else global_scales[:1]

    def plan_linear(self, linear: str, weight: Tensor) -> tuple[Tensor, ...]:
        check_matrix(linear, weight, BLOCK)
        out_features, in_features = weight.shape
        packed, scale, global_scales = self.names
        scalar = () if self.layout == "modelopt" else (1,)
        return (
            Tensor(name=f"{linear}.{packed}", dtype="U8", shape=(out_features, in_features // 2)),
            Tensor(name=f"{linear}.{scale}", dtype="F8_E4M3", shape=(out_features, in_features // BLOCK)),
            *(Tensor(name=f"{linear}.{name}", dtype="F32", shape=scalar) for name in global_scales),
        )

    def observe(
        self, layer: torch.nn.Module, prefix: str, linears: Sequence[str]
    ) -> AbstractContextManager[Callable[[], Amax]]:
        return observe_magnitudes(layer, prefix, linears)

    def quantize_group(self, weights: Mapping[str, Weight], input_amax: Mapping[str, float]) -> dict[str, Any]:
        """weights: [O, I] by linear, not all of one dtype perhaps; input_amax: by linear, unused with unit scales.

        Raises LayoutError naming a linear if a weight is all zero or not finite, or if magnitudes are so small that
        the reciprocal of their scale, which the compressed-tensors layout stores, is infinite.
        """
        amax = {linear: max_magnitude(weight) for linear, weight in weights.items()}
        for linear, value in amax.items():
            if not 0.0 < value < float("inf"):
                raise LayoutError(
                    f"the weights of {linear} are {'all zero' if value == 0.0 else 'not finite'}",
                    f"{linear}.weight",
                    f"add {linear} to scheme.ignore if the base model is meant to be so, or fetch it again",
                )
        weight_scale = np.float32(max(amax.values())) / np.float32(LARGEST)
        input_scale = np.float32(UNIT_SCALE)
        if self.measures_inputs:
            input_scale = np.float32(max(input_amax[linear] for linear in weights)) / np.float32(LARGEST)
        packed, scale, global_scales = self.names
        stored = [np.array(weight_scale), np.array(input_scale)][: len(global_scales)]
        if self.layout == "compressed-tensors":
            with np.errstate(divide="ignore", over="ignore"):  # an infinity is refused below
                stored = [np.float32(1) / scale.reshape(1) for scale in stored]
        for kind, global_scale in zip(KINDS, stored, strict=False):
            if not 0.0 < global_scale.item() < float("inf"):
                linear = next(iter(weights))
                raise LayoutError(
                    f"the {kind} scale of {linear} would be {global_scale.item()}",
                    f"{linear}.weight",
                    f"add {linear} to scheme.ignore, or see whether the base model is sound",
                )
        tensors: dict[str, Any] = {}
        for linear, weight in weights.items():
            tensors[f"{linear}.{packed}"], tensors[f"{linear}.{scale}"] = self.pack(weight, weight_scale.item())
            for name, global_scale in zip(global_scales, stored, strict=True):
                tensors[f"{linear}.{name}"] = as_given(weight, global_scale)
        return tensors

    def pack(self, weight_OI: Weight, weight_scale: float) -> tuple[Any, Any]:
        """Codes uint8 [O, I / 2] and block scales float8_e4m3fn [O, I / 16], where the weight is.

        weight_scale: a float32 value.
        """
        packed: tuple[Any, Any] = find_loops(weight_OI).pack_nvfp4(
            weight_OI, weight_scale, block_scale_floor=self.block_scale_floor
        )
        return packed

    def quantization_config(
        self, ignore: Sequence[str], embeddings: Sequence[str] = (), linears: Sequence[str] = ()
    ) -> dict[str, Any]:
        if self.layout == "modelopt":
            return self.modelopt_config([*ignore, *embeddings])
        if not self.quantizes_inputs:
            weights = describe_arguments(
                num_bits=4, type="float", strategy="tensor_group", group_size=BLOCK, scale_dtype="torch.float8_e4m3fn"
            )
            return describe_compressed("nvfp4-pack-quantized", weights, None, ignore)
        from importlib.metadata import version

        weights = {
            "num_bits": 4,
            "type": "float",
            "strategy": "tensor_group",
            "group_size": BLOCK,
            "symmetric": True,
            "dynamic": False,
            "scale_dtype": "torch.float8_e4m3fn",
        }
        return {
            "config_groups": {
                "group_0": {
                    "format": "nvfp4-pack-quantized",
                    "input_activations": {**weights, "dynamic": "local"},
                    "targets": ["Linear"],
                    "weights": weights,
                }
            },
            "format": "nvfp4-pack-quantized",
            "ignore": sorted(ignore),
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "version": version("compressed-tensors"),
        }

    def modelopt_config(self, ignore: Sequence[str]) -> dict[str, Any]:
        """As `export_hf_checkpoint` of modelopt 0.47 writes it, from which engines know the layout.

        ignore: modules by their whole names, where modelopt may shorten several to a prefix with a star.
        """
        quantizer = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK}
        return {
            "config_groups": {
                "group_0": {"input_activations": quantizer, "weights": dict(quantizer), "targets": ["Linear"]}
            },
            "ignore": sorted(ignore),
            "quant_algo": "NVFP4",
            "producer": describe_producer(),
            "quant_method": "modelopt",
        }

    def extra_configs(self, ignore: Sequence[str], embeddings: Sequence[str] = ()) -> dict[str, Any]:
        if self.layout != "modelopt":
            return {}
        quantization = {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": None,
            "group_size": BLOCK,
            "exclude_modules": sorted([*ignore, *embeddings]),
        }
        return {"hf_quant_config.json": {"producer": describe_producer(), "quantization": quantization}}


def describe_producer() -> dict[str, str]:
    """The library whose format and arithmetic the layout is."""
    from importlib.metadata import version

    return {"name": "modelopt", "version": version("nvidia-modelopt")}
