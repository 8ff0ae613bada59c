"""What exact arithmetic costs: calibration's passes beside torch's own, and perplexity on a busy machine.

    python tests/benchmarks/arithmetic.py [GIGABYTES] [--runs N]

A Llama-shaped bf16 base is generated, and 16 rows of 256 tokens go through its layers: in torch's own arithmetic with
the whole model in memory (forward), and layer by layer under our hooks, native and exact. Each has its turn, `runs`
times over, on the machine as it is, and on one without units for bfloat16 or bytes (ONEDNN_MAX_CPU_ISA=AVX512_CORE);
medians count, as ratios to `forward`. Then the perplexity of tiny-llama is measured beside two processes that compute.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import builder  # before torch, whose threads it tells how to wait

CONTENDERS = ("forward", "native", "exact")
ROOT = Path(builder.__file__).parents[1]
MACHINES: dict[str, dict[str, str]] = {"as it is": {}, "without bf16 units": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}}
NUM_ROWS, ROW_TOKENS = 16, 256
SPIN = "while True: sum(range(10**6))"


def run_forward(base: Path, rows: list[list[int]]) -> float:
    """Seconds of the passes through the whole model's layers, after one to warm up."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval().model
    with torch.inference_mode():
        model(torch.tensor(rows[:1]), use_cache=False)
        started = time.perf_counter()
        for row in rows:
            model(torch.tensor([row]), use_cache=False)
    return time.perf_counter() - started


def run_stream(base: Path, rows: list[list[int]], arithmetic: Any) -> float:
    """Seconds that calibration's own loop takes, from opening the base to the last layer's magnitudes."""
    from builder.base import open_checkpoint
    from builder.families import describe_architecture
    from builder.schemes.nvfp4 import Nvfp4
    from builder.streaming import LayerStream
    from builder.worker import measure_layer

    checkpoint = open_checkpoint(base, "the base")
    layers = describe_architecture(checkpoint.config, "the base").layers
    warm_up(checkpoint, layers[0].linears, rows[0], arithmetic)
    started = time.perf_counter()
    stream = LayerStream(checkpoint, "cpu", arithmetic)
    embedded = [stream.embed(row) for row in rows]
    for layer in layers:
        measure_layer(stream, Nvfp4(), layer.index, embedded, layer.linears)
    return time.perf_counter() - started


def warm_up(checkpoint: Any, linears: Any, row: list[int], arithmetic: Any) -> None:
    """One row through one layer: what is compiled or chosen once."""
    from builder.schemes.nvfp4 import Nvfp4
    from builder.streaming import LayerStream
    from builder.worker import measure_layer

    stream = LayerStream(checkpoint, "cpu", arithmetic)
    measure_layer(stream, Nvfp4(), 0, [stream.embed(row)], linears)


def measure_perplexity() -> float:
    """Seconds that the perplexity of tiny-llama takes."""
    from builder.perplexity import measure_perplexity, open_base, split_text

    base = ROOT / "releases/tiny-llama/base"
    held_out = split_text(base.parent / "heldout.txt", base, 512, "the held-out text")
    measure_perplexity(open_base(base), held_out.windows[:1], first=held_out.first)
    started = time.perf_counter()
    measure_perplexity(open_base(base), held_out.windows, first=held_out.first)
    return time.perf_counter() - started


def ask_child(name: str, base: Path, variables: dict[str, str]) -> float:
    command = [sys.executable, __file__, "--child", name, "--base", str(base)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return float(output.splitlines()[-1])


def answer(name: str, base: Path) -> float:
    rows = [[(7 * number + place) % 500 for place in range(ROW_TOKENS)] for number in range(NUM_ROWS)]
    if name == "perplexity":
        return measure_perplexity()
    return run_forward(base, rows) if name == "forward" else run_stream(base, rows, name)


def compare(base: Path, runs: int) -> dict[str, dict[str, float]]:
    told: dict[str, dict[str, float]] = {}
    for machine, variables in MACHINES.items():
        seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        for _ in range(runs):
            for name in CONTENDERS:
                seconds[name].append(ask_child(name, base, variables))
                print(f"  {machine}, {name}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)
        told[machine] = {name: statistics.median(values) for name, values in seconds.items()}
    return told


def measure_busy() -> float:
    """Seconds of perplexity while two other processes compute."""
    others = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(2)]
    try:
        return ask_child("perplexity", Path(), {})
    finally:
        for other in others:
            other.kill()
            other.wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("gigabytes", type=lambda text: float(text.removesuffix("GB")), nargs="?", default=0.5)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--child")
    parser.add_argument("--base", type=Path)
    options = parser.parse_args()
    if options.child:
        print(answer(options.child, options.base))
        return
    with tempfile.TemporaryDirectory() as folder:
        generate = [sys.executable, str(Path(__file__).with_name("bases.py")), f"{folder}/base", str(options.gigabytes)]
        num_bytes = int(subprocess.run(generate, check=True, capture_output=True, text=True).stdout)
        told = compare(Path(folder) / "base", options.runs)
    print(f"| {NUM_ROWS} rows of {ROW_TOKENS} tokens, base of {num_bytes / 1e9:.2f} GB | forward s | native | exact |")
    print("|---|--:|--:|--:|")
    for machine, seconds in told.items():
        ratios = " | ".join(f"{seconds[name] / seconds['forward']:.2f} x" for name in ("native", "exact"))
        print(f"| {machine} | {seconds['forward']:.2f} | {ratios} |")
    alone, busy = ask_child("perplexity", Path(), {}), measure_busy()
    print(f"\nperplexity of tiny-llama: {alone:.1f} s, and {busy:.1f} s beside two busy processes")
    results = ROOT / "build" / "bench"
    results.mkdir(parents=True, exist_ok=True)
    content = {"num_bytes": num_bytes, "seconds": told, "perplexity": {"alone": alone, "busy": busy}}
    (results / "arithmetic.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
