"""The dtypes that weights may have, and their bit patterns as numpy and compiled loops read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from builder.errors import LayoutError

if TYPE_CHECKING:
    import torch

Words = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Float:
    """One of them. name: torch's; stored: the safetensors format's; epsilon: torch.finfo's.

    array: numpy's for its values; for bfloat16, which numpy lacks, that of its bit patterns.
    word, pair: those in which compiled loops read one number and two neighbours, each for this dtype alone.
    """

    name: str
    stored: str
    epsilon: float
    array: np.dtype[Any]
    word: np.dtype[Any]
    pair: np.dtype[Any]

    def read(self, word: NDArray[Any]) -> float:
        """The number that one word holds."""
        if self.array == self.word:
            return float((word.astype(np.uint32) << 16).view(np.float32))
        return float(word.view(self.array))

    def round(self, values: NDArray[np.float32]) -> NDArray[Any]:
        """Finite values in this dtype, to nearest, ties to even; what is beyond its largest number is infinite."""
        if self.array != self.word:
            with np.errstate(over="ignore"):
                return np.asarray(values, self.array)
        bits = values.view(np.uint32)
        return np.asarray((bits + 0x7FFF + (bits >> 16 & 1)) >> 16, self.array)


def describe(name: str, stored: str, epsilon: float, array: str, word: str, pair: str) -> Float:
    numpy_dtypes = {"array": np.dtype(array), "word": np.dtype(word), "pair": np.dtype(pair)}
    return Float(name=name, stored=stored, epsilon=epsilon, **numpy_dtypes)


FLOATS = {
    kind.stored: kind
    for kind in (
        describe("bfloat16", "BF16", 2.0**-7, "uint16", "uint16", "uint32"),
        describe("float16", "F16", 2.0**-10, "float16", "int16", "int32"),
        describe("float32", "F32", 2.0**-23, "float32", "uint32", "uint64"),
    )
}
STORED = {kind.name: kind.stored for kind in FLOATS.values()}
NAMES = "bfloat16, float16 or float32"


def find_float(weight: torch.Tensor | NDArray[Any]) -> Float:
    """The dtype of a weight. Raises LayoutError unless it is one of those above."""
    given = str(weight.dtype).removeprefix("torch.")
    for kind in FLOATS.values():
        if given == (kind.array.name if isinstance(weight, np.ndarray) else kind.name):
            return kind
    raise LayoutError(
        f"a weight of dtype {given}, where only {NAMES} can be read",
        fix="use a base model in one of these, or add this linear to the scheme's ignore list",
    )


def read_words(weight: torch.Tensor | NDArray[Any]) -> Words:
    """A weight's bit patterns: the same memory if it is contiguous, a copy if not.

    Raises LayoutError as `find_float` does.
    """
    kind = find_float(weight)
    if isinstance(weight, np.ndarray):
        return np.ascontiguousarray(weight).view(kind.word)
    import torch

    integers = torch.int32 if kind.word.itemsize == 4 else torch.int16
    words: Words = weight.detach().contiguous().view(integers).numpy().view(kind.word)
    return words
