"""Fused CPU loops over bf16 weights: faster than the reference libraries, never different.

Shapes: O out, I in, P = I / 2 pairs of neighbouring columns, B = I / 16 blocks, N any number of elements.

The loops are flat, over a row's scratch arrays, because that is what LLVM vectorizes: the same arithmetic with an inner
loop over a block's columns, or with a divisor looked up per block, runs at a sixth of the speed. Threads are numba's
(`NUMBA_NUM_THREADS`, `numba.set_num_threads`); results do not depend on their number. Compiled code is kept in numba's
cache, beside this file or, where that is read-only, in the user's cache folder.

A weight is a torch tensor in bf16, or a numpy array of its bit patterns in uint16, which spares a process the second
that torch takes to load. Results are of the same kind: tensors, or arrays of the bits that stand in their place.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

from builder.errors import LayoutError

if TYPE_CHECKING:
    import torch

BLOCK = 16
INT4_GROUP = 128
SMALLEST_SCALE = 0x3C00  # 2**-7, bf16's epsilon, as a bf16 word: the scale of what is all zero
CHUNK_ELEMENTS = 1 << 20
SMALLEST_E4M3 = 2.0**-9
LARGEST_E4M3 = 448.0

Words = NDArray[np.uint16]
Weight = TypeVar("Weight", "torch.Tensor", Words)
Function = TypeVar("Function", bound=Callable[..., Any])
# Never fastmath: a reciprocal in place of a division, or a fused multiply-add, would change bits.
compiled: Callable[[Function], Function] = numba.njit(error_model="numpy", nogil=True, cache=True)
compiled_parallel: Callable[[Function], Function] = numba.njit(
    error_model="numpy", nogil=True, cache=True, parallel=True
)
# Where no OpenMP library is found, numba's own thread pool ends the process when two threads use it at once.
one_kernel_at_a_time = threading.Lock()


def list_e4m3_values() -> NDArray[np.float32]:
    """The value of each float8_e4m3fn code: a sign, four bits of exponent, three of mantissa; all ones is NaN."""
    codes = np.arange(256)
    exponents, mantissas = codes >> 3 & 15, codes & 7
    values = np.where(exponents, (8 + mantissas) * 2.0 ** (exponents - 10), mantissas * SMALLEST_E4M3)
    values[codes & 0x7F == 0x7F] = np.nan
    return np.where(codes < 128, values, -values).astype(np.float32)


E4M3_VALUES = list_e4m3_values()


def max_magnitude(weight_OI: torch.Tensor | Words) -> float:
    """max |w| of a bf16 tensor of any shape, exact; 0.0 if it is empty.

    NaN if any element is NaN, else infinity if any is infinite. The tensor is read once and no copy of it is made.
    Equals `weight_OI.abs().amax()`. Raises LayoutError if the tensor is not bf16.
    """
    words_N = bf16_words(weight_OI).reshape(-1)
    with one_kernel_at_a_time:
        word = max_magnitude_word(words_N)
    # Without their sign bit, bf16 words are ordered as their values are, infinity and then NaN on top.
    return float(np.uint32(int(word) << 16).view(np.float32))


def pack_nvfp4(weight_OI: Weight, weight_scale_2: float, *, block_scale_floor: bool = True) -> tuple[Weight, Weight]:
    """Quantize finite bf16 weights to NVFP4, as nvidia-modelopt's NVFP4QTensor does.

    weight_OI: bf16 [out, in] on the CPU; `in` a multiple of 16; not modified.
    weight_scale_2: the global scale, a positive float32 value: max |w| / 2688 over the weights that share it.
    block_scale_floor: keep block scales at 2**-9 or above, as modelopt 0.47 does. False lets them underflow, as 0.43
        does: a tiny block's scale becomes 0, its weights divided by it infinite or NaN, and their codes -6 for a
        negative weight and +6 for any other; all of them read back as zero.
    Returns the codes, uint8 [out, in / 2], the even column in the low nibble, and the block scales, float8_e4m3fn
    [out, in / 16]. NaN or infinite weights give unspecified codes: refuse them before.
    Raises LayoutError if the weight is not a bf16 matrix or `in` is not a multiple of 16.

    Formulas, all in float32: `get_weights_scaling_factor` and `quantize` of modelopt/torch/quantization/qtensor/
    nvfp4_tensor.py, versions 0.47.0 and 0.43.0:
        scale = max |w| of the block / (6 * weight_scale_2), or 1 if that is 0; 0.47 clamps it to [2**-9, 448]
        code = fp4(w / (float32(fp8(scale)) * weight_scale_2)); both casts go to nearest, ties to even
    A scale above 448, out of reach while weight_scale_2 covers the block, becomes 448 here, as in both versions under
    torch 2.12 and later; an earlier torch gave 0.43 a NaN above 464 (https://github.com/pytorch/pytorch/pull/178817).
    """
    check_matrix(weight_OI, BLOCK)
    num_rows, num_columns = weight_OI.shape
    # Read in pairs, a little-endian 32-bit word holds an even column below and its odd neighbour above.
    pairs_OP = bf16_words(weight_OI).view(np.uint32)
    packed_OP = np.empty((num_rows, num_columns // 2), np.uint8)  # numpy's, for it asks for huge pages
    scales_OB = np.empty((num_rows, num_columns // BLOCK), np.uint8)
    smallest_scale = np.float32(SMALLEST_E4M3 if block_scale_floor else 0)
    with one_kernel_at_a_time:
        pack_nvfp4_rows(pairs_OP, np.float32(weight_scale_2), smallest_scale, packed_OP, scales_OB)
    return as_given(weight_OI, packed_OP, "uint8"), as_given(weight_OI, scales_OB, "float8_e4m3fn")


def quantize_fp8(weight_OI: Weight) -> tuple[Weight, Weight]:
    """Quantize finite bf16 weights to FP8 with a scale for each output channel, as llm-compressor's FP8_DYNAMIC does.

    Returns codes, float8_e4m3fn [out, in], and scales, bf16 [out, 1].
    Formulas, in bf16, that is in float32 and then rounded (`calculate_qparams` and `quantize` of compressed-tensors):
        scale = max |w| of the row / 448, or 2**-7 if that is 0; code = fp8(clamp(w / scale, -448, 448)), to nearest
    A weight of -0.0 becomes +0.0, for a zero point of 0 is added there.
    """
    return quantize_rows(weight_OI, quantize_fp8_rows, np.uint8, "float8_e4m3fn")


def quantize_int8(weight_OI: Weight) -> tuple[Weight, Weight]:
    """Quantize finite bf16 weights to INT8 with a scale for each output channel, as llm-compressor's W8A8 does.

    Returns codes, int8 [out, in], and scales, bf16 [out, 1]. Formulas as in `quantize_fp8`:
        scale = max |w| of the row / 127.5, or 2**-7 if that is 0; code = round(clamp(w / scale, -128, 127)), to even
    """
    return quantize_rows(weight_OI, quantize_int8_rows, np.int8, "int8")


def quantize_rows(
    weight_OI: Weight, kernel: Callable[..., None], dtype: type[np.generic], given_dtype: str
) -> tuple[Weight, Weight]:
    check_matrix(weight_OI, 1)
    codes_OI = np.empty(weight_OI.shape, dtype)
    scales_O = np.empty((weight_OI.shape[0], 1), np.uint16)
    with one_kernel_at_a_time:
        kernel(bf16_words(weight_OI), codes_OI, scales_O)
    return as_given(weight_OI, codes_OI, given_dtype), as_given(weight_OI, scales_O, "bfloat16")


def pack_int4(weight_OI: Weight) -> tuple[Weight, Weight]:
    """Quantize finite bf16 weights to INT4 in groups of 128 columns, as llm-compressor's W4A16 does, to nearest.

    Returns codes, int32 [out, in / 8], the first of eight columns in the lowest bits, each stored plus 8; and scales,
    bf16 [out, in / 128]. Formulas as in `quantize_fp8`:
        scale = max |w| of the group / 7.5, or 2**-7 if that is 0; code = round(clamp(w / scale, -8, 7)), ties to even
    Raises LayoutError if the weight is not a bf16 matrix or `in` is not a multiple of 128.
    """
    check_matrix(weight_OI, INT4_GROUP)
    num_rows, num_columns = weight_OI.shape
    packed_OP = np.empty((num_rows, num_columns // 2), np.uint8)
    scales_OG = np.empty((num_rows, num_columns // INT4_GROUP), np.uint16)
    with one_kernel_at_a_time:
        pack_int4_rows(bf16_words(weight_OI), packed_OP, scales_OG)
    return as_given(weight_OI, packed_OP.view(np.int32), "int32"), as_given(weight_OI, scales_OG, "bfloat16")


def check_matrix(weight_OI: torch.Tensor | Words, block: int) -> None:
    """Refuse what is not a matrix that can be cut into blocks of columns."""
    if weight_OI.ndim != 2 or weight_OI.shape[1] % block:
        raise LayoutError(
            f"a weight of shape {list(weight_OI.shape)} cannot be cut into blocks of {block} columns",
            fix="add this linear to the scheme's ignore list",
        )


def bf16_words(weight: torch.Tensor | Words) -> Words:
    """A weight's bit patterns: the same memory if it is contiguous, a copy if not."""
    if isinstance(weight, np.ndarray):
        return np.ascontiguousarray(weight)
    import torch

    if weight.dtype != torch.bfloat16:
        raise LayoutError(
            f"a weight of dtype {str(weight.dtype).removeprefix('torch.')}, where only bfloat16 can be read",
            fix="use a bfloat16 base model, or add this linear to the scheme's ignore list",
        )
    return weight.detach().contiguous().view(torch.uint16).numpy()


def as_given(weight: Weight, array: NDArray[Any], dtype: str) -> Weight:
    """A result of the same kind as the weight it was made from; dtype: torch's."""
    if isinstance(weight, np.ndarray):
        return array
    import torch

    return torch.from_numpy(array).view(getattr(torch, dtype))


@compiled_parallel
def max_magnitude_word(words_N: NDArray[np.uint16]) -> np.uint16:
    num_chunks = (words_N.size + CHUNK_ELEMENTS - 1) // CHUNK_ELEMENTS
    largest = np.zeros(num_chunks + 1, np.uint16)
    for chunk in numba.prange(num_chunks):
        largest[chunk] = max_word(words_N[chunk * CHUNK_ELEMENTS : (chunk + 1) * CHUNK_ELEMENTS])
    return max_word(largest)


@compiled
def max_word(words_N: NDArray[np.uint16]) -> np.uint16:
    largest = np.uint16(0)
    for index in range(words_N.size):
        largest = max(largest, np.uint16(words_N[index] & 0x7FFF))
    return largest


@compiled_parallel
def pack_nvfp4_rows(
    pairs_OP: NDArray[np.uint32],
    weight_scale_2: np.float32,
    smallest_scale: np.float32,
    packed_OP: NDArray[np.uint8],
    scales_OB: NDArray[np.uint8],
) -> None:
    for row in numba.prange(pairs_OP.shape[0]):
        pack_nvfp4_row(pairs_OP[row], weight_scale_2, smallest_scale, packed_OP[row], scales_OB[row])


@compiled
def pack_nvfp4_row(
    pairs_P: NDArray[np.uint32],
    weight_scale_2: np.float32,
    smallest_scale: np.float32,
    packed_P: NDArray[np.uint8],
    scales_B: NDArray[np.uint8],
) -> None:
    magnitudes_B = halve(halve(halve(pair_magnitudes(pairs_P))))
    six_scales = np.float32(6) * weight_scale_2
    for block in range(scales_B.size):
        scale = as_float32(np.uint32(magnitudes_B[block]) << 16) / six_scales
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
        even = as_e2m1(as_float32(pairs_P[pair] << 16) / divisors_P[pair])
        odd = as_e2m1(as_float32(pairs_P[pair] & 0xFFFF0000) / divisors_P[pair])
        packed_P[pair] = np.uint8(even | odd << 4)


@compiled
def pair_magnitudes(pairs_P: NDArray[np.uint32]) -> NDArray[np.uint16]:
    """The larger bf16 magnitude of each pair, as a bf16 word."""
    magnitudes_P = np.empty(pairs_P.size, np.uint16)
    for pair in range(pairs_P.size):
        magnitudes_P[pair] = max(np.uint16(pairs_P[pair] & 0x7FFF), np.uint16(pairs_P[pair] >> 16 & 0x7FFF))
    return magnitudes_P


@compiled
def halve(words_N: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """The larger of every two neighbours."""
    larger = np.empty(words_N.size // 2, np.uint16)
    for index in range(larger.size):
        larger[index] = max(words_N[2 * index], words_N[2 * index + 1])
    return larger


@compiled
def as_float32(bits: int | np.unsignedinteger[Any]) -> np.float32:
    return np.uint32(bits).view(np.float32)


@compiled
def as_e4m3(value: np.float32) -> np.uint8:
    """float8_e4m3fn code of a float32 that is not negative: to nearest, ties to even; 448 for anything above."""
    if value < 2.0**-6:  # Codes below 8 are steps of 2**-9, and so are the float32 values from 2**14 to 2**15.
        return np.uint8(np.float32(value + np.float32(2.0**14)).view(np.uint32))
    if value <= LARGEST_E4M3:  # From 32 bits, drop 20 of mantissa; an exponent's bias is 127 there and 7 here.
        bits = np.float32(value).view(np.uint32)
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


@compiled_parallel
def quantize_fp8_rows(words_OI: NDArray[np.uint16], codes_OI: NDArray[np.uint8], scales_O: NDArray[np.uint16]) -> None:
    for row in numba.prange(words_OI.shape[0]):
        scale = scale_word(max_word(words_OI[row]), np.float32(448))
        scales_O[row, 0] = scale
        fp8_codes(words_OI[row], as_float32(np.uint32(scale) << 16), codes_OI[row])


@compiled
def fp8_codes(words_I: NDArray[np.uint16], scale: np.float32, codes_I: NDArray[np.uint8]) -> None:
    for index in range(words_I.size):
        ratio = divide_bf16(words_I[index], scale)
        sign = np.uint8(0x80 * (ratio < 0))
        codes_I[index] = as_e4m3(min(abs(ratio), np.float32(LARGEST_E4M3))) | sign


@compiled_parallel
def quantize_int8_rows(words_OI: NDArray[np.uint16], codes_OI: NDArray[np.int8], scales_O: NDArray[np.uint16]) -> None:
    for row in numba.prange(words_OI.shape[0]):
        scale = scale_word(max_word(words_OI[row]), np.float32(127.5))
        scales_O[row, 0] = scale
        int8_codes(words_OI[row], as_float32(np.uint32(scale) << 16), codes_OI[row])


@compiled
def int8_codes(words_I: NDArray[np.uint16], scale: np.float32, codes_I: NDArray[np.int8]) -> None:
    for index in range(words_I.size):
        ratio = divide_bf16(words_I[index], scale)
        codes_I[index] = np.int8(np.rint(min(max(ratio, np.float32(-128)), np.float32(127))))


@compiled_parallel
def pack_int4_rows(words_OI: NDArray[np.uint16], packed_OP: NDArray[np.uint8], scales_OG: NDArray[np.uint16]) -> None:
    for row in numba.prange(words_OI.shape[0]):
        for group in range(scales_OG.shape[1]):
            words = words_OI[row, group * INT4_GROUP : (group + 1) * INT4_GROUP]
            scale = scale_word(max_word(words), np.float32(7.5))
            scales_OG[row, group] = scale
            packed = packed_OP[row, group * INT4_GROUP // 2 : (group + 1) * INT4_GROUP // 2]
            int4_codes(words, as_float32(np.uint32(scale) << 16), packed)


@compiled
def int4_codes(words_I: NDArray[np.uint16], scale: np.float32, packed_P: NDArray[np.uint8]) -> None:
    codes_I = np.empty(words_I.size, np.uint8)
    for index in range(words_I.size):
        ratio = divide_bf16(words_I[index], scale)
        codes_I[index] = np.uint8(np.int32(np.rint(min(max(ratio, np.float32(-8)), np.float32(7)))) + 8)
    for pair in range(packed_P.size):
        packed_P[pair] = codes_I[2 * pair] | codes_I[2 * pair + 1] << 4


@compiled
def scale_word(magnitude: np.uint16, largest: np.float32) -> np.uint16:
    """bf16 word of a scale: a magnitude's word divided by the largest code."""
    word = as_bf16(as_float32(np.uint32(magnitude) << 16) / largest)
    return word if word else np.uint16(SMALLEST_SCALE)


@compiled
def divide_bf16(word: np.uint16, scale: np.float32) -> np.float32:
    """A bf16 word's value over a scale, rounded to bf16."""
    return as_float32(np.uint32(as_bf16(as_float32(np.uint32(word) << 16) / scale)) << 16)


@compiled
def as_bf16(value: np.float32) -> np.uint16:
    """bf16 word of a float32 that is no NaN: to nearest, ties to even."""
    bits = np.float32(value).view(np.uint32)
    return np.uint16((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)
