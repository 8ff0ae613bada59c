"""Held-out perplexity of a base model or an artifact, layer by layer.

An artifact is read through compressed-tensors' own decompression and activation quantization, that of keys and values
with it where the KV cache has scales, as transformers would run it whole; the `modelopt` layout is renamed in memory
first.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from builder.base import Checkpoint, open_checkpoint, read_tensors
from builder.calibration import load_tokenizer
from builder.errors import BaseError, BuildError, VerifyError
from builder.files import read_json
from builder.progress import Progress
from builder.streaming import LayerStream

LONGEST_WINDOW = 2048
LARGEST_LOSS = math.log(sys.float_info.max)
BAND_ELEMENTS = 4 << 20
CHUNK = 256  # tokens whose log-likelihoods over the vocabulary are in memory at once
FROM_MODELOPT = {
    "weight_packed": "weight",
    "weight_global_scale": "weight_scale_2",
    "input_global_scale": "input_scale",
    "k_scale": "k_proj.k_scale",
    "v_scale": "v_proj.v_scale",
}


class ArtifactStream(LayerStream):
    """A quantized model, its layers decompressed by compressed-tensors one at a time.

    quantization_config: in compressed-tensors' form, whatever the artifact's layout.
    """

    def __init__(self, checkpoint: Checkpoint, quantization_config: dict[str, Any], device: str = "cpu") -> None:
        self.quantization_config = quantization_config
        super().__init__(checkpoint, device)

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


def open_artifact(folder: Path, quantization_config: dict[str, Any], device: str = "cpu") -> ArtifactStream:
    """A finished artifact as a stream of layers."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise BaseError(f"{folder}/config.json cannot be read", str(folder), "build the release again")
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    return ArtifactStream(Checkpoint(folder, plain, read_tensors(folder, str(folder))), quantization_config, device)


def open_base(folder: Path, device: str = "cpu") -> LayerStream:
    """A base model as a stream of layers."""
    return LayerStream(open_checkpoint(folder, str(folder)), device)


def split_text(path: Path, base: Path, longest: int, where: str) -> list[list[int]]:
    """The held-out text as windows of token ids that do not overlap; the last one may be shorter."""
    if not path.is_file():
        raise BuildError(f"no such file: {path}", where, "give a text file relative to the manifest")
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise BuildError(f"{path.name} is not UTF-8 text", where, "convert it to UTF-8") from error
    tokens = load_tokenizer(base, where)(text, add_special_tokens=False, verbose=False)["input_ids"]
    windows = [tokens[start : start + longest] for start in range(0, len(tokens), longest)]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise BuildError(f"{path.name} has no text to measure on", where, "give some thousand words")
    return windows


def measure_perplexity(
    stream: LayerStream, windows: Sequence[Sequence[int]], progress: Progress | None = None
) -> float:
    """exp of the mean negative log-likelihood of every token but each window's first.

    Raises VerifyError if it is not a number, or not finite.
    """
    rows = [stream.embed(window) for window in windows]
    for index in range(len(stream.layers)):
        with stream.open_layer(index) as layer:
            for row in rows:
                stream.run_layer(layer, index, row)
        if progress:
            progress.step(index + 1)
    total, count = 0.0, 0
    for row, window in zip(rows, windows, strict=True):
        logits = stream.read_logits(row)[:-1]
        targets = torch.tensor(list(window[1:]), device=logits.device)
        for start in range(0, len(targets), CHUNK):
            log_likelihood = torch.log_softmax(logits[start : start + CHUNK].float(), dim=-1)
            total -= float(log_likelihood.gather(1, targets[start : start + CHUNK, None]).double().sum())
        count += len(targets)
    if not total / count < LARGEST_LOSS:
        what = f"the mean negative log-likelihood is {total / count}, which is no perplexity"
        raise VerifyError(what, str(stream.checkpoint.folder), "see whether its weights and scales are sound")
    return math.exp(total / count)
