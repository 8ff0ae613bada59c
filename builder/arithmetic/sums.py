"""Sums whose order is fixed: by halves, in float64, of any floating-point tensor.

A row of K numbers is filled up with zeros to a power of two, and its second half added to its first until one number is
left. Each addition is one of whole tensors, so no library chooses an order. On the CPU compiled loops do the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from builder.arithmetic import functions, loops


def sum_last(x: torch.Tensor) -> torch.Tensor:
    """The sum over the last dimension, float64, without it."""
    if x.device.type == "cpu" and x.dtype != torch.float64:
        rows = x.float().reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()
        out = torch.empty(rows.shape[0], dtype=torch.float64)
        loops.run(loops.sum_rows, rows, out)
        return out.view(x.shape[:-1])
    return sum_by_halves(x.double())


def sum_by_halves(x: torch.Tensor) -> torch.Tensor:
    """The definition, for float64 tensors anywhere."""
    count = x.shape[-1]
    length = 1 << max(0, count - 1).bit_length()
    if length != count:
        x = torch.nn.functional.pad(x, (0, length - count))
    while length > 1:
        length //= 2
        x = x[..., :length] + x[..., length:]
    return x[..., 0]


def sum_over(x: torch.Tensor, dims: Sequence[int] | None, keepdim: bool) -> torch.Tensor:
    """The sum over some dimensions, all for None or none named; float64."""
    every = list(range(x.ndim))
    over = sorted(dim % x.ndim for dim in dims) if dims else every
    if not every:
        return x.double()
    left = [dim for dim in every if dim not in over]
    total = sum_last(x.permute(*left, *over).flatten(len(left)))
    if keepdim:
        total = total.reshape([1 if dim in over else size for dim, size in enumerate(x.shape)])
    return total


def count_over(x: torch.Tensor, dims: Sequence[int] | None) -> int:
    """How many numbers go into each of those sums."""
    return math.prod(x.shape[dim] for dim in dims) if dims else x.numel()


def mean_over(x: torch.Tensor, dims: Sequence[int] | None, keepdim: bool) -> torch.Tensor:
    return divide(sum_over(x, dims, keepdim), count_over(x, dims))


def variance_over(x: torch.Tensor, dims: Sequence[int] | None, keepdim: bool, correction: float) -> torch.Tensor:
    """The mean square of differences from the mean; float64."""
    apart = x.double() - mean_over(x, dims, True)
    return divide(sum_over(apart * apart, dims, keepdim), count_over(x, dims) - correction)


def divide(x: torch.Tensor, number: float) -> torch.Tensor:
    """x / number: on CUDA a Python number would become a product with its reciprocal."""
    return x / torch.tensor(number, dtype=x.dtype, device=x.device)


def softmax(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Exponentials of the differences from the largest, over their sum; float32, or float64 of float64."""
    last = x.movedim(dim, -1)
    if x.device.type == "cpu" and x.dtype != torch.float64:
        rows = last.float().reshape(-1, last.shape[-1]).contiguous()
        out = torch.empty_like(rows)
        if rows.numel():
            loops.run(loops.softmax_rows, rows, out)
        return out.view(last.shape).movedim(-1, dim)
    wide = last.double()
    powers = functions.exp(wide - wide.amax(-1, keepdim=True))
    shares = powers / sum_by_halves(powers).unsqueeze(-1)
    return (shares if x.dtype == torch.float64 else shares.float()).movedim(-1, dim)


def log_softmax(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Differences from the largest less the logarithm of the sum of their exponentials; float64."""
    wide = x.movedim(dim, -1).double()
    apart = wide - wide.amax(-1, keepdim=True)
    return (apart - functions.log(sum_by_halves(functions.exp(apart))).unsqueeze(-1)).movedim(-1, dim)


def log_likelihood(logits_RK: torch.Tensor, targets_R: torch.Tensor) -> torch.Tensor:
    """`log_softmax` at one place of each row, float64 [R]; targets: int64."""
    if logits_RK.device.type != "cpu" or logits_RK.dtype == torch.float64:
        return log_softmax(logits_RK, -1).gather(1, targets_R[:, None])[:, 0]
    rows = logits_RK.float().contiguous()
    largest, total = (torch.empty(len(rows), dtype=torch.float64) for _ in range(2))
    loops.run(loops.sum_exponentials, rows, largest, total)
    found = rows.gather(1, targets_R[:, None])[:, 0].double()
    return (found - largest) - functions.log(total)


def running_sum(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Sums of all up to each, float64: at each step a number is added that lies twice as far away as the last time."""
    total = x.movedim(dim, -1).double()
    step = 1
    while step < total.shape[-1]:
        total = torch.cat([total[..., :step], total[..., step:] + total[..., :-step]], dim=-1)
        step *= 2
    return total.movedim(-1, dim)


def normalize(
    x: torch.Tensor, num_dims: int, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, *, center: bool
) -> torch.Tensor:
    """Layer norm, or without `center` root-mean-square norm, over the last dimensions; in the dtype of x."""
    dims = list(range(x.ndim - num_dims, x.ndim))
    wide = x.double()
    if center:
        wide = wide - mean_over(x, dims, True)
    wide = wide / functions.square_root(mean_over(wide * wide, dims, True) + eps)
    if weight is not None:
        wide = wide * weight.double()
    if bias is not None:
        wide = wide + bias.double()
    return wide.float().to(x.dtype)
