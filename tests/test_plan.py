from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from builder.base import DTYPE_BYTES, Stored, Tensor, preview_base
from builder.errors import BuildError, ManifestError, Problems
from builder.families import Architecture, describe_architecture
from builder.manifest import Manifest, load_manifest
from builder.plan import (
    CALIBRATE_BYTES,
    QUANTIZE_BYTES,
    Plan,
    PlannedFile,
    Unit,
    compare_headers,
    estimate_memory,
    is_aligned,
    is_scalar,
    plan_files,
    plan_release,
    plan_units,
)
from builder.schemes import bind_scheme
from builder.stages.plan import check_arithmetic

WriteRelease = Callable[..., Path]
TORCH = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "dtype": "bfloat16",
}
SEVENTY_B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
}


def describe(**changes: Any) -> Architecture:
    return describe_architecture({**LLAMA, **changes}, "config.json")


@pytest.fixture(scope="module")
def tiny() -> Architecture:
    return describe()


@pytest.fixture(scope="module")
def seventy_b() -> Architecture:
    return describe(**SEVENTY_B)


@pytest.fixture
def make_plan(write_release: WriteRelease, tiny: Architecture) -> Callable[..., Plan]:
    """The plan of a release with these changes to its manifest."""

    def make(architecture: Architecture = tiny, headers: Mapping[str, Stored] | None = None, **changes: Any) -> Plan:
        manifest = load_manifest(write_release(**changes))
        return plan_release(manifest, bind_scheme(manifest), architecture, headers)

    return make


@pytest.fixture
def refuse(write_release: WriteRelease, tiny: Architecture) -> Callable[..., tuple[str, Manifest]]:
    """What is said of a release with these changes, and its manifest."""

    def plan(architecture: Architecture = tiny, **changes: Any) -> tuple[str, Manifest]:
        manifest = load_manifest(write_release(**changes))
        with pytest.raises(BuildError) as caught:
            plan_release(manifest, bind_scheme(manifest), architecture, None)
        return str(caught.value), manifest

    return plan


# --- packing, whatever the tensors ------------------------------------------------------------------------------------

SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)
KINDS = st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), SHAPES)


@st.composite
def make_units(draw: st.DrawFn) -> tuple[Unit, ...]:
    """Units of up to six tensors of all dtypes and shapes, their names in no order."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=6))
    names = draw(st.permutations([f"t{number:02d}" for number in range(sum(sizes))]))
    units = []
    for index, size in enumerate(sizes):
        kinds = draw(st.lists(KINDS, min_size=size, max_size=size))
        tensors = tuple(Tensor(name=names.pop(), dtype=dtype, shape=shape) for dtype, shape in kinds)
        units.append(Unit(name=f"unit-{index}", layer=index, groups=(), kept=(), tensors=tensors))
    return tuple(units)


def make_unit(*tensors: tuple[str, str, tuple[int, ...]]) -> Unit:
    made = tuple(Tensor(name=name, dtype=dtype, shape=shape) for name, dtype, shape in tensors)
    return Unit(name="unit", layer=0, groups=(), kept=(), tensors=made)


def make_odd_name() -> Unit:
    return make_unit(('é"\\\n\x01 /', "U8", (3,)))


PACKINGS = st.sampled_from(["sequential", "balanced"])
MAX_BYTES = st.integers(1, 3000)
packing_property = settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow])


def all_tensors(units: Sequence[Unit]) -> list[Tensor]:
    return [tensor for unit in units for tensor in unit.tensors]


def data_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.num_bytes for tensor in tensors)


@packing_property
@given(make_units(), MAX_BYTES, PACKINGS)
def test_every_tensor_is_in_exactly_one_file_and_no_file_is_empty(
    units: tuple[Unit, ...], max_bytes: int, packing: str
) -> None:
    files = plan_files(units, max_bytes, packing)
    packed = [tensor for file in files for tensor in file.tensors]
    assert sorted(packed, key=lambda tensor: tensor.name) == sorted(all_tensors(units), key=lambda tensor: tensor.name)
    assert all(file.tensors for file in files)
    for file in files:
        owners = {unit.name for unit in units if set(unit.tensors) & set(file.tensors)}
        assert set(file.units) == owners and len(file.units) == len(owners)


@packing_property
@given(make_units(), MAX_BYTES)
def test_a_sequential_file_is_larger_than_allowed_only_for_a_single_tensor(
    units: tuple[Unit, ...], max_bytes: int
) -> None:
    for file in plan_files(units, max_bytes, "sequential"):
        largest = max(tensor.num_bytes for tensor in file.tensors)
        assert data_bytes(file.tensors) <= max_bytes or data_bytes(file.tensors) == largest


@packing_property
@given(make_units(), MAX_BYTES)
def test_sequential_files_follow_the_model_and_keep_a_fitting_unit_whole(
    units: tuple[Unit, ...], max_bytes: int
) -> None:
    files = plan_files(units, max_bytes, "sequential")
    place = {tensor.name: index for index, file in enumerate(files) for tensor in file.tensors}
    order = [place[tensor.name] for tensor in all_tensors(units)]
    assert order == sorted(order)
    for unit in units:
        if unit.num_bytes <= max_bytes:
            assert len({place[tensor.name] for tensor in unit.tensors}) == 1


@packing_property
@given(make_units(), MAX_BYTES)
def test_scalars_close_a_file_that_is_written_in_one_pass(units: tuple[Unit, ...], max_bytes: int) -> None:
    for file in plan_files(units, max_bytes, "sequential"):
        if file.in_place:
            written = [tensor for tensor in all_tensors(units) if tensor in file.tensors]
            large = [tensor for tensor in written if not is_scalar(tensor)]
            assert list(file.tensors) == large + [tensor for tensor in written if is_scalar(tensor)]


@packing_property
@given(make_units(), MAX_BYTES, PACKINGS)
def test_every_tensor_starts_at_a_multiple_of_its_width(units: tuple[Unit, ...], max_bytes: int, packing: str) -> None:
    for file in plan_files(units, max_bytes, packing):
        header_bytes = int.from_bytes(file.header[:8], "little")
        entries = json.loads(file.header[8:])
        assert header_bytes == len(file.header) - 8 and len(file.header) % 8 == 0
        for tensor in file.tensors:
            assert (len(file.header) + entries[tensor.name]["data_offsets"][0]) % DTYPE_BYTES[tensor.dtype] == 0


@packing_property
@given(make_units(), MAX_BYTES, PACKINGS)
@example((make_odd_name(),), 9, "balanced")
def test_the_safetensors_library_reads_every_planned_file(
    tmp_path_factory: pytest.TempPathFactory, units: tuple[Unit, ...], max_bytes: int, packing: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "planned.safetensors"
    for file in plan_files(units, max_bytes, packing):
        path.write_bytes(file.header + bytes(data_bytes(file.tensors)))
        assert path.stat().st_size == file.num_bytes
        with safe_open(path, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            empty = {tensor.name for tensor in file.tensors if not tensor.num_bytes}
            in_order = [name for name in opened.offset_keys() if name not in empty]
            assert in_order == [tensor.name for tensor in file.tensors if tensor.name not in empty]
            seen = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        assert {name: (loaded.dtype, tuple(loaded.shape)) for name, loaded in seen.items()} == {
            tensor.name: (TORCH[tensor.dtype], tensor.shape) for tensor in file.tensors
        }


@packing_property
@given(make_units(), MAX_BYTES)
@example((make_odd_name(),), 9)
def test_balanced_files_are_byte_for_byte_the_safetensors_librarys(units: tuple[Unit, ...], max_bytes: int) -> None:
    for file in plan_files(units, max_bytes, "balanced"):
        zeros = {tensor.name: torch.zeros(tensor.shape, dtype=TORCH[tensor.dtype]) for tensor in file.tensors}
        assert file.header + bytes(data_bytes(file.tensors)) == save(zeros, metadata={"format": "pt"})
        assert not file.in_place


@packing_property
@given(make_units(), MAX_BYTES)
def test_balanced_packing_gives_sorted_names_to_the_emptiest_file(units: tuple[Unit, ...], max_bytes: int) -> None:
    tensors = sorted(all_tensors(units), key=lambda tensor: tensor.name)
    total = data_bytes(tensors)
    count = 1 if total <= 1.05 * max_bytes else math.ceil(total / max_bytes)  # as the published pipeline splits
    expected: list[set[str]] = [set() for _ in range(count)]
    weights = dict.fromkeys(range(count), 0)
    for tensor in tensors:
        emptiest = min(weights, key=lambda index: (weights[index], index))
        expected[emptiest].add(tensor.name)
        weights[emptiest] += tensor.num_bytes
    files = plan_files(units, max_bytes, "balanced")
    assert [set(file.names) for file in files] == [names for names in expected if names]


def test_a_balanced_file_is_not_split_before_it_is_5_percent_too_large() -> None:
    unit = make_unit(("a", "U8", (105,)), ("b", "U8", (105,)))
    assert [len(plan_files([unit], max_bytes, "balanced")) for max_bytes in (200, 199)] == [1, 2]


def test_a_file_whose_sizes_would_misalign_goes_by_dtype() -> None:
    unit = make_unit(("a", "U8", (3,)), ("b", "BF16", (2,)), ("c", "F8_E4M3", (2,)), ("d", "F32", ()))
    [file] = plan_files([unit], 100, "sequential")
    assert not is_aligned(unit.tensors) and not file.in_place
    assert [tensor.name for tensor in file.tensors] == ["d", "b", "c", "a"]


def test_a_file_whose_sizes_fit_keeps_the_models_order_with_its_scalars_last() -> None:
    unit = make_unit(("d", "F32", ()), ("c", "U8", (4,)), ("s", "F32", (1,)), ("b", "BF16", (2,)))
    [file] = plan_files([unit], 100, "sequential")
    assert file.in_place and [tensor.name for tensor in file.tensors] == ["c", "b", "d", "s"]


def test_files_are_numbered_unless_there_is_one() -> None:
    unit = make_unit(("a", "U8", (8,)), ("b", "U8", (8,)), ("c", "U8", (8,)))
    assert [file.name for file in plan_files([unit], 24, "sequential")] == ["model.safetensors"]
    assert [file.name for file in plan_files([unit], 16, "sequential")] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_a_header_without_metadata_is_still_read(tmp_path: Path) -> None:
    tensors = (Tensor(name="a", dtype="U8", shape=(4,)),)
    file = PlannedFile(name="x", units=(), tensors=tensors, in_place=True, header_metadata=False)
    (tmp_path / "x").write_bytes(file.header + bytes(4))
    with safe_open(tmp_path / "x", framework="pt") as opened:
        assert opened.metadata() is None and list(opened.keys()) == ["a"]
    assert file.header + bytes(4) == save({"a": torch.zeros(4, dtype=torch.uint8)})


# --- a release --------------------------------------------------------------------------------------------------------


def test_a_plan_of_the_repositorys_model_agrees_with_its_headers(write_release: WriteRelease) -> None:
    manifest = load_manifest(write_release())
    config, headers = preview_base(manifest)
    assert headers is not None
    plan = plan_release(manifest, bind_scheme(manifest), describe_architecture(config, "config.json"), headers)
    assert plan.base_num_bytes == sum(tensor.num_bytes for tensor in headers.values())
    assert plan.unused == () and len(plan.files) > 1
    assert plan.weight_map.keys() == plan.tensors.keys()
    assert len(plan.quantized) == 4 * 7


def test_a_layers_linears_are_replaced_in_their_own_places(make_plan: Callable[..., Plan]) -> None:
    unit = make_plan().find_unit("layer-00002")
    prefix = "model.layers.2."
    names = [tensor.name.removeprefix(prefix) for tensor in unit.tensors]
    parts = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")
    linears = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    norms = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    assert names == [f"{linear}.{part}" for linear in linears for part in parts] + norms
    assert [name.removeprefix(prefix) for name in unit.kept] == norms
    assert [len(group) for group in unit.groups] == [3, 1, 2, 1]


def test_files_and_bytes_do_not_depend_on_how_the_work_is_divided(make_plan: Callable[..., Plan]) -> None:
    plans = [make_plan(shards=shards) for shards in (1, 2, 3, 4, [1, 2, 1], [3, 1])]
    assert len({plan.shards for plan in plans}) == len(plans)
    for plan in plans[1:]:
        assert plan.files == plans[0].files and plan.facts() == plans[0].facts()


def test_facts_are_json_and_say_nothing_of_shards_and_memory(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(shards=3)
    facts = plan.facts()
    assert json.loads(json.dumps(facts)) == facts
    assert "shard" not in json.dumps(facts) and "memory" not in json.dumps(facts)
    assert facts["num_tensors"] == sum(len(file["tensors"]) for file in facts["files"]) == len(plan.tensors)
    assert facts["num_bytes"] == sum(file["num_bytes"] for file in facts["files"])
    assert facts["ignore"] == ["lm_head"] and facts["fused"][0] == [
        f"model.layers.0.self_attn.{name}_proj" for name in "qkv"
    ]


def test_the_bits_per_parameter_count_every_stored_byte(make_plan: Callable[..., Plan], tiny: Architecture) -> None:
    plan = make_plan()
    stored = sum(tensor.num_bytes for tensor in plan.tensors.values())
    assert plan.bits_per_parameter == 8 * stored / tiny.num_parameters
    assert plan.facts()["bits_per_parameter"] == round(plan.bits_per_parameter, 4)


# --- the published sizes ----------------------------------------------------------------------------------------------


def test_seventy_billion_parameters_are_planned_as_published(
    make_plan: Callable[..., Plan], seventy_b: Architecture
) -> None:
    changes = {"scheme.layout": "modelopt", "files.max_bytes": "5GiB", "shards": 2}
    plan = make_plan(seventy_b, **changes)
    assert seventy_b.num_parameters == 70_553_706_496
    assert len(plan.tensors) == 2403 and len(plan.quantized) == 560
    assert [(shard.first_layer, shard.last_layer, shard.num_quantizers) for shard in plan.shards] == [
        (0, 40, 280),
        (40, 80, 280),
    ]
    assert round(sum(tensor.num_bytes for tensor in plan.tensors.values()) / 1e9, 1) == 42.7
    assert round(plan.bits_per_parameter, 2) == 4.84
    assert all(file.in_place for file in plan.files)
    balanced = make_plan(seventy_b, **changes, **{"files.packing": "balanced"})
    assert len(balanced.files) == 8 and len(balanced.tensors) == 2403
    assert balanced.files[-1].name == "model-00008-of-00008.safetensors"


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shards", "ranges"),
    [
        (1, [(0, 4)]),
        (2, [(0, 2), (2, 4)]),
        (3, [(0, 2), (2, 3), (3, 4)]),
        (4, [(0, 1), (1, 2), (2, 3), (3, 4)]),
        ([1, 3], [(0, 1), (1, 4)]),
        ([4], [(0, 4)]),
    ],
)
def test_shards_are_contiguous_and_carry_the_edges(
    make_plan: Callable[..., Plan], shards: int | list[int], ranges: list[tuple[int, int]]
) -> None:
    plan = make_plan(shards=shards)
    assert [(shard.first_layer, shard.last_layer) for shard in plan.shards] == ranges
    assert [shard.index for shard in plan.shards] == list(range(len(ranges)))
    assert [name for shard in plan.shards for name in shard.units] == [unit.name for unit in plan.units]
    assert [shard.num_quantizers for shard in plan.shards] == [7 * (last - first) for first, last in ranges]
    assert plan.units[0].name == "first-edge" and plan.units[-1].name == "last-edge"
    assert json.loads(json.dumps(plan.describe_shards()))[0]["last_layer"] == ranges[0][1]


@pytest.mark.parametrize(
    ("shards", "what", "fix"),
    [
        (96, "96 shards, but the model has 4 layers", "use a count from 1 to 4"),
        ([3, 2], "shards of [3, 2] layers make 5, but the model has 4", "give numbers that add up to 4, or a count"),
        ([1, 2], "shards of [1, 2] layers make 3, but the model has 4", "give numbers that add up to 4, or a count"),
    ],
)
def test_shards_that_do_not_fit_the_layers_are_refused(
    refuse: Callable[..., tuple[str, Manifest]], shards: int | list[int], what: str, fix: str
) -> None:
    said, manifest = refuse(shards=shards)
    assert said == f"{what}\n  in {manifest.where('shards')}\n  fix: {fix}"


@pytest.mark.parametrize("shards", [0, [4, 0]])
def test_a_shard_without_layers_is_refused_by_the_manifest(
    write_release: WriteRelease, shards: int | list[int]
) -> None:
    with pytest.raises(ManifestError, match="must be a count of at least 1, or a list of the layers of each shard"):
        load_manifest(write_release(shards=shards))


# --- ignore -----------------------------------------------------------------------------------------------------------


def test_an_ignored_linear_stays_as_it_was(make_plan: Callable[..., Plan], tiny: Architecture) -> None:
    down = "model.layers.1.mlp.down_proj"
    plan = make_plan(**{"scheme.ignore": ["lm_head", down]})
    assert plan.ignore == ("lm_head", down) and down not in plan.quantized and len(plan.quantized) == 27
    assert plan.tensors[f"{down}.weight"] in tiny.tensors
    assert f"{down}.weight" in plan.find_unit("layer-00001").kept


def test_patterns_match_from_the_start_of_a_name(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(**{"scheme.ignore": ["re:lm_", r"re:.*\.down_proj$", r"re:model\.layers\.0\."]})
    assert len(plan.quantized) == 3 * 6
    assert not [name for name in plan.quantized if "down_proj" in name or "layers.0." in name]


@pytest.mark.parametrize(
    "pattern", ["down_proj", "re:down_proj", "model.embed_tokens", "model.layers.0.mlp.down_proj.weight"]
)
def test_a_pattern_that_matches_no_linear_is_refused(refuse: Callable[..., tuple[str, Manifest]], pattern: str) -> None:
    said, manifest = refuse(**{"scheme.ignore": ["lm_head", pattern]})
    assert said == (
        f"{pattern} matches no linear of LlamaForCausalLM\n"
        f"  in {manifest.where('scheme', 'ignore', 1)}\n"
        "  fix: give a whole name, such as model.layers.3.mlp.down_proj, or a pattern, such as re:.*down_proj"
    )


def test_a_pattern_that_is_no_regular_expression_is_refused(refuse: Callable[..., tuple[str, Manifest]]) -> None:
    said, manifest = refuse(**{"scheme.ignore": ["lm_head", "re:(q"]})
    assert said == (
        "re:(q is not a regular expression: missing ), unterminated subpattern at position 0\n"
        f"  in {manifest.where('scheme', 'ignore', 1)}\n  fix: mend it"
    )


def test_half_of_a_fused_group_cannot_be_ignored(refuse: Callable[..., tuple[str, Manifest]]) -> None:
    said, manifest = refuse(**{"scheme.ignore": ["lm_head", "model.layers.1.self_attn.k_proj"]})
    assert said == (
        "model.layers.1.self_attn.k_proj is ignored, but engines run it as one with "
        "model.layers.1.self_attn.q_proj, model.layers.1.self_attn.v_proj\n"
        f"  in {manifest.where('scheme', 'ignore')}\n  fix: ignore all of them or none"
    )


def test_lm_head_must_be_ignored_by_name(refuse: Callable[..., tuple[str, Manifest]]) -> None:
    said, manifest = refuse(**{"scheme.ignore": []})
    assert said == (
        "lm_head is outside the decoder layers and would be quantized\n"
        f"  in {manifest.where('scheme', 'ignore')}\n  fix: add lm_head to scheme.ignore"
    )


def test_a_tied_lm_head_is_ignored_whether_it_is_named_or_not(make_plan: Callable[..., Plan]) -> None:
    tied = describe(tie_word_embeddings=True)
    for ignore in (["lm_head"], []):
        plan = make_plan(tied, **{"scheme.ignore": ignore})
        assert plan.ignore == ("lm_head",) and "lm_head.weight" not in plan.tensors


def test_ignoring_everything_is_refused(refuse: Callable[..., tuple[str, Manifest]]) -> None:
    said, manifest = refuse(**{"scheme.ignore": ["re:.*"]})
    assert said == (
        "every linear is ignored: nothing is left to quantize\n"
        f"  in {manifest.where('scheme', 'ignore')}\n  fix: ignore fewer"
    )


def test_all_problems_of_ignore_are_told_at_once(write_release: WriteRelease, tiny: Architecture) -> None:
    manifest = load_manifest(write_release(**{"scheme.ignore": ["re:(", "nope", "model.layers.0.mlp.up_proj"]}))
    with pytest.raises(Problems) as caught:
        plan_release(manifest, bind_scheme(manifest), tiny, None)
    assert [problem.what.split()[0] for problem in caught.value.problems] == [
        "re:(",
        "nope",
        "lm_head",
        "model.layers.0.mlp.up_proj",
    ]


# --- what cannot be quantized -----------------------------------------------------------------------------------------


def test_input_features_that_are_no_multiple_of_sixteen_are_refused_by_name(
    make_plan: Callable[..., Plan], refuse: Callable[..., tuple[str, Manifest]]
) -> None:
    odd = describe(intermediate_size=120)
    said, _ = refuse(odd)
    linear = "model.layers.0.mlp.down_proj"
    assert said == (
        f"{linear} has 120 input features, which is not a multiple of 16\n"
        f"  in {linear}.weight\n  fix: add {linear} to scheme.ignore"
    )
    assert len(make_plan(odd, **{"scheme.ignore": ["lm_head", "re:.*down_proj"]}).quantized) == 4 * 6


def test_calibrated_scales_need_calibration_data(
    make_plan: Callable[..., Plan], refuse: Callable[..., tuple[str, Manifest]]
) -> None:
    said, manifest = refuse(calibration=None)
    assert said == (
        "no calibration data, but calibrated input scales need some\n"
        f"  in {manifest.where('scheme')}\n"
        "  fix: add `calibration:` with a dataset or a path, or set `scheme.input_scale: unit`"
    )
    plan = make_plan(calibration=None, **{"scheme.input_scale": "unit"})
    assert plan.calibrate_memory == 0 and not plan.measures_inputs


def test_scales_of_a_kv_cache_need_calibration_data(
    make_plan: Callable[..., Plan], refuse: Callable[..., tuple[str, Manifest]]
) -> None:
    data_free = {"kv_cache": "fp8", "scheme.name": "fp8_dynamic"}
    said, manifest = refuse(calibration=None, **data_free)
    assert said == (
        "no calibration data, but kv_cache: fp8 needs some\n"
        f"  in {manifest.where('kv_cache')}\n"
        "  fix: add `calibration:` with a dataset or a path, or remove kv_cache"
    )
    plan = make_plan(**data_free)
    assert plan.calibrate_memory > 0 and plan.measures and not plan.measures_inputs


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
def test_each_layer_has_two_scales_of_its_kv_cache_more(make_plan: Callable[..., Plan], layout: str) -> None:
    plain, plan = (make_plan(**{"scheme.layout": layout}, **more) for more in ({}, {"kv_cache": "fp8"}))
    added = [tensor for name, tensor in plan.tensors.items() if name not in plain.tensors]
    places = (".k_proj.k_scale", ".v_proj.v_scale") if layout == "modelopt" else (".k_scale", ".v_scale")
    names = [f"model.layers.{layer}.self_attn{place}" for layer in range(4) for place in places]
    assert [tensor.name for tensor in added] == names
    assert {(tensor.dtype, tensor.shape) for tensor in added} == {
        ("F32", ()) if layout == "modelopt" else ("BF16", (1,))
    }
    assert {**plan.tensors, **plain.tensors} == plan.tensors
    assert all(is_scalar(tensor) for tensor in added), "they close a file that is written in one pass"
    assert all(file.in_place for file in plan.files)


def test_layers_whose_cache_holds_latents_are_refused_by_name(refuse: Callable[..., tuple[str, Manifest]]) -> None:
    latent = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32}
    changes = {"architectures": ["MiniCPM3ForCausalLM"], "model_type": "minicpm3", "num_key_value_heads": 4}
    said, manifest = refuse(describe(**changes, **latent), kv_cache="fp8")
    assert said == (
        "model.layers.0 of MiniCPM3ForCausalLM puts no keys and values into a KV cache as they are\n"
        f"  in {manifest.where('kv_cache')}\n"
        "  fix: remove kv_cache"
    )


# --- headers ----------------------------------------------------------------------------------------------------------


def store(architecture: Architecture) -> dict[str, Stored]:
    return {
        tensor.name: Stored(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, file="x", start=0, end=0)
        for tensor in architecture.tensors
    }


def test_headers_that_agree_leave_the_unused_tensors(tiny: Architecture, make_plan: Callable[..., Plan]) -> None:
    headers = store(tiny)
    assert compare_headers(tiny, headers) == ()
    for name in ("z.inv_freq", "a.inv_freq"):
        headers[name] = replace(headers["lm_head.weight"], name=name)
    assert compare_headers(tiny, headers) == make_plan(headers=headers).unused == ("a.inv_freq", "z.inv_freq")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (None, "lm_head.weight is missing from the base model"),
        ({"shape": (95, 64)}, "lm_head.weight is [95, 64], but config.json makes it [96, 64]"),
        ({"dtype": "F8_E4M3"}, "lm_head.weight is F8_E4M3, not bfloat16, float16 or float32"),
    ],
)
def test_headers_that_disagree_with_the_config_are_refused(
    tiny: Architecture, change: dict[str, Any] | None, what: str
) -> None:
    headers = store(tiny)
    lm_head = headers.pop("lm_head.weight")
    if change is not None:
        headers["lm_head.weight"] = replace(lm_head, **change)
    with pytest.raises(BuildError) as caught:
        compare_headers(tiny, headers)
    tail = "  in the base model's headers\n  fix: fetch the base again, or mend its config.json"
    assert str(caught.value) == f"{what}\n{tail}"
    del headers["model.norm.weight"]
    with pytest.raises(BuildError) as caught:
        compare_headers(tiny, headers)
    assert str(caught.value) == (f"model.norm.weight is missing from the base model (and 1 more)\n{tail}")


def test_a_tensor_has_the_dtype_that_it_is_stored_in_and_so_have_its_scales(
    tiny: Architecture, make_plan: Callable[..., Plan]
) -> None:
    headers, linear = store(tiny), "model.layers.1.self_attn.q_proj"
    for name, dtype in ((f"{linear}.weight", "F16"), ("model.norm.weight", "F32")):
        headers[name] = replace(headers[name], dtype=dtype)
    plan = make_plan(headers=headers, kv_cache="fp8", **{"scheme.name": "fp8_dynamic"})
    changed = {
        name: tensor.dtype
        for name, tensor in plan.tensors.items()
        if name.endswith(("norm.weight", "_scale")) and tensor.dtype != "BF16"
    }
    assert changed == {f"{linear}.weight_scale": "F16", "model.norm.weight": "F32"}
    assert plan.architecture.dtype == "BF16"
    assert plan.base_num_bytes == make_plan().base_num_bytes + 2 * 64


# --- memory -----------------------------------------------------------------------------------------------------------


def test_memory_grows_with_rows_their_length_and_the_layers(tiny: Architecture, write_release: WriteRelease) -> None:
    scheme = bind_scheme(load_manifest(write_release()))

    def estimate(architecture: Architecture, rows: int = 8, longest: int = 64) -> tuple[int, int]:
        return estimate_memory(architecture, plan_units(architecture, scheme, {"lm_head"}), rows, longest)

    calibrate, quantize = estimate(tiny)
    assert calibrate > CALIBRATE_BYTES and quantize > QUANTIZE_BYTES
    assert estimate(tiny, rows=9)[0] > calibrate and estimate(tiny, rows=9)[1] == quantize
    assert estimate(tiny, longest=65)[0] > calibrate and estimate(tiny, longest=65)[1] == quantize
    wide = estimate(describe(intermediate_size=256))
    assert wide[0] > calibrate and wide[1] > quantize
    assert estimate(describe(num_hidden_layers=9)) == (calibrate, quantize)


SMALL = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "head_dim": 64, "vocab_size": 8192}
MEDIUM = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "head_dim": 64,
    "vocab_size": 32000,
}
LARGE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "head_dim": 128}


@pytest.mark.parametrize(
    ("shape", "rows", "tokens", "exact", "measured"),
    [
        (SMALL | {"num_key_value_heads": 4}, 0, 0, True, 219_840_512),
        (MEDIUM | {"num_key_value_heads": 8}, 0, 0, True, 290_000_000),
        (LARGE | {"num_key_value_heads": 8}, 0, 0, True, 444_000_000),
        (MEDIUM | {"num_key_value_heads": 8}, 16, 256, False, 683_000_000),
        (MEDIUM | {"num_key_value_heads": 8}, 16, 256, True, 1_041_000_000),
        (MEDIUM | {"num_key_value_heads": 8}, 8, 1200, True, 1_464_000_000),
        (MEDIUM | {"num_key_value_heads": 8}, 4, 2048, True, 1_599_000_000),
    ],
    ids=["0.1 GB", "3 GB", "16 GB", "native", "exact", "exact, rows of 1200 tokens", "exact, rows of 2048 tokens"],
)
def test_measured_peaks_stay_below_the_estimate_and_near_it(
    shape: dict[str, Any], rows: int, tokens: int, exact: bool, measured: int, write_release: WriteRelease
) -> None:
    """Peaks of whole workers; of those that only quantize as tests/benchmarks/results/build.json has them."""
    scheme = bind_scheme(load_manifest(write_release()))
    architecture = describe(**shape)
    units = plan_units(architecture, scheme, {"lm_head"})
    calibrate, quantize = estimate_memory(architecture, units, rows, tokens, exact=exact)
    assert measured <= (calibrate or quantize) <= 1.2 * measured


def test_more_shards_need_no_more_memory(make_plan: Callable[..., Plan], seventy_b: Architecture) -> None:
    plans = [make_plan(seventy_b, shards=shards) for shards in (1, 2, 4)]
    needed = [plan.calibrate_memory for plan in plans]
    assert needed[0] > needed[1] > needed[2]
    assert len({plan.quantize_memory for plan in plans}) == 1
    assert max(needed) < 24 << 30 and plans[0].quantize_memory < 24 << 30


# --- arithmetic -------------------------------------------------------------------------------------------------------


def test_a_model_that_exact_arithmetic_cannot_run_is_refused_by_the_operation(
    tiny: Architecture, write_release: WriteRelease
) -> None:
    inexact = replace(tiny, inexact=("aten.lgamma", "aten.log_sigmoid_forward"))

    def check(**changes: Any) -> None:
        manifest = load_manifest(write_release(**changes))
        check_arithmetic(manifest, plan_release(manifest, bind_scheme(manifest), inexact, None))

    with pytest.raises(ManifestError) as caught:
        check()
    what, where, fix = str(caught.value).splitlines()
    assert what == "LlamaForCausalLM runs aten.lgamma, aten.log_sigmoid_forward, which have no exact form here"
    assert "calibration" in where
    assert fix == "  fix: set calibration.arithmetic: native"
    weights_only = {"scheme.input_scale": "unit", "calibration": None}
    with pytest.raises(ManifestError, match="leave perplexity out"):
        check(**weights_only)
    check(**{"calibration.arithmetic": "native"})
    check(**weights_only, perplexity=None)
