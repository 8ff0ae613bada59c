"""The defects that fixes are for are still in modelopt and transformers; a test that fails here says which one healed.

Tiny Llamas on the CPU, exported as the published pipeline did: one quantized layer in a template with few tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from builder.fixes import FIXES

pytestmark = pytest.mark.xdist_group("modelopt")

NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
TOKENS_11 = torch.ones(1, 2, dtype=torch.long)


def healed(name: str) -> str:
    return f"upstream healed: reconsider builder/fixes/{name.replace('-', '_')}.py, which says: {FIXES[name].upstream}"


@contextmanager
def fails(name: str, error: type[Exception], message: str) -> Iterator[None]:
    """The block must end in the error that a fix is for; otherwise the test says that upstream healed."""
    try:
        yield
    except error as caught:
        assert message in str(caught), f"another error than before, {caught!r}; {healed(name)}"
    else:
        pytest.fail(healed(name))


@pytest.fixture(scope="module")
def quantize() -> Callable[..., Any]:
    """Insert modelopt's NVFP4 quantizers; without a forward loop nothing but the weights is measured."""
    import modelopt.torch.quantization as mtq

    def insert(model: Any, forward_loop: Callable[[Any], object] | None = None) -> Any:
        return mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, forward_loop)

    return insert


@pytest.fixture
def export(tmp_path: Path) -> Callable[[Any], Path]:
    from modelopt.torch.export import export_hf_checkpoint

    def write(model: Any) -> Path:
        export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=tmp_path)
        return tmp_path

    return write


def make_llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    tokens = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    options = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **tokens, **options, **changes})).to(torch.bfloat16).eval()


def make_template(quantized: Any) -> Any:
    """The published pipeline's: one layer, two tokens, no token ids, no cache, the layer counted as the first."""
    template = make_llama(num_hidden_layers=1, vocab_size=2, use_cache=False, **NO_TOKENS)
    template.model.layers[0] = quantized.model.layers[1]
    template.model.layers[0].self_attn.layer_idx = 0
    return template


def tensor_names(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", "pt") as weights:
        return sorted(weights.keys())


def read_config(folder: Path, name: str = "config.json") -> Any:
    return json.loads((folder / name).read_text())


def test_modelopt_looks_up_token_1_in_a_template_of_one_token(quantize: Any, export: Any) -> None:
    template = quantize(make_llama(num_hidden_layers=1, vocab_size=1, **NO_TOKENS))
    with fails("template-vocab-size", IndexError, "index out of range"):
        export(template)


def test_a_padding_token_beyond_the_template_s_vocabulary_is_an_error() -> None:
    with fails("template-token-ids", AssertionError, "Padding_idx must be within num_embeddings"):
        make_llama(vocab_size=2, bos_token_id=None, eos_token_id=None, pad_token_id=5)


def test_bos_and_eos_tokens_beyond_the_template_s_vocabulary_are_none() -> None:
    assert (
        make_llama(vocab_size=2, bos_token_id=9, eos_token_id=8, pad_token_id=None)(TOKENS_11).logits.isfinite().all()
    )


def test_modelopt_cannot_export_quantizers_without_a_calibrator(quantize: Any, export: Any) -> None:
    model = quantize(make_llama())
    for module in model.modules():
        if hasattr(module, "_calibrator"):
            module._calibrator = None
    with fails("keep-calibrator", AttributeError, "'NoneType' object has no attribute '_num_bits'"):
        export(model)


def test_modelopt_switches_a_quantizer_without_a_calibrator_off_in_silence(quantize: Any) -> None:
    from modelopt.torch.quantization.model_calib import enable_stats_collection

    attention = quantize(make_llama()).model.layers[0].self_attn
    attention.q_proj.input_quantizer._calibrator = None
    assert attention.q_proj.input_quantizer.is_enabled
    enable_stats_collection(attention)
    assert attention.k_proj.input_quantizer.is_enabled
    assert not attention.q_proj.input_quantizer.is_enabled, healed("keep-calibrator")


def test_modelopt_writes_input_scales_only_where_inputs_were_calibrated(quantize: Any, export: Any) -> None:
    names = tensor_names(export(quantize(make_llama())))
    assert len([name for name in names if name.endswith(".weight_scale_2")]) == 14
    assert not [name for name in names if name.endswith(".input_scale")], healed("inject-input-scale")
    names = tensor_names(export(quantize(make_llama(), lambda model: model(TOKENS_11))))
    assert len([name for name in names if name.endswith(".input_scale")]) == 14


def test_modelopt_calls_activation_scales_static_that_were_never_measured(quantize: Any, export: Any) -> None:
    [group] = read_config(export(quantize(make_llama())))["quantization_config"]["config_groups"].values()
    assert group["input_activations"]["dynamic"] is False, healed("dynamic-input-activations")


def test_modelopt_writes_the_template_s_config_for_the_model_s(quantize: Any, export: Any) -> None:
    config = read_config(export(make_template(quantize(make_llama()))))
    leaked = {"num_hidden_layers": 1, "vocab_size": 2, "use_cache": False, **NO_TOKENS}
    assert {key: config.get(key) for key in leaked} == leaked, healed("restore-config")


def test_modelopt_does_not_name_the_template_s_lm_head_among_what_it_left_out(quantize: Any, export: Any) -> None:
    folder = export(make_template(quantize(make_llama())))
    beside = read_config(folder, "hf_quant_config.json")["quantization"]["exclude_modules"]
    assert read_config(folder)["quantization_config"]["ignore"] == beside == [], healed("keep-lm-head-bf16")
    assert "lm_head" in read_config(export(quantize(make_llama())))["quantization_config"]["ignore"]


def test_modelopt_writes_a_generation_config_without_the_model_s_end_of_text(quantize: Any, export: Any) -> None:
    model = make_llama()
    assert model.generation_config.eos_token_id == 2
    leaked = read_config(export(make_template(quantize(model))), "generation_config.json")
    assert leaked["use_cache"] is False and leaked.get("eos_token_id") is None, healed("keep-generation-config")


def test_modelopt_writes_neither_tokenizer_nor_chat_template(quantize: Any, export: Any) -> None:
    written = {path.name for path in export(quantize(make_llama())).iterdir()}
    expected = {"config.json", "generation_config.json", "hf_quant_config.json", "model.safetensors"}
    assert written == expected, f"{healed('keep-tokenizer-files')}; {healed('keep-chat-template')}"


def test_a_layer_with_its_own_number_finds_no_place_in_the_template_s_cache(quantize: Any, export: Any) -> None:
    template = make_llama(num_hidden_layers=1)
    template.model.layers[0].self_attn.layer_idx = 50
    with fails("reset-layer-index", IndexError, "list index out of range"):
        template(TOKENS_11)
    assert tensor_names(export(quantize(template)))  # modelopt runs the template without a cache by now
