"""Operations that order numbers, find them, or write to places: what libraries decide for themselves has a rule here.

Among equals the lower index comes first, and -0 equals +0. Of these two the larger is +0, and so is the smaller: which
one a library gives back depends on the instruction, and on x86 on where in a vector it lies. What holds a NaN has no
order, and what is written to one place twice has no result: both are refused.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from builder.arithmetic.elements import multiply
from builder.arithmetic.operations import aten, refuse, replaces


def without_minus_zero(x: torch.Tensor) -> torch.Tensor:
    return x + 0.0 if x.is_floating_point() else x


@replaces("maximum")
def maximum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return without_minus_zero(torch.maximum(a, b))


@replaces("minimum")
def minimum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return without_minus_zero(torch.minimum(a, b))


@replaces("amax")
def amax(x: torch.Tensor, dim: Any = (), keepdim: bool = False) -> torch.Tensor:
    return without_minus_zero(torch.amax(x, dim, keepdim))


@replaces("amin")
def amin(x: torch.Tensor, dim: Any = (), keepdim: bool = False) -> torch.Tensor:
    return without_minus_zero(torch.amin(x, dim, keepdim))


@replaces("aminmax")
def aminmax(x: torch.Tensor, *, dim: int | None = None, keepdim: bool = False) -> Any:
    least, most = torch.aminmax(x, dim=dim, keepdim=keepdim)
    return torch.return_types.aminmax((without_minus_zero(least), without_minus_zero(most)))


@replaces("clamp", "clip", "hardtanh")
def clamp(x: torch.Tensor, min: Any = None, max: Any = None) -> torch.Tensor:
    clamped = torch.clamp(x, min, max)
    bounds = [bound for bound in (min, max) if bound is not None]
    some_zero = any(isinstance(bound, torch.Tensor) or torch.tensor(bound, dtype=x.dtype) == 0 for bound in bounds)
    return without_minus_zero(clamped) if some_zero else clamped


@replaces("clamp_min")
def clamp_min(x: torch.Tensor, min: Any) -> torch.Tensor:
    return clamp(x, min)


@replaces("clamp_max")
def clamp_max(x: torch.Tensor, max: Any) -> torch.Tensor:
    return clamp(x, None, max)


@replaces("relu")
def relu(x: torch.Tensor) -> torch.Tensor:
    return clamp(x, 0)


@replaces("sort", of_integers_too=True)
def sort(x: torch.Tensor, *args: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """Among equals the lower index comes first, and -0 equals +0. NaN is refused."""
    if args:
        dim, descending = (*args, False)[:2] if len(args) == 1 else args[-2:]
    if x.is_floating_point() and bool(x.isnan().any()):
        raise refuse("sort", "of what holds a NaN")
    order = torch.sort(without_minus_zero(x), stable=True, dim=dim, descending=descending).indices
    return torch.return_types.sort((x.gather(dim, order), order))


@replaces("argsort", of_integers_too=True)
def sort_indices(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    order: torch.Tensor = sort(x, *args, **kwargs)[1]
    return order


@replaces("topk", of_integers_too=True)
def top(x: torch.Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    """The first k of the sorted ones; they come in order even where that is not asked for."""
    values, order = sort(x, dim=dim, descending=largest)
    return torch.return_types.topk((values.narrow(dim, 0, k), order.narrow(dim, 0, k)))


def find_first(x: torch.Tensor, dim: int | None, keepdim: bool, descending: bool) -> tuple[torch.Tensor, torch.Tensor]:
    values, order = sort(x.flatten() if dim is None else x, dim=dim or 0, descending=descending)
    values, order = values.narrow(dim or 0, 0, 1), order.narrow(dim or 0, 0, 1)
    return (values, order) if keepdim else (values.squeeze(dim or 0), order.squeeze(dim or 0))


@replaces("argmax", of_integers_too=True)
def argmax(x: torch.Tensor, dim: int | None = None, keepdim: bool = False) -> torch.Tensor:
    return find_first(x, dim, keepdim, True)[1]


@replaces("argmin", of_integers_too=True)
def argmin(x: torch.Tensor, dim: int | None = None, keepdim: bool = False) -> torch.Tensor:
    return find_first(x, dim, keepdim, False)[1]


@replaces("max", of_integers_too=True)
def largest(x: torch.Tensor, other: Any = None, keepdim: bool = False, *, dim: int | None = None) -> Any:
    if isinstance(other, torch.Tensor):
        return maximum(x, other)
    axis = dim if other is None else other
    return amax(x) if axis is None else torch.return_types.max(find_first(x, axis, keepdim, True))


@replaces("min", of_integers_too=True)
def smallest(x: torch.Tensor, other: Any = None, keepdim: bool = False, *, dim: int | None = None) -> Any:
    if isinstance(other, torch.Tensor):
        return minimum(x, other)
    axis = dim if other is None else other
    return amin(x) if axis is None else torch.return_types.min(find_first(x, axis, keepdim, False))


def require_unique(name: str, index: torch.Tensor, dim: int) -> None:
    """Refuse places that are written more than once: the order of that is no one's."""
    ordered = index.sort(dim=dim).values
    if index.shape[dim] > 1 and bool((ordered.diff(dim=dim) == 0).any()):
        raise refuse(name, "into one place more than once")


@replaces("index_add")
def add_at(x: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor, *, alpha: float = 1) -> torch.Tensor:
    require_unique("index_add", index, 0)
    return x.index_add(dim, index, source if alpha == 1 else multiply(source, alpha))


@replaces("index_copy", of_integers_too=True)
def copy_to(x: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    require_unique("index_copy", index, 0)
    return x.index_copy(dim, index, source)


@replaces("scatter_add")
def scatter_add(x: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    require_unique("scatter_add", index, dim)
    return x.scatter_add(dim, index, source)


@replaces("scatter", of_integers_too=True)
def scatter(x: torch.Tensor, dim: int, index: torch.Tensor, source: Any, **kwargs: Any) -> torch.Tensor:
    if kwargs:
        raise refuse("scatter", "with a reduction")
    if not isinstance(source, torch.Tensor):
        return x.scatter(dim, index, source)
    require_unique("scatter", index, dim)
    return x.scatter(dim, index, source)


@replaces("index_put", of_integers_too=True)
def put_at(x: torch.Tensor, indices: Any, values: torch.Tensor, accumulate: bool = False) -> torch.Tensor:
    if accumulate:
        raise refuse("index_put", "that accumulates")
    is_mask = [index.dtype in (torch.bool, torch.uint8) for index in indices if index is not None]
    if any(is_mask) and not all(is_mask):
        raise refuse("index_put", "by places and masks together")
    if values.numel() > 1 and not all(is_mask):
        given = [(index, x.shape[dim]) for dim, index in enumerate(indices) if index is not None]
        shape = torch.broadcast_shapes(*(index.shape for index, _ in given))  # type: ignore[no-untyped-call]
        flat = torch.zeros(shape, dtype=torch.int64, device=x.device)
        for index, size in given:
            flat = flat * size + index % size
        require_unique("index_put", flat.flatten(), 0)
    result: torch.Tensor = aten.index_put(x, indices, values)
    return result


@replaces("arange")
def count_up(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Of whole numbers; steps with digits after the point are added by each library in its own way."""
    if not all(float(value) == math.floor(value) and abs(value) < 2**24 for value in args):
        raise refuse("arange", "with numbers that are not whole, or beyond 2^24")
    dtype = kwargs.pop("dtype", None)
    counted = torch.arange(*(int(value) for value in args), device=kwargs.get("device"))
    whole = all(isinstance(value, int) for value in args)
    return counted if dtype is None and whole else counted.to(dtype or torch.get_default_dtype())
