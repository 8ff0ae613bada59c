"""Jobs of a build: what they all say, the device they use, the executor that runs them."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from builder.errors import BuildError
from builder.manifest import Manifest
from builder.progress import watch
from builder.stages.workspace import Workspace

NVIDIA = Path("/dev/nvidiactl")  # there where a driver is


def name_executor(workspace: Workspace) -> str:
    """The executor: the environment variable EXECUTOR, or the manifest's."""
    return os.environ.get("EXECUTOR") or workspace.manifest.release.executor


def common_job(workspace: Workspace, folder: Path) -> dict[str, Any]:
    """What every job of a build says: base (and where a machine apart may get it), scheme, device."""
    files, base = workspace.facts("fetch")["files"], workspace.manifest.release.base
    return {
        "base": str(folder),
        "base_files": {name: entry["num_bytes"] for name, entry in files.items()},
        "base_digests": {name: entry["sha256"] for name, entry in files.items()},
        "model": base.model,
        "revision": None if base.path else base.revision,
        "scheme": [spec.model_dump(mode="json") for spec in workspace.manifest.release.scheme],
        "device": choose_device(workspace.manifest),
    }


def choose_device(manifest: Manifest) -> str:
    """cpu or cuda. Raises BuildError if a GPU is asked for and there is none."""
    wanted = manifest.release.device
    if wanted == "cpu" or (wanted == "auto" and not NVIDIA.exists()):
        return "cpu"  # without torch, which takes a second to load
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise BuildError("there is no GPU here that torch can use", manifest.where("device"), "set device: auto or cpu")
    return "cuda" if torch.cuda.is_available() else "cpu"


def run_jobs(workspace: Workspace, work: str, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run jobs under the release's executor; records in the order of the jobs."""
    from builder.executors import make_executor

    kind = name_executor(workspace)
    most = len(jobs) if kind == "ray" else count_slots(jobs[0]["device"])  # a cluster has more than is here
    executor = make_executor(kind, num_workers=min(len(jobs), most))
    module, _, name = work.partition(":")
    function = getattr(importlib.import_module(module), name)
    with watch(Path(jobs[0]["folder"])):
        records: dict[int, dict[str, Any]] = dict(executor.run(function, jobs))
    return [records[index] for index in range(len(jobs))]


def count_slots(device: str) -> int:
    """How many jobs this machine does at once: one for each GPU where they use one, else one for each core."""
    if device == "cuda":
        import torch

        return max(1, torch.cuda.device_count())
    return os.cpu_count() or 1


def describe_jobs(workspace: Workspace, records: list[dict[str, Any]]) -> dict[str, Any]:
    """What the card may tell of a stage's workers."""
    jobs = [{name: value for name, value in r.items() if isinstance(value, int | float)} for r in records]
    return {
        "executor": name_executor(workspace),
        "jobs": jobs,
        "peak_bytes": max(record["peak_bytes"] for record in records),
    }
