"""The `quantization_config` as compressed-tensors writes it: every key, those that say nothing included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def describe_arguments(
    *,
    num_bits: int,
    type: str,
    strategy: str,
    group_size: int | None = None,
    dynamic: bool | str = False,
    scale_dtype: str | None = None,
    observer: str | None = "memoryless_minmax",
) -> dict[str, Any]:
    """How weights or activations are quantized, in the words of compressed-tensors' `QuantizationArgs`."""
    return {
        "actorder": None,
        "block_structure": None,
        "dynamic": dynamic,
        "group_size": group_size,
        "num_bits": num_bits,
        "observer": observer,
        "observer_kwargs": {},
        "scale_dtype": scale_dtype,
        "strategy": strategy,
        "symmetric": True,
        "type": type,
        "zp_dtype": None,
    }


def describe_compressed(
    format: str, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None, ignore: Sequence[str]
) -> dict[str, Any]:
    """The `quantization_config` of a model whose linears, but for those to ignore, are quantized in one way."""
    from importlib.metadata import version

    return {
        "config_groups": {
            "group_0": {
                "format": format,
                "input_activations": inputs and dict(inputs),
                "output_activations": None,
                "targets": ["Linear"],
                "weights": dict(weights),
            }
        },
        "format": format,
        "global_compression_ratio": None,
        "ignore": sorted(ignore),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": version("compressed-tensors"),
    }
