"""Five of the fifty kills of `make crash`."""

from __future__ import annotations

import os
from pathlib import Path

import crash
import pytest


@pytest.mark.xdist_group("crash")
def test_builds_killed_at_random_moments_end_with_the_same_bytes(tmp_path: Path) -> None:
    crash.prepare(tmp_path)
    losses = crash.crash(tmp_path, kills=5, seed=1, env={**os.environ, "PYTHONPATH": str(crash.ROOT)})
    assert losses.kills.total() == 5 and losses.builds >= 1
