"""The nodes of a cluster: what each has, whether it may take part, and which job goes where."""

from __future__ import annotations

import os
import platform
import secrets
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import builder
from builder.base import find_difference
from builder.errors import BaseError, BuildError, ExecutorError
from builder.executors import Job
from builder.files import digest, sha256_file, write_atomic

PACKAGES = ("nvidia-modelopt", "numba", "numpy", "torch", "transformers")


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine of the cluster that can work. unseen: folders of the builder's machine that it does not share."""

    id: str
    name: str
    num_cpus: int
    num_gpus: int
    memory_bytes: int
    unseen: frozenset[str] = frozenset()

    def __str__(self) -> str:
        cpus, gpus = (
            f"{n or 'no'} {name}{'s' * (n != 1)}" for n, name in ((self.num_cpus, "CPU"), (self.num_gpus, "GPU"))
        )
        return f"{self.name} ({cpus}, {self.memory_bytes / 1e9:.1f} GB, {gpus})"


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What a job asks of its node. weight: its size, relative to that of other jobs."""

    weight: float
    memory_bytes: int
    num_gpus: int

    def fits(self, node: Node) -> bool:
        return self.memory_bytes <= node.memory_bytes and self.num_gpus <= node.num_gpus


def read_demand(job: Job) -> Demand:
    """A job may say weight, memory_bytes and device; without them it is one of many, and fits everywhere."""
    gpus = int(job.get("device") == "cuda")
    return Demand(weight=job.get("weight", 1), memory_bytes=job.get("memory_bytes", 0), num_gpus=gpus)


def check_feasible(nodes: Sequence[Node], demand: Demand) -> None:
    """Raise ExecutorError if no node has what a job asks for: it would wait for ever."""
    if any(demand.fits(node) for node in nodes):
        return
    memory = f"{demand.memory_bytes / 1e9:.1f} GB of memory for a job"
    if demand.num_gpus and not any(node.num_gpus for node in nodes):
        wants, fix = "a GPU", "start Ray on a machine with a GPU, or set device: cpu"
    else:
        wants = f"a GPU and {memory}" if demand.num_gpus else memory
        fix = "start Ray on a larger machine, or make the jobs smaller with more shards"
    raise ExecutorError(f"no node has {wants}", f"the Ray cluster of {', '.join(map(str, nodes))}", fix)


class Crew:
    """Which node takes which job: the one that would be done first, if time is weight over CPUs (or GPUs).

    A node takes as many jobs at once as a first round of jobs gives it, and shares its CPUs among so many.
    """

    def __init__(self, nodes: Sequence[Node], first_round: Sequence[Demand]) -> None:
        self.nodes = {node.id: node for node in nodes}
        self.seats = {node.id: node.num_cpus for node in nodes}
        self.at_work: dict[str, list[Demand]] = {node.id: [] for node in nodes}
        for demand in first_round:
            roomy = [node for node in nodes if demand.fits(node) and self.has_room(node, demand)]
            if roomy:
                self.at_work[self.choose_quickest(roomy, demand).id].append(demand)
        self.seats = {node: max(1, len(demands)) for node, demands in self.at_work.items()}
        self.at_work = {node: [] for node in self.nodes}

    def choose(self, demand: Demand, shunned: Collection[str]) -> Node:
        """The best node for a job, though it may have no room yet; one of the shunned only if nothing else fits."""
        fitting = [node for node in self.nodes.values() if demand.fits(node)]
        return self.choose_quickest([node for node in fitting if node.id not in shunned] or fitting, demand)

    def choose_quickest(self, nodes: Sequence[Node], demand: Demand) -> Node:
        def finish(node: Node) -> tuple[float, float]:
            load = sum(other.weight for other in self.at_work[node.id])
            return (load + demand.weight) / (node.num_gpus if demand.num_gpus else node.num_cpus), load

        return min(nodes, key=finish)

    def has_room(self, node: Node, demand: Demand) -> bool:
        demands = [*self.at_work[node.id], demand]
        return (
            len(demands) <= self.seats[node.id]
            and sum(one.memory_bytes for one in demands) <= node.memory_bytes
            and sum(one.num_gpus for one in demands) <= node.num_gpus
        )

    def share_cpus(self, node: Node) -> int:
        """The CPUs that each job of a node has to itself."""
        return max(1, node.num_cpus // self.seats[node.id])

    def keep(self, alive: Collection[str]) -> None:
        """Go on with the nodes that are left."""
        self.nodes = {id: node for id, node in self.nodes.items() if id in alive}


def describe_software() -> dict[str, str]:
    """What has to be the same wherever work is done: versions, and a digest of the builder's own source files."""
    package = Path(builder.__file__).parent
    sources = {path.relative_to(package).as_posix(): sha256_file(path) for path in package.rglob("*.py")}
    found = {"python": platform.python_version(), "builder": digest(sources)[:12]}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


@contextmanager
def lay_probes(jobs: Sequence[Job]) -> Iterator[dict[str, str]]:
    """A file in each folder that jobs work in, while the block runs; {folder: the file's name}."""
    probes = {
        folder: f".probe-{secrets.token_hex(8)}.tmp"
        for folder in sorted({job["folder"] for job in jobs if "folder" in job})
    }
    try:
        for folder, name in probes.items():
            write_atomic(Path(folder, name), name)
        yield probes
    finally:
        for folder, name in probes.items():
            Path(folder, name).unlink(missing_ok=True)


def examine(probes: Mapping[str, str], bases: Sequence[tuple[str, Mapping[str, int]]]) -> dict[str, Any]:
    """What a node says of itself, found on the node.

    bases: folders of base models, with the sizes of their files.
    Returns {host, software, unseen [folders it does not share], differences {base: how it differs here}}.
    """
    differences = {folder: find_difference(Path(folder), sizes) for folder, sizes in bases}
    return {
        "host": socket.gethostname(),
        "software": describe_software(),
        "unseen": [folder for folder, name in probes.items() if not shares(Path(folder), name)],
        "differences": {folder: difference for folder, difference in differences.items() if difference},
    }


def shares(folder: Path, probe: str) -> bool:
    return (folder / probe).is_file() and os.access(folder, os.W_OK)


def find_objections(node: Node, answer: Mapping[str, Any], software: Mapping[str, str]) -> Iterator[BuildError]:
    """Why a node may not take part, if so. software: what is here."""
    theirs = answer["software"]
    different = [f"{name} {theirs[name]} (here {ours})" for name, ours in software.items() if theirs[name] != ours]
    if different:
        yield ExecutorError(
            f"node {node.name} has {', '.join(different)}",
            "the Ray cluster",
            f"install the same on {node.name}, or take it out of the cluster",
        )
    for folder, difference in answer["differences"].items():
        yield BaseError(
            f"{difference} on node {node.name}",
            folder,
            "copy the base model to that place there, or keep it on storage that every node sees",
        )
