"""How far each worker is: a small file that it writes, and lines for whoever watches.

A file, because it reaches the watcher from any process and any machine, by whatever way the work's results come.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from builder.files import read_json

SUFFIX = ".progress.json"
WRITE_EVERY_S = 1.0
LOOK_EVERY_S = 0.5
LINE_EVERY_S = 60.0  # where lines stay, as in a log


class Progress:
    """What one worker has done of its steps; `folder` may be None, where nobody watches.

    noun: what is counted, in the plural.
    """

    def __init__(self, folder: Path | None, title: str, total: int, noun: str = "layers") -> None:
        self.path = folder / f"{title.replace(' ', '-')}{SUFFIX}" if folder else None
        self.title, self.total, self.noun = title, total, noun
        self.started = time.monotonic()
        self.written = 0.0

    def step(self, done: int, skipped: int = 0, num_bytes: int = 0) -> None:
        """done: steps behind us, of which `skipped` cost nothing; num_bytes: read of the base until now."""
        now = time.monotonic()
        if self.path is None or (now - self.written < WRITE_EVERY_S and done < self.total):
            return
        self.written = now
        seconds, worked = now - self.started, done - skipped
        left = seconds / worked * (self.total - done) if worked > 0 else None
        told = {
            "title": self.title,
            "noun": self.noun,
            "done": done,
            "total": self.total,
            "left_s": left,
            "bytes_per_s": num_bytes / seconds if num_bytes and seconds > 0 else None,
            "seconds_per_step": seconds / worked if worked > 0 else None,
        }
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(told), "utf-8")
            temporary.replace(self.path)
        except OSError:  # a disk that is full will be told by those who need it
            temporary.unlink(missing_ok=True)


def show_step(told: dict[str, Any]) -> str:
    """One worker's line: `quantize, shard 1 of 2: 34 of 82 layers, 1.92 GB/s, about 40 s left`."""
    line = f"{told['title']}: {told['done']} of {told['total']} {told['noun']}"
    if told["bytes_per_s"]:
        line += f", {told['bytes_per_s'] / 1e9:.2f} GB/s"
    elif told["seconds_per_step"]:
        line += f", {told['seconds_per_step']:.1f} s each"
    if told["left_s"] and told["done"] < told["total"]:
        line += f", about {show_seconds(told['left_s'])} left"
    return line


def show_seconds(seconds: float) -> str:
    """40 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def read_lines(folder: Path) -> list[str]:
    """A line for every worker that has told something, in the order of their titles."""
    told = [read_json(path) for path in sorted(folder.glob(f"*{SUFFIX}"))]
    return [show_step(found) for found in told if isinstance(found, dict)]


def drop_progress(folder: Path) -> None:
    for path in folder.glob(f"*{SUFFIX}"):
        path.unlink(missing_ok=True)


@contextmanager
def watch(folder: Path, stream: TextIO | None = None) -> Iterator[None]:
    """While the block runs, show how far the workers in `folder` are.

    On a terminal there is a line for each that is written anew all the time; elsewhere a line for each once a minute.
    """
    stream = stream or sys.stderr
    drop_progress(folder)
    ended = threading.Event()
    show = show_live if stream.isatty() else show_log
    thread = threading.Thread(target=show, args=(folder, stream, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        drop_progress(folder)


def show_live(folder: Path, stream: TextIO, ended: threading.Event) -> None:
    """The lines over themselves; the cursor stays visible, for the process may be ended at any moment."""
    shown = 0
    while True:
        is_last = ended.wait(LOOK_EVERY_S)
        width = shutil.get_terminal_size().columns - 1
        lines = [] if is_last else [f"  {line}"[:width] for line in read_lines(folder)]
        up = f"\x1b[{shown}F" if shown else ""
        stream.write(f"{up}\x1b[J" + "".join(f"{line}\n" for line in lines))
        stream.flush()
        shown = len(lines)
        if is_last:
            return


def show_log(folder: Path, stream: TextIO, ended: threading.Event) -> None:
    """The lines that have changed."""
    shown: list[str] = []
    while not ended.wait(LINE_EVERY_S):
        lines = read_lines(folder)
        for line in lines:
            if line not in shown:
                print(f"  {line}", file=stream, flush=True)
        shown = lines
