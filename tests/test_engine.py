"""The vLLM to check with is found or told to be missing, and losses become a perplexity."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from builder import engine
from builder.engine import INSIDE, Engine, Reading, average_losses, find_engine, make_environment
from builder.errors import BuildError

ENGINE = Engine(python=Path("python"), version="0.32.0", platform="cuda", devices=("H200", "A100", "H200"))


def test_an_engine_is_told_by_version_and_devices() -> None:
    assert str(ENGINE) == "vLLM 0.32.0 on 1 x A100, 2 x H200"
    assert not ENGINE.on_cpu


def test_without_any_vllm_both_ways_to_one_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SERVING_PYTHON", raising=False)
    monkeypatch.setattr(engine, "OWN", tmp_path / ".venv-serving" / "bin" / "python")
    with pytest.raises(BuildError) as caught:
        find_engine("python3")  # found on PATH, perhaps, but meant for the host that serves
    assert str(caught.value) == (
        "there is no vLLM to be found\n"
        "  in SERVING_PYTHON, serve.python, .venv-serving\n"
        "  fix: `make serving-env` installs one for the CPU; "
        "or set SERVING_PYTHON to the Python of an environment that has vLLM"
    )


def test_a_variable_that_names_no_program_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SERVING_PYTHON", str(tmp_path))
    with pytest.raises(BuildError, match=r"is no program\n  in the environment variable SERVING_PYTHON"):
        find_engine(sys.executable)


def test_an_environment_without_vllm_is_refused_in_pythons_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVING_PYTHON", sys.executable)
    with pytest.raises(BuildError) as caught:
        find_engine()
    assert caught.value.what == "no vLLM runs there: ModuleNotFoundError: No module named 'vllm'"
    assert caught.value.where == sys.executable


def test_a_program_that_the_system_does_not_start_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "python").write_text("no program at all")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setenv("SERVING_PYTHON", str(tmp_path / "python"))
    with pytest.raises(BuildError) as caught:
        find_engine()
    assert caught.value.what == f"{tmp_path / 'python'} cannot be started: Exec format error"


def test_vllms_environment_has_our_plugin_and_nothing_of_our_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/ours")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    found = make_environment(TMPDIR="/scratch")
    assert found["PYTHONPATH"] == str(INSIDE)
    assert (found["VLLM_CPU_KVCACHE_SPACE"], found["HF_HUB_OFFLINE"], found["TMPDIR"]) == ("7", "1", "/scratch")
    show = "import importlib.metadata as m; print([e.value for e in m.entry_points(group='vllm.general_plugins')])"
    done = subprocess.run([sys.executable, "-c", show], env=found, capture_output=True, text=True, check=True)
    assert "nvfp4_on_cpu:offer_emulation" in done.stdout


def test_a_command_is_tethered_to_the_process_that_started_it() -> None:
    start = (
        "import subprocess, sys; from pathlib import Path; from builder.engine import Engine, tether; "
        "engine = Engine(python=Path(sys.executable), version='', platform='cpu', devices=()); "
        "child = subprocess.Popen(tether(engine, '-c', 'print(flush=True); import time; time.sleep(600)'), "
        "stdout=subprocess.PIPE); child.stdout.readline(); print(child.pid, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", start], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as starter:
        assert starter.stdout
        child = Path(f"/proc/{int(starter.stdout.readline())}/stat")
        assert child.exists()
        starter.kill()
    for _ in range(1000):
        if not child.exists() or child.read_text().rpartition(")")[2].split()[0] in "ZX":
            return
        subprocess.run(["sleep", "0.05"], check=True)
    raise AssertionError("it lives on")


def test_a_perplexity_is_the_exponential_of_the_mean_loss_over_all_windows() -> None:
    reading = Reading(losses=[[1.0, 2.0, 3.0], [6.0]], kernels={}, seconds=1, peak_bytes=1)
    assert reading.perplexity == pytest.approx(math.exp(3))
    assert math.isnan(average_losses([[1.0, math.nan]]))
    assert math.isnan(average_losses([[1e9]]))
    assert math.isnan(average_losses([]))
