"""Sums by a fixed tree: the reference is the tree itself in Python's floats, and fractions for how far off it is."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from conftest import each_number_of_threads

from builder.arithmetic import functions, sums

LENGTHS = (1, 2, 3, 5, 8, 31, 64, 65, 1000)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def add_by_halves(values: Sequence[float]) -> float:
    """The definition, for one row."""
    length = 1
    while length < len(values):
        length *= 2
    row = [*values, *[0.0] * (length - len(values))]
    while len(row) > 1:
        half = len(row) // 2
        row = [first + second for first, second in zip(row[:half], row[half:], strict=True)]
    return row[0]


def make_rows(num_rows: int, count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    chance = random.Random(seed)
    values = [[chance.uniform(-1, 1) * 2.0 ** chance.uniform(-8, 8) for _ in range(count)] for _ in range(num_rows)]
    return torch.tensor(values, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", LENGTHS)
def test_a_row_is_summed_by_halves(count: int, dtype: torch.dtype) -> None:
    x = make_rows(7, count, dtype)
    wanted = [add_by_halves(row) for row in x.double().tolist()]
    assert sums.sum_last(x).tolist() == wanted
    assert sums.sum_by_halves(x.double()).tolist() == wanted, "in torch operations, as on a GPU"
    for row, total in zip(x.double().tolist(), wanted, strict=True):
        exact, size = sum(map(Fraction, row)), sum(abs(Fraction(v)) for v in row)
        assert abs(Fraction(total) - exact) <= size * Fraction(2) ** -53 * math.ceil(
            math.log2(count) if count > 1 else 0
        )


def test_sums_over_dimensions_are_sums_over_rows() -> None:
    x = make_rows(6, 20).view(2, 3, 4, 5)
    for dims in ([0], [-1], [1, 3], [3, 1], [0, 1, 2, 3], [-2, 0]):
        over = sorted(dim % 4 for dim in dims)
        left = [dim for dim in range(4) if dim not in over]
        rows = x.permute(*left, *over).reshape(-1, math.prod(x.shape[dim] for dim in over))
        wanted = torch.tensor([add_by_halves(row) for row in rows.double().tolist()], dtype=torch.float64)
        assert torch.equal(sums.sum_over(x, dims, False).flatten(), wanted)
        assert sums.sum_over(x, dims, False).shape == x.sum(dims).shape
        assert sums.sum_over(x, dims, True).shape == x.sum(dims, keepdim=True).shape
    for dims in (None, []):
        assert sums.sum_over(x, dims, False).item() == add_by_halves(x.flatten().double().tolist())
    assert sums.sum_over(torch.tensor(2.5), None, False).item() == 2.5
    assert sums.sum_over(torch.zeros(3, 0), [1], False).tolist() == [0, 0, 0], "a sum of nothing"


@pytest.mark.parametrize("count", LENGTHS[1:])
def test_means_and_variances_are_right_to_float32(count: int) -> None:
    x = make_rows(5, count)
    means, variances = sums.mean_over(x, [1], False), sums.variance_over(x, [1], False, 1)
    for row, mean, variance in zip(x.double().tolist(), means.tolist(), variances.tolist(), strict=True):
        true = sum(map(Fraction, row)) / count
        spread = sum((Fraction(v) - true) ** 2 for v in row) / (count - 1)
        assert mean == add_by_halves(row) / count
        assert math.isclose(mean, float(true), rel_tol=1e-12, abs_tol=1e-13)
        assert math.isclose(variance, float(spread), rel_tol=1e-12)


def define_softmax(row: Sequence[float]) -> list[float]:
    """Its own exponential apart, which has tests of its own."""
    powers = functions.exp(torch.tensor([x - max(row) for x in row], dtype=torch.float64)).tolist()
    total = add_by_halves(powers)
    return [power / total for power in powers]


@pytest.mark.parametrize("count", LENGTHS)
def test_softmax_is_exponentials_over_their_sum(count: int) -> None:
    for dtype in DTYPES:
        x = make_rows(4, count, dtype)
        found = sums.softmax(x, 1)
        wanted = torch.tensor([define_softmax(row) for row in x.double().tolist()], dtype=torch.float64)
        assert torch.equal(found, wanted if dtype == torch.float64 else wanted.float())
        torch.testing.assert_close(found.double(), torch.softmax(x.double(), 1), rtol=1e-6, atol=2.0**-149)
        assert torch.equal(sums.softmax(x.t(), 0), found.t())
        assert torch.equal(sums.softmax(x.double(), 1).to(found.dtype), found), "loops and torch operations agree"


def test_softmax_leaves_nothing_to_what_a_mask_hides() -> None:
    x = torch.tensor([[1.0, -math.inf, 2.0, torch.finfo(torch.float32).min], [-math.inf] * 4, [math.nan, 1, 2, 3]])
    for found in (sums.softmax(x, 1), sums.softmax(x.double(), 1)):
        assert found[0, 1] == found[0, 3] == 0 and found[0, [0, 2]].sum() == 1
        assert found[1:].isnan().all(), "as torch has it for rows of which nothing is left"
    assert sums.softmax(torch.zeros(0, 5), 1).shape == (0, 5)


@pytest.mark.parametrize("count", LENGTHS)
def test_log_likelihoods_are_the_logarithms_of_softmax(count: int) -> None:
    x = make_rows(6, count, torch.bfloat16)
    targets = torch.arange(6) % count
    found = sums.log_likelihood(x, targets)
    rows = sums.log_softmax(x, 1)
    assert found.dtype == rows.dtype == torch.float64
    assert torch.equal(found, rows.gather(1, targets[:, None])[:, 0]), "loops and torch operations agree"
    assert torch.equal(found, sums.log_likelihood(x.double(), targets))
    torch.testing.assert_close(rows, torch.log_softmax(x.double(), 1), rtol=1e-14, atol=1e-14)


def test_running_sums_add_what_lies_one_two_four_places_before() -> None:
    x = make_rows(3, 37)
    wanted = x.double().tolist()
    for row in wanted:
        step = 1
        while step < len(row):
            row[:] = [*row[:step], *(row[k] + row[k - step] for k in range(step, len(row)))]
            step *= 2
    assert sums.running_sum(x, 1).tolist() == wanted
    assert torch.equal(sums.running_sum(x.t(), 0), sums.running_sum(x, 1).t())
    torch.testing.assert_close(sums.running_sum(x, 1), x.double().cumsum(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_norms_are_right_to_the_last_place_but_one(center: bool, dtype: torch.dtype) -> None:
    x, weight, bias = make_rows(5, 96, dtype), make_rows(1, 96, dtype, 1)[0], make_rows(1, 96, dtype, 2)[0]
    found = sums.normalize(x, 1, weight, bias, 1e-6, center=center)
    wide = x.double()
    wide = wide - wide.mean(1, keepdim=True) if center else wide
    wanted = wide / (wide.square().mean(1, keepdim=True) + 1e-6).sqrt() * weight.double() + bias.double()
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted.float().to(dtype), rtol=0, atol=0)
    bare = sums.normalize(x.view(5, 8, 12), 2, None, None, 1e-6, center=center)
    assert torch.equal(bare.view(5, 96), sums.normalize(x, 1, None, None, 1e-6, center=center))


def test_rows_do_not_depend_on_their_neighbours_nor_on_threads() -> None:
    x = make_rows(64, 333)
    targets = torch.arange(64)
    results = []
    for _ in each_number_of_threads():
        results.append((sums.sum_last(x), sums.softmax(x, 1), sums.log_likelihood(x, targets)))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
    assert torch.equal(torch.cat([sums.softmax(row[None], 1) for row in x]), results[0][1])
    assert torch.equal(torch.cat([sums.sum_last(row[None]) for row in x]), results[0][0])
