"""A finished artifact's files besides the weights, and the draft of it that fixes work on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.base import INDEX, read_header
from builder.files import (
    CHUNK_BYTES,
    canonical_json,
    open_atomic,
    read_json,
    sha256_file,
    sync_folder,
    write_atomic,
)

if TYPE_CHECKING:
    import torch


def link_file(source: Path, target: Path) -> None:
    """The same file under a second name, without moving a byte where the disk can; a copy elsewhere."""
    try:
        os.link(source, target)
    except OSError:
        with source.open("rb") as whole, open_atomic(target) as file:
            shutil.copyfileobj(whole, file, CHUNK_BYTES)


def write_index(
    folder: Path,
    weight_map: Mapping[str, str],
    num_bytes: int,
    num_parameters: int | None,
    spell: Callable[[Any], str] = canonical_json,
) -> None:
    """model.safetensors.index.json; num_bytes counts tensor data alone, and None leaves the parameters out."""
    metadata = {"total_size": num_bytes} | ({} if num_parameters is None else {"total_parameters": num_parameters})
    write_atomic(folder / INDEX, spell({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}))


@dataclass(frozen=True)
class Draft:
    """An artifact that is complete but not yet accepted: what fixes look at and cure.

    folder: all files of the payload. base: the base model's folder. layout and input_scale: the scheme's; it may store
    no scales of inputs. from_template: whether the configs are meant to be an export template's, but for what a fix
    restores. spell: how a JSON file is written.
    """

    folder: Path
    base: Path
    layout: str
    input_scale: str | None
    ignore: tuple[str, ...]
    from_template: bool = False
    spell: Callable[[Any], str] = canonical_json

    def read_json(self, name: str) -> Any:
        """A JSON file of the draft; None if there is none."""
        return read_json(self.folder / name)

    def read_base_json(self, name: str) -> Any:
        """A JSON file of the base model; None if there is none."""
        return read_json(self.base / name)

    def write_json(self, name: str, value: Any) -> None:
        """Replace a JSON file; a hard link to the old one keeps the old content."""
        write_atomic(self.folder / name, self.spell(value))

    def copy_from_base(self, name: str) -> None:
        """Take a file of the base model as it is, byte for byte."""
        write_atomic(self.folder / name, (self.base / name).read_bytes())

    def has_base_file(self, name: str) -> bool:
        """Whether a file of the base model is here, byte for byte."""
        ours, theirs = self.folder / name, self.base / name
        return ours.is_file() and theirs.is_file() and ours.read_bytes() == theirs.read_bytes()

    def remove(self, name: str) -> None:
        """Take away a file that the base model does not have."""
        (self.folder / name).unlink()
        sync_folder((self.folder / name).parent)

    def tensor_names(self) -> dict[str, str]:
        """tensor -> file, from the files' own headers."""
        files = sorted(self.folder.glob("*.safetensors"))
        return {tensor.name: file.name for file in files for tensor in read_header(file)}

    def add_tensors(self, file: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Rewrite one weight file with further tensors, in the safetensors library's order, and the index with it."""
        from safetensors import safe_open
        from safetensors.torch import save

        with safe_open(self.folder / file, framework="pt") as handle:
            whole = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            metadata = handle.metadata()
        more = {**whole, **tensors}
        write_atomic(self.folder / file, save(more, metadata=metadata))
        index = self.read_json(INDEX)
        if index is not None:
            index["weight_map"] = dict(sorted({**index["weight_map"], **dict.fromkeys(tensors, file)}.items()))
            grown = sum(tensor.nbytes for tensor in more.values()) - sum(tensor.nbytes for tensor in whole.values())
            index["metadata"]["total_size"] += grown
            self.write_json(INDEX, index)


def write_config(
    path: Path,
    base_config: Mapping[str, Any],
    quantization_config: Mapping[str, Any],
    spell: Callable[[Any], str] = canonical_json,
) -> None:
    """config.json: the base's own, and how the weights are quantized."""
    write_atomic(path, spell({**base_config, "quantization_config": dict(quantization_config)}))


def hash_payload(folder: Path, names: Sequence[str], known: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """{name: {sha256, num_bytes}} of a payload's files; known: digests taken while writing, by name."""
    payload = {}
    for name in sorted(names):
        path = folder / name
        payload[name] = {"sha256": known.get(name) or sha256_file(path), "num_bytes": path.stat().st_size}
    return payload
