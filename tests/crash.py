"""Kill a build at random moments, go on each time, and see that nothing but time is lost.

    .venv/bin/python tests/crash.py [KILLS [SEED]]

Builds the repository's small model undisturbed, then again and again under SIGKILL, and compares the payloads. Prints
how many kills fell into each stage, and the longest stretch of work that a kill undid.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from builder.files import read_receipt

ROOT = Path(__file__).parents[1]
STAGES = ("plan", "fetch", "calibrate", "quantize", "assemble", "verify", "perplexity", "lock", "card")
CHANGES = {"perplexity": None, "executor": "processes", "shards": 2, "serve": None}
FILES = {"max_bytes": "1200kB"}  # so that some files are written in place and some are spliced
SAMPLES = 16


@dataclass
class Losses:
    """What kills did: how many fell into each stage, and the most seconds of work that one undid."""

    kills: Counter[str] = field(default_factory=Counter)
    builds: int = 0
    longest_s: float = 0.0


def prepare(project: Path) -> None:
    """A folder with the project's configuration and one release of the small model."""
    shutil.copy(ROOT / "pyproject.toml", project)
    shutil.copytree(ROOT / "releases" / "tiny-llama", project / "releases" / "tiny-llama")
    manifest = yaml.safe_load((ROOT / "releases" / "tiny-llama.yaml").read_text("utf-8"))
    manifest = {key: value for key, value in {**manifest, **CHANGES}.items() if value is not None}
    manifest["files"] = FILES
    manifest["calibration"]["samples"] = SAMPLES
    (project / "releases" / "tiny-llama.yaml").write_text(yaml.safe_dump(manifest, allow_unicode=True), "utf-8")


def start(project: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "doit", "release:tiny-llama"]
    return subprocess.Popen(command, cwd=project, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def build_undisturbed(project: Path, env: Mapping[str, str]) -> tuple[str, float]:
    """Payload digest and seconds of a build that is left alone."""
    started = time.monotonic()
    process = start(project, env)
    _, err = process.communicate()
    assert process.returncode == 0, err.decode()
    digest = read_digest(project)
    seconds = time.monotonic() - started
    shutil.rmtree(project / "build")
    return digest, seconds


def read_digest(project: Path) -> str:
    receipt = project / "build" / "tiny-llama" / "receipts" / "assemble.json"
    digest: str = json.loads(receipt.read_text())["facts"]["payload_sha256"]
    return digest


def newest(folder: Path, since: float) -> float:
    """When something durable last appeared in a build, in seconds since the epoch."""
    kept = ("*.json", "*.safetensors", "*.journal")
    times = [since]
    for pattern in kept:
        for path in folder.rglob(pattern):
            try:
                times.append(path.stat().st_mtime)
            except FileNotFoundError:  # renamed or dropped while we looked
                continue
    return max(times)


def stage_of(folder: Path) -> str:
    """The stage a build was in: the first without a receipt."""
    receipts = {path.stem: read_receipt(path) for path in (folder / "receipts").glob("*.json")}
    done = {stage for stage, receipt in receipts.items() if receipt and receipt["key"]}
    return next((stage for stage in STAGES if stage not in done), "finished")


def crash(project: Path, kills: int, seed: int, env: Mapping[str, str]) -> Losses:
    """Kill builds `kills` times at random moments; every build that gets to its end must have the undisturbed bytes."""
    expected, seconds = build_undisturbed(project, env)
    chance, losses, folder = random.Random(seed), Losses(), project / "build" / "tiny-llama"
    while losses.kills.total() < kills:
        began = time.time()
        process = start(project, env)
        try:
            process.wait(chance.uniform(0.3, seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            losses.longest_s = max(losses.longest_s, time.time() - newest(folder, began))
            losses.kills[stage_of(folder)] += 1
        _, err = process.communicate()
        if process.returncode == -signal.SIGKILL:
            continue
        assert process.returncode == 0, err.decode()
        assert read_digest(project) == expected, "the bytes differ after a crash"
        losses.builds += 1
        shutil.rmtree(project / "build")
    process = start(project, env)
    _, err = process.communicate()
    assert process.returncode == 0, err.decode()
    assert read_digest(project) == expected, "the bytes differ after a crash"
    leftovers = [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".partial", ".journal"))]
    assert not leftovers, leftovers
    losses.builds += 1
    return losses


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as name:
        project = Path(name)
        prepare(project)
        losses = crash(project, kills, seed, env)
    print(f"{losses.kills.total()} kills, {losses.builds} builds finished, every one with the same bytes")
    print("by stage: " + ", ".join(f"{stage} {losses.kills[stage]}" for stage in (*STAGES, "finished")))
    print(f"the most work that one kill undid took {losses.longest_s:.1f} s")


if __name__ == "__main__":
    main()
