"""Jobs as tasks of a Ray cluster: the one at an address, or a small one started on this machine for the purpose.

The work must be idempotent: Ray starts a task again when its worker or node dies. Every node needs this builder, and
shared storage for the paths that the jobs name.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray

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

MAX_RETRIES = 3
DIAL_TIMEOUT_S = 5
POLL_TIMEOUT_S = 30
FETCH_TIMEOUT_S = 120
OBJECT_STORE_BYTES = 100_000_000  # jobs and records are small
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HTTP2_SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # RFC 9113: byte 3 is the type of a frame


class Ray:
    def __init__(self, num_workers: int, address: str | None = None) -> None:
        """address: "host:port" of the cluster's head, or "auto"; None starts a cluster on this machine."""
        self.num_workers, self.address = num_workers, address

    def run(self, work: Work, jobs: Sequence[Job]) -> Iterator[tuple[int, Record]]:
        calls = plan_calls(work, jobs)
        return perform_all(calls, min(self.num_workers, len(calls)), self.address)


def perform_all(calls: Sequence[Call], num_workers: int, address: str | None) -> Iterator[tuple[int, Record]]:
    if not calls:
        return
    waiting = deque(enumerate(calls))
    running: dict[Any, tuple[int, Call]] = {}
    with connect(address, num_workers, import_roots(calls[0])) as is_ours:
        task, threads = make_task(num_workers, is_ours)
        try:
            while waiting or running:
                while waiting and len(running) < num_workers:
                    index, call = waiting.popleft()
                    running[task.remote(call, threads)] = (index, call)
                ready, _ = ray.wait(list(running), timeout=POLL_TIMEOUT_S)
                if not ready:
                    alive_nodes()
                for reference in ready:
                    index, call = running[reference]
                    outcome = fetch(reference, call)
                    del running[reference]
                    yield index, record_of(outcome)
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


@contextmanager
def connect(address: str | None, num_workers: int, roots: str) -> Iterator[bool]:
    """Be connected to the cluster inside the block; gives whether it is one of our own, started here.

    roots: where workers import from, besides their node's own PYTHONPATH.
    """
    options: dict[str, Any] = {"address": address}
    if address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options = {"address": "local", "num_cpus": num_workers, "object_store_memory": OBJECT_STORE_BYTES}
        options["include_dashboard"] = False
    elif address != "auto":
        dial(address)
    environment = {"env_vars": {"PYTHONPATH": f"{roots}{os.pathsep}${{PYTHONPATH}}"}}  # Ray fills in the node's own
    try:
        ray.init(**options, runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR)
    except (Exception, SystemExit) as error:  # the kind depends on what went wrong, and on the version of Ray
        raise ExecutorError(
            f"no connection to Ray: {next(iter(str(error).splitlines()), type(error).__name__)}",
            f"RAY_ADDRESS={address}" if address else "the Ray that was started on this machine",
            "mend it, or use another executor, such as EXECUTOR=processes",
        ) from error
    try:
        yield address is None
    finally:
        ray.shutdown()


def dial(address: str) -> None:
    """Raise ExecutorError unless a gRPC server answers: ray.init would try for minutes, loudly."""
    host, _, port = address.rpartition(":")
    where = f"RAY_ADDRESS={address}"
    if not host or not port.isdigit():
        raise ExecutorError("not an address of a Ray cluster", where, "use HOST:PORT of its head, such as spark-1:6379")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=DIAL_TIMEOUT_S) as connection:
            if "RAY_USE_TLS" in os.environ:
                return
            connection.sendall(HTTP2_PREFACE + HTTP2_SETTINGS)
            answer = connection.recv(len(HTTP2_SETTINGS))
    except (OSError, OverflowError) as error:
        fix = "start Ray there with `ray start --head`, or unset RAY_ADDRESS to use this machine alone"
        raise ExecutorError(f"no answer from the Ray cluster: {error}", where, fix) from error
    if answer[3:4] != HTTP2_SETTINGS[3:4]:
        raise ExecutorError(
            "what answers is not the head of a Ray cluster", where, "use the port that `ray start` prints"
        )


def make_task(num_workers: int, is_ours: bool) -> tuple[Any, dict[str, str]]:
    """A Ray task that does a call, and the limits on its threads: every worker gets an equal share of its node.

    Where every node has a GPU, each task has one to itself. A worker ends with its task, and torch's memory with it.
    """
    nodes = alive_nodes()
    if is_ours:
        num_cpus, num_threads = 1, num_cores() // num_workers
    else:
        num_cpus = num_threads = max(1, int(min(node["CPU"] for node in nodes)) // -(-num_workers // len(nodes)))
    num_gpus = int(all(node.get("GPU", 0) >= 1 for node in nodes))
    task = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_calls=1, max_retries=MAX_RETRIES)(perform_bounded)
    return task.options(scheduling_strategy="SPREAD"), thread_limits(num_threads)


def perform_bounded(call: Call, threads: dict[str, str]) -> str | BuildError:
    os.environ.update(threads)  # Ray had set 1; nothing that heeds it is imported yet
    return perform(call)


def alive_nodes() -> list[dict[str, float]]:
    """The resources of every node that can work; an ExecutorError if there is none, since tasks would wait for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    if not nodes:
        raise ExecutorError("the Ray cluster has no node left that can work", fix="see `ray status`, and start nodes")
    return nodes


def fetch(reference: Any, call: Call) -> str | BuildError:
    """The outcome of a task that has ended; an ExecutorError if Ray lost it."""
    try:
        outcome: str | BuildError = ray.get(reference, timeout=FETCH_TIMEOUT_S)
        return outcome
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        return ExecutorError(
            f"Ray could not run the job: {type(cause).__name__}: {next(iter(str(cause).splitlines()), 'no message')}",
            call.where,
            "if workers died, memory is the usual cause: use fewer; else see that every node has this builder and Ray",
        )
