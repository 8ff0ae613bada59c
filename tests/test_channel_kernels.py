"""The FP8, INT8 and INT4 kernels give the bits of compressed-tensors, which are llm-compressor's, for every weight."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import (
    all_words,
    assert_same_bits,
    draw_weight,
    finite_words,
    from_words,
    largest,
    normals,
    on_each_dtype,
    rows_of_all_sizes,
    shuffled,
    smallest,
    subnormals,
    torch_dtype,
    zeros_among_others,
)
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


def ties(name: str, dtype: str) -> Tensor:
    """Values on and beside the middle between two codes, in rows whose scale is 1."""
    largest_code = LARGEST_CODE[name]
    steps = torch.arange(0, largest_code, 0.5).to(torch_dtype(dtype))
    beside = torch.cat([steps.nextafter(torch.tensor(end, dtype=steps.dtype)) for end in (0.0, 1000.0)])
    beside = torch.cat([steps, beside[beside <= largest_code]])
    both = torch.cat([beside, -beside])
    both = both[: len(both) // 127 * 127] if len(both) >= 127 else both.repeat(127)[: 127 * len(both)]
    first = torch.full((len(both) // 127, 1), largest_code, dtype=steps.dtype)
    return torch.cat([first, both.reshape(-1, 127)], dim=1)


WEIGHTS: dict[str, Callable[[str], Tensor]] = {
    "normals of sigma 0.02": lambda dtype: normals(0.02, dtype=dtype),
    "tiny normals": lambda dtype: normals(smallest(dtype) / 10, dtype=dtype),
    "normals whose scales are the smallest": lambda dtype: normals(100 * smallest(dtype), dtype=dtype),
    "huge values": lambda dtype: normals(largest(dtype) / 3, dtype=dtype),
    "rows of very different size": rows_of_all_sizes,
    "zeros and negative zeros": lambda dtype: zeros_among_others(dtype).repeat(1, 2),
    "subnormals alone": lambda dtype: subnormals(dtype)[:, : subnormals(dtype).shape[1] // 128 * 128],
    "every finite value, sorted": lambda dtype: from_words(finite_words(dtype), dtype).reshape(-1, 256),
    "every finite value, shuffled": shuffled,
    "an odd number of rows": lambda dtype: normals(0.02, 7, 384, dtype),
    "a single group": lambda dtype: normals(0.02, 1, 128, dtype),
}


@on_each_dtype
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_codes_and_scales_are_those_of_the_reference(name: str, weight: str, dtype: str) -> None:
    assert_same_bits(KERNELS[name](WEIGHTS[weight](dtype)), reference(name, WEIGHTS[weight](dtype)))


@on_each_dtype
@pytest.mark.parametrize("name", KERNELS)
def test_codes_at_ties_and_beside_them_are_those_of_the_reference(name: str, dtype: str) -> None:
    weight = ties(name, dtype)
    codes, scales = KERNELS[name](weight)
    assert torch.all(scales == 1)
    assert_same_bits((codes, scales), reference(name, weight))


def every_quotient(name: str, dtype: str) -> Tensor:
    """Rows in which every finite value meets many scales."""
    values = shuffled(dtype, 3)
    sizes = torch.logspace(-6, 4, len(values)).to(values.dtype)
    return torch.cat([sizes[:, None], values.where(values.abs() <= sizes[:, None], 0)[:, :127]], dim=1)


@on_each_dtype
@pytest.mark.parametrize("name", KERNELS)
def test_quotients_of_all_sizes_are_rounded_as_the_reference_does(name: str, dtype: str) -> None:
    weight = every_quotient(name, dtype)
    assert_same_bits(KERNELS[name](weight), reference(name, weight))


@on_each_dtype
@pytest.mark.parametrize("name", KERNELS)
@given(data=st.data(), rows=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_any_finite_bits_are_quantized_as_the_reference_does(
    name: str, dtype: str, data: st.DataObject, rows: int
) -> None:
    weight = draw_weight(data, dtype, rows, 128)
    assert_same_bits(KERNELS[name](weight), reference(name, weight))


@on_each_dtype
@pytest.mark.parametrize("name", KERNELS)
def test_scales_of_zeros_are_the_dtypes_epsilon(name: str, dtype: str) -> None:
    _, scales = KERNELS[name](torch.zeros(2, 128, dtype=torch_dtype(dtype)))
    assert scales.dtype == torch_dtype(dtype)
    assert scales.tolist() == [[torch.finfo(torch_dtype(dtype)).eps]] * 2


@on_each_dtype
@pytest.mark.parametrize("name", KERNELS)
def test_weights_that_should_have_been_refused_are_quantized_without_a_crash(name: str, dtype: str) -> None:
    codes, scales = KERNELS[name](all_words(dtype))
    assert len(codes) == len(scales) == 256


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
