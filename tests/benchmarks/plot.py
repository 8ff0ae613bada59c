"""Draws what a build costs against the size of its base.

python tests/benchmarks/plot.py RESULTS.json      (needs matplotlib; writes an SVG beside it)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

LABELS = {
    "copy": "cp + fsync",
    "weights": "this builder, NVFP4 of the weights",
    "calibrated": "this builder, calibrated NVFP4",
    "modelopt-weights": "modelopt, NVFP4 of the weights",
    "modelopt-calibrated": "modelopt, calibrated NVFP4",
    "llm-compressor": "llm-compressor, FP8 dynamic",
}


def main() -> None:
    path = Path(sys.argv[1])
    told = json.loads(path.read_text())
    rows = sorted(told["rows"], key=lambda row: row["num_bytes"])
    plt.rcParams["svg.hashsalt"] = "cost"  # the same picture, the same bytes
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, label in LABELS.items():
        points = [(row["num_bytes"] / 1e9, row["results"][name]["wall_s"]) for row in rows if name in row["results"]]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set(xlabel="base model, GB", ylabel="wall time, s", xscale="log", yscale="log", title=told["machine"])
    axes.grid(which="both", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
