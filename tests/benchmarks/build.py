"""What a release costs to build, beside a plain copy of its base and beside other tools, all in one run.

    python tests/benchmarks/build.py [GIGABYTES ...] [--runs N] [--only NAME,NAME] [--keep]

For each size a Llama-shaped bf16 base is generated; then every contender has its turn, `runs` times over, and medians
count. Prints a table and writes build/bench/build.json; `--keep` writes that and the plot beside this file, for the
README. The base lies in the page cache throughout, if it fits. llm-compressor is installed into build/bench/peers.

  copy                 cp -r, and an fsync of every file
  weights              ours: `doit assemble`, NVFP4 with unit input scales: everything from reading to receipts
  calibrated           ours: the same with 16 calibration rows of 256 tokens
  forward              those rows through transformers' decoder layers: the seconds of the passes alone
  modelopt-weights     modelopt's weight-only NVFP4 export
  modelopt-calibrated  modelopt's NVFP4, calibrated with those rows, and its export
  llm-compressor       oneshot FP8_DYNAMIC
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BENCH = ROOT / "build" / "bench"
PEERS_PYTHON = BENCH / "peers" / "bin" / "python"
PEERS_PACKAGES = ("torch==2.13.0", "llmcompressor==0.14.0", "matplotlib==3.10.7")
NUM_ROWS, ROW_TOKENS = 16, 256
MANIFEST = """\
manifest: 1
title: Benchmark
repo: release-builder/benchmark
base: {path: base, licenses: [psf-2.0]}
executor: in_process
shards: 1
"""
WEIGHTS = "scheme: {name: nvfp4, input_scale: unit}\n"
CALIBRATED = f"""\
scheme: {{name: nvfp4}}
calibration: {{path: rows.jsonl, samples: {NUM_ROWS}, tokens: [{ROW_TOKENS}, {ROW_TOKENS}]}}
"""
CONTENDERS = ("copy", "weights", "calibrated", "forward", "modelopt-weights", "modelopt-calibrated", "llm-compressor")
SLOWEST_GB = 8  # above, tools that hold the whole model are left out


def prepare(project: Path, gigabytes: float) -> int:
    """A project with one base and two releases; returns the bytes of the base's weights."""
    releases = project / "releases"
    releases.mkdir()
    shutil.copy(ROOT / "pyproject.toml", project)
    (releases / "weights.yaml").write_text(MANIFEST + WEIGHTS)
    (releases / "calibrated.yaml").write_text(MANIFEST + CALIBRATED)
    # in a process of its own: a child's peak begins at the size that its parent had
    generate = [sys.executable, str(HERE / "bases.py"), str(releases / "base"), str(gigabytes)]
    num_bytes = int(subprocess.run(generate, check=True, capture_output=True, text=True).stdout)
    texts = [json.loads(line)["text"] for line in (ROOT / "releases/tiny-llama/calibration.jsonl").open()]
    long_texts = ["\n".join(texts[start::NUM_ROWS]) for start in range(NUM_ROWS)]
    (releases / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in long_texts))
    rows = [[(7 * number + place) % 500 for place in range(ROW_TOKENS)] for number in range(NUM_ROWS)]
    (project / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return num_bytes


def make_command(name: str, project: Path) -> list[str]:
    if name == "copy":
        return ["bash", "-c", "cp -r releases/base target && sync target/*"]
    if name in ("weights", "calibrated"):
        return [sys.executable, "-m", "doit", f"assemble:{name}"]
    python = str(PEERS_PYTHON) if name == "llm-compressor" else sys.executable
    return [python, str(HERE / "peers.py"), name, "releases/base", "rows.jsonl", "target"]


def measure(name: str, project: Path) -> dict[str, float]:
    """Wall seconds, CPU seconds and peak bytes (of the largest process) of one contender's run."""
    for leftover in ("target", "build"):
        shutil.rmtree(project / leftover, ignore_errors=True)
    os.sync()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(project / "cache")}
    started = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            make_command(name, project), cwd=project, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        lines = log.read().decode(errors="replace").splitlines()
    if process.returncode:
        raise SystemExit("\n".join([f"{name} ended with {process.returncode}", *lines[-20:]]))
    if name == "forward":
        wall = json.loads(next(line for line in lines if line.startswith("{")))["forward_s"]
    return {"wall_s": wall, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_bytes": usage.ru_maxrss * 1024}


def compare(gigabytes: float, names: Sequence[str], runs: int) -> dict[str, Any]:
    """Medians of every contender at one size."""
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        num_bytes = prepare(project, gigabytes)
        first = measure("weights", project)  # the first plan of a config loads transformers, and is remembered
        told: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(runs):
            for name in names:
                told[name].append(measure(name, project))
                print(f"  {gigabytes:g} GB, {name}: {told[name][-1]['wall_s']:.2f} s", file=sys.stderr, flush=True)
    results = {
        name: {key: statistics.median(run[key] for run in rows) for key in rows[0]} for name, rows in told.items()
    }
    return {"num_bytes": num_bytes, "first_weights_s": first["wall_s"], "results": results}


def describe_machine() -> str:
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB, Linux {platform.release().partition('-')[0]}, CPU only"


def tabulate(row: Mapping[str, Any]) -> str:
    """A size's results as a Markdown table."""
    base, results = row["num_bytes"] / 1e9, row["results"]
    ours = results.get("weights", {"wall_s": float("nan")})["wall_s"]
    lines = [
        f"| base of {base:.2f} GB | wall s | CPU s | peak GB | GB/s of base | times ours (weights) |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, told in results.items():
        peak = f"{told['peak_bytes'] / 1e9:.2f}" if name != "copy" else ""
        lines.append(
            f"| {name} | {told['wall_s']:.2f} | {told['cpu_s']:.1f} | {peak} "
            f"| {base / told['wall_s']:.2f} | {told['wall_s'] / ours:.2f} |"
        )
    return "\n".join(lines)


def install_peers() -> None:
    """An environment with llm-compressor, whose pins exclude ours, and with what draws the plot."""
    marker = PEERS_PYTHON.parent.parent / "ready"
    if marker.exists():
        return
    base = getattr(sys, "_base_executable", sys.executable)
    subprocess.run([base, "-m", "venv", "--clear", str(PEERS_PYTHON.parent.parent)], check=True)
    subprocess.run([str(PEERS_PYTHON), "-m", "pip", "install", "--quiet", *PEERS_PACKAGES], check=True)
    marker.touch()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("gigabytes", type=lambda text: float(text.removesuffix("GB")), nargs="*", default=[0.5])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", default=",".join(CONTENDERS))
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    wanted = options.only.split(",")
    if "llm-compressor" in wanted or options.keep:
        install_peers()
    rows = []
    for gigabytes in options.gigabytes:
        small = gigabytes <= SLOWEST_GB
        names = [name for name in CONTENDERS if name in wanted and (small or name in ("copy", "weights"))]
        rows.append(compare(gigabytes, names, options.runs))
        print(tabulate(rows[-1]), flush=True)
    told = {"machine": describe_machine(), "runs": options.runs, "rows": rows}
    BENCH.mkdir(parents=True, exist_ok=True)
    target = HERE / "results" if options.keep else BENCH
    target.mkdir(exist_ok=True)
    (target / "build.json").write_text(json.dumps(told, indent=2) + "\n")
    if options.keep:
        subprocess.run([str(PEERS_PYTHON), str(HERE / "plot.py"), str(target / "build.json")], check=True)


if __name__ == "__main__":
    main()
