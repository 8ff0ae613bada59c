"""What each torch operation becomes where arithmetic is exact: itself, another computation of it, or a refusal.

An operation is left alone if it moves, compares or selects numbers, or rounds each result once as IEEE 754 says.
Operations on integers and truth values are exact if their results are such too, but for the order of equal ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from builder.errors import ArithmeticRefusal

aten = torch.ops.aten

MOVES = """
    view reshape _unsafe_view _reshape_alias expand expand_as permute transpose t unsqueeze squeeze flatten unflatten
    select slice narrow split split_with_sizes tensor_split chunk unbind unfold diagonal as_strided alias detach movedim
    view_as_complex view_as_real real imag contiguous clone _to_copy copy lift_fresh lift_fresh_copy numpy_T
    mT swapaxes resolve_conj resolve_neg set_
    empty empty_like empty_strided new_empty new_empty_strided new_zeros new_ones new_full zeros zeros_like ones
    ones_like full full_like scalar_tensor eye tril triu fill zero fill_diagonal complex
    where masked_fill masked_select gather index index_select embedding take cat stack concat concatenate
    constant_pad_nd repeat repeat_interleave tile roll flip nonzero argwhere broadcast_to broadcast_tensors meshgrid
"""
COMPARES = """
    eq ne lt le gt ge equal isnan isinf isfinite logical_and logical_or logical_not logical_xor bitwise_and bitwise_or
    bitwise_not bitwise_xor __and__ __or__ __xor__ any all is_nonzero _local_scalar_dense item bucketize searchsorted
    count_nonzero _assert_async _assert_scalar sym_size sym_numel sym_stride is_same_size size stride numel
"""
ROUNDS_ONCE = """
    abs neg sign sgn floor ceil round trunc positive
"""
PASSES = frozenset(f"{MOVES} {COMPARES} {ROUNDS_ONCE}".split())
EMPTY = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})  # get zeros here
AMBIGUOUS = frozenset({"kthvalue", "median", "nanmedian", "mode", "random", "scaled_dot_product_attention"})
TAKE_COMPLEX = frozenset(
    {"add", "sub", "subtract", "rsub", "mul", "multiply", "index_add", "index_copy", "index_put", "scatter"}
)
REMEDY = "set calibration.arithmetic: native for this model, or ask for the operation to be added"

REPLACED: dict[str, Callable[..., Any]] = {}
OF_INTEGERS_TOO: set[str] = set()  # names of those that are replaced even where no operand has digits to round
CHECKED: dict[str, Callable[..., None]] = {}
Replacement = TypeVar("Replacement", bound=Callable[..., Any])


def replaces(*names: str, of_integers_too: bool = False) -> Callable[[Replacement], Replacement]:
    """Have a function take the place of torch operations with these names, whatever their overload."""

    def add(function: Replacement) -> Replacement:
        REPLACED.update(dict.fromkeys(names, function))
        OF_INTEGERS_TOO.update(names if of_integers_too else ())
        return function

    return add


def checks(*names: str) -> Callable[[Replacement], Replacement]:
    """Have a function look at the arguments of operations with these names, and raise, before they are let through."""

    def add(function: Replacement) -> Replacement:
        CHECKED.update(dict.fromkeys(names, function))
        return function

    return add


def refuse(name: str, why: str = "") -> ArithmeticRefusal:
    return ArithmeticRefusal(f"torch's operation {name} has no exact form here{why and ': ' + why}", "", REMEDY)


def is_inexact(value: Any) -> bool:
    """Whether a value has digits that can be rounded."""
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() or value.is_complex()
    if isinstance(value, list | tuple):
        return any(map(is_inexact, value))
    return isinstance(value, float | complex)


def is_alone(value: Any) -> bool:
    """Whether torch takes a value for a number beside a tensor, and rounds it in its own ways."""
    return not isinstance(value, torch.Tensor) or value.ndim == 0
