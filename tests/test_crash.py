"""Five of the fifty kills of `make crash`."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import crash
import pytest


@pytest.mark.xdist_group("crash")
def test_builds_killed_at_random_moments_end_with_the_same_bytes() -> None:
    done = subprocess.run(
        [sys.executable, crash.__file__, "5", "1", "assemble"],
        env={**os.environ, "PYTHONPATH": str(crash.ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = re.search(r"^5 kills, (\d+) builds finished, every one with the same bytes$", done.stdout, flags=re.M)
    assert told and int(told[1]) >= 1
