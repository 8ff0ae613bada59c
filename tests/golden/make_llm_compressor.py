"""Writes llm-compressor.json beside this file: what llm-compressor makes of the tiny Llama, for each data-free scheme.

llm-compressor pins other versions of transformers and compressed-tensors than this project, so it runs in an
environment of its own, on the CPU, from the repository's root:

    python3.11 -m venv build/llm-compressor
    build/llm-compressor/bin/pip install llmcompressor==0.14.0 torch==2.13.0
    build/llm-compressor/bin/python tests/golden/make_llm_compressor.py

The file holds, for each scheme, the versions, the sha256 of every tensor's bytes and the `quantization_config`.
Weights alone decide them, so they are the same on every machine. Under `float16` and `float32` it holds the same of the
tiny Llama in these dtypes, as `cast_base` makes it, with each tensor's dtype and what config.json says of it. Under
`kv_cache` it holds what calibration makes of an FP8 KV cache: for each layer the largest key and value that `oneshot`
saw, which may differ a little on another machine, and the scale it made of that, which is a function of it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.observers import Observer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from cast_base import cast_base  # noqa: E402

BASE = ROOT / "releases" / "tiny-llama" / "base"
ROWS, TOKENS = 8, 64
KV_CACHE = {  # the largest over all rows, where the default is an average that moves
    "num_bits": 8,
    "type": "float",
    "strategy": "tensor",
    "dynamic": False,
    "symmetric": True,
    "observer": "static_minmax",
}
PRESETS = {"fp8_dynamic": "FP8_DYNAMIC", "w8a8": "W8A8", "w4a16": "W4A16", "nvfp4a16": "NVFP4A16"}
OTHER_DTYPES = ("float16", "float32")


def quantize(preset: str, folder: Path, base: Path = BASE) -> dict[str, Any]:
    """What `oneshot` makes of a base without data."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme=preset, ignore=["lm_head"]))
    model.save_pretrained(folder, save_compressed=True)
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return {
        "tensors": {name: digest(tensor) for name, tensor in sorted(tensors.items())},
        "quantization_config": config["quantization_config"],
        "dtypes": {name: str(tensor.dtype) for name, tensor in sorted(tensors.items())},
        "dtype": config["dtype"],
    }


def quantize_in(dtype: str, folder: Path) -> dict[str, Any]:
    """What `oneshot` makes of the tiny Llama in another dtype; folder: an empty one for its work."""
    base = folder / "base"
    cast_base(BASE, base, lambda name: getattr(torch, dtype), dtype)
    made: dict[str, Any] = {
        scheme: quantize(preset, folder / scheme, base) for scheme, preset in PRESETS.items() if scheme != "nvfp4a16"
    }
    return made | {"kv_cache": {"rows": ROWS, "tokens": TOKENS, **cache("FP8_DYNAMIC", folder / "kv_cache", base)}}


def cache(preset: str, folder: Path, base: Path = BASE) -> dict[str, Any]:
    """What `oneshot` makes of the KV cache on the first rows of the tiny Llama's calibration data."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    lines = (BASE.parent / "calibration.jsonl").read_text("utf-8").splitlines()[:ROWS]
    rows = [tokenizer(json.loads(line)["text"])["input_ids"][:TOKENS] for line in lines]
    seen: dict[Observer, float] = {}

    def note(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, Observer) and module.base_name in ("k", "v"):
            seen[module] = max(seen.get(module, 0.0), float(inputs[0].abs().max()))

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    recipe = QuantizationModifier(targets="Linear", scheme=preset, ignore=["lm_head"], kv_cache_scheme=KV_CACHE)
    hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]),
        num_calibration_samples=ROWS,
        max_seq_length=TOKENS,
        pipeline="basic",  # which measures the model before it is quantized
        recipe=recipe,
    )
    hook.remove()
    model.save_pretrained(folder, save_compressed=True)
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    config = json.loads((folder / "config.json").read_text("utf-8"))
    names = [f"model.layers.{layer}.self_attn.{kind}_scale" for layer in range(len(seen) // 2) for kind in "kv"]
    scales = {
        name: {
            "amax": amax.hex(),
            "dtype": str(tensors[name].dtype),
            "shape": list(tensors[name].shape),
            "scale": float(tensors[name]).hex(),
        }
        for name, amax in zip(names, seen.values(), strict=True)  # in the order in which layers run
    }
    assert all(name in names or not name.endswith(("k_scale", "v_scale", "zero_point")) for name in tensors)
    return {"scales": scales, "quantization_config": config["quantization_config"]}


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()


def main() -> None:
    made: dict[str, Any] = {
        "versions": {name: version(name) for name in ("llmcompressor", "compressed-tensors", "transformers", "torch")}
    }
    for scheme, preset in PRESETS.items():
        with TemporaryDirectory() as folder:
            made[scheme] = quantize(preset, Path(folder))
    with TemporaryDirectory() as folder:
        made["kv_cache"] = {"rows": ROWS, "tokens": TOKENS, **cache("FP8_DYNAMIC", Path(folder))}
    for dtype in OTHER_DTYPES:
        with TemporaryDirectory() as folder:
            made[dtype] = quantize_in(dtype, Path(folder))
    path = Path(__file__).with_name("llm-compressor.json")
    path.write_text(json.dumps(made, indent=1, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    main()
