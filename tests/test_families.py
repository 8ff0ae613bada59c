from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from builder.base import Tensor
from builder.errors import BaseError
from builder.families import Architecture, build_model, describe_architecture, find_layers, recall_architecture

WHERE = "releases/tiny.yaml:5:3: base.path: base"
TINY = {
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
    "dtype": "bfloat16",
}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUT, DOWN = ("self_attn.o_proj",), ("mlp.down_proj",)
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
USUAL = (QKV, OUT, GATE_UP, DOWN)


def make_config(architecture: str, model_type: str, **changes: Any) -> dict[str, Any]:
    return {**TINY, "architectures": [architecture], "model_type": model_type, **changes}


def describe(architecture: str, model_type: str, **changes: Any) -> Architecture:
    return describe_architecture(make_config(architecture, model_type, **changes), WHERE)


def refusal(architecture: str, model_type: str, **changes: Any) -> str:
    with pytest.raises(BaseError) as caught:
        describe(architecture, model_type, **changes)
    return str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "model_type", "groups", "tied"),
    [
        ("LlamaForCausalLM", "llama", USUAL, False),
        ("MistralForCausalLM", "mistral", USUAL, False),
        ("Qwen2ForCausalLM", "qwen2", USUAL, False),
        ("Qwen3ForCausalLM", "qwen3", USUAL, False),
        ("GraniteForCausalLM", "granite", USUAL, False),
        ("Olmo2ForCausalLM", "olmo2", USUAL, False),
        ("Gemma2ForCausalLM", "gemma2", USUAL, True),
        ("Gemma3ForCausalLM", "gemma3_text", USUAL, True),
        ("Cohere2ForCausalLM", "cohere2", ((*QKV, *GATE_UP), OUT, DOWN), True),
        ("Phi3ForCausalLM", "phi3", (("self_attn.qkv_proj",), OUT, ("mlp.gate_up_proj",), DOWN), False),
        ("Glm4ForCausalLM", "glm4", (QKV, OUT, ("mlp.gate_up_proj",), DOWN), False),
        ("Starcoder2ForCausalLM", "starcoder2", (QKV, OUT, ("mlp.c_fc",), ("mlp.c_proj",)), True),
    ],
)
def test_linears_that_read_the_same_input_are_one_group(
    architecture: str, model_type: str, groups: tuple[tuple[str, ...], ...], tied: bool
) -> None:
    found = describe(architecture, model_type)
    assert [layer.name for layer in found.layers] == ["model.layers.0", "model.layers.1"]
    for layer in found.layers:
        assert layer.groups == tuple(tuple(f"{layer.name}.{linear}" for linear in group) for group in groups)
        assert layer.linears == tuple(linear for group in layer.groups for linear in group)
    assert (found.name, found.tied, found.other_linears) == (architecture, tied, ("lm_head",))


LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "num_key_value_heads": 4}


@pytest.mark.parametrize(
    ("architecture", "model_type", "changes", "attention"),
    [
        ("LlamaForCausalLM", "llama", {}, "self_attn"),
        ("Phi3ForCausalLM", "phi3", {}, "self_attn"),
        ("Gemma3ForCausalLM", "gemma3_text", {}, "self_attn"),
        ("MiniCPM3ForCausalLM", "minicpm3", {**LATENT, "v_head_dim": 16}, None),
        ("GPTNeoXForCausalLM", "gpt_neox", {}, None),
    ],
)
def test_attentions_whose_keys_and_values_go_into_a_cache_are_found(
    architecture: str, model_type: str, changes: dict[str, Any], attention: str | None
) -> None:
    for layer in describe(architecture, model_type, **changes).layers:
        assert layer.attention == (attention and f"{layer.name}.{attention}")


@pytest.mark.parametrize(
    ("architecture", "model_type"),
    [("LlamaForCausalLM", "llama"), ("Qwen3ForCausalLM", "qwen3"), ("Gemma3ForCausalLM", "gemma3_text")],
)
def test_tensors_are_what_transformers_itself_stores(architecture: str, model_type: str) -> None:
    config = make_config(architecture, model_type)
    parsed = transformers.CONFIG_MAPPING[model_type].from_dict(config)
    model = transformers.AutoModelForCausalLM.from_config(parsed, dtype=torch.bfloat16)
    kept = {id(parameter): name for name, parameter in reversed(model.state_dict(keep_vars=True).items())}
    state = {name: tuple(value.shape) for name, value in model.state_dict().items() if name in kept.values()}
    found = describe_architecture(config, WHERE)
    assert {tensor.name: tensor.shape for tensor in found.tensors} == state
    assert {tensor.dtype for tensor in found.tensors} == {"BF16"}
    assert found.num_parameters == model.num_parameters()


def test_edges_are_what_comes_before_and_after_the_layers() -> None:
    found = describe("LlamaForCausalLM", "llama")
    assert found.first_edge == (Tensor(name="model.embed_tokens.weight", dtype="BF16", shape=(64, 32)),)
    assert found.last_edge == (
        Tensor(name="model.norm.weight", dtype="BF16", shape=(32,)),
        Tensor(name="lm_head.weight", dtype="BF16", shape=(64, 32)),
    )


def test_tied_embeddings_are_stored_once() -> None:
    tied, untied = (describe("Qwen2ForCausalLM", "qwen2", tie_word_embeddings=is_tied) for is_tied in (True, False))
    assert [tensor.name for tensor in tied.last_edge] == ["model.norm.weight"]
    assert tied.tied and not untied.tied
    assert untied.num_parameters - tied.num_parameters == 64 * 32


def test_biases_belong_to_the_layer() -> None:
    names = [tensor.name for tensor in describe("Qwen2ForCausalLM", "qwen2").layers[1].tensors]
    assert [name for name in names if name.endswith(".bias")] == [f"model.layers.1.{linear}.bias" for linear in QKV]


def test_the_shallowest_of_several_fitting_lists_holds_the_layers() -> None:
    def make_list() -> torch.nn.ModuleList:
        return torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])

    model = torch.nn.Module()
    model.vision = torch.nn.ModuleDict({"tower": torch.nn.ModuleDict({"blocks": make_list()})})
    model.model = torch.nn.ModuleDict({"pair": torch.nn.ModuleList(make_list()[:1]), "layers": make_list()})
    model.config = SimpleNamespace(num_hidden_layers=2)  # type: ignore[assignment]
    assert find_layers(model)[0] == "model.layers"  # type: ignore[arg-type]


def test_facts_hold_the_numbers_a_model_is_known_by() -> None:
    facts = describe("MistralForCausalLM", "mistral", head_dim=None, max_position_embeddings=128).facts
    assert facts == {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 64,
        "max_position_embeddings": 128,
    }


@pytest.mark.parametrize(
    ("written", "dtype"),
    [
        ({"dtype": "float16"}, "F16"),
        ({"dtype": None, "torch_dtype": "bfloat16"}, "BF16"),
    ],
)
def test_the_dtype_is_the_configs(written: dict[str, Any], dtype: str) -> None:
    found = describe("LlamaForCausalLM", "llama", **written)
    assert {tensor.dtype for tensor in found.tensors} == {dtype} == {found.dtype}


def test_no_weight_is_in_memory() -> None:
    model = build_model(make_config("LlamaForCausalLM", "llama"), WHERE)
    tensors = [*model.parameters(), *model.buffers()]
    assert len(tensors) > 20 and all(tensor.is_meta for tensor in tensors)


BIG = {
    "llama-70b": (
        make_config(
            "LlamaForCausalLM",
            "llama",
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=128256,
        ),
        (70_553_706_496, 80, 7),
    ),
    "mistral-large-123b": (
        make_config(
            "MistralForCausalLM",
            "mistral",
            hidden_size=12288,
            intermediate_size=28672,
            num_hidden_layers=88,
            num_attention_heads=96,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=32768,
        ),
        (122_610_069_504, 88, 7),
    ),
    "command-a-111b": (
        make_config(
            "Cohere2ForCausalLM",
            "cohere2",
            hidden_size=12288,
            intermediate_size=36864,
            num_hidden_layers=64,
            num_attention_heads=96,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=256000,
        ),
        (111_057_580_032, 64, 7),
    ),
}


@pytest.mark.parametrize("name", BIG)
def test_large_models_are_described_within_seconds(name: str) -> None:
    config, expected = BIG[name]
    started = time.monotonic()
    found = describe_architecture(config, WHERE)
    assert (found.num_parameters, len(found.layers), len(found.layers[0].linears)) == expected
    assert time.monotonic() - started < 15


@pytest.mark.parametrize(
    ("architecture", "model_type"),
    [
        ("LlamaForCausalLM", "llama"),
        ("Qwen3ForCausalLM", "qwen3"),
        ("Gemma2ForCausalLM", "gemma2"),
        ("Phi3ForCausalLM", "phi3"),
        ("Starcoder2ForCausalLM", "starcoder2"),
        ("GPTNeoXForCausalLM", "gpt_neox"),
        ("NemotronForCausalLM", "nemotron"),
    ],
)
def test_a_model_that_has_an_exact_form_names_no_operation_without_one(architecture: str, model_type: str) -> None:
    assert describe(architecture, model_type).inexact == ()


def test_operations_without_an_exact_form_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe("xLSTMForCausalLM", "xlstm").inexact == ("aten.log_sigmoid_forward",)
    from transformers.models.llama.modeling_llama import LlamaMLP

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        gate = torch.lgamma(self.gate_proj(x)).cumprod(-1)
        down: torch.Tensor = self.down_proj(torch.atan(gate) * self.up_proj(x))
        return down

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    assert describe("LlamaForCausalLM", "llama").inexact == ("aten.atan", "aten.cumprod", "aten.lgamma")


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "model_type"),
    [
        ("NopeForCausalLM", "llama"),
        ("LlamaForCausalLM", "nope"),
        ("LlamaForCausalLM", "mistral"),
        ("LlamaModel", "llama"),
        ("AutoModel", "llama"),
        ("BertForMaskedLM", "bert"),
        ("T5ForConditionalGeneration", "t5"),
        ("__name__", "llama"),
    ],
)
def test_an_architecture_that_is_no_causal_language_model_is_refused(architecture: str, model_type: str) -> None:
    assert refusal(architecture, model_type) == (
        f"transformers {transformers.__version__} has no causal language model {architecture} ({model_type})\n"
        f"  in {WHERE}\n  fix: use a base model of a decoder family that transformers knows"
    )


@pytest.mark.parametrize(
    ("architecture", "model_type", "tensor"),
    [
        ("MixtralForCausalLM", "mixtral", "model.layers.0.mlp.experts.gate_up_proj"),
        ("Qwen3MoeForCausalLM", "qwen3_moe", "model.layers.0.mlp.experts.gate_up_proj"),
        ("MambaForCausalLM", "mamba", "backbone.layers.0.mixer.conv1d.weight"),
    ],
)
def test_mixtures_and_convolutions_are_refused_by_name(architecture: str, model_type: str, tensor: str) -> None:
    assert refusal(architecture, model_type) == (
        f"{tensor} has 3 dimensions: experts and convolutions cannot be quantized\n"
        f"  in {WHERE}\n  fix: use a base model with dense layers"
    )


def test_layers_without_linears_are_refused() -> None:
    assert refusal("GPT2LMHeadModel", "gpt2") == (
        f"the decoder layers have no linears\n  in {WHERE}\n  fix: use a base model of another family"
    )


@pytest.mark.parametrize("times", [0, 2])
def test_a_linear_that_does_not_run_exactly_once_is_refused(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        for _ in range(times):
            self.up_proj(x)
        return self.down_proj(self.gate_proj(x))

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    assert refusal("LlamaForCausalLM", "llama") == (
        f"model.layers.0.mlp.up_proj runs {times} times in a forward pass, but must run once\n"
        f"  in {WHERE}\n  fix: use a base model of another family"
    )


def test_a_model_of_several_towers_is_refused() -> None:
    assert refusal("Gemma3ForConditionalGeneration", "gemma3").endswith(
        "decoder layers\n  in config.json\n  fix: use a base model that is a plain stack of decoder layers"
    )


@pytest.mark.parametrize("count", [0, -1])
def test_a_model_without_layers_is_refused(count: int) -> None:
    assert refusal("LlamaForCausalLM", "llama", num_hidden_layers=count) == (
        f"LlamaForCausalLM has no list of {count} decoder layers\n"
        "  in config.json\n  fix: use a base model that is a plain stack of decoder layers"
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"hidden_size": "wide"},
            "StrictDataclassFieldValidationError: Validation error for field 'hidden_size': "
            "TypeError: Field 'hidden_size' expected int, got str (value: 'wide')",
        ),
        ({"num_attention_heads": 0}, "ZeroDivisionError: integer modulo by zero"),
        ({"hidden_act": "nope"}, "KeyError: 'nope'"),
        ({"pad_token_id": 100}, "AssertionError: Padding_idx must be within num_embeddings"),
        (
            {"vocab_size": -5},
            "RuntimeError: Trying to create tensor with negative dimension -5: [-5, 32]",
        ),
    ],
)
def test_a_config_that_makes_no_model_is_refused_in_three_lines(changes: dict[str, Any], reason: str) -> None:
    assert refusal("LlamaForCausalLM", "llama", **changes) == (
        f"config.json does not make a LlamaForCausalLM: {reason}\n  in {WHERE}\n  fix: mend config.json"
    )


def test_more_layers_than_any_model_has_are_refused_before_they_are_made() -> None:
    assert refusal("LlamaForCausalLM", "llama", num_hidden_layers=10**9) == (
        "config.json has num_hidden_layers 1000000000, and no model has more than 10000\n"
        f"  in {WHERE}\n  fix: mend config.json"
    )


def test_a_config_that_makes_a_model_which_cannot_run_is_refused_in_three_lines() -> None:
    assert refusal("LlamaForCausalLM", "llama", num_key_value_heads=3) == (
        "config.json makes a LlamaForCausalLM that does not run: RuntimeError: "
        "Attempting to broadcast a dimension of length 3 at -1! Mismatching argument at index 1 had [1, 3]; "
        "but expected shape should be broadcastable to [1, 4]\n"
        f"  in {WHERE}\n  fix: mend config.json, or use a base model of another family"
    )


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "nope", None])
def test_a_dtype_that_nothing_is_quantized_from_is_refused(dtype: str) -> None:
    assert refusal("LlamaForCausalLM", "llama", dtype=dtype) == (
        f"config.json has the dtype {dtype}\n  in {WHERE}\n  fix: use a base in bfloat16, float16 or float32"
    )


def test_a_model_that_stores_more_than_parameters_is_refused() -> None:
    assert refusal("Gemma4ForCausalLM", "gemma4_text") == (
        "model.layers.0.layer_scalar is stored, but is no parameter: such buffers are not carried over\n"
        f"  in {WHERE}\n"
        "  fix: use a base model of another family"
    )


# ---------------------------------------------------------------------------------------------------- remembering


def run_apart(code: str, cache: Path) -> str:
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    config = make_config("LlamaForCausalLM", "llama")
    program = f"import sys\nfrom builder.families import recall_architecture\nconfig = {config!r}\n{code}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    return done.stdout.strip()


def test_an_architecture_is_remembered_without_loading_torch_again(tmp_path: Path) -> None:
    tell = "found = recall_architecture(config, 'here'); print('torch' in sys.modules, found)"
    first, second = run_apart(tell, tmp_path), run_apart(tell, tmp_path)
    assert first == "True " + str(describe("LlamaForCausalLM", "llama"))
    assert second == "False " + str(describe("LlamaForCausalLM", "llama"))


def test_what_is_remembered_of_one_config_is_not_taken_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for layers in (2, 3, 2):
        config = make_config("LlamaForCausalLM", "llama", num_hidden_layers=layers)
        assert recall_architecture(config, WHERE) == describe_architecture(config, WHERE)
    assert len(list(tmp_path.rglob("*.json"))) == 2


def test_a_damaged_memory_is_made_anew_and_none_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = make_config("LlamaForCausalLM", "llama")
    wanted = recall_architecture(config, WHERE)
    (remembered,) = tmp_path.rglob("*.json")
    whole = remembered.read_bytes()
    remembered.write_bytes(whole.replace(b"q_proj", b"x_proj", 1))
    assert recall_architecture(config, WHERE) == wanted
    assert remembered.read_bytes() == whole
    (tmp_path / "file").write_text("where a folder is expected")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert recall_architecture(config, WHERE) == wanted


def test_a_config_that_is_refused_is_refused_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):
        with pytest.raises(BaseError, match="stored, but is no parameter"):
            recall_architecture(make_config("Gemma4ForCausalLM", "gemma4_text"), WHERE)
