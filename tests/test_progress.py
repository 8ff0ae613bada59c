"""What a watcher sees of workers that are elsewhere."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest

import builder.progress
from builder.progress import Progress, read_lines, show_seconds, watch


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder.progress, "WRITE_EVERY_S", 0.0)
    monkeypatch.setattr(builder.progress, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(builder.progress, "LINE_EVERY_S", 0.05)


def wait_for(text: str, stream: io.StringIO) -> None:
    for _ in range(500):
        if text in stream.getvalue():
            return
        time.sleep(0.01)
    pytest.fail(f"{text!r} was never shown: {stream.getvalue()!r}")


def test_there_is_one_line_for_each_worker_with_rate_and_time_left(tmp_path: Path) -> None:
    first, second = (Progress(tmp_path, f"quantize, shard {shard} of 2", 10) for shard in (1, 2))
    first.started -= 4
    second.started -= 6
    first.step(2, num_bytes=8_000_000_000)
    second.step(5, skipped=2)
    assert read_lines(tmp_path) == [
        "quantize, shard 1 of 2: 2 of 10 layers, 2.00 GB/s, about 16 s left",
        "quantize, shard 2 of 2: 5 of 10 layers, 2.0 s each, about 10 s left",
    ]


def test_the_last_step_is_told_whenever_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder.progress, "WRITE_EVERY_S", 1000.0)
    progress = Progress(tmp_path, "calibrate, block 1 of 1", 3)
    progress.written = time.monotonic()
    progress.step(2)
    assert read_lines(tmp_path) == []
    progress.step(3)
    assert [line.partition(",")[0] for line in read_lines(tmp_path)] == ["calibrate"]


def test_a_log_gets_lines_that_stay(tmp_path: Path) -> None:
    log = io.StringIO()
    with watch(tmp_path, log):
        Progress(tmp_path, "calibrate, block 1 of 1", 8).step(3)
        wait_for("  calibrate, block 1 of 1: 3 of 8 layers", log)
        time.sleep(0.2)
    assert log.getvalue().count("\n") == 1, "what has not changed is not said again"
    assert "\x1b" not in log.getvalue()
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_gets_lines_that_are_written_over_and_gone_at_the_end(tmp_path: Path) -> None:
    terminal = Terminal()
    with watch(tmp_path, terminal):
        progress = Progress(tmp_path, "calibrate, block 1 of 1", 8)
        progress.step(3)
        wait_for("3 of 8 layers", terminal)
        progress.step(4)
        wait_for("\x1b[1F\x1b[J  calibrate, block 1 of 1: 4 of 8 layers", terminal)
    assert terminal.getvalue().endswith("\x1b[1F\x1b[J")


def test_what_an_earlier_build_left_is_not_shown(tmp_path: Path) -> None:
    Progress(tmp_path, "of a build that was killed", 8).step(3)
    log = io.StringIO()
    with watch(tmp_path, log):
        time.sleep(0.2)
    assert log.getvalue() == ""


def test_a_torn_file_is_no_line(tmp_path: Path) -> None:
    (tmp_path / "x.progress.json").write_text('{"title": "x"')
    assert read_lines(tmp_path) == []


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.4, "4 s"), (89, "89 s"), (95, "2 min"), (3600, "60 min"), (12_000, "3 h 20 min")]
)
def test_times_read_as_a_person_says_them(seconds: float, text: str) -> None:
    assert show_seconds(seconds) == text
