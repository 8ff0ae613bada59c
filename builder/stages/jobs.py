"""Jobs of a build: what they all say, the device they use, the executor that runs them."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from builder.errors import BuildError
from builder.manifest import Manifest
from builder.stages.workspace import Workspace


def name_executor(workspace: Workspace) -> str:
    """The executor: the environment variable EXECUTOR, or the manifest's."""
    return os.environ.get("EXECUTOR") or workspace.manifest.release.executor


def common_job(workspace: Workspace, folder: Path) -> dict[str, Any]:
    """What every job of a build says: base, scheme, device."""
    files = workspace.facts("fetch")["files"]
    return {
        "base": str(folder),
        "base_files": {name: entry["num_bytes"] for name, entry in files.items()},
        "scheme": workspace.manifest.release.scheme[0].model_dump(mode="json"),
        "device": choose_device(workspace.manifest),
    }


def choose_device(manifest: Manifest) -> str:
    """cpu or cuda. Raises BuildError if a GPU is asked for and there is none."""
    import torch

    wanted = manifest.release.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise BuildError("there is no GPU here that torch can use", manifest.where("device"), "set device: auto or cpu")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def run_jobs(workspace: Workspace, work: str, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run jobs under the release's executor; records in the order of the jobs."""
    from builder.executors import make_executor

    executor = make_executor(name_executor(workspace), num_workers=min(len(jobs), os.cpu_count() or 1))
    module, _, name = work.partition(":")
    function = getattr(importlib.import_module(module), name)
    records: dict[int, dict[str, Any]] = dict(executor.run(function, jobs))
    return [records[index] for index in range(len(jobs))]


def describe_jobs(workspace: Workspace, records: list[dict[str, Any]]) -> dict[str, Any]:
    """What the card may tell of a stage's workers."""
    jobs = [{name: value for name, value in r.items() if isinstance(value, int | float)} for r in records]
    return {
        "executor": name_executor(workspace),
        "jobs": jobs,
        "peak_bytes": max(record["peak_bytes"] for record in records),
    }
