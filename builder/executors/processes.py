"""Jobs in processes of this machine: a fresh interpreter for each job, so that its memory is gone when it is done.

Fresh, because torch's threads do not survive a fork; and a plain subprocess, because the limits on threads must be in
the environment before anything is imported. A worker is its own process group, so Ctrl-C reaches only the parent,
which then kills the workers. They need no gentler end: unfinished work leaves no trace that matters.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path

from builder.errors import BuildError, ExecutorError
from builder.executors import (
    Call,
    Job,
    Record,
    Work,
    import_roots,
    num_cores,
    perform,
    plan_calls,
    record_of,
    thread_limits,
)
from builder.machine import end_with_parent


class Processes:
    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers

    def run(self, work: Work, jobs: Sequence[Job]) -> Iterator[tuple[int, Record]]:
        calls = plan_calls(work, jobs)
        return perform_all(calls, min(self.num_workers, len(calls)))


@dataclass(frozen=True, kw_only=True)
class Worker:
    """A running process. slot: 0 <= slot < num_workers, held by no other running worker."""

    index: int
    call: Call
    slot: int
    process: subprocess.Popen[bytes]
    connection: Connection

    def stop(self) -> tuple[int, int]:
        """Kill it with all it started; returns its status, negative for a signal, and its largest memory in bytes."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.connection.close()
        _, status, usage = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        return self.process.returncode, usage.ru_maxrss * 1024


class OutOfMemoryKills:
    """The kernel's count of processes it killed for want of memory: in our cgroup, or else on the whole machine."""

    def __init__(self) -> None:
        self.counter = find_counter()
        self.seen = self.count()

    def count(self) -> int:
        """Both formats have a line "oom_kill N"; 0 where the kernel keeps no count."""
        lines = self.counter.read_text().splitlines() if self.counter.is_file() else []
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)

    def explain_one(self) -> bool:
        """Whether there was a kill that did not explain a death yet."""
        explains = self.count() > self.seen
        self.seen += explains
        return explains


def find_counter() -> Path:
    """The file that counts; it does so before the signal is sent."""
    groups = Path("/proc/self/cgroup")
    for line in groups.read_text().splitlines() if groups.is_file() else []:
        _, controllers, group = line.split(":", 2)
        if "memory" in controllers.split(","):
            counter = Path(f"/sys/fs/cgroup/memory{group}/memory.oom_control")
        else:
            counter = Path(f"/sys/fs/cgroup{group}/memory.events")
        if counter.is_file():
            return counter
    return Path("/proc/vmstat")


def perform_all(calls: Sequence[Call], num_workers: int) -> Iterator[tuple[int, Record]]:
    waiting = deque(enumerate(calls))
    slots = list(range(num_workers))
    running: list[Worker] = []
    kills = OutOfMemoryKills()
    try:
        while waiting or running:
            while waiting and slots:
                running.append(start(*waiting.popleft(), slots.pop(0), num_workers))
            ready = wait([worker.connection for worker in running])
            for worker in [worker for worker in running if worker.connection in ready]:
                outcome = receive(worker, kills)
                running.remove(worker)
                slots.append(worker.slot)
                yield worker.index, record_of(outcome)
    finally:
        for worker in running:
            worker.stop()


def start(index: int, call: Call, slot: int, num_workers: int) -> Worker:
    environment = os.environ | thread_limits(num_cores() // num_workers)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [import_roots(call), os.environ.get("PYTHONPATH")]))
    if gpus := visible_gpus():
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    ours, theirs = Pipe()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(theirs.fileno()), str(os.getpid())],
            env=environment,
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            process_group=0,
        )
    with suppress(ConnectionError):  # it died at once: receiving will tell
        ours.send(call)
    return Worker(index=index, call=call, slot=slot, process=process, connection=ours)


def receive(worker: Worker, kills: OutOfMemoryKills) -> str | BuildError:
    """The answer of a worker, or an ExecutorError if it died instead; either way its process is gone afterwards."""
    try:
        outcome: str | BuildError = worker.connection.recv()
        worker.stop()
    except (EOFError, OSError):
        status, peak_bytes = worker.stop()
        explained = status == -signal.SIGKILL and kills.explain_one()
        outcome = explain_death(status, peak_bytes, explained, worker.call.where)
    return outcome


def explain_death(status: int, peak_bytes: int, was_out_of_memory: bool, where: str) -> ExecutorError:
    """status: as subprocess gives it, negative for a signal."""
    if status >= 0:
        return ExecutorError(f"a worker ended with status {status} and no record", where, "see what it printed above")
    if was_out_of_memory:
        return ExecutorError(
            f"a worker was ended by the out-of-memory killer, at {peak_bytes / 1e9:.1f} GB",
            where,
            "EXECUTOR=in_process has one worker at a time; or use a machine with more memory. Finished work is kept",
        )
    name = next((known.name for known in signal.Signals if known == -status), f"signal {-status}")
    if -status == signal.SIGKILL:
        name += f", at {peak_bytes / 1e9:.1f} GB, though not by the system's out-of-memory killer"
        fix = "if a guard against running out of memory did it, use fewer workers; then run the same command again"
    elif -status == signal.SIGBUS:
        name += ": a base file could not be read (its disk failed, or it was cut short while it was read)"
        fix = "see the system's log (`dmesg`), restore the base's files, then run the same command again"
    else:
        fix = "run the same command again; if it dies again, EXECUTOR=in_process shows where"
    return ExecutorError(f"a worker was ended by {name}", where, fix)


def visible_gpus() -> list[str]:
    """The GPUs of this machine that we may use, as CUDA_VISIBLE_DEVICES names them; found without importing torch."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in chosen.split(",") if gpu]
    folder = Path("/proc/driver/nvidia/gpus")
    return [str(index) for index in range(len(list(folder.iterdir())))] if folder.is_dir() else []


def serve(descriptor: int, parent: int) -> None:
    """The worker's side: receive one call, do it, answer."""
    end_with_parent()
    if os.getppid() != parent:  # it was gone before we could ask to be told
        return
    os.set_inheritable(descriptor, False)
    with Connection(descriptor) as connection:
        outcome = perform(connection.recv())
        sys.stdout.flush()
        sys.stderr.flush()
        connection.send(outcome)


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
