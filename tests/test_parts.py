"""What is written is what safetensors reads, however the work was cut up or cut short."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from builder.base import Tensor
from builder.errors import BuildError
from builder.parts import RECORD, FileInPlace, HashedFile, Parts, read_record, splice_file, view_bytes, write_unit
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


def contents(unit: Unit) -> dict[str, list[memoryview]]:
    return {name: [view_bytes(tensor)] for name, tensor in make_tensors(unit).items()}


def add_unit(writer: FileInPlace, unit: Unit) -> None:
    given = contents(unit)
    for tensor in unit.tensors:
        writer.add(tensor, given[tensor.name])
    writer.end_unit(unit.name)


def finish(writer: FileInPlace) -> dict[str, Any]:
    record = writer.finish().result()
    writer.close()
    return record


def write_in_place(folder: Path, units: Sequence[Unit], key: str = KEY) -> dict[str, Any]:
    writer = FileInPlace(folder, plan_whole(units), key)
    for unit in units:
        add_unit(writer, unit)
    return finish(writer)


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
            add_unit(writer, unit)
        done = len(writer.units)
        writer.close()
        with writer.partial.open("ab") as file:  # what had been written of the next unit, journalled nowhere
            file.write(os.urandom(data.draw(st.integers(0, 300), "torn bytes")))
        assert len(json.loads(writer.journal.read_text())["units"] if done else []) == done
    writer = FileInPlace(folder, planned, KEY)
    assert len(writer.units) >= skipped
    for unit in UNITS[len(writer.units) :]:
        add_unit(writer, unit)
    assert finish(writer) == wanted
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
        for tensor in unit.tensors:
            writer.add(tensor, [bytes(tensor.num_bytes)])
        writer.end_unit(unit.name)
    writer.close()
    writer = FileInPlace(tmp_path, plan_whole(UNITS), KEY)
    assert (writer.units, writer.scalars, writer.journal.exists()) == ([], {}, False)
    for unit in UNITS:
        add_unit(writer, unit)
    assert finish(writer) == wanted


def test_a_file_shorter_than_its_journal_is_begun_anew(tmp_path: Path) -> None:
    writer = FileInPlace(tmp_path, plan_whole(UNITS), KEY)
    for unit in UNITS[:3]:
        add_unit(writer, unit)
    position = writer.out.num_bytes
    writer.close()
    os.truncate(writer.partial, position - 1)
    writer = FileInPlace(tmp_path, plan_whole(UNITS), KEY)
    assert writer.units == []
    writer.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_names_the_file_and_leaves_the_journal_as_it_was(tmp_path: Path) -> None:
    writer = FileInPlace(tmp_path, plan_whole(UNITS), KEY)
    add_unit(writer, UNITS[0])
    writer.keeper.submit(lambda: None).result()
    before = writer.journal.read_bytes()
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, writer.out.file.fileno())
    os.close(full)
    with pytest.raises(BuildError) as caught:
        for unit in UNITS[1:]:
            add_unit(writer, unit)
        finish(writer)
    assert caught.value.what == "no space left while writing model.safetensors.partial"
    writer.close()  # which says nothing more, although it cannot flush either
    assert writer.out.file.closed
    assert writer.journal.read_bytes() == before
    resumed = FileInPlace(tmp_path, plan_whole(UNITS), KEY)
    assert resumed.units == [UNITS[0].name]
    resumed.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_write_that_failed_while_nobody_waited_for_it_fails_the_file(tmp_path: Path) -> None:
    with (tmp_path / "file").open("x+b") as file:
        out = HashedFile(file)
        out.write(b"x" * 100)
        before = os.dup(file.fileno())
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, file.fileno())
        assert isinstance(out.mark().exception(), OSError)
        os.dup2(before, file.fileno())  # there is room again
        out.write(b"y" * 100)
        with pytest.raises(OSError, match="No space left"):
            out.settle()
        out.close()
        os.close(before)
        os.close(full)


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
        record = write_unit(pieces[unit.name], unit.tensors, contents(unit), KEY)
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
        write_unit(pieces[-1], unit.tensors, contents(unit), KEY)
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


# ----------------------------------------------------------------------------------------------- a worker's parts


def write_parts(folder: Path, units: Sequence[Unit], *, max_bytes: int, **options: Any) -> list[str]:
    """Write what these units of UNITS lack; returns the names of the tensors that were asked for."""
    files, asked = plan_files(UNITS, max_bytes, "sequential"), []
    parts = Parts(folder, files, units, KEY, **options)
    try:
        for unit in units:
            lacking = parts.lacking(unit)
            given = contents(unit)
            for tensor in unit.tensors:
                if tensor.name in lacking:
                    parts.add(tensor, given[tensor.name])
                    asked.append(tensor.name)
            if lacking:
                parts.end_unit(unit, lacking)
        parts.settle()
    finally:
        parts.close()
    return asked


@pytest.mark.parametrize("max_bytes", [600, 1500, 1 << 20])
@pytest.mark.parametrize("boundary", [1, 3, 5])
def test_two_workers_parts_make_the_files_that_one_makes(tmp_path: Path, max_bytes: int, boundary: int) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    write_parts(alone, UNITS, max_bytes=max_bytes)
    for units in (UNITS[boundary:], UNITS[:boundary]):
        write_parts(shared, units, max_bytes=max_bytes)
        assert write_parts(shared, units, max_bytes=max_bytes) == [], "a second time, nothing is lacking"
    for planned in plan_files(UNITS, max_bytes, "sequential"):
        for folder in (alone, shared):
            if read_record(folder / planned.name, KEY) is None:
                pieces = [folder / "units" / f"{unit}.safetensors" for unit in planned.units]
                splice_file(folder / planned.name, planned, pieces, KEY)
        assert sha256(alone / planned.name) == sha256(shared / planned.name)


def test_a_worker_apart_writes_pieces_alone_and_leaves_out_what_is_there_already(tmp_path: Path) -> None:
    asked = write_parts(tmp_path, UNITS, max_bytes=1 << 20, apart=True, have=["layer-1", "first"])
    assert {name.partition(".")[0] for name in asked} == {"layer-0", "layer-2", "layer-3", "last"}
    assert listing(tmp_path) == {"units"}
    pieces = {path.name for path in (tmp_path / "units").glob("*.safetensors")}
    assert pieces == {"layer-0.safetensors", "layer-2.safetensors", "layer-3.safetensors", "last.safetensors"}


def test_a_damaged_piece_is_named_and_taken_away(tmp_path: Path) -> None:
    write_parts(tmp_path, UNITS, max_bytes=1 << 20, apart=True)
    piece = tmp_path / "units" / "layer-2.safetensors"
    content = bytearray(piece.read_bytes())
    content[-20] ^= 1
    piece.write_bytes(content)
    pieces = [tmp_path / "units" / f"{unit.name}.safetensors" for unit in UNITS]
    with pytest.raises(BuildError) as caught:
        splice_file(tmp_path / "model.safetensors", plan_whole(UNITS), pieces, KEY)
    assert caught.value.what == "layer-2.safetensors was damaged on the disk"
    assert not piece.exists() and listing(tmp_path) == {"units"}
    write_parts(tmp_path, UNITS, max_bytes=1 << 20, apart=True)
    record = splice_file(tmp_path / "model.safetensors", plan_whole(UNITS), pieces, KEY)
    assert record["sha256"] == write_in_place(tmp_path / "whole", UNITS)["sha256"]


def test_a_file_larger_than_what_may_wait_is_whole(tmp_path: Path) -> None:
    """Many chunks, none of them a multiple of a page: staging, hashing and writing keep their order."""
    big = make_unit("big", ("U8", (9_000_001,)), ("U8", (8_388_608,)), ("U8", (7,)), ("U8", (20_000_003,)))
    record = write_in_place(tmp_path, [big])
    path = tmp_path / "model.safetensors"
    assert record["sha256"] == sha256(path) and record["num_bytes"] == path.stat().st_size
    assert_same_bits(load_file(path), [big])
