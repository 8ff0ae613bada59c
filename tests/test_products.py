"""Matrix products are the integers that their definition says, however they are computed.

The references are made of Python's integers and fractions.
"""

from __future__ import annotations

import math
import os
import platform
import random
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from conftest import each_number_of_threads

from builder.arithmetic import loops, products
from builder.arithmetic.products import LINEAR_BITS, LONGEST_LINEAR, LONGEST_PAIR, PAIR_BITS, Weight, prepare_weight
from builder.errors import ArithmeticRefusal

CPU = torch.device("cpu")
BACKENDS: tuple[products.Backend, ...] = ("digits", "float64")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


# --- the definition, in Python's own numbers --------------------------------------------------------------------------


def find_exponent(row: Sequence[float]) -> int:
    """The smallest n with |x| < 2^n; 0 for zeros."""
    largest = max(abs(Fraction(x)) for x in row)
    if not largest:
        return 0
    n = math.frexp(float(largest))[1]
    assert Fraction(2) ** (n - 1) <= largest < Fraction(2) ** n
    return n


def to_integers(row: Sequence[float], bits: int) -> tuple[list[int], int]:
    n = find_exponent(row)
    return [round(Fraction(x) * Fraction(2) ** (bits - n)) for x in row], n  # round is to nearest, ties to even


def multiply_rows(left: Sequence[float], right: Sequence[float], bits: tuple[int, int]) -> Fraction:
    (a, m), (b, n) = to_integers(left, bits[0]), to_integers(right, bits[1])
    return sum(x * y for x, y in zip(a, b, strict=True)) * Fraction(2) ** (m + n - sum(bits))


def is_poor(row: Sequence[float]) -> bool:
    integers, n = to_integers(row, 14)
    exact = all(Fraction(i) * Fraction(2) ** (n - 14) == Fraction(x) for i, x in zip(integers, row, strict=True))
    return sum(map(abs, integers)) < 512 * len(row) and not exact


def multiply_channel(left: Sequence[float], row: Sequence[float]) -> float:
    """A product before the bias, float64: of a poor channel two products, added there."""
    high = multiply_rows(left, row, LINEAR_BITS)
    if not is_poor(row):
        return float(high)
    integers, n = to_integers(row, 14)
    taken = [Fraction(i) * Fraction(2) ** (n - 14) for i in integers]
    rest = [float(Fraction(x) - t) for x, t in zip(row, taken, strict=True)]
    assert all(Fraction(r) == Fraction(x) - t for r, x, t in zip(rest, row, taken, strict=True))
    return float(high) + float(multiply_rows(left, rest, LINEAR_BITS))


def define_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    left, right = x.double().tolist(), weight.double().tolist()
    added = [0.0] * len(right) if bias is None else bias.double().tolist()
    sums = [[multiply_channel(row, column) + b for column, b in zip(right, added, strict=True)] for row in left]
    return torch.tensor(sums, dtype=torch.float64).reshape(len(left), len(right)).float().to(x.dtype)


def define_pairs(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    left, right = a.double().tolist(), b.t().double().tolist()
    parts = range(0, a.shape[1], LONGEST_PAIR)
    sums = []
    for row in left:
        for column in right:
            total = 0.0
            for start in parts:
                some = slice(start, start + LONGEST_PAIR)
                total += float(multiply_rows(row[some], column[some], PAIR_BITS))
            sums.append(total)
    return torch.tensor(sums, dtype=torch.float64).reshape(a.shape[0], b.shape[1]).float()


def bits_of(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int16 if x.element_size() == 2 else torch.int32)


def assert_same_bits(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    assert torch.equal(bits_of(found + 0.0), bits_of(wanted + 0.0)), (found, wanted)


# --- operands ---------------------------------------------------------------------------------------------------------


def make(kind: str, shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Operands of one kind; every number is finite."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-(2**23), 2**23, shape, generator=generator).double() / 2**23
    limits = torch.finfo(dtype)
    powers = torch.randint(-20, 6, shape, generator=generator).double()
    made = {
        "even": values,
        "mixed": values * 2.0**powers,
        "small": values * limits.smallest_normal * 2,
        "subnormal": values.sign() * limits.smallest_normal / 2,
        "large": values.sign() * (limits.max if kind == "large" else 1.0),
        "powers": values.sign() * 2.0**powers,
        "outlier": values.where(torch.arange(shape[1]) != 1, 2000.0),
        "zeros": torch.zeros(shape, dtype=torch.float64).where(values > 0, -0.0),
        "mostly zero": values.where(powers > 3, 0.0),
    }[kind]
    return made.to(dtype)


KINDS = ("even", "mixed", "small", "subnormal", "powers", "outlier", "zeros", "mostly zero")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [*KINDS, "large"])
def test_rows_become_the_integers_of_the_definition(dtype: torch.dtype, kind: str) -> None:
    x = make(kind, (5, 37), dtype)
    for bits in (*LINEAR_BITS, *PAIR_BITS):
        wanted = [to_integers(row, bits) for row in x.double().tolist()]
        for found in (products.round_rows(x, bits), products.round_rows_anywhere(x, bits)):
            assert found[0].long().tolist() == [integers for integers, _ in wanted]
            assert found[1].tolist() == [n for _, n in wanted]
            assert (found[0].dtype, found[1].dtype) == (torch.float64, torch.int32)


def test_ties_are_rounded_to_even_and_every_power_of_two_is_below_its_scale() -> None:
    x = torch.tensor([[2.0**22, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5 + 2**-20]])
    found, exponents = products.round_rows(x / 2, 22)
    assert exponents.tolist() == [22], "2^21 is not below 2^21"
    assert found.tolist() == [[2.0**21, 0, 1, 1, 0, -1, -1, 2]], "the scale is 1: halves of these numbers"
    assert products.round_rows(torch.tensor([[1.0, 2.5 * 2**-22]]), 23)[0].tolist() == [[2.0**22, 2]]
    largest = torch.tensor([[torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max]])
    assert products.round_rows(largest, 22)[0].tolist() == [[2.0**22, -(2.0**22)]], "rounded up to the bound itself"


def test_digits_put_together_are_the_integer() -> None:
    some = [0, 1, -1, 127, 128, -128, -129, 32767, 32768, -32768, -32769, 2**22, -(2**22), 2**22 - 1]
    integers = torch.tensor([[*some, *random.Random(0).choices(range(-(2**22), 2**22 + 1), k=1000)]])
    digits = products.cut_anywhere(integers.double(), 3).to(torch.int64)
    assert digits.shape == (1, 3, integers.shape[1])
    assert torch.equal(digits[:, 0] + 256 * digits[:, 1] + 65536 * digits[:, 2], integers)
    looped = torch.empty(integers.shape[1], dtype=torch.int8)
    for digit in range(3):
        loops.cut_row(integers[0].int().numpy(), digit, looped.numpy())
        assert torch.equal(looped.to(torch.int64), digits[0, digit])


def test_rows_cut_by_loops_are_rows_cut_by_torch() -> None:
    for kind in KINDS:
        x = make(kind, (7, 61), torch.bfloat16, seed=3)
        digits, exponents = products.cut_rows(x)
        integers, wanted = products.round_rows_anywhere(x, LINEAR_BITS[0])
        assert torch.equal(digits, products.cut_anywhere(integers, 3).flip(1)) and torch.equal(exponents, wanted)


def test_digits_of_a_weight_are_those_of_its_integers() -> None:
    weight = make("mixed", (9, 45), torch.bfloat16)
    by_digits, wide = prepare_weight(weight, "digits"), prepare_weight(weight, "float64")
    assert by_digits.content.dtype == torch.int8 and wide.content.dtype == torch.int16
    assert torch.equal(by_digits.content, products.cut_anywhere(wide.content.double(), 2))
    assert torch.equal(by_digits.exponents, wide.exponents)


# --- linears ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_linear_is_what_integers_say(kind: str, dtype: torch.dtype, backend: products.Backend) -> None:
    for seed, other in enumerate(("even", "mixed", kind)):
        x, weight = make(kind, (3, 41), dtype, seed), make(other, (7, 41), dtype, seed + 100)
        bias = make("even", (1, 7), dtype, seed)[0] if seed % 2 else None
        found = products.linear(x, prepare_weight(weight, backend), bias)
        assert_same_bits(found, define_linear(x, weight, bias))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_linear_of_the_largest_float32_numbers_overflows_as_float32_does(backend: products.Backend) -> None:
    x, weight = make("large", (2, 8), torch.float32), torch.ones(3, 8)
    found = products.linear(x.abs(), prepare_weight(weight, backend), None)
    assert found.tolist() == [[math.inf] * 3] * 2
    kept = products.linear(x.abs(), prepare_weight(weight / 16, backend), None)
    assert_same_bits(kept, define_linear(x.abs(), weight / 16, None))


@pytest.mark.parametrize(
    ("rows", "count", "columns"), [(1, 1, 1), (1, 255, 3), (17, 64, 65), (33, 3, 130), (2, 1000, 1)]
)
def test_both_backends_agree_on_every_shape(rows: int, count: int, columns: int) -> None:
    x, weight = make("mixed", (rows, count), torch.bfloat16), make("mixed", (columns, count), torch.bfloat16, 1)
    by_digits, wide = (products.linear(x, prepare_weight(weight, backend), None) for backend in BACKENDS)
    assert_same_bits(by_digits, wide)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_longest_sum_of_the_largest_integers_is_exact(backend: products.Backend) -> None:
    """131,072 products of 2^22 and 2^14 are 2^53 in all; with one number one less, it is an odd one just below."""
    largest = torch.finfo(torch.float32).max
    x, weight = torch.full((3, LONGEST_LINEAR), largest), torch.full((2, LONGEST_LINEAR), largest)
    x[1, 5], weight[1, ::2] = -largest, -largest
    x[2, 77] = (2**22 - 1) * 2.0**106  # the integer 2^22 - 1
    x = x * 2.0**-128
    weight = weight * 2.0**-128
    sums = [[2**53, 0], [2**53 - 2**37, -(2**37)], [2**53 - 2**14, -(2**14)]]
    found = products.linear(x, prepare_weight(weight, backend), None)
    assert found.tolist() == [[float(torch.tensor(s * 2.0**-36).float()) for s in row] for row in sums]
    exact = products.sum_digits(prepare_weight(weight, "digits").content, products.cut_rows(x)[0])
    assert exact.t().tolist() == [[float(s) for s in row] for row in sums]


def test_a_longer_linear_is_refused() -> None:
    weight = prepare_weight(torch.ones(1, LONGEST_LINEAR + 1, dtype=torch.bfloat16))
    with pytest.raises(ArithmeticRefusal, match="a linear with 131073 inputs, of which 131072 can be summed exactly"):
        products.linear(torch.ones(1, LONGEST_LINEAR + 1, dtype=torch.bfloat16), weight, None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ratio", [256.0, 2000.0])
def test_a_weight_that_dwarfs_its_channel_costs_the_others_no_digits(ratio: float, backend: products.Backend) -> None:
    x, weight = make("even", (8, 512), torch.bfloat16).float(), make("even", (16, 512), torch.bfloat16, 1)
    weight[:, 7] = weight.abs().amax() * ratio
    x[:, 7] = 0
    exact = x.double() @ weight.double().t()
    prepared = prepare_weight(weight, backend)
    assert len(prepared.poor) == 16 and prepared.remainder.shape == (16, 512)
    error = (products.linear(x, prepared, None) - exact).norm() / exact.norm()
    assert error < 1e-4
    bare = Weight(prepared.content, prepared.exponents, prepared.poor[:0], prepared.high[:0], prepared.remainder[:0])
    without = (products.linear(x, bare, None) - exact).norm() / exact.norm()
    assert without > 3e-3, "it is the remainder that does it"


def test_channels_without_such_a_weight_have_no_remainder() -> None:
    weight = make("even", (64, 300), torch.bfloat16)
    assert len(prepare_weight(weight).poor) == 0
    assert len(prepare_weight(torch.eye(64, 2048, dtype=torch.bfloat16)).poor) == 0, "small on average, and yet exact"


@pytest.mark.parametrize("backend", BACKENDS)
def test_channels_with_a_remainder_are_what_integers_say(backend: products.Backend) -> None:
    for dtype in DTYPES:
        x, weight = make("mixed", (3, 64), dtype), make("even", (5, 64), dtype, 1)
        weight[1, 3], weight[4, 60] = 300.0, -2000.0
        prepared = prepare_weight(weight, backend)
        assert prepared.poor.tolist() == [n for n, row in enumerate(weight.double().tolist()) if is_poor(row)] == [1, 4]
        bias = make("even", (1, 5), dtype, 2)[0]
        assert_same_bits(products.linear(x, prepared, bias), define_linear(x, weight, bias))


def test_rows_may_be_taken_together_or_one_by_one() -> None:
    x, weight = make("mixed", (50, 96), torch.bfloat16), make("mixed", (33, 96), torch.bfloat16, 1)
    for backend in BACKENDS:
        prepared = prepare_weight(weight, backend)
        together = products.linear(x, prepared, None)
        assert_same_bits(torch.cat([products.linear(row[None], prepared, None) for row in x]), together)
        assert_same_bits(products.linear(x.view(2, 5, 5, 96), prepared, None).view(50, 33), together)
        assert products.linear(x[:0], prepared, None).shape == (0, 33)


def test_little_memory_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = make("mixed", (70, 96), torch.bfloat16), make("mixed", (150, 96), torch.bfloat16, 1)
    a, b = make("mixed", (70, 96), torch.bfloat16).view(7, 10, 96), make("mixed", (70, 96), torch.bfloat16, 1)
    wanted = [products.linear(x, prepare_weight(weight, backend), None) for backend in BACKENDS]
    pairs = products.multiply_pairs(a, b.view(7, 10, 96).transpose(1, 2))
    monkeypatch.setattr(products, "WORKSPACE_BYTES", 1024)
    for backend, other in zip(BACKENDS, wanted, strict=True):
        assert_same_bits(products.linear(x, prepare_weight(weight, backend), None), other)
    assert_same_bits(products.multiply_pairs(a, b.view(7, 10, 96).transpose(1, 2)), pairs)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_operands_that_are_not_finite_are_refused(bad: float, backend: products.Backend) -> None:
    good, wrong = torch.ones(3, 8), torch.ones(3, 8)
    wrong[1, 2] = bad
    prepared = prepare_weight(good, backend)
    for action in (
        lambda: products.linear(wrong, prepared, None),
        lambda: prepare_weight(wrong, backend),
        lambda: products.multiply_pairs(wrong, good.t()),
        lambda: products.multiply_pairs(good, wrong.t()),
        lambda: products.round_rows_anywhere(wrong, 22),
    ):
        with pytest.raises(ArithmeticRefusal, match="holds a NaN or an infinity"):
            action()


# --- products of activations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_of_activations_is_what_integers_say(kind: str, dtype: torch.dtype) -> None:
    for seed, other in enumerate(("even", "mixed", kind)):
        a, b = make(kind, (3, 29), dtype, seed), make(other, (5, 29), dtype, seed + 50).t()
        assert_same_bits(products.multiply_pairs(a, b), define_pairs(a, b))


def test_each_matrix_of_many_is_multiplied_by_itself() -> None:
    a = torch.stack([make(kind, (4, 23), torch.bfloat16) for kind in KINDS])
    b = torch.stack([make(kind, (6, 23), torch.bfloat16, 1) for kind in reversed(KINDS)]).transpose(1, 2)
    found = products.multiply_pairs(a, b)
    for one, left, right in zip(found, a, b, strict=True):
        assert_same_bits(one, define_pairs(left, right))
    assert_same_bits(products.multiply_pairs(a.view(2, 4, 4, 23), b.reshape(2, 4, 23, 6)).view(-1, 4, 6), found)


def test_a_long_product_is_cut_and_its_parts_are_added_in_order() -> None:
    count = 2 * LONGEST_PAIR + 7
    for kind, other in (("even", "mixed"), ("outlier", "even")):
        a, b = make(kind, (2, count), torch.bfloat16), make(other, (2, count), torch.bfloat16, 1).t()
        assert_same_bits(products.multiply_pairs(a, b), define_pairs(a, b))
    largest = torch.full((2, LONGEST_PAIR), torch.finfo(torch.float32).max) * 2.0**-128
    assert products.multiply_pairs(largest, largest.t()).tolist() == [[2.0**14] * 2] * 2, "2^53 times 2^-39"


def test_positions_times_frequencies_are_multiplied_in_float32() -> None:
    positions = torch.tensor([0.0, 1.0, 16_385.0, 131_071.0, 1_048_575.0])[None, None]
    frequencies = torch.tensor([1.0, 0.7498942, 1.6333e-4])[None, :, None]
    found = products.multiply_pairs(frequencies, positions)[0]
    wanted = [[float(torch.tensor(float(f) * float(p)).float()) for p in positions.flatten()] for f in frequencies[0]]
    assert found.tolist() == wanted, "a product of two float32 numbers is exact in float64"
    assert found[0].tolist() == positions.flatten().tolist()


# --- what is done elsewhere than on the CPU ---------------------------------------------------------------------------


def test_integers_are_scaled_back_by_torch_as_by_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    sums = torch.randint(-(2**53), 2**53, (12, 9), generator=generator).double()
    sums[0] = 0
    bias = make("mixed", (1, 9), torch.float32)[0].double()
    for low, high in ((-60, 60), (-148, -100), (100, 128)):
        left = torch.randint(low, high + 1, (12,), generator=generator).int()
        right = torch.randint(low, high + 1, (1, 9), generator=generator).int()
        found = products.finish(sums, 36, left, right, bias)
        assert torch.equal(found, products.scale_back(sums, 36, left, right[0], bias))
        for row, column in ((0, 0), (3, 4), (11, 8)):
            exact = Fraction(int(sums[row, column])) * Fraction(2) ** int(left[row] + right[0, column] - 36)
            rounded = torch.tensor(float(exact) + float(bias[column]), dtype=torch.float64).float()
            assert torch.equal(found[row, column], rounded)
    several = torch.randint(-9, 9, (3, 9), generator=generator).int()
    wanted = products.scale_back(sums, 36, left, several.repeat_interleave(4, 0), bias)
    assert torch.equal(products.finish(sums, 36, left, several, bias), wanted), "rows of three matrices"


@pytest.mark.parametrize(("rows", "count", "columns"), [(1, 5, 3), (16, 8, 8), (17, 9, 7), (40, 130, 33)])
def test_what_cuda_is_given_besides_changes_no_product(rows: int, count: int, columns: int) -> None:
    left = torch.randint(-128, 128, (rows, count)).to(torch.int8)
    right = torch.randint(-128, 128, (columns, count)).to(torch.int8)
    padded_left, padded_right = products.pad_for_cuda(left, right)
    assert padded_left.shape[0] > 16 and padded_left.shape[1] % 8 == padded_right.shape[0] % 8 == 0
    assert padded_left.shape[1] == padded_right.shape[1]
    wide = padded_left.double() @ padded_right.double().t()
    assert torch.equal(wide[:rows, :columns], left.double() @ right.double().t())


def test_a_linear_of_torch_operations_alone_is_the_same() -> None:
    """What runs on a GPU, run here: rows rounded and cut, digits summed in int64, integers scaled back."""
    x, weight = make("mixed", (19, 77), torch.bfloat16), make("mixed", (11, 77), torch.bfloat16, 1)
    bias = make("even", (1, 11), torch.bfloat16)[0].double()
    integers, left = products.round_rows_anywhere(x, LINEAR_BITS[0])
    columns, right = products.round_rows_anywhere(weight, LINEAR_BITS[1])
    sums = products.sum_digits(products.cut_anywhere(columns, 2), products.cut_anywhere(integers, 3).flip(1)).t()
    assert torch.equal(sums, integers @ columns.t())
    found = products.scale_back(sums, sum(LINEAR_BITS), left, right, bias).to(x.dtype)
    prepared = prepare_weight(weight)
    for n in range(11):  # channels with a remainder apart
        if n not in prepared.poor.tolist():
            assert_same_bits(found[:, n], products.linear(x, prepared, bias)[:, n])


# --- threads and processors -------------------------------------------------------------------------------------------


def test_products_are_the_same_with_one_thread_and_with_two() -> None:
    x, weight = make("mixed", (64, 300), torch.bfloat16), make("mixed", (90, 300), torch.bfloat16, 1)
    results = []
    for _ in each_number_of_threads():
        some = [products.linear(x, prepare_weight(weight, backend), None) for backend in BACKENDS]
        results.append([*some, products.multiply_pairs(x, weight.t())])
    for one, two in zip(*results, strict=True):
        assert_same_bits(one, two)


def test_a_chosen_backend_is_used_meanwhile() -> None:
    weight = torch.ones(2, 4)
    for backend, dtype in (("digits", torch.int8), ("float64", torch.int16)):
        with products.use_backend(backend):  # type: ignore[arg-type]
            assert prepare_weight(weight).content.dtype == dtype
    assert not products.CHOSEN


PROBE = """
import hashlib

import torch
from builder.arithmetic import products

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
wrong = []
for rows in (1, 3, 17, 300):
    for count in (4, 7, 64, 255, 1024, 2049):
        for columns in (1, 8, 33):
            for kind in ("extreme", "random", "largest", "mixed"):
                left, right = (
                    torch.randint(-128, 128, (size, count), generator=generator) for size in (rows, columns)
                )
                if kind in ("extreme", "mixed"):
                    left = torch.where(left < 0, -128, 127)
                if kind in ("extreme", "mixed"):
                    right = torch.where(right < 0, -128, 127)
                if kind == "mixed":
                    left = torch.where(torch.randint(0, 3, left.shape, generator=generator) > 0, left, 0)
                if kind == "largest":
                    left, right = torch.full_like(left, -128), torch.full_like(right, -128)
                found = products.multiply_int8(left.to(torch.int8), right.to(torch.int8))
                if not torch.equal(found.double(), left.double() @ right.double().t()):
                    wrong.append((rows, count, columns, kind))
generator = torch.Generator().manual_seed(1)
x, weight = (torch.randint(-99, 99, (size, 70), generator=generator).bfloat16() / 7 for size in (9, 21))
same = products.linear(x, products.prepare_weight(weight), None)
wide = products.linear(x, products.prepare_weight(weight, "float64"), None)
assert torch.equal(same, wide), "what was chosen is right"
print(products.multiplies_extremes(torch.device("cpu")), len(wrong), wrong[:3], sep="|")
print(hashlib.sha256(same.view(torch.int16).numpy().tobytes()).hexdigest())
"""


LESSER: tuple[dict[str, str], ...] = (
    {},
    {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "ATEN_CPU_CAPABILITY": "avx2", "NUMBA_CPU_NAME": "haswell"},
    {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "default", "NUMBA_CPU_NAME": "x86-64"},
)


def run_limited(limits: dict[str, str]) -> tuple[bool, int, str]:
    """On a processor that is made to look like a lesser one: what the self-test says, wrong products, a digest."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_CPU_FEATURES": "", **limits}
    if not limits:
        del environment["NUMBA_CPU_FEATURES"]
    done = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fields = done.stdout.splitlines()[0].split("|")
    return fields[0] == "True", int(fields[1]), done.stdout.split()[-1]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only there a processor can be made to look like a lesser")
def test_the_self_test_tells_processors_that_multiply_digits_exactly_from_those_that_do_not() -> None:
    digests = set()
    for limits in LESSER:
        is_exact, num_wrong, digest = run_limited(limits)
        assert num_wrong == 0 if is_exact else num_wrong > 0, limits
        digests.add(digest)
    assert len(digests) == 1, "and yet a linear is the same on all of them"
