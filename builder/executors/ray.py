"""Jobs as tasks of a Ray cluster: the one at an address, or a small one started on this machine for the purpose.

Every node is examined before it gets work: its software must be ours, and the base model be there. A node that does
not see the builder's folder works apart (see `apart`). When a worker or its node dies, the job is done again elsewhere;
Ray itself repeats nothing, for it knows neither what is at hand already nor which node to avoid.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from builder.errors import BuildError, ExecutorError, raise_all
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
from builder.executors.apart import Chunk, Errand, make_errand, perform_apart, receive_files
from builder.executors.nodes import (
    Crew,
    Demand,
    Node,
    check_feasible,
    describe_software,
    examine,
    find_objections,
    lay_probes,
    read_demand,
)
from builder.machine import end_with_parent

MAX_LOSSES = 3  # of one job
DIAL_TIMEOUT_S = 5
WAIT_TIMEOUT_S = 5
LOOK_EVERY_S = 10  # Ray ends this process a minute after the head is gone: we have to notice before
EXAMINE_TIMEOUT_S = 120
FETCH_TIMEOUT_S = 120
BUSY_AFTER_S = 60
CHUNKS_AHEAD = 4
OBJECT_STORE_BYTES = 100_000_000  # jobs and records are small
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HTTP2_SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # RFC 9113: byte 3 is the type of a frame
LOSSES = {
    ray.exceptions.GetTimeoutError: "what it made does not arrive",
    ray.exceptions.NodeDiedError: "the node is gone",
    ray.exceptions.ObjectLostError: "what it made is gone with its node",
    ray.exceptions.OutOfMemoryError: "Ray ended its worker, for the node was out of memory",
    ray.exceptions.TaskUnschedulableError: "the node is gone",
    ray.exceptions.WorkerCrashedError: "its worker was killed, or crashed",
}


class Ray:
    def __init__(self, num_workers: int, address: str | None = None) -> None:
        """address: "host:port" of the cluster's head, or "auto"; None starts a cluster on this machine."""
        self.num_workers, self.address = num_workers, address

    def run(self, work: Work, jobs: Sequence[Job]) -> Iterator[tuple[int, Record]]:
        return perform_all(plan_calls(work, jobs), self.num_workers, self.address)


def perform_all(calls: Sequence[Call], num_workers: int, address: str | None) -> Iterator[tuple[int, Record]]:
    if not calls:
        return
    jobs: list[Job] = [json.loads(call.job) for call in calls]
    tasks = [
        Task(index=index, call=call, job=job, demand=read_demand(job))
        for index, (call, job) in enumerate(zip(calls, jobs, strict=True))
    ]
    with connect(address, import_roots(calls[0])):
        nodes = list_nodes()
        for task in tasks:
            check_feasible(nodes, task.demand)
        if address is not None:
            nodes = examine_nodes(nodes, jobs)
        run = Run(tasks, nodes, num_workers)
        try:
            yield from run.finish()
        finally:
            run.stop()


@dataclasses.dataclass(kw_only=True)
class Task:
    """A job on its way. stream: what its worker sends; left: nodes that its worker was lost on."""

    index: int
    call: Call
    job: Job
    demand: Demand
    node: Node | None = None
    stream: Any = None
    inbox: Generator[None, Chunk, None] | None = None
    left: list[str] = dataclasses.field(default_factory=list)
    handed_out_s: float = 0.0
    has_begun: bool = False


class Run:
    """All jobs, from the first that is handed out to the last record."""

    def __init__(self, tasks: Sequence[Task], nodes: Sequence[Node], num_workers: int) -> None:
        self.num_jobs, self.num_workers = len(tasks), num_workers
        self.waiting = sorted(tasks, key=lambda task: -task.demand.weight)
        self.running: dict[Any, Task] = {}
        self.crew = Crew(nodes, [task.demand for task in self.waiting[:num_workers]])
        context = ray.get_runtime_context()
        self.own_node, self.head = context.get_node_id(), context.gcs_address
        self.looked_s = time.monotonic()

    def finish(self) -> Iterator[tuple[int, Record]]:
        while self.waiting or self.running:
            self.hand_out()
            ready, _ = ray.wait(list(self.running), timeout=WAIT_TIMEOUT_S)
            for stream in ready:
                task = self.running[stream]
                outcome = self.receive(task)
                if outcome is not None:
                    self.release(task)
                    yield task.index, record_of(outcome)
            if time.monotonic() - self.looked_s > LOOK_EVERY_S:
                self.look()
                self.looked_s = time.monotonic()

    def hand_out(self) -> None:
        """Start what has room, the largest first. A job waits for the node that would be done first, idle or not."""
        for task in list(self.waiting):
            node = self.crew.choose(task.demand, task.left)
            if len(self.running) < self.num_workers and self.crew.has_room(node, task.demand):
                self.waiting.remove(task)
                self.start(task, node)

    def start(self, task: Task, node: Node) -> None:
        share = self.crew.share_cpus(node)
        options: dict[str, Any] = {"num_cpus": share, "num_gpus": task.demand.num_gpus}
        if task.demand.memory_bytes:
            options["memory"] = task.demand.memory_bytes
        errand = make_errand(task.call, task.job) if task.job.get("folder") in node.unseen else None
        task.node, task.handed_out_s, task.has_begun = node, time.monotonic(), False
        task.stream = stream_work.options(scheduling_strategy=pin(node.id), **options).remote(
            errand or task.call, thread_limits(share)
        )
        if errand:
            task.inbox = receive_files(Path(task.job["folder"]))
            next(task.inbox)
        self.running[task.stream] = task
        self.crew.at_work[node.id].append(task.demand)

    def receive(self, task: Task) -> str | BuildError | None:
        """What a worker sent: its outcome, or None if it is not done yet, or was lost."""
        try:
            message = ray.get(next(task.stream), timeout=FETCH_TIMEOUT_S)
        except StopIteration:
            self.lose(task, "its worker ended without a record")
            return None
        except tuple(LOSSES) as error:
            self.lose(task, next(reason for kind, reason in LOSSES.items() if isinstance(error, kind)))
            return None
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            return ExecutorError(
                f"Ray could not run the job: {type(cause).__name__}: {first_line(cause)}",
                f"{task.call.where}, on node {task.node and task.node.name}",
                "see that every node has this builder and Ray, then run the same command again",
            )
        task.has_begun = True
        if isinstance(message, Chunk):
            assert task.inbox
            task.inbox.send(message)
        elif message is not None:
            outcome: str | BuildError = message
            if isinstance(outcome, BuildError) and task.inbox and outcome.where:
                outcome.where += f" (on node {task.node and task.node.name})"
            return outcome
        return None

    def release(self, task: Task) -> None:
        """Take a task off its node."""
        assert task.node
        del self.running[task.stream]
        self.crew.at_work[task.node.id].remove(task.demand)
        if task.inbox:
            task.inbox.close()
            task.inbox = None

    def lose(self, task: Task, reason: str) -> None:
        """Have a job done again whose worker is gone; ExecutorError after so many times, or if nobody is left."""
        self.release(task)
        ray.cancel(task.stream, force=True)
        self.check_head()
        lost = task.node
        assert lost
        task.left.append(lost.id)
        self.crew.keep(list_alive())
        if not self.crew.nodes:
            raise no_node_left()
        if len(task.left) > MAX_LOSSES:
            raise ExecutorError(
                f"its worker was lost {len(task.left)} times, last on {lost.name}: {reason}",
                task.call.where,
                "memory is the usual cause: use more shards or larger nodes, then run the same command again",
            )
        for unplaced in (task, *self.waiting):
            check_feasible(list(self.crew.nodes.values()), unplaced.demand)
        node = self.crew.choose(task.demand, task.left)
        when = "" if self.crew.has_room(node, task.demand) else ", when there is room"
        say(f"job {task.index + 1} of {self.num_jobs}: lost on {lost.name} ({reason}); done again on {node.name}{when}")
        self.waiting.insert(0, task)

    def look(self) -> None:
        """See what Ray does not tell: whether the head, this machine's Ray, and the nodes at work are still there."""
        self.check_head()
        alive = list_alive()
        if self.own_node not in alive:
            raise ExecutorError(
                "Ray on this machine is gone",
                socket.gethostname(),
                "start it again with `ray start`, then run the same command again: finished work is kept",
            )
        for task in list(self.running.values()):
            assert task.node
            if task.node.id not in alive:
                self.lose(task, "the node does not answer")
            elif not task.has_begun and time.monotonic() - task.handed_out_s > BUSY_AFTER_S:
                task.has_begun = True
                say(f"job {task.index + 1} of {self.num_jobs} waits for {task.node.name}, where others are at work")

    def check_head(self) -> None:
        """Raise ExecutorError if the head is gone: Ray's own calls would wait for it, then end this process."""
        for is_last in (False, True):
            try:
                dial(self.head)
                return
            except ExecutorError as error:
                if is_last:
                    fix = "start Ray there and on the nodes, then run the same command again: finished work is kept"
                    raise ExecutorError("the head of the Ray cluster is gone", self.head, fix) from error

    def stop(self) -> None:
        for task in list(self.running.values()):
            ray.cancel(task.stream, force=True)
            self.release(task)


@contextmanager
def connect(address: str | None, roots: str) -> Iterator[None]:
    """Be connected to the cluster inside the block.

    roots: where workers import from, besides their node's own PYTHONPATH.
    """
    options: dict[str, Any] = {"address": address}
    if address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options = {"address": "local", "num_cpus": num_cores(), "object_store_memory": OBJECT_STORE_BYTES}
        options["include_dashboard"] = False
    elif address != "auto":
        dial(address)
    environment = {"env_vars": {"PYTHONPATH": f"{roots}{os.pathsep}${{PYTHONPATH}}"}}  # Ray fills in the node's own
    # Ray prints a lost raylet's log on stdout, whatever log_to_driver says (ray/_private/worker.py)
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options, runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR)
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray and its C++ library have each put a handler of their own there
    except (Exception, SystemExit) as error:  # the kind depends on what went wrong, and on the version of Ray
        raise ExecutorError(
            f"no connection to Ray: {' '.join(str(error).split()) or type(error).__name__}",
            f"RAY_ADDRESS={address}" if address else "the Ray that was started on this machine",
            "mend it, or use another executor, such as EXECUTOR=processes",
        ) from error
    try:
        yield
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


def list_alive() -> set[str]:
    """The ids of the nodes that answer."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def no_node_left() -> ExecutorError:
    return ExecutorError(
        "the Ray cluster has no node left that can work",
        fix="start Ray on one with `ray start --address=HEAD`, then run the same command again: finished work is kept",
    )


def list_nodes() -> list[Node]:
    """Every node that can work, by name; an ExecutorError if there is none, since tasks would wait for ever."""
    entries = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    if not entries:
        raise no_node_left()
    names = Counter(name_node(entry) for entry in entries)
    nodes = [
        Node(
            id=entry["NodeID"],
            name=name_node(entry) + (f" [{entry['NodeID'][:6]}]" if names[name_node(entry)] > 1 else ""),
            num_cpus=int(entry["Resources"]["CPU"]),
            num_gpus=int(entry["Resources"].get("GPU", 0)),
            memory_bytes=int(entry["Resources"].get("memory", 0)),
        )
        for entry in entries
    ]
    return sorted(nodes, key=lambda node: node.name)


def name_node(entry: Mapping[str, Any]) -> str:
    """The name it was started with, or else its host and address."""
    name, address = entry["NodeName"], entry["NodeManagerAddress"]
    return str(name) if name != address else f"{entry['NodeManagerHostname']} ({address})"


def examine_nodes(nodes: Sequence[Node], jobs: Sequence[Job]) -> list[Node]:
    """The nodes, each with the folders it does not see. Raises what speaks against any of them, all together."""
    bases = {
        job["base"]: (job["base"], {} if job.get("revision") else job["base_files"]) for job in jobs if "base" in job
    }
    with lay_probes(jobs) as probes:
        questions = {
            examine_here.options(scheduling_strategy=pin(node.id)).remote(probes, list(bases.values())): node
            for node in nodes
        }
        ray.wait(list(questions), num_returns=len(questions), timeout=EXAMINE_TIMEOUT_S)
        objections: list[BuildError] = []
        examined, software = [], describe_software()
        for reference, node in questions.items():
            try:
                answer = ray.get(reference, timeout=0)
            except tuple(LOSSES):
                what, fix = "does not answer", f"see to Ray on {node.name}"
            except ray.exceptions.RayError as error:
                last_line = (
                    str(error).strip().splitlines()[-1]
                )  # after the worker's traceback, what it could not import
                what = f"cannot run this builder: {last_line}"
                fix = f"install the builder on {node.name} as it is here"
            else:
                objections += find_objections(node, answer, software)
                examined.append(dataclasses.replace(node, unseen=frozenset(answer["unseen"])))
                continue
            objections.append(
                ExecutorError(f"node {node.name} {what}", "the Ray cluster", f"{fix}, or take it out of the cluster")
            )
    raise_all(objections)
    return examined


def pin(node: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node, soft=False)


def work_here(what: Call | Errand, threads: dict[str, str]) -> Iterator[Chunk | str | BuildError | None]:
    """A worker's side: None when it begins, the files of an errand, the outcome."""
    end_with_parent()  # otherwise it would live on when its raylet is killed
    os.environ.update(threads)  # Ray had set 1; nothing that heeds it is imported yet
    yield None
    if isinstance(what, Errand):
        yield from perform_apart(what)
    else:
        yield perform(what)


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "no message")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


examine_here = ray.remote(num_cpus=0, max_retries=1)(examine)
stream_work = ray.remote(  # max_calls: a worker ends with its task, and torch's memory with it
    max_calls=1, max_retries=0, num_returns="streaming", _generator_backpressure_num_objects=CHUNKS_AHEAD
)(work_here)
