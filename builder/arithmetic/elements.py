"""Operations on each element by itself: arithmetic, powers, functions.

Two tensors of one dtype need no help. A number beside a 16-bit tensor is rounded to that dtype on one kind of machine
and to float32 on another, so here it is float32, and the result is rounded once more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from builder.arithmetic import functions
from builder.arithmetic.operations import REPLACED, aten, checks, is_alone, is_inexact, refuse, replaces

NO_INTEGERS = (torch.bool,)  # a number becomes true unless it is 0


def combine(operation: Callable[..., Any], a: Any, b: Any) -> torch.Tensor:
    """An operation on two operands, of 16 bits in float32, rounded once more. Numbers become tensors."""
    dtype = torch.result_type(a, b)
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    device = next(value.device for value in (a, b) if isinstance(value, torch.Tensor) and (value.ndim or is_alone(b)))
    a, b = (as_tensor(value, device).to(wide) for value in (a, b))
    result: torch.Tensor = operation(a, b).to(dtype)
    return result


def as_tensor(value: Any, device: torch.device) -> torch.Tensor:
    """A tensor, or a number as one; by itself torch would round a number to float32."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    wide = {float: torch.float64, complex: torch.complex128}.get(type(value))
    return torch.tensor(value, dtype=wide, device=device)


def combine_if_needed(operation: Callable[..., Any], a: Any, b: Any) -> torch.Tensor:
    """Tensors of one dtype need no help; nor does float32 with a number, but for CUDA's division."""
    if not is_alone(a) and not is_alone(b):
        result: torch.Tensor = operation(a, b)
        return result
    return combine(operation, a, b)


def scale(x: Any, alpha: float) -> Any:
    if alpha == 1:
        return x
    return multiply(x, alpha) if isinstance(x, torch.Tensor) else x * alpha


@replaces("add")
def add(a: Any, b: Any, *, alpha: float = 1) -> torch.Tensor:
    return combine_if_needed(aten.add, a, scale(b, alpha))


@replaces("sub", "subtract")
def subtract(a: Any, b: Any, *, alpha: float = 1) -> torch.Tensor:
    return combine_if_needed(aten.sub, a, scale(b, alpha))


@replaces("rsub")
def subtract_from(a: Any, b: Any, alpha: float = 1) -> torch.Tensor:
    return subtract(b, a, alpha=alpha)


@replaces("mul", "multiply")
def multiply(a: Any, b: Any) -> torch.Tensor:
    """Of complex numbers in four products and two sums: fused ones have other bits."""
    is_complex = [
        value.is_complex() if isinstance(value, torch.Tensor) else isinstance(value, complex) for value in (a, b)
    ]
    if not any(is_complex):
        return combine_if_needed(aten.mul, a, b)
    if not all(is_complex):
        number, real = (a, b) if is_complex[0] else (b, a)
        return torch.complex(multiply(number.real, real), multiply(number.imag, real))
    (p, q), (r, s) = (
        torch.view_as_real(value).unbind(-1) if isinstance(value, torch.Tensor) else (value.real, value.imag)
        for value in (a, b)
    )
    return torch.complex(p * r - q * s, p * s + q * r)


@replaces("div", "divide", "true_divide")
def divide(a: Any, b: Any, *, rounding_mode: str | None = None) -> torch.Tensor:
    if rounding_mode is not None:
        raise refuse("div", f"of floats, rounding to {rounding_mode}")
    if not is_inexact(a) and not is_inexact(b):
        a = a.float() if isinstance(a, torch.Tensor) else float(a)
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


@replaces("pow")
def power(base: Any, exponent: Any) -> torch.Tensor:
    """Small whole powers and roots are what they say; others go through a logarithm."""
    whole: dict[float, Callable[[torch.Tensor], torch.Tensor]] = {
        0: torch.ones_like,
        1: torch.clone,
        2: square,
        3: lambda x: multiply(multiply(x, x), x),
        0.5: functions.square_root,
        -0.5: lambda x: functions.apply("rsqrt", functions.reciprocal_root, x),
        -1: reciprocal,
    }
    dtype = torch.result_type(base, exponent)
    if isinstance(exponent, int | float) and exponent in whole:
        return whole[exponent](base.to(dtype))
    device = (base if isinstance(base, torch.Tensor) else exponent).device
    wide = [as_tensor(value, device).double() for value in (base, exponent)]
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


@replaces("sqrt")
def square_root(x: torch.Tensor) -> torch.Tensor:
    return functions.square_root(x if x.is_floating_point() else x.float())


@replaces("sin")
def sine(x: torch.Tensor) -> torch.Tensor:
    return functions.through_float64(functions.sine, x if x.is_floating_point() else x.float())


@replaces("cos")
def cosine(x: torch.Tensor) -> torch.Tensor:
    return functions.through_float64(functions.cosine, x if x.is_floating_point() else x.float())


@replaces("polar")
def polar(magnitude: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    return torch.complex(magnitude * cosine(angle), magnitude * sine(angle))


@checks("abs", "sgn", "sign")
def check_real(x: torch.Tensor, *_: Any, **__: Any) -> None:
    if x.is_complex():
        raise refuse("abs or sgn", "of complex numbers")


@checks("round")
def check_round(x: torch.Tensor, *_: Any, decimals: int = 0, **__: Any) -> None:
    if decimals:
        raise refuse("round", "to decimals")


@checks("_to_copy")
def check_cast(x: torch.Tensor, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> None:
    """What lies outside of an integer's range becomes one integer on x86, another on ARM and on GPUs."""
    if dtype is None or dtype in NO_INTEGERS or dtype.is_floating_point or dtype.is_complex:
        return
    if not x.is_floating_point() or x.is_meta or not x.numel():
        return
    limits, wide = torch.iinfo(dtype), x.double()
    if not bool(((wide > limits.min - 1.0) | (wide == limits.min)).all() and (wide < limits.max + 1.0).all()):
        raise refuse("to", f"of a number that {dtype} cannot hold")


@checks("copy")
def check_copy(x: torch.Tensor, source: torch.Tensor, *_: Any) -> None:
    check_cast(source, dtype=x.dtype)


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


@replaces("dropout", "feature_dropout", "alpha_dropout")
def drop_nothing(x: torch.Tensor, p: float, train: bool | None) -> torch.Tensor:
    if train and p:
        raise refuse("dropout", "while training")
    return x
