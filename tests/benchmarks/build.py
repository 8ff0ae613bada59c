"""How long a weights-only NVFP4 build takes, beside a plain copy of its base, in one run.

    .venv/bin/python tests/benchmarks/build.py [GIGABYTES ...]

Generates a Llama-shaped bf16 base of each size, copies it with fsync, and quantizes it with `input_scale: unit` up to
the finished, hashed and indexed artifact. Prints a table and writes build/bench/build.json.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCABULARY = 2048, 8192, 32, 8, 32000
MANIFEST = """\
manifest: 1
title: Benchmark
repo: release-builder/benchmark
base: {path: base, licenses: [psf-2.0]}
scheme: {name: nvfp4, input_scale: unit}
executor: processes
shards: 2
"""


def generate_base(folder: Path, gigabytes: float) -> int:
    """A random Llama of about that size, layer by layer; returns its bytes."""
    import torch
    from safetensors.torch import save_file

    shutil.copytree(ROOT / "releases" / "tiny-llama" / "base", folder, ignore=shutil.ignore_patterns("model*"))
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)

    edges = {"model.embed_tokens.weight": draw(VOCABULARY, HIDDEN), "lm_head.weight": draw(VOCABULARY, HIDDEN)}
    edges["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    layer_bytes = 2 * sum(rows * columns for rows, columns in shapes.values())
    num_layers = max(2, round((gigabytes * 1e9 - 4 * VOCABULARY * HIDDEN) / layer_bytes))
    weight_map = dict.fromkeys(edges, "model-edges.safetensors")
    save_file(edges, folder / "model-edges.safetensors", {"format": "pt"})
    for layer in range(num_layers):
        tensors = {f"model.layers.{layer}.{name}.weight": draw(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        file = f"model-layer-{layer:05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HIDDEN // HEADS, "vocab_size": VOCABULARY,
        "num_hidden_layers": num_layers,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return sum(path.stat().st_size for path in folder.iterdir())


def copy_base(base: Path, target: Path) -> float:
    """Seconds of `cp` and an fsync of every file."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(base), str(target)], check=True)
    for path in target.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - started


def build(project: Path) -> dict[str, float]:
    """Seconds of each step of a build as its receipts tell, of the whole command, and the workers' peak bytes."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "doit", "assemble:benchmark"]
    subprocess.run(
        command, cwd=project, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    told = {"command": time.perf_counter() - started}
    for step in ("plan", "fetch", "quantize", "assemble"):
        receipt = json.loads((project / "build" / "benchmark" / "receipts" / f"{step}.json").read_text())
        told[step] = receipt["circumstances"]["seconds"]
        if step == "quantize":
            told["peak_bytes"] = receipt["circumstances"]["peak_bytes"]
    return told


def main() -> None:
    rows = []
    for size in [float(text) for text in sys.argv[1:]] or [0.5]:
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
            project = Path(name)
            (project / "releases").mkdir()
            shutil.copy(ROOT / "pyproject.toml", project)
            (project / "releases" / "benchmark.yaml").write_text(MANIFEST)
            num_bytes = generate_base(project / "releases" / "base", size)
            copy_s = copy_base(project / "releases" / "base", project / "copy")
            shutil.rmtree(project / "copy")
            told = build(project)
        rows.append({"num_bytes": num_bytes, "copy_s": copy_s, **told})
        print(
            f"{num_bytes / 1e9:6.2f} GB   cp + fsync {copy_s:6.1f} s   build {told['command']:6.1f} s "
            f"(plan {told['plan']:.1f}, digests of the base {told['fetch']:.1f}, quantize {told['quantize']:.1f}, "
            f"assemble {told['assemble']:.1f})   worker's peak {told['peak_bytes'] / 1e9:.2f} GB",
            flush=True,
        )
    target = ROOT / "build" / "bench" / "build.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
