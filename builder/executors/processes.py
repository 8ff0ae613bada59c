"""Jobs in processes of this machine: a fresh interpreter for each job, so that its memory is gone when it is done.

Fresh, because torch's threads do not survive a fork; and a plain subprocess, because the limits on threads must be in
the environment before anything is imported. A worker is its own process group, so Ctrl-C reaches only the parent,
which then kills the workers. They need no gentler end: unfinished work leaves no trace that matters.
"""

from __future__ import annotations

import ctypes
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

PR_SET_PDEATHSIG = 1  # linux/prctl.h


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

    def stop(self) -> int:
        """Kill it with all it started; returns its exit status, negative for a signal."""
        if self.process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.connection.close()
        return self.process.wait()


def perform_all(calls: Sequence[Call], num_workers: int) -> Iterator[tuple[int, Record]]:
    waiting = deque(enumerate(calls))
    slots = list(range(num_workers))
    running: list[Worker] = []
    try:
        while waiting or running:
            while waiting and slots:
                running.append(start(*waiting.popleft(), slots.pop(0), num_workers))
            ready = wait([worker.connection for worker in running])
            for worker in [worker for worker in running if worker.connection in ready]:
                outcome = receive(worker)
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


def receive(worker: Worker) -> str | BuildError:
    """The answer of a worker, or an ExecutorError if it died instead; either way its process is gone afterwards."""
    try:
        outcome: str | BuildError = worker.connection.recv()
        worker.stop()
    except (EOFError, OSError):
        outcome = explain_death(worker.stop(), worker.call.where)
    return outcome


def explain_death(status: int, where: str) -> ExecutorError:
    """status: as subprocess gives it, negative for a signal."""
    if status >= 0:
        return ExecutorError(f"a worker ended with status {status} and no record", where, "see what it printed above")
    name = next((known.name for known in signal.Signals if known == -status), f"signal {-status}")
    if -status == signal.SIGKILL:
        fix = "the system's out-of-memory killer is the usual cause: use fewer workers, then run the same command again"
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
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
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
