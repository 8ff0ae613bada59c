"""The FP8, INT8 and INT4 kernels give the bits of compressed-tensors, which are llm-compressor's, for every weight."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import assert_same_bits, finite_words, from_words, normals, zeros_among_others
from torch import Tensor

from builder.errors import LayoutError
from builder.kernels import pack_int4, quantize_fp8, quantize_int8

Kernel = Callable[[Tensor], tuple[Tensor, Tensor]]
KERNELS: dict[str, Kernel] = {"FP8_DYNAMIC": quantize_fp8, "W8A8": quantize_int8, "W4A16": pack_int4}
LARGEST_CODE = {"FP8_DYNAMIC": 448.0, "W8A8": 127.5, "W4A16": 7.5}


def reference(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As llm-compressor's `oneshot` computes it on the CPU, scales and zero points included."""
    scheme = preset_name_to_scheme(name, ["Linear"]).weights
    assert scheme is not None
    if scheme.strategy == "group":
        groups = weight.reshape(len(weight), -1, scheme.group_size)
        smallest, largest = groups.amin(-1), groups.amax(-1)
    else:
        smallest, largest = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    scale, zero_point = calculate_qparams(smallest, largest, scheme)
    dtype = torch.float8_e4m3fn if name == "FP8_DYNAMIC" else torch.int8
    codes = quantize(x=weight, scale=scale, zero_point=zero_point, args=scheme, dtype=dtype)
    return (pack_to_int32(codes, 4) if name == "W4A16" else codes), scale


def ties(name: str) -> Tensor:
    """Values on and beside the middle between two codes, in rows whose scale is 1."""
    largest = LARGEST_CODE[name]
    steps = torch.arange(0, largest, 0.5).bfloat16()
    beside = torch.cat([steps, (steps.view(torch.int16) + 1).view(torch.bfloat16)])
    beside = beside[beside <= largest]
    both = torch.cat([beside, -beside])
    both = both[: len(both) // 127 * 127] if len(both) >= 127 else both.repeat(127)[: 127 * len(both)]
    return torch.cat([torch.full((len(both) // 127, 1), largest).bfloat16(), both.reshape(-1, 127)], dim=1)


WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "normals of sigma 0.02": lambda: normals(0.02),
    "normals of sigma 1e-39": lambda: normals(1e-39),
    "huge values": lambda: normals(1e38),
    "rows of very different size": lambda: normals(1) * torch.logspace(-38, 37, 64)[:, None].bfloat16(),
    "zeros and negative zeros": lambda: zeros_among_others().repeat(1, 2),
    "every finite value, sorted": lambda: from_words(finite_words()).reshape(-1, 256),
    "every finite value, shuffled": lambda: from_words(np.random.default_rng(0).permutation(finite_words())).view(
        -1, 256
    ),
    "an odd number of rows": lambda: normals(0.02, 7, 384),
    "a single group": lambda: normals(0.02, 1, 128),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_codes_and_scales_are_those_of_the_reference(name: str, weight: str) -> None:
    assert_same_bits(KERNELS[name](WEIGHTS[weight]()), reference(name, WEIGHTS[weight]()))


@pytest.mark.parametrize("name", KERNELS)
def test_codes_at_ties_and_beside_them_are_those_of_the_reference(name: str) -> None:
    weight = ties(name)
    codes, scales = KERNELS[name](weight)
    assert torch.all(scales == 1)
    assert_same_bits((codes, scales), reference(name, weight))


@pytest.mark.parametrize("name", KERNELS)
@given(data=st.data(), rows=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_any_finite_bits_are_quantized_as_the_reference_does(name: str, data: st.DataObject, rows: int) -> None:
    words = np.frombuffer(data.draw(st.binary(min_size=256 * rows, max_size=256 * rows)), np.uint16).copy()
    words[(words & 0x7F80) == 0x7F80] ^= 0x4000
    weight = from_words(words).reshape(rows, 128)
    assert_same_bits(KERNELS[name](weight), reference(name, weight))


def test_a_negative_zero_becomes_a_positive_one_and_a_tiny_negative_weight_a_negative_one() -> None:
    codes, _ = quantize_fp8(torch.tensor([[448.0, -0.0, -1e-30, 0.0]]).bfloat16())
    assert codes.view(torch.uint8).tolist() == [[0x7E, 0x00, 0x80, 0x00]]


def test_eight_columns_are_in_a_word_the_first_in_its_lowest_bits() -> None:
    row = torch.zeros(1, 128).bfloat16()
    row[0, :8] = torch.tensor([7.5, -8.0, 0.0, 1.0, -1.0, 2.0, 3.0, 4.0])
    row[0, 1] = -7.5
    packed, scales = pack_int4(row)
    assert scales.tolist() == [[1.0]]
    assert packed[0, 0].item() & 0xFFFFFFFF == 0xCBA7980F
    assert packed[0, 1].item() & 0xFFFFFFFF == 0x88888888


@pytest.mark.parametrize("shape", [(2, 100), (128,), (2, 2, 128)])
def test_a_weight_that_cannot_be_cut_into_groups_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(LayoutError, match="cannot be cut into blocks of 128 columns"):
        pack_int4(torch.zeros(shape).bfloat16())
