"""Options of the test suite, and a small release of their own for the tests that need one."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from builder.licenses import Obligations, collect_obligations
from builder.manifest import load_manifest
from builder.stages import STAGES, Workspace, run_stage

TINY_LLAMA = Path(__file__).parents[1] / "releases" / "tiny-llama"

MANIFEST = """\
manifest: 1
title: Tiny Llama — NVFP4
repo: release-builder/tiny-llama-NVFP4
base:
  path: base
  licenses: [psf-2.0]
scheme:
  name: nvfp4
calibration:
  path: calibration.jsonl
  samples: 8
  tokens: [16, 64]
perplexity:
  path: heldout.txt
files:
  max_bytes: 2MiB
executor: in_process
device: cpu
shards: 2
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--refresh-goldens", action="store_true", help="write tests/golden/ anew instead of comparing")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the builder remembers between runs is the tests' own, not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def refresh_goldens(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--refresh-goldens"))


def hear_signals() -> None:
    """In a process that is about to start: signals are not ignored, though whoever runs the tests may ignore some."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def release_writer(folder: Path) -> Callable[..., Path]:
    """A function that writes `NAME.yaml` into a folder, with a copy of the repository's tiny Llama beside it.

    Changes are dotted keys with their new values, None for none at all: `**{"scheme.layout": "modelopt"}`.
    All releases of a folder share `base`, `calibration.jsonl` and `heldout.txt`, which the test may damage.
    """

    def write(name: str = "tiny", **changes: Any) -> Path:
        if not folder.exists():
            shutil.copytree(TINY_LLAMA / "base", folder / "base")
            for file in ("calibration.jsonl", "heldout.txt"):
                shutil.copy(TINY_LLAMA / file, folder / file)
        content: dict[str, Any] = yaml.safe_load(MANIFEST)
        for dotted, value in changes.items():
            *sections, key = dotted.split(".")
            section = content
            for part in sections:
                section = section.setdefault(part, {})
            section.pop(key, None)
            if value is not None:
                section[key] = value
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), "utf-8")
        return path

    return write


@pytest.fixture
def write_release(tmp_path: Path) -> Callable[..., Path]:
    """Writes releases into `releases/` below tmp_path; see `release_writer`."""
    return release_writer(tmp_path / "releases")


def build(manifest: Path, folder: Path, last: str = "assemble", without: Collection[str] = ()) -> Workspace:
    """Run the stages of a release up to `last`, in this process; `without` some that no later one reads."""
    workspace = Workspace(load_manifest(manifest), folder)
    for stage in STAGES:
        if stage.name not in without:
            run_stage(workspace, stage)
        if stage.name == last:
            return workspace
    raise AssertionError(last)


def obligations_of(folder: Path) -> Obligations:
    """Those of a base under the MIT licence."""
    (folder / "LICENSE").write_text(
        "MIT License\n\nPermission is hereby granted, free of charge, to any person obtaining a\n"
    )
    return collect_obligations(
        ("mit",),
        repo_name="someone/release",
        acknowledged=(),
        base_files={"LICENSE": folder / "LICENSE"},
        license_files={},
        where=lambda *keys: ".".join(keys),
    )


def each_number_of_threads() -> Iterator[int]:
    """One thread, then two, for torch and for compiled loops; afterwards as many as there were."""
    import numba
    import torch

    before = torch.get_num_threads(), numba.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
            yield threads
    finally:
        torch.set_num_threads(before[0])
        numba.set_num_threads(before[1])


def wait_until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    """Fails if the condition has not come to hold by then."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)
