"""What is written is what safetensors reads, however the work was cut up or cut short."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from builder.artifact import (
    RECORD,
    Draft,
    FileInPlace,
    link_file,
    read_record,
    splice_file,
    view_bytes,
    write_index,
    write_unit,
)
from builder.base import INDEX, Tensor
from builder.errors import BuildError
from builder.plan import PlannedFile, Unit, plan_files

KEY = "a" * 64
DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F64": torch.float64,
    "BOOL": torch.bool,
}


def make_tensor(planned: Tensor) -> torch.Tensor:
    """Any bits, the same ones for the same name; NaN and infinities among them."""
    generator = torch.Generator().manual_seed(int(hashlib.sha256(planned.name.encode()).hexdigest()[:8], 16))
    largest = 2 if planned.dtype == "BOOL" else 256
    bits = torch.randint(largest, (planned.num_bytes,), generator=generator, dtype=torch.uint8)
    return bits.view(DTYPES[planned.dtype]).reshape(planned.shape)


def make_unit(name: str, *tensors: tuple[str, tuple[int, ...]]) -> Unit:
    planned = tuple(Tensor(name=f"{name}.{n}", dtype=dtype, shape=shape) for n, (dtype, shape) in enumerate(tensors))
    return Unit(name=name, layer=None, groups=(), kept=(), tensors=planned)


def make_layer(name: str, size: int = 16) -> Unit:
    """A unit as nvfp4 yields it: codes, block scales, two global scales, a norm."""
    return make_unit(
        name, ("U8", (size, 8)), ("F8_E4M3", (size, 1)), ("F32", ()), ("F32", (1,)), ("BF16", (size,)), ("F32", ())
    )


UNITS = (
    make_unit("first", ("BF16", (32, 8))),
    *(make_layer(f"layer-{index}", 16 * (index + 1)) for index in range(4)),
    make_unit("last", ("BF16", (8,)), ("BF16", (32, 8)), ("F32", ())),
)


def make_tensors(unit: Unit) -> dict[str, torch.Tensor]:
    return {tensor.name: make_tensor(tensor) for tensor in unit.tensors}


def plan_whole(units: Sequence[Unit]) -> PlannedFile:
    (planned,) = plan_files(units, 1 << 30, "sequential")
    assert planned.in_place
    return planned


def write_in_place(folder: Path, units: Sequence[Unit], key: str = KEY) -> dict[str, Any]:
    writer = FileInPlace(folder, plan_whole(units), key)
    for unit in units:
        writer.add_unit(unit.name, make_tensors(unit))
    return writer.finish()


def assert_same_bits(found: dict[str, torch.Tensor], units: Sequence[Unit]) -> None:
    wanted = {name: tensor for unit in units for name, tensor in make_tensors(unit).items()}
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bytes(view_bytes(found[name])) == bytes(view_bytes(tensor)), name


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def listing(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ------------------------------------------------------------------------------------------------- files in place


def test_a_file_written_in_place_is_what_safetensors_reads(tmp_path: Path) -> None:
    record = write_in_place(tmp_path, UNITS)
    path = tmp_path / "model.safetensors"
    assert_same_bits(load_file(path), UNITS)
    assert record == {
        "key": KEY,
        "name": path.name,
        "sha256": sha256(path),
        "num_bytes": path.stat().st_size,
    }
    assert path.stat().st_mode & 0o777 == 0o644
    assert listing(tmp_path) == {path.name, path.name + RECORD}


def test_global_scales_come_last(tmp_path: Path) -> None:
    write_in_place(tmp_path, UNITS)
    content = (tmp_path / "model.safetensors").read_bytes()
    scalars = [t for unit in UNITS for t in unit.tensors if t.num_elements == 1]
    assert len(scalars) == 13
    assert content.endswith(b"".join(bytes(view_bytes(make_tensor(tensor))) for tensor in scalars))


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_a_file_is_the_same_wherever_its_writing_was_cut_short(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole, folder = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("cut")
    wanted = write_in_place(whole, UNITS)
    planned = plan_whole(UNITS)
    skipped = 0
    for _ in range(data.draw(st.integers(1, 4), "processes that die")):
        writer = FileInPlace(folder, planned, KEY)
        assert writer.units == [unit.name for unit in UNITS[: len(writer.units)]]
        skipped = max(skipped, len(writer.units))
        more = data.draw(st.integers(0, len(UNITS) - len(writer.units)), "units")
        for unit in UNITS[len(writer.units) :][:more]:
            writer.add_unit(unit.name, make_tensors(unit))
        done = len(writer.units)
        writer.close()
        with writer.partial.open("ab") as file:  # what had been written of the next unit, journalled nowhere
            file.write(os.urandom(data.draw(st.integers(0, 300), "torn bytes")))
        assert len(json.loads(writer.journal.read_text())["units"] if done else []) == done
    writer = FileInPlace(folder, planned, KEY)
    assert len(writer.units) >= skipped
    for unit in UNITS[len(writer.units) :]:
        writer.add_unit(unit.name, make_tensors(unit))
    assert writer.finish() == wanted
    assert sha256(folder / planned.name) == wanted["sha256"]
    assert listing(folder) == {planned.name, planned.name + RECORD}


def test_a_worker_killed_between_name_and_record_writes_the_same_file_again(tmp_path: Path) -> None:
    wanted = write_in_place(tmp_path, UNITS)
    (tmp_path / ("model.safetensors" + RECORD)).unlink()
    journal = tmp_path / "model.safetensors.partial.journal"
    journal.write_text(json.dumps({"key": KEY, "units": ["first"], "scalars": {}, "num_bytes": 4000}))
    assert write_in_place(tmp_path, UNITS) == wanted
    assert sha256(tmp_path / "model.safetensors") == wanted["sha256"]


def test_a_journal_of_another_key_is_not_believed(tmp_path: Path) -> None:
    wanted = write_in_place(tmp_path / "undisturbed", UNITS)
    writer = FileInPlace(tmp_path, plan_whole(UNITS), "b" * 64)
    for unit in UNITS[:3]:  # other content, of the same length
        writer.add_unit(unit.name, {name: torch.zeros_like(tensor) for name, tensor in make_tensors(unit).items()})
    writer.close()
    writer = FileInPlace(tmp_path, plan_whole(UNITS), KEY)
    assert (writer.units, writer.scalars, writer.journal.exists()) == ([], {}, False)
    for unit in UNITS:
        writer.add_unit(unit.name, make_tensors(unit))
    assert writer.finish() == wanted


def test_a_file_shorter_than_its_journal_is_begun_anew(tmp_path: Path) -> None:
    writer = FileInPlace(tmp_path, plan_whole(UNITS), KEY)
    for unit in UNITS[:3]:
        writer.add_unit(unit.name, make_tensors(unit))
    position = writer.out.num_bytes
    writer.close()
    os.truncate(writer.partial, position - 1)
    writer = FileInPlace(tmp_path, plan_whole(UNITS), KEY)
    assert writer.units == []
    writer.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_names_the_file_and_leaves_the_journal_as_it_was(tmp_path: Path) -> None:
    writer = FileInPlace(tmp_path, plan_whole(UNITS), KEY)
    writer.add_unit(UNITS[0].name, make_tensors(UNITS[0]))
    before = writer.journal.read_bytes()
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, writer.out.file.fileno())
    os.close(full)
    with pytest.raises(BuildError) as caught:
        writer.add_unit(UNITS[1].name, make_tensors(UNITS[1]))
    assert caught.value.what == "no space left while writing model.safetensors.partial"
    writer.close()  # which says nothing more, although it cannot flush either
    assert writer.out.file.closed
    assert writer.journal.read_bytes() == before
    resumed = FileInPlace(tmp_path, plan_whole(UNITS), KEY)
    assert resumed.units == [UNITS[0].name]
    resumed.close()


# ---------------------------------------------------------------------------------------------------- records


def test_a_record_is_believed_under_its_key_and_beside_its_whole_file(tmp_path: Path) -> None:
    record = write_in_place(tmp_path, UNITS)
    path = tmp_path / "model.safetensors"
    assert read_record(path, KEY) == record
    assert read_record(path, "b" * 64) is None
    with path.open("ab") as file:
        file.write(b"\0")
    assert read_record(path, KEY) is None
    path.unlink()
    assert read_record(path, KEY) is None
    assert read_record(tmp_path / "other.safetensors", KEY) is None


def test_a_torn_record_is_not_believed(tmp_path: Path) -> None:
    write_in_place(tmp_path, UNITS)
    path = tmp_path / "model.safetensors"
    record = path.with_name(path.name + RECORD)
    record.write_bytes(record.read_bytes()[:-3])
    assert read_record(path, KEY) is None


# ----------------------------------------------------------------------------------------------------- pieces


@settings(deadline=None, max_examples=25)
@given(max_bytes=st.integers(1, 4000), packing=st.sampled_from(["sequential", "balanced"]))
def test_files_spliced_from_pieces_hold_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory, max_bytes: int, packing: str
) -> None:
    folder = tmp_path_factory.mktemp("pieces")
    pieces = {unit.name: folder / "units" / f"{unit.name}.safetensors" for unit in UNITS}
    for unit in UNITS:
        record = write_unit(pieces[unit.name], unit.tensors, make_tensors(unit), KEY)
        assert record == read_record(pieces[unit.name], KEY)
        assert record["sha256"] == sha256(pieces[unit.name])
    found: dict[str, torch.Tensor] = {}
    for planned in plan_files(UNITS, max_bytes, packing):
        record = splice_file(folder / planned.name, planned, [pieces[unit] for unit in planned.units], KEY)
        assert record == read_record(folder / planned.name, KEY)
        assert record["sha256"] == sha256(folder / planned.name)
        assert record["num_bytes"] == planned.num_bytes
        assert (folder / planned.name).stat().st_mode & 0o777 == 0o644
        tensors = load_file(folder / planned.name)
        assert tensors.keys() == planned.names and not tensors.keys() & found.keys()
        found |= tensors
    assert_same_bits(found, UNITS)


def test_a_spliced_file_is_byte_for_byte_the_one_written_in_place(tmp_path: Path) -> None:
    wanted = write_in_place(tmp_path / "in-place", UNITS)
    pieces = []
    for unit in UNITS:
        pieces.append(tmp_path / "units" / f"{unit.name}.safetensors")
        write_unit(pieces[-1], unit.tensors, make_tensors(unit), KEY)
    assert splice_file(tmp_path / "model.safetensors", plan_whole(UNITS), pieces, KEY) == wanted
    assert sha256(tmp_path / "model.safetensors") == wanted["sha256"]


# ------------------------------------------------------------------------------------------------------ bytes


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 4), (0, 4)])
def test_bytes_of_every_dtype_are_those_that_safetensors_stores(
    tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    planned = Tensor(name="x", dtype=name, shape=shape)
    tensor = make_tensor(planned)
    content = bytes(view_bytes(tensor))
    assert len(content) == planned.num_bytes == len(view_bytes(tensor))
    save_file({"x": tensor}, tmp_path / "library.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "library.safetensors").read_bytes() == plan_whole(
        [Unit(name="x", layer=None, groups=(), kept=(), tensors=(planned,))]
    ).header + content


def test_bytes_of_a_tensor_with_gaps_are_in_the_order_of_its_elements() -> None:
    whole = torch.arange(24, dtype=torch.int16).reshape(4, 6)
    for view in (whole.T, whole[::2, 1::2], whole[:, 3], whole[3:, 5:], whole[0, 0]):
        assert bytes(view_bytes(view)) == b"".join(int(x).to_bytes(2, "little") for x in view.reshape(-1))


def test_bytes_of_a_tensor_in_one_piece_are_not_copied() -> None:
    tensor = torch.zeros(4, dtype=torch.uint8, requires_grad=False)
    seen = view_bytes(tensor)
    tensor[2] = 7
    assert bytes(seen) == b"\0\0\7\0"


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
        assert listing(folder) == {"file"}
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
