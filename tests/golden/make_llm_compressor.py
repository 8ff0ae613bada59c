"""Writes llm-compressor.json beside this file: what llm-compressor makes of the tiny Llama, for each data-free scheme.

llm-compressor pins other versions of transformers and compressed-tensors than this project, so it runs in an
environment of its own, on the CPU, from the repository's root:

    python3.11 -m venv build/llm-compressor
    build/llm-compressor/bin/pip install llmcompressor==0.14.0 torch==2.13.0
    build/llm-compressor/bin/python tests/golden/make_llm_compressor.py

The file holds, for each scheme, the versions, the sha256 of every tensor's bytes and the `quantization_config`.
Weights alone decide them, so they are the same on every machine.
"""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
BASE = ROOT / "releases" / "tiny-llama" / "base"
PRESETS = {"fp8_dynamic": "FP8_DYNAMIC", "w8a8": "W8A8", "w4a16": "W4A16", "nvfp4a16": "NVFP4A16"}


def quantize(preset: str, folder: Path) -> dict[str, Any]:
    """What `oneshot` makes of the tiny Llama without data."""
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16)
    oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme=preset, ignore=["lm_head"]))
    model.save_pretrained(folder, save_compressed=True)
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return {
        "tensors": {name: digest(tensor) for name, tensor in sorted(tensors.items())},
        "quantization_config": config["quantization_config"],
    }


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()


def main() -> None:
    made: dict[str, Any] = {
        "versions": {name: version(name) for name in ("llmcompressor", "compressed-tensors", "transformers", "torch")}
    }
    for scheme, preset in PRESETS.items():
        with TemporaryDirectory() as folder:
            made[scheme] = quantize(preset, Path(folder))
    path = Path(__file__).with_name("llm-compressor.json")
    path.write_text(json.dumps(made, indent=1, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    main()
