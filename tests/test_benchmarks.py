"""Measured speed becomes latencies and queries per dollar, use by use; those of the published card come out again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builder.benchmarks import (
    PROFILES,
    Load,
    read_guidellm,
    read_vllm_bench,
)
from builder.errors import BuildError
from builder.manifest import Manifest, load_manifest

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
