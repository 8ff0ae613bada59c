"""The reference library's own bytes for a few linears: a program of its own, so that its imports end with it.

That is nvidia-modelopt for NVFP4, and compressed-tensors for all else. Reads a job, as JSON, from standard input:
    {"layout": "compressed-tensors" | "modelopt", "groups": [{"scheme": name, "block_scale_floor": bool,
     "files": {module name: the base's file that holds its weight, ...}}, ...]}   (a group shares one global scale)
and writes {tensor name: sha256 of its bytes} to standard output.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import defaultdict
from contextlib import redirect_stdout
from typing import Any

from builder.machine import end_with_parent

BLOCK = 16
PRESETS = {"fp8_dynamic": "FP8_DYNAMIC", "w8a8": "W8A8", "w4a16": "W4A16"}  # compressed-tensors' names
ROWS_BYTES = 64 << 20  # weights are quantized in bands of rows, which blocks never cross


def quantize_group(files: dict[str, str], layout: str, block_scale_floor: bool) -> dict[str, str]:
    """{tensor name: sha256} of the codes, block scales and global scale of linears that share a global scale."""
    import torch
    from modelopt.torch.quantization.qtensor import NVFP4QTensor
    from safetensors import safe_open

    amax = torch.zeros((), dtype=torch.float32)
    for module, file in files.items():
        with safe_open(file, "pt") as weights:
            for band_RI in bands(weights.get_slice(f"{module}.weight")):
                amax = torch.maximum(amax, band_RI.abs().amax().float())
    global_scale = amax / (6.0 * 448.0)
    compressed = layout == "compressed-tensors"
    digests = {}
    for module, file in files.items():
        codes_hash, scales_hash = hashlib.sha256(), hashlib.sha256()
        with safe_open(file, "pt") as weights:
            for band_RI in bands(weights.get_slice(f"{module}.weight")):
                scales_RB, _ = NVFP4QTensor.get_weights_scaling_factor(
                    band_RI, BLOCK, global_scale, keep_high_precision=not block_scale_floor
                )
                scales_RB = scales_RB.to(torch.float8_e4m3fn)  # changes nothing where the floor was applied
                codes_RH = NVFP4QTensor.quantize(band_RI, BLOCK, scales_RB, global_scale)[0]._quantized_data
                codes_hash.update(codes_RH.contiguous().numpy())
                scales_hash.update(scales_RB.contiguous().view(torch.uint8).numpy())
        stored_global = (1 / global_scale).reshape(1) if compressed else global_scale
        digests[f"{module}.weight_packed" if compressed else f"{module}.weight"] = codes_hash.hexdigest()
        digests[f"{module}.weight_scale"] = scales_hash.hexdigest()
        digests[f"{module}.weight_global_scale" if compressed else f"{module}.weight_scale_2"] = hashlib.sha256(
            stored_global.numpy().tobytes()
        ).hexdigest()
    return digests


def quantize_rounded(files: dict[str, str], preset: str) -> dict[str, str]:
    """{tensor name: sha256} of what compressed-tensors makes of linears, each by itself, as `oneshot` has it do."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams
    from safetensors import safe_open

    scheme = preset_name_to_scheme(preset, ["Linear"])
    compressor = BaseCompressor.get_value_from_registry(infer_module_format(torch.nn.Linear, scheme).value)
    digests: dict[str, str] = {}
    for module, file in files.items():
        hashes: dict[str, Any] = defaultdict(hashlib.sha256)
        with safe_open(file, "pt") as weights:
            weight_OI = weights.get_slice(f"{module}.weight")
            for band_RI in bands(weight_OI):
                groups_RGI = band_RI.unflatten(1, (-1, scheme.weights.group_size or band_RI.shape[1]))
                smallest, largest = groups_RGI.aminmax(dim=-1)
                scale, zero_point = calculate_qparams(smallest, largest, scheme.weights)
                state = {"weight": band_RI, "weight_scale": scale, "weight_zero_point": zero_point}
                for name, tensor in compressor.compress(state, scheme).items():
                    if name != "weight_shape":  # which is the band's
                        hashes[name].update(tensor.contiguous().flatten().view(torch.uint8).numpy())
            if "weight_shape" in compressor.compression_param_names(scheme):
                hashes["weight_shape"].update(torch.tensor(weight_OI.get_shape()).numpy())
        digests |= {f"{module}.{name}": digest.hexdigest() for name, digest in hashes.items()}
    return digests


def bands(weight_OI: Any) -> Any:
    """Consecutive rows of a safetensors slice, at most ROWS_BYTES of float32 at a time, each a fresh tensor."""
    num_rows, num_columns = weight_OI.get_shape()
    step = max(1, ROWS_BYTES // (4 * num_columns))
    for begin in range(0, num_rows, step):
        yield weight_OI[begin : min(begin + step, num_rows)]


def main() -> None:
    end_with_parent()
    job = json.load(sys.stdin)
    digests: dict[str, str] = {}
    with redirect_stdout(sys.stderr):  # the library greets on standard output
        for group in job["groups"]:
            if group["scheme"] in PRESETS:
                digests |= quantize_rounded(group["files"], PRESETS[group["scheme"]])
            else:
                digests |= quantize_group(group["files"], job["layout"], group["block_scale_floor"])
    json.dump(digests, sys.stdout)


if __name__ == "__main__":
    main()
