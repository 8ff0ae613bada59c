"""A copy of a base model whose tensors have the dtypes that a test asks for, and values that need them.

The tiny Llama is bfloat16: times a factor, in float32, its values use all of a wider dtype's mantissa.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FACTOR = torch.tensor(1.1)  # a float32, so that products are the same on every machine


def cast_base(source: Path, folder: Path, choose: Callable[[str], torch.dtype], dtype: str | None) -> None:
    """Copy a base model into a folder that does not exist yet.

    choose: the dtype of each tensor, by its name. dtype: what config.json says of it; None for nothing.
    """
    shutil.copytree(source, folder)
    for path in folder.glob("*.safetensors"):
        tensors = {name: (tensor.float() * FACTOR).to(choose(name)) for name, tensor in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    (folder / "config.json").write_text(json.dumps(config | ({"dtype": dtype} if dtype else {})), "utf-8")
