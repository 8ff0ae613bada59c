"""A model run one layer at a time yields, to the last bit, what transformers yields with all of it in memory."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import sys
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import TINY_LLAMA

from builder.arithmetic.exact import arithmetic
from builder.base import open_checkpoint
from builder.errors import BaseError
from builder.families import build_model
from builder.streaming import Arithmetic, LayerStream, Row, compute_buffers

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LONG_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
WINDOW = {"sliding_window": 8}
GRANITE = {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.7, "attention_multiplier": 0.2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": LONG_ROPE}),
    "mistral": ("mistral", WINDOW),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", WINDOW),
    "gemma3": ("gemma3_text", {**WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "cohere2": ("cohere2", {**WINDOW, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}),
    "phi3": ("phi3", {}),
    "granite": ("granite", GRANITE),
    "olmo2": ("olmo2", {}),
    "starcoder2": ("starcoder2", WINDOW),
}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "num_key_value_heads": 4}
MORE_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "glm4": ("glm4", {}),
    "olmo": ("olmo", {}),
    "phi": ("phi", {}),
    "gemma": ("gemma", {}),
    "stablelm": ("stablelm", {}),
    "nemotron": ("nemotron", {}),
    "minicpm3": ("minicpm3", {**LATENT, "v_head_dim": 16}),
}
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "deepseek_v2": (
        "deepseek_v2",
        {**LATENT, "v_head_dim": 8, "n_routed_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2},
    ),
}
ROWS = [[1, *((7 * step + 3 * length) % 60 + 3 for step in range(length))] for length in (0, 4, 28, 79)]


def save_small(folder: Path, model_type: str, changes: dict[str, Any]) -> Path:
    """A model with lively random weights, in the files transformers itself writes."""
    config = transformers.CONFIG_MAPPING[model_type](**{**SMALL, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 0.1)
    model.save_pretrained(folder)
    return folder


def load_whole(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def load_whole_exactly(folder: Path) -> Any:
    """As `from_pretrained` loads it, but rotary frequencies and the like are exact too; attention is the plain one."""
    checkpoint = open_checkpoint(folder, "base")
    with arithmetic():
        model = build_model(checkpoint.config, str(folder), eager=True)
        compute_buffers(model, torch.device("cpu"))
        weights = {name: checkpoint.load(name) for name in checkpoint.tensors}
        model.load_state_dict(weights, strict=False, assign=True)
        model.tie_weights()
    assert not any(value.is_meta for value in (*model.parameters(), *model.buffers()))
    model.set_attn_implementation("eager")
    return model


def open_stream(folder: Path, arithmetic: Arithmetic = "exact") -> LayerStream:
    return LayerStream(open_checkpoint(folder, "base"), arithmetic=arithmetic)


def run_layers(stream: LayerStream, rows: Sequence[Sequence[int]]) -> list[Row]:
    """Rows past the last layer; all of them go through a layer while it is open."""
    embedded = [stream.embed(row) for row in rows]
    for index in range(len(stream.layers)):
        with stream.open_layer(index) as layer:
            for row in embedded:
                stream.run_layer(layer, index, row)
    return embedded


def assert_equal_logits(folder: Path, rows: Sequence[Sequence[int]], kind: Arithmetic) -> None:
    stream, whole = open_stream(folder, kind), (load_whole if kind == "native" else load_whole_exactly)(folder)
    for tokens, row in zip(rows, run_layers(stream, rows), strict=True):
        with torch.inference_mode() if kind == "native" else arithmetic():
            wanted = whole(torch.tensor([tokens]), use_cache=False).logits[0]
        assert wanted.isfinite().all() and wanted.std() > 0.01
        assert torch.equal(stream.read_logits(row), wanted), len(tokens)


@pytest.fixture
def single_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", FAMILIES)
def test_native_logits_are_those_of_the_whole_model(tmp_path: Path, name: str) -> None:
    assert_equal_logits(save_small(tmp_path, *FAMILIES[name]), ROWS, "native")


@pytest.mark.parametrize("name", FAMILIES | MORE_FAMILIES)
def test_exact_logits_are_those_of_the_whole_model(tmp_path: Path, name: str) -> None:
    assert_equal_logits(save_small(tmp_path, *(FAMILIES | MORE_FAMILIES)[name]), ROWS, "exact")


@pytest.mark.parametrize("name", FAMILIES | MORE_FAMILIES)
def test_exact_logits_are_close_to_native_ones_in_float64(tmp_path: Path, name: str) -> None:
    """Rounding to bfloat16 apart: what is compared with is the model in float64, which rounds next to nothing."""
    folder = save_small(tmp_path, *(FAMILIES | MORE_FAMILIES)[name])
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    whole.set_attn_implementation("eager")
    whole.save_pretrained(folder / "wide")
    stream = open_stream(folder / "wide")
    (row,) = run_layers(stream, ROWS[2:3])
    with torch.inference_mode():
        wanted = whole.double()(torch.tensor(ROWS[2:3]), use_cache=False).logits[0]
    assert (stream.read_logits(row) - wanted).abs().max() < 2e-3 * wanted.std()


@pytest.mark.parametrize("name", MIXTURES)
def test_exact_logits_of_a_mixture_of_experts_are_close_to_those_in_float64(tmp_path: Path, name: str) -> None:
    """Its files hold each expert by itself and its layers all of them in one tensor, so that it cannot be streamed."""
    config = transformers.CONFIG_MAPPING[MIXTURES[name][0]](**{**SMALL, **MIXTURES[name][1]})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    model.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 0.1)
    with arithmetic() as mode:
        found = model.eval()(torch.tensor(ROWS[2:3]), use_cache=False).logits
        assert len(mode.prepared) >= 3 * 4, "linears, those of experts among them, are seen as such"
    with torch.inference_mode():
        wanted = model.double()(torch.tensor(ROWS[2:3]), use_cache=False).logits
    assert (found - wanted).abs().max() < 2e-3 * wanted.std()


@pytest.mark.parametrize("kind", ["exact", "native"])
def test_logits_of_a_trained_model_are_those_of_the_whole_model(kind: Arithmetic) -> None:
    assert_equal_logits(TINY_LLAMA / "base", [[1, *range(100, 400, 7)], [5], list(range(3, 515))], kind)


def test_logits_of_a_head_applied_in_bands_are_those_of_the_whole_head(monkeypatch: pytest.MonkeyPatch) -> None:
    import builder.streaming

    whole = open_stream(TINY_LLAMA / "base")
    monkeypatch.setattr(builder.streaming, "BAND_BYTES", 100_000)
    banded = open_stream(TINY_LLAMA / "base")
    logits = []
    for stream in (whole, banded):
        (row,) = run_layers(stream, [list(range(1, 40))])
        logits.append(stream.read_logits(row).float())
    assert "forward" in vars(banded.model.get_output_embeddings()), "it was applied in bands"
    torch.testing.assert_close(logits[0], logits[1], rtol=2**-7, atol=2**-7)  # a sum may be rounded otherwise


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "cohere2"])
def test_every_computed_buffer_is_the_one_transformers_computes(tmp_path: Path, name: str) -> None:
    folder = save_small(tmp_path, *FAMILIES[name])
    stream, whole = open_stream(folder), load_whole(folder)
    found = dict(stream.model.named_buffers())
    for index, layer in enumerate(stream.layers):
        found |= {f"{stream.prefix}.{index}.{part}": buffer for part, buffer in layer.named_buffers()}
    wanted = dict(whole.named_buffers())
    assert found.keys() == wanted.keys() and len(wanted) > 0
    for buffer, value in wanted.items():
        assert found[buffer].dtype == value.dtype and torch.equal(found[buffer], value), buffer


def test_a_sliding_window_shorter_than_the_row_is_seen(tmp_path: Path) -> None:
    """Else the test of whole logits would not notice a mask that is left out."""
    folder = save_small(tmp_path, *FAMILIES["mistral"])
    whole = load_whole(folder)
    with torch.inference_mode():
        seen = whole(torch.tensor([ROWS[3]])).logits
        whole.config.sliding_window = None
        assert not torch.equal(whole(torch.tensor([ROWS[3]])).logits, seen)


def test_buffers_that_transformers_does_not_compute_are_named() -> None:
    class Strange(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.empty(3, device="meta"), persistent=False)

    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", **SMALL}
    model = build_model(config, "base")
    with pytest.raises(BaseError) as caught:
        compute_buffers(Strange(), torch.device("cpu"), model)
    assert str(caught.value) == (
        "transformers does not compute the buffer table of Strange\n"
        "  in LlamaForCausalLM\n"
        "  fix: use a base model of another family"
    )


def weights_in_memory(stream: LayerStream) -> set[int]:
    return {index for index, layer in enumerate(stream.layers) for p in layer.parameters() if not p.is_meta}


def test_only_the_open_layer_has_its_weights_in_memory(tmp_path: Path) -> None:
    stream = open_stream(save_small(tmp_path, *FAMILIES["llama"]))
    assert all(parameter.is_meta for layer in stream.layers for parameter in layer.parameters())
    row = stream.embed(ROWS[1])
    loaded: list[weakref.ref[torch.Tensor]] = []
    for index in range(len(stream.layers)):
        gc.collect()
        assert not any(ref() is not None for ref in loaded), "weights of an earlier layer are still there"
        with stream.open_layer(index) as layer:
            loaded = [weakref.ref(parameter) for parameter in layer.parameters()]
            assert len(loaded) == 9 and not any(parameter.is_meta for parameter in layer.parameters())
            stream.run_layer(layer, index, row)
        assert all(parameter.is_meta for parameter in layer.parameters())
        assert not weights_in_memory(stream)
    held = {name for name, parameter in stream.model.named_parameters() if not parameter.is_meta}
    assert held == {"model.embed_tokens.weight", "model.norm.weight"}, "lm_head comes with the logits"


def test_a_layer_gives_its_weights_back_when_its_block_fails(tmp_path: Path) -> None:
    stream = open_stream(save_small(tmp_path, *FAMILIES["llama"]))
    with pytest.raises(ZeroDivisionError), stream.open_layer(0) as layer:
        raise ZeroDivisionError
    assert all(parameter.is_meta for parameter in layer.parameters())


def test_a_layer_opened_twice_is_the_same_and_unchanged_by_what_was_done_to_it(tmp_path: Path) -> None:
    stream = open_stream(save_small(tmp_path, *FAMILIES["llama"]))
    with stream.open_layer(1) as layer:
        before = {name: parameter.clone() for name, parameter in layer.named_parameters()}
        layer.mlp = torch.nn.Identity()
    with stream.open_layer(1) as layer:
        for name, parameter in layer.named_parameters():
            assert torch.equal(parameter, before[name]), name
        assert len(before) == len(list(layer.parameters())) == 9


def test_tied_embeddings_are_read_once_and_shared(tmp_path: Path) -> None:
    stream = open_stream(save_small(tmp_path, *FAMILIES["qwen2 tied"]))
    assert "lm_head.weight" not in stream.checkpoint.tensors
    assert stream.model.lm_head.weight is stream.model.model.embed_tokens.weight


def test_rows_do_not_disturb_each_other(tmp_path: Path) -> None:
    stream = open_stream(save_small(tmp_path, *FAMILIES["gemma3"]))
    together = [stream.read_logits(row) for row in run_layers(stream, ROWS)]
    for tokens, wanted in reversed(list(zip(ROWS, together, strict=True))):
        (alone,) = run_layers(stream, [tokens])
        assert torch.equal(stream.read_logits(alone), wanted)
        assert torch.equal(stream.read_logits(alone), wanted), "reading logits changes nothing"


def test_hidden_states_are_the_same_with_one_thread_and_with_two(single_thread: None) -> None:
    rows = [[1, *range(100, 400, 3)], list(range(3, 300))]
    stream = open_stream(TINY_LLAMA / "base")
    one = [row.hidden for row in run_layers(stream, rows)]
    torch.set_num_threads(2)
    two = [row.hidden for row in run_layers(stream, rows)]
    assert all(torch.equal(first, second) for first, second in zip(one, two, strict=True))


PRINT_DIGEST = """
import hashlib
import sys
from pathlib import Path

import torch

from builder.base import open_checkpoint
from builder.streaming import LayerStream

stream = LayerStream(open_checkpoint(Path(sys.argv[1]), "base"))
row = stream.embed([1, *range(100, 400, 7)])
for index in range(len(stream.layers)):
    with stream.open_layer(index) as layer:
        stream.run_layer(layer, index, row)
print(hashlib.sha256(stream.read_logits(row).view(torch.int16).numpy().tobytes()).hexdigest())
"""
PROCESSORS: tuple[dict[str, str], ...] = (
    {},
    {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "ATEN_CPU_CAPABILITY": "avx2", "NUMBA_CPU_NAME": "haswell"},
    {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "default", "NUMBA_CPU_NAME": "x86-64"},
)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only there a processor can be made to look like a lesser")
def test_exact_logits_are_the_same_on_processors_that_compute_natively_in_other_ways() -> None:
    digests = set()
    for limits in PROCESSORS:
        features = {"NUMBA_CPU_FEATURES": ""} if limits else {}
        command = [sys.executable, "-c", PRINT_DIGEST, str(TINY_LLAMA / "base")]
        environment = {**os.environ, **limits, **features}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout)
    assert len(digests) == 1
