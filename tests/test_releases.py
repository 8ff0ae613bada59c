"""The releases in this repository are planned offline within seconds, with the published figures."""

from __future__ import annotations

import io
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from builder.errors import BuildError, ManifestError
from builder.files import write_receipt
from builder.manifest import load_manifest
from builder.pins import find_open
from builder.sizing import REFERENCE, Rates
from builder.stages import STAGES, Workspace, run_stage
from builder.stages.fetch import check_beforehand
from builder.stages.plan import find_rates
from builder.stages.stage import describe_host
from builder.terminal import print_plan

RELEASES = Path(__file__).parents[1] / "releases"
# parameters in billions, layers, tensors, quantizers of each shard
FIGURES: dict[str, tuple[float, int, int, list[int]]] = {
    "anubis-pro-105b-v1": (104.8, 120, 3603, [420, 420]),
    "behemoth-x-123b-v2.2": (122.6, 88, 2643, [287, 287, 42]),
    "deepseek-r1-70b": (70.6, 80, 2403, [280, 280]),
    "deepseek-r1-70b-as-published": (70.6, 80, 2403, [280, 280]),
    "deepseek-r1-70b-fp8-dynamic": (70.6, 80, 1283, [280, 280]),
    "deepseek-r1-70b-w4a16": (70.6, 80, 1843, [280, 280]),
    "deepseek-r1-70b-w8a8": (70.6, 80, 1283, [280, 280]),
    "fallen-command-a-111b-v1.1": (111.1, 64, 1858, [224, 224]),
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("a plan asks nobody")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def plan(name: str, folder: Path) -> Workspace:
    workspace = Workspace(load_manifest(RELEASES / f"{name}.yaml"), folder / name)
    run_stage(workspace, STAGES[0])
    return workspace


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.xdist_group("releases")
def test_a_release_is_planned_offline_within_seconds(name: str, tmp_path: Path) -> None:
    started = time.process_time()
    workspace = plan(name, tmp_path)
    assert time.process_time() - started < 10
    facts, aside = workspace.facts("plan"), workspace.circumstances("plan")
    billions, layers, tensors, quantizers = FIGURES[name]
    assert round(facts["num_parameters"] / 1e9, 1) == billions
    assert (facts["num_layers"], facts["num_tensors"]) == (layers, tensors)
    assert [shard["num_quantizers"] for shard in aside["shards"]] == quantizers
    assert sum(file["num_bytes"] for file in facts["files"]) == facts["num_bytes"]
    assert aside["calibrate_memory"] < 24e9 and aside["quantize_memory"] < 24e9
    assert aside["serving"]["pool_tokens"] >= aside["serving"]["context"] == 32768
    assert aside["serving"]["speeds"][-1]["fits"]


@pytest.mark.xdist_group("releases")
def test_the_published_packing_comes_out(tmp_path: Path) -> None:
    """The card of 2026-05-15: 2,403 keys in 8 files of about 40 GB together, which are GiB."""
    workspace = plan("deepseek-r1-70b-as-published", tmp_path)
    facts = workspace.facts("plan")
    assert (len(facts["files"]), round(facts["num_bytes"] / 2**30)) == (8, 40)
    text = io.StringIO()
    print_plan(workspace, Console(file=text, width=200))
    shown = [" ".join(line.split()) for line in text.getvalue().splitlines()]
    assert "tensors 2,403 in 8 files" in shown
    assert "size 141 GB -> 42.7 GB" in shown
    assert "from the Hub the base, 141 GB in the Hub's cache, unless it is there already" in shown
    assert "to be pinned base.revision: `doit pin:deepseek-r1-70b-as-published`, before anything is fetched" in shown
    assert "KV cache 163,840 bytes per token: room for 376,857 tokens, 11 sequences of 32,768" in shown
    assert "one device at most 6.7 tokens/s for one stream, 5.9 at 32,768 tokens" in shown
    assert "time about 3 min to quantize, as on 2 cores of an AMD EPYC without a GPU" in shown


@pytest.mark.xdist_group("releases")
def test_the_shards_of_the_sister_releases_are_the_published_ones(tmp_path: Path) -> None:
    shards = plan("behemoth-x-123b-v2.2", tmp_path).circumstances("plan")["shards"]
    assert [shard["last_layer"] - shard["first_layer"] for shard in shards] == [41, 41, 6]


def test_what_is_open_is_marked_and_never_invented() -> None:
    for name in FIGURES:
        path = RELEASES / f"{name}.yaml"
        manifest = load_manifest(path)
        open_pins = list(find_open(manifest))
        marks = path.read_text("utf-8").count(f"# revision: to be pinned by `doit pin:{name}`")
        assert marks == len(open_pins)


def test_a_release_that_is_not_pinned_is_planned_but_not_fetched(tmp_path: Path) -> None:
    workspace = plan("deepseek-r1-70b", tmp_path)
    with pytest.raises(ManifestError) as caught:
        run_stage(workspace, STAGES[1])
    assert "fix: run `doit pin:deepseek-r1-70b`, or add `revision:` with a" in str(caught.value)


# --- this machine -----------------------------------------------------------------------------------------------------


def record_build(folder: Path, name: str, base: int, seconds: float, **changes: Any) -> None:
    """The receipts of a build that took so long on this machine, as far as rates are told by them."""
    circumstances = {"seconds": seconds, "machine": describe_host(), **changes}
    facts = {
        "plan": {"base_num_bytes": base, "num_parameters": base // 2},
        "calibrate": {"rows": {"num_tokens": 1000}},
        "quantize": {},
    }
    for stage, told in facts.items():
        write_receipt(folder / name / "receipts" / f"{stage}.json", {"facts": told, "circumstances": circumstances})


def test_the_rates_are_those_of_the_largest_build_of_this_machine(tmp_path: Path) -> None:
    workspace = Workspace(load_manifest(RELEASES / "deepseek-r1-70b.yaml"), tmp_path / "new")
    record_build(tmp_path, "small", 10**8, 1)
    assert find_rates(workspace) == REFERENCE
    record_build(tmp_path, "medium", 2 * 10**9, 4)
    record_build(tmp_path, "elsewhere", 9 * 10**9, 1, machine="another")
    record_build(tmp_path, "interrupted", 8 * 10**9, 1, resumed=True)
    rates = Rates(quantize=5e8, calibrate=10**9 * 1000 / 4, source="this machine, where medium was built")
    assert find_rates(workspace) == rates
    record_build(tmp_path, "large", 3 * 10**9, 4)
    assert find_rates(workspace).source == "this machine, where large was built"


def test_a_small_disk_is_told_by_the_plan_and_stops_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    workspace = Workspace(load_manifest(RELEASES / "deepseek-r1-70b-w4a16.yaml"), tmp_path)
    lines = run_stage(workspace, STAGES[0])
    assert "warning (disk): the build needs 44.8 GB of disk, and 1 GB are free" in lines
    with pytest.raises(BuildError) as caught:
        check_beforehand(workspace)
    assert str(caught.value) == (
        f"the build needs 44.8 GB of disk, and 1 GB are free\n  in {tmp_path}\n  fix: free some space there"
    )
