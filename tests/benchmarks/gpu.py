"""How fast a GPU packs and calibrates an 8B-shaped base of a few layers, and what memory that takes there.

    .venv/bin/python tests/benchmarks/gpu.py [GIGABYTES]

Generates the base, packs one large weight on the GPU and on the CPU, carries rows through the layers under the
observers, and quantizes a layer from its file. Prints a table and writes build/bench/gpu.json. Rates are in GB of bf16
read per second.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bases import LARGE, ROOT, generate_base

from builder import gpu, kernels
from builder.base import Checkpoint, open_checkpoint
from builder.machine_class import describe_machine
from builder.schemes.nvfp4 import Nvfp4
from builder.streaming import LayerStream
from builder.worker import measure_layer, quantize_group

NUM_ROWS, NUM_TOKENS = 64, 512
GROUPS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")
RUNS = 5


def measure(work: Callable[[], object]) -> float:
    """Median seconds of several runs after one to warm up, the GPU's work included."""
    seconds = []
    for _ in range(RUNS + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def measure_packing() -> dict[str, float]:
    """Bytes per second of packing one weight, and of what stands beside it."""
    there = torch.randn(LARGE.intermediate, LARGE.hidden, device="cuda").mul_(0.02).bfloat16()
    here = there.cpu()
    scale = gpu.max_magnitude(there) / 2688
    for found, wanted in zip(gpu.pack_nvfp4(there, scale), kernels.pack_nvfp4(here, scale), strict=True):
        assert torch.equal(found.cpu().view(torch.uint8), wanted.view(torch.uint8)), "the GPU's bits differ"
    works: dict[str, Callable[[], object]] = {
        "copy on the GPU": there.clone,
        "copy to the GPU": lambda: here.to("cuda"),
        "largest magnitude on the GPU": lambda: gpu.max_magnitude(there),
        "pack NVFP4 on the GPU": lambda: gpu.pack_nvfp4(there, scale),
        "largest magnitude on the CPU": lambda: kernels.max_magnitude(here),
        "pack NVFP4 on the CPU": lambda: kernels.pack_nvfp4(here, scale),
    }
    return {name: here.nbytes / measure(work) for name, work in works.items()}


def measure_calibration(checkpoint: Checkpoint) -> dict[str, Any]:
    """Seconds of each layer, from its file to its amax, and the most bytes on the GPU at once."""
    torch.cuda.reset_peak_memory_stats()
    stream = LayerStream(checkpoint, "cuda")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(LARGE.vocabulary, (NUM_ROWS, NUM_TOKENS), generator=generator)
    rows = [stream.embed(row) for row in tokens.tolist()]
    seconds = []
    for index, layer in enumerate(stream.layers):
        linears = [name for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)]
        started = time.perf_counter()
        measure_layer(stream, Nvfp4(), index, rows, [f"{stream.prefix}.{index}.{name}" for name in linears])
        seconds.append(time.perf_counter() - started)  # reading the amax has waited for the GPU
    return {"rows": NUM_ROWS, "tokens": NUM_TOKENS, "layer_s": seconds, "peak_bytes": torch.cuda.max_memory_allocated()}


def measure_quantizing(checkpoint: Checkpoint) -> dict[str, float]:
    """Bytes per second of two groups of linears, from the page cache to bytes on the CPU, and the GPU's peak."""
    torch.cuda.reset_peak_memory_stats()
    groups = [[f"model.layers.0.{name}" for name in group] for group in GROUPS]
    num_bytes = sum(checkpoint.tensors[f"{linear}.weight"].num_bytes for group in groups for linear in group)

    def quantize() -> None:
        for group in groups:
            made = quantize_group(checkpoint, Nvfp4(input_scale="unit"), group, {}, "cuda")
            for tensor in made.values():
                tensor.cpu()

    return {"bytes_per_second": num_bytes / measure(quantize), "peak_bytes": torch.cuda.max_memory_allocated()}


def main() -> None:
    gigabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 4.0
    packing = measure_packing()
    with tempfile.TemporaryDirectory() as name:
        num_bytes = generate_base(Path(name) / "base", gigabytes, LARGE)
        checkpoint = open_checkpoint(Path(name) / "base", "base")
        calibration, quantizing = measure_calibration(checkpoint), measure_quantizing(checkpoint)
    for title, rate in packing.items():
        print(f"{title:<32}{rate / 1e9:8.2f} GB/s")
    print(f"{'quantize from the file':<32}{quantizing['bytes_per_second'] / 1e9:8.2f} GB/s", end="")
    print(f"   peak on the GPU {quantizing['peak_bytes'] / 1e9:.2f} GB")
    print(f"{'calibrate':<32}{statistics.median(calibration['layer_s']):8.2f} s/layer", end="")
    print(f" ({NUM_ROWS} rows of {NUM_TOKENS} tokens)   peak on the GPU {calibration['peak_bytes'] / 1e9:.2f} GB")
    target = ROOT / "build" / "bench" / "gpu.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    told = {
        "machine": describe_machine("cuda"), "num_bytes": num_bytes, "packing_bytes_per_second": packing,
        "calibration": calibration, "quantizing": quantizing,
    }  # fmt: skip
    target.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
