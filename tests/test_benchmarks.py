"""Measured speed becomes latencies and queries per dollar, use by use; those of the published card come out again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import obligations_of

from builder.benchmarks import (
    PROFILES,
    Load,
    Row,
    SpeedTable,
    count_per_dollar,
    load_benchmarks,
    read_guidellm,
    read_recorded_speed,
    read_vllm_bench,
)
from builder.errors import BuildError, Problems
from builder.manifest import Manifest, load_manifest
from builder.render import render_card

RESULTS = Path(__file__).parent / "results"
VLLM = RESULTS / "vllm-bench-serve-0.32.json"
GUIDELLM = RESULTS / "guidellm-0.8.1.json"
RECORD = Path(__file__).parents[1] / "releases" / "deepseek-r1-70b-fp8-dynamic" / "speed.yaml"

Write = Callable[..., Path]


@pytest.fixture
def rewrite(tmp_path: Path) -> Write:
    """Writes a copy of vLLM's result file with other values."""

    def write(name: str = "result.json", **changes: Any) -> Path:
        content = {**json.loads(VLLM.read_text("utf-8")), **changes}
        path = tmp_path / name
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}), "utf-8")
        return path

    return write


@pytest.fixture
def write_manifest(tmp_path: Path) -> Callable[..., Manifest]:
    def write(*benchmarks: dict[str, Any], base: str = "someone/base") -> Manifest:
        path = tmp_path / "release.yaml"
        content = {
            "manifest": 1,
            "title": "Release",
            "repo": "someone/release",
            "base": {"model": base, "licenses": ["mit"]},
            "scheme": {"name": "fp8_dynamic"},
            "benchmarks": benchmarks,
        }
        path.write_text(json.dumps(content), "utf-8")
        return load_manifest(path)

    return write


# --- result files -----------------------------------------------------------------------------------------------------


def test_a_file_of_vllm_bench_serve_gives_its_load() -> None:
    speed = read_vllm_bench(VLLM)
    assert (speed.model, speed.date, speed.tool) == ("tiny-nvfp4", "2026-11-21", "vllm bench serve")
    assert speed.loads == (
        Load(
            size=(64, 16),
            single=False,
            latency_s=0.36551597400000446,
            requests_per_s=10.898379095384858,
            first_token_ms=66.40417149992572,
            output_tokens_per_s=174.37406552615772,
            num_requests=16,
        ),
    )


def test_a_file_of_guidellm_gives_a_load_for_each_of_its_benchmarks() -> None:
    speed = read_guidellm(GUIDELLM)
    assert (speed.model, speed.date, speed.tool) == ("tiny-nvfp4", "2026-11-21", "guidellm 0.8.1")
    assert speed.loads == (
        Load(
            size=(64, 16),  # asked for; with the chat template around them, prompts have 75 tokens
            single=False,
            latency_s=0.4038257837295533,
            requests_per_s=4.632702676821056,
            first_token_ms=54.662466049194336,
            output_tokens_per_s=74.1232428291369,
            num_requests=10,
        ),
    )


def test_one_stream_is_told_from_many(rewrite: Write, tmp_path: Path) -> None:
    assert read_vllm_bench(rewrite(max_concurrency=1)).loads[0].single
    assert not read_vllm_bench(rewrite(max_concurrency=None)).loads[0].single
    content = json.loads(GUIDELLM.read_text("utf-8"))
    content["benchmarks"][0]["config"]["strategy"] = {"type_": "synchronous"}
    path = tmp_path / "guidellm.json"
    path.write_text(json.dumps(content), "utf-8")
    assert read_guidellm(path).loads[0].single


def test_the_latency_of_one_stream_is_known_without_percentiles_of_it(rewrite: Write) -> None:
    bare = {"mean_e2el_ms": None, "duration": 8.0}
    assert read_vllm_bench(rewrite(max_concurrency=1, **bare)).loads[0].latency_s == 0.5
    assert read_vllm_bench(rewrite(**bare)).loads[0].latency_s is None


@pytest.mark.parametrize("size", PROFILES)
def test_a_use_is_recognised_from_the_files_own_numbers(rewrite: Write, size: tuple[int, int]) -> None:
    near = {"total_input_tokens": round(16 * size[0] * 1.015), "total_output_tokens": round(16 * size[1] * 0.985)}
    assert read_vllm_bench(rewrite(**near)).loads[0].size == size
    far = {"total_input_tokens": round(16 * size[0] * 1.05), "total_output_tokens": 16 * size[1]}
    assert read_vllm_bench(rewrite(**far)).loads[0].size == (round(size[0] * 1.05), size[1])
    asked = {"prompt_tokens": str(size[0]), "output_tokens": str(size[1])}
    assert read_vllm_bench(rewrite(**far, **asked)).loads[0].size == size


@pytest.mark.parametrize(
    ("change", "what", "fix"),
    [
        ({"completed": 0}, "no request was answered", "measure again, against a server that answers"),
        (
            {"completed": None, "model_id": None},
            "result.json is not a result of vllm bench serve: it lacks model_id, completed",
            "give the file as the tool wrote it, or say tool: what wrote it",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_name(
    rewrite: Write, change: dict[str, Any], what: str, fix: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BuildError) as caught:
        read_vllm_bench(rewrite(**change))
    assert str(caught.value) == f"{what}\n  in result.json\n  fix: {fix}"


def test_a_guidellm_file_of_another_form_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "old.json"
    path.write_text('{"metadata": {}, "config": {"spec": {}}, "benchmarks": [{}]}', "utf-8")
    with pytest.raises(BuildError) as caught:
        read_guidellm(path)
    assert str(caught.value) == (
        "old.json is not as guidellm 0.8 writes it: 'metrics' is not there\n"
        "  in old.json\n"
        "  fix: measure with guidellm 0.8, or record the figures by hand"
    )


# --- the published card -----------------------------------------------------------------------------------------------

FP8 = "neuralmagic/DeepSeek-R1-Distill-Llama-70B-FP8-dynamic"
W8A8 = "neuralmagic/DeepSeek-R1-Distill-Llama-70B-quantized.w8a8"
W4A16 = "neuralmagic/DeepSeek-R1-Distill-Llama-70B-quantized.w4a16"
CARD = yaml.safe_load((RESULTS / "fp8-dynamic-card.yaml").read_text("utf-8"))

# US dollars an hour of all GPUs. The card names no price: these follow from its queries per dollar. Those of A6000, of
# A100 and of four H100 do to the cent; one H100 leaves 3.28 and 3.29, two leave 3.17 to 3.20 each: of these the middle.
# Four H100 are priced as eight at 2.99: were they priced as four, every one of their cells would be twice as large.
PRICES = {
    ("A6000", 2): 1.60,
    ("A6000", 4): 3.20,
    ("A100", 1): 1.79,
    ("A100", 2): 3.58,
    ("A100", 4): 7.16,
    ("H100", 1): 3.29,
    ("H100", 2): 6.38,
    ("H100", 4): 23.92,
}
RUNS = [(run["gpu"], run["num_gpus"], run["model"]) for kind in ("single", "multi") for run in CARD[kind]]
Interval = tuple[float, float]


def list_entries() -> list[dict[str, Any]]:
    """The manifest's `benchmarks` for the whole card: a row each, with its price."""
    sides = {"deepseek-ai/DeepSeek-R1-Distill-Llama-70B": "base", FP8: "quantized"}
    return [
        {
            "file": str(RECORD),
            "model": sides.get(model, model),
            **({"measured": FP8} if model == FP8 else {}),
            "gpu": gpu,
            "num_gpus": num_gpus,
            "price_per_hour": PRICES[gpu, num_gpus],
            "price_date": "2025-02-18",
            "price_source": "https://lambdalabs.com/service/gpu-cloud, inferred from the card's queries per dollar",
        }
        for gpu, num_gpus, model in dict.fromkeys(RUNS)
    ]


@pytest.fixture
def published(write_manifest: Callable[..., Manifest]) -> Manifest:
    return write_manifest(*list_entries(), base="deepseek-ai/DeepSeek-R1-Distill-Llama-70B")


def printed(text: str) -> Interval:
    """What a number may have been before it was rounded to what is printed."""
    half = 0.5 * 10.0 ** -len(text.partition(".")[2])
    return float(text) - half, float(text) + half


def bound(value: float, half: float) -> Interval:
    return value - half, value + half


def per_dollar(value: float, price: float, kind: str) -> Interval:
    """All that queries per dollar may be, of a latency printed to 0.1 s or a throughput printed to 0.01 a second."""
    low, high = bound(value, 0.05 if kind == "single" else 0.005)
    return (
        (3600 / (high * price), 3600 / (low * price)) if kind == "single" else (3600 * low / price, 3600 * high / price)
    )


def meets(one: Interval, other: Interval) -> bool:
    return one[0] <= other[1] and other[0] <= one[1]


def find_row(table: SpeedTable, run: dict[str, Any]) -> Row:
    wanted = (run["gpu"], run["num_gpus"], run["model"])
    (row,) = (row for row in table.rows if (row.gpu, row.num_gpus, row.model) == wanted)
    return row


def read_cells(card: str, heading: str) -> dict[tuple[str, str], list[str]]:
    """The cells of a table of the rendered card, by GPUs and model."""
    lines = card.partition(f"\n### {heading}\n")[2].partition("\n###")[0].splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if re.match(r"\| \d+ × ", line)]
    return {(row[0], row[1].strip("`")): row[2:] for row in rows}


KINDS = (("single", 0, "One request at a time"), ("multi", 1, "Many requests at once"))


@pytest.mark.parametrize(("kind", "place", "heading"), KINDS)
def test_the_published_cards_costs_come_out_of_the_renderer(
    published: Manifest, tmp_path: Path, kind: str, place: int, heading: str
) -> None:
    table = load_benchmarks(published).tables[place]
    rendered = read_cells(render_card(published, {}, obligations_of(tmp_path))["README.md"], heading)
    assert table.sizes == tuple(PROFILES) and len(table.rows) == len(CARD[kind]) == len(rendered) == 9
    outside = []
    for run in CARD[kind]:
        row = find_row(table, run)
        base = next(other for other in table.rows if other.side == "base" and other.gpu == row.gpu)
        reduction, *cells = rendered[f"{row.num_gpus} × {row.gpu}", row.model]
        bounds = {}
        for which in (row, base):
            price = PRICES[which.gpu, which.num_gpus]
            bounds[which.side] = [per_dollar(which.cells[size].value, price, kind) for size in table.sizes]
        for size, shown, theirs, interval in zip(table.sizes, cells, run["per_dollar"], bounds[row.side], strict=True):
            ours = shown.partition(", ")[2]
            assert meets(interval, printed(ours)), (run, size, shown)
            outside += [] if meets(interval, printed(theirs)) else [(row.gpu, row.num_gpus, row.model, size)]
        if row.side == "base":
            assert reduction == run["reduction"] == "---"
            continue
        pairs = list(zip(bounds[row.side], bounds["base"], strict=True))
        low, high = (sum(ours[end] / theirs[1 - end] for ours, theirs in pairs) / 8 for end in (0, 1))
        assert low <= float(reduction) <= high, run
        outside += [] if meets((low, high), printed(run["reduction"])) else [(row.gpu, row.num_gpus, row.model)]
    assert outside == []  # all 72 cells and 6 reductions of the card are within what its rounding allows


@pytest.mark.parametrize("machine", PRICES, ids=lambda machine: f"{machine[1]}x{machine[0]}")
def test_the_prices_are_the_ones_that_the_published_cells_leave_room_for(
    published: Manifest, machine: tuple[str, int]
) -> None:
    low, high = 0.0, float("inf")
    for (kind, _, _), table in zip(KINDS, load_benchmarks(published).tables, strict=True):
        for run in CARD[kind]:
            if (run["gpu"], run["num_gpus"]) != machine:
                continue
            for size, text in zip(table.sizes, run["per_dollar"], strict=True):
                value, (least, most) = find_row(table, run).cells[size].value, printed(text)
                one = per_dollar(value, 1.0, kind)
                low, high = max(low, one[0] / most), min(high, one[1] / least)
    assert low <= PRICES[machine] <= high
    assert high - low < 0.04 * machine[1]  # dollars


def test_four_h100_were_priced_as_eight(published: Manifest) -> None:
    assert PRICES["H100", 4] == pytest.approx(8 * 2.99)
    row = next(row for row in load_benchmarks(published).tables[1].rows if (row.gpu, row.side) == ("H100", "quantized"))
    assert meets(bound(row.cells[256, 128].per_dollar or 0, 1), printed("6236"))
    assert not meets(per_dollar(row.cells[256, 128].value, 4 * 3.29, "multi"), printed("6236"))


def test_the_published_gain_in_speed_comes_out(published: Manifest) -> None:
    single, multi = load_benchmarks(published).tables
    assert single.fastest and multi.fastest
    assert f"{single.fastest.speedup:.1f}" == CARD["speedup"]["single"]  # 7.6 s / 5.3 s
    assert f"{multi.fastest.speedup:.1f}" == CARD["speedup"]["multi"]  # 41.44 / 14.04 a second


def test_figures_of_another_build_are_shown_under_its_name(published: Manifest, tmp_path: Path) -> None:
    card = render_card(published, {}, obligations_of(tmp_path))["README.md"]
    assert f"`{FP8}` is up to 1.4 times as fast as the base" in card and "`someone/release`" not in card
    bold = "2025-02-18. **These are another build's figures, not measured on the files here**"
    assert [line.split("`")[1] for line in card.splitlines() if line.endswith(bold)] == [FP8]


# --- what it costs ----------------------------------------------------------------------------------------------------


def test_queries_per_dollar_are_counted_from_latency_or_throughput() -> None:
    assert count_per_dollar(2.0, 3.0, single=True) == 600
    assert count_per_dollar(2.0, 3.0, single=False) == 2400
    assert count_per_dollar(2.0, None, single=True) is None


def test_without_a_price_there_is_speed_and_no_cost(
    rewrite: Write, write_manifest: Callable[..., Manifest], tmp_path: Path
) -> None:
    base = rewrite("base.json", max_concurrency=1, mean_e2el_ms=500.0)
    entries = (
        {"file": base.name, "model": "base", "gpu": "H100"},
        {"file": rewrite(max_concurrency=1).name, "gpu": "H100"},
    )
    manifest = write_manifest(*entries)
    (single,) = load_benchmarks(manifest).tables
    assert [(row.model, row.reduction) for row in single.rows] == [("someone/base", None), ("someone/release", None)]
    assert single.fastest and single.fastest.speedup == pytest.approx(500 / 365.515974) and single.prices == ()
    card = render_card(manifest, {}, obligations_of(tmp_path))["README.md"]
    assert "| GPUs | Model | Average cost reduction | 64 / 16 |" in card
    assert "| 1 × H100 | `someone/release` | --- | 0.3655 s |" in card and "per dollar" not in card
    assert "`someone/release` is up to 1.4 times as fast as the base on the same GPUs." in card
    assert "- `tiny-nvfp4`: vllm bench serve, 2026-11-21" in card and "Serving speed: not measured" not in card


def test_a_base_on_other_gpus_or_other_uses_is_not_compared_with(
    rewrite: Write, write_manifest: Callable[..., Manifest]
) -> None:
    price = {"price_per_hour": 2, "price_date": "2026-11-01", "price_source": "s"}
    ours = {"file": rewrite().name, "gpu": "H100", **price}
    other_gpu = {"file": rewrite("b.json").name, "model": "base", "gpu": "A100", **price}
    size = {"prompt_tokens": "256", "output_tokens": "128"}
    other_use = {"file": rewrite("c.json", **size).name, "model": "base", "gpu": "H100", **price}
    (table,) = load_benchmarks(write_manifest(ours, other_gpu, other_use)).tables
    assert [(row.gpu, row.side, row.reduction) for row in table.rows] == [
        ("H100", "base", None),
        ("H100", "quantized", None),
        ("A100", "base", None),
    ]


def test_of_several_bases_the_one_on_as_many_gpus_is_compared_with(
    rewrite: Write, write_manifest: Callable[..., Manifest]
) -> None:
    price = {"price_date": "2026-11-01", "price_source": "s"}
    entries = [
        {"file": rewrite(f"{num}.json", request_throughput=rate).name, "model": "base", "gpu": "H100", "num_gpus": num}
        | {"price_per_hour": num, **price}
        for num, rate in ((4, 8.0), (2, 4.0))
    ]
    ours = [
        {
            "file": rewrite("ours.json", request_throughput=6.0).name,
            "gpu": "H100",
            "num_gpus": num,
            "price_per_hour": num,
        }
        | price
        for num in (1, 4)
    ]
    (table,) = load_benchmarks(write_manifest(*entries, *ours)).tables
    found = {row.num_gpus: (row.reduction, row.speedup) for row in table.rows if row.side == "quantized"}
    assert found == {1: (3.0, None), 4: (0.75, 0.75)}  # on one GPU against the base's two, its fewest


def test_of_many_streams_the_load_with_most_throughput_is_shown(
    rewrite: Write, write_manifest: Callable[..., Manifest]
) -> None:
    files = [rewrite(f"{rate}.json", request_throughput=rate).name for rate in (3.0, 9.0, 5.0)]
    (table,) = load_benchmarks(write_manifest(*({"file": file, "gpu": "H100"} for file in files))).tables
    assert table.rows[0].cells[64, 16].value == 9.0


def test_one_stream_measured_twice_is_refused(rewrite: Write, write_manifest: Callable[..., Manifest]) -> None:
    files = [rewrite(f"{number}.json", max_concurrency=1).name for number in (1, 2)]
    with pytest.raises(BuildError) as caught:
        load_benchmarks(write_manifest(*({"file": file, "gpu": "H100"} for file in files)))
    assert caught.value.what == "64 / 16, one stream, is measured twice on 1 x H100"
    assert caught.value.fix == "keep one of the files"


def test_failed_requests_are_told(rewrite: Write, write_manifest: Callable[..., Manifest], tmp_path: Path) -> None:
    manifest = write_manifest({"file": rewrite(failed=3).name, "gpu": "H100"})
    card = render_card(manifest, {}, obligations_of(tmp_path))["README.md"]
    assert "3 requests failed; the figures are of those that were answered." in card


def test_all_files_that_cannot_be_read_are_told_together(write_manifest: Callable[..., Manifest]) -> None:
    with pytest.raises(Problems) as caught:
        load_benchmarks(write_manifest({"file": "one.json", "gpu": "H100"}, {"file": "two.json", "gpu": "H100"}))
    assert [problem.what for problem in caught.value.problems] == [
        "there is no file one.json",
        "there is no file two.json",
    ]
    assert caught.value.problems[1].where.endswith(": benchmarks[1].file: two.json")


def test_a_record_without_the_run_says_which_it_has() -> None:
    with pytest.raises(BuildError) as caught:
        read_recorded_speed(RECORD, FP8, "B200", 2)
    assert caught.value.what == f"speed.yaml has no run of {FP8} on 2 x B200"
    assert f"2 x H100 of {FP8}" in caught.value.fix


def test_a_recorded_run_is_of_one_kind(tmp_path: Path) -> None:
    path = tmp_path / "speed.yaml"
    head = RECORD.read_text("utf-8").partition("runs:\n")[0]
    path.write_text(head + "runs: [{model: a/b, gpu: H100, num_gpus: 1}]\n", "utf-8")
    with pytest.raises(BuildError) as caught:
        read_recorded_speed(path, "a/b", "H100", 1)
    assert caught.value.what == "a run has either latency_s or requests_per_s"
