"""Work for the executors' tests: functions that a worker, too, can import."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from builder.errors import ManifestError, Problems
from builder.files import write_atomic
from builder.parts import UNITS, record_file

Json = dict[str, Any]


def square(job: Json) -> Json:
    return {"number": job["number"], "square": job["number"] ** 2}


def echo(job: Json) -> Json:
    job["seen"] = True
    return job


def tell_process(job: Json) -> Json:
    names = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    return {"pid": os.getpid(), "parent": os.getppid()} | {name: os.environ.get(name) for name in names}


def meet(job: Json) -> Json:
    """Ends only when as many jobs as `expected` run at the same time."""
    folder = Path(job["folder"])
    (folder / str(job["number"])).touch()
    wait_until_files(folder, job["expected"])
    return tell_process(job)


def wait_for_file(job: Json) -> Json:
    """Ends only when the file `awaits` is there; with none to await, at once."""
    while job["awaits"] and not Path(job["awaits"]).exists():
        time.sleep(0.01)
    return {"number": job["number"]}


def mark_and_sleep(job: Json) -> Json:
    """Leaves its process id, and that of a process it started, in `folder`; then sleeps far too long."""
    child = subprocess.Popen(["sleep", "600"])
    write_whole(Path(job["folder"]) / f"{job['number']}.pids", f"{os.getpid()} {child.pid}")
    time.sleep(600)
    return {}


def mark_and_sleep_unless_first(job: Json) -> Json:
    """The first job ends once the second has left its mark, which then sleeps far too long."""
    if job["number"] > 0:
        return mark_and_sleep(job)
    wait_until_files(Path(job["folder"]), 1)
    return {}


def refuse_the_second(job: Json) -> Json:
    """The second job is refused once the first has left its mark, which then sleeps far too long."""
    if job["number"] == 0:
        return mark_and_sleep(job)
    if job["number"] == 1:
        wait_until_files(Path(job["folder"]), 1)
        raise ManifestError(
            "97 shards, but the model has 80 layers", "releases/x.yaml:3: shards: 97", "use 80 or fewer"
        )
    (Path(job["folder"]) / "handed-out-after-the-failure").touch()
    return {}


def find_problems(job: Json) -> Json:
    raise Problems([ManifestError("one", "here", "so"), ManifestError("two", "there", "thus")])


def divide_by_zero(job: Json) -> Json:
    return {"quotient": 1 / job["number"]}


def give_path(job: Json) -> Json:
    return {"path": Path("x")}


def die(job: Json) -> Json:
    os.kill(os.getpid(), job["signal"])
    return {}


def leave(job: Json) -> Json:
    os._exit(job["status"])


def die_the_first_time(job: Json) -> Json:
    marker = Path(job["marker"])
    if marker.exists():
        return {"pid": os.getpid(), "first_pid": int(marker.read_text())}
    write_whole(marker, str(os.getpid()))
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def linger(job: Json) -> Json:
    """Leaves its process id and its parent's at each of `markers` in turn, and sleeps far too long; then no more."""
    for marker in map(Path, job["markers"]):
        if not marker.exists():
            write_whole(marker, f"{os.getpid()} {os.getppid()}")
            time.sleep(600)
    return tell_process(job)


def eat_memory(job: Json) -> Json:
    hoard = []
    while True:
        hoard.append(b"x" * 10_000_000)


def make_pieces(job: Json) -> Json:
    """Like a shard of layers: a piece and its record for each unit that is not there yet; sleeps at `stop_at`.

    The hosts of a record's units are told; a worker that is asked again on another machine does not sleep.
    """
    folder, made = Path(job["folder"]), []
    for unit in job["all_units"]:
        if unit in job.get("have", ()):
            continue
        if unit == job["stop_at"] and socket.gethostname() == job["stop_on"]:
            time.sleep(600)
        path = folder / UNITS / f"{unit}.safetensors"
        content = unit.encode() * job["num_bytes"]
        write_atomic(path, content)
        record_file(path, job["key"], hashlib.sha256(content).hexdigest(), len(content))
        made.append(unit)
    return {"host": socket.gethostname(), "folder": str(folder), "apart": job.get("apart", False), "made": made}


def write_whole(path: Path, text: str) -> None:
    path.with_suffix(".partial").write_text(text)
    path.with_suffix(".partial").rename(path)


def wait_until_files(folder: Path, count: int) -> None:
    while sum(path.suffix != ".partial" for path in folder.iterdir()) < count:
        time.sleep(0.01)
