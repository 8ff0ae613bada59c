"""Attention some queries at a time: what a model's own attention yields at once, whatever the family, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from builder.arithmetic import attention
from builder.arithmetic.exact import arithmetic
from builder.families import build_model

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"sliding_window": 8, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"sliding_window": 8},
    "cohere2": {"sliding_window": 8},
    "phi3": {},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
}
TOKENS = torch.tensor([[1, *((7 * step) % 60 + 3 for step in range(60))]])


def make_model(model_type: str, changes: dict[str, Any]) -> Any:
    config = transformers.CONFIG_MAPPING[model_type](**{**SMALL, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 0.1)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model.eval()


def count_parts(monkeypatch: pytest.MonkeyPatch, model: Any) -> list[int]:
    """How many queries the family's own attention is given at each call."""
    seen: list[int] = []
    module = __import__(type(model).__module__, fromlist=["eager_attention_forward"])
    own = module.eager_attention_forward

    def note(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(query.shape[2])
        return own(module, query, *args, **kwargs)

    monkeypatch.setattr(module, "eager_attention_forward", note)
    return seen


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_do_not_depend_on_how_many_queries_are_taken_together(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = make_model(name, FAMILIES[name])
    with arithmetic():
        wanted = model(TOKENS, use_cache=False).logits
    attention.use_eager_code(model)
    assert model.config._attn_implementation == attention.NAME
    seen = count_parts(monkeypatch, model)
    for workspace, parts in ((attention.WORKSPACE_BYTES, [61]), (1, [16, 16, 16, 13])):
        monkeypatch.setattr(attention, "WORKSPACE_BYTES", workspace)
        seen.clear()
        with arithmetic():
            found = model(TOKENS, use_cache=False).logits
        assert seen == parts * 2, "in each of two layers"
        assert torch.equal(found, wanted)


def test_a_model_built_for_exact_arithmetic_runs_its_own_code() -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", **SMALL}
    assert build_model(config, "base", eager=True).config._attn_implementation == attention.NAME
    assert build_model(config, "base").config._attn_implementation == "sdpa"
    mixture = {**config, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    assert build_model(mixture, "base", eager=True).config._experts_implementation == "eager"


def test_queries_read_in_order_and_with_their_own_rows_of_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask of [B, 1, T, S] is cut as queries are; one of [B, 1, 1, S] is the same for all of them."""
    from transformers.models.llama import modeling_llama

    model = make_model("llama", {})
    module = model.model.layers[0].self_attn
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 50, 8, generator=generator).bfloat16() for heads in (4, 2, 2))
    monkeypatch.setattr(attention, "WORKSPACE_BYTES", 1)
    causal = torch.full((50, 50), torch.finfo(torch.bfloat16).min, dtype=torch.bfloat16).triu(1)[None, None]
    for mask in (None, causal, causal.expand(2, 1, 50, 50), causal[:, :, -1:, :]):
        with arithmetic():
            found, weights = attention.attend(module, query, key, value, mask, scaling=0.3)
            wanted, _ = modeling_llama.eager_attention_forward(module, query, key, value, mask, scaling=0.3)
        assert weights is None and torch.equal(found, wanted) and found.shape == (2, 50, 4, 8)
