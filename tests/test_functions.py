"""Functions against mpmath, which has as many digits as are asked for: how far off they are, how they are rounded."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import mpmath
import numpy as np
import pytest
import torch

from builder.arithmetic import functions, loops
from builder.arithmetic.exact import arithmetic
from builder.errors import ArithmeticRefusal

Reference = Callable[[Any], Any]

DIGITS = 400  # bits; enough for what is left of 1 + tanh(-40)
INF, NAN = math.inf, math.nan


def sigmoid(x: Any) -> Any:
    return 1 / (1 + mpmath.exp(-x))


def gelu(x: Any) -> Any:
    return x * mpmath.erfc(-x / mpmath.sqrt(2)) / 2


def gelu_tanh(x: Any) -> Any:
    z = mpmath.sqrt(2 / mpmath.pi) * (x + mpmath.mpf("0.044715") * x**3)
    return x * (1 + mpmath.tanh(z)) / 2


# Name, function, reference, the largest magnitudes of its operands below and above zero, and how many units in the last
# place of float64 it may be off. The references are right to hundreds of digits.
FUNCTIONS: list[tuple[str, functions.Function, Reference, float, float, float]] = [
    ("exp", functions.exp, mpmath.exp, 708, 709, 1.5),
    ("expm1", functions.expm1, mpmath.expm1, 708, 709, 4),
    ("log", functions.log, mpmath.log, 0, 1.7e308, 3),
    ("log1p", functions.log1p, mpmath.log1p, 0.999, 1e30, 4),
    ("rsqrt", functions.reciprocal_root, lambda x: 1 / mpmath.sqrt(x), 0, 1e300, 2),
    ("sigmoid", functions.sigmoid, sigmoid, 700, 700, 3),
    ("silu", functions.silu, lambda x: x * sigmoid(x), 700, 700, 4),
    ("tanh", functions.tanh, mpmath.tanh, 1e3, 1e3, 4),
    ("softplus", functions.softplus, lambda x: mpmath.log1p(mpmath.exp(x)), 700, 20, 4),
    ("erf", functions.erf, mpmath.erf, 1e3, 1e3, 10),
    ("sin", functions.sine, mpmath.sin, 2.0**20, 2.0**20, 3),
    ("cos", functions.cosine, mpmath.cos, 2.0**20, 2.0**20, 3),
    ("gelu", functions.gelu, gelu, 13, 1e3, 1000),
    ("gelu_tanh", functions.gelu_tanh, gelu_tanh, 10, 1e3, 100),
]
TABULATED = [(name, function) for name, function, *_ in FUNCTIONS if name not in ("sin", "cos")]
IDS = [row[0] for row in FUNCTIONS]


def choose_operands(low: float, high: float, count: int, seed: int = 0) -> list[float]:
    """Numbers of all magnitudes and, as many, near 1, of both signs where both are in the domain."""
    chance = random.Random(seed)
    made = []
    for limit, sign in ((low, -1.0), (high, 1.0)):
        if limit:
            made += [sign * limit * 2.0 ** chance.uniform(-60, 0) for _ in range(count)]
            made += [sign * chance.uniform(0, min(limit, 8)) for _ in range(count)]
            made += [sign * chance.uniform(0, limit) for _ in range(count)]
    return [x for x in made if x]


def refer(reference: Reference, operands: Sequence[float]) -> list[Any]:
    with mpmath.workprec(DIGITS):
        return [reference(mpmath.mpf(x)) for x in operands]


def round_to(value: Any, bits: int) -> float:
    """The nearest number of so many bits, ties to even, whatever its exponent."""
    with mpmath.workprec(bits):
        return float(+value)


@pytest.mark.parametrize(("name", "function", "reference", "low", "high", "limit"), FUNCTIONS, ids=IDS)
def test_errors_are_a_few_units_in_the_last_place_of_float64(
    name: str, function: functions.Function, reference: Reference, low: float, high: float, limit: float
) -> None:
    operands = choose_operands(low, high, 400)
    if name in ("sin", "cos"):
        operands += [k * math.pi / 2 for k in range(1, 600)] + [float(k) for k in range(600)]
    if name in ("log", "log1p"):
        operands += [1 + 2.0**-k for k in range(1, 53)]
    found = function(torch.tensor(operands, dtype=torch.float64)).tolist()
    with mpmath.workprec(DIGITS):
        for x, value, wanted in zip(operands, found, refer(reference, operands), strict=True):
            if abs(wanted) >= 2.0**-1022:
                assert abs(value - wanted) <= limit * math.ulp(float(wanted)), (x, value)


@pytest.mark.parametrize(("name", "function", "reference", "low", "high", "limit"), FUNCTIONS, ids=IDS)
def test_float32_results_are_the_true_ones_rounded(
    name: str, function: functions.Function, reference: Reference, low: float, high: float, limit: float
) -> None:
    operands = torch.tensor(choose_operands(min(low, 80), min(high, 1e30), 300), dtype=torch.float64).float()
    operands = operands[operands.abs() > 2.0**-126]
    found = functions.through_float64(function, operands).tolist()
    wanted = refer(reference, operands.double().tolist())
    normal = [(f, w) for f, w in zip(found, wanted, strict=True) if 2.0**-126 <= abs(w) < 2.0**127]
    assert len(normal) > 500
    assert [f for f, _ in normal] == [round_to(w, 24) for _, w in normal]


@pytest.mark.parametrize(("name", "function"), TABULATED, ids=[name for name, _ in TABULATED])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tables_hold_every_16_bit_number(name: str, function: functions.Function, dtype: torch.dtype) -> None:
    every = torch.arange(-32768, 32768).to(torch.int16).view(dtype)
    found, wanted = functions.apply(name, function, every), functions.through_float64(function, every)
    assert found.dtype == dtype and len(found) == 65536
    assert torch.equal(found.view(torch.int16), wanted.view(torch.int16))
    shaped = every.view(64, 1024).t()  # not contiguous
    assert torch.equal(
        functions.apply(name, function, shaped).view(torch.int16), wanted.view(64, 1024).t().view(torch.int16)
    )
    assert functions.apply(name, function, every[5]).shape == ()
    table = functions.TABLES[name, dtype]
    other = table.view(torch.int16)[every.view(torch.int16).to(torch.int32).bitwise_and(0xFFFF)]  # as on a GPU
    assert torch.equal(other, wanted.view(torch.int16))


@pytest.mark.parametrize(("name", "function", "reference", "low", "high", "limit"), FUNCTIONS, ids=IDS)
def test_bfloat16_results_are_the_true_ones_rounded_but_for_a_few_rounded_twice(
    name: str, function: functions.Function, reference: Reference, low: float, high: float, limit: float
) -> None:
    every = torch.arange(0, 65536, 17).to(torch.int16).view(torch.bfloat16)
    wide = every.double()
    every = every[(wide >= -min(low, 80)) & (wide <= min(high, 1e30)) & (wide.abs() > 2.0**-126)]
    found = functions.through_float64(function, every).tolist()
    wanted = refer(reference, every.double().tolist())
    normal = [(f, w) for f, w in zip(found, wanted, strict=True) if 2.0**-126 <= abs(w) < 2.0**127]
    assert len(normal) > 500
    assert sum(f != round_to(w, 8) for f, w in normal) <= 1, "a tie of float32 in one of 65,536 or so"


# --- special operands -------------------------------------------------------------------------------------------------

LARGEST, TINY = 1.7976931348623157e308, 5e-324
SPECIALS: dict[str, list[tuple[float, float]]] = {
    "exp": [
        (INF, INF),
        (-INF, 0),
        (0.0, 1),
        (-0.0, 1),
        (NAN, NAN),
        (TINY, 1),
        (LARGEST, INF),
        (-LARGEST, 0),
        (709.5, INF),
        (-708.2, 0),
    ],
    "expm1": [
        (INF, INF),
        (-INF, -1),
        (0.0, 0.0),
        (-0.0, -0.0),
        (NAN, NAN),
        (TINY, TINY),
        (LARGEST, INF),
        (-LARGEST, -1),
    ],
    "log": [
        (INF, INF),
        (-INF, NAN),
        (0.0, -INF),
        (-0.0, -INF),
        (NAN, NAN),
        (TINY, -744.4400719213812),
        (-1.0, NAN),
        (1.0, 0.0),
        (LARGEST, 709.782712893384),
        (-LARGEST, NAN),
        (2.0**-149, -103.27892990343184),
        (2.0**1023, 709.0895657128241),
    ],
    "log1p": [
        (INF, INF),
        (-INF, NAN),
        (0.0, 0.0),
        (-0.0, -0.0),
        (NAN, NAN),
        (TINY, TINY),
        (-1.0, -INF),
        (-1.5, NAN),
        (LARGEST, 709.782712893384),
    ],
    "rsqrt": [(INF, 0), (-INF, NAN), (0.0, INF), (-0.0, -INF), (NAN, NAN), (TINY, 4.498914e161), (-1.0, NAN)],
    "sigmoid": [(INF, 1), (-INF, 0), (0.0, 0.5), (-0.0, 0.5), (NAN, NAN), (TINY, 0.5), (LARGEST, 1), (-LARGEST, 0)],
    "silu": [(INF, INF), (0.0, 0.0), (-0.0, -0.0), (NAN, NAN), (LARGEST, LARGEST), (-LARGEST, -0.0)],
    "tanh": [
        (INF, 1),
        (-INF, -1),
        (0.0, 0.0),
        (-0.0, -0.0),
        (NAN, NAN),
        (TINY, TINY),
        (-TINY, -TINY),
        (LARGEST, 1),
        (-LARGEST, -1),
    ],
    "softplus": [
        (INF, INF),
        (-INF, 0),
        (0.0, math.log(2)),
        (NAN, NAN),
        (LARGEST, LARGEST),
        (-LARGEST, 0),
        (20.5, 20.5),
    ],
    "erf": [(INF, 1), (-INF, -1), (0.0, 0.0), (-0.0, -0.0), (NAN, NAN), (LARGEST, 1), (-LARGEST, -1)],
    "sin": [(0.0, 0.0), (-0.0, -0.0), (TINY, TINY), (-TINY, -TINY)],
    "cos": [(0.0, 1), (-0.0, 1), (TINY, 1)],
    "gelu": [(INF, INF), (0.0, 0.0), (-0.0, -0.0), (NAN, NAN), (LARGEST, LARGEST), (-LARGEST, -0.0)],
    "gelu_tanh": [(0.0, 0.0), (-0.0, -0.0), (NAN, NAN), (1e30, 1e30), (-1e30, -0.0)],
}


@pytest.mark.parametrize(("name", "function"), [(row[0], row[1]) for row in FUNCTIONS], ids=IDS)
def test_special_operands_have_the_results_that_ieee_754_recommends(name: str, function: functions.Function) -> None:
    for x, wanted in SPECIALS[name]:
        (found,) = function(torch.tensor([x], dtype=torch.float64)).tolist()
        if math.isnan(wanted):
            assert math.isnan(found), x
        else:
            assert math.isclose(found, wanted, rel_tol=1e-6), x
            assert math.copysign(1, found) == math.copysign(1, wanted), x


@pytest.mark.parametrize(("name", "function"), [(row[0], row[1]) for row in FUNCTIONS], ids=IDS)
def test_operands_are_not_modified_and_neither_number_nor_place_matters(
    name: str, function: functions.Function
) -> None:
    x = torch.tensor([0.1, 0.7, 1.3, 2.5, 7.25, 11.0, 0.9] * 9, dtype=torch.float64)
    before, whole = x.clone(), function(x)
    assert torch.equal(x, before)
    assert torch.equal(torch.cat([function(one) for one in x.split(1)]), whole)
    assert torch.equal(function(x[1::2]), whole[1::2])
    assert function(x[:0]).shape == (0,)


@pytest.mark.parametrize("angle", [2.0**20 + 1, -(2.0**21), INF, NAN])
def test_angles_whose_reduction_would_lose_digits_are_refused(angle: float) -> None:
    for function in (functions.sine, functions.cosine):
        with pytest.raises(ArithmeticRefusal, match="an angle beyond 1048576, or none at all, in sin or cos"):
            function(torch.tensor([0.0, angle], dtype=torch.float64))


def test_the_tail_of_gelu_keeps_its_digits() -> None:
    """1 + erf would be left with none of them at -8."""
    x = torch.linspace(-12, -2, 201, dtype=torch.float64)
    for function, reference in ((functions.gelu, gelu), (functions.gelu_tanh, gelu_tanh)):
        wanted = refer(reference, x.tolist())
        for found, true in zip(function(x).tolist(), wanted, strict=True):
            assert math.isclose(found, float(true), rel_tol=1e-12)


def test_powers_are_right_to_float32() -> None:
    chance = random.Random(0)
    bases = [chance.choice((1.0, 500.0, 1e6)) * chance.uniform(0.01, 1) for _ in range(500)] + [10000.0, 1e6, 0.0, 2.0]
    exponents = [chance.uniform(-3, 3) for _ in range(500)] + [0.25, 63 / 64, 1.5, 0.0]
    found = functions.power(*(torch.tensor(values, dtype=torch.float64) for values in (bases, exponents)))
    with mpmath.workprec(DIGITS):
        wanted = [mpmath.mpf(base) ** mpmath.mpf(exponent) for base, exponent in zip(bases, exponents, strict=True)]
    assert found.float().tolist() == [round_to(value, 24) for value in wanted]


# --- from bits --------------------------------------------------------------------------------------------------------


def test_powers_of_two_are_made_of_their_bits() -> None:
    exponents = torch.arange(-1022, 1024)
    assert functions.power_of_two(exponents).tolist() == [2.0**n for n in range(-1022, 1024)]
    assert [loops.power_of_two(n) for n in range(-1022, 1024)] == [2.0**n for n in range(-1022, 1024)]


def test_exponents_are_the_smallest_that_a_number_is_below() -> None:
    magnitudes = [2.0**n for n in range(-1022, 1024)] + [math.nextafter(2.0**n, 0) for n in range(-1021, 1024)]
    found = functions.exponent_of(torch.tensor([*magnitudes, 0.0], dtype=torch.float64)).tolist()
    assert found == [math.frexp(m)[1] for m in magnitudes] + [0]


# --- twins ------------------------------------------------------------------------------------------------------------


def test_the_compiled_exponential_has_the_bits_of_the_one_in_torch() -> None:
    chance = random.Random(0)
    operands = [chance.uniform(-720, 720) for _ in range(20_000)] + [chance.uniform(-2, 2) for _ in range(20_000)]
    operands += [INF, -INF, NAN, 0.0, -0.0, TINY, LARGEST, -LARGEST, -708.0, 709.0, math.nextafter(709.0, 1e3)]
    looped = np.array([loops.exp(x) for x in operands])
    whole = functions.exp(torch.tensor(operands, dtype=torch.float64)).numpy()
    same = (looped.view(np.int64) == whole.view(np.int64)) | (np.isnan(looped) & np.isnan(whole))
    assert same.all()


@pytest.mark.parametrize("name", ["exp", "log", "sigmoid", "silu", "tanh", "rsqrt", "expm1", "log1p", "erf", "gelu"])
def test_torch_operations_of_these_names_become_these_functions(name: str) -> None:
    operation = getattr(torch, name, None) or getattr(torch.nn.functional, name)
    function = {row[0]: row[1] for row in FUNCTIONS}[name]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.tensor([0.25, 1.0, 3.5, 0.3], dtype=torch.float64).to(dtype)
        with arithmetic():
            found = operation(x)
        assert found.dtype == dtype and torch.equal(found, function(x.double()).float().to(dtype))
        torch.testing.assert_close(found, operation(x))
