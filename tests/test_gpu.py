"""Torch operations give the bits of the kernels on any device; with a GPU, so do whole builds.

Tests of CUDA are marked `gpu`: `make test-gpu`.
"""

from __future__ import annotations

import gc
import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_LLAMA, build
from hypothesis import given, settings
from hypothesis import strategies as st
from test_channel_kernels import LARGEST_CODE, every_quotient, ties
from test_channel_kernels import WEIGHTS as CHANNEL_WEIGHTS
from test_kernels import (
    GLOBAL_SCALES,
    WEIGHTS,
    all_words,
    any_scale,
    any_shape,
    assert_same_bits,
    beside_companions,
    covering_scale,
    draw_weight,
    list_companions,
    normals,
    on_each_dtype,
    shuffled,
    tied_codes,
    tied_scales,
    torch_dtype,
)
from test_worker import read_tensors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from builder import gpu, kernels
from builder.calibration import choose_rows
from builder.errors import LayoutError
from builder.manifest import load_manifest
from builder.schemes.nvfp4 import Nvfp4
from builder.worker import read_amax

needs_gpu = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here that torch can use"),
)
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    for mark in needs_gpu:
        test = mark(test)
    return test


def assert_equals_kernels(weight: Tensor, scale_2: float, device: str) -> None:
    """weight: on the CPU; packed there by the kernels, and on the device by torch operations."""
    there = weight.to(device)
    for floor in (True, False):
        packed, scales = gpu.pack_nvfp4(there, scale_2, block_scale_floor=floor)
        assert packed.device == scales.device == there.device
        assert_same_bits((packed.cpu(), scales.cpu()), kernels.pack_nvfp4(weight, scale_2, block_scale_floor=floor))
    assert_unmodified(there, weight)


def assert_unmodified(there: Tensor, weight: Tensor) -> None:
    assert torch.equal(there.cpu().view(torch.uint8), weight.view(torch.uint8)), "the weight was modified"


@on_each_device
@on_each_dtype
@pytest.mark.parametrize("name", WEIGHTS)
def test_torch_operations_give_the_bits_of_the_kernels(name: str, dtype: str, device: str) -> None:
    weight = WEIGHTS[name](dtype)
    assert_equals_kernels(weight, covering_scale(weight), device)
    assert gpu.max_magnitude(weight.to(device)) == kernels.max_magnitude(weight)


@on_each_device
@on_each_dtype
@pytest.mark.parametrize("index", range(4))
def test_every_finite_value_is_packed_as_the_kernels_do_beside_a_larger_one(
    index: int, dtype: str, device: str
) -> None:
    companion = list_companions(dtype)[index]
    scale_2 = covering_scale(torch.tensor(companion, dtype=torch_dtype(dtype)))
    assert_equals_kernels(beside_companions(companion, dtype), scale_2, device)


@on_each_device
@on_each_dtype
@pytest.mark.parametrize("scale_2", GLOBAL_SCALES)
def test_any_global_scale_gives_the_bits_of_the_kernels(scale_2: float, dtype: str, device: str) -> None:
    assert_equals_kernels(shuffled(dtype, 1), float(np.float32(scale_2)), device)


@on_each_device
@on_each_dtype
def test_ties_of_codes_and_of_block_scales_go_where_the_kernels_put_them(dtype: str, device: str) -> None:
    assert_equals_kernels(tied_codes(dtype), 1.0, device)
    assert_equals_kernels(tied_scales(dtype), 1.0, device)


ROUNDED = ("quantize_fp8", "quantize_int8", "pack_int4")


def assert_rounds_as_kernels(name: str, weight: Tensor, device: str) -> None:
    there = weight.to(device)
    codes, scales = getattr(gpu, name)(there)
    assert codes.device == scales.device == there.device
    assert_same_bits((codes.cpu(), scales.cpu()), getattr(kernels, name)(weight))
    assert_unmodified(there, weight)


@on_each_device
@on_each_dtype
@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("weight", CHANNEL_WEIGHTS)
def test_torch_operations_round_as_the_kernels_do(name: str, weight: str, dtype: str, device: str) -> None:
    assert_rounds_as_kernels(name, CHANNEL_WEIGHTS[weight](dtype), device)


@on_each_device
@on_each_dtype
@pytest.mark.parametrize(("name", "preset"), zip(ROUNDED, LARGEST_CODE, strict=True))
def test_torch_operations_round_ties_and_quotients_of_all_sizes_as_the_kernels_do(
    name: str, preset: str, dtype: str, device: str
) -> None:
    assert_rounds_as_kernels(name, ties(preset, dtype), device)
    assert_rounds_as_kernels(name, every_quotient(preset, dtype), device)


@on_each_device
@pytest.mark.parametrize("name", ROUNDED)
def test_chunks_of_rows_are_rounded_as_the_whole(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "WORKSPACE_BYTES", 5 * gpu.BYTES_PER_ELEMENT * 256)
    assert_rounds_as_kernels(name, normals(0.02, 64, 256), device)


@on_each_device
@on_each_dtype
@given(shape=any_shape, scale_2=any_scale, data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_finite_bits_are_packed_as_the_kernels_do(
    shape: tuple[int, int], scale_2: float | None, data: st.DataObject, dtype: str, device: str
) -> None:
    weight = draw_weight(data, dtype, shape[0], 16 * shape[1])
    assert_equals_kernels(weight, scale_2 or covering_scale(weight) or 1.0, device)


@on_each_device
@pytest.mark.parametrize("rows_at_once", [0.5, 1, 3, 7, 8])
def test_bits_do_not_depend_on_where_rows_are_cut_into_chunks(
    monkeypatch: pytest.MonkeyPatch, rows_at_once: float, device: str
) -> None:
    weight = normals(0.02, 7, 64)
    monkeypatch.setattr(gpu, "WORKSPACE_BYTES", int(rows_at_once * 64 * gpu.BYTES_PER_ELEMENT))
    assert_equals_kernels(weight, 1e-4, device)


@on_each_device
@pytest.mark.parametrize(
    "view",
    [
        lambda weight: weight.t(),
        lambda weight: weight[:, ::2],
        lambda weight: weight[1:, 16:48],
        lambda weight: weight[:0],
        lambda weight: torch.nn.Parameter(weight),
    ],
    ids=["transposed", "every second column", "a window", "no rows", "a parameter"],
)
def test_a_view_is_packed_like_its_copy(view: Callable[[Tensor], Tensor], device: str) -> None:
    weight = view(normals(0.02, 64, 64).to(device))
    packed, scales = gpu.pack_nvfp4(weight, 1e-4)
    copy = weight.detach().cpu().contiguous()
    assert_same_bits((packed.cpu(), scales.cpu()), kernels.pack_nvfp4(copy, 1e-4))
    assert gpu.max_magnitude(weight) == kernels.max_magnitude(copy)


class Divisors(TorchDispatchMode):
    """Notes what every division divides by."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "reciprocal" not in str(function)
        if ".div" in str(function):
            self.seen.append(args[1])
        return function(*args, **(kwargs or {}))


@on_each_dtype
@pytest.mark.parametrize("quantize", [lambda weight: gpu.pack_nvfp4(weight, 1e-4), gpu.quantize_fp8, gpu.pack_int4])
def test_nothing_is_divided_by_a_number_for_cuda_would_multiply_by_its_reciprocal(quantize: Any, dtype: str) -> None:
    weight = torch.empty(32, 128, dtype=torch_dtype(dtype), device="meta")
    with Divisors() as divisors:
        quantize(weight)
    assert len(divisors.seen) == 2
    assert all(isinstance(divisor, Tensor) and divisor.device == weight.device for divisor in divisors.seen)


@on_each_device
@on_each_dtype
def test_max_magnitude_of_zeros_or_nothing_is_zero_and_nan_stands_above_infinity(dtype: str, device: str) -> None:
    for zeros in (torch.tensor([-0.0]), torch.tensor([0.0, -0.0]), torch.empty(0, 16)):
        assert str(gpu.max_magnitude(zeros.to(torch_dtype(dtype)).to(device))) == "0.0"
    for sign in (1, -1):
        weight = normals(0.02, dtype=dtype).to(device)
        weight[3, 5] = sign * torch.inf
        assert gpu.max_magnitude(weight) == float("inf")
        weight[60, 7] = sign * torch.nan
        assert np.isnan(gpu.max_magnitude(weight))


@on_each_device
@on_each_dtype
def test_weights_that_should_have_been_refused_are_packed_without_a_crash(dtype: str, device: str) -> None:
    weight = all_words(dtype).to(device)
    for scale_2 in (0.0, 1.0, float("inf"), float("nan")):
        packed, scales = gpu.pack_nvfp4(weight, scale_2)
        assert (packed.shape, scales.shape) == ((256, 128), (256, 16))


@pytest.mark.parametrize("weight", [torch.zeros(32, 24).bfloat16(), torch.zeros(32).half(), torch.zeros(16, 16).int()])
def test_what_the_kernels_refuse_is_refused_in_their_words(weight: Tensor) -> None:
    texts = []
    for pack in (gpu.pack_nvfp4, kernels.pack_nvfp4):
        with pytest.raises(LayoutError) as caught:
            pack(weight, 1.0)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


def test_the_scheme_packs_weights_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normals(0.02)
    wanted = Nvfp4(input_scale="unit").quantize_group({"linear": weight}, {})
    monkeypatch.setattr(gpu, "max_magnitude", lambda weight: kernels.max_magnitude(normals(0.02)))
    found = Nvfp4(input_scale="unit").quantize_group({"linear": weight.to("meta")}, {})
    assert found["linear.weight_packed"].device == found["linear.weight_scale"].device == torch.device("meta")
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in wanted.items()
    }


@on_gpu
def test_the_workspace_on_the_gpu_is_bounded() -> None:
    weight = torch.randn(3 * gpu.WORKSPACE_BYTES // gpu.BYTES_PER_ELEMENT // 4096, 4096, device="cuda").bfloat16()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    packed, scales = gpu.pack_nvfp4(weight, 1e-4)
    assert torch.cuda.max_memory_allocated() - before <= gpu.WORKSPACE_BYTES + packed.nbytes + scales.nbytes + 4096


@on_gpu
def test_a_build_on_the_gpu_has_the_payload_of_the_cpu(write_release: Callable[..., Path], tmp_path: Path) -> None:
    digests = {}
    for device in ("cpu", "cuda"):
        torch.cuda.reset_peak_memory_stats()
        path = write_release(**{"device": device, "scheme.input_scale": "unit", "calibration": None})
        digests[device] = build(path, tmp_path / device).facts("assemble")["payload_sha256"]
    assert torch.cuda.max_memory_allocated() > 0, "the GPU had no part in it"
    assert digests["cuda"] == digests["cpu"]


GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def group_of(linear: str) -> Iterator[str]:
    """The linears of a Llama that share their scales with this one."""
    parent, _, name = linear.rpartition(".")
    yield from (f"{parent}.{other}" for group in GROUPS if name in group for other in group)


def assert_calibrates_as_modelopt_does(path: Path, folder: Path, device: str) -> None:
    """Calibrate a release, and export its whole model with modelopt, both on one device."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    amax = read_amax(build(path, folder / "build", "calibrate").facts("calibrate")["amax"])
    manifest, base = load_manifest(path), path.parent / "base"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval().to(device)

    def run(model: Any) -> None:
        with torch.inference_mode():
            for row in choose_rows(manifest, base).tokens:
                model(torch.tensor([row], device=device))

    weights = {linear: model.get_submodule(linear).weight.detach().clone() for linear in amax}
    with redirect_stdout(io.StringIO()):
        mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, run)
        theirs = {
            linear: {kind: float(getattr(model.get_submodule(linear), f"{kind}_quantizer").amax) for kind in kinds}
            for linear, kinds in amax.items()
        }
        export_hf_checkpoint(model, export_dir=str(folder / "modelopt"))
    assert len(amax) == 28 and amax == theirs
    exported = read_tensors(folder / "modelopt")
    for linear, weight in weights.items():
        for kind, name in (("weight", "weight_scale_2"), ("input", "input_scale")):
            largest = torch.tensor(max(amax[other][kind] for other in group_of(linear)), device=device)
            # modelopt divides by a number, so that on CUDA a fifth of its global scales differ from those of the CPU
            # in the last bit; the builder's are the CPU's on every device.
            assert exported[f"{linear}.{name}"].item() == (largest / 2688.0).item(), f"{linear}.{name}"
        packed, scales = gpu.pack_nvfp4(weight, exported[f"{linear}.weight_scale_2"].item())
        assert_same_bits(
            (packed.cpu(), scales.cpu()), (exported[f"{linear}.weight"], exported[f"{linear}.weight_scale"])
        )


@on_each_device
@pytest.mark.xdist_group("modelopt")
def test_calibration_measures_and_packing_writes_what_modelopt_does_on_the_same_device(
    write_release: Callable[..., Path], tmp_path: Path, device: str
) -> None:
    assert_calibrates_as_modelopt_does(
        write_release(**{"device": device, "calibration.arithmetic": "native"}), tmp_path, device
    )


def write_deep_base(folder: Path, num_layers: int) -> None:
    """Put a random Llama of so many layers in a base's place."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.rmtree(folder)
    shutil.copytree(TINY_LLAMA / "base", folder, ignore=shutil.ignore_patterns("model*"))
    config = AutoConfig.from_pretrained(folder, num_hidden_layers=num_layers)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == num_layers


@on_gpu
def test_a_model_of_twice_the_layers_takes_no_more_of_the_gpus_memory(
    write_release: Callable[..., Path], tmp_path: Path
) -> None:
    peaks = []
    for number, num_layers in enumerate([4, 4, 8]):  # the first one leaves what libraries keep, such as cuBLAS
        path = write_release(device="cuda", perplexity=None)
        write_deep_base(path.parent / "base", num_layers)
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        build(path, tmp_path / str(number))
        peaks.append(torch.cuda.max_memory_allocated())
    layer_bytes = 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 768 * 256)
    assert layer_bytes < peaks[1]
    assert peaks[2] - peaks[1] < layer_bytes // 4
