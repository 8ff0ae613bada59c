"""What is calibrated and measured has the same bits on many kinds of processors: the short form of `make machines`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DRILL = Path(__file__).parent / "drills" / "machines.py"
NOTHING: dict[str, Any] = {"native": False, "rows": 0, "windows": 0, "families": [], "build": False}


def run_drill(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(DRILL), *options], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def drill() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DRILL.parent)
        import machines

        yield machines


def test_several_machines_find_the_same(drill: Any) -> None:
    done = run_drill("--short")
    assert done.returncode == 0, done.stdout + done.stderr
    skipped = sum("skipped" in line for line in done.stdout.splitlines())
    assert done.stdout.endswith(f"1 digest on {len(drill.THREE) - skipped} machines\n")


def test_torchs_own_arithmetic_is_seen_to_differ(drill: Any) -> None:
    if len({machine.name for machine in drill.THREE if drill.is_x86() and not machine.lacking}) < 2:
        pytest.skip("this processor can be one machine only")
    done = run_drill("--short", "--native")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "perplexity: " in done.stdout and done.stdout.endswith("results differ\n")


def test_a_difference_is_told_with_what_differs_and_where(drill: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def find(amax: float) -> dict[str, Any]:
        return {"found": {"amax": str(amax), "perplexity": "37.5"}, "tables": {"amax": {"layer input": amax.hex()}}}

    assert drill.conclude({"one": find(54.75), "two": find(55.0), "three": find(55.0)}) == 1
    assert capsys.readouterr().out == (
        "amax: 2 on 3 machines\n"
        "  54.75  one\n"
        "  55.0  two\n"
        "        three\n"
        "    layer input: 54.75 to 55.0\n"
        "1 of 2 results differ\n"
    )
    assert drill.conclude({"one": find(55.0), "two": find(55.0)}, {"lock": find(55.0)}) == 0
    assert capsys.readouterr().out == "1 digest on 2 machines, that of lock\n"


def test_one_machines_work_is_told_in_json() -> None:
    done = run_drill("--here", json.dumps({**NOTHING, "families": ["llama"]}))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert list(result["found"]) == ["llama"] and len(result["found"]["llama"]) == 64


def test_a_machine_is_told_everything_that_limits_it(drill: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if not drill.is_x86():
        pytest.skip("only an x86 can be limited")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setattr(drill, "read_flags", lambda: drill.AVX512 | {"avx2", "fma"})
    free = drill.Machine("DEFAULT", "avx512", 2).environment()
    assert not {"ONEDNN_MAX_CPU_ISA", "NUMBA_CPU_NAME", "MKL_CBWR"} & free.keys()
    assert (free["ATEN_CPU_CAPABILITY"], free["OMP_NUM_THREADS"]) == ("avx512", "2")
    middle = drill.Machine("AVX512_CORE", "avx2", 1).environment()
    assert (middle["ONEDNN_MAX_CPU_ISA"], middle["NUMBA_CPU_NAME"], middle["MKL_CBWR"]) == (
        "AVX512_CORE",
        "haswell",
        "AVX2",
    )
    least = drill.Machine("AVX2", "default", 1).environment()
    assert (least["NUMBA_CPU_NAME"], least["MKL_CBWR"]) == ("x86-64", "COMPATIBLE")
    monkeypatch.setattr(drill, "read_flags", lambda: {"avx2", "fma"})
    assert drill.Machine("DEFAULT", "avx512", 2).lacking == drill.AVX512
