"""Fused CPU loops over weights: faster than the reference libraries, never different. `builder.kernels` calls them.

Shapes: O out, I in, P = I / 2 pairs of neighbouring columns, B = I / 16 blocks, G groups of columns that share a scale,
N any number of elements.

A loop is written once, over words: the bit patterns of `builder.floats`. Where dtypes differ, the type of a word (or of
a pair of them) chooses the code, when numba compiles the loop for it: see `specialize`.

The loops are flat, over a row's scratch arrays, because that is what LLVM vectorizes: the same arithmetic with an inner
loop over a block's columns, or with a divisor looked up per block, runs at a sixth of the speed. Threads are numba's
(`NUMBA_NUM_THREADS`, `numba.set_num_threads`); results do not depend on their number. Compiled code is kept in numba's
cache, beside this file or, where that is read-only, in the user's cache folder. It is compiled again when this file
changes, and not when another one does: whatever decides bits has to be here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from numba.extending import overload
from numpy.typing import NDArray

INT4_GROUP = 128
CHUNK_ELEMENTS = 1 << 20
SMALLEST_E4M3 = 2.0**-9
LARGEST_E4M3 = 448.0

Word = Any  # of uint16, which holds a bfloat16, int16 (float16) or uint32 (float32)
Pair = Any  # of uint32, int32 or uint64: an even column below and its odd neighbour above
Words = NDArray[Any]
Function = TypeVar("Function", bound=Callable[..., Any])
# Never fastmath: a reciprocal in place of a division, or a fused multiply-add, would change bits.
compiled: Callable[[Function], Function] = numba.njit(error_model="numpy", nogil=True, cache=True)
compiled_parallel: Callable[[Function], Function] = numba.njit(
    error_model="numpy", nogil=True, cache=True, parallel=True
)


def list_e4m3_values() -> NDArray[np.float32]:
    """The value of each float8_e4m3fn code: a sign, four bits of exponent, three of mantissa; all ones is NaN."""
    codes = np.arange(256)
    exponents, mantissas = codes >> 3 & 15, codes & 7
    values = np.where(exponents, (8 + mantissas) * 2.0 ** (exponents - 10), mantissas * SMALLEST_E4M3)
    values[codes & 0x7F == 0x7F] = np.nan
    return np.where(codes < 128, values, -values).astype(np.float32)


E4M3_VALUES = list_e4m3_values()


# ------------------------------------------------------------------------------------------------ words of each dtype


def specialize(function: Callable[..., Any], **codes: Callable[..., Any]) -> None:
    """Give a function of compiled loops its code for each type that its first argument, a word or pair, may have."""
    by_type = {getattr(numba.types, name): code for name, code in codes.items()}
    overload(function, strict=False)(lambda first, *others: by_type.get(first))


def value_of(word: Word) -> np.float32:
    """The number that a word holds."""
    raise NotImplementedError


def even_of(pair: Pair) -> np.float32:
    """The number in the lower half of a pair."""
    raise NotImplementedError


def odd_of(pair: Pair) -> np.float32:
    """The number in the upper half of a pair."""
    raise NotImplementedError


def larger_of(pair: Pair) -> Word:
    """The larger magnitude of a pair, as a word without its sign bit; such words are ordered as their values are."""
    raise NotImplementedError


def magnitude_of(word: Word) -> Word:
    """A word without its sign bit."""
    raise NotImplementedError


def rounded(word: Word, value: np.float32) -> np.float32:
    """A finite value rounded to the dtype of a word, to nearest, ties to even; it must not overflow there."""
    raise NotImplementedError


def word_of(word: Word, value: np.float32) -> Word:
    """The word, of the dtype of a word, that holds a value which is one of its numbers and not negative."""
    raise NotImplementedError


def epsilon_of(word: Word) -> np.float32:
    """torch.finfo(dtype).eps of a word's dtype."""
    raise NotImplementedError


@compiled
def as_float32(bits: int | np.unsignedinteger[Any]) -> np.float32:
    return np.uint32(bits).view(np.float32)


@compiled
def as_bits(value: np.float32) -> np.uint32:
    return np.float32(value).view(np.uint32)


@compiled
def float16_value(word: int | np.integer[Any]) -> np.float32:
    """Of the lowest 16 bits. A subnormal's are steps of 2**-24, and so are the float32 values from 0.5 to 1."""
    magnitude = np.uint32(word & 0x7FFF)
    normal = as_float32((magnitude << 13) + (112 << 23))  # an exponent's bias is 15 here and 127 there
    subnormal = as_float32(magnitude + 0x3F000000) - np.float32(0.5)
    bits = as_bits(normal if magnitude >= 0x400 else subnormal)
    return as_float32(bits | np.uint32(word & 0x8000) << 16)


@compiled
def round_to_float16(word: Word, value: np.float32) -> np.float32:
    """Beside 1.5 * 2**13 times the power of two below it, a value loses what float16 has no bits for."""
    power = max(as_bits(value) & np.uint32(0x7F800000), np.uint32(0x38800000))  # below 2**-14, steps are as wide
    beside = np.float32(1.5) * as_float32(power + (13 << 23))
    return np.float32(np.float32(value + beside) - beside)


@compiled
def float16_word(word: Word, value: np.float32) -> np.int16:
    if value < 2.0**-14:
        return np.int16(as_bits(value + np.float32(0.5)) - 0x3F000000)
    return np.int16((as_bits(value) - (112 << 23)) >> 13)


@compiled
def round_to_bfloat16(word: Word, value: np.float32) -> np.float32:
    bits = as_bits(value)
    return as_float32((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000)


specialize(
    value_of,
    uint16=lambda word: as_float32(np.uint32(word) << 16),
    int16=lambda word: float16_value(word),
    uint32=lambda word: as_float32(word),
)
specialize(
    even_of,
    uint32=lambda pair: as_float32(pair << 16),
    int32=lambda pair: float16_value(pair),
    uint64=lambda pair: as_float32(pair & 0xFFFFFFFF),
)
specialize(
    odd_of,
    uint32=lambda pair: as_float32(pair & 0xFFFF0000),
    int32=lambda pair: float16_value(pair >> 16),
    uint64=lambda pair: as_float32(pair >> 32),
)
specialize(
    larger_of,
    uint32=lambda pair: max(np.uint16(pair & 0x7FFF), np.uint16(pair >> 16 & 0x7FFF)),
    int32=lambda pair: max(np.int16(pair & 0x7FFF), np.int16(pair >> 16 & 0x7FFF)),
    uint64=lambda pair: max(np.uint32(pair & 0x7FFFFFFF), np.uint32(pair >> 32 & 0x7FFFFFFF)),
)
specialize(
    magnitude_of,
    uint16=lambda word: np.uint16(word & 0x7FFF),
    int16=lambda word: np.int16(word & 0x7FFF),
    uint32=lambda word: np.uint32(word & 0x7FFFFFFF),
)
specialize(
    rounded,
    uint16=lambda word, value: round_to_bfloat16(word, value),
    int16=lambda word, value: round_to_float16(word, value),
    uint32=lambda word, value: value,
)
specialize(
    word_of,
    uint16=lambda word, value: np.uint16(as_bits(value) >> 16),
    int16=lambda word, value: float16_word(word, value),
    uint32=lambda word, value: as_bits(value),
)
specialize(
    epsilon_of,
    uint16=lambda word: np.float32(2.0**-7),
    int16=lambda word: np.float32(2.0**-10),
    uint32=lambda word: np.float32(2.0**-23),
)


# ------------------------------------------------------------------------------------------------ codes


@compiled
def as_e4m3(value: np.float32) -> np.uint8:
    """float8_e4m3fn code of a float32 that is not negative: to nearest, ties to even; 448 for anything above."""
    if value < 2.0**-6:  # Codes below 8 are steps of 2**-9, and so are the float32 values from 2**14 to 2**15.
        return np.uint8(as_bits(value + np.float32(2.0**14)))
    if value <= LARGEST_E4M3:  # From 32 bits, drop 20 of mantissa; an exponent's bias is 127 there and 7 here.
        bits = as_bits(value)
        return np.uint8((bits + 0x7FFFF + (bits >> 20 & 1) - (120 << 23)) >> 20)
    return np.uint8(0x7E if value > LARGEST_E4M3 else 0x7F)


@compiled
def as_e2m1(value: np.float32) -> np.uint32:
    """4-bit code of a float32: the sign in bit 3, then 0 .5 1 1.5 2 3 4 6 to nearest, ties to even codes; 7 for NaN."""
    magnitude = abs(value)
    code = np.uint32(8 * (value < 0))
    code += np.uint32(not magnitude <= 0.25)
    code += np.uint32(not magnitude < 0.75)
    code += np.uint32(not magnitude <= 1.25)
    code += np.uint32(not magnitude < 1.75)
    code += np.uint32(not magnitude <= 2.5)
    code += np.uint32(not magnitude < 3.5)
    code += np.uint32(not magnitude <= 5.0)
    return np.uint32(code)


# ------------------------------------------------------------------------------------------------ magnitudes


@compiled_parallel
def max_magnitude_word(words_N: Words) -> Word:
    """The largest magnitude, as a word: infinity and then NaN stand above all numbers."""
    num_chunks = (words_N.size + CHUNK_ELEMENTS - 1) // CHUNK_ELEMENTS
    largest = np.zeros(num_chunks + 1, words_N.dtype)
    for chunk in numba.prange(num_chunks):
        largest[chunk] = max_word(words_N[chunk * CHUNK_ELEMENTS : (chunk + 1) * CHUNK_ELEMENTS])
    return max_word(largest)


@compiled
def max_word(words_N: Words) -> Word:
    largest = words_N.dtype.type(0)
    for index in range(words_N.size):
        largest = max(largest, magnitude_of(words_N[index]))
    return largest


# ------------------------------------------------------------------------------------------------ NVFP4


@compiled_parallel
def pack_nvfp4_rows(
    words_OI: Words,
    pairs_OP: Words,
    weight_scale_2: np.float32,
    smallest_scale: np.float32,
    packed_OP: NDArray[np.uint8],
    scales_OB: NDArray[np.uint8],
) -> None:
    """pairs_OP: the memory of words_OI, read two words at a time."""
    for row in numba.prange(pairs_OP.shape[0]):
        magnitudes_P = pair_magnitudes(words_OI, pairs_OP[row])
        pack_nvfp4_row(magnitudes_P, pairs_OP[row], weight_scale_2, smallest_scale, packed_OP[row], scales_OB[row])


@compiled
def pack_nvfp4_row(
    magnitudes_P: Words,
    pairs_P: Words,
    weight_scale_2: np.float32,
    smallest_scale: np.float32,
    packed_P: NDArray[np.uint8],
    scales_B: NDArray[np.uint8],
) -> None:
    magnitudes_B = halve(halve(halve(magnitudes_P)))
    six_scales = np.float32(6) * weight_scale_2
    for block in range(scales_B.size):
        scale = value_of(magnitudes_B[block]) / six_scales
        if scale == 0:
            scale = np.float32(1)
        elif scale < smallest_scale:
            scale = smallest_scale
        scales_B[block] = as_e4m3(scale)

    divisors_P = np.empty(pairs_P.size, np.float32)
    for block in range(scales_B.size):
        divisor = E4M3_VALUES[scales_B[block]] * weight_scale_2
        for pair in range(8 * block, 8 * block + 8):
            divisors_P[pair] = divisor

    for pair in range(pairs_P.size):
        even = as_e2m1(even_of(pairs_P[pair]) / divisors_P[pair])
        odd = as_e2m1(odd_of(pairs_P[pair]) / divisors_P[pair])
        packed_P[pair] = np.uint8(even | odd << 4)


@compiled
def pair_magnitudes(words_OI: Words, pairs_P: Words) -> Words:
    """The larger magnitude of each pair, as a word; words_OI tells the words' type."""
    magnitudes_P = np.empty(pairs_P.size, words_OI.dtype)
    for pair in range(pairs_P.size):
        magnitudes_P[pair] = larger_of(pairs_P[pair])
    return magnitudes_P


@compiled
def halve(words_N: Words) -> Words:
    """The larger of every two neighbours."""
    larger = np.empty(words_N.size // 2, words_N.dtype)
    for index in range(larger.size):
        larger[index] = max(words_N[2 * index], words_N[2 * index + 1])
    return larger


# ------------------------------------------------------------------------------------------------ FP8, INT8 and INT4


@compiled
def scale_of(magnitude: Word, largest: np.float32) -> np.float32:
    """A magnitude divided by the largest code, rounded to the word's dtype; its epsilon if that is 0."""
    scale = rounded(magnitude, np.float32(value_of(magnitude) / largest))
    if scale == 0:
        return epsilon_of(magnitude)
    return scale


@compiled
def divide(word: Word, scale: np.float32) -> np.float32:
    """A word's value over a scale, rounded to the word's dtype."""
    return rounded(word, np.float32(value_of(word) / scale))


@compiled_parallel
def quantize_fp8_rows(words_OI: Words, codes_OI: NDArray[np.uint8], scales_O: Words) -> None:
    for row in numba.prange(words_OI.shape[0]):
        magnitude = max_word(words_OI[row])
        scale = scale_of(magnitude, np.float32(448))
        scales_O[row, 0] = word_of(magnitude, scale)
        fp8_codes(words_OI[row], scale, codes_OI[row])


@compiled
def fp8_codes(words_I: Words, scale: np.float32, codes_I: NDArray[np.uint8]) -> None:
    for index in range(words_I.size):
        ratio = divide(words_I[index], scale)
        sign = np.uint8(0x80 * (ratio < 0))
        codes_I[index] = as_e4m3(min(abs(ratio), np.float32(LARGEST_E4M3))) | sign


@compiled_parallel
def quantize_int8_rows(words_OI: Words, codes_OI: NDArray[np.int8], scales_O: Words) -> None:
    for row in numba.prange(words_OI.shape[0]):
        magnitude = max_word(words_OI[row])
        scale = scale_of(magnitude, np.float32(127.5))
        scales_O[row, 0] = word_of(magnitude, scale)
        int8_codes(words_OI[row], scale, codes_OI[row])


@compiled
def int8_codes(words_I: Words, scale: np.float32, codes_I: NDArray[np.int8]) -> None:
    for index in range(words_I.size):
        ratio = divide(words_I[index], scale)
        codes_I[index] = np.int8(np.rint(min(max(ratio, np.float32(-128)), np.float32(127))))


@compiled_parallel
def pack_int4_rows(words_OI: Words, packed_OP: NDArray[np.uint8], scales_OG: Words) -> None:
    for row in numba.prange(words_OI.shape[0]):
        for group in range(scales_OG.shape[1]):
            words = words_OI[row, group * INT4_GROUP : (group + 1) * INT4_GROUP]
            magnitude = max_word(words)
            scale = scale_of(magnitude, np.float32(7.5))
            scales_OG[row, group] = word_of(magnitude, scale)
            packed = packed_OP[row, group * INT4_GROUP // 2 : (group + 1) * INT4_GROUP // 2]
            int4_codes(words, scale, packed)


@compiled
def int4_codes(words_I: Words, scale: np.float32, packed_P: NDArray[np.uint8]) -> None:
    codes_I = np.empty(words_I.size, np.uint8)
    for index in range(words_I.size):
        ratio = divide(words_I[index], scale)
        codes_I[index] = np.uint8(np.int32(np.rint(min(max(ratio, np.float32(-8)), np.float32(7)))) + 8)
    for pair in range(packed_P.size):
        packed_P[pair] = codes_I[2 * pair] | codes_I[2 * pair + 1] << 4
