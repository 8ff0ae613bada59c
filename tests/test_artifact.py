"""The files beside the weights, and the draft that fixes work on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from builder.artifact import Draft, link_file, write_index
from builder.base import INDEX

# ------------------------------------------------------------------------------------------------------ drafts


def make_draft(folder: Path) -> Draft:
    for name in ("parts", "draft", "base"):
        (folder / name).mkdir()
    for number, name in enumerate(("a", "b")):
        tensors = {f"{name}.weight": torch.full((4, 2), float(number)).bfloat16(), f"{name}.scale": torch.tensor(1.0)}
        save_file(tensors, folder / "parts" / f"{name}.safetensors", metadata={"format": "pt"})
        (folder / "parts" / f"{name}.safetensors").chmod(0o644)
        link_file(folder / "parts" / f"{name}.safetensors", folder / "draft" / f"{name}.safetensors")
    draft = Draft(folder / "draft", folder / "base", "modelopt", "unit", ("lm_head",))
    write_index(draft.folder, draft.tensor_names(), 40, 18)
    return draft


def test_a_link_moves_no_bytes(tmp_path: Path) -> None:
    make_draft(tmp_path)
    assert (tmp_path / "draft" / "a.safetensors").samefile(tmp_path / "parts" / "a.safetensors")


@pytest.mark.skipif(
    not Path("/dev/shm").is_dir() or Path("/dev/shm").stat().st_dev == Path("/tmp").stat().st_dev,
    reason="needs a second file system",
)
def test_a_link_to_another_disk_is_a_whole_copy(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "file").chmod(0o600)
    folder = Path("/dev/shm") / f"test-artifact-{os.getpid()}"
    folder.mkdir()
    try:
        link_file(tmp_path / "file", folder / "file")
        assert (folder / "file").read_bytes() == b"content"
        assert (folder / "file").stat().st_mode & 0o777 == 0o644
        assert [path.name for path in folder.iterdir()] == ["file"]
    finally:
        shutil.rmtree(folder)


def test_a_link_over_a_file_replaces_it_and_not_what_is_linked_there(tmp_path: Path) -> None:
    (tmp_path / "new").write_bytes(b"new")
    (tmp_path / "old").write_bytes(b"old")
    os.link(tmp_path / "old", tmp_path / "target")
    link_file(tmp_path / "new", tmp_path / "target")
    assert ((tmp_path / "target").read_bytes(), (tmp_path / "old").read_bytes()) == (b"new", b"old")
    link_file(tmp_path / "target", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"new"


def test_a_tensor_added_to_a_draft_leaves_the_part_it_was_linked_from(tmp_path: Path) -> None:
    draft = make_draft(tmp_path)
    part, other = tmp_path / "parts" / "a.safetensors", tmp_path / "parts" / "b.safetensors"
    before = part.read_bytes()
    draft.add_tensors("a.safetensors", {"a.input_scale": torch.tensor(0.5), "a.bias": torch.zeros(3).bfloat16()})
    assert part.read_bytes() == before
    found = load_file(draft.folder / "a.safetensors")
    assert sorted(found) == ["a.bias", "a.input_scale", "a.scale", "a.weight"]
    assert found["a.input_scale"] == 0.5 and torch.equal(found["a.weight"], torch.zeros(4, 2).bfloat16())
    assert (draft.folder / "a.safetensors").stat().st_mode & 0o777 == 0o644
    assert (draft.folder / "b.safetensors").samefile(other)
    index = draft.read_json(INDEX)
    assert index["weight_map"] == draft.tensor_names()
    assert index["metadata"] == {"total_parameters": 18, "total_size": 40 + 4 + 6}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_tensor_added_to_a_draft_leaves_the_header_s_metadata_as_they_are(
    tmp_path: Path, metadata: dict[str, str] | None
) -> None:
    draft = make_draft(tmp_path)
    save_file({"a.weight": torch.zeros(2)}, draft.folder / "a.safetensors", metadata=metadata)
    draft.add_tensors("a.safetensors", {"a.input_scale": torch.tensor(0.5)})
    with safe_open(draft.folder / "a.safetensors", framework="pt") as opened:
        assert opened.metadata() == metadata and set(opened.keys()) == {"a.weight", "a.input_scale"}


def test_a_tensor_added_a_second_time_counts_once(tmp_path: Path) -> None:
    draft = make_draft(tmp_path)
    for value in (0.5, 0.25):
        draft.add_tensors("a.safetensors", {"a.input_scale": torch.tensor(value)})
    assert draft.read_json(INDEX)["metadata"]["total_size"] == 44
    assert load_file(draft.folder / "a.safetensors")["a.input_scale"] == 0.25


def test_a_draft_in_one_file_gets_no_index(tmp_path: Path) -> None:
    draft = make_draft(tmp_path)
    draft.remove(INDEX)
    draft.add_tensors("a.safetensors", {"a.input_scale": torch.tensor(0.5)})
    assert draft.read_json(INDEX) is None


def test_a_file_of_the_base_is_here_only_byte_for_byte(tmp_path: Path) -> None:
    draft = make_draft(tmp_path)
    assert not draft.has_base_file("tokenizer.json")
    (draft.base / "tokenizer.json").write_text('{"a":  1}')
    assert not draft.has_base_file("tokenizer.json")
    draft.write_json("tokenizer.json", {"a": 1})
    assert not draft.has_base_file("tokenizer.json")
    draft.copy_from_base("tokenizer.json")
    assert draft.has_base_file("tokenizer.json")
    assert (draft.folder / "tokenizer.json").stat().st_mode & 0o777 == 0o644


def test_the_index_is_the_one_transformers_writes(tmp_path: Path) -> None:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "saved", max_shard_size="20kB")
    theirs = json.loads((tmp_path / "saved" / INDEX).read_text())
    assert len(set(theirs["weight_map"].values())) > 1
    num_bytes = sum(
        tensor.nbytes for file in (tmp_path / "saved").glob("*.safetensors") for tensor in load_file(file).values()
    )
    write_index(tmp_path, theirs["weight_map"], num_bytes, model.num_parameters())
    assert json.loads((tmp_path / INDEX).read_text()) == theirs
