"""The context of exact arithmetic: what it lets through, what takes the place of what, and what it refuses by name."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from conftest import each_number_of_threads
from torch.nn import functional as F  # noqa: N812

from builder.arithmetic import exact, functions, products, sums
from builder.arithmetic.exact import arithmetic
from builder.arithmetic.operations import AMBIGUOUS, PASSES, REPLACED
from builder.errors import ArithmeticRefusal

HALVES = (torch.bfloat16, torch.float16)
INF, NAN = math.inf, math.nan


def compute(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with arithmetic():
        return function(*args, **kwargs)


def refusal(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    with arithmetic(), pytest.raises(ArithmeticRefusal) as caught:
        function(*args, **kwargs)
    return str(caught.value)


def make(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Numbers from -4 to 4 that look like chance."""
    places = torch.arange(math.prod(shape)) + 1_000_003 * seed
    return ((((places * 2_654_435_761) >> 7) % 2**21 - 2**20).double() / 2**18).reshape(shape).to(dtype)


def signs(x: torch.Tensor) -> list[float]:
    return [math.copysign(1, value) for value in x.flatten().tolist()]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "action"),
    [
        ("lgamma", lambda x: torch.lgamma(x)),
        ("cumprod", lambda x: torch.cumprod(x, 0)),
        ("prod", lambda x: x.prod()),
        ("scaled_dot_product_attention", lambda x: F.scaled_dot_product_attention(x, x, x)),
        ("log2", lambda x: x.log2()),
        ("atan2", lambda x: torch.atan2(x, x)),
        ("lerp", lambda x: torch.lerp(x, x, 0.5)),
        ("remainder", lambda x: x % 2),
        ("native_batch_norm", lambda x: F.batch_norm(x[0, 0], None, None, training=True)),
        ("kthvalue", lambda x: x.kthvalue(1)),
        ("median", lambda x: x.flatten().median()),
        ("rand", lambda x: torch.rand(3)),
        ("normal", lambda x: x.clone().normal_()),
        ("linspace", lambda x: torch.linspace(0, 1, 5)),
        ("logsumexp", lambda x: x.logsumexp(0)),
    ],
)
def test_operations_without_an_exact_form_are_refused_by_name(name: str, action: Callable[..., Any]) -> None:
    told = refusal(action, make(1, 2, 4, 4))
    assert name in told.splitlines()[0] and "has no exact form here" in told
    assert told.splitlines()[-1] == (
        "  fix: set calibration.arithmetic: native for this model, or ask for the operation to be added"
    )


@pytest.mark.parametrize(
    ("action", "told"),
    [
        (lambda x: torch.round(x, decimals=2), "round has no exact form here: to decimals"),
        (lambda x: torch.norm(x, p=1), "norm has no exact form here: of order 1"),
        (lambda x: x.div(2, rounding_mode="floor"), "div has no exact form here: of floats, rounding to floor"),
        (lambda x: F.softplus(x, beta=2), "softplus has no exact form here: with beta 2"),
        (lambda x: F.dropout(x, 0.5, training=True), "dropout has no exact form here: while training"),
        (lambda x: x**1.5, "pow has no exact form here: of a negative number"),
        (lambda x: F.conv2d(x[None, None], x[None, None]), "convolution has no exact form here: in two dimensions"),
        (lambda x: F.conv1d(make(1, 4, 9), make(4, 2, 3), groups=2), "convolution has no exact form here: in 2 groups"),
        (lambda x: F.conv_transpose1d(make(1, 4, 9), make(4, 2, 3)), "has no exact form here: in two dimensions"),
        (lambda x: torch.arange(0, 1, 0.1), "arange has no exact form here: with numbers that are not whole"),
        (lambda x: torch.complex(x, x).abs(), "of complex numbers"),
        (lambda x: torch.complex(x, x).exp(), "exp has no exact form here: of complex numbers"),
        (lambda x: torch.complex(x, x).sum(), "sum has no exact form here: of complex numbers"),
        (lambda x: torch.complex(x, x) / torch.complex(x, x), "div has no exact form here: of complex numbers"),
        (lambda x: torch.add(x, x, out=torch.empty(3, 3)), "add.out|with an argument out"),
    ],
)
def test_forms_of_an_operation_that_are_not_exact_are_refused(action: Callable[..., Any], told: str) -> None:
    found = refusal(action, make(3, 3))
    assert any(part in found for part in told.split("|")), found


@pytest.mark.parametrize(
    ("value", "dtype"), [(3e9, torch.int32), (NAN, torch.int64), (INF, torch.int8), (-1, torch.uint8)]
)
def test_numbers_that_an_integer_cannot_hold_are_not_made_one(value: float, dtype: torch.dtype) -> None:
    """x86, ARM and GPUs make different integers of them."""
    x = torch.tensor([1.0, value])
    assert f"a number that {dtype} cannot hold" in refusal(x.to, dtype)
    assert "cannot hold" in refusal(torch.zeros(2, dtype=dtype).copy_, x)
    assert "cannot hold" in refusal(x.sum, dtype=dtype)
    assert compute(torch.tensor([1.9, -0.9, 127.5]).to, torch.int8).tolist() == [1, 0, 127]
    assert compute(torch.tensor([1.9, 0.0, NAN]).to, torch.bool).tolist() == [True, False, True]


def test_no_name_is_both_let_through_and_replaced() -> None:
    assert not PASSES & REPLACED.keys() and not PASSES & AMBIGUOUS
    aten = set(dir(torch.ops.aten))
    known = {name for name in PASSES | REPLACED.keys() | AMBIGUOUS if hasattr(torch.ops.aten, name)}
    assert aten and len(known) > 150


# --- elements ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
def test_a_number_beside_16_bits_is_float32_and_the_result_is_rounded_once(dtype: torch.dtype) -> None:
    x = make(500, dtype=dtype)
    number = torch.tensor(0.1, dtype=torch.float64).float()
    for beside in (0.1, torch.tensor(0.1)):
        for operation in (torch.add, torch.sub, torch.mul, torch.div):
            found = compute(operation, x, beside)
            wanted = operation(x.double(), number.double()).float().to(dtype)  # float64 holds all but the quotient
            assert found.dtype == dtype and torch.equal(found, wanted), operation
    assert torch.equal(compute(lambda: 0.1 - x), (number.double() - x.double()).float().to(dtype))
    share = (1 / x.double()).float().to(dtype)  # torch makes a product of it before anyone is asked
    assert torch.equal(compute(lambda: 0.1 / x), (number.double() * share.double()).float().to(dtype))


def test_a_number_beside_float64_keeps_its_digits() -> None:
    x = make(9, dtype=torch.float64)
    assert torch.equal(compute(torch.mul, x, 0.1), x * 0.1)
    assert torch.equal(compute(torch.add, 0.1, x), 0.1 + x)


def test_tensors_of_two_dtypes_are_promoted_as_torch_promotes_them() -> None:
    for first in (torch.bfloat16, torch.float16, torch.float32, torch.int64):
        for second in (torch.bfloat16, torch.float16, torch.float32):
            a, b = make(50, dtype=first), make(50, dtype=second, seed=1)
            for operation in (torch.add, torch.sub, torch.mul, torch.div):
                wanted = operation(a, b)
                found = compute(operation, a, b)
                assert found.dtype == wanted.dtype and torch.equal(found, wanted), (first, second)
            assert compute(torch.add, a[0], b).dtype == torch.add(a[0], b).dtype


IN_PLACE: list[tuple[str, tuple[Any, ...]]] = [
    ("add", (0.1,)), ("sub", (0.3,)), ("mul", (0.7,)), ("div", (3,)), ("exp", ()), ("sigmoid", ()), ("relu", ()),
    ("tanh", ()), ("neg", ()), ("abs", ()), ("clamp", (-0.5, 0.5)), ("clamp_min", (0,)), ("cumsum", (0,)),
    ("masked_fill", (torch.arange(40) % 2 == 0, -1e9)), ("addcmul", (torch.ones(40), torch.full((40,), 0.1))),
    ("square", ()), ("pow", (2,)), ("index_add", (0, torch.tensor([3, 1]), torch.ones(2))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "args"), IN_PLACE, ids=[name for name, _ in IN_PLACE])
def test_an_operation_in_place_gives_the_same_and_the_same_tensor(name: str, args: tuple[Any, ...]) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        x = make(40, dtype=dtype)
        given = tuple(
            arg.to(dtype) if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg for arg in args
        )
        wanted = compute(getattr(x, name), *given)
        changed = x.clone()
        assert compute(getattr(changed, name + "_"), *given) is changed
        assert torch.equal(changed, wanted) and changed.dtype == dtype
        assert torch.equal(x, make(40, dtype=dtype)), "the other one left its operand alone"
        view = torch.stack([x, x])
        compute(getattr(view[1], name + "_"), *given)
        assert torch.equal(view[1], wanted) and torch.equal(view[0], x)


def test_complex_numbers_are_multiplied_in_four_products_and_two_sums() -> None:
    p, q, r, s = (make(20, seed=seed) for seed in range(4))
    a, b = torch.complex(p, q), torch.complex(r, s)
    real = [(u * w).sub(v * z) for u, v, w, z in zip(p, q, r, s, strict=True)]
    wanted = torch.complex(
        torch.stack(real), torch.stack([u * z + v * w for u, v, w, z in zip(p, q, r, s, strict=True)])
    )
    assert torch.equal(compute(lambda: a * b), wanted)
    assert torch.equal(compute(lambda: a * p), torch.complex(p * p, q * p))
    assert torch.equal(compute(lambda: 2.5 * a), torch.complex(p * 2.5, q * 2.5))
    assert torch.equal(compute(lambda: a * (2 - 3j)), torch.complex(p * 2 - q * -3.0, p * -3.0 + q * 2))
    assert torch.equal(compute(lambda: a + b), torch.complex(p + r, q + s))
    turned = compute(torch.polar, torch.ones(20), p)
    assert torch.equal(torch.view_as_real(turned)[:, 0], compute(torch.cos, p))


@pytest.mark.parametrize(
    ("exponent", "wanted"),
    [
        (0, lambda x: torch.ones_like(x)),
        (1, lambda x: x),
        (2, lambda x: x * x),
        (3, lambda x: x * x * x),
        (-1, lambda x: 1 / x),
        (2.0, lambda x: x * x),
    ],
)
def test_whole_powers_are_products(exponent: float, wanted: Callable[..., torch.Tensor]) -> None:
    x = make(30).where(make(30) != 0, 1.0)
    assert torch.equal(compute(torch.pow, x, exponent), wanted(x))


def test_other_powers_of_tensors_and_of_numbers() -> None:
    x = make(30).abs() + 0.1
    assert compute(lambda: x**0.5).tolist() == torch.tensor([math.sqrt(v) for v in x.tolist()]).tolist()
    assert compute(lambda: x**-0.5).tolist() == torch.tensor([1 / math.sqrt(v) for v in x.tolist()]).tolist()
    for found, wanted in (
        (compute(lambda: x**1.7), x.double() ** 1.7),
        (compute(lambda: 10000.0 ** (x / 8)), 10000.0 ** (x / 8).double()),
        (compute(lambda: x**x), x.double() ** x.double()),
        (compute(lambda: 10000 ** (torch.arange(0, 8, 2) / 8)), 10000.0 ** (torch.arange(0, 8, 2).double() / 8)),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, rtol=6.1e-8, atol=0)
    whole = torch.arange(5)
    assert compute(lambda: whole**2).tolist() == [0, 1, 4, 9, 16]
    assert compute(lambda: whole**2.0).dtype == torch.float32 and compute(lambda: whole**0.5)[4] == 2
    assert compute(torch.float_power, x, 2).dtype == torch.float64


def test_what_has_digits_is_exact_even_if_it_is_made_of_integers() -> None:
    whole = torch.arange(1, 2000)
    for name in ("exp", "log", "sin", "cos", "sigmoid", "tanh", "rsqrt", "log1p", "erf"):
        x = whole[:80] if name == "exp" else whole
        found = compute(getattr(torch, name), x)
        assert found.dtype == torch.float32 and torch.equal(found, compute(getattr(torch, name), x.float())), name
    assert torch.equal(compute(lambda: whole / 7), whole.float() / 7)
    assert torch.equal(compute(lambda: 7 / whole), 7 / whole.float())
    assert torch.equal(compute(whole.sum, dtype=torch.float32), sums.sum_last(whole.float()).float())
    assert torch.equal(compute(torch.softmax, whole, 0, dtype=torch.float32), sums.softmax(whole.float(), 0))
    assert torch.equal(compute(whole.cumsum, 0, dtype=torch.float32), compute(whole.float().cumsum, 0))
    for action in (torch.log2, torch.lgamma, torch.atan, torch.exp2):
        assert "has no exact form here" in refusal(action, whole)


def test_integers_and_truth_values_pass() -> None:
    whole = torch.tensor([7, -3, 2**60])
    assert compute(lambda: whole // 2).tolist() == [3, -2, 2**59]
    assert compute(lambda: whole % 4).tolist() == [3, 1, 0]
    assert compute(lambda: torch.div(whole, 2, rounding_mode="trunc")).tolist() == [3, -1, 2**59]
    assert compute(whole.sum).item() == 2**60 + 4, "float64 could not hold it"
    assert compute(whole.cumsum, 0).tolist() == [7, 4, 2**60 + 4]
    assert compute(lambda: (whole > 0).sum()).item() == 2
    assert compute(lambda: F.one_hot(torch.tensor([1, 0]), 3)).tolist() == [[0, 1, 0], [1, 0, 0]]
    assert compute(lambda: whole.bool().cumsum(0)).tolist() == [1, 2, 3]
    assert compute(torch.bincount, torch.tensor([1, 1, 3])).tolist() == [0, 2, 0, 1]


def test_memory_that_nothing_was_written_to_is_zeros() -> None:
    with arithmetic():
        for made in (torch.empty(5000), torch.empty_like(make(5000)), make(3).new_empty(5000)):
            assert not made.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_square_roots_are_the_nearest_numbers(dtype: torch.dtype) -> None:
    """What torch has from Intel's library is off by one place in many of them."""
    x = make(5000, dtype=dtype).abs()
    roots = [math.sqrt(value) for value in x.tolist()]  # of float64, rounded to nearest
    with arithmetic():
        for given in (x, torch.stack([x, x], 1)[:, 0]):
            found = torch.sqrt(given)
            wide = torch.tensor(roots, dtype=torch.float64)
            assert torch.equal(found, wide if dtype == torch.float64 else wide.float().to(dtype))
        assert torch.sqrt(torch.tensor([0.0, -0.0, INF], dtype=dtype)).tolist() == [0.0, 0.0, INF]
        assert torch.sqrt(torch.tensor(-1.0, dtype=dtype)).isnan()
        assert torch.equal(torch.sqrt(torch.arange(50)), torch.tensor([math.sqrt(k) for k in range(50)]))
    for value, root in zip(x.double().tolist()[:500], roots, strict=False):
        low, high = math.nextafter(root, -1), math.nextafter(root, INF)
        middle = [(Fraction(root) + Fraction(other)) / 2 for other in (low, high)]
        assert root == 0 or middle[0] ** 2 < Fraction(value) < middle[1] ** 2, "none is nearer"


# --- order ------------------------------------------------------------------------------------------------------------

TIED = torch.tensor([0.0, 3.0, -0.0, 3.0, 1.0, -0.0, 0.0, 3.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_among_equals_the_lower_index_comes_first(dtype: torch.dtype) -> None:
    x = TIED.to(dtype)
    down, up = [1, 3, 7, 4, 0, 2, 5, 6], [0, 2, 5, 6, 4, 1, 3, 7]
    with arithmetic():
        assert torch.sort(x, descending=True).indices.tolist() == down
        assert torch.sort(x, -1, True)[1].tolist() == down
        assert x.sort(stable=True, descending=True)[1].tolist() == down
        assert x.sort().indices.tolist() == x.argsort().tolist() == torch.argsort(x, stable=True).tolist() == up
        assert torch.argsort(x, dim=-1, descending=True).tolist() == down
        for k in (1, 2, 5):
            assert x.topk(k).indices.tolist() == torch.topk(x, k, dim=-1, sorted=False).indices.tolist() == down[:k]
            assert x.topk(k, largest=False).indices.tolist() == up[:k]
            assert x.topk(k).values.tolist() == [x[index].item() for index in down[:k]]
        assert x.argmax().item() == torch.argmax(x, dim=-1).item() == x.max(-1).indices.item() == 1
        assert x.argmin().item() == x.min(0).indices.item() == 0
        assert x.view(2, 4).max(1, keepdim=True).values.tolist() == [[3], [3]]
        assert x.view(2, 4).argmax(0).tolist() == [1, 0, 0, 0]
        assert (x.max().item(), x.min().item()) == (3, 0)


def test_the_order_of_many_equal_integers_is_theirs() -> None:
    """Experts are sorted by number to gather their tokens, and an unstable sort is another on each machine."""
    experts = torch.arange(4000) * 7 % 8
    order = compute(torch.argsort, experts)
    assert order.tolist() == sorted(range(4000), key=lambda index: (int(experts[index]), index))


@pytest.mark.parametrize("operation", ["sort", "argsort", "argmax", "argmin"])
def test_what_holds_a_nan_has_no_order(operation: str) -> None:
    x = torch.tensor([1.0, NAN, 2.0])
    assert "of what holds a NaN" in refusal(getattr(x, operation))
    assert "of what holds a NaN" in refusal(x.topk, 2)
    assert "of what holds a NaN" in refusal(x.max, 0)
    assert compute(x.max).isnan() and compute(x.amax).isnan(), "the value alone has a rule"


@pytest.mark.parametrize("count", [1, 3, 16, 20, 33])
def test_of_two_zeros_neither_the_larger_nor_the_smaller_is_minus_zero(count: int) -> None:
    """x86 gives back the second operand within a vector and the first one beside it; ARM and GPUs order the two."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        plus, minus = torch.zeros(count, dtype=dtype), torch.full((count,), -0.0, dtype=dtype)
        with arithmetic():
            for a, b in ((plus, minus), (minus, plus), (minus, minus)):
                made = [torch.maximum(a, b), torch.minimum(a, b), torch.max(a, b), torch.min(a, b), a.clamp(min=b)]
                made += [a.clamp(min=0), a.clamp(-0.0, 1), a.clamp_max(0), F.relu(a), F.relu(a.clone(), inplace=True)]
                both = torch.stack([a, b])
                made += [both.amax(0), both.amin(0), both.amax(), both.max(), *both.aminmax(dim=0), F.relu6(a)]
                assert all(sign == 1 for one in made for sign in signs(one)), (dtype, [signs(one) for one in made])
            assert signs(minus.clamp(-448, 448)) == [-1] * count, "bounds that are not 0 leave it as it is"
    x = make(count)
    assert torch.equal(compute(F.relu, x), x.clamp(min=0.0)) and compute(F.relu, torch.tensor(NAN)).isnan()


def test_largest_values_are_those_of_torch() -> None:
    x = make(4, 5, 6)
    with arithmetic():
        found = [
            x.amax(),
            x.amax(1),
            x.amax((0, 2), keepdim=True),
            x.amin(-1),
            x.max(1).values,
            x.min(2, keepdim=True)[0],
        ]
    wanted = [x.amax(), x.amax(1), x.amax((0, 2), keepdim=True), x.amin(-1), x.max(1).values, x.min(2, keepdim=True)[0]]
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


# --- places -----------------------------------------------------------------------------------------------------------


def test_places_are_written_once_or_not_at_all() -> None:
    x, once, twice = torch.zeros(4, 3), torch.tensor([2, 0]), torch.tensor([2, 2])
    rows = make(2, 3)
    for name in ("index_add", "index_copy"):
        assert torch.equal(compute(getattr(x, name), 0, once, rows), getattr(x, name)(0, once, rows))
        assert "into one place more than once" in refusal(getattr(x, name), 0, twice, rows)
    assert torch.equal(compute(x.index_add, 0, once, rows, alpha=0.5), x.index_add(0, once, rows * 0.5))


def test_scatters_are_refused_where_a_place_is_written_twice() -> None:
    x, source = make(2, 4), make(2, 3, seed=1)
    once, twice = torch.tensor([[0, 2, 1], [3, 2, 0]]), torch.tensor([[0, 2, 0], [3, 2, 0]])
    assert torch.equal(compute(x.scatter, 1, once, source), x.scatter(1, once, source))
    assert torch.equal(compute(x.scatter_add, 1, once, source), x.scatter_add(1, once, source)), "what was there stays"
    assert torch.equal(compute(x.scatter, 1, twice, 7.0), x.scatter(1, twice, 7.0)), "the same number twice is one"
    for action in (x.scatter, x.scatter_add, x.long().scatter):
        given = source.long() if action == x.long().scatter else source
        if action.__self__.dtype == given.dtype:
            assert "into one place more than once" in refusal(action, 1, twice, given)
    assert "into one place more than once" in refusal(x.long().scatter, 1, twice, source.long())
    assert torch.equal(
        compute(x.long().scatter_add, 1, twice, source.long()), x.long().scatter_add(1, twice, source.long())
    )
    assert "with a reduction" in refusal(x.scatter, 1, once, source, reduce="multiply")
    assert "scatter_reduce" in refusal(x.scatter_reduce, 1, once, source, "sum")


def test_places_named_by_indices_are_written_once_or_not_at_all() -> None:
    def put(index: Any, value: Any, x: torch.Tensor | None = None) -> torch.Tensor:
        changed = make(4, 3) if x is None else x.clone()
        changed[index] = value
        return changed

    good: list[tuple[Any, Any]] = [
        (torch.tensor([3, 1]), make(2, 3, seed=1)),
        ((slice(None), torch.tensor([2, 0])), make(4, 2, seed=1)),
        ((torch.tensor([0, 0]), torch.tensor([1, 2])), make(2, seed=1)),
        (make(4, 3) > 0, 0.5),
        (make(4, 3) > 0, make(int((make(4, 3) > 0).sum()), seed=1)),
        (torch.tensor([2, 2]), 1.5),
        ((slice(None), torch.tensor([2])), make(4, 1, seed=1)),
        (1, make(3, seed=1)),
    ]
    for index, value in good:
        assert torch.equal(compute(put, index, value), put(index, value)), index
    bad: list[tuple[Any, Any]] = [
        (torch.tensor([3, 3]), make(2, 3, seed=1)),
        (torch.tensor([3, -1]), make(2, 3, seed=1)),
        ((slice(None), torch.tensor([2, -1])), make(4, 2, seed=1)),
        ((torch.tensor([1, 1]), torch.tensor([2, 2])), make(2, seed=1)),
    ]
    for index, value in bad:
        assert "into one place more than once" in refusal(put, index, value), index
        assert "into one place more than once" in refusal(put, index, value.long(), make(4, 3).long()), index
    twice = (torch.tensor([1, 1]),)
    assert "that accumulates" in refusal(make(4).index_put, twice, make(2), accumulate=True)


def test_whole_numbers_are_counted_up() -> None:
    with arithmetic():
        for args in ((5,), (2, 9), (0, 9, 2), (7, -3, -2), (0,)):
            assert torch.equal(torch.arange(*args), torch.arange(*args, dtype=torch.int64))
            assert torch.arange(*args).dtype == torch.int64
        assert torch.arange(5, dtype=torch.float32).tolist() == torch.arange(5.0).tolist() == [0.0, 1, 2, 3, 4]
        assert torch.arange(0, 8, 2, dtype=torch.bfloat16).dtype == torch.bfloat16
        assert torch.arange(3, device="meta").is_meta


# --- sums -------------------------------------------------------------------------------------------------------------


def test_every_form_of_a_sum_is_the_same_sum() -> None:
    x = make(3, 4, 5, dtype=torch.bfloat16)
    wanted = sums.sum_over(x, [1, 2], False)
    with arithmetic():
        assert torch.equal(x.sum((1, 2)), wanted.float().bfloat16())
        assert torch.equal(x.sum([1, -1], keepdim=True), wanted.float().bfloat16()[:, None, None])
        assert torch.equal(x.sum(dim=(1, 2), dtype=torch.float32), wanted.float())
        assert torch.equal(torch.sum(x, (1, 2), dtype=torch.float64), wanted)
        assert torch.equal(x.mean((1, 2), dtype=torch.float32), (wanted / 20).float())
        assert torch.equal(x.float().mean(-1, keepdim=True), sums.mean_over(x, [2], True).float())
        assert torch.equal(x.mean(), sums.mean_over(x, None, False).float().bfloat16())
        assert torch.equal(x.sum(), x.sum(dim=None)) and x.sum().dtype == torch.bfloat16
        assert x.sum(1).shape == (3, 5) and x.sum(1, True).shape == (3, 1, 5)
        assert torch.equal(torch.linalg.vector_norm(x.float(), dim=-1), x.float().norm(dim=-1))
        assert torch.equal(x.float().norm(2, -1, True)[..., 0], x.float().norm(dim=-1))
        torch.testing.assert_close(F.normalize(x.float(), dim=-1), F.normalize(x.double(), dim=-1).float())


def test_every_form_of_a_variance_is_the_same_variance() -> None:
    x = make(6, 50)
    wide = x.double()
    with arithmetic():
        for found, wanted in (
            (x.var(-1), wide.var(-1)),
            (x.var(), wide.var()),
            (x.var(dim=-1, unbiased=False), wide.var(-1, unbiased=False)),
            (x.var(-1, False, True), wide.var(-1, False, True)),
            (x.var(unbiased=False), wide.var(unbiased=False)),
            (torch.var(x, 1, correction=2, keepdim=True), wide.var(1, correction=2, keepdim=True)),
            (x.std(-1), wide.std(-1)),
            (x.std(0, unbiased=False), wide.std(0, unbiased=False)),
        ):
            torch.testing.assert_close(found, wanted.float(), rtol=1e-7, atol=0)


def test_softmax_is_that_of_sums_in_every_form() -> None:
    x = make(3, 7, dtype=torch.bfloat16)
    with arithmetic():
        assert torch.equal(x.softmax(-1), sums.softmax(x, -1).bfloat16())
        assert torch.equal(F.softmax(x, dim=-1, dtype=torch.float32), sums.softmax(x, -1))
        assert torch.equal(torch.nn.Softmax(0)(x.float()), sums.softmax(x, 0))
        assert torch.equal(F.log_softmax(x, -1, dtype=torch.float32), sums.log_softmax(x, -1).float())
        assert torch.equal(x.log_softmax(-1), sums.log_softmax(x, -1).float().bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_norms_are_those_of_torch_in_float64(dtype: torch.dtype) -> None:
    x, weight, bias = make(4, 6, 16, dtype=dtype), make(16, dtype=dtype, seed=1), make(16, dtype=dtype, seed=2)
    wide = [t.double() for t in (x, weight, bias)]
    with arithmetic():
        layer = F.layer_norm(x, (16,), weight, bias, 1e-5)
        plain = F.layer_norm(x, (6, 16))
        root = F.rms_norm(x, (16,), weight, 1e-6)
        module = torch.nn.RMSNorm(16, dtype=dtype)(x / 1000)
    for found, wanted in (
        (layer, F.layer_norm(wide[0], (16,), *wide[1:], 1e-5)),
        (plain, F.layer_norm(wide[0], (6, 16))),
        (root, F.rms_norm(wide[0], (16,), wide[1], 1e-6)),
    ):
        assert found.dtype == dtype
        torch.testing.assert_close(found, wanted.float().to(dtype), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(module, torch.nn.RMSNorm(16, dtype=dtype)(x / 1000))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_convolution_of_each_channel_by_itself(dtype: torch.dtype) -> None:
    """The reference is a double loop over float64 sums in the order of taps."""
    x, weight, bias = make(2, 3, 11, dtype=dtype), make(3, 1, 4, dtype=dtype, seed=1), make(3, dtype=dtype, seed=2)

    def define(stride: int, padding: int, dilation: int, bias: torch.Tensor | None) -> torch.Tensor:
        padded = F.pad(x.double(), (padding, padding)).tolist()
        length = (11 + 2 * padding - dilation * 3 - 1) // stride + 1
        out = torch.zeros(2, 3, length, dtype=torch.float64)
        for row in range(2):
            for channel in range(3):
                for place in range(length):
                    total = 0.0
                    for tap in range(4):
                        total += padded[row][channel][place * stride + tap * dilation] * weight[channel, 0, tap].item()
                    out[row, channel, place] = total + (0.0 if bias is None else bias[channel].item())
        return out.float().to(dtype)

    for stride, padding, dilation, some_bias in ((1, 3, 1, bias), (2, 0, 1, None), (1, 2, 2, bias), (3, 4, 2, None)):
        wanted = define(stride, padding, dilation, some_bias)
        found = compute(F.conv1d, x, weight, some_bias, stride, padding, dilation, 3)
        named = compute(
            F.conv1d, x, weight, bias=some_bias, stride=stride, padding=padding, dilation=dilation, groups=3
        )
        options = ([stride], [padding], [dilation], False, [0], 3)
        inner = compute(torch.ops.aten.convolution.default, x, weight, some_bias, *options)
        assert all(torch.equal(one, wanted) for one in (found, named, inner)), (stride, padding, dilation)
        assert torch.equal(compute(F.conv1d, x[0], weight, some_bias, stride, padding, dilation, 3), wanted[0])
        module = torch.nn.Conv1d(3, 3, 4, stride, padding, dilation, 3, bias=some_bias is not None, dtype=dtype)
        with torch.no_grad():
            module.weight.copy_(weight)
            if some_bias is not None:
                module.bias.copy_(some_bias)
        assert torch.equal(compute(module, x), wanted)


def test_a_convolution_over_all_channels_is_a_linear_of_windows() -> None:
    x, weight, bias = make(2, 5, 13), make(7, 5, 3, seed=1), make(7, seed=2)
    for stride, padding, dilation in ((1, 1, 1), (2, 0, 1), (1, 2, 2), (3, 1, 2)):
        found = compute(F.conv1d, x, weight, bias, stride, padding, dilation)
        wanted = F.conv1d(x.double(), weight.double(), bias.double(), stride, padding, dilation)
        assert found.shape == wanted.shape
        assert (found - wanted).norm() < 2e-4 * wanted.norm()
        inner = compute(
            torch.ops.aten.convolution.default, x, weight, bias, [stride], [padding], [dilation], False, [0], 1
        )
        assert torch.equal(found, inner)
    pointwise = compute(F.conv1d, x, weight[:, :, :1], bias)
    linear = products.linear(x.transpose(1, 2), products.prepare_weight(weight[:, :, 0]), bias)
    assert torch.equal(pointwise, linear.transpose(1, 2))


# --- products ---------------------------------------------------------------------------------------------------------


def test_every_way_to_multiply_two_activations_is_the_same_product() -> None:
    a, b = make(3, 4, 6, dtype=torch.bfloat16), make(3, 6, 5, dtype=torch.bfloat16, seed=1)
    wanted = products.multiply_pairs(a, b).bfloat16()
    with arithmetic():
        for found in (a @ b, torch.bmm(a, b), torch.einsum("bij,bjk->bik", a, b), torch.matmul(a[None], b[None])[0]):
            assert torch.equal(found, wanted)
        assert torch.equal(torch.baddbmm(torch.zeros(1).bfloat16(), a, b, beta=0), wanted)
        assert torch.equal(torch.mm(a[0], b[0]), wanted[0])
        assert torch.equal(a[0] @ b[0, :, 2], wanted[0, :, 2]) and torch.equal(
            torch.mv(a[0], b[0, :, 2]), wanted[0, :, 2]
        )
        assert torch.equal(a[0, 1] @ b[0, :, 2], wanted[0, 1, 2]) and torch.equal(
            torch.dot(a[0, 1], b[0, :, 2]), wanted[0, 1, 2]
        )
        total = products.multiply_pairs(a[0], b[0])
        assert torch.equal(torch.addmm(wanted[0], a[0], b[0]), (total + wanted[0].float()).bfloat16())
        scaled = torch.addmm(wanted[0].float(), a[0].float(), b[0].float(), beta=0.5, alpha=3)
        assert torch.equal(scaled, total * 3 + wanted[0].float() * 0.5)


def test_products_with_nothing_in_them_are_empty_or_zeros() -> None:
    with arithmetic():
        assert (torch.zeros(0, 4) @ torch.zeros(4, 3)).shape == (0, 3)
        assert (torch.zeros(2, 0) @ torch.zeros(0, 3)).tolist() == [[0, 0, 0]] * 2
        assert torch.bmm(torch.zeros(2, 0, 4), torch.zeros(2, 4, 3)).shape == (2, 0, 3)
        assert torch.zeros(3, 0).sum(1).tolist() == [0, 0, 0]
        assert torch.nn.functional.linear(torch.zeros(0, 4), torch.ones(3, 4)).shape == (0, 3)


def test_a_linear_is_seen_as_such_even_where_gradients_are_turned_off_or_on_again() -> None:
    """transformers' experts run under `torch.no_grad`, and a linear taken apart would be a product of activations."""
    linear = torch.nn.Linear(64, 8)
    with torch.no_grad():
        linear.weight.copy_(make(8, 64) / 3)
    x = make(5, 64, seed=1)
    wanted = products.linear(x, products.prepare_weight(linear.weight.detach()), linear.bias.detach())
    with arithmetic() as mode:
        assert not torch.is_grad_enabled()
        assert torch.equal(linear(x), wanted)
        with torch.no_grad():
            assert torch.equal(linear(x), wanted)
        with torch.enable_grad():
            assert torch.equal(linear(x), wanted)
        assert list(mode.prepared) == [linear.weight]
        assert not linear(x).requires_grad
    assert torch.is_grad_enabled() and not isinstance(
        torch.utils._python_dispatch._get_current_dispatch_mode(), exact.Exact
    )


def test_a_weight_that_was_changed_is_not_multiplied_as_it_was() -> None:
    linear, x = torch.nn.Linear(16, 4, bias=False), make(3, 16)

    def wanted() -> torch.Tensor:
        return products.linear(x, products.prepare_weight(linear.weight.detach()), None)

    def swap() -> None:
        linear.weight.data = make(4, 16, seed=5)

    def swap_twice() -> None:
        """The second may come to lie where the first one was before."""
        linear.weight.data = make(4, 16, seed=6)
        gc.collect()
        linear.weight.data = make(4, 16, seed=7)

    def change() -> None:
        with torch.no_grad():
            linear.weight.mul_(3)

    def change_a_part() -> None:
        with torch.no_grad():
            linear.weight[1].zero_()

    def turn() -> None:
        linear.weight.data = linear.weight.data.flip(0)

    mode = exact.Exact()
    for action in (lambda: None, swap, swap_twice, change, change_a_part, turn):
        action()
        with exact.compute_exactly(mode):
            assert torch.equal(linear(x), wanted()), action
    with exact.compute_exactly(mode):
        weight = make(4, 16).clone()  # an inference tensor, of which torch does not count changes
        before = F.linear(x, weight)
        weight.mul_(2)
        assert torch.equal(F.linear(x, weight), before * 2)


def test_integers_of_a_weight_go_when_the_weight_goes() -> None:
    with arithmetic() as mode:
        weight = make(4, 16).clone()
        F.linear(make(2, 16), weight)
        assert len(mode.prepared) == 1
        seen = weakref.ref(mode.prepared[weight][1])
        F.linear(make(2, 16), weight)
        assert mode.prepared[weight][1] is seen(), "made once"
        del weight
        gc.collect()
        assert len(mode.prepared) == 0 and seen() is None


# --- the meta device --------------------------------------------------------------------------------------------------


def test_refusals_are_noted_where_there_are_no_numbers() -> None:
    x = torch.empty(4, 4, device="meta")
    with arithmetic() as mode:
        assert torch.lgamma(x).is_meta and (x @ x).is_meta and torch.arange(4, device="meta").is_meta
        x.sort(), x.exp(), F.softmax(x, -1), F.layer_norm(x, (4,)), x.to(torch.int32), x.clamp(min=0), x.median()
        x[torch.zeros(2, dtype=torch.long, device="meta")] = 1.0
        assert mode.refused == {"aten.lgamma", "aten.median"}


# --- the same everywhere ----------------------------------------------------------------------------------------------


def test_results_are_the_same_with_one_thread_and_with_two() -> None:
    x, weight = make(64, 200, dtype=torch.bfloat16), make(90, 200, dtype=torch.bfloat16, seed=1)
    results = []
    for _ in each_number_of_threads():
        with arithmetic():
            results.append((F.linear(x, weight), x @ weight.t(), x.softmax(-1), F.gelu(x), x.float().exp(), x.mean()))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_casts_round_to_nearest_and_keep_subnormals() -> None:
    """The reference is the nearest of all bfloat16 numbers, ties to the even one, in fractions."""
    every = torch.arange(32640).to(torch.int16).view(torch.bfloat16)  # from 0 to the largest
    exact_values = [Fraction(value) for value in every.double().tolist()]
    chosen = [0, 1, 2, 3, 126, 127, 128, 129, 5000, 16256, 16257, 30000]
    midway = [(exact_values[k] + exact_values[k + 1]) / 2 for k in chosen]
    operands = [float(value) for value in midway]
    found = compute(torch.tensor(operands, dtype=torch.float32).to, torch.bfloat16)
    assert found.view(torch.int16).tolist() == [k + k % 2 for k in chosen]
    nudged = torch.tensor(operands).view(torch.int32)
    assert compute((nudged + 1).view(torch.float32).to, torch.bfloat16).view(torch.int16).tolist() == [
        k + 1 for k in chosen
    ]
    assert compute((nudged - 1).view(torch.float32).to, torch.bfloat16).view(torch.int16).tolist() == chosen


def test_functions_of_halves_come_from_tables() -> None:
    x = make(1000, dtype=torch.bfloat16)
    for name, function in (("silu", functions.silu), ("gelu", functions.gelu)):
        assert torch.equal(compute(getattr(F, name), x), functions.through_float64(function, x))
    assert torch.equal(compute(F.gelu, x, approximate="tanh"), functions.through_float64(functions.gelu_tanh, x))
    assert torch.equal(compute(F.softplus, x), functions.through_float64(functions.softplus, x))
    assert compute(F.dropout, x, 0.5, training=False) is x
