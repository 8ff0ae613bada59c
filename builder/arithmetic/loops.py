"""The arithmetic of this folder as compiled loops over float32 and float64, for the CPU.

Shapes: R rows, K what is summed over, N columns, S channels that are stored in two pieces, D digits.

As in `builder.kernels`: flat loops, never fastmath, for a fused multiply-add or a reciprocal would change bits; results
do not depend on the number of threads. What is exact needs no order; what rounds has the order of its twin in
`functions` and `sums`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
from numpy.typing import NDArray

from builder.kernels import compiled, compiled_parallel, one_kernel_at_a_time

if TYPE_CHECKING:
    import torch

LOG2E = 1.4426950408889634
LN2 = (6.93147180369123816490e-01, 1.90821492927058770002e-10)  # the first has 32 bits: its multiples by n are exact
HALF_PI = (1.57079632673412561417e00, 6.07710050630396597660e-11, 2.02226624879595063154e-21)  # the first has 33 bits
EXP_TERMS = tuple(1.0 / math.factorial(k) for k in range(14))
SMALLEST_EXP, LARGEST_EXP = -708.0, 709.0
ROUNDER = 1.5 * 2.0**52  # added and taken away, it rounds a float64 below 2^51 to the nearest integer, ties to even
NO_NUMBER = 1 << 20  # stands for the exponent of a row that holds a NaN or an infinity
THOROUGH = 512  # a channel whose integers are smaller than this on average loses digits that bf16 has

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int32 = NDArray[np.int32]
Int8 = NDArray[np.int8]


# --- functions and sums -----------------------------------------------------------------------------------------------


@compiled
def exp(x: float) -> float:
    """As `functions.exp`."""
    shifted = x * LOG2E + ROUNDER
    n = shifted - ROUNDER
    r = (x - n * LN2[0]) - n * LN2[1]
    value = EXP_TERMS[13]
    for k in range(12, -1, -1):
        value = value * r + EXP_TERMS[k]
    bits = (np.float64(shifted).view(np.int64) + 1023) << 52
    value = value * np.int64(bits).view(np.float64)
    if x < SMALLEST_EXP:
        value = 0.0
    if x > LARGEST_EXP:
        value = math.inf
    return value


@compiled
def sum_tree(values_K: Float64, length: int) -> float:
    """The sum of the first `length` values, a power of two of them, by halves; the values are overwritten."""
    while length > 1:
        length //= 2
        for k in range(length):
            values_K[k] = values_K[k] + values_K[k + length]
    return float(values_K[0])


@compiled
def next_power(count: int) -> int:
    power = 1
    while power < count:
        power *= 2
    return power


@compiled_parallel
def softmax_rows(values_RK: Float32, out_RK: Float32) -> None:
    for row in numba.prange(values_RK.shape[0]):
        softmax_row(values_RK[row], out_RK[row])


@compiled
def softmax_row(values_K: Float32, out_K: Float32) -> None:
    """As `sums.softmax`: exponentials of differences in float64, their tree sum, quotients to float32."""
    count = values_K.size
    largest = values_K[0]
    for k in range(count):
        largest = max(largest, values_K[k])
    powers_K = np.empty(count, np.float64)
    for k in range(count):
        powers_K[k] = exp(np.float64(values_K[k]) - np.float64(largest))
    length = next_power(count)
    summed_K = np.zeros(length, np.float64)
    summed_K[:count] = powers_K
    total = sum_tree(summed_K, length)
    for k in range(count):
        out_K[k] = np.float32(powers_K[k] / total)


@compiled_parallel
def sum_exponentials(values_RK: Float32, largest_R: Float64, total_R: Float64) -> None:
    """The largest value of each row, and the tree sum of the exponentials of differences from it."""
    for row in numba.prange(values_RK.shape[0]):
        largest = values_RK[row, 0]
        for k in range(values_RK.shape[1]):
            largest = max(largest, values_RK[row, k])
        length = next_power(values_RK.shape[1])
        summed_K = np.zeros(length, np.float64)
        for k in range(values_RK.shape[1]):
            summed_K[k] = exp(np.float64(values_RK[row, k]) - np.float64(largest))
        largest_R[row], total_R[row] = largest, sum_tree(summed_K, length)


@compiled_parallel
def sum_rows(values_RK: Float32, out_R: Float64) -> None:
    """As `sums.sum_last` of float32 values."""
    for row in numba.prange(values_RK.shape[0]):
        length = next_power(values_RK.shape[1])
        summed_K = np.zeros(length, np.float64)
        for k in range(values_RK.shape[1]):
            summed_K[k] = np.float64(values_RK[row, k])
        out_R[row] = sum_tree(summed_K, length)


@compiled_parallel
def gather_words(table: NDArray[np.int16], words_N: NDArray[np.uint16], out_N: NDArray[np.int16]) -> None:
    for chunk in numba.prange((words_N.size + 65535) // 65536):
        for index in range(chunk * 65536, min((chunk + 1) * 65536, words_N.size)):
            out_N[index] = table[words_N[index]]


# --- operands of products ---------------------------------------------------------------------------------------------


@compiled
def power_of_two(n: int) -> float:
    """2^n for n from -1022 to 1023."""
    return np.int64((np.int64(n) + 1023) << 52).view(np.float64)


@compiled
def find_exponent(values_K: Float32) -> int:
    """The smallest n with |x| < 2^n for all x of a row; 0 if all are 0, NO_NUMBER if one is not finite."""
    words_K = values_K.view(np.uint32)
    largest = np.uint32(0)
    for k in range(words_K.size):
        largest = max(largest, np.uint32(words_K[k] & np.uint32(0x7FFFFFFF)))
    if largest >= np.uint32(0x7F800000):
        return NO_NUMBER
    if largest == 0:
        return 0
    magnitude = np.float64(np.uint32(largest).view(np.float32))
    return int(magnitude.view(np.int64) >> 52) - 1022


@compiled
def round_row(values_K: Float32, bits: int, exponent: int, integers_K: Int32) -> None:
    """x * 2^(bits - exponent) to the nearest integer, ties to even: at most 2^bits."""
    scale = power_of_two(bits - exponent)
    for k in range(values_K.size):
        shifted = np.float64(values_K[k]) * scale + ROUNDER
        integers_K[k] = np.int32(np.float64(shifted).view(np.int64))


@compiled
def cut_row(integers_K: Int32, digit: int, digits_K: Int8) -> None:
    """One balanced digit to the base 256 of each integer, from -128 to 127; digit 0 is the lowest."""
    carried = 0
    for lower in range(digit):
        carried += 128 << (8 * lower)
    for k in range(integers_K.size):
        # Adding 128 to every digit below makes them count from zero; the shift then drops them.
        rest = (integers_K[k] + np.int32(carried)) >> np.int32(8 * digit)
        digits_K[k] = np.int8(((rest + np.int32(128)) & np.int32(255)) - np.int32(128))


@compiled_parallel
def round_rows(values_RK: Float32, bits: int, out_RK: Float64, exponents_R: Int32) -> None:
    """Rows as integers in float64; see `products.round_rows`."""
    for row in numba.prange(values_RK.shape[0]):
        exponent = find_exponent(values_RK[row])
        exponents_R[row] = exponent
        if exponent != NO_NUMBER:
            scale = power_of_two(bits - exponent)
            for k in range(values_RK.shape[1]):
                out_RK[row, k] = (np.float64(values_RK[row, k]) * scale + ROUNDER) - ROUNDER


@compiled_parallel
def round_rows_to_digits(values_RK: Float32, bits: int, highest_first: bool, out_RDK: Int8, exponents_R: Int32) -> None:
    """Rows as digits, all of one place beside each other."""
    for row in numba.prange(values_RK.shape[0]):
        exponent = find_exponent(values_RK[row])
        exponents_R[row] = exponent
        if exponent != NO_NUMBER:
            integers_K = np.empty(values_RK.shape[1], np.int32)
            round_row(values_RK[row], bits, exponent, integers_K)
            count = out_RDK.shape[1]
            for digit in range(count):
                cut_row(integers_K, digit, out_RDK[row, count - 1 - digit if highest_first else digit])


@compiled_parallel
def round_weight(values_RK: Float32, bits: int, out_RK: NDArray[np.int16], exponents_R: Int32, poor_R: Int8) -> None:
    """Output channels of a weight as integers; poor where so many are small that digits are lost which bf16 has."""
    for row in numba.prange(values_RK.shape[0]):
        exponent = find_exponent(values_RK[row])
        exponents_R[row], poor_R[row] = exponent, 0
        if exponent != NO_NUMBER:
            integers_K = np.empty(values_RK.shape[1], np.int32)
            round_row(values_RK[row], bits, exponent, integers_K)
            total = np.int64(0)
            for k in range(integers_K.size):
                out_RK[row, k] = np.int16(integers_K[k])
                total += abs(integers_K[k])
            if total < THOROUGH * integers_K.size:
                scale = power_of_two(exponent - bits)
                for k in range(integers_K.size):
                    if np.float64(integers_K[k]) * scale != np.float64(values_RK[row, k]):
                        poor_R[row] = 1


@compiled_parallel
def cut_weight(integers_RK: NDArray[np.int16], out_RDK: Int8) -> None:
    """Two digits of each integer, the lower ones before the higher ones."""
    for row in numba.prange(integers_RK.shape[0]):
        for k in range(integers_RK.shape[1]):
            low = np.int16(((integers_RK[row, k] + np.int16(128)) & np.int16(255)) - np.int16(128))
            out_RDK[row, 0, k] = np.int8(low)
            out_RDK[row, 1, k] = np.int8((integers_RK[row, k] - low) >> 8)


# --- results of products ----------------------------------------------------------------------------------------------


@compiled_parallel
def finish_sums(sums_RN: Float64, bits: int, left_R: Int32, right_BN: Int32, bias_N: Float64, out_RN: Float32) -> None:
    """sums * 2^(left + right - bits) + bias, to float32; the rows are those of B matrices, one after another."""
    rows = sums_RN.shape[0] // right_BN.shape[0]
    for row in numba.prange(sums_RN.shape[0]):
        scale, right_N = power_of_two(left_R[row] - bits), right_BN[row // rows]
        for n in range(sums_RN.shape[1]):
            out_RN[row, n] = np.float32(sums_RN[row, n] * scale * power_of_two(right_N[n]) + bias_N[n])


@compiled_parallel
def finish_digits(
    places_PNM: Int32, bits: int, right_N: Int32, left_M: Int32, bias_N: Float64, out_NM: Float32
) -> None:
    """The same of sums that lie in four places to the base 256, the lowest first; a channel is a row here."""
    for n in numba.prange(places_PNM.shape[1]):
        scale, bias = power_of_two(right_N[n] - bits), bias_N[n]
        for row in range(places_PNM.shape[2]):
            high = (np.int64(places_PNM[3, n, row]) << 8) + np.int64(places_PNM[2, n, row])
            low = (np.int64(places_PNM[1, n, row]) << 8) + np.int64(places_PNM[0, n, row])
            total = np.float64((high << 16) + low)
            out_NM[n, row] = np.float32(total * scale * power_of_two(left_M[row]) + bias)


# --- for torch --------------------------------------------------------------------------------------------------------


def run(loop: Any, *arguments: Any) -> None:
    """Run a loop over tensors; they lend it their memory."""
    import torch

    arrays = [argument.numpy() if isinstance(argument, torch.Tensor) else argument for argument in arguments]
    with one_kernel_at_a_time:
        loop(*arrays)


def look_up(table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """table[bits of x] for 16-bit numbers; table: [65536], of the dtype of x and on the CPU."""
    import torch

    words = x.contiguous().view(torch.int16)
    if x.device.type != "cpu":
        found = table.to(x.device).view(torch.int16)[words.to(torch.int32).bitwise_and(0xFFFF)]
        return found.view(x.dtype)
    out = torch.empty_like(words)
    run(gather_words, table.view(torch.int16), words.flatten().view(torch.uint16), out.view(-1))
    return out.view(x.dtype)
