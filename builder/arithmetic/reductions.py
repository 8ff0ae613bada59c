"""Operations that sum: sums, means, norms, softmax, matrix products, convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from builder.arithmetic import functions, products, sums
from builder.arithmetic.elements import check_cast, multiply
from builder.arithmetic.operations import refuse, replaces


def as_dims(dim: int | Sequence[int] | None) -> Sequence[int] | None:
    return [dim] if isinstance(dim, int) else dim


def rounded(value: torch.Tensor, x: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """A float64 result in the dtype asked for, or that of x, by way of float32."""
    wanted = dtype or x.dtype
    return value if wanted == torch.float64 else value.float().to(wanted)


def to_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    check_cast(x, dtype=dtype)
    return x.to(dtype)


@replaces("sum")
def add_up(
    x: torch.Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> torch.Tensor:
    if dtype is not None:
        x = to_dtype(x, dtype)
    if not x.is_floating_point():
        return torch.sum(x, dim, keepdim)
    return rounded(sums.sum_over(x, as_dims(dim), keepdim), x, None)


@replaces("mean")
def mean(x: torch.Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    if dtype is not None:
        x = to_dtype(x, dtype)
    return rounded(sums.mean_over(x, as_dims(dim), keepdim), x, None)


@replaces("var")
def variance(x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    return rounded(wide_variance(x, *args, **options), x, None)


@replaces("std")
def deviation(x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    return rounded(functions.square_root(wide_variance(x, *args, **options)), x, None)


def wide_variance(
    x: torch.Tensor,
    dim: Any = None,
    unbiased: bool = True,
    keepdim: bool = False,
    *,
    correction: float | None = None,
) -> torch.Tensor:
    """In float64. torch's older forms have `unbiased` after the dimension, or in its place."""
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    return sums.variance_over(x, as_dims(dim), keepdim, int(unbiased) if correction is None else correction)


@replaces("linalg_vector_norm", "norm")
def norm(
    x: torch.Tensor, ord: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> torch.Tensor:
    if ord != 2:
        raise refuse("norm", f"of order {ord}")
    wide = x.double()
    return rounded(functions.square_root(sums.sum_over(wide * wide, as_dims(dim), keepdim)), x, dtype)


@replaces("softmax", "_softmax", "_safe_softmax")
def softmax(x: torch.Tensor, dim: int, dtype: Any = None) -> torch.Tensor:
    """`dtype` is that of the result, or for torch's inner operation whether that of a half is float32."""
    wanted = torch.float32 if dtype is True else dtype or x.dtype
    return sums.softmax(x, dim).to(wanted)


@replaces("log_softmax", "_log_softmax")
def log_softmax(x: torch.Tensor, dim: int, dtype: Any = None) -> torch.Tensor:
    return rounded(sums.log_softmax(x, dim), x, torch.float32 if dtype is True else dtype or None)


@replaces("cumsum")
def running_sum(x: torch.Tensor, dim: int, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    if dtype is not None:
        x = to_dtype(x, dtype)
    return rounded(sums.running_sum(x, dim), x, None) if x.is_floating_point() else torch.cumsum(x, dim)


@replaces("layer_norm")
def layer_norm(x: torch.Tensor, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any):  # type: ignore[no-untyped-def]
    return sums.normalize(x, len(shape), weight, bias, eps, center=True)


@replaces("rms_norm")
def rms_norm(x: torch.Tensor, shape: Sequence[int], weight: Any = None, eps: float | None = None) -> torch.Tensor:
    eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if eps is None else eps
    return sums.normalize(x, len(shape), weight, None, eps, center=False)


@replaces("mm", "bmm")
def multiply_matrices(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return multiply_pairs(a, b).to(a.dtype)


def multiply_pairs(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """As `products.multiply_pairs`, and zeros where nothing is summed."""
    if a.numel() and b.numel():
        return products.multiply_pairs(a, b)
    return torch.zeros(*a.shape[:-1], b.shape[-1], device=a.device)


@replaces("mv", "dot")
def multiply_vectors(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return multiply_pairs(a.unsqueeze(0) if a.ndim == 1 else a, b.unsqueeze(1)).reshape(a.shape[:-1]).to(a.dtype)


@replaces("addmm", "baddbmm")
def multiply_and_add(x: Any, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1) -> torch.Tensor:
    product = multiply_pairs(a, b)
    product = product if alpha == 1 else multiply(product, alpha)
    kept = x.float() if beta == 1 else multiply(x.float(), beta)
    return product.to(a.dtype) if beta == 0 else (product + kept).to(a.dtype)


@replaces("convolution", "conv1d", "conv2d", "conv3d")
def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    *rest: Any,
) -> torch.Tensor:
    """In one dimension. Of each channel by itself: taps in their order, in float64; else as a linear of windows."""
    transposed, groups = (rest[0], rest[-1]) if len(rest) > 1 else (False, rest[0] if rest else 1)
    if weight.ndim != 3 or transposed or isinstance(padding, str):
        raise refuse("convolution", "in two dimensions or more, or transposed")
    step, margin, reach = (value if isinstance(value, int) else value[0] for value in (stride, padding, dilation))
    num_taps = weight.shape[2]
    padded = torch.nn.functional.pad(x, (margin, margin))
    length = (padded.shape[-1] - reach * (num_taps - 1) - 1) // step + 1
    taps = [padded[..., reach * tap : reach * tap + step * (length - 1) + 1 : step] for tap in range(num_taps)]
    if groups == 1:
        windows = torch.stack(taps, dim=-1).transpose(-3, -2).flatten(-2)
        out = products.linear(windows, products.prepare_weight(weight.flatten(1)), bias)
        return out.transpose(-1, -2)
    if weight.shape[:2] != (x.shape[-2], 1):
        raise refuse("convolution", f"in {groups} groups")
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for tap, values in enumerate(taps):
        total = total + values.double() * weight[:, :, tap].double()
    if bias is not None:
        total = total + bias.double().unsqueeze(-1)
    return total.float().to(x.dtype)
