"""Kill a build at random moments, go on each time, and see that nothing but time is lost.

    .venv/bin/python tests/crash.py [KILLS [SEED [LAST STAGE]]]

Builds the repository's small model undisturbed, then again and again under SIGKILL: stage after stage, at a random
moment of each, under `processes` and `in_process` in turn, sometimes with all its workers and sometimes without. What
gets to its end is compared with the undisturbed build. Prints each kill, what it undid, and the most that one undid.

Builds are forked from this process, which has imported what they need; that is most of the time they would take.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # threads would not live on in what is forked

import yaml

from builder.files import read_json, read_receipt

ROOT = Path(__file__).parents[1]
NAME = "tiny-llama"
STAGES = ("plan", "fetch", "calibrate", "quantize", "assemble", "verify", "perplexity", "lock", "card")
LONG = {"calibrate": 3, "quantize": 3, "verify": 1}  # kills a round; the others get one
CHANGES = {"shards": 2, "serve": None}
FILES = {"max_bytes": "1200kB"}  # so that some files are written in place and some are spliced
SAMPLES = 16
HELD_OUT_CHARACTERS = 8000
SAVE_STATES_EVERY_S = 0.05
IMPORTS_S = 4.0  # a worker of `processes` has to import torch before it begins
BEGIN_S = 0.05  # from the command to the first stage
TIMEOUT_S = 600
READY = (
    "builder.graph",
    "builder.artifact",
    "builder.executors.in_process",
    "builder.executors.processes",
    "builder.fixes",
    "builder.kernels",
    "builder.perplexity",
    "builder.streaming",
    "builder.verify",
    "builder.worker",
    "compressed_tensors.compressors",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.tokenization_auto",
)


@dataclass(frozen=True)
class Kill:
    """stage: the first without a receipt. undone_s: since the last thing on disk, or since the build began.

    undone_layers: finished in memory and not yet on disk; None where the executor does not tell.
    """

    stage: str
    executor: str
    whole: bool
    undone_s: float
    undone_layers: int | None

    def __str__(self) -> str:
        layers = "" if self.undone_layers is None else f", {self.undone_layers} layers"
        who = "all its processes" if self.whole else "the parent alone"
        return f"{self.stage}, {self.executor}, {who}: {self.undone_s:.2f} s{layers} undone"


@dataclass
class Crashes:
    """What was done and seen."""

    project: Path
    last: str
    chance: random.Random
    kills: list[Kill] = field(default_factory=list)
    builds: int = 0
    expected: str = ""
    seconds: dict[tuple[str, str], float] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.project / "build" / NAME

    def build_undisturbed(self) -> None:
        """Note the payload's digest, and how long each stage takes."""
        began = time.monotonic()
        self.wait(self.start("in_process"))
        self.expected = self.read_digest()
        for stage in STAGES[: STAGES.index(self.last) + 1]:
            took = self.read_receipt(stage)["circumstances"]["seconds"]
            self.seconds[stage, "in_process"] = took
            self.seconds[stage, "processes"] = took + IMPORTS_S * (stage in ("calibrate", "quantize"))
        print(f"undisturbed: {time.monotonic() - began:.1f} s", flush=True)
        shutil.rmtree(self.project / "build")

    def run(self, num_kills: int) -> None:
        """Kill builds that many times; every one that gets to its end must have the undisturbed bytes."""
        while len(self.kills) < num_kills:
            for stage in self.plan_round(num_kills - len(self.kills)):
                executor = "in_process" if len(self.kills) % 2 else "processes"
                if kill := self.build_and_kill(stage, executor, whole=self.chance.random() < 0.5):
                    self.kills.append(kill)
                    print(f"{len(self.kills)} of {num_kills}: {kill}", flush=True)
            self.wait(self.start("in_process"))
            assert self.read_digest() == self.expected, "the bytes differ after a crash"
            leftovers = [
                path for path in self.folder.rglob("*") if path.name.endswith((".tmp", ".partial", ".journal"))
            ]
            assert not leftovers, leftovers
            self.builds += 1
            shutil.rmtree(self.project / "build")

    def plan_round(self, most: int) -> list[str]:
        """The stages at which one build is killed, in their order; `begin` is before the first of them."""
        stages = ["begin"]
        for stage in STAGES[: STAGES.index(self.last) + 1]:
            stages += [stage] * LONG.get(stage, 1)
        return sorted(self.chance.sample(stages, min(most, len(stages))), key=("begin", *STAGES).index)

    def build_and_kill(self, stage: str, executor: str, *, whole: bool) -> Kill | None:
        """Go on with a build and kill it at a random moment of a stage; None if it is past that stage."""
        if stage != "begin" and self.find_stage() not in STAGES[: STAGES.index(stage) + 1]:
            return None
        receipt = self.folder / "receipts" / f"{stage}.json"
        before, began = identify(receipt), time.time()
        process = self.start(executor)
        while stage != "begin" and identify(receipt) == before:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                self.check(status)
                return None  # the stage was done
            assert time.time() - began < TIMEOUT_S
            time.sleep(0.0005)
        time.sleep(self.chance.uniform(0, self.seconds.get((stage, executor), BEGIN_S)))
        for victim in list_session(process) if whole else [process]:
            os.kill(victim, signal.SIGKILL)
        killed = time.time()
        status = os.waitpid(process, 0)[1]
        if status != signal.SIGKILL:
            self.check(status)
            return None
        layers = self.count_undone_layers(began) if executor == "in_process" else None
        return Kill(self.find_stage(), executor, whole, max(0.0, killed - self.find_newest(began)), layers)

    def start(self, executor: str) -> int:
        """A build in a process and a session of its own, forked from this one."""
        process = os.fork()
        if process:
            return process
        code = 99
        try:
            os.setsid()
            os.chdir(self.project)
            os.environ["EXECUTOR"] = executor
            with Path("out.txt").open("ab") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
            from doit.doit_cmd import DoitMain

            code = DoitMain().run([f"release:{NAME}" if self.last == STAGES[-1] else f"{self.last}:{NAME}"]) or 0
        finally:
            os._exit(code)

    def wait(self, process: int) -> None:
        """Let a build come to its end."""
        self.check(os.waitpid(process, 0)[1])

    def check(self, status: int) -> None:
        """Refuse a build that failed."""
        assert status == 0, (os.waitstatus_to_exitcode(status), (self.project / "out.txt").read_text()[-2000:])

    def read_receipt(self, stage: str) -> dict[str, Any]:
        receipt = read_receipt(self.folder / "receipts" / f"{stage}.json")
        assert receipt, stage
        return receipt

    def read_digest(self) -> str:
        digest: str = self.read_receipt("assemble")["facts"]["payload_sha256"]
        return digest

    def find_stage(self) -> str:
        """The stage a build was in: the first without a receipt."""
        receipts = {path.stem: read_receipt(path) for path in (self.folder / "receipts").glob("*.json")}
        done = {stage for stage, receipt in receipts.items() if receipt and receipt["key"]}
        return next((stage for stage in STAGES if stage not in done), "finished")

    def find_newest(self, since: float) -> float:
        """When something durable last appeared in the build, in seconds since the epoch."""
        times = [since]
        for path in self.folder.rglob("*"):
            if path.name.endswith((".json", ".safetensors", ".journal")) and ".progress." not in path.name:
                try:
                    times.append(path.stat().st_mtime)
                except FileNotFoundError:  # a worker that was left renamed it
                    continue
        return max(times)

    def count_undone_layers(self, since: float) -> int:
        """Layers, or units, that workers of a run had behind them and the disk does not have."""
        stage, undone = self.find_stage(), 0
        for path in self.folder.glob("*/*.progress.json"):
            told = read_json(path)
            if told and told["title"].startswith(stage) and path.stat().st_mtime >= since:
                worker = int(told["title"].partition(" of ")[0].rpartition(" ")[2]) - 1
                kept = self.count_kept_layers(worker) if stage == "calibrate" else self.count_kept_units(worker)
                undone += told["done"] - kept
        return undone

    def count_kept_layers(self, block: int) -> int:
        """How many layers of a block of rows need not be run again."""
        folder = self.folder / "calibration"
        if read_receipt(folder / f"block-{block:05d}.json"):
            return int(self.read_receipt("plan")["facts"]["num_layers"])
        note = read_receipt(folder / f"block-{block:05d}.states.json")
        return note["layer"] if note else 0

    def count_kept_units(self, shard: int) -> int:
        """How many units of a shard need not be quantized again."""
        units = self.read_receipt("plan")["circumstances"]["shards"][shard]["units"]
        return len(self.list_durable_units().intersection(units))

    def list_durable_units(self) -> set[str]:
        """Units that are on disk in every file that they are part of."""
        parts, journals = self.folder / "parts", {}
        for path in parts.glob("*.journal"):
            journals[path.name.removesuffix(".partial.journal")] = (read_receipt(path) or {"units": []})["units"]
        lacking, units = set(), set()
        for file in self.read_receipt("plan")["facts"]["files"]:
            for unit in file["units"]:
                units.add(unit)
                pieces = (parts / f"{file['name']}.record.json", parts / "units" / f"{unit}.safetensors.record.json")
                if unit not in journals.get(file["name"], ()) and not any(piece.exists() for piece in pieces):
                    lacking.add(unit)
        return units - lacking


def identify(path: Path) -> tuple[int, int] | None:
    """What changes when a file is written anew; None if there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def list_session(session: int) -> list[int]:
    """The processes of a session that have not ended, its first one before the others."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[3]) == session and fields[0] not in "ZX":
            found.append(int(stat.parent.name))
    return sorted(found, key=lambda process: process != session)


def prepare(project: Path) -> None:
    """A folder with the project's configuration and one release of the small model."""
    shutil.copy(ROOT / "pyproject.toml", project)
    shutil.copytree(ROOT / "releases" / NAME, project / "releases" / NAME)
    held_out = project / "releases" / NAME / "heldout.txt"
    held_out.write_text(held_out.read_text("utf-8")[:HELD_OUT_CHARACTERS], "utf-8")
    manifest = yaml.safe_load((ROOT / "releases" / f"{NAME}.yaml").read_text("utf-8"))
    manifest = {key: value for key, value in {**manifest, **CHANGES}.items() if value is not None}
    manifest["files"] = FILES
    manifest["calibration"]["samples"] = SAMPLES
    (project / "releases" / f"{NAME}.yaml").write_text(yaml.safe_dump(manifest, allow_unicode=True), "utf-8")


def get_ready() -> None:
    """Import what builds need; let them save their states and tell of their progress more often than usual."""
    import importlib

    for name in READY:
        importlib.import_module(name)
    import builder.progress
    import builder.stages.calibrate

    builder.progress.WRITE_EVERY_S = 0.0
    builder.stages.calibrate.SAVE_STATES_EVERY_S = SAVE_STATES_EVERY_S
    threads = len(list(Path("/proc/self/task").iterdir()))
    assert threads == 1, f"{threads} threads: a process with threads cannot be forked"


def summarize(crashes: Crashes) -> str:
    kills = crashes.kills
    stages, longest = Counter(kill.stage for kill in kills), max(kills, key=lambda kill: kill.undone_s)
    layers = max((kill.undone_layers for kill in kills if kill.undone_layers is not None), default=math.nan)
    executors, whole = Counter(kill.executor for kill in kills), sum(kill.whole for kill in kills)
    return "\n".join(
        (
            f"{len(kills)} kills, {crashes.builds} builds finished, every one with the same bytes",
            "by stage: " + ", ".join(f"{stage} {stages[stage]}" for stage in (*STAGES, "finished") if stages[stage]),
            "by executor: " + ", ".join(f"{name} {count}" for name, count in sorted(executors.items())),
            f"with all processes {whole}, the parent alone {len(kills) - whole}",
            f"the most work that one kill undid: {longest.undone_s:.1f} s ({longest.stage}), {layers} layers",
        )
    )


def main(arguments: Sequence[str]) -> None:
    num_kills, seed, last = [*map(int, arguments[:2]), *(50, 0)[len(arguments[:2]) :], (*arguments[2:], STAGES[-1])[0]]
    began = time.monotonic()
    get_ready()
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        crashes = Crashes(Path(name), last, random.Random(seed))
        crashes.build_undisturbed()
        crashes.run(num_kills)
    print(summarize(crashes))
    print(f"in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
