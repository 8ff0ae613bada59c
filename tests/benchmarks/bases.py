"""Generated Llama-shaped base models of any size, for benchmarks: random bf16 weights, the small model's tokenizer."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
SMALL_MODEL = ROOT / "releases" / "tiny-llama" / "base"


@dataclass(frozen=True)
class Shape:
    """Widths of a model; its layers are as many as its size asks for."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int


SMALL = Shape(1024, 4096, 16, 4, 8192)
MEDIUM = Shape(2048, 8192, 32, 8, 32000)
LARGE = Shape(4096, 14336, 32, 8, 128256)  # an 8B Llama's


def choose_shape(gigabytes: float) -> Shape:
    """Widths that go with a size."""
    return SMALL if gigabytes < 0.5 else MEDIUM if gigabytes < 8 else LARGE


def generate_base(folder: Path, gigabytes: float, shape: Shape | None = None) -> int:
    """A random Llama of about that size, one file a layer; returns the bytes of its weights."""
    shape = shape or choose_shape(gigabytes)
    shutil.copytree(SMALL_MODEL, folder, ignore=shutil.ignore_patterns("model*"))
    hidden, inner, kv = shape.hidden, shape.intermediate, shape.hidden // shape.heads * shape.kv_heads
    linears = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return (torch.randn(size, generator=generator) * 0.02).to(torch.bfloat16)

    def ones() -> torch.Tensor:
        return torch.ones(hidden, dtype=torch.bfloat16)

    edge = (shape.vocabulary, hidden)
    edges = {"model.embed_tokens.weight": draw(*edge), "model.norm.weight": ones(), "lm_head.weight": draw(*edge)}
    layer_bytes = 2 * sum(rows * columns for rows, columns in linears.values())
    num_layers = max(2, round((gigabytes * 1e9 - 4 * shape.vocabulary * hidden) / layer_bytes))
    weight_map = dict.fromkeys(edges, "model-edges.safetensors")
    save_file(edges, folder / "model-edges.safetensors", {"format": "pt"})
    for layer in range(num_layers):
        prefix, file = f"model.layers.{layer}", f"model-layer-{layer:05d}.safetensors"
        tensors = {f"{prefix}.{name}.weight": draw(*size) for name, size in linears.items()}
        tensors |= {f"{prefix}.{norm}.weight": ones() for norm in ("input_layernorm", "post_attention_layernorm")}
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": hidden // shape.heads,
        "vocab_size": shape.vocabulary,
        "num_hidden_layers": num_layers,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


if __name__ == "__main__":
    print(generate_base(Path(sys.argv[1]), float(sys.argv[2])))
