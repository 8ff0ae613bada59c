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

from builder.errors import LayoutError
from builder.kernels import CHUNK_ELEMENTS, E4M3_VALUES, bf16_words, max_magnitude, pack_nvfp4

LARGEST_BF16 = torch.finfo(torch.bfloat16).max
E2M1_TIES = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
SMALLEST_FLOAT32 = 2.0**-149


@pytest.fixture(scope="module")
def modelopt_nvfp4() -> Any:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    return NVFP4QTensor


def from_words(words: Any) -> Tensor:
    return torch.from_numpy(np.asarray(words, np.uint16)).view(torch.bfloat16)


def finite_words() -> np.ndarray:
    words = np.arange(1 << 16).astype(np.uint16)
    return words[(words & 0x7F80) != 0x7F80]


def normals(sigma: float, num_rows: int = 64, num_columns: int = 512) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_rows, num_columns, generator=generator).mul(sigma).clamp(-3e38, 3e38).bfloat16()


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


def zeros_among_others() -> Tensor:
    weight = normals(0.02, 5, 64)
    weight[1] = 0.0
    weight[2] = -0.0
    weight[3, :16] = 0.0
    weight[4, ::2] = -0.0
    return weight


WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "normals of sigma 1": lambda: normals(1),
    "normals of sigma 0.02": lambda: normals(0.02),
    "normals of sigma 1e-30": lambda: normals(1e-30),
    "huge values": lambda: normals(1e38),
    "rows of very different size": lambda: normals(1) * torch.logspace(-38, 37, 64)[:, None].bfloat16(),
    "zeros and negative zeros": zeros_among_others,
    "subnormals alone": lambda: from_words(finite_words()[(finite_words() & 0x7FFF) < 0x80]).reshape(1, -1),
    "every finite value, sorted": lambda: from_words(finite_words()).reshape(-1, 256),
    "every finite value, shuffled": lambda: from_words(np.random.default_rng(0).permutation(finite_words())).view(
        255, -1
    ),
    "an odd number of rows": lambda: normals(0.02, 7, 48),
    "a single block": lambda: normals(0.02, 1, 16),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_packing_gives_the_bits_of_modelopt(modelopt_nvfp4: Any, name: str) -> None:
    weight = WEIGHTS[name]()
    assert_equals_modelopt(modelopt_nvfp4, weight, covering_scale(weight))


@pytest.mark.parametrize("companion", [2.0**-120, 0.02, 1.0, LARGEST_BF16])
def test_every_finite_value_is_packed_as_modelopt_does_beside_a_larger_one(
    modelopt_nvfp4: Any, companion: float
) -> None:
    weight = torch.zeros(255, 4096).bfloat16()
    weight[:, 3::16] = companion
    weight[:, 8::16] = from_words(finite_words()).view(255, 256)
    assert_equals_modelopt(modelopt_nvfp4, weight, covering_scale(torch.tensor(companion).bfloat16()))


@pytest.mark.parametrize("scale_2", [SMALLEST_FLOAT32, 1e-40, 1e-6, 1.0, LARGEST_BF16 / 2688, 3e38])
def test_any_global_scale_gives_the_bits_of_modelopt(modelopt_nvfp4: Any, scale_2: float) -> None:
    weight = from_words(np.random.default_rng(1).permutation(finite_words())).view(255, -1)
    assert_equals_modelopt(modelopt_nvfp4, weight, float(np.float32(scale_2)))


def test_codes_at_exact_ties_and_beside_them_are_those_of_modelopt(modelopt_nvfp4: Any) -> None:
    ties = torch.tensor([*E2M1_TIES, 6.0]).bfloat16().view(torch.int16)
    positive = torch.cat([ties - 1, ties, ties[:-1] + 1]).view(torch.bfloat16)
    weight = torch.full(
        (2 * len(positive), 16), 6.0
    ).bfloat16()  # a block that holds 6 has scale 1, with 1 for global scale
    weight[:, 5] = torch.cat([positive, -positive])
    assert_equals_modelopt(modelopt_nvfp4, weight, 1.0)
    _, scales = pack_nvfp4(weight, 1.0)
    assert torch.all(scales.float() == 1)


def test_block_scales_at_exact_ties_are_those_of_modelopt(modelopt_nvfp4: Any) -> None:
    values = torch.from_numpy(E4M3_VALUES[:0x7F])
    ties = (values[1:] + values[:-1]) / 2 * 6
    assert torch.equal(ties, ties.bfloat16().float())
    weight = torch.zeros(len(ties), 16).bfloat16()
    weight[:, 0] = -ties
    assert_equals_modelopt(modelopt_nvfp4, weight, 1.0)


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    scale_2=st.none() | st.floats(SMALLEST_FLOAT32, LARGEST_BF16, width=32),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_any_finite_bits_are_packed_as_modelopt_does(
    modelopt_nvfp4: Any, shape: tuple[int, int], scale_2: float | None, data: st.DataObject
) -> None:
    num_words = 16 * shape[0] * shape[1]
    words = np.frombuffer(data.draw(st.binary(min_size=2 * num_words, max_size=2 * num_words)), np.uint16).copy()
    words[(words & 0x7F80) == 0x7F80] ^= 0x4000
    weight = from_words(words).reshape(shape[0], -1)
    if scale_2 is None:
        scale_2 = covering_scale(weight) or 1.0
    assert_equals_modelopt(modelopt_nvfp4, weight, scale_2)


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


def test_a_contiguous_weight_is_read_in_place_and_left_as_it_was() -> None:
    weight = normals(0.02)
    before = weight.clone()
    assert bf16_words(weight).ctypes.data == weight.data_ptr()
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


@pytest.mark.parametrize("name", WEIGHTS)
def test_max_magnitude_is_exact(name: str) -> None:
    weight = WEIGHTS[name]()
    assert max_magnitude(weight) == weight.double().abs().max().item()


@pytest.mark.parametrize("index", [0, CHUNK_ELEMENTS - 1, CHUNK_ELEMENTS, 2 * CHUNK_ELEMENTS + 6])
def test_max_magnitude_finds_the_largest_wherever_it_is(index: int) -> None:
    weight = torch.zeros(2 * CHUNK_ELEMENTS + 7).bfloat16()
    weight[index] = -3.0
    assert max_magnitude(weight) == 3.0


def test_max_magnitude_of_zeros_or_nothing_is_zero() -> None:
    for weight in (torch.tensor([-0.0]), torch.empty(0, 16)):
        assert str(max_magnitude(weight.bfloat16())) == "0.0"


@pytest.mark.parametrize("sign", [1, -1])
def test_max_magnitude_reports_infinity_and_nan_above_it(sign: int) -> None:
    weight = normals(0.02)
    weight[3, 5] = sign * torch.inf
    assert max_magnitude(weight) == float("inf")
    weight[60, 7] = sign * torch.nan
    assert np.isnan(max_magnitude(weight))


def test_weights_that_should_have_been_refused_are_packed_without_a_crash() -> None:
    weight = from_words(np.arange(1 << 16)).view(256, 256)
    for scale_2 in (0.0, 1.0, float("inf"), float("nan")):
        packed, scales = pack_nvfp4(weight, scale_2)
        assert (packed.shape, scales.shape) == ((256, 128), (256, 16))


@pytest.mark.parametrize("shape", [(32, 24), (32,), (2, 32, 32)])
def test_a_weight_without_whole_blocks_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(LayoutError) as caught:
        pack_nvfp4(torch.zeros(shape).bfloat16(), 1.0)
    assert str(caught.value) == (
        f"a weight of shape {list(shape)} cannot be cut into blocks of 16 columns\n"
        "  fix: add this linear to the scheme's ignore list"
    )


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_weight_of_another_dtype_is_refused(dtype: str) -> None:
    weight = torch.zeros(16, 16, dtype=getattr(torch, dtype))
    for kernel in (max_magnitude, lambda weight: pack_nvfp4(weight, 1.0)):
        with pytest.raises(LayoutError) as caught:
            kernel(weight)
        assert str(caught.value) == (
            f"a weight of dtype {dtype}, where only bfloat16 can be read\n"
            "  fix: use a bfloat16 base model, or add this linear to the scheme's ignore list"
        )
