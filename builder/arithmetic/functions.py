"""Functions of float64 tensors from additions, multiplications, divisions and square roots, each a separate operation.

IEEE 754 rounds these four in one way, and a library's exp or sin in as many as there are libraries. Errors are a few
units in the last place of float64, so that a result rounded to float32 or less is nearly always the true one rounded.
Each has the same bits as its twin in `builder.arithmetic.loops`, where there is one. Operands are not modified.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from builder.arithmetic.loops import EXP_TERMS, HALF_PI, LARGEST_EXP, LN2, LOG2E, ROUNDER, SMALLEST_EXP, look_up
from builder.errors import ArithmeticRefusal

Function = Callable[[torch.Tensor], torch.Tensor]

SQRT2 = math.sqrt(2.0)
SINE_TERMS = tuple((-1) ** k / math.factorial(2 * k + 1) for k in range(11))
COSINE_TERMS = tuple((-1) ** k / math.factorial(2 * k) for k in range(11))
LARGEST_ANGLE = 2.0**20  # up to it, a multiple of HALF_PI[0], which has 33 bits, is exact
LOG_TERMS = tuple(2.0 / (2 * k + 1) for k in range(13))
ERF_SPLIT, ERF_TERMS, ERFC_FRACTIONS = 2.0, 48, 64  # enough on each side of 2, where either serves


def power_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """2^n as float64 for int64 n from -1022 to 1023, from its bits: libraries' `ldexp` and `pow` round."""
    return ((exponents + 1023) << 52).view(torch.float64)


def exponent_of(magnitudes: torch.Tensor) -> torch.Tensor:
    """The smallest int64 n with m < 2^n, for float64 magnitudes that are normal; 0 for 0."""
    exponents = (magnitudes.view(torch.int64) >> 52) - 1022
    return exponents.where(magnitudes != 0, 0)


def square_root(x: torch.Tensor) -> torch.Tensor:
    """The nearest number to the root, as IEEE 754 has it; of 16 bits by way of float32.

    On x86 torch asks Intel's vector library, whose roots are off by one place: one in six of float32, one in 80 of
    float64. NumPy uses the processor's instruction.
    """
    if x.dtype in (torch.bfloat16, torch.float16):
        return square_root(x.float()).to(x.dtype)
    if x.device.type != "cpu":
        return x.sqrt()
    out = torch.empty_like(x)
    with np.errstate(invalid="ignore"):
        np.sqrt(x.numpy(), out=out.numpy())
    return out


def evaluate(terms: tuple[float, ...], x: torch.Tensor) -> torch.Tensor:
    """A polynomial by Horner's rule, coefficients of the lowest power first."""
    value = torch.full_like(x, terms[-1])
    for term in reversed(terms[:-1]):
        value = value * x + term
    return value


def exp(x: torch.Tensor) -> torch.Tensor:
    """e^x: x = n ln 2 + r, and the Taylor polynomial of r. 0 below -708 and infinite above 709."""
    shifted = x * LOG2E + ROUNDER  # the rounder leaves n, to the nearest and even, in the lowest bits
    n = shifted - ROUNDER
    r = (x - n * LN2[0]) - n * LN2[1]
    scaled = evaluate(EXP_TERMS, r) * ((shifted.view(torch.int64) + 1023) << 52).view(torch.float64)
    scaled = scaled.where(~(x < SMALLEST_EXP), 0.0)
    return scaled.where(~(x > LARGEST_EXP), math.inf)


def sine_and_cosine(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sin x and cos x, by reduction to a quarter of a turn in three steps (Cody and Waite).

    Raises ArithmeticRefusal for an angle beyond 2^20, where the reduction loses digits.
    """
    if not x.is_meta and x.numel() and not bool((x.abs() <= LARGEST_ANGLE).all()):
        raise ArithmeticRefusal(f"an angle beyond {LARGEST_ANGLE:.0f}, or none at all, in sin or cos")
    n = torch.round(x * (2 / math.pi))
    r = (((x - n * HALF_PI[0]) - n * HALF_PI[1]) - n * HALF_PI[2]).where(x != 0, x)  # keeps -0
    square = r * r
    sine, cosine = evaluate(SINE_TERMS, square) * r, evaluate(COSINE_TERMS, square)
    quarter = n.to(torch.int64) & 3
    swapped = (quarter & 1).bool()
    low, high = cosine.where(swapped, sine), sine.where(swapped, cosine)
    return (-low).where(quarter >= 2, low), (-high).where((quarter == 1) | (quarter == 2), high)


def sine(x: torch.Tensor) -> torch.Tensor:
    return sine_and_cosine(x)[0]


def cosine(x: torch.Tensor) -> torch.Tensor:
    return sine_and_cosine(x)[1]


def log(x: torch.Tensor) -> torch.Tensor:
    """ln x = n ln 2 + 2 artanh((m - 1) / (m + 1)), m from sqrt(1/2) to sqrt(2); -inf for 0, NaN below."""
    normal = x.where(x >= 2.0**-1022, x * 2.0**64)
    n = exponent_of(normal)
    m = ((normal.view(torch.int64) & ((1 << 52) - 1)) | (1022 << 52)).view(torch.float64)
    small = m < SQRT2 / 2
    m, n = (m * 2).where(small, m), n - small.to(torch.int64)
    n = n - 64 * (x < 2.0**-1022).to(torch.int64)
    s = (m - 1) / (m + 1)
    tail = evaluate(LOG_TERMS, s * s) * s
    count = n.to(torch.float64)
    value = count * LN2[0] + (count * LN2[1] + tail)
    value = value.where(x != 0, -math.inf).where(x != math.inf, math.inf)
    return value.where(x >= 0, math.nan)


def log1p(x: torch.Tensor) -> torch.Tensor:
    """ln(1 + x), with the digits that 1 + x rounds off put back (Kahan)."""
    one_more = 1 + x
    rest = one_more - 1
    return (log(one_more) * (x / rest)).where(rest != 0, x).where(x != math.inf, math.inf)


def expm1(x: torch.Tensor) -> torch.Tensor:
    """e^x - 1, likewise."""
    y = exp(x)
    better = (y - 1) * (x / log(y))
    return better.where((y != 1) & (x.abs() < 0.5), y - 1).where(y != 1, x)


def reciprocal_root(x: torch.Tensor) -> torch.Tensor:
    return 1 / square_root(x)


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """1 / (1 + e^-x), from an exponential that cannot overflow."""
    small = exp(-x.abs())
    return (1 / (1 + small)).where(x >= 0, small / (1 + small))


def silu(x: torch.Tensor) -> torch.Tensor:
    return x * sigmoid(x)


def tanh(x: torch.Tensor) -> torch.Tensor:
    """(1 - e^-2|x|) / (1 + e^-2|x|) with the sign of x."""
    small = expm1(-2 * x.abs())
    value = -small / (2 + small)
    return (-value).where(x.signbit(), value)


def softplus(x: torch.Tensor) -> torch.Tensor:
    """ln(1 + e^x); x itself above 20, as torch has it."""
    return log1p(exp(x.clamp(max=20.0))).where(x <= 20.0, x)


def erf_near(x: torch.Tensor) -> torch.Tensor:
    """erf x for 0 <= x <= 2: 2 / sqrt(pi) e^(-x^2) sum of 2^k x^(2k+1) / (1 * 3 * ... (2k+1)).

    Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.6.
    """
    square = x * x
    term = total = x
    for k in range(1, ERF_TERMS):
        term = term * (2 * square) / (2 * k + 1)
        total = total + term
    return (2 / math.sqrt(math.pi)) * exp(-square) * total


def erfc_far(x: torch.Tensor) -> torch.Tensor:
    """1 - erf x for x >= 2: e^(-x^2) / sqrt(pi) / (x + (1/2) / (x + (2/2) / (x + (3/2) / ...))) (as above, 7.1.14)."""
    value = x
    for k in range(ERFC_FRACTIONS, 0, -1):
        value = x + (k / 2) / value
    return exp(-(x * x)) / (math.sqrt(math.pi) * value)


def erf(x: torch.Tensor) -> torch.Tensor:
    magnitude = x.abs()
    far = 1 - erfc_far(magnitude.clamp(min=ERF_SPLIT))
    value = erf_near(magnitude.clamp(max=ERF_SPLIT)).where(magnitude < ERF_SPLIT, far)
    return (-value).where(x.signbit(), value)


def erfc(x: torch.Tensor) -> torch.Tensor:
    """1 - erf x, with all its digits where that is next to nothing."""
    magnitude = x.abs()
    far = erfc_far(magnitude.clamp(min=ERF_SPLIT))
    near = erf_near(magnitude.clamp(max=ERF_SPLIT))
    return (1 - near.where(x >= 0, -near)).where(magnitude < ERF_SPLIT, far.where(x >= 0, 2 - far))


def gelu(x: torch.Tensor) -> torch.Tensor:
    """x (1 + erf(x / sqrt 2)) / 2"""
    return x * (0.5 * erfc(-x / SQRT2))


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """x (1 + tanh z) / 2 = x / (1 + e^-2z) with z = sqrt(2 / pi) (x + 0.044715 x^3)"""
    return x * sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x)))


def power(base: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """base^exponent = e^(exponent ln base) for bases that are not negative; 1 where the exponent is 0."""
    return exp(exponent * log(base)).where(exponent != 0, 1.0)


TABLES: dict[tuple[str, torch.dtype], torch.Tensor] = {}


def apply(name: str, function: Function, x: torch.Tensor) -> torch.Tensor:
    """A function of a floating-point tensor, in its dtype: through float64 and float32, each rounded to nearest.

    Of 16-bit numbers there are 65,536, so a table has them all.
    """
    if x.is_meta or x.dtype not in (torch.bfloat16, torch.float16):
        return through_float64(function, x)
    key = (name, x.dtype)
    if key not in TABLES:
        every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(x.dtype)
        TABLES[key] = through_float64(function, every)
    return look_up(TABLES[key], x)


def through_float64(function: Function, x: torch.Tensor) -> torch.Tensor:
    """Exact into float64, then rounded to float32, then to the dtype of x."""
    value = function(x.double())
    return value if x.dtype == torch.float64 else value.float().to(x.dtype)
