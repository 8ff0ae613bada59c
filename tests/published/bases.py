"""Bases of any shape, the same bytes wherever they are made: bits come from Python's own generator."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

TOKENIZER = {
    "tokenizer.json": '{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}',
    "tokenizer_config.json": '{"eos_token": "<é>"}',
    "tokenizer.model": "not a real one",
    "chat_template.jinja": "{{ messages }}",
    "generation_config.json": '{"temperature": 0.6, "eos_token_id": [1, 3]}',
}


def make_base(folder: Path, config: dict[str, Any], seed: int) -> None:
    """A Llama or Mistral in bfloat16 with random weights of moderate size, in one file."""
    folder.mkdir(parents=True)
    generator = random.Random(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim") or hidden // heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (heads * width, hidden),
            f"{prefix}.self_attn.k_proj.weight": (groups * width, hidden),
            f"{prefix}.self_attn.v_proj.weight": (groups * width, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, heads * width),
            f"{prefix}.mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}.mlp.up_proj.weight": (inner, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, inner),
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
        }
        if config.get("attention_bias"):
            shapes |= {
                f"{prefix}.self_attn.{name}_proj.bias": shapes[f"{prefix}.self_attn.{name}_proj.weight"][:1]
                for name in "qkvo"
            }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (config["vocab_size"], hidden)}
    save_file(
        {name: make_weight(generator, shape) for name, shape in shapes.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name, text in TOKENIZER.items():
        (folder / name).write_text(text, "utf-8")


def make_weight(generator: random.Random, shape: tuple[int, ...]) -> torch.Tensor:
    """bfloat16 of random sign and mantissa, magnitudes from 2^-11 to 2^-3."""
    count = torch.Size(shape).numel()
    bits = torch.frombuffer(bytearray(generator.randbytes(2 * count)), dtype=torch.int16).to(torch.int32)
    bits = (bits & 0x807F) | ((116 + ((bits >> 7) & 7)) << 7)
    return bits.to(torch.int16).view(torch.bfloat16).reshape(shape)
