"""Rounded weights are read back as compressed-tensors reads them, and every kind of damage to them is counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import draw_weight, on_each_dtype, torch_dtype

from builder.floats import FLOATS
from builder.readback import EPSILON, ROUNDINGS, SMALLEST, Rounding, read_floats, round_floats
from builder.schemes.rounded import ROUNDED

STORED = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def rounded(name: str, weight: torch.Tensor) -> tuple[Rounding, Any, Any, Any, str]:
    """(rounding, codes, scales, weights, dtype) of a weight that the scheme itself has rounded, read as numbers."""
    rounding = ROUNDINGS[name]
    made = ROUNDED[name].quantize_group({"q": weight}, {})
    raw = {key.removeprefix("q."): value.contiguous().view(torch.uint8).numpy() for key, value in made.items()}
    codes = rounding.read_codes(raw[rounding.codes])
    scales = read_floats(raw["weight_scale"], STORED[weight.dtype])
    return rounding, codes, scales, weight.float().numpy(), STORED[weight.dtype]


def make_weight(sigma: float = 0.02, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (sigma * torch.randn(16, 256, generator=torch.Generator().manual_seed(0))).to(dtype)


def count(rounding: Rounding, codes: Any, scales: Any, weights: Any, dtype: str = "BF16") -> tuple[int, int, int]:
    """How many scales are wrong, groups idle, weights far."""
    wrong = int((scales != rounding.make_scales(weights, dtype)).sum())
    return wrong, rounding.count_idle(codes, weights, dtype), rounding.count_far(codes, scales, weights, dtype)


@pytest.mark.parametrize("name", ROUNDINGS)
@pytest.mark.parametrize(
    ("dtype", "sigma"),
    [
        *(
            (dtype, sigma)
            for dtype in (torch.bfloat16, torch.float32)
            for sigma in (0.02, 1, 1e-30, 1e-37, 1e-39, 1e36)
        ),
        *((torch.float16, sigma) for sigma in (0.02, 1, 1e-3, 1e-5, 1e-7, 1e4)),
    ],
)
def test_what_the_scheme_makes_is_sound_whatever_the_size_of_the_weights(
    name: str, dtype: torch.dtype, sigma: float
) -> None:
    assert count(*rounded(name, make_weight(sigma, dtype))) == (0, 0, 0)


@on_each_dtype
@pytest.mark.parametrize("name", ROUNDINGS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_finite_weights_are_sound(name: str, dtype: str, data: st.DataObject) -> None:
    weight = draw_weight(data, dtype, 2, 128)
    if dtype != "float16":  # nor so large that eight scales are beyond float32
        weight = weight.where(weight.abs() < 1e37, 1)
    assert count(*rounded(name, weight)) == (0, 0, 0)


@on_each_dtype
@pytest.mark.parametrize("name", ROUNDINGS)
def test_zeros_are_sound(name: str, dtype: str) -> None:
    assert count(*rounded(name, torch.zeros(4, 128).to(torch_dtype(dtype)))) == (0, 0, 0)


@on_each_dtype
@pytest.mark.parametrize("name", ROUNDINGS)
def test_a_scale_that_is_off_by_its_last_bit_is_wrong(name: str, dtype: str) -> None:
    rounding, codes, scales, weights, stored = rounded(name, make_weight(dtype=torch_dtype(dtype)))
    scales[3, 0] *= 1 + torch.finfo(torch_dtype(dtype)).eps
    assert count(rounding, codes, scales, weights, stored)[0] == 1


@pytest.mark.parametrize("name", ROUNDINGS)
def test_rows_that_were_left_unwritten_are_idle(name: str) -> None:
    rounding, codes, scales, weights, _ = rounded(name, make_weight())
    codes[5:7] = 0
    _, idle, far = count(rounding, codes, scales, weights)
    assert idle == 2 * scales.shape[1]
    assert far > 300


@pytest.mark.parametrize("name", ROUNDINGS)
def test_weights_of_another_row_or_sign_are_far(name: str) -> None:
    rounding, codes, scales, weights, _ = rounded(name, make_weight())
    swapped = codes[::-1].copy()
    assert count(rounding, swapped, scales, weights)[2] > weights.size / 2
    codes[2, 9] = -codes[2, 9] if abs(codes[2, 9]) > 1 else codes[2, 9] + 4
    assert count(rounding, codes, scales, weights)[2] == 1


@on_each_dtype
@pytest.mark.parametrize("name", ROUNDINGS)
def test_codes_are_read_as_compressed_tensors_reads_them(name: str, dtype: str) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    weight = make_weight(dtype=torch_dtype(dtype))
    made = {key.removeprefix("q."): value for key, value in ROUNDED[name].quantize_group({"q": weight}, {}).items()}
    (group,) = QuantizationConfig.model_validate(ROUNDED[name].quantization_config([])).config_groups.values()
    theirs = BaseCompressor.get_value_from_registry(group.format).decompress(made, group)["weight"]
    rounding, codes, scales, _, stored = rounded(name, weight)
    ours = (rounding.split(codes) * scales[..., None]).reshape(weight.shape)
    assert theirs.dtype == weight.dtype
    np.testing.assert_array_equal(round_floats(ours, stored), theirs.float().numpy())


@on_each_dtype
def test_rounding_is_that_of_torch(dtype: str) -> None:
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 2**32, 100_000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = np.concatenate([values[np.isfinite(values)], np.float32([0, -0.0, np.inf, -np.inf, 1 + 2**-8, 3e38])])
    stored = STORED[torch_dtype(dtype)]
    ours = round_floats(values, stored)
    np.testing.assert_array_equal(ours, torch.from_numpy(values).to(torch_dtype(dtype)).float().numpy())
    assert np.isnan(round_floats(np.float32([np.nan]), stored)).all()


@on_each_dtype
def test_what_is_said_of_a_dtype_is_what_torch_says(dtype: str) -> None:
    info, stored = torch.finfo(torch_dtype(dtype)), STORED[torch_dtype(dtype)]
    assert (EPSILON[stored], SMALLEST[stored]) == (info.eps, info.tiny)
    assert FLOATS[stored].epsilon == info.eps
