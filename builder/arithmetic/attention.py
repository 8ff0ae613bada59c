"""A model's own attention, some queries at a time: the table of its scores would outgrow a layer's weights.

Scores of a query, their softmax and what they weigh do not depend on other queries, and the scales of keys and values
come from all positions whichever queries there are. So no bit depends on how many are taken together.

Shapes: B rows, H heads, T queries, S keys, D head size.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "some_queries_at_a_time"
WORKSPACE_BYTES = 128 << 20
BYTES_PER_SCORE = 14  # as the model's dtype, float32 and its copy, and integers in float64 of some heads
FEWEST_QUERIES = 16


def attend(
    module: torch.nn.Module,
    query_BHTD: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """What `eager_attention_forward` of the module's own file yields, [B, T, H, D]; weights are not given back."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    num_rows, num_heads, num_queries, _ = query_BHTD.shape
    step = max(FEWEST_QUERIES, WORKSPACE_BYTES // (BYTES_PER_SCORE * num_rows * num_heads * key.shape[2]))
    parts = []
    for start in range(0, num_queries, step):
        some = slice(start, start + step)
        mask = attention_mask
        if mask is not None and mask.shape[-2] == num_queries:
            mask = mask[..., some, :]
        parts.append(eager(module, query_BHTD[:, :, some], key, value, mask, **options)[0])
    return torch.cat(parts, dim=1), None


def use_eager_code(model: PreTrainedModel) -> None:
    """Have a model run attention and experts in its own code, attention some queries at a time where that can be."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    files = [sys.modules[type(module).__module__] for module in model.modules()]
    if model._can_set_attn_implementation() and any(hasattr(file, "eager_attention_forward") for file in files):
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, eager_mask)
        model.set_attn_implementation(NAME)
