"""The two visible loops of a build: `measure_rows` and `quantize_layers`.

Both take one job, a JSON-able mapping, and give one record. An executor runs them anywhere; whoever is killed and asked
again goes on where the disk says it stopped.
"""

from __future__ import annotations

import hashlib
import socket
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from builder.base import Checkpoint, Tensor, check_digests, find_difference, find_snapshot, open_checkpoint
from builder.errors import BaseError, CalibrationError
from builder.files import digest, open_atomic, read_receipt, write_receipt
from builder.machine import measure_peak
from builder.manifest import Scheme as SchemeSpec
from builder.parts import Parts, view_bytes
from builder.plan import PlannedFile, Unit
from builder.progress import Progress
from builder.schemes import Amax, Scheme, bind_specs, list_measured
from builder.schemes.cache import make_scales, name_scales, observe_cache

if TYPE_CHECKING:
    import torch

    from builder.parts import Content
    from builder.streaming import LayerStream, Row

UNIT = TypeAdapter(Unit)
FILE = TypeAdapter(PlannedFile)
HELD_BYTES = 128 << 20  # of weights that are mapped at once
WRITE_AT_MOST_ONE_IN = 20  # of the seconds of a calibration, one may go into writing hidden states


def bind_described(specs: Sequence[Mapping[str, Any]]) -> Scheme:
    """The scheme that a job describes."""
    return bind_specs([SchemeSpec.model_validate(spec) for spec in specs])


def open_base(job: Mapping[str, Any]) -> Checkpoint:
    """The job's base model: in the folder it names, or else, if it is one of the Hub's, this machine's own copy of it.

    A job that is apart, where the folder may be another than the builder's, has the files' digests checked too.
    Raises BaseError if a file is not as it was fetched.
    """
    folder, sizes = Path(job["base"]), job["base_files"]
    difference = find_difference(folder, sizes)
    if difference and job.get("revision"):
        folder = find_snapshot(job["model"], job["revision"], sizes)
        difference = find_difference(folder, sizes)
    if difference:
        raise BaseError(
            difference,
            f"{folder} on {socket.gethostname()}",
            "restore the file, or run the same command again to fetch it anew",
        )
    if job.get("apart"):
        notes = f"base-{digest(str(folder))[:16]}.json"
        check_digests(folder, job["base_digests"], Path(job["folder"]).parent / notes)
    return open_checkpoint(folder, str(folder))


def measure_rows(job: dict[str, Any]) -> dict[str, Any]:
    """Carry a block of calibration rows through all layers and note the largest magnitudes.

    job: block of num_blocks; base, base_files {name: bytes}; scheme; device; arithmetic; rows [[token ids]]; linears
    [[names] of each layer]; attentions [name or None of each layer]; folder; key; save_every_s.
    Returns {block, key, amax {module: {kind: hex float}}, machine, num_rows, seconds, peak_bytes}.
    """
    folder, key, block = Path(job["folder"]), job["key"], job["block"]
    receipt = folder / f"block-{block:05d}.json"
    done = read_receipt(receipt)
    if done and done["key"] == key:
        return done
    from builder.machine_class import describe_machine
    from builder.streaming import LayerStream

    started = time.monotonic()
    stream = LayerStream(open_base(job), job["device"], job["arithmetic"])
    scheme = bind_described(job["scheme"])
    rows = [stream.embed(tokens) for tokens in job["rows"]]
    saved = SavedStates(folder, block, key, job["save_every_s"])
    first, amax = saved.restore(rows)
    progress = Progress(folder, f"calibrate, block {block + 1} of {job['num_blocks']}", len(stream.layers))
    for index in range(first, len(stream.layers)):
        amax |= measure_layer(stream, scheme, index, rows, job["linears"][index], job["attentions"][index])
        progress.step(index + 1, first)
        saved.keep(rows, index + 1, amax)
    record = {
        "key": key,
        "block": block,
        "amax": write_amax(amax),
        "machine": describe_machine(job["device"]),
        "num_rows": len(rows),
        "seconds": time.monotonic() - started,
        "peak_bytes": measure_peak(),
    }
    write_receipt(receipt, record)
    saved.drop()
    return record


def measure_layer(
    stream: LayerStream,
    scheme: Scheme,
    index: int,
    rows: Sequence[Row],
    linears: Sequence[str],
    attention: str | None = None,
) -> Amax:
    """Run every row through one layer under the scheme's observers, and that of its KV cache if it gets scales."""
    prefix = f"{stream.prefix}.{index}."
    with stream.open_layer(index) as layer, ExitStack() as observers:
        reads = [observers.enter_context(scheme.observe(layer, prefix, linears))] if linears else []
        if attention:
            reads.append(observers.enter_context(observe_cache(layer, prefix, attention)))
        for row in rows:
            stream.run_layer(layer, index, row)
        return {name: kinds for read in reads for name, kinds in read().items()}


class SavedStates:
    """Hidden states on disk, now and then, so that a killed calibration loses minutes and not hours.

    They are copied and written behind the worker's back, one write at a time, and never so often that it costs more
    than a twentieth of the worker's time. The states come first, under a name that tells their layer; then the note
    that vouches for them by their digest; then the states before them go.
    """

    def __init__(self, folder: Path, block: int, key: str, every_s: float) -> None:
        """every_s: seconds between two writes, at least; 0 saves after every layer, and waits for it."""
        self.folder, self.name = folder, f"block-{block:05d}"
        self.note = folder / f"{self.name}.states.json"
        self.key, self.every_s, self.pause_s, self.last = key, every_s, every_s, time.monotonic()
        self.writer = ThreadPoolExecutor(1)
        self.writing: Future[float] | None = None

    def find_states(self, layer: int | str = "*") -> list[Path]:
        """What is saved of one layer, or of all."""
        return list(self.folder.glob(f"{self.name}.before-layer-{layer}.states.safetensors"))

    def restore(self, rows: Sequence[Row]) -> tuple[int, Amax]:
        """Put saved hidden states into the rows; returns the layer to go on with and what was measured before it."""
        from builder.files import sha256_file

        note = read_receipt(self.note)
        if note is None or note["key"] != self.key:
            return 0, {}
        states = self.find_states(note["layer"])
        if not states or sha256_file(states[0]) != note["sha256"]:
            return 0, {}
        from safetensors.torch import load_file

        for number, hidden in load_file(states[0]).items():
            rows[int(number)].hidden = hidden.to(rows[int(number)].hidden.device)
        return note["layer"], read_amax(note["amax"])

    def keep(self, rows: Sequence[Row], layer: int, amax: Amax) -> None:
        """Save the rows as they go into `layer`, if the last time is long enough ago.

        Raises BuildError if the time before it failed, as when the disk is full.
        """
        if self.writing and self.writing.done():
            self.settle()
        if self.writing or time.monotonic() - self.last < self.pause_s:
            return
        self.last = time.monotonic()
        states = deque(row.hidden.to("cpu", copy=True) for row in rows)
        self.writing = self.writer.submit(self.write, states, layer, write_amax(amax), self.last)
        if not self.every_s:
            self.settle()

    def write(self, states: deque[torch.Tensor], layer: int, amax: dict[str, dict[str, str]], started: float) -> float:
        """Write states, which are let go one by one, and their note. Returns the seconds since `started`."""
        from builder.families import DTYPE_NAMES

        tensors = tuple(
            Tensor(
                name=str(number), dtype=DTYPE_NAMES[str(state.dtype).removeprefix("torch.")], shape=tuple(state.shape)
            )
            for number, state in enumerate(states)
        )
        path = self.folder / f"{self.name}.before-layer-{layer}.states.safetensors"
        header = PlannedFile(name=path.name, units=(), tensors=tensors, in_place=False).header
        sha256 = hashlib.sha256(header)
        with open_atomic(path) as file:
            file.write(header)
            while states:
                content = view_bytes(states.popleft())
                file.write(content)
                sha256.update(content)
        write_receipt(self.note, {"key": self.key, "layer": layer, "sha256": sha256.hexdigest(), "amax": amax})
        for older in self.find_states():
            if older != path:
                older.unlink()
        return time.monotonic() - started

    def settle(self) -> None:
        """Wait for the write that is under way, if any. Raises BuildError if it failed."""
        if self.writing:
            writing, self.writing = self.writing, None
            took_s = writing.result()
            self.pause_s = self.every_s and max(self.every_s, took_s * WRITE_AT_MOST_ONE_IN)

    def drop(self) -> None:
        """Take everything away: the block is done."""
        self.settle()
        self.writer.shutdown()
        self.note.unlink(missing_ok=True)
        for states in self.find_states():
            states.unlink()


def write_amax(amax: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, str]]:
    """An amax table with its numbers as hex floats, which name every bit."""
    return {linear: {kind: value.hex() for kind, value in measured.items()} for linear, measured in amax.items()}


def read_amax(table: Mapping[str, Mapping[str, str]]) -> Amax:
    """An amax table from hex floats."""
    return {linear: {kind: float.fromhex(text) for kind, text in kinds.items()} for linear, kinds in table.items()}


def merge_amax(tables: Sequence[Mapping[str, Mapping[str, float]]]) -> Amax:
    """The largest of each statistic over all tables; NaN wins, whatever the order."""
    merged: Amax = {}
    for table in tables:
        for linear, measured in table.items():
            kinds = merged.setdefault(linear, {})
            for kind, value in measured.items():
                if kind not in kinds or value > kinds[kind] or value != value:
                    kinds[kind] = value
    return {linear: merged[linear] for linear in sorted(merged)}


def quantize_layers(job: dict[str, Any]) -> dict[str, Any]:
    """Quantize one shard, unit by unit, into the files it owns and pieces of those it shares.

    job: shard of num_shards; base, base_files; scheme; device; units and files as planned; folder; key;
    amax {linear: {kind: hex float}}; optionally apart and have, see `Parts`.
    Returns {shard, num_units, num_skipped, bytes_in, bytes_out, num_quantizers, seconds, peak_bytes}.
    """
    started = time.monotonic()
    units = [UNIT.validate_python(unit) for unit in job["units"]]
    files = [FILE.validate_python(file) for file in job["files"]]
    checkpoint, scheme, amax = open_base(job), bind_described(job["scheme"]), read_amax(job["amax"])
    folder = Path(job["folder"])
    progress = Progress(folder, f"quantize, shard {job['shard'] + 1} of {job['num_shards']}", len(units), "units")
    bytes_in = bytes_out = skipped = 0
    apart, have = job.get("apart", False), job.get("have", ())
    with (
        ThreadPoolExecutor(1) as reader,
        closing(Parts(folder, files, units, job["key"], apart=apart, have=have)) as parts,
    ):
        for number, unit in enumerate(units, 1):
            lacking = parts.lacking(unit)
            if lacking:
                for upcoming in units[number : number + 1]:
                    reader.submit(checkpoint.read_ahead, source_names(upcoming))
                for tensor, content in quantize_unit(checkpoint, scheme, unit, amax, job["device"]):
                    if tensor.name in lacking:
                        parts.add(tensor, content)
                parts.end_unit(unit, lacking)
                bytes_in += sum(checkpoint.tensors[name].num_bytes for name in source_names(unit))
                bytes_out += unit.num_bytes
            else:
                skipped += 1
            progress.step(number, skipped, bytes_in)
        parts.settle()
    return {
        "shard": job["shard"],
        "num_units": len(units),
        "num_skipped": skipped,
        "num_quantizers": sum(len(group) for unit in units for group in unit.groups),
        "bytes_in": bytes_in,
        "bytes_out": bytes_out,
        "seconds": time.monotonic() - started,
        "peak_bytes": measure_peak(),
    }


def source_names(unit: Unit) -> list[str]:
    """The base tensors a unit is made from."""
    return [*unit.kept, *(f"{linear}.weight" for group in unit.groups for linear in group)]


def quantize_unit(
    checkpoint: Checkpoint, scheme: Scheme, unit: Unit, amax: Amax, device: str
) -> Iterator[tuple[Tensor, Content]]:
    """Every tensor of a unit in the order of the plan, exactly as planned; a group is quantized when it is its turn.

    Raises CalibrationError if a needed amax is not there.
    """
    groups = {linear: group for group in unit.groups for linear in group}
    cache_scales = name_scales(unit.attention, scheme.layout) if unit.attention else ()
    made: dict[str, Any] = {}
    for tensor in unit.tensors:
        if tensor.name in unit.kept:
            check_planned(
                unit, tensor, checkpoint.tensors[tensor.name].shape, checkpoint.tensors[tensor.name].num_bytes
            )
            yield tensor, checkpoint.read_chunks(tensor.name)
            continue
        if tensor.name in cache_scales and unit.attention:
            made |= scale_cache(unit.attention, scheme.layout, amax)
        elif tensor.name not in made:
            made |= quantize_group(checkpoint, scheme, groups[tensor.name.rpartition(".")[0]], amax, device)
        given = made.pop(tensor.name)
        check_planned(unit, tensor, tuple(given.shape), given.nbytes)
        yield tensor, [view_bytes(given)]


def quantize_group(
    checkpoint: Checkpoint, scheme: Scheme, group: Sequence[str], amax: Amax, device: str
) -> dict[str, Any]:
    """What takes the place of the weights of linears that read the same input."""
    inputs = {linear: amax[linear]["input"] for linear in group if "input" in amax.get(linear, {})}
    lacking = [linear for linear in list_measured(scheme, group) if linear not in inputs]
    if lacking:
        raise CalibrationError(f"{lacking[0]} was not measured", "the amax table", "delete the receipts and run again")
    return scheme.quantize_group(Weights(checkpoint, group, device), inputs)


def scale_cache(attention: str, layout: str, amax: Amax) -> dict[str, Any]:
    """The scales of a layer's KV cache. Raises CalibrationError if its keys and values were not measured."""
    if attention not in amax:
        raise CalibrationError(f"{attention} was not measured", "the amax table", "delete the receipts and run again")
    return make_scales(attention, layout, amax[attention])


class Weights(Mapping[str, Any]):
    """The weights of some linears. On the CPU large ones are mapped anew whenever they are asked for, so that none
    outlives its use; small ones stay, and on a GPU all of them, for the way there is long.
    """

    def __init__(self, checkpoint: Checkpoint, linears: Sequence[str], device: str) -> None:
        self.checkpoint, self.linears, self.device = checkpoint, linears, device
        self.there: dict[str, Any] = {}

    def __getitem__(self, linear: str) -> Any:
        if linear in self.there:
            return self.there[linear]
        name = f"{linear}.weight"
        on_cpu = self.device == "cpu"
        weight: Any = self.checkpoint.load_words(name) if on_cpu else self.checkpoint.load(name).to(self.device)
        if self.device != "cpu" or weight.nbytes <= HELD_BYTES // len(self.linears):
            self.there[linear] = weight
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.linears)

    def __len__(self) -> int:
        return len(self.linears)


def check_planned(unit: Unit, tensor: Tensor, shape: tuple[int, ...], num_bytes: int) -> None:
    """Refuse a tensor that differs from the plan in shape or size."""
    if (shape, num_bytes) != (tensor.shape, tensor.num_bytes):
        raise BaseError(
            f"{tensor.name} is {shape} of {num_bytes} bytes, but {tensor.shape} of {tensor.num_bytes} was planned",
            unit.name,
            "the base model's files changed under the build: run the same command again",
        )
