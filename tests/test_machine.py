"""What memory there is, as the limits that hold for this process make it."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.machine import CGROUPS, available_memory, measure_peak

ASK = "from builder.machine import available_memory; print(available_memory())"


def test_the_peak_is_at_least_what_was_held() -> None:
    before = measure_peak()
    held = bytearray(b"x") * (before + (64 << 20))
    assert measure_peak() > before + (32 << 20), len(held)


def test_no_more_memory_is_available_than_there_is() -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemTotal:"))
    available = available_memory()
    assert available is not None and 0 < available < total


@pytest.fixture
def limited_group() -> Iterator[Path]:
    """A control group with 300 MB, inside which another has no limit of its own."""
    version_1 = (CGROUPS / "memory" / "memory.limit_in_bytes").exists()
    outer = (CGROUPS / "memory" if version_1 else CGROUPS) / f"test-{uuid.uuid4().hex}"
    try:
        outer.mkdir()
        (outer / ("memory.limit_in_bytes" if version_1 else "memory.max")).write_text(str(300 << 20))
        (outer / "inner").mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    yield outer / "inner"
    (outer / "inner").rmdir()
    outer.rmdir()


def test_a_limit_of_a_group_further_out_holds(limited_group: Path) -> None:
    join = f"echo $$ > {limited_group}/cgroup.procs && exec {sys.executable} -c '{ASK}'"
    told = subprocess.run(
        ["bash", "-c", join], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert 100 << 20 < int(told.stdout) <= 300 << 20
