"""Prints size, bits per parameter, perplexity and recovery of every release of the tiny Llama, as a table of Markdown.

    python tests/benchmarks/schemes.py [README.md]

The releases are built first where they are not up to date; the figures are those of their receipts. With a file, the
table also takes the place of the one between its two marks.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from builder.files import read_receipt, write_atomic
from builder.manifest import list_releases, load_manifest

BEGIN, END = "<!-- schemes: written by `make schemes` -->\n", "<!-- end of schemes -->\n"


def read_figures(name: str) -> dict[str, Any]:
    """What the receipts of a release say."""
    facts = {}
    for stage in ("plan", "perplexity"):
        receipt = read_receipt(Path("build") / name / "receipts" / f"{stage}.json")
        assert receipt, f"{name} has no receipt of its stage {stage}"
        facts |= receipt["facts"]
    return facts


def show_row(scheme: str, release: str, num_bytes: int, bits: float, perplexity: float, recovery: float) -> str:
    size, recovered = f"{num_bytes / 1e6:.2f} MB", f"{100 * recovery:.2f} %"
    return f"| {scheme} | {release} | {size} | {bits:.2f} | {perplexity:.3f} | {recovered} |\n"


def make_table(names: tuple[str, ...]) -> str:
    """A row for the base, and one for each release, the most faithful first."""
    figures = {name: read_figures(name) for name in names}
    base = next(iter(figures.values()))
    rows = [show_row("none", "the base", base["base_num_bytes"], 16, base["base"], 1)]
    for name in sorted(names, key=lambda name: (figures[name]["artifact"], name)):
        found = figures[name]
        release = load_manifest(Path(f"releases/{name}.yaml")).release
        schemes = ", ".join(f"`{spec.name}`" for spec in release.scheme)
        schemes += f", `kv_cache: {release.kv_cache}`" if release.kv_cache else ""
        bits, recovery = found["bits_per_parameter"], found["base"] / found["artifact"]
        rows.append(show_row(schemes, f"`{name}`", found["num_bytes"], bits, found["artifact"], recovery))
    head = "| scheme | release | size | bits per parameter | perplexity | recovery |\n|---|---|---:|---:|---:|---:|\n"
    return head + "".join(rows)


def main() -> None:
    names = tuple(name for name in list_releases(Path("releases")) if name.split("-")[:2] == ["tiny", "llama"])
    subprocess.run([sys.executable, "-m", "doit", *(f"release:{name}" for name in names)], check=True)
    table = make_table(names)
    print(f"\n{table}")
    for path in map(Path, sys.argv[1:]):
        before, begin, rest = path.read_text("utf-8").partition(BEGIN)
        _, end, after = rest.partition(END)
        assert begin and end, f"{path} lacks the marks of the table"
        write_atomic(path, f"{before}{begin}\n{table}\n{end}{after}")


if __name__ == "__main__":
    main()
