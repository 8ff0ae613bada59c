"""What a release will take, against the figures that were worked out by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builder.errors import ManifestError
from builder.families import recall_architecture
from builder.manifest import Manifest, load_manifest
from builder.plan import Plan, plan_files, plan_release
from builder.schemes import bind_scheme
from builder.sizing import (
    HARDWARE,
    REFERENCE,
    Rates,
    check_context,
    check_heads,
    kv_bytes_per_token,
    list_hardware,
    read_amount,
    size_build,
    size_serving,
    tokens_per_s,
    warn_of_serving,
    weight_bytes_read,
)

RELEASES = Path(__file__).parents[1] / "releases"
SPARK = list_hardware()["dgx-spark"]
LLAMA_70B = {"num_key_value_heads": 8, "head_dim": 128}


def plan_of(name: str) -> tuple[Manifest, Plan]:
    manifest = load_manifest(RELEASES / f"{name}.yaml")
    assert manifest.release.base.config is not None
    config = json.loads(manifest.resolve(manifest.release.base.config).read_text())
    return manifest, plan_release(manifest, bind_scheme(manifest), recall_architecture(config, "config.json"), None)


@pytest.fixture(scope="module")
def seventy_b() -> tuple[Manifest, Plan]:
    return plan_of("deepseek-r1-70b")


@pytest.fixture(scope="module")
def in_fp8() -> tuple[Manifest, Plan]:
    return plan_of("deepseek-r1-70b-fp8-dynamic")


def size(manifest: Manifest, plan: Plan, **changes: Any) -> dict[str, Any]:
    """The serving side with these changes: `hardware`, `args` in place of the profile's own, None for none."""
    serve = manifest.release.serve
    assert serve is not None
    args = {**serve.args, **changes.pop("args", {})}
    args = {name: value for name, value in args.items() if value is not None}
    found = size_serving(plan, serve.model_copy(update={**changes, "args": args}), manifest.where)
    assert found is not None
    return found


def speeds(plan: Plan) -> list[float]:
    return [round(tokens_per_s(SPARK, count, weight_bytes_read(plan)), 1) for count in (1, 2)]


# --- the 70B table: disk GB, read per token GB, tokens/s of one DGX Spark and of two ----------------------------------


def test_the_70b_table_comes_out_for_nvfp4_and_fp8(
    seventy_b: tuple[Manifest, Plan], in_fp8: tuple[Manifest, Plan]
) -> None:
    for (_, plan), disk, read in ((seventy_b, 42.7, 40.6), (in_fp8, 72.7, 70.6)):
        assert (round(plan.num_bytes / 1e9, 1), round(weight_bytes_read(plan) / 1e9, 1)) == (disk, read)
    assert speeds(in_fp8[1]) == [3.9, 7.7]
    assert speeds(seventy_b[1]) == [6.7, 13.4]  # the table has 13.5 for 2 x 273 / 40.6, which is 13.45


def test_the_70b_table_comes_out_for_the_base_itself(seventy_b: tuple[Manifest, Plan]) -> None:
    manifest, plan = seventy_b
    base = replace(plan, units=(replace(plan.units[0], tensors=plan.architecture.tensors),), files=())
    assert round(plan.base_num_bytes / 1e9, 1) == 141.1 and round(weight_bytes_read(base) / 1e9, 1) == 139.0
    assert speeds(base)[1] == 3.9
    with pytest.raises(ManifestError, match=r"141.1 GB of weights, but 0.80 of NVIDIA DGX Spark \(GB10\) are 104.5 GB"):
        size(manifest, replace(base, files=plan_files(base.units, 5 << 30, "sequential")))


def test_keys_and_values_take_what_the_formula_says() -> None:
    assert kv_bytes_per_token(LLAMA_70B, 80, "fp8") == 163_840
    assert kv_bytes_per_token(LLAMA_70B, 80, "auto") == 327_680
    assert 32768 * 163_840 == 5 << 30
    assert kv_bytes_per_token(LLAMA_70B, 80, "turboquant_3bit_nc") is None
    assert kv_bytes_per_token({"hidden_size": 1}, 80, "fp8") is None


def test_the_published_profile_leaves_the_published_pool(seventy_b: tuple[Manifest, Plan]) -> None:
    """The card: utilization 0.80 leaves about 62 GB of KV cache on a Spark, for 4 sequences of 32k and more."""
    found = size(*seventy_b)
    assert round(found["pool_bytes"] / 1e9) == 62
    assert found["pool_tokens"] == found["pool_bytes"] // 163_840
    assert (found["context"], found["num_sequences"], found["wanted_sequences"]) == (32768, 11, 4)
    assert warn_of_serving(found) == ()
    one, two = found["speeds"]
    assert two["at_start"] == pytest.approx(2 * one["at_start"])
    read = found["read_bytes"] + 163_840 * 32768
    assert one["at_context"] == pytest.approx(273e9 / read) and one["at_context"] < one["at_start"]


def test_tied_embeddings_are_read_for_every_token() -> None:
    _, plan = plan_of("fallen-command-a-111b-v1.1")
    assert plan.architecture.tied
    assert weight_bytes_read(plan) == sum(tensor.num_bytes for tensor in plan.tensors.values())


# --- what cannot fit --------------------------------------------------------------------------------------------------


def test_an_unknown_machine_is_told_with_the_ones_there_are(seventy_b: tuple[Manifest, Plan]) -> None:
    with pytest.raises(ManifestError) as caught:
        size(*seventy_b, hardware="dgx-sparc")
    assert str(caught.value).splitlines()[0] == "unknown hardware: dgx-sparc"
    assert caught.value.fix.startswith("did you mean dgx-spark? Valid: a100, a6000, dgx-spark, ")


@pytest.mark.parametrize("value", ["0", "x", "-1", "0.0"])
def test_a_share_of_nothing_is_refused(seventy_b: tuple[Manifest, Plan], value: str) -> None:
    with pytest.raises(ManifestError, match="gpu-memory-utilization must be a number above 0, not"):
        size(*seventy_b, args={"gpu-memory-utilization": value})


def test_more_sequences_than_have_room_are_a_warning(seventy_b: tuple[Manifest, Plan]) -> None:
    found = size(*seventy_b, args={"max-num-seqs": "12"})
    assert warn_of_serving(found) == (
        "warning (serve): 12 sequences of 32768 tokens are allowed, and 11 have room: vLLM would interrupt the others",
    )


def test_more_devices_than_key_heads_hold_them_twice(in_fp8: tuple[Manifest, Plan]) -> None:
    by_8, by_16 = (size(*in_fp8, args={"tensor-parallel-size": count}) for count in ("8", "16"))
    assert by_16["kv_bytes_per_token"] == 2 * by_8["kv_bytes_per_token"] == 655_360
    assert [speed["num_devices"] for speed in by_8["speeds"]] == [1, 2, 8]


def test_only_tensor_parallelism_adds_bandwidth(in_fp8: tuple[Manifest, Plan]) -> None:
    found = size(*in_fp8, args={"tensor-parallel-size": None, "pipeline-parallel-size": "2"})
    assert found["name"] == "2 x NVIDIA H100 80 GB (SXM)" and found["num_devices"] == 2
    assert not found["speeds"][0]["fits"] and found["pool_bytes"] == size(*in_fp8)["pool_bytes"]


def test_counts_are_read_as_vllm_reads_them() -> None:
    texts = ("32768", "32k", "32K", "25.6k", "1M", "auto", "-1")
    assert [read_amount(text) for text in texts] == [32768, 32000, 32768, 25600, 1 << 20, None, None]


@pytest.mark.parametrize(
    ("rope", "most"),
    [
        ({}, 512),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 512),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 512),
        ({"rope_scaling": {"type": "linear", "factor": 2.5}}, 1280),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 4.0}, "other": {}}}, 2048),
        ({"text_config": {"rope_scaling": {"type": "dynamic", "factor": 2.0}}}, 1024),
        ({"model_max_length": 4096}, 4096),
    ],
)
def test_more_context_than_the_model_was_made_for_is_refused(
    rope: dict[str, Any], most: int, seventy_b: tuple[Manifest, Plan]
) -> None:
    manifest, _ = seventy_b
    serve = manifest.release.serve
    assert serve is not None

    def check(length: str, env: dict[str, str] | None = None, **args: str) -> None:
        changed = serve.model_copy(update={"args": {"max-model-len": length, **args}, "env": env or {}})
        check_context(changed, rope, 512, manifest.where)

    for length in (str(most), "auto", "-1"):
        check(length)
    with pytest.raises(ManifestError) as caught:
        check(str(most + 1))
    what = f"{most + 1} tokens of context, but the model was made for {most}, and vLLM would not start"
    assert (caught.value.what, caught.value.fix) == (what, f"set it to {most} or less, or leave it out")
    assert ": serve.args.max-model-len: 32768" in caught.value.where
    check(str(most + 1), {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"})
    check(str(most + 1), **{"hf-overrides": "{}"})


def test_devices_that_cannot_share_the_heads_are_refused(seventy_b: tuple[Manifest, Plan]) -> None:
    manifest, plan = seventy_b
    serve = manifest.release.serve
    assert serve is not None
    for count, heads in (("2", 64), ("8", 64), ("3", 96), ("3", None)):
        check_heads(serve.model_copy(update={"args": {"tensor-parallel-size": count}}), heads, manifest.where)
    check_heads(serve, 64, manifest.where)
    with pytest.raises(ManifestError) as caught:
        three = serve.model_copy(update={"args": {"tensor-parallel-size": "3"}})
        check_heads(three, plan.architecture.facts["num_attention_heads"], manifest.where)
    assert caught.value.what == "64 attention heads are not shared evenly by 3 devices, and vLLM would not start"
    assert caught.value.fix == "use one of 1, 2, 4, 8, 16"


def test_every_machine_says_where_its_numbers_are_from() -> None:
    for hardware in list_hardware().values():
        told = hardware.source.split(": ", 1)[1]
        gigabytes = hardware.memory_bytes / 1e9
        assert f"{gigabytes:.0f} GB" in told or "121.6 GiB" in told
        assert f"{hardware.bandwidth / 1e9:,.0f} GB/s" in told or f"{hardware.bandwidth / 1e12:.4g} TB/s" in told
    assert SPARK.memory_bytes == math.floor(121.6 * 2**30)
    assert HARDWARE.read_text("utf-8").count('"source"') == len(list_hardware())


# --- building ---------------------------------------------------------------------------------------------------------


def test_a_build_reads_the_base_for_digests_for_each_block_of_rows_and_to_quantize(
    seventy_b: tuple[Manifest, Plan], in_fp8: tuple[Manifest, Plan]
) -> None:
    rates = Rates(quantize=1e9, calibrate=1e12, source="here")
    _, plan = seventy_b
    found = size_build(plan, joined_bytes=5, rows=(256, 1200), held_out=True, rates=rates)
    base, made = plan.base_num_bytes, plan.num_bytes
    assert found["read"] == {
        "fetch": base,
        "calibrate": 2 * base,
        "quantize": base,
        "assemble": 5,
        "verify": made,
        "perplexity": base + made,
    }
    assert found["written"] == made + 5 and found["quantize_s"] == base / 1e9
    assert found["calibrate_s"] == plan.architecture.num_parameters * 256 * 1200 / 1e12
    free = size_build(in_fp8[1], joined_bytes=0, rows=(256, 1200), held_out=False, rates=REFERENCE)
    assert (free["read"]["calibrate"], free["calibrate_s"], free["read"]["perplexity"]) == (0, 0, 0)


def test_the_reference_machines_rates_are_those_of_its_recorded_benchmark() -> None:
    rows = json.loads((Path(__file__).parent / "benchmarks" / "results" / "build.json").read_text())["rows"]
    small, large = (row for row in rows if row["num_bytes"] > 3e9)
    walls = [row["results"]["weights"]["wall_s"] for row in (small, large)]
    assert REFERENCE.quantize == pytest.approx((large["num_bytes"] - small["num_bytes"]) / (walls[1] - walls[0]), 0.02)
    took = small["results"]["calibrated"]["wall_s"] - walls[0]
    assert REFERENCE.calibrate == pytest.approx(small["num_bytes"] / 2 * 16 * 256 / took, 0.02)


def test_problems_are_manifest_errors_with_their_line(seventy_b: tuple[Manifest, Plan]) -> None:
    manifest, plan = seventy_b
    with pytest.raises(ManifestError) as caught:
        size(manifest, plan, hardware="a6000", args={"gpu-memory-utilization": "0.5"})
    line = next(n for n, text in enumerate(manifest.path.read_text().splitlines(), 1) if "hardware:" in text)
    assert caught.value.what == "42.7 GB of weights, but 0.50 of NVIDIA RTX A6000 are 24.0 GB"
    assert f"deepseek-r1-70b.yaml:{line}:" in caught.value.where
    assert caught.value.fix == "set tensor-parallel-size to 2 or more in serve.args, or name larger hardware"
    with pytest.raises(ManifestError) as caught:
        size(manifest, plan, hardware="a6000", args={"gpu-memory-utilization": "0.95"})
    room = (int(0.95 * 48e9) - plan.num_bytes) // 163_840
    assert caught.value.what == f"32768 tokens of context, but beside the weights there is room for {room}"
    fix = f"set max-model-len to {room // 1024 * 1024} or less, or tensor-parallel-size to more"
    assert caught.value.fix == fix and ": serve.args.max-model-len: 32768" in caught.value.where
