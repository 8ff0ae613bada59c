"""Rounded weights are read back as compressed-tensors reads them, and every kind of damage to them is counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.readback import ROUNDINGS, Rounding, read_floats, round_to_bf16
from builder.schemes.rounded import ROUNDED


def rounded(name: str, weight: torch.Tensor) -> tuple[Rounding, Any, Any, Any]:
    """(rounding, codes, scales, weights) of a weight that the scheme itself has rounded, read back as numbers."""
    rounding = ROUNDINGS[name]
    made = ROUNDED[name].quantize_group({"q": weight}, {})
    raw = {key.removeprefix("q."): value.contiguous().view(torch.uint8).numpy() for key, value in made.items()}
    codes = rounding.read_codes(raw[rounding.codes])
    return rounding, codes, read_floats(raw["weight_scale"], "BF16"), weight.float().numpy()


def make_weight(sigma: float = 0.02) -> torch.Tensor:
    return (sigma * torch.randn(16, 256, generator=torch.Generator().manual_seed(0))).bfloat16()


def count(rounding: Rounding, codes: Any, scales: Any, weights: Any) -> tuple[int, int, int]:
    """How many scales are wrong, groups idle, weights far."""
    wrong = int((scales != rounding.make_scales(weights)).sum())
    return wrong, rounding.count_idle(codes, weights), rounding.count_far(codes, scales, weights)


@pytest.mark.parametrize("name", ROUNDINGS)
@pytest.mark.parametrize("sigma", [0.02, 1.0, 1e-30, 1e-37, 1e-39, 1e36])
def test_what_the_scheme_makes_is_sound_whatever_the_size_of_the_weights(name: str, sigma: float) -> None:
    assert count(*rounded(name, make_weight(sigma))) == (0, 0, 0)


@pytest.mark.parametrize("name", ROUNDINGS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_finite_weights_are_sound(name: str, data: st.DataObject) -> None:
    words = np.frombuffer(data.draw(st.binary(min_size=512, max_size=512)), np.uint16).copy()
    words[(words & 0x7F80) >= 0x7E80] ^= 0x4000  # nor so large that eight scales are beyond float32
    weight = torch.from_numpy(words).view(torch.bfloat16).reshape(2, 128)
    assert count(*rounded(name, weight)) == (0, 0, 0)


@pytest.mark.parametrize("name", ROUNDINGS)
def test_zeros_are_sound(name: str) -> None:
    assert count(*rounded(name, torch.zeros(4, 128).bfloat16())) == (0, 0, 0)


@pytest.mark.parametrize("name", ROUNDINGS)
def test_a_scale_that_is_off_by_its_last_bit_is_wrong(name: str) -> None:
    rounding, codes, scales, weights = rounded(name, make_weight())
    scales[3, 0] *= 1 + 2.0**-7
    assert count(rounding, codes, scales, weights)[0] == 1


@pytest.mark.parametrize("name", ROUNDINGS)
def test_rows_that_were_left_unwritten_are_idle(name: str) -> None:
    rounding, codes, scales, weights = rounded(name, make_weight())
    codes[5:7] = 0
    _, idle, far = count(rounding, codes, scales, weights)
    assert idle == 2 * scales.shape[1]
    assert far > 300


@pytest.mark.parametrize("name", ROUNDINGS)
def test_weights_of_another_row_or_sign_are_far(name: str) -> None:
    rounding, codes, scales, weights = rounded(name, make_weight())
    swapped = codes[::-1].copy()
    assert count(rounding, swapped, scales, weights)[2] > weights.size / 2
    codes[2, 9] = -codes[2, 9] if abs(codes[2, 9]) > 1 else codes[2, 9] + 4
    assert count(rounding, codes, scales, weights)[2] == 1


@pytest.mark.parametrize("name", ROUNDINGS)
def test_codes_are_read_as_compressed_tensors_reads_them(name: str) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    weight = make_weight()
    made = {key.removeprefix("q."): value for key, value in ROUNDED[name].quantize_group({"q": weight}, {}).items()}
    (group,) = QuantizationConfig.model_validate(ROUNDED[name].quantization_config([])).config_groups.values()
    theirs = BaseCompressor.get_value_from_registry(group.format).decompress(made, group)["weight"]
    rounding, codes, scales, _ = rounded(name, weight)
    ours = (rounding.split(codes) * scales[..., None]).reshape(weight.shape)
    np.testing.assert_array_equal(round_to_bf16(ours), theirs.float().numpy())


def test_rounding_to_bf16_is_that_of_torch() -> None:
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 2**32, 100_000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = np.concatenate([values[np.isfinite(values)], np.float32([0, -0.0, np.inf, -np.inf, 1 + 2**-8, 3e38])])
    ours = round_to_bf16(values)
    np.testing.assert_array_equal(ours, torch.from_numpy(values).bfloat16().float().numpy())
    assert np.isnan(round_to_bf16(np.float32([np.nan]))).all()
