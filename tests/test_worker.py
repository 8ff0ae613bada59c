"""The two loops, measured against nvidia-modelopt run on the whole model."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build
from safetensors.torch import load_file

from builder.base import open_checkpoint
from builder.calibration import choose_rows
from builder.errors import BaseError, CalibrationError, LayoutError
from builder.manifest import Manifest, load_manifest
from builder.stages import Workspace
from builder.worker import measure_rows, merge_amax, quantize_layers, read_amax, write_amax

pytestmark = pytest.mark.xdist_group("modelopt")
NATIVE = {"calibration.arithmetic": "native"}  # in which modelopt measures too
RENAMED = {"weight_packed": "weight", "weight_global_scale": "weight_scale_2", "input_global_scale": "input_scale"}


def read_tensors(artifact: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(artifact.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def export_with_modelopt(manifest: Manifest, base: Path, folder: Path, *more: str) -> dict[str, torch.Tensor]:
    """What modelopt makes of the whole model in one process, calibrated with the release's rows, one by one.

    more: the names of modelopt's configs that are added to that of NVFP4.
    """
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
    rows = choose_rows(manifest, base).tokens

    def run(model: Any) -> None:
        with torch.inference_mode():
            for row in rows:
                model(torch.tensor([row]))

    with redirect_stdout(io.StringIO()):
        configs = [mtq.NVFP4_DEFAULT_CFG, *(getattr(mtq, name) for name in more)]
        quantizers = [quantizer for config in configs for quantizer in config["quant_cfg"]]
        mtq.quantize(model, {**mtq.NVFP4_DEFAULT_CFG, "quant_cfg": quantizers}, run)
        export_hf_checkpoint(model, export_dir=str(folder))
    return read_tensors(folder)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], dict[str, torch.Tensor]]]:
    """modelopt's export of the release that write_release writes; made once."""
    made: dict[str, torch.Tensor] = {}

    def export(path: Path) -> dict[str, torch.Tensor]:
        if not made:
            manifest = load_manifest(path)
            made.update(export_with_modelopt(manifest, path.parent / "base", tmp_path_factory.mktemp("modelopt")))
        return made

    yield export


def assert_same_bits(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize(("shards", "executor"), [(1, "in_process"), (2, "processes"), (3, "ray"), (4, "in_process")])
def test_every_tensor_is_the_one_modelopt_exports(
    write_release: Callable[..., Path],
    tmp_path: Path,
    exported: Callable[[Path], dict[str, torch.Tensor]],
    shards: int,
    executor: str,
) -> None:
    path = write_release(**NATIVE, **{"shards": shards, "executor": executor, "scheme.layout": "modelopt"})
    workspace = build(path, tmp_path / "build")
    assert_same_bits(read_tensors(workspace.artifact), exported(path))


def test_exact_arithmetic_measures_what_modelopt_does_within_two_percent_and_changes_nothing_else(
    write_release: Callable[..., Path], tmp_path: Path, exported: Callable[[Path], dict[str, torch.Tensor]]
) -> None:
    """modelopt's own magnitudes differ by as much between two machines."""
    path = write_release(**{"scheme.layout": "modelopt"})
    found, wanted = read_tensors(build(path, tmp_path / "build").artifact), exported(path)
    scales = {name for name in wanted if name.endswith(".input_scale")}
    assert len(scales) == 28
    for name in scales:
        assert found[name].item() == pytest.approx(wanted[name].item(), rel=0.02), name
    assert_same_bits(*({name: tensors[name] for name in wanted.keys() - scales} for tensors in (found, wanted)))
    assert found.keys() == wanted.keys()


def test_compressed_tensors_layout_holds_the_same_bits_under_its_own_names(
    write_release: Callable[..., Path], tmp_path: Path, exported: Callable[[Path], dict[str, torch.Tensor]]
) -> None:
    path = write_release(**NATIVE)
    found = {}
    for name, tensor in read_tensors(build(path, tmp_path / "build").artifact).items():
        module, _, suffix = name.rpartition(".")
        inverse = suffix.endswith("global_scale")
        found[f"{module}.{RENAMED.get(suffix, suffix)}"] = (1 / tensor)[0] if inverse else tensor
    wanted = exported(path)
    for name, tensor in wanted.items():
        if name.endswith(("weight_scale_2", "input_scale")):
            tensor = 1 / (1 / tensor)  # the layout stores reciprocals; that much is lost, and no more
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    assert found.keys() == wanted.keys()


def test_scales_of_the_kv_cache_are_those_modelopt_exports_and_change_nothing_else(
    write_release: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_release(**NATIVE, **{"scheme.layout": "modelopt", "shards": 3, "kv_cache": "fp8"})
    artifact, theirs = build(path, tmp_path / "build").artifact, tmp_path / "theirs"
    exported = export_with_modelopt(load_manifest(path), path.parent / "base", theirs, "FP8_KV_CFG")
    assert_same_bits(read_tensors(artifact), exported)
    for name, key in (("config.json", "quantization_config"), ("hf_quant_config.json", "quantization")):
        ours, wanted = (json.loads((folder / name).read_text("utf-8")) for folder in (artifact, theirs))
        assert ours[key] == wanted[key]
    scales = {name: scale for name, scale in exported.items() if name.endswith((".k_scale", ".v_scale"))}
    assert len(scales) == 8
    # the other layout rounds them to bf16, as llm-compressor does
    renamed = {re.sub(r"\.[kv]_proj(\.[kv]_scale)", r"\1", name): scale for name, scale in scales.items()}
    rounded = {name: scale.reshape(1).bfloat16() for name, scale in renamed.items()}
    plain = read_tensors(build(write_release(**NATIVE), tmp_path / "plain").artifact)
    other = read_tensors(build(write_release(**NATIVE, kv_cache="fp8"), tmp_path / "other").artifact)
    assert_same_bits(other, {**plain, **rounded})


def test_payload_does_not_depend_on_the_way_its_files_came_about(
    write_release: Callable[..., Path], tmp_path: Path
) -> None:
    digests = set()
    for shards in (1, 2, 3, 4, [1, 3]):
        # 700 kB cut the model into files that no single shard owns, so that pieces are spliced as well
        path = write_release(**{"shards": shards, "files.max_bytes": "700kB", "scheme.input_scale": "unit"})
        workspace = build(path, tmp_path / f"build-{shards}")
        digests.add(workspace.facts("assemble")["payload_sha256"])
    assert len(digests) == 1


def test_balanced_packing_holds_the_same_tensors(write_release: Callable[..., Path], tmp_path: Path) -> None:
    unit = {"scheme.input_scale": "unit", "calibration": None}
    sequential = build(write_release(**unit), tmp_path / "sequential")
    balanced = build(write_release(**unit, **{"files.packing": "balanced"}), tmp_path / "balanced")
    assert_same_bits(read_tensors(balanced.artifact), read_tensors(sequential.artifact))


def make_jobs(workspace: Workspace, stage: str, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The jobs that a stage would hand to its executor."""
    import builder.stages.calibrate
    import builder.stages.quantize

    module = {"calibrate": builder.stages.calibrate, "quantize": builder.stages.quantize}[stage]
    caught: list[dict[str, Any]] = []

    class Caught(Exception):
        pass

    def catch(workspace: Workspace, work: str, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        caught.extend(jobs)
        raise Caught

    with monkeypatch.context() as patch:
        patch.setattr(module, "run_jobs", catch)
        with pytest.raises(Caught):
            module.run(workspace)
    return caught


def digest_files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*.safetensors"))}


class Stopped(Exception):
    """Stands for a process that dies: nothing after it runs."""


def test_quantizing_goes_on_after_the_last_finished_layer(
    write_release: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import builder.worker

    path = write_release(**{"shards": 2, "scheme.input_scale": "unit", "files.max_bytes": "1500kB"})
    undisturbed = build(path, tmp_path / "undisturbed", "quantize")
    workspace = build(path, tmp_path / "stopped", "calibrate")
    job = make_jobs(workspace, "quantize", monkeypatch)[0]
    quantize_unit = builder.worker.quantize_unit
    seen: list[str] = []

    def stop_at_third(*args: Any) -> Any:
        seen.append(args[2].name)
        if len(seen) == 3:
            raise Stopped
        return quantize_unit(*args)

    monkeypatch.setattr(builder.worker, "quantize_unit", stop_at_third)
    with pytest.raises(Stopped):
        quantize_layers(job)
    record = quantize_layers(job)
    assert seen == ["first-edge", "layer-00000", "layer-00001", "layer-00001"]
    assert record["num_skipped"] == 2
    for later in make_jobs(workspace, "quantize", monkeypatch)[1:]:
        quantize_layers(later)
    assert digest_files(workspace.parts) == digest_files(undisturbed.parts)


@pytest.mark.parametrize("damage", ["torn journal", "foreign key", "short file"])
def test_a_journal_that_cannot_be_believed_is_not(
    write_release: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    import builder.worker

    path = write_release(**{"shards": 1, "scheme.input_scale": "unit"})
    undisturbed = build(path, tmp_path / "undisturbed", "quantize")
    workspace = build(path, tmp_path / "stopped", "calibrate")
    (job,) = make_jobs(workspace, "quantize", monkeypatch)
    quantize_unit = builder.worker.quantize_unit

    def stop_at_layer_1(*args: Any) -> Any:
        if args[2].name == "layer-00001":
            raise Stopped
        return quantize_unit(*args)

    with monkeypatch.context() as patch:
        patch.setattr(builder.worker, "quantize_unit", stop_at_layer_1)
        with pytest.raises(Stopped):
            quantize_layers(job)
    (journal,) = workspace.parts.glob("*.journal")
    if damage == "torn journal":
        journal.write_bytes(journal.read_bytes()[:40])
    elif damage == "foreign key":
        journal.write_text(journal.read_text().replace(job["key"], "0" * 64))
    else:
        with journal.with_suffix("").open("r+b") as partial:
            partial.truncate(1000)
    assert quantize_layers(job)["num_skipped"] == 0
    assert digest_files(workspace.parts) == digest_files(undisturbed.parts)


def test_calibrating_goes_on_from_saved_hidden_states(
    write_release: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import builder.worker

    path = write_release(**{"shards": 1, "calibration.samples": 3})
    workspace = build(path, tmp_path / "build", "fetch")
    (job,) = make_jobs(workspace, "calibrate", monkeypatch)
    job["save_every_s"] = 0.0
    undisturbed = measure_rows(job | {"folder": str(tmp_path / "undisturbed")})
    measure_layer = builder.worker.measure_layer
    seen: list[int] = []

    def stop_at_layer_2(*args: Any) -> Any:
        seen.append(args[2])
        if len(seen) == 3:
            raise Stopped
        return measure_layer(*args)

    monkeypatch.setattr(builder.worker, "measure_layer", stop_at_layer_2)
    with pytest.raises(Stopped):
        measure_rows(job)
    assert measure_rows(job)["amax"] == undisturbed["amax"]
    assert seen == [0, 1, 2, 2, 3]
    left = {path.name for path in workspace.calibration.iterdir() if not path.name.endswith(".progress.json")}
    assert left == {"block-00000.json"}, "states are dropped"


def test_blocks_of_rows_measured_for_another_number_of_shards_are_not_taken_for_these(
    write_release: Callable[..., Path], tmp_path: Path
) -> None:
    undisturbed = build(write_release(shards=1), tmp_path / "undisturbed", "calibrate").facts("calibrate")["amax"]
    workspace = build(write_release(shards=4), tmp_path / "build", "calibrate")
    workspace.receipt_path("calibrate").unlink()
    for block in (1, 2, 3):  # as if the build had been killed after the first
        (workspace.calibration / f"block-{block:05d}.json").unlink()
    assert build(write_release(shards=1), tmp_path / "build", "calibrate").facts("calibrate")["amax"] == undisturbed


def test_a_weight_that_is_not_a_number_stops_the_build_by_name(
    write_release: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_release()
    damage_tensor(path.parent / "base", "model.layers.2.mlp.up_proj.weight", float("nan"))
    with pytest.raises(CalibrationError) as caught:
        build(path, tmp_path / "build")
    assert caught.value.what == "there is a NaN or an infinity in the weight of model.layers.2.mlp.up_proj"
    assert not (tmp_path / "build" / "artifact").exists()


@pytest.mark.parametrize(("value", "text"), [(float("nan"), "not finite"), (0.0, "all zero")])
def test_without_calibration_quantizing_names_the_weight(
    write_release: Callable[..., Path], tmp_path: Path, value: float, text: str
) -> None:
    path = write_release(**{"scheme.input_scale": "unit"})
    damage_tensor(path.parent / "base", "model.layers.1.self_attn.o_proj.weight", value)
    with pytest.raises(LayoutError) as caught:
        build(path, tmp_path / "build")
    assert caught.value.what == f"the weights of model.layers.1.self_attn.o_proj are {text}"


def damage_tensor(base: Path, name: str, value: float) -> None:
    """Overwrite a tensor of a checkpoint in place: one element with NaN, or all with another value."""
    stored = open_checkpoint(base, "base").tensors[name]
    pattern = torch.tensor([value], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    with (base / stored.file).open("r+b") as file:
        file.seek(stored.start)
        file.write(pattern if value != value else pattern * stored.num_elements)


def test_a_base_file_that_changed_its_size_under_the_build_names_itself(
    write_release: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = build(write_release(**{"scheme.input_scale": "unit"}), tmp_path / "build", "calibrate")
    job = make_jobs(workspace, "quantize", monkeypatch)[0]
    name = "model-00001-of-00002.safetensors"
    num_bytes = job["base_files"][name]
    with (Path(job["base"]) / name).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(BaseError) as caught:
        quantize_layers(job)
    assert caught.value.what == f"{name} has {num_bytes + 1} bytes, but had {num_bytes} when it was fetched"


def test_merging_takes_the_maximum_and_lets_nan_win() -> None:
    nan = float("nan")
    assert merge_amax([{"b": {"input": 1.0}}, {"a": {"input": 3.0}, "b": {"input": 2.0}}]) == {
        "a": {"input": 3.0},
        "b": {"input": 2.0},
    }
    for tables in ([{"a": {"input": nan}}, {"a": {"input": 1.0}}], [{"a": {"input": 1.0}}, {"a": {"input": nan}}]):
        assert merge_amax(tables)["a"]["input"] != merge_amax(tables)["a"]["input"]


def test_amax_tables_survive_being_written_to_the_last_bit() -> None:
    table = {"a": {"weight": 0.1, "input": 1e-38}}
    assert read_amax(write_amax(table)) == table
