"""Operations on each element by itself: arithmetic, powers, functions.

Two tensors of one dtype need no help. A number beside a 16-bit tensor is rounded to that dtype on one kind of machine
and to float32 on another, so here it is float32, and the result is rounded once more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from builder.arithmetic import functions
from builder.arithmetic.operations import REPLACED, aten, is_alone, is_inexact, refuse, replaces


def combine(operation: Callable[..., Any], a: Any, b: Any) -> torch.Tensor:
    """An operation on two operands, of 16 bits in float32, rounded once more. Numbers become tensors."""
    dtype = torch.result_type(a, b)
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    device = next(value.device for value in (a, b) if isinstance(value, torch.Tensor) and (value.ndim or is_alone(b)))
    a, b = (
        (value.to(device) if isinstance(value, torch.Tensor) else torch.tensor(value, device=device)).to(wide)
        for value in (a, b)
    )
    result: torch.Tensor = operation(a, b).to(dtype)
    return result


def combine_if_needed(operation: Callable[..., Any], a: Any, b: Any) -> torch.Tensor:
    """Tensors of one dtype need no help; nor does float32 with a number, but for CUDA's division."""
    if not is_alone(a) and not is_alone(b):
        result: torch.Tensor = operation(a, b)
        return result
    return combine(operation, a, b)


@replaces("add")
def add(a: Any, b: Any, *, alpha: float = 1) -> torch.Tensor:
    return combine_if_needed(aten.add, a, b if alpha == 1 else multiply(b, alpha))


@replaces("sub", "subtract")
def subtract(a: Any, b: Any, *, alpha: float = 1) -> torch.Tensor:
    return combine_if_needed(aten.sub, a, b if alpha == 1 else multiply(b, alpha))


@replaces("rsub")
def subtract_from(a: Any, b: Any, alpha: float = 1) -> torch.Tensor:
    return subtract(b, a, alpha=alpha)


@replaces("mul", "multiply")
def multiply(a: Any, b: Any) -> torch.Tensor:
    """Of complex numbers in four products and two sums: fused ones have other bits."""
    is_complex = [isinstance(value, torch.Tensor) and value.is_complex() for value in (a, b)]
    if not any(is_complex):
        return combine_if_needed(aten.mul, a, b)
    if not all(is_complex):
        number, real = (a, b) if is_complex[0] else (b, a)
        return torch.complex(multiply(number.real, real), multiply(number.imag, real))
    (p, q), (r, s) = torch.view_as_real(a).unbind(-1), torch.view_as_real(b).unbind(-1)
    return torch.complex(p * r - q * s, p * s + q * r)


@replaces("div", "divide", "true_divide")
def divide(a: Any, b: Any, *, rounding_mode: str | None = None) -> torch.Tensor:
    if rounding_mode is not None and (is_inexact(a) or is_inexact(b)):
        raise refuse("div", f"of floats, rounding to {rounding_mode}")
    if rounding_mode is not None:
        result: torch.Tensor = aten.div(a, b, rounding_mode=rounding_mode)
        return result
    return combine(aten.div, a, b)


@replaces("reciprocal")
def reciprocal(x: torch.Tensor) -> torch.Tensor:
    return combine(aten.div, 1.0, x)


@replaces("square")
def square(x: torch.Tensor) -> torch.Tensor:
    return multiply(x, x)


@replaces("addcmul")
def add_product(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, value: float = 1) -> torch.Tensor:
    product = multiply(a, b)
    return add(x, product if value == 1 else multiply(product, value))


@replaces("pow", "float_power")
def power(base: Any, exponent: Any) -> torch.Tensor:
    """Small whole powers and roots are what they say; others go through a logarithm."""
    whole: dict[float, Callable[[torch.Tensor], torch.Tensor]] = {
        0: torch.ones_like,
        1: torch.clone,
        2: square,
        3: lambda x: multiply(multiply(x, x), x),
        0.5: torch.sqrt,
        -0.5: lambda x: functions.apply("rsqrt", functions.reciprocal_root, x),
        -1: reciprocal,
    }
    if isinstance(exponent, int | float) and exponent in whole:
        return whole[exponent](base)
    dtype = torch.result_type(base, exponent)
    device = (base if isinstance(base, torch.Tensor) else exponent).device
    wide = [torch.as_tensor(value, device=device).double() for value in (base, exponent)]
    if not bool((wide[0] >= 0).all()):
        raise refuse("pow", "of a negative number")
    result = functions.power(*torch.broadcast_tensors(*wide))  # type: ignore[no-untyped-call]
    return result if dtype == torch.float64 else result.float().to(dtype)


def add_function(name: str, function: functions.Function) -> None:
    def apply(x: torch.Tensor) -> torch.Tensor:
        return functions.apply(name, function, x if x.is_floating_point() else x.float())

    REPLACED[name] = apply


for _name, _function in {
    "exp": functions.exp,
    "expm1": functions.expm1,
    "log": functions.log,
    "log1p": functions.log1p,
    "rsqrt": functions.reciprocal_root,
    "sigmoid": functions.sigmoid,
    "silu": functions.silu,
    "tanh": functions.tanh,
    "erf": functions.erf,
}.items():
    add_function(_name, _function)


@replaces("sin")
def sine(x: torch.Tensor) -> torch.Tensor:
    return functions.through_float64(functions.sine, x)


@replaces("cos")
def cosine(x: torch.Tensor) -> torch.Tensor:
    return functions.through_float64(functions.cosine, x)


@replaces("polar")
def polar(magnitude: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    return torch.complex(magnitude * cosine(angle), magnitude * sine(angle))


@replaces("gelu")
def gelu(x: torch.Tensor, *, approximate: str = "none") -> torch.Tensor:
    if approximate == "none":
        return functions.apply("gelu", functions.gelu, x)
    return functions.apply("gelu_tanh", functions.gelu_tanh, x)


@replaces("softplus")
def softplus(x: torch.Tensor, beta: float = 1, threshold: float = 20) -> torch.Tensor:
    if (beta, threshold) != (1, 20):
        raise refuse("softplus", f"with beta {beta} and threshold {threshold}")
    return functions.apply("softplus", functions.softplus, x)


@replaces("dropout", "native_dropout", "feature_dropout", "alpha_dropout")
def drop_nothing(x: torch.Tensor, p: float, train: bool | None) -> torch.Tensor:
    if train and p:
        raise refuse("dropout", "while training")
    return x
