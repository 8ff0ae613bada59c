"""What one machine does in the drill, and how it is told: as JSON, with every number to its last bit.

What of the builder is called stands in the first functions, which is where a change of it is followed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import family_models
import torch

from builder.arithmetic import exact
from builder.base import open_checkpoint
from builder.calibration import choose_rows
from builder.families import describe_architecture
from builder.manifest import load_manifest
from builder.perplexity import LONGEST_WINDOW, measure_perplexity, open_base, split_text
from builder.schemes import bind_scheme
from builder.stages import STAGES, Workspace, run_stage
from builder.streaming import LayerStream
from builder.worker import measure_layer, write_amax

ROOT = Path(__file__).parents[2]
RELEASES = ROOT / "releases"
RELEASE = "tiny-llama"


def open_stream(folder: Path, native: bool) -> LayerStream:
    """A base model as the builder reads it."""
    return open_base(folder, "cpu", "native" if native else "exact")


def arithmetic(native: bool) -> AbstractContextManager[Any]:
    """The context in which transformers itself runs a model."""
    return nullcontext() if native else exact.arithmetic()


def measure_text(stream: LayerStream, base: Path, num_windows: int | None) -> float:
    """Perplexity on the first windows of the release's held-out text, or on all."""
    longest = min(LONGEST_WINDOW, stream.model.config.max_position_embeddings)
    text = split_text(RELEASES / RELEASE / "heldout.txt", base, longest, "the held-out text")
    return measure_perplexity(stream, text.windows[:num_windows], first=text.first)


# ------------------------------------------------------------------------------------------------------------ the work


def do_work(job: Mapping[str, Any]) -> dict[str, Any]:
    """All that a machine is asked for.

    job: native; rows and windows of the release (None for all, 0 for none); families; build, whether to build the
    release too. Returns {machine, seconds, found {what: value}, tables {what: {key: value}}, refused {family: why}}.
    """
    started = time.monotonic()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    native = bool(job["native"])
    found: dict[str, str] = {}
    tables: dict[str, dict[str, str]] = {}
    refused: dict[str, str] = {}
    base = RELEASES / RELEASE / "base"
    if job["rows"] != 0:
        tables["amax"] = measure_release(base, native, job["rows"])
        found["amax"] = digest(tables["amax"])
    if job["windows"] != 0:
        found["perplexity"] = repr(measure_text(open_stream(base, native), base, job["windows"]))
    for name in job["families"]:
        try:
            found[name] = run_family(name, native)
        except Exception as error:  # whatever it is, it is told with the machine it happened on
            if name not in family_models.HYBRIDS:
                raise
            refused[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    if job["build"]:
        found["payload"] = build_release()
    seconds = time.monotonic() - started
    return {
        "machine": describe_limits(),
        "seconds": seconds,
        "found": found,
        "tables": tables,
        "refused": refused,
    }


def digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def describe_limits() -> dict[str, Any]:
    """What this process runs on; oneDNN says on standard output how it multiplies bf16 matrices."""
    matrix = torch.ones(64, 64, dtype=torch.bfloat16)
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        torch.mm(matrix, matrix)
    return {
        "processor": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def measure_release(base: Path, native: bool, num_rows: int | None) -> dict[str, str]:
    """The amax of the release's first calibration rows, or of all: hex floats by "linear kind"."""
    manifest = load_manifest(RELEASES / f"{RELEASE}.yaml")
    scheme, stream = bind_scheme(manifest), open_stream(base, native)
    layers = describe_architecture(open_checkpoint(base, "base").config, "base").layers
    rows = [stream.embed(row) for row in choose_rows(manifest, base).tokens[:num_rows]]
    table: dict[str, str] = {}
    for index, layer in enumerate(layers):
        measured = write_amax(measure_layer(stream, scheme, index, rows, layer.linears))
        table |= {f"{linear} {kind}": value for linear, kinds in measured.items() for kind, value in kinds.items()}
    return table


def run_family(name: str, native: bool) -> str:
    """sha256, in hex, of a tiny model's weights and logits."""
    model = family_models.make_model(name)
    results = [family_models.digest_weights(model)]
    streamed = name in family_models.BUILT
    for logits in run_streamed(model, native) if streamed else run_whole(model, native):
        if not logits.isfinite().all() or logits.float().std() < 1e-3:
            raise AssertionError(f"{name} has no lively logits: {logits}")
        results.append(hashlib.sha256(logits.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest())
    return digest(results)


def run_whole(model: Any, native: bool) -> Iterator[torch.Tensor]:
    """Logits of each row, [T, V], by transformers."""
    for row in family_models.ROWS:
        with torch.inference_mode(), arithmetic(native):
            yield model(input_ids=torch.tensor([row]), use_cache=False).logits[0]


def run_streamed(model: Any, native: bool) -> Iterator[torch.Tensor]:
    """Logits of each row, [T, V], by the builder, layer by layer."""
    with temporary_folder() as folder:
        model.save_pretrained(folder)
        stream = open_stream(folder, native)
        rows = [stream.embed(row) for row in family_models.ROWS]
        for index in range(len(stream.layers)):
            with stream.open_layer(index) as layer:
                for row in rows:
                    stream.run_layer(layer, index, row)
        yield from (stream.read_logits(row) for row in rows)


def build_release() -> str:
    """Build the release up to its files; returns the sha256 of its payload, as a lock has it."""
    from builder.lock import digest_payload

    with temporary_folder() as folder:
        shutil.copytree(RELEASES / RELEASE, folder / RELEASE)
        text = (RELEASES / f"{RELEASE}.yaml").read_text("utf-8")
        path = folder / f"{RELEASE}.yaml"
        path.write_text(text.replace("executor: processes", "executor: in_process"), "utf-8")
        workspace = Workspace(load_manifest(path), folder / "build")
        for stage in STAGES[: [stage.name for stage in STAGES].index("assemble") + 1]:
            run_stage(workspace, stage)
        payload: str = digest_payload(workspace.facts("assemble")["payload"])
        return payload


@contextmanager
def temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
