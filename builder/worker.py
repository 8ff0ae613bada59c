"""The two visible loops of a build: `measure_rows` and `quantize_layers`.

Both take one job, a JSON-able mapping, and give one record. An executor runs them anywhere; whoever is killed and asked
again goes on where the disk says it stopped.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from builder.artifact import FileInPlace, read_record, write_unit
from builder.base import Checkpoint, open_checkpoint
from builder.errors import BaseError, CalibrationError
from builder.files import open_atomic, read_receipt, write_receipt
from builder.manifest import Scheme as SchemeSpec
from builder.plan import PlannedFile, Unit
from builder.schemes import SCHEMES, Amax, Scheme

if TYPE_CHECKING:
    import torch

    from builder.streaming import LayerStream, Row

UNIT = TypeAdapter(Unit)
FILE = TypeAdapter(PlannedFile)
UNITS = "units"
REPORT_EVERY_S = 10.0


def bind_spec(spec: Mapping[str, Any]) -> Scheme:
    """The scheme that a job describes."""
    parsed = SchemeSpec.model_validate(spec)
    return SCHEMES[parsed.name](parsed)


def open_base(job: Mapping[str, Any]) -> Checkpoint:
    """The job's base model. Raises BaseError if a file is not of the size it was fetched with."""
    folder = Path(job["base"])
    for name, num_bytes in job["base_files"].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != num_bytes:
            raise BaseError(
                f"{name} has {found} bytes, but had {num_bytes} when it was fetched" if found else f"{name} is missing",
                str(folder),
                "restore the file, or run the same command again to fetch it anew",
            )
    return open_checkpoint(folder, str(folder))


def measure_peak() -> int:
    """The process's largest resident memory so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Progress:
    """Says on standard error how far a job is, at most every ten seconds."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total = title, total
        self.started = self.said = time.monotonic()

    def step(self, done: int) -> None:
        now = time.monotonic()
        if now - self.said < REPORT_EVERY_S or not done:
            return
        self.said = now
        left = (now - self.started) / done * (self.total - done)
        print(f"{self.title}: {done} of {self.total} done, about {left:.0f} s left", file=sys.stderr, flush=True)


def measure_rows(job: dict[str, Any]) -> dict[str, Any]:
    """Carry a block of calibration rows through all layers and note the largest magnitudes.

    job: block of num_blocks; base, base_files {name: bytes}; scheme; device; rows [[token ids]]; linears [[names] of
    each layer]; folder; key; save_every_s.
    Returns {block, key, amax {linear: {kind: hex float}}, machine, num_rows, seconds, peak_bytes}.
    """
    folder, key, block = Path(job["folder"]), job["key"], job["block"]
    receipt = folder / f"block-{block:05d}.json"
    done = read_receipt(receipt)
    if done and done["key"] == key:
        return done
    from builder.streaming import LayerStream, describe_machine

    started = time.monotonic()
    stream = LayerStream(open_base(job), job["device"])
    scheme = bind_spec(job["scheme"])
    rows = [stream.embed(tokens) for tokens in job["rows"]]
    saved = SavedStates(folder, block, key, job["save_every_s"])
    first, amax = saved.restore(rows)
    progress = Progress(f"calibrate, block {block + 1} of {job['num_blocks']}", len(stream.layers))
    for index in range(first, len(stream.layers)):
        amax |= measure_layer(stream, scheme, index, rows, job["linears"][index])
        progress.step(index + 1 - first)
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


def measure_layer(stream: LayerStream, scheme: Scheme, index: int, rows: Sequence[Row], linears: Sequence[str]) -> Amax:
    """Run every row through one layer under the scheme's observers."""
    with stream.open_layer(index) as layer:
        if not linears:
            for row in rows:
                stream.run_layer(layer, index, row)
            return {}
        with scheme.observe(layer, f"{stream.prefix}.{index}.", linears) as read:
            for row in rows:
                stream.run_layer(layer, index, row)
            return read()


class SavedStates:
    """Hidden states on disk, now and then, so that a killed calibration loses minutes and not hours."""

    def __init__(self, folder: Path, block: int, key: str, every_s: float) -> None:
        self.states = folder / f"block-{block:05d}.states.safetensors"
        self.note = folder / f"block-{block:05d}.states.json"
        self.key, self.every_s, self.last = key, every_s, time.monotonic()

    def restore(self, rows: Sequence[Row]) -> tuple[int, Amax]:
        """Put saved hidden states into the rows; returns the layer to go on with and what was measured before it."""
        from builder.files import sha256_file

        note = read_receipt(self.note)
        if note is None or note["key"] != self.key or not self.states.is_file():
            return 0, {}
        if sha256_file(self.states) != note["sha256"]:  # killed between the two writes
            return 0, {}
        from safetensors.torch import load_file

        for number, hidden in load_file(self.states).items():
            rows[int(number)].hidden = hidden.to(rows[int(number)].hidden.device)
        return note["layer"], read_amax(note["amax"])

    def keep(self, rows: Sequence[Row], layer: int, amax: Amax) -> None:
        """Save the rows as they go into `layer`, if the last time is long enough ago."""
        if time.monotonic() - self.last < self.every_s:
            return
        import hashlib

        from safetensors.torch import save

        content = save({str(number): row.hidden.cpu() for number, row in enumerate(rows)})
        with open_atomic(self.states) as file:
            file.write(content)
        digest = hashlib.sha256(content).hexdigest()
        write_receipt(self.note, {"key": self.key, "layer": layer, "sha256": digest, "amax": write_amax(amax)})
        self.last = time.monotonic()

    def drop(self) -> None:
        self.note.unlink(missing_ok=True)
        self.states.unlink(missing_ok=True)


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
    amax {linear: {kind: hex float}}.
    Returns {shard, num_units, num_skipped, bytes_in, bytes_out, num_quantizers, seconds, peak_bytes}.
    """
    started = time.monotonic()
    folder, key = Path(job["folder"]), job["key"]
    units = [UNIT.validate_python(unit) for unit in job["units"]]
    own = own_files([FILE.validate_python(file) for file in job["files"]], units)
    checkpoint, scheme, amax = open_base(job), bind_spec(job["scheme"]), read_amax(job["amax"])
    finished = {name for name in own if read_record(folder / name, key)}
    writers = {name: FileInPlace(folder, file, key) for name, file in own.items() if name not in finished}
    progress = Progress(f"quantize, shard {job['shard'] + 1} of {job['num_shards']}", len(units))
    bytes_in = bytes_out = skipped = 0
    try:
        for number, unit in enumerate(units, 1):
            pieces = [tensor for tensor in unit.tensors if not any(tensor.name in file.names for file in own.values())]
            piece = folder / UNITS / f"{unit.name}.safetensors"
            waiting = [name for name, writer in writers.items() if unit.name in writer.planned.units]
            missing = [name for name in waiting if unit.name not in writers[name].units]
            if missing or (pieces and not read_record(piece, key)):
                tensors = quantize_unit(checkpoint, scheme, unit, amax)
                bytes_in += sum(checkpoint.tensors[name].num_bytes for name in source_names(unit))
                bytes_out += unit.num_bytes
                if pieces:
                    write_unit(piece, pieces, tensors, key)
                for name in missing:
                    writers[name].add_unit(unit.name, tensors)
                del tensors
                checkpoint.unmap()
            else:
                skipped += 1
            for name in waiting:
                if writers[name].units == list(writers[name].planned.units):
                    writers.pop(name).finish()
            progress.step(number)
    finally:
        for writer in writers.values():
            writer.close()
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


def own_files(files: Sequence[PlannedFile], units: Sequence[Unit]) -> dict[str, PlannedFile]:
    """The files that these units alone make up, and that can be written in one pass."""
    mine = {unit.name for unit in units}
    return {file.name: file for file in files if file.in_place and mine.issuperset(file.units)}


def source_names(unit: Unit) -> list[str]:
    """The base tensors a unit is made from."""
    return [*unit.kept, *(f"{linear}.weight" for group in unit.groups for linear in group)]


def quantize_unit(checkpoint: Checkpoint, scheme: Scheme, unit: Unit, amax: Amax) -> dict[str, torch.Tensor]:
    """All tensors a unit yields, exactly as planned. Raises CalibrationError if a needed amax is not there."""
    tensors = {name: checkpoint.load(name) for name in unit.kept}
    for group in unit.groups:
        weights = {linear: checkpoint.load(f"{linear}.weight") for linear in group}
        inputs = {linear: amax[linear]["input"] for linear in group if "input" in amax.get(linear, {})}
        if scheme.measures_inputs and len(inputs) < len(group):
            lacking = next(linear for linear in group if linear not in inputs)
            raise CalibrationError(f"{lacking} was not measured", "the amax table", "delete the receipts and run again")
        tensors |= scheme.quantize_group(weights, inputs)
    check_planned(unit, tensors)
    return tensors


def check_planned(unit: Unit, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse a unit whose tensors differ from the plan in name, shape or size."""
    planned = {tensor.name: (tensor.shape, tensor.num_bytes) for tensor in unit.tensors}
    made = {name: (tuple(tensor.shape), tensor.nbytes) for name, tensor in tensors.items()}
    if planned != made:
        different = sorted(name for name in planned.keys() | made.keys() if planned.get(name) != made.get(name))[0]
        raise BaseError(
            f"{different} is {made.get(different)}, but {planned.get(different)} was planned",
            unit.name,
            "the base model's files changed under the build: run the same command again",
        )
