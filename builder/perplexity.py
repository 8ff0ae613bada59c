"""Held-out perplexity of a base model or an artifact, layer by layer.

An artifact is read through compressed-tensors' own decompression and activation quantization, that of keys and values
with it where the KV cache has scales, as transformers would run it whole; the `modelopt` layout is renamed in memory
first.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from builder.arithmetic import functions, sums
from builder.base import Checkpoint, open_checkpoint, read_tensors
from builder.calibration import load_tokenizer
from builder.errors import ArithmeticRefusal, BaseError, BuildError, VerifyError
from builder.files import read_json
from builder.progress import Progress
from builder.streaming import Arithmetic, LayerStream, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_WINDOW = 2048
SOUND = "see whether its weights and scales are sound"
LARGEST_LOSS = math.log(sys.float_info.max)
BAND_ELEMENTS = 4 << 20
CHUNK = 64  # tokens whose log-likelihoods over the vocabulary are in memory at once
FROM_MODELOPT = {
    "weight_packed": "weight",
    "weight_global_scale": "weight_scale_2",
    "input_global_scale": "input_scale",
    "k_scale": "k_proj.k_scale",
    "v_scale": "v_proj.v_scale",
}


@dataclass(frozen=True)
class HeldOut:
    """Text as a model reads it: windows of token ids."""

    windows: list[list[int]]
    beginning: list[int]  # what the tokenizer puts before a text, at the head of each window
    names: list[str]  # the same in the tokenizer's words

    @property
    def first(self) -> int:
        """The first token of a window that is measured: one that is read after another, and not of the beginning."""
        return max(1, len(self.beginning))

    @property
    def num_measured(self) -> int:
        return sum(len(window) - self.first for window in self.windows)


class ArtifactStream(LayerStream):
    """A quantized model, its layers decompressed by compressed-tensors one at a time.

    quantization_config: in compressed-tensors' form, whatever the artifact's layout.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        quantization_config: dict[str, Any],
        device: str = "cpu",
        arithmetic: Arithmetic = "exact",
    ) -> None:
        self.quantization_config = quantization_config
        super().__init__(checkpoint, device, arithmetic)

    def prepare_model(self) -> None:
        from compressed_tensors.compressors.base import compress_module
        from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

        config = QuantizationConfig.model_validate(self.quantization_config)
        apply_quantization_config(self.model, config, show_progress=False)
        for module in self.model.modules():
            compress_module(module)  # gives it the parameters of its compressed form; does nothing to the others

    def finish_layer(self, layer: torch.nn.Module) -> None:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear) and hasattr(module, "quantization_scheme"):
                decompress_in_bands(module)
                module.weight.data = module.weight.data.to(self.model.dtype)  # NVFP4 comes back in bfloat16, always
            elif hasattr(
                module, "kv_cache"
            ):  # compressed-tensors' own; the copy's still looks for scales in the original
                module.kv_cache.attn_module = weakref.ref(module)  # type: ignore[union-attr]

    def load(self, name: str) -> torch.Tensor:
        module, _, suffix = name.rpartition(".")
        stored = f"{module}.{FROM_MODELOPT.get(suffix, suffix)}"
        if name in self.checkpoint.tensors or stored not in self.checkpoint.tensors:
            return super().load(name)
        tensor = super().load(stored)
        if suffix in ("k_scale", "v_scale"):
            return tensor.reshape(1).to(self.model.dtype)  # as the other layout stores it: values take a scale's dtype
        return tensor if suffix == "weight_packed" else (1 / tensor).reshape(1)


def decompress_in_bands(module: torch.nn.Module) -> None:
    """What compressed-tensors' `decompress_module` does, some rows at a time: it needs many times a weight's bytes."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationStatus
    from compressed_tensors.utils import get_direct_state_dict, replace_direct_state_dict

    scheme: Any = module.quantization_scheme
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    compressed: dict[str, Any] = get_direct_state_dict(module)
    num_rows = int(module.out_features)  # type: ignore[arg-type]
    step = max(1, BAND_ELEMENTS // int(module.in_features))  # type: ignore[arg-type]
    by_row = {name for name, t in compressed.items() if t is not None and t.ndim == 2 and len(t) == num_rows > 1}
    bands = []
    for start in range(0, num_rows, step):
        rows = {name: t[start : start + step] if name in by_row else t for name, t in compressed.items()}
        if "weight_shape" in rows:  # of codes in words, which tell no width
            rows["weight_shape"] = torch.tensor([min(step, num_rows - start), module.in_features])
        bands.append(compressor.decompress(rows, scheme))
    by_row = (by_row | {"weight"}) & bands[0].keys()
    whole = {name: torch.cat([band[name] for band in bands]) if name in by_row else t for name, t in bands[0].items()}
    replace_direct_state_dict(module, whole)
    module.quantization_status = QuantizationStatus.DECOMPRESSED


def open_artifact(
    folder: Path, quantization_config: dict[str, Any], device: str = "cpu", arithmetic: Arithmetic = "exact"
) -> ArtifactStream:
    """A finished artifact as a stream of layers."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise BaseError(f"{folder}/config.json cannot be read", str(folder), "build the release again")
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    checkpoint = Checkpoint(folder, plain, read_tensors(folder, str(folder)))
    return ArtifactStream(checkpoint, quantization_config, device, arithmetic)


def open_base(folder: Path, device: str = "cpu", arithmetic: Arithmetic = "exact") -> LayerStream:
    """A base model as a stream of layers."""
    return LayerStream(open_checkpoint(folder, str(folder)), device, arithmetic)


def split_text(path: Path, base: Path, longest: int, where: str) -> HeldOut:
    """The held-out text as windows of token ids that do not overlap; the last one may be shorter.

    Each begins with what the tokenizer puts before a text, such as BOS, where it puts something: models that were
    trained with it expect it (Gemma's perplexity is in the billions without).
    """
    if not path.is_file():
        raise BuildError(f"no such file: {path}", where, "give a text file relative to the manifest")
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise BuildError(f"{path.name} is not UTF-8 text", where, "convert it to UTF-8") from error
    tokenizer = load_tokenizer(base, where)
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    before = find_beginning(tokenizer)
    names = [str(name) for name in tokenizer.convert_ids_to_tokens(before)]
    length = longest - len(before)
    pieces = [tokens[start : start + length] for start in range(0, len(tokens), length)]
    held_out = HeldOut([[*before, *piece] for piece in pieces if len(before) + len(piece) > 1], before, names)
    if not held_out.windows:
        raise BuildError(f"{path.name} has no text to measure on", where, "give some thousand words")
    return held_out


def find_beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids that a tokenizer puts before a text."""
    bare, whole = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    at = next((at for at in range(len(whole)) if bare and whole[at : at + len(bare)] == bare), 0)
    return whole[:at]


def measure_perplexity(
    stream: LayerStream, windows: Sequence[Sequence[int]], progress: Progress | None = None, *, first: int = 1
) -> float:
    """exp of the mean negative log-likelihood of each window's tokens from the `first` on.

    Raises VerifyError if it is not a number, or not finite.
    """
    rows, losses = [stream.embed(window) for window in windows], list[float]()
    for index in range(len(stream.layers)):
        with locate_refusal(stream, f"{stream.prefix}.{index}"), stream.open_layer(index) as layer:
            for row in rows:
                stream.run_layer(layer, index, row)
        if progress:
            progress.step(index + 1)
    with locate_refusal(stream, "the final norm or lm_head"):
        for row, window in zip(rows, windows, strict=True):
            losses += measure_losses(stream, row, window, first)
    mean = math.fsum(losses) / len(losses)  # exact, so in any order
    if not mean < LARGEST_LOSS:
        what = f"the mean negative log-likelihood is {mean}, which is no perplexity"
        raise VerifyError(what, str(stream.checkpoint.folder), SOUND)
    return float(functions.exp(torch.tensor(mean, dtype=torch.float64)))


@contextmanager
def locate_refusal(stream: LayerStream, part: str) -> Iterator[None]:
    """Say of what exact arithmetic refuses where it is. Raises VerifyError."""
    try:
        yield
    except ArithmeticRefusal as refusal:
        raise VerifyError(refusal.what, f"{part} of {stream.checkpoint.folder}", refusal.fix or SOUND) from refusal


def measure_losses(stream: LayerStream, row: Row, window: Sequence[int], first: int) -> list[float]:
    """The negative log-likelihoods of a window's tokens from the `first` on, in float64."""
    logits, losses = stream.read_logits(row)[first - 1 : -1], list[float]()
    targets = torch.tensor(list(window[first:]), device=logits.device)
    for start in range(0, len(targets), CHUNK):
        some = slice(start, start + CHUNK)
        losses += (-sums.log_likelihood(logits[some], targets[some])).tolist()
    return losses
