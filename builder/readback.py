"""The bytes of base and artifact as numbers, read anew with numpy: headers, floats, and what rounded weights must be.

Shape legend: N outputs, K inputs of a linear; G groups of inputs that share a scale.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from builder.errors import BaseError, VerifyError
from builder.files import CHUNK_BYTES, read_json

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
REBUILD = "build the release again; if it comes back, this is a defect of the builder"
ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2}  # all others take one byte


@dataclass(frozen=True)
class Entry:
    """Where a tensor's bytes lie. begin: offset in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    num_bytes: int

    def read(self, begin: int, num_bytes: int) -> Bytes:
        return np.fromfile(self.file, np.uint8, num_bytes, offset=self.begin + begin)

    def chunks(self) -> Iterator[Bytes]:
        for begin in range(0, self.num_bytes, CHUNK_BYTES):
            yield self.read(begin, min(CHUNK_BYTES, self.num_bytes - begin))

    def rows(self, begin: int, end: int) -> Bytes:
        """Rows [begin, end) of a matrix, as bytes [end - begin, row bytes]."""
        row_bytes = self.num_bytes // self.shape[0]
        return self.read(begin * row_bytes, (end - begin) * row_bytes).reshape(end - begin, row_bytes)

    def scalar(self) -> np.float32:
        """The one value of an F32 tensor of shape [] or [1]."""
        return np.float32(self.read(0, 4).view(np.float32)[0])

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk.data)
        return digest.hexdigest()


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file. Raises VerifyError if header and size do not fit together."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if 8 + length <= size else b""
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = {
            name: Entry(path, tensor["dtype"], tuple(tensor["shape"]), 8 + length + begin, end - begin)
            for name, tensor in header.items()
            for begin, end in [tensor["data_offsets"]]
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise VerifyError("the header is not that of a safetensors file", path.name, REBUILD) from error
    position = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].num_bytes)):
        item_bytes = ITEM_BYTES.get(entry.dtype, 1)
        if entry.begin != position or entry.num_bytes != int(np.prod(entry.shape, dtype=np.int64)) * item_bytes:
            raise VerifyError(f"{name} begins at byte {entry.begin}, not {position}, or ends wrong", path.name, REBUILD)
        if entry.begin % item_bytes:
            raise VerifyError(f"{name} ({entry.dtype}) begins at odd byte {entry.begin}", path.name, REBUILD)
        position += entry.num_bytes
    if position != size:
        raise VerifyError(f"the file has {size} bytes, its header describes {position}", path.name, REBUILD)
    return entries


def read_base(base: Path) -> dict[str, Entry]:
    """Every tensor of the base model, through its index where it has one."""
    index = read_json(base / "model.safetensors.index.json")
    names = sorted(set(index["weight_map"].values())) if index else ["model.safetensors"]
    entries: dict[str, Entry] = {}
    for name in names:
        if not (base / name).is_file():
            raise BaseError(f"{name} is missing", str(base), "fetch the base model again")
        entries |= read_header(base / name)
    return entries


def float8_value(code: int) -> float:
    """The number an F8_E4M3 byte stands for (4 exponent bits, bias 7; 3 of mantissa; 0x7F and 0xFF are NaN)."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, code >> 3 & 0xF, code & 7
    if code & 0x7F == 0x7F:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


FLOAT8 = np.array([float8_value(code) for code in range(256)], np.float32)
FLOAT4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
NAN, ONE, LARGEST, SMALLEST_NORMAL = 0x7F, 0x38, 0x7E, 0x08  # F8_E4M3 bytes: NaN, 1.0, 448, 2^-6
USES_SIX = np.array([byte & 7 == 7 or byte >> 4 & 7 == 7 for byte in range(256)])


def read_floats(raw: Bytes, dtype: str) -> npt.NDArray[np.float32]:
    """Bytes of BF16, F16 or F32, last axis in bytes, as float32."""
    if dtype == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view({"F16": np.float16, "F32": np.float32}[dtype]).astype(np.float32)


def read_amax(entry: Entry) -> float:
    """The largest magnitude of a BF16, F16 or F32 tensor, in its own precision; inf or NaN if there is one.

    Without the sign bit, such floats are ordered as the integers that their bits spell.
    """
    kind: Any = np.uint32 if entry.dtype == "F32" else np.uint16
    magnitude = kind(np.iinfo(kind).max >> 1)
    largest = max((kind((chunk.view(kind) & magnitude).max()) for chunk in entry.chunks()), default=kind(0))
    return float(read_floats(np.array([largest], kind).view(np.uint8), entry.dtype)[0])


# ------------------------------------------------------------------------------------------------ rounded weights


@dataclass(frozen=True)
class Rounding:
    """How a scheme rounds weights to codes with a scale for each row, or group of columns, in the weights' dtype.

    codes, dtype, bits: what codes are called, stored as, and take. largest: what a scale is to the largest weight.
    full: the smallest magnitude that the largest weight's code can have, where its scale kept its digits.
    relative, steps: how far a weight may be from its code's value: of itself, and in scales.
    """

    codes: str
    dtype: str
    bits: int
    group: int | None
    largest: float
    full: float
    relative: float
    steps: float

    def contract(self, num_outputs: int, num_inputs: int, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """{suffix: (dtype, shape)} of what loaders read for a linear whose weight has a dtype."""
        packed = 32 // self.bits if self.dtype == "I32" else 1
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {
            self.codes: (self.dtype, (num_outputs, num_inputs // packed)),
            "weight_scale": (dtype, (num_outputs, num_inputs // self.group if self.group else 1)),
        }
        return tensors if packed == 1 else {**tensors, "weight_shape": ("I64", (2,))}

    def read_codes(self, raw: Bytes) -> Floats:
        """[N, K] from bytes of codes [N, ...]."""
        if self.dtype == "F8_E4M3":
            return FLOAT8[raw]
        if self.dtype == "I8":
            return raw.view(np.int8).astype(np.float32)
        return np.stack([raw & 0xF, raw >> 4], axis=-1).reshape(len(raw), -1).astype(np.float32) - 8

    def make_scales(self, weights_NK: Floats, dtype: str) -> Floats:
        """[N, G]: the largest magnitude of each group over `largest`, rounded; the dtype's epsilon where that is 0."""
        amax = np.abs(self.split(weights_NK)).max(axis=-1)
        scales = round_floats(amax / np.float32(self.largest), dtype)
        return np.where(scales == 0, EPSILON[dtype], scales)

    def split(self, values_NK: Floats) -> Floats:
        """[N, K] as [N, G, K / G]."""
        return values_NK.reshape(len(values_NK), -1, self.group or values_NK.shape[1])

    def count_idle(self, codes_NK: Floats, weights_NK: Floats, dtype: str) -> int:
        """How many groups never use a code of full size, though their largest weight is not too small for one."""
        largest = np.abs(self.split(weights_NK)).max(axis=-1)
        unused = np.abs(self.split(codes_NK)).max(axis=-1) < self.full
        return int((unused & (largest >= self.largest * SMALLEST[dtype])).sum())

    def count_far(self, codes_NK: Floats, scales_NG: Floats, weights_NK: Floats, dtype: str) -> int:
        """How many weights are farther from what is read back than rounding can bring them."""
        usable = scales_NG >= SMALLEST[dtype]
        scales = scales_NG[..., None]
        weights = self.split(weights_NK)
        with np.errstate(over="ignore", invalid="ignore"):
            off = np.abs(self.split(codes_NK) * scales - weights)
            near = off <= self.relative * np.abs(weights) + self.steps * scales
        return int((~near & usable[..., None]).sum())


# The dtypes of weights: the smallest number that keeps all its digits, and the distance from 1 to the next number.
SMALLEST = {"BF16": np.float32(2.0**-126), "F16": np.float32(2.0**-14), "F32": np.float32(2.0**-126)}
EPSILON = {"BF16": np.float32(2.0**-7), "F16": np.float32(2.0**-10), "F32": np.float32(2.0**-23)}
# Dividing by a scale that was rounded to bf16, and rounding the ratio to bf16, moves a ratio by 2^-8 of itself at most;
# in the other dtypes by less.
ROUNDINGS = {
    "fp8_dynamic": Rounding(
        "weight", "F8_E4M3", 8, None, largest=448.0, full=448.0, relative=2**-4 + 2**-8, steps=2**-9
    ),
    "w8a8": Rounding("weight", "I8", 8, None, largest=127.5, full=127.0, relative=0.0, steps=0.8),
    "w4a16": Rounding("weight_packed", "I32", 4, 128, largest=7.5, full=7.0, relative=0.0, steps=0.55),
}


def round_floats(values: Floats, dtype: str) -> Floats:
    """To the nearest number that a dtype has, ties to even; infinities stay, NaN stays one."""
    if dtype != "BF16":
        with np.errstate(over="ignore"):
            return values.astype({"F16": np.float16, "F32": np.float32}[dtype]).astype(np.float32)
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) << 16
    return np.where(np.isnan(values), values, rounded.view(np.float32))
