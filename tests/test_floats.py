"""What is known of each dtype is what torch knows, and numbers round to it as torch rounds them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_kernels import finite_words, from_words, on_each_dtype, torch_dtype
from torch import Tensor

from builder.errors import LayoutError
from builder.floats import FLOATS, STORED, Float, find_float, read_words


def kind_of(dtype: str) -> Float:
    return FLOATS[STORED[dtype]]


def as_array(weight: Tensor) -> np.ndarray:
    return read_words(weight).view(find_float(weight).array)


@on_each_dtype
def test_a_dtype_is_found_of_tensors_and_arrays_alike(dtype: str) -> None:
    weight = torch.zeros(2, 3, dtype=torch_dtype(dtype))
    assert find_float(weight) == find_float(as_array(weight)) == kind_of(dtype)
    assert kind_of(dtype).epsilon == torch.finfo(torch_dtype(dtype)).eps
    assert kind_of(dtype).word.itemsize * 2 == kind_of(dtype).pair.itemsize == weight.itemsize * 2


@pytest.mark.parametrize("array", [np.zeros(2, np.float64), np.zeros(2, np.int16), torch.zeros(2).to(torch.uint16)])
def test_any_other_dtype_is_refused(array: np.ndarray) -> None:
    with pytest.raises(LayoutError, match="where only bfloat16, float16 or float32 can be read"):
        find_float(array)


@on_each_dtype
def test_values_are_rounded_as_torch_rounds_them(dtype: str) -> None:
    values = from_words(finite_words("float32"), "float32")
    wanted = values.to(torch_dtype(dtype))
    rounded = kind_of(dtype).round(values.numpy())
    assert np.array_equal(rounded.view(kind_of(dtype).word), read_words(wanted))


@on_each_dtype
def test_a_single_number_is_rounded_and_read(dtype: str) -> None:
    kind = kind_of(dtype)
    for value in (0.0, 1.1, 65504.0, 2.0**-24 * 1.5):
        rounded = kind.round(np.array(value, np.float32))
        assert kind.read(rounded) == torch.tensor(value).to(torch_dtype(dtype)).item()


@on_each_dtype
def test_words_of_an_array_at_an_odd_address_are_those_of_its_copy(dtype: str) -> None:
    kind = kind_of(dtype)
    raw = np.arange(1 + 64 * kind.array.itemsize, dtype=np.uint8)
    unaligned = raw[1:].view(kind.array)
    assert not unaligned.flags.aligned
    assert np.array_equal(read_words(unaligned), read_words(unaligned.copy()))
