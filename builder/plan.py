"""From manifest, config and headers to the plan: every shard, every output tensor, every file, before any work."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from builder.base import DTYPE_BYTES, Stored, Tensor
from builder.errors import BuildError, ManifestError, raise_all
from builder.families import Architecture, Layer
from builder.floats import FLOATS, NAMES
from builder.manifest import Manifest
from builder.schemes import Mixed, Scheme, divide_linears, matches
from builder.schemes.cache import plan_scales

HEADER_ALIGNMENT = 8
LIBRARY_DTYPES = tuple(DTYPE_BYTES)  # in the order of the library's own list
SINGLE_FILE = 1.05  # the published pipeline's factor: so much above the limit, a single file is not yet split
# What a worker takes for itself, measured: to calibrate, with torch and transformers; to quantize, with numba alone.
CALIBRATE_BYTES, QUANTIZE_BYTES = 500_000_000, 210_000_000
EXACT_BYTES = 300_000_000  # and for exact arithmetic: compiled loops, and what products and attention work in


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What is quantized and journalled as one: a decoder layer, or the edge before or after the layers.

    groups: linears to quantize together; kept: base tensors that are copied as they are.
    """

    name: str
    layer: int | None
    groups: tuple[tuple[str, ...], ...]
    kept: tuple[str, ...]
    tensors: tuple[Tensor, ...]  # all it yields, in writing order
    attention: str | None = None  # whose keys and values get scales

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)


@dataclass(frozen=True, kw_only=True)
class PlannedFile:
    """One safetensors file: its tensors in the order of their bytes."""

    name: str
    units: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    in_place: bool  # whether units, written one after another, yield the file: large tensors first, scalars last
    header_metadata: bool = True

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(tensor.name for tensor in self.tensors)

    @cached_property
    def header(self) -> bytes:
        """Length prefix and JSON, padded with spaces so that the data starts at a multiple of 8 bytes."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}} if self.header_metadata else {}
        offset = 0
        for tensor in self.tensors:
            end = offset + tensor.num_bytes
            entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % HEADER_ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    @cached_property
    def num_bytes(self) -> int:
        return len(self.header) + sum(tensor.num_bytes for tensor in self.tensors)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A contiguous range of decoder layers, [first_layer, last_layer), handled by one worker, and its edges."""

    index: int
    first_layer: int
    last_layer: int
    units: tuple[str, ...]
    num_quantizers: int  # linears: each has one weight quantizer, and one input quantizer where inputs are measured


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that will be written, known beforehand."""

    architecture: Architecture
    scheme: str
    layout: str
    measures_inputs: bool
    measures_cache: bool
    ignore: tuple[str, ...]  # every linear that stays as it was
    units: tuple[Unit, ...]
    files: tuple[PlannedFile, ...]
    shards: tuple[Shard, ...]
    base_num_bytes: int
    calibrate_memory: int  # bytes a worker needs at its peak
    quantize_memory: int
    unused: tuple[str, ...]  # base tensors that the model does not have

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return {tensor.name: tensor for unit in self.units for tensor in unit.tensors}

    @cached_property
    def weight_map(self) -> dict[str, str]:
        return {tensor.name: file.name for file in self.files for tensor in file.tensors}

    @property
    def quantized(self) -> tuple[str, ...]:
        return tuple(linear for unit in self.units for group in unit.groups for linear in group)

    @property
    def measures(self) -> bool:
        """Whether rows have to be run."""
        return self.measures_inputs or self.measures_cache

    @property
    def bits_per_parameter(self) -> float:
        return 8 * sum(tensor.num_bytes for tensor in self.tensors.values()) / self.architecture.num_parameters

    def find_unit(self, name: str) -> Unit:
        return next(unit for unit in self.units if unit.name == name)

    def facts(self) -> dict[str, Any]:
        """What the plan says about bytes, JSON-able: equal facts, equal files. It knows nothing of shards."""
        return {
            "architecture": self.architecture.name,
            "num_parameters": self.architecture.num_parameters,
            "num_layers": len(self.architecture.layers),
            "numbers": dict(self.architecture.facts),
            "scheme": self.scheme,
            "layout": self.layout,
            "ignore": list(self.ignore),
            "num_tensors": len(self.tensors),
            "num_bytes": self.num_bytes,
            "base_num_bytes": self.base_num_bytes,
            "bits_per_parameter": round(self.bits_per_parameter, 4),
            "quantized": list(self.quantized),
            "fused": [list(group) for unit in self.units for group in unit.groups],
            "files": [
                {
                    "name": file.name,
                    "num_bytes": file.num_bytes,
                    "in_place": file.in_place,
                    "header_metadata": file.header_metadata,
                    "units": list(file.units),
                    "tensors": [
                        {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape)}
                        for tensor in file.tensors
                    ],
                }
                for file in self.files
            ],
            "unused": list(self.unused),
        }

    def describe_shards(self) -> list[dict[str, Any]]:
        """The shards as JSON-able rows."""
        return [asdict(shard) for shard in self.shards]


def plan_release(
    manifest: Manifest, scheme: Scheme, architecture: Architecture, headers: Mapping[str, Stored] | None
) -> Plan:
    """Lay out a whole release. Pure: reads nothing but its arguments.

    headers: the base's tensors where they can be had; then they must agree with the architecture, and each tensor
    has the dtype that it is stored in, which need not be the config's.
    Raises Problems, or one of them, for whatever does not hold.
    """
    unused: tuple[str, ...] = ()
    if headers is not None:
        unused = compare_headers(architecture, headers)
        architecture = take_dtypes(architecture, headers)
    ignore = resolve_ignore(manifest, architecture)
    if isinstance(scheme, Mixed):
        check_parts(manifest, scheme, architecture, ignore)
    if manifest.release.kv_cache:
        check_attentions(manifest, architecture)
    units = plan_units(architecture, scheme, ignore, caches=manifest.release.kv_cache is not None)
    shards = plan_shards(manifest, architecture, units)
    files = plan_files(
        units,
        manifest.release.files.max_bytes,
        manifest.release.files.packing,
        header_metadata=manifest.release.compatibility.header_metadata,
    )
    rows, longest = plan_rows(manifest) if scheme.measures_inputs or manifest.release.kv_cache else (0, 0)
    exact = manifest.release.arithmetic == "exact"
    block = math.ceil(rows / len(shards))
    calibrate_memory, quantize_memory = estimate_memory(architecture, units, block, longest, exact=exact)
    return Plan(
        architecture=architecture,
        scheme=scheme.name,
        layout=scheme.layout,
        measures_inputs=scheme.measures_inputs,
        measures_cache=manifest.release.kv_cache is not None,
        ignore=tuple(sorted(ignore | set(architecture.other_linears))),
        units=units,
        files=files,
        shards=shards,
        base_num_bytes=sum(tensor.num_bytes for tensor in architecture.tensors),
        calibrate_memory=calibrate_memory,
        quantize_memory=quantize_memory,
        unused=unused,
    )


def compare_headers(architecture: Architecture, headers: Mapping[str, Stored]) -> tuple[str, ...]:
    """Check the base's tensors against its config; returns the names of those the model does not have."""
    problems = []
    wanted = {tensor.name: tensor for tensor in architecture.tensors}
    for name, tensor in wanted.items():
        found = headers.get(name)
        if found is None:
            problems.append(f"{name} is missing from the base model")
        elif found.shape != tensor.shape:
            problems.append(f"{name} is {list(found.shape)}, but config.json makes it {list(tensor.shape)}")
        elif found.dtype not in FLOATS:
            problems.append(f"{name} is {found.dtype}, not {NAMES}")
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise BuildError(
            problems[0] + more, "the base model's headers", "fetch the base again, or mend its config.json"
        )
    return tuple(sorted(headers.keys() - wanted.keys()))


def take_dtypes(architecture: Architecture, headers: Mapping[str, Stored]) -> Architecture:
    """An architecture whose tensors have the dtypes that they are stored in."""

    def take(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
        return tuple(replace(tensor, dtype=headers[tensor.name].dtype) for tensor in tensors)

    layers = tuple(replace(layer, tensors=take(layer.tensors)) for layer in architecture.layers)
    first, last = take(architecture.first_edge), take(architecture.last_edge)
    return replace(architecture, layers=layers, first_edge=first, last_edge=last)


def resolve_ignore(manifest: Manifest, architecture: Architecture) -> set[str]:
    """The linears that `scheme.ignore` names: whole names, or patterns after `re:` (matched from the start)."""
    inside = [linear for layer in architecture.layers for linear in layer.linears]
    linears = [*inside, *architecture.other_linears]
    ignored: set[str] = set()
    problems: list[BuildError] = []
    patterns: dict[str, str] = {}  # the lists of all schemes count together, and a default is in each
    for index, spec in enumerate(manifest.release.scheme):
        for position, pattern in enumerate(spec.ignore):
            patterns.setdefault(pattern, manifest.where("scheme", index, "ignore", position))
    for pattern, where in patterns.items():
        try:
            matched = match_names(pattern, linears)
        except re.error as error:
            problems.append(ManifestError(f"{pattern} is not a regular expression: {error}", where, "mend it"))
            continue
        if not matched:
            example = inside[-1]
            problems.append(
                ManifestError(
                    f"{pattern} matches no linear of {architecture.name}",
                    where,
                    f"give a whole name, such as {example}, or a pattern, such as re:.*{example.rpartition('.')[2]}",
                )
            )
        ignored |= matched
    unignored = sorted(set(architecture.other_linears) - ignored)
    if unignored and not architecture.tied:
        problems.append(
            ManifestError(
                f"{unignored[0]} is outside the decoder layers and would be quantized",
                manifest.where("scheme", 0, "ignore"),
                f"add {unignored[0]} to scheme.ignore",
            )
        )
    for group in (group for layer in architecture.layers for group in layer.groups):
        left = sorted(set(group) & ignored)
        if left and len(left) < len(group):
            problems.append(
                ManifestError(
                    f"{left[0]} is ignored, but engines run it as one with {', '.join(sorted(set(group) - ignored))}",
                    manifest.where("scheme", 0, "ignore"),
                    "ignore all of them or none",
                )
            )
            break
    if ignored.issuperset(inside):
        where = manifest.where("scheme", 0, "ignore")
        problems.append(ManifestError("every linear is ignored: nothing is left to quantize", where, "ignore fewer"))
    raise_all(problems)
    return ignored


def check_parts(manifest: Manifest, scheme: Mixed, architecture: Architecture, ignore: set[str]) -> None:
    """Refuse a scheme that is for no linear, and schemes that part what engines run as one."""
    groups = [group for layer in architecture.layers for group in layer.groups if not ignore.issuperset(group)]
    problems: list[BuildError] = []
    divided = divide_linears(scheme, [linear for group in groups for linear in group])
    for index, ((pattern, _), own) in enumerate(zip(scheme.parts, divided, strict=True)):
        if not own:
            where = manifest.where("scheme", index, "match")
            what = f"{pattern} matches no linear that is left" if pattern else "no linear is left for the last scheme"
            fix = "remove it, or match more: whole names of linears, or a pattern such as re:.*down_proj"
            problems.append(ManifestError(what, where, fix))
    for group in groups:
        parts = {linear: scheme.find_part(linear) for linear in group}
        first, other = group[0], next((linear for linear in group if parts[linear] != parts[group[0]]), None)
        if other is not None:
            where = manifest.where("scheme", min(parts.values()), "match")
            what = f"{first} and {other} get different schemes, but engines run them as one"
            problems.append(ManifestError(what, where, f"match all or none of {', '.join(group)}"))
            break
    raise_all(problems)


def check_attentions(manifest: Manifest, architecture: Architecture) -> None:
    """Refuse layers whose keys and values cannot be observed as they go into a cache: latents do, or nothing."""
    for layer in architecture.layers:
        if layer.attention is None:
            raise ManifestError(
                f"{layer.name} of {architecture.name} puts no keys and values into a KV cache as they are",
                manifest.where("kv_cache"),
                "remove kv_cache",
            )


def match_names(pattern: str, names: Iterable[str]) -> set[str]:
    """The names a pattern of compressed-tensors means: equal, or matched by what follows `re:`."""
    return {name for name in names if matches(pattern, name)}


def plan_units(
    architecture: Architecture, scheme: Scheme, ignore: set[str], *, caches: bool = False
) -> tuple[Unit, ...]:
    """The edges and layers, in order, with what each yields."""
    units = [plan_edge("first-edge", architecture.first_edge)]
    cache_dtype = architecture.dtype if caches else None
    units += [plan_layer(layer, scheme, ignore, cache_dtype) for layer in architecture.layers]
    units.append(plan_edge("last-edge", architecture.last_edge))
    return tuple(unit for unit in units if unit.tensors)


def plan_edge(name: str, tensors: tuple[Tensor, ...]) -> Unit:
    """Tensors outside the layers are copied."""
    return Unit(name=name, layer=None, groups=(), kept=tuple(tensor.name for tensor in tensors), tensors=tensors)


def plan_layer(layer: Layer, scheme: Scheme, ignore: set[str], cache_dtype: str | None) -> Unit:
    """A layer's linears are replaced by what the scheme makes of them, in their own places.

    cache_dtype: what a model computes in whose layers get scales of their KV caches, which come last; None for no such.
    """
    groups = tuple(group for group in layer.groups if group[0] not in ignore)
    quantized = {f"{linear}.weight": linear for group in groups for linear in group}
    tensors: list[Tensor] = []
    kept: list[str] = []
    for tensor in layer.tensors:
        if tensor.name in quantized:
            tensors += scheme.plan_linear(quantized[tensor.name], tensor)
        else:
            tensors.append(tensor)
            kept.append(tensor.name)
    attention = layer.attention if cache_dtype else None
    if attention and cache_dtype:
        tensors += plan_scales(attention, scheme.layout, cache_dtype)
    return Unit(
        name=f"layer-{layer.index:05d}",
        layer=layer.index,
        groups=groups,
        kept=tuple(kept),
        tensors=tuple(tensors),
        attention=attention,
    )


def plan_shards(manifest: Manifest, architecture: Architecture, units: Sequence[Unit]) -> tuple[Shard, ...]:
    """Split the layers as the manifest says: evenly into a count, the first ones larger, or by the layers of each."""
    num_layers, shards = len(architecture.layers), manifest.release.shards
    where = manifest.where("shards")
    if isinstance(shards, int):
        if shards > num_layers:
            raise ManifestError(
                f"{shards} shards, but the model has {num_layers} layers", where, f"use a count from 1 to {num_layers}"
            )
        sizes = [num_layers // shards + (index < num_layers % shards) for index in range(shards)]
    else:
        sizes = list(shards)
        if sum(sizes) != num_layers:
            raise ManifestError(
                f"shards of {sizes} layers make {sum(sizes)}, but the model has {num_layers}",
                where,
                f"give numbers that add up to {num_layers}, or a count",
            )
    planned = []
    first = 0
    for index, size in enumerate(sizes):
        last = first + size
        own = [
            unit
            for unit in units
            if (unit.layer is not None and first <= unit.layer < last)
            or (unit.name == "first-edge" and index == 0)
            or (unit.name == "last-edge" and index == len(sizes) - 1)
        ]
        planned.append(
            Shard(
                index=index,
                first_layer=first,
                last_layer=last,
                units=tuple(unit.name for unit in own),
                num_quantizers=sum(len(group) for unit in own for group in unit.groups),
            )
        )
        first = last
    return tuple(planned)


def plan_files(
    units: Sequence[Unit], max_bytes: int, packing: str, *, header_metadata: bool = True
) -> tuple[PlannedFile, ...]:
    """Spread all tensors over files.

    max_bytes: of a file's tensors, its header not counted; `sequential` goes beyond only for a single tensor that is
    larger, `balanced` wherever tensors do not divide evenly, and by 5 % for a single file.
    """
    bins = pack_balanced(units, max_bytes) if packing == "balanced" else pack_sequential(units, max_bytes)
    owner = {tensor.name: unit.name for unit in units for tensor in unit.tensors}
    files = []
    for index, tensors in enumerate(bins):
        name = "model.safetensors" if len(bins) == 1 else f"model-{index + 1:05d}-of-{len(bins):05d}.safetensors"
        ordered, in_place = sorted(tensors, key=library_order), False
        if packing == "sequential":
            written = [*(t for t in tensors if not is_scalar(t)), *(t for t in tensors if is_scalar(t))]
            if is_aligned(written):
                ordered, in_place = written, True
        own = tuple(dict.fromkeys(owner[tensor.name] for tensor in tensors))
        files.append(
            PlannedFile(
                name=name, units=own, tensors=tuple(ordered), in_place=in_place, header_metadata=header_metadata
            )
        )
    return tuple(files)


def pack_sequential(units: Sequence[Unit], max_bytes: int) -> list[list[Tensor]]:
    """Whole units one after another; a unit larger than a file is spread over files tensor by tensor."""
    bins: list[list[Tensor]] = [[]]
    filled = 0
    for unit in units:
        pieces = [list(unit.tensors)] if unit.num_bytes <= max_bytes else [[tensor] for tensor in unit.tensors]
        for piece in pieces:
            num_bytes = sum(tensor.num_bytes for tensor in piece)
            if bins[-1] and filled + num_bytes > max_bytes:
                bins.append([])
                filled = 0
            bins[-1] += piece
            filled += num_bytes
    return bins


def pack_balanced(units: Sequence[Unit], max_bytes: int) -> list[list[Tensor]]:
    """As few files as the total needs; tensors in the order of their names, each into the emptiest file."""
    tensors = sorted((tensor for unit in units for tensor in unit.tensors), key=lambda tensor: tensor.name)
    total = sum(tensor.num_bytes for tensor in tensors)
    bins: list[list[Tensor]] = [[] for _ in range(1 if total <= max_bytes * SINGLE_FILE else -(-total // max_bytes))]
    filled = [0] * len(bins)
    for tensor in tensors:
        emptiest = filled.index(min(filled))
        bins[emptiest].append(tensor)
        filled[emptiest] += tensor.num_bytes
    return [tensors for tensors in bins if tensors]


def is_scalar(tensor: Tensor) -> bool:
    """Whether a tensor is one of the global scales, which a file written in one pass holds last."""
    return tensor.num_elements == 1


def library_order(tensor: Tensor) -> tuple[int, str]:
    """The order in which the safetensors library lays tensors out: by dtype, the widest first, then by name."""
    return LIBRARY_DTYPES.index(tensor.dtype), tensor.name


def is_aligned(tensors: Sequence[Tensor]) -> bool:
    """Whether every tensor, laid one behind the other, starts at a multiple of its dtype's width."""
    offset = 0
    for tensor in tensors:
        if offset % DTYPE_BYTES[tensor.dtype]:
            return False
        offset += tensor.num_bytes
    return True


def plan_rows(manifest: Manifest) -> tuple[int, int]:
    """The number of calibration rows and the most tokens one may have."""
    calibration = manifest.release.calibration
    if calibration is None and manifest.release.kv_cache:
        raise ManifestError(
            f"no calibration data, but kv_cache: {manifest.release.kv_cache} needs some",
            manifest.where("kv_cache"),
            "add `calibration:` with a dataset or a path, or remove kv_cache",
        )
    if calibration is None:
        raise ManifestError(
            "no calibration data, but calibrated input scales need some",
            manifest.where("scheme"),
            "add `calibration:` with a dataset or a path, or set `scheme.input_scale: unit`",
        )
    return calibration.samples, calibration.tokens[1]


def estimate_memory(
    architecture: Architecture, units: Sequence[Unit], rows: int, longest: int, *, exact: bool = True
) -> tuple[int, int]:
    """Peak bytes of a worker while calibrating and while quantizing.

    Calibrating holds, in the model's dtype, one layer, a second copy of its largest weight for a matrix product, and
    its rows' hidden states (twice while they are saved), and a row's widest activations in float32; exact arithmetic
    also the layer's weights as integers of 16 bits, and four such activations more. Quantizing holds what one group of
    linears yields, its largest weight, and as much again on the way. Measured peaks stay below this, by 20 % at most.
    """
    hidden = int(architecture.facts.get("hidden_size", 0))
    widest = max(int(architecture.facts.get("intermediate_size", hidden)), hidden)
    layer = max(sum(tensor.num_elements for tensor in layer.tensors) for layer in architecture.layers)
    second = max(tensor.num_elements for layer in architecture.layers for tensor in layer.tensors)
    held = DTYPE_BYTES[architecture.dtype] * (layer + second + 2 * rows * longest * hidden)
    calibrate = CALIBRATE_BYTES + held + 6 * longest * widest * 4
    largest = max(tensor.num_bytes for layer in architecture.layers for tensor in layer.tensors)
    calibrate += (EXACT_BYTES + 2 * layer + 4 * longest * widest * 4) if exact else 0
    quantize = QUANTIZE_BYTES + 2 * largest + max(largest_group(unit) for unit in units if unit.groups)
    return calibrate if rows else 0, quantize


def largest_group(unit: Unit) -> int:
    """Bytes of what takes the place of a unit's largest group of linears."""
    made: dict[str, int] = {}
    for tensor in unit.tensors:
        linear = tensor.name.rpartition(".")[0]
        made[linear] = made.get(linear, 0) + tensor.num_bytes
    return max(sum(made[linear] for linear in group) for group in unit.groups)
