"""Tiny models of many families, with the same random weights on every machine.

The weights are whole numbers, drawn by numpy and scaled by a power of two: torch's own random numbers differ with the
instruction set.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SMALL = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {"sliding_window": 16}
ALTERNATING = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
LONG_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GRANITE = {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.7, "attention_multiplier": 0.2}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 192}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}

# Those that the builder builds: read layer by layer, as it reads them.
BUILT: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": LONG_ROPE}),
    "mistral": ("mistral", WINDOW),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", WINDOW),
    "gemma3": ("gemma3_text", ALTERNATING),
    "cohere2": ("cohere2", ALTERNATING),
    "phi3": ("phi3", {}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", GRANITE),
    "starcoder2": ("starcoder2", WINDOW),
    "glm4": ("glm4", {}),
}
# Those that it cannot build yet: run whole, by transformers.
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 8, "norm_topk_prob": True, **EXPERTS}),
    "deepseek_v2": (
        "deepseek_v2",
        {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4}
        | EXPERTS
        | LATENT,
    ),
}
# Those whose operations exact arithmetic may refuse, by name.
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            "layer_types": ["mamba", "attention"] * 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 64,
            "mamba_n_heads": 32,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_chunk_size": 16,
        },
    ),
    "qwen3_next": (
        "qwen3_next",
        {
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "num_experts": 4,
            "shared_expert_intermediate_size": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        }
        | EXPERTS,
    ),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"] * 2, "conv_L_cache": 3}),
}
FAMILIES = BUILT | MIXTURES | HYBRIDS
ROWS = [[1, *((7 * step * step + 3 * step + length) % 120 + 3 for step in range(length))] for length in (24, 90)]


def make_model(name: str) -> PreTrainedModel:
    """A family's tiny model in bfloat16, eager in every part."""
    import torch
    import transformers

    model_type, changes = FAMILIES[name]
    config = transformers.CONFIG_MAPPING[model_type](**{**SMALL, **changes})
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16, attn_implementation="eager", experts_implementation="eager"
    )
    draw_weights(model)
    return model.eval()


def draw_weights(model: PreTrainedModel) -> None:
    """Give a model its weights: matrices by the number of their inputs, vectors a little off what they begin with."""
    import numpy as np
    import torch

    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
            drawn = np.random.default_rng(seed).integers(-128, 128, (4, *parameter.shape)).sum(0, dtype=np.int64)
            if parameter.dim() > 1:  # of deviation 148 before it is scaled
                scale = 2.0 ** -(7 + round(math.log2(parameter.shape[-1]) / 2))
                parameter.copy_(torch.from_numpy(drawn * scale))
            else:
                if (parameter != parameter[0]).any():  # the model drew it itself
                    parameter.zero_()
                parameter.add_(torch.from_numpy(drawn * 2.0**-11).to(parameter.dtype))


def digest_weights(model: PreTrainedModel) -> str:
    """sha256, in hex, of the weights' bytes: the drill itself has to be the same everywhere."""
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
