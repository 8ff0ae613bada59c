"""Matrix products as sums of integers: exact, whatever the order, the blocking, the threads or the library.

Each row of the left operand is scaled by a power of two so that it fits L bits besides its sign, each column of the
right one so that it fits R, and both are rounded to integers, ties to even. A product of two is at most 2^(L + R), and
a sum of K of them at most 2^53, which float64 holds exactly. That integer is the definition. Two ways lead to it: a
float64 product, and products of int8 digits, whichever is faster here. Then it is scaled back, a bias is added in
float64, and the result rounded to float32 and on to the operand's dtype.

Linears take 22 bits for what they read and 14 for their weights, and K is at most 131,072. Products of two activations
take 20 and 19, up to 16,384; longer ones are cut, and their parts added in order in float64. An output channel of a
weight whose integers are small on average, because a few of its weights dwarf the others, has a remainder: what
rounding took away, rounded again by a scale of its own; the two products are added in float64.

Shapes: M rows, K summed over, N columns, B matrices, P places of digits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from builder.arithmetic import loops
from builder.arithmetic.functions import exponent_of, power_of_two
from builder.arithmetic.loops import NO_NUMBER
from builder.errors import ArithmeticRefusal

LINEAR_BITS, LONGEST_LINEAR = (22, 14), 1 << 17
PAIR_BITS, LONGEST_PAIR = (20, 19), 1 << 14
LONGEST_INT32 = 1 << 15  # two products of digits, 2^14 each, for each of so many numbers stay below 2^31
WORKSPACE_BYTES = 64 << 20
Backend = Literal["digits", "float64"]


@dataclass(frozen=True)
class Weight:
    """A linear's weight as integers. content: int8 [N, 2, K] of digits, or int16 [N, K]; exponents: int32 [N].

    poor: the channels that have a remainder, int64 [S]; high: their integers, int16 [S, K]; remainder: float32 [S, K],
    what rounding took away from them.
    """

    content: torch.Tensor
    exponents: torch.Tensor
    poor: torch.Tensor
    high: torch.Tensor
    remainder: torch.Tensor


# --- operands ---------------------------------------------------------------------------------------------------------


def round_rows(x_RK: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers, float64 [R, K], at most 2^bits, and exponents, int32 [R]: x is about integer * 2^(exponent - bits).

    Raises ArithmeticRefusal if a number is not finite.
    """
    if x_RK.device.type != "cpu" or x_RK.dtype == torch.float64:
        return round_rows_anywhere(x_RK, bits)
    out = torch.empty(x_RK.shape, dtype=torch.float64)
    exponents = torch.empty(x_RK.shape[0], dtype=torch.int32)
    loops.run(loops.round_rows, x_RK.float().contiguous(), bits, out, exponents)
    refuse_infinite(exponents)
    return out, exponents


def round_rows_anywhere(x_RK: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition in torch operations."""
    wide = x_RK.double()
    largest = wide.abs().amax(1)
    if not bool(largest.isfinite().all()):
        raise ArithmeticRefusal("an operand of a matrix product holds a NaN or an infinity")
    exponents = exponent_of(largest)
    return (wide * power_of_two(bits - exponents).unsqueeze(1)).round(), exponents.to(torch.int32)


def refuse_infinite(exponents: torch.Tensor) -> None:
    if exponents.numel() and int(exponents.max()) == NO_NUMBER:
        raise ArithmeticRefusal("an operand of a matrix product holds a NaN or an infinity")


def cut_anywhere(integers_RK: torch.Tensor, num_digits: int) -> torch.Tensor:
    """Balanced digits to the base 256 of float64 integers: int8 [R, D, K], the lowest first."""
    rest, digits = integers_RK.to(torch.int32), []
    for _ in range(num_digits):
        digits.append((((rest + 128) & 255) - 128).to(torch.int8))
        rest = (rest + 128) >> 8
    return torch.stack(digits, dim=1)


def prepare_weight(weight_NK: torch.Tensor, backend: Backend | None = None) -> Weight:
    """A weight as integers, some channels at a time; it takes as many bytes as the weight does in bfloat16."""
    backend = backend or choose_backend(weight_NK.device)
    num_rows, num_columns = weight_NK.shape
    shape = (num_rows, 2, num_columns) if backend == "digits" else (num_rows, num_columns)
    content = torch.empty(shape, dtype=torch.int8 if backend == "digits" else torch.int16, device=weight_NK.device)
    exponents = torch.empty(num_rows, dtype=torch.int32, device=weight_NK.device)
    poor = torch.empty(num_rows, dtype=torch.bool, device=weight_NK.device)
    step = max(1, WORKSPACE_BYTES // (8 * num_columns))
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        integers, exponents[rows], poor[rows] = round_channels(weight_NK[rows])
        if backend == "float64":
            content[rows] = integers
        elif content.device.type == "cpu":
            loops.run(loops.cut_weight, integers, content[rows])
        else:
            content[rows] = cut_anywhere(integers, 2)
    found = poor.nonzero().flatten()
    high, _, _ = round_channels(weight_NK[found])
    taken = high.double() * power_of_two(exponents[found].long() - LINEAR_BITS[1]).unsqueeze(1)
    remainder = (weight_NK[found].double() - taken).float()  # exact: what is left of 24 bits has no more of them
    return Weight(content, exponents, found, high, remainder)


def round_channels(weight_RK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integers, int16 [R, K]; exponents, int32 [R]; and which rows are poor, bool [R]."""
    bits = LINEAR_BITS[1]
    if weight_RK.device.type == "cpu":
        integers = torch.empty(weight_RK.shape, dtype=torch.int16)
        exponents = torch.empty(weight_RK.shape[0], dtype=torch.int32)
        poor = torch.empty(weight_RK.shape[0], dtype=torch.int8)
        loops.run(loops.round_weight, weight_RK.float().contiguous(), bits, integers, exponents, poor)
        refuse_infinite(exponents)
        return integers, exponents, poor.bool()
    wide, exponents = round_rows_anywhere(weight_RK, bits)
    exact = wide * power_of_two(exponents.long() - bits).unsqueeze(1) == weight_RK.double()
    small = wide.abs().to(torch.int64).sum(1) < loops.THOROUGH * weight_RK.shape[1]
    return wide.to(torch.int16), exponents, small & ~exact.all(1)


# --- products of integers ---------------------------------------------------------------------------------------------


def multiply_digits(right_NDK: torch.Tensor, left_MDK: torch.Tensor) -> torch.Tensor:
    """int32 [4, N, M]: sums of products of digits, by their place, the lowest first.

    right: int8 [N, 2, K], the lowest digit first; left: int8 [M, 3, K], the highest first; K at most 32,768. So what
    belongs to one place lies side by side in both, and is one product twice as long. The weight comes first, for
    libraries rearrange the second operand of each product, and it is the larger one.
    """
    count = left_MDK.shape[2]
    right, left = right_NDK.flatten(1), left_MDK.flatten(1)  # copies only what was cut out of a longer sum
    places = torch.empty(4, len(right), len(left), dtype=torch.int32, device=left.device)
    low, high, both = slice(0, count), slice(count, None), slice(None)
    places[0] = multiply_int8(right[:, low], left[:, 2 * count :])
    places[1] = multiply_int8(right[:, both], left[:, count:])
    places[2] = multiply_int8(right[:, both], left[:, : 2 * count])
    places[3] = multiply_int8(right[:, high], left[:, :count])
    return places


def multiply_int8(left_MK: torch.Tensor, right_NK: torch.Tensor) -> torch.Tensor:
    """left @ right.T in int32. CUDA takes no fewer than 17 rows, and columns by eights: it gets zeros besides."""
    if left_MK.device.type != "cuda":
        return torch._int_mm(left_MK, right_NK.t())
    (rows, count), columns = left_MK.shape, right_NK.shape[0]
    pad = torch.nn.functional.pad
    left = pad(left_MK, (0, -count % 8, 0, max(0, 17 - rows)))
    right = pad(right_NK, (0, -count % 8, 0, -columns % 8))
    return torch._int_mm(left.contiguous(), right.contiguous().t())[:rows, :columns]


def multiply_by_digits(x_MK: torch.Tensor, weight: Weight, bias_N: torch.Tensor) -> torch.Tensor:
    """[M, N] in the dtype of x, of int8 products, some channels at a time."""
    left, left_exponents = cut_rows(x_MK)
    out_NM = torch.empty(len(weight.exponents), len(x_MK), dtype=x_MK.dtype, device=x_MK.device)
    step = max(64, WORKSPACE_BYTES // (16 * len(x_MK)))
    for start in range(0, len(out_NM), step):
        rows = slice(start, start + step)
        content, exponents, bits = weight.content[rows], weight.exponents[rows], sum(LINEAR_BITS)
        if out_NM.device.type == "cpu" and left.shape[2] <= LONGEST_INT32:
            places = multiply_digits(content, left)
            done = torch.empty(places.shape[1:], dtype=torch.float32)
            loops.run(loops.finish_digits, places, bits, exponents, left_exponents, bias_N[rows], done)
            out_NM[rows] = done
        else:
            sums = sum_digits(content, left)
            scaled = sums * power_of_two(exponents.long() - bits).unsqueeze(1) * power_of_two(left_exponents.long())
            out_NM[rows] = (scaled + bias_N[rows].unsqueeze(1)).float()
    return out_NM.t().contiguous()


def sum_digits(right_NDK: torch.Tensor, left_MDK: torch.Tensor) -> torch.Tensor:
    """float64 [N, M]: sums of products of integers of any length; exact, as each of their parts is."""
    total = torch.zeros(len(right_NDK), len(left_MDK), dtype=torch.int64, device=left_MDK.device)
    for start in range(0, left_MDK.shape[2], LONGEST_INT32):
        part = slice(start, start + LONGEST_INT32)
        places = multiply_digits(right_NDK[..., part], left_MDK[..., part]).to(torch.int64)
        total += (((places[3] << 8) + places[2]) << 16) + (places[1] << 8) + places[0]
    return total.double()


def cut_rows(x_MK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Three digits of each number that a linear reads: int8 [M, 3, K], the highest first; and exponents, int32 [M]."""
    bits = LINEAR_BITS[0]
    if x_MK.device.type != "cpu":
        integers, exponents = round_rows(x_MK, bits)
        return cut_anywhere(integers, 3).flip(1), exponents
    digits = torch.empty(x_MK.shape[0], 3, x_MK.shape[1], dtype=torch.int8)
    exponents = torch.empty(x_MK.shape[0], dtype=torch.int32)
    loops.run(loops.round_rows_to_digits, x_MK.float().contiguous(), bits, True, digits, exponents)
    refuse_infinite(exponents)
    return digits, exponents


def multiply_by_float64(x_MK: torch.Tensor, weight: Weight, bias_N: torch.Tensor) -> torch.Tensor:
    """[M, N] in the dtype of x, of float64 products, some rows and some channels at a time."""
    count = x_MK.shape[1]
    out = torch.empty(x_MK.shape[0], len(weight.exponents), dtype=x_MK.dtype, device=x_MK.device)
    num_rows = max(16, 2 * WORKSPACE_BYTES // (8 * count))
    num_columns = max(16, WORKSPACE_BYTES // (8 * count))
    for first in range(0, len(x_MK), num_rows):
        rows = slice(first, first + num_rows)
        left, left_exponents = round_rows(x_MK[rows], LINEAR_BITS[0])
        for start in range(0, out.shape[1], num_columns):
            columns = slice(start, start + num_columns)
            sums = left @ weight.content[columns].double().t()
            right = weight.exponents[columns]
            done = finish(sums, sum(LINEAR_BITS), left_exponents, right.unsqueeze(0), bias_N[columns])
            out[rows, columns] = done
    return out


def finish(
    sums_RN: torch.Tensor, bits: int, left_R: torch.Tensor, right_BN: torch.Tensor, bias_N: torch.Tensor
) -> torch.Tensor:
    """Integers scaled back, with the bias, as float32 [R, N]; the rows are those of B matrices, one after another."""
    if sums_RN.device.type != "cpu":
        right = right_BN.repeat_interleave(sums_RN.shape[0] // right_BN.shape[0], 0)
        return scale_back(sums_RN, bits, left_R, right, bias_N)
    out = torch.empty(sums_RN.shape, dtype=torch.float32)
    loops.run(loops.finish_sums, sums_RN, bits, left_R, right_BN, bias_N, out)
    return out


def scale_back(
    sums_RN: torch.Tensor, bits: int, left_R: torch.Tensor, right: torch.Tensor, bias_N: torch.Tensor
) -> torch.Tensor:
    """The definition of `finish` in torch operations; right: int32 [N] or [R, N]."""
    scaled = sums_RN * power_of_two(left_R.long() - bits).unsqueeze(1) * power_of_two(right.long())
    return (scaled + bias_N).float()


# --- the faster backend -----------------------------------------------------------------------------------------------

CHOSEN: list[Backend] = []  # by `use_backend`, for as long as that lasts


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Have weights that are prepared meanwhile multiplied in one way. No bit changes."""
    CHOSEN.append(backend)
    try:
        yield
    finally:
        CHOSEN.pop()


def choose_backend(device: torch.device) -> Backend:
    """What multiplies faster here; of digits only what this machine multiplies exactly."""
    return CHOSEN[-1] if CHOSEN else find_backend(device.type)


@cache
def find_backend(kind: str) -> Backend:
    """float64 where products of the largest digits are wrong (without VNNI, pairs of them may saturate) or slower."""
    device = torch.device(kind)
    try:
        if not multiplies_extremes(device):
            return "float64"
    except (RuntimeError, NotImplementedError):  # a build or a processor without them
        return "float64"
    left, right, wide = (
        torch.ones(shape, dtype=dtype, device=device)
        for shape, dtype in (((256, 3, 2048), torch.int8), ((1024, 2, 2048), torch.int8), ((1024, 2048), torch.float64))
    )
    by_digits = measure_seconds(lambda: multiply_digits(right, left)[0, 0, 0].item())
    by_float64 = measure_seconds(lambda: (wide[:256] @ wide.t())[0, 0].item())
    return "digits" if by_digits < 1.5 * by_float64 else "float64"  # which has more to move, and is asked when busy


def multiplies_extremes(device: torch.device) -> bool:
    """Whether int8 products hold for the largest digits of either sign, in every pattern of four neighbours."""
    patterns = torch.cartesian_prod(*[torch.tensor([-128, 127], dtype=torch.int8)] * 4)
    digits = patterns.repeat_interleave(2, 0)[:, None].expand(32, 64, 4).flatten(1).to(device)  # int8 [32, 256]
    return torch.equal(multiply_int8(digits, digits).double(), digits.double() @ digits.double().t())


def measure_seconds(action: Callable[[], object]) -> float:
    """The shortest of three runs after one that is not counted."""
    action()
    times = []
    for _ in range(3):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return min(times)


# --- linears and products of activations ------------------------------------------------------------------------------


def linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., K] through a linear: [..., N] in the dtype of x.

    Raises ArithmeticRefusal if x holds a NaN or an infinity, or K is more than 131,072.
    """
    if x.shape[-1] > LONGEST_LINEAR:
        raise ArithmeticRefusal(f"a linear with {x.shape[-1]} inputs, of which {LONGEST_LINEAR} can be summed exactly")
    x_MK = x.reshape(-1, x.shape[-1])
    num_channels, device = len(weight.exponents), x.device
    bias_N = bias.double() if bias is not None else torch.zeros(num_channels, dtype=torch.float64, device=device)
    multiply = multiply_by_digits if weight.content.dtype == torch.int8 else multiply_by_float64
    if not len(x_MK):
        return x.new_empty(*x.shape[:-1], num_channels)
    out = multiply(x_MK, weight, bias_N)
    if len(weight.poor):
        out[:, weight.poor] = multiply_poor(x_MK, weight, bias_N).to(x.dtype)
    return out.view(*x.shape[:-1], num_channels)


def multiply_poor(x_MK: torch.Tensor, weight: Weight, bias_N: torch.Tensor) -> torch.Tensor:
    """Channels with a remainder: both products, added in float64, as float32 [M, S]."""
    left, left_exponents = round_rows(x_MK, LINEAR_BITS[0])
    low, low_exponents = round_rows(weight.remainder, LINEAR_BITS[1])
    scale = power_of_two(left_exponents.long() - sum(LINEAR_BITS)).unsqueeze(1)
    high = left @ weight.high.double().t() * scale * power_of_two(weight.exponents[weight.poor].long())
    rest = left @ low.t() * scale * power_of_two(low_exponents.long())
    return ((high + rest) + bias_N[weight.poor]).float()


def multiply_pairs(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [..., M, K] @ b [..., K, N], with the same leading dimensions; float32.

    Raises ArithmeticRefusal if one holds a NaN or an infinity.
    """
    leading, (rows, count), columns = a.shape[:-2], a.shape[-2:], b.shape[-1]
    if count == 1:  # positions times frequencies: their product has digits that no 20 bits hold
        return a.float() * b.float()
    a_BMK, b_BNK = a.reshape(-1, rows, count), b.transpose(-1, -2).reshape(-1, columns, count)
    out = torch.empty(len(a_BMK), rows, columns, device=a.device)
    step = max(1, WORKSPACE_BYTES // (8 * max(1, rows * columns, (rows + columns) * count)))
    for start in range(0, len(a_BMK), step):
        some = slice(start, start + step)
        out[some] = multiply_some(a_BMK[some], b_BNK[some])
    return out.view(*leading, rows, columns)


def multiply_some(a_BMK: torch.Tensor, b_BNK: torch.Tensor) -> torch.Tensor:
    """float32 [B, M, N]; parts of a long sum are added in float64."""
    num, rows, count = a_BMK.shape
    columns = b_BNK.shape[1]
    zeros = torch.zeros(columns, dtype=torch.float64, device=a_BMK.device)
    parts = []
    for start in range(0, count, LONGEST_PAIR):
        part = slice(start, start + LONGEST_PAIR)
        left, left_exponents = round_rows(a_BMK[..., part].reshape(num * rows, -1), PAIR_BITS[0])
        right, right_exponents = round_rows(b_BNK[..., part].reshape(num * columns, -1), PAIR_BITS[1])
        sums = torch.bmm(left.view(num, rows, -1), right.view(num, columns, -1).transpose(1, 2))
        exponents = right_exponents.view(num, columns)
        if count <= LONGEST_PAIR:
            done = finish(sums.view(num * rows, columns), sum(PAIR_BITS), left_exponents, exponents, zeros)
            return done.view(num, rows, columns)
        scale = power_of_two(left_exponents.long() - sum(PAIR_BITS)).view(num, rows, 1)
        parts.append(sums * scale * power_of_two(exponents.long()).unsqueeze(1))
    total = parts[0]
    for more in parts[1:]:
        total = total + more
    return total.float()
