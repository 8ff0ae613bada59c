"""How fast NVFP4 packing is, beside a plain copy and beside the reference library, in one run.

    .venv/bin/python tests/benchmarks/packing.py [ROWS COLUMNS]

Prints a table of medians and writes build/bench/packing.json. Rates are in GB of the weight read per second; it is
bfloat16 where no other dtype is named.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numba
import torch
from modelopt.torch.quantization.qtensor import NVFP4QTensor

from builder.kernels import max_magnitude, pack_nvfp4

RUNS = 5


def measure(work: Callable[[], object]) -> float:
    """Median seconds of several runs after one to warm up."""
    work()
    seconds = []
    for _ in range(RUNS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main() -> None:
    rows, columns = map(int, sys.argv[1:3]) if len(sys.argv) > 2 else (4096, 14336)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
    scale = max_magnitude(weight) / 2688
    part = weight[: max(1, rows // 16)].clone()
    part_scale = torch.tensor(max_magnitude(part) / 2688)

    def reference() -> None:
        scales, _ = NVFP4QTensor.get_weights_scaling_factor(part, 16, part_scale)
        NVFP4QTensor.quantize(part.clone(), 16, scales, part_scale)

    def with_threads(count: int, work: Callable[[], object]) -> float:
        torch.set_num_threads(count)
        numba.set_num_threads(count)
        return measure(work)

    counts = sorted({1, numba.config.NUMBA_NUM_THREADS})
    rates: dict[str, float] = {}
    for count in counts:
        rates[f"copy, {count} threads"] = weight.nbytes / with_threads(count, weight.clone)
        rates[f"largest magnitude, {count} threads"] = weight.nbytes / with_threads(
            count, lambda: max_magnitude(weight)
        )
        rates[f"pack NVFP4, {count} threads"] = weight.nbytes / with_threads(count, lambda: pack_nvfp4(weight, scale))
        for dtype in (torch.float16, torch.float32):
            other = weight.to(dtype)
            name = f"pack NVFP4 of {str(dtype).removeprefix('torch.')}, {count} threads"
            rates[name] = other.nbytes / with_threads(count, partial(pack_nvfp4, other, scale))
        rates[f"modelopt NVFP4, {count} threads"] = part.nbytes / with_threads(count, reference)
    for name, rate in rates.items():
        ratio = rate / rates[f"modelopt NVFP4, {name.rpartition(', ')[2]}"]
        print(f"{name:<40}{rate / 1e9:8.2f} GB/s {ratio:8.1f} x modelopt")
    target = Path("build/bench/packing.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"shape": [rows, columns], "bytes_per_second": rates}, indent=2) + "\n")


if __name__ == "__main__":
    main()
