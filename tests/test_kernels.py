"""The kernels give the bits of nvidia-modelopt's own functions, for every weight there can be."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from builder.compiled import CHUNK_ELEMENTS, E4M3_VALUES
from builder.errors import LayoutError
from builder.floats import FLOATS, read_words
from builder.kernels import max_magnitude, pack_nvfp4

DTYPES = tuple(kind.name for kind in FLOATS.values())
on_each_dtype = pytest.mark.parametrize("dtype", DTYPES)
E2M1_TIES = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
SMALLEST_FLOAT32 = 2.0**-149


@pytest.fixture(scope="module")
def modelopt_nvfp4() -> Any:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    return NVFP4QTensor


def torch_dtype(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found


def largest(dtype: str) -> float:
    return torch.finfo(torch_dtype(dtype)).max


def smallest(dtype: str) -> float:
    """The smallest number that is not subnormal."""
    return torch.finfo(torch_dtype(dtype)).tiny


def from_words(words: Any, dtype: str = "bfloat16") -> Tensor:
    """A tensor of numbers with these bits."""
    bits = np.asarray(words, np.uint32 if dtype == "float32" else np.uint16)
    return torch.from_numpy(bits).view(torch_dtype(dtype))


def make_finite(words: np.ndarray, dtype: str) -> np.ndarray:
    """Bits of any numbers; what was infinite or NaN gets another exponent."""
    exponent, highest = {
        "bfloat16": (0x7F80, 0x4000),
        "float16": (0x7C00, 0x4000),
        "float32": (0x7F800000, 0x40000000),
    }[dtype]
    return np.where((words & exponent) == exponent, words ^ words.dtype.type(highest), words)


def finite_words(dtype: str = "bfloat16") -> np.ndarray:
    """The bits of every finite number; of float32, of many, all exponents and the ends of mantissas among them."""
    if dtype != "float32":
        words = np.arange(1 << 16).astype(np.uint16)
        return words[np.isfinite(from_words(words, dtype).float().numpy())]
    exponents = np.arange(255).astype(np.uint32)[:, None] << 23
    mantissas = np.array([0, 1, 2, 0x3FFFFF, 0x400000, 0x400001, 0x7FFFFE, 0x7FFFFF], np.uint32)
    edges = (exponents | mantissas).reshape(-1)
    others = np.random.default_rng(2).integers(0, 1 << 32, 65280 - 2 * edges.size, np.uint32)
    words = np.concatenate([edges, edges | np.uint32(1 << 31), make_finite(others, dtype)])
    return words[np.argsort(words)]


def normals(sigma: float, num_rows: int = 64, num_columns: int = 512, dtype: str = "bfloat16") -> Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(num_rows, num_columns, generator=generator).mul(sigma)
    return values.clamp(-0.99 * largest(dtype), 0.99 * largest(dtype)).to(torch_dtype(dtype))


def covering_scale(weight: Tensor) -> float:
    return float(weight.abs().amax().float() / (6.0 * 448.0))


def reference_0_47(nvfp4: Any, weight: Tensor, scale_2: float) -> tuple[Tensor, Tensor]:
    global_scale = torch.tensor(scale_2)
    scales, _ = nvfp4.get_weights_scaling_factor(weight, 16, global_scale)
    return nvfp4.quantize(weight, 16, scales, global_scale)[0]._quantized_data, scales


def reference_0_43(nvfp4: Any, weight: Tensor, scale_2: float) -> tuple[Tensor, Tensor]:
    """modelopt 0.43.0, qtensor/nvfp4_tensor.py, lines 160 to 170; its `quantize` is that of 0.47."""
    global_scale = torch.tensor(scale_2)
    scales = weight.view(len(weight), -1, 16).abs().amax(-1).float() / (6.0 * global_scale)
    scales[scales == 0] = 1.0
    scales = scales.to(torch.float8_e4m3fn)
    return nvfp4.quantize(weight, 16, scales, global_scale)[0]._quantized_data, scales


def assert_same_bits(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    for our, their in zip(ours, theirs, strict=True):
        assert (our.dtype, our.shape) == (their.dtype, their.shape)
        differing = (our.view(torch.uint8) != their.view(torch.uint8)).nonzero()
        assert not len(differing), f"{len(differing)} of {our.numel()} bytes differ, first at {differing[0].tolist()}"


def assert_equals_modelopt(nvfp4: Any, weight: Tensor, scale_2: float) -> None:
    assert_same_bits(pack_nvfp4(weight, scale_2), reference_0_47(nvfp4, weight, scale_2))
    assert_same_bits(pack_nvfp4(weight, scale_2, block_scale_floor=False), reference_0_43(nvfp4, weight, scale_2))


def zeros_among_others(dtype: str = "bfloat16") -> Tensor:
    weight = normals(0.02, 5, 64, dtype)
    weight[1] = 0.0
    weight[2] = -0.0
    weight[3, :16] = 0.0
    weight[4, ::2] = -0.0
    return weight


def rows_of_all_sizes(dtype: str) -> Tensor:
    sizes = torch.logspace(np.log10(smallest(dtype)), np.log10(largest(dtype)) - 1, 64)
    return normals(1, dtype="float32").mul(sizes[:, None]).to(torch_dtype(dtype))


def subnormals(dtype: str) -> Tensor:
    weight = from_words(finite_words(dtype), dtype)
    weight = weight[weight.abs() < smallest(dtype)]
    return weight[: len(weight) // 16 * 16].reshape(1, -1)


def shuffled(dtype: str, seed: int = 0) -> Tensor:
    return from_words(np.random.default_rng(seed).permutation(finite_words(dtype)), dtype).reshape(-1, 256)


WEIGHTS: dict[str, Callable[[str], Tensor]] = {
    "normals of sigma 1": lambda dtype: normals(1, dtype=dtype),
    "normals of sigma 0.02": lambda dtype: normals(0.02, dtype=dtype),
    "tiny normals": lambda dtype: normals(20 * smallest(dtype), dtype=dtype),
    "huge values": lambda dtype: normals(largest(dtype) / 3, dtype=dtype),
    "rows of very different size": rows_of_all_sizes,
    "zeros and negative zeros": zeros_among_others,
    "subnormals alone": subnormals,
    "every finite value, sorted": lambda dtype: from_words(finite_words(dtype), dtype).reshape(-1, 256),
    "every finite value, shuffled": lambda dtype: shuffled(dtype),
    "an odd number of rows": lambda dtype: normals(0.02, 7, 48, dtype),
    "a single block": lambda dtype: normals(0.02, 1, 16, dtype),
}


@on_each_dtype
@pytest.mark.parametrize("name", WEIGHTS)
def test_packing_gives_the_bits_of_modelopt(modelopt_nvfp4: Any, name: str, dtype: str) -> None:
    weight = WEIGHTS[name](dtype)
    assert_equals_modelopt(modelopt_nvfp4, weight, covering_scale(weight))


def beside_companions(companion: float, dtype: str) -> Tensor:
    """Blocks of a companion, zeros, and one of every finite value each."""
    values = from_words(finite_words(dtype), dtype).view(-1, 256)
    weight = torch.zeros(len(values), 4096, dtype=torch_dtype(dtype))
    weight[:, 3::16] = companion
    weight[:, 8::16] = values
    return weight


def list_companions(dtype: str) -> list[float]:
    return [64 * smallest(dtype), 0.02, 1.0, largest(dtype)]


@on_each_dtype
@pytest.mark.parametrize("index", range(4))
def test_every_finite_value_is_packed_as_modelopt_does_beside_a_larger_one(
    modelopt_nvfp4: Any, index: int, dtype: str
) -> None:
    companion = list_companions(dtype)[index]
    scale_2 = covering_scale(torch.tensor(companion, dtype=torch_dtype(dtype)))
    assert_equals_modelopt(modelopt_nvfp4, beside_companions(companion, dtype), scale_2)


GLOBAL_SCALES = [SMALLEST_FLOAT32, 1e-40, 1e-6, 1.0, 1e35, 3e38]


@on_each_dtype
@pytest.mark.parametrize("scale_2", GLOBAL_SCALES)
def test_any_global_scale_gives_the_bits_of_modelopt(modelopt_nvfp4: Any, scale_2: float, dtype: str) -> None:
    assert_equals_modelopt(modelopt_nvfp4, shuffled(dtype, 1), float(np.float32(scale_2)))


def tied_codes(dtype: str) -> Tensor:
    """Weights at ties of codes and one step beside them, in blocks whose scale is 1, with 1 for global scale."""
    ties = torch.tensor([*E2M1_TIES, 6.0], dtype=torch_dtype(dtype))
    down, up = (ties.nextafter(torch.tensor(end, dtype=ties.dtype)) for end in (0.0, 100.0))
    positive = torch.cat([down, ties, up[:-1]])
    weight = torch.full((2 * len(positive), 16), 6.0, dtype=ties.dtype)
    weight[:, 5] = torch.cat([positive, -positive])
    return weight


def tied_scales(dtype: str) -> Tensor:
    """Blocks whose scales, with 1 for global scale, are ties of E4M3."""
    values = torch.from_numpy(E4M3_VALUES[:0x7F])
    ties = (values[1:] + values[:-1]) / 2 * 6
    assert torch.equal(ties, ties.to(torch_dtype(dtype)).float())
    weight = torch.zeros(len(ties), 16, dtype=torch_dtype(dtype))
    weight[:, 0] = -ties
    return weight


@on_each_dtype
def test_codes_at_exact_ties_and_beside_them_are_those_of_modelopt(modelopt_nvfp4: Any, dtype: str) -> None:
    assert_equals_modelopt(modelopt_nvfp4, tied_codes(dtype), 1.0)
    _, scales = pack_nvfp4(tied_codes(dtype), 1.0)
    assert torch.all(scales.float() == 1)


@on_each_dtype
def test_block_scales_at_exact_ties_are_those_of_modelopt(modelopt_nvfp4: Any, dtype: str) -> None:
    assert_equals_modelopt(modelopt_nvfp4, tied_scales(dtype), 1.0)


def draw_weight(data: st.DataObject, dtype: str, num_rows: int, num_columns: int) -> Tensor:
    """Any finite bits."""
    kind = np.uint32 if dtype == "float32" else np.uint16
    num_bytes = num_rows * num_columns * np.dtype(kind).itemsize
    words = np.frombuffer(data.draw(st.binary(min_size=num_bytes, max_size=num_bytes)), kind)
    return from_words(make_finite(words, dtype), dtype).reshape(num_rows, num_columns)


any_shape = st.tuples(st.integers(1, 3), st.integers(1, 3))
any_scale = st.none() | st.floats(SMALLEST_FLOAT32, largest("bfloat16"), width=32)


@on_each_dtype
@given(shape=any_shape, scale_2=any_scale, data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_finite_bits_are_packed_as_modelopt_does(
    modelopt_nvfp4: Any, dtype: str, shape: tuple[int, int], scale_2: float | None, data: st.DataObject
) -> None:
    weight = draw_weight(data, dtype, shape[0], 16 * shape[1])
    assert_equals_modelopt(modelopt_nvfp4, weight, scale_2 or covering_scale(weight) or 1.0)


@on_each_dtype
def test_arrays_are_packed_like_tensors(dtype: str) -> None:
    weight = normals(0.02, dtype=dtype)
    array = read_words(weight).view(next(kind.array for kind in FLOATS.values() if kind.name == dtype))
    assert max_magnitude(array) == max_magnitude(weight)
    packed, scales = pack_nvfp4(array, 1e-4)
    wanted, wanted_scales = pack_nvfp4(weight, 1e-4)
    assert np.array_equal(packed, wanted.numpy())
    assert np.array_equal(scales, wanted_scales.view(torch.uint8).numpy())


def test_a_byte_holds_the_even_column_below_and_the_odd_one_above() -> None:
    row = [0.0, 0.5, -1.0, 1.5, 2.0, -3.0, 4.0, 6.0, -0.0, -0.5, 1.0, -1.5, -2.0, 3.0, -4.0, -6.0]
    packed, scales = pack_nvfp4(torch.tensor([row]).bfloat16(), 1.0)
    assert packed.tolist() == [[0x10, 0x3A, 0xD4, 0x76, 0x90, 0xB2, 0x5C, 0xFE]]
    assert scales.float().tolist() == [[1.0]]


def test_without_the_floor_a_tiny_block_gets_scale_zero_and_sixes() -> None:
    weight = torch.zeros(1, 48).bfloat16()
    weight[0, 0] = 2688.0
    weight[0, 16:19] = torch.tensor([1e-4, -1e-4, -0.0])
    packed, scales = pack_nvfp4(weight, 1.0, block_scale_floor=False)
    assert scales.float().tolist() == [[448.0, 0.0, 1.0]]
    assert packed[0, 8:].tolist() == [0xF7] + [0x77] * 7 + [0x00] * 8
    packed, scales = pack_nvfp4(weight, 1.0)
    assert scales.float().tolist() == [[448.0, 2.0**-9, 1.0]]
    assert packed[0, 8:].tolist() == [0x80] + [0x00] * 15


@pytest.mark.parametrize(
    "view",
    [
        lambda weight: weight.t(),
        lambda weight: weight[:, ::2],
        lambda weight: weight[1:, 16:48],
        lambda weight: weight.view(-1)[1:][: 62 * 64].view(62, 64),
        lambda weight: torch.nn.Parameter(weight),
    ],
    ids=["transposed", "every second column", "a window", "an odd address", "a parameter"],
)
def test_a_view_is_packed_like_its_copy(view: Callable[[Tensor], Tensor]) -> None:
    weight = view(normals(0.02, 64, 64))
    copy = weight.detach().clone(memory_format=torch.contiguous_format)
    assert_same_bits(pack_nvfp4(weight, 1e-4), pack_nvfp4(copy, 1e-4))
    assert max_magnitude(weight) == max_magnitude(copy)


@on_each_dtype
def test_a_contiguous_weight_is_read_in_place_and_left_as_it_was(dtype: str) -> None:
    weight = normals(0.02, dtype=dtype)
    before = weight.clone()
    assert read_words(weight).ctypes.data == weight.data_ptr()
    pack_nvfp4(weight, max_magnitude(weight) / 2688)
    assert torch.equal(weight, before)


@pytest.fixture
def num_threads() -> Iterator[Callable[[int], None]]:
    before = numba.get_num_threads()
    yield numba.set_num_threads
    numba.set_num_threads(before)


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="one core")
def test_bits_do_not_depend_on_the_number_of_threads(num_threads: Callable[[int], None]) -> None:
    weight = normals(0.02, 129, 16384)
    num_threads(1)
    alone, alone_max = pack_nvfp4(weight, 1e-4), max_magnitude(weight)
    num_threads(2)
    assert_same_bits(pack_nvfp4(weight, 1e-4), alone)
    assert max_magnitude(weight) == alone_max


def test_kernels_can_be_called_from_several_threads_whatever_library_gives_numba_its_own() -> None:
    program = """
import threading, torch
from builder.kernels import max_magnitude, pack_nvfp4
weight = torch.ones(512, 1024).bfloat16()
def work():
    for _ in range(20):
        assert max_magnitude(weight) == 1
        assert pack_nvfp4(weight, 1 / 2688)[0].unique().tolist() == [0x77]
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print("done")
"""
    environment = {**os.environ, "NUMBA_THREADING_LAYER": "workqueue"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


@on_each_dtype
@pytest.mark.parametrize("name", WEIGHTS)
def test_max_magnitude_is_exact(name: str, dtype: str) -> None:
    weight = WEIGHTS[name](dtype)
    assert max_magnitude(weight) == weight.double().abs().max().item()


@pytest.mark.parametrize("index", [0, CHUNK_ELEMENTS - 1, CHUNK_ELEMENTS, 2 * CHUNK_ELEMENTS + 6])
def test_max_magnitude_finds_the_largest_wherever_it_is(index: int) -> None:
    weight = torch.zeros(2 * CHUNK_ELEMENTS + 7).bfloat16()
    weight[index] = -3.0
    assert max_magnitude(weight) == 3.0


@on_each_dtype
def test_max_magnitude_of_zeros_or_nothing_is_zero(dtype: str) -> None:
    for weight in (torch.tensor([-0.0]), torch.empty(0, 16)):
        assert str(max_magnitude(weight.to(torch_dtype(dtype)))) == "0.0"


@on_each_dtype
@pytest.mark.parametrize("sign", [1, -1])
def test_max_magnitude_reports_infinity_and_nan_above_it(sign: int, dtype: str) -> None:
    weight = normals(0.02, dtype=dtype)
    weight[3, 5] = sign * torch.inf
    assert max_magnitude(weight) == float("inf")
    weight[60, 7] = sign * torch.nan
    assert np.isnan(max_magnitude(weight))


def all_words(dtype: str) -> Tensor:
    """Every number there is, or of float32 many, infinities and NaNs among them."""
    words = np.arange(1 << 16, dtype=np.uint32)
    return from_words(words * 65537 if dtype == "float32" else words.astype(np.uint16), dtype).view(256, 256)


@on_each_dtype
def test_weights_that_should_have_been_refused_are_packed_without_a_crash(dtype: str) -> None:
    for scale_2 in (0.0, 1.0, float("inf"), float("nan")):
        packed, scales = pack_nvfp4(all_words(dtype), scale_2)
        assert (packed.shape, scales.shape) == ((256, 128), (256, 16))


@pytest.mark.parametrize("shape", [(32, 24), (32,), (2, 32, 32)])
def test_a_weight_without_whole_blocks_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(LayoutError) as caught:
        pack_nvfp4(torch.zeros(shape).bfloat16(), 1.0)
    assert str(caught.value) == (
        f"a weight of shape {list(shape)} cannot be cut into blocks of 16 columns\n"
        "  fix: add this linear to the scheme's ignore list"
    )


@pytest.mark.parametrize("dtype", ["float64", "int8", "float8_e4m3fn"])
def test_a_weight_of_another_dtype_is_refused(dtype: str) -> None:
    weight = torch.zeros(16, 16).to(torch_dtype(dtype))
    for kernel in (max_magnitude, lambda weight: pack_nvfp4(weight, 1.0)):
        with pytest.raises(LayoutError) as caught:
            kernel(weight)
        assert str(caught.value) == (
            f"a weight of dtype {dtype}, where only bfloat16, float16 or float32 can be read\n"
            "  fix: use a base model in one of these, or add this linear to the scheme's ignore list"
        )
