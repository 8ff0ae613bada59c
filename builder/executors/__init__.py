"""Where jobs run: one method, `run(work, jobs)`, and the table of executors that have it.

A call of the work travels as text: its function as "module:function", its job and its record as JSON. So whatever
runs here also runs in another process or on another machine, and sees the same values there.
"""

from __future__ import annotations

import importlib
import json
import operator
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from builder.errors import BuildError, ExecutorError, nearest

Job = dict[str, Any]
Record = dict[str, Any]
Work = Callable[[Job], Record]


class Executor(Protocol):
    def run(self, work: Work, jobs: Sequence[Job]) -> Iterator[tuple[int, Record]]:
        """Do `work(job)` for every job; yield (position of the job in `jobs`, its record) as they finish, in any order.

        work: a function that can be imported by name; it may be started more than once with the same job.
        jobs, records: JSON-able; they arrive as JSON gives them back (a tuple becomes a list). Where a job runs on a
        cluster, its keys weight, memory_bytes and device say what it needs of a node; folder and key what it leaves,
        base and base_files what it has to find there.
        Raises the work's own BuildError as it is, and ExecutorError for any other failure. After the first failure, and
        when the iterator is closed, no further job starts and those that run are stopped.
        """


def make_executor(name: str, *, num_workers: int) -> Executor:
    """The executor of that name; it runs at most `num_workers` jobs at once.

    `ray` uses the cluster at the environment variable RAY_ADDRESS, or else one that it starts on this machine.
    Raises ExecutorError if there is no such executor.
    """
    if name not in EXECUTORS:
        raise ExecutorError(f"unknown executor {name!r}", fix=nearest(name, EXECUTORS))
    if num_workers < 1:
        raise ExecutorError(f"{num_workers} workers cannot do anything", fix="use 1 or more")
    return EXECUTORS[name](num_workers)


def load_in_process(num_workers: int) -> Executor:
    from builder.executors.in_process import InProcess

    return InProcess()


def load_processes(num_workers: int) -> Executor:
    from builder.executors.processes import Processes

    return Processes(num_workers)


def load_ray(num_workers: int) -> Executor:
    from builder.executors.ray import Ray

    return Ray(num_workers, os.environ.get("RAY_ADDRESS"))


EXECUTORS: dict[str, Callable[[int], Executor]] = {
    "in_process": load_in_process,
    "processes": load_processes,
    "ray": load_ray,
}


@dataclass(frozen=True, kw_only=True)
class Call:
    """One job, ready to travel. work: "module:function"; job: JSON; where: the job in words, for errors."""

    work: str
    job: str
    where: str


def plan_calls(work: Work, jobs: Sequence[Job]) -> list[Call]:
    """One call for each job; raises ExecutorError if work or a job cannot travel."""
    name = f"{work.__module__}:{work.__qualname__}"
    if work.__module__ == "__main__" or "<" in work.__qualname__:
        raise ExecutorError(f"{name} cannot be imported by a worker", fix="define the work as a function of a module")
    calls = []
    for number, job in enumerate(jobs, 1):
        where = f"job {number} of {len(jobs)}, {name}"
        text = as_json(job, f"the job of {name}", where)
        calls.append(Call(work=name, job=text, where=f"{where}: {text if len(text) <= 120 else text[:120] + '…'}"))
    return calls


def perform(call: Call) -> str | BuildError:
    """Do one call, wherever we are: its record as JSON, or the error that `run` has to raise. Never raises itself."""
    module, _, function = call.work.partition(":")
    try:
        work: Work = operator.attrgetter(function)(importlib.import_module(module))
        return as_json(work(json.loads(call.job)), f"the record of {call.work}", call.where)
    except BuildError as error:
        return error
    except (Exception, SystemExit) as error:
        first_line = next(iter(str(error).splitlines()), "no message")
        failure = ExecutorError(
            f"{type(error).__name__}: {first_line}",
            call.where,
            "mend what the message names, then run the same command again; if it names nothing, report the traceback",
        )
        failure.__cause__ = error
        failure.add_note(traceback.format_exc())  # a cause does not survive the way back from another process
        return failure


def record_of(outcome: str | BuildError) -> Record:
    """What `perform` gave: the record, or its error raised."""
    if isinstance(outcome, BuildError):
        raise outcome
    record: Record = json.loads(outcome)
    return record


def as_json(value: Any, what: str, where: str) -> str:
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ExecutorError(
            f"{what} is not JSON: {error}", where, "pass numbers, text, lists and dicts only"
        ) from error


def import_roots(call: Call) -> str:
    """The folders, as PYTHONPATH has them, from which a fresh interpreter can import the builder and the work."""
    specs = [sys.modules[name].__spec__ for name in ("builder", call.work.partition(":")[0].partition(".")[0])]
    places = [place for spec in specs if spec for place in spec.submodule_search_locations or [spec.origin or "."]]
    return os.pathsep.join(dict.fromkeys(str(Path(place).absolute().parent) for place in places))


def thread_limits(num_threads: int) -> dict[str, str]:
    """Environment variables that keep workers side by side off each other's cores, unless the user chose otherwise.

    They hold only if set before torch or numba is imported.
    """
    names = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")
    return {name: os.environ.get(name, str(max(1, num_threads))) for name in names}


def num_cores() -> int:
    """The CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
