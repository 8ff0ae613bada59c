"""Weights quantized on the CPU, bit for bit as the reference libraries do it, by the loops of `builder.compiled`.

A weight is a torch tensor in bfloat16, float16 or float32, or a numpy array: float16, float32, or uint16, which holds
the bit patterns of bfloat16. Arrays spare a process the second that torch takes to load. Results are of the same kind,
tensors or arrays; codes of 8 bits that numpy has no dtype for are uint8.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from builder import compiled
from builder.compiled import INT4_GROUP, SMALLEST_E4M3
from builder.errors import LayoutError
from builder.floats import find_float, read_words

if TYPE_CHECKING:
    import torch

BLOCK = 16

Weight = TypeVar("Weight", "torch.Tensor", NDArray[Any])
# Where no OpenMP library is found, numba's own thread pool ends the process when two threads use it at once.
one_kernel_at_a_time = threading.Lock()


def max_magnitude(weight_OI: torch.Tensor | NDArray[Any]) -> float:
    """max |w| of a tensor of any shape, exact; 0.0 if it is empty.

    NaN if any element is NaN, else infinity if any is infinite. The tensor is read once and no copy of it is made.
    Equals `weight_OI.abs().amax()`. Raises LayoutError if the tensor is of another dtype than those above.
    """
    words_N = read_words(weight_OI).reshape(-1)
    with one_kernel_at_a_time:
        word = compiled.max_magnitude_word(words_N)
    return find_float(weight_OI).read(np.array(word, words_N.dtype))


def pack_nvfp4(weight_OI: Weight, weight_scale_2: float, *, block_scale_floor: bool = True) -> tuple[Weight, Weight]:
    """Quantize finite weights to NVFP4, as nvidia-modelopt's NVFP4QTensor does.

    weight_OI: [out, in] on the CPU; `in` a multiple of 16; not modified.
    weight_scale_2: the global scale, a positive float32 value: max |w| / 2688 over the weights that share it.
    block_scale_floor: keep block scales at 2**-9 or above, as modelopt 0.47 does. False lets them underflow, as 0.43
        does: a tiny block's scale becomes 0, its weights divided by it infinite or NaN, and their codes -6 for a
        negative weight and +6 for any other; all of them read back as zero.
    Returns the codes, uint8 [out, in / 2], the even column in the low nibble, and the block scales, float8_e4m3fn
    [out, in / 16]. NaN or infinite weights give unspecified codes: refuse them before.
    Raises LayoutError if the weight is not a matrix of such numbers or `in` is not a multiple of 16.

    Formulas, all in float32, whatever the weight's dtype: `get_weights_scaling_factor` and `quantize` of
    modelopt/torch/quantization/qtensor/nvfp4_tensor.py, versions 0.47.0 and 0.43.0:
        scale = max |w| of the block / (6 * weight_scale_2), or 1 if that is 0; 0.47 clamps it to [2**-9, 448]
        code = fp4(w / (float32(fp8(scale)) * weight_scale_2)); both casts go to nearest, ties to even
    A scale above 448, out of reach while weight_scale_2 covers the block, becomes 448 here, as in both versions under
    torch 2.12 and later; an earlier torch gave 0.43 a NaN above 464 (https://github.com/pytorch/pytorch/pull/178817).
    """
    check_matrix(weight_OI, BLOCK)
    num_rows, num_columns = weight_OI.shape
    words_OI = read_words(weight_OI)
    pairs_OP = words_OI.view(find_float(weight_OI).pair)
    packed_OP = np.empty((num_rows, num_columns // 2), np.uint8)  # numpy's, for it asks for huge pages
    scales_OB = np.empty((num_rows, num_columns // BLOCK), np.uint8)
    smallest_scale = np.float32(SMALLEST_E4M3 if block_scale_floor else 0)
    with one_kernel_at_a_time:
        compiled.pack_nvfp4_rows(words_OI, pairs_OP, np.float32(weight_scale_2), smallest_scale, packed_OP, scales_OB)
    return as_given(weight_OI, packed_OP, "uint8"), as_given(weight_OI, scales_OB, "float8_e4m3fn")


def quantize_fp8(weight_OI: Weight) -> tuple[Weight, Weight]:
    """Quantize finite weights to FP8 with a scale for each output channel, as llm-compressor's FP8_DYNAMIC does.

    Returns codes, float8_e4m3fn [out, in], and scales, [out, 1] in the weight's dtype.
    Formulas, in the weight's dtype, which means in float32 with every quotient rounded to it (`calculate_qparams` and
    `quantize` of compressed-tensors); eps is torch.finfo's of that dtype: 2**-7, 2**-10 or 2**-23:
        scale = max |w| of the row / 448, or eps if that is 0; code = fp8(clamp(w / scale, -448, 448)), to nearest
    A weight of -0.0 becomes +0.0, for a zero point of 0 is added there.
    """
    return quantize_rows(weight_OI, compiled.quantize_fp8_rows, np.uint8, "float8_e4m3fn")


def quantize_int8(weight_OI: Weight) -> tuple[Weight, Weight]:
    """Quantize finite weights to INT8 with a scale for each output channel, as llm-compressor's W8A8 does.

    Returns codes, int8 [out, in], and scales, [out, 1] in the weight's dtype. Formulas as in `quantize_fp8`:
        scale = max |w| of the row / 127.5, or eps if that is 0; code = round(clamp(w / scale, -128, 127)), to even
    """
    return quantize_rows(weight_OI, compiled.quantize_int8_rows, np.int8, "int8")


def quantize_rows(
    weight_OI: Weight, kernel: Callable[..., None], dtype: type[np.generic], given_dtype: str
) -> tuple[Weight, Weight]:
    check_matrix(weight_OI, 1)
    codes_OI = np.empty(weight_OI.shape, dtype)
    words_OI = read_words(weight_OI)
    scales_O = np.empty((weight_OI.shape[0], 1), words_OI.dtype)
    with one_kernel_at_a_time:
        kernel(words_OI, codes_OI, scales_O)
    return as_given(weight_OI, codes_OI, given_dtype), as_its_own(weight_OI, scales_O)


def pack_int4(weight_OI: Weight) -> tuple[Weight, Weight]:
    """Quantize finite weights to INT4 in groups of 128 columns, as llm-compressor's W4A16 does, to nearest.

    Returns codes, int32 [out, in / 8], the first of eight columns in the lowest bits, each stored plus 8; and scales,
    [out, in / 128] in the weight's dtype. Formulas as in `quantize_fp8`:
        scale = max |w| of the group / 7.5, or eps if that is 0; code = round(clamp(w / scale, -8, 7)), ties to even
    Raises LayoutError if the weight is not a matrix of such numbers or `in` is not a multiple of 128.
    """
    check_matrix(weight_OI, INT4_GROUP)
    num_rows, num_columns = weight_OI.shape
    packed_OP = np.empty((num_rows, num_columns // 2), np.uint8)
    words_OI = read_words(weight_OI)
    scales_OG = np.empty((num_rows, num_columns // INT4_GROUP), words_OI.dtype)
    with one_kernel_at_a_time:
        compiled.pack_int4_rows(words_OI, packed_OP, scales_OG)
    return as_given(weight_OI, packed_OP.view(np.int32), "int32"), as_its_own(weight_OI, scales_OG)


def check_matrix(weight_OI: torch.Tensor | NDArray[Any], block: int) -> None:
    """Refuse what is not a matrix that can be cut into blocks of columns."""
    if weight_OI.ndim != 2 or weight_OI.shape[1] % block:
        raise LayoutError(
            f"a weight of shape {list(weight_OI.shape)} cannot be cut into blocks of {block} columns",
            fix="add this linear to the scheme's ignore list",
        )


def as_given(weight: Weight, array: NDArray[Any], dtype: str) -> Weight:
    """A result of the same kind as the weight it was made from; dtype: torch's."""
    if isinstance(weight, np.ndarray):
        return array
    import torch

    return torch.from_numpy(array).view(getattr(torch, dtype))


def as_its_own(weight: Weight, words: NDArray[Any]) -> Weight:
    """Words of the dtype of the weight that they were made from, as numbers of the same kind."""
    kind = find_float(weight)
    return as_given(weight, words.view(kind.array), kind.name)
