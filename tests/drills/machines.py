"""The same bits on every machine: one processor made to be many, and the results compared.

    python tests/drills/machines.py [--short] [--native] [--arch aarch64]

Each machine is a process whose libraries are told, before they are loaded, which instructions there are: torch, its
matrix products, the BLAS libraries, numpy and compiled loops. On each the small release of this repository is
calibrated and its perplexity taken; on three of them a tiny model of every family is run too. Ends with 1 if one
differs.

  --short         three machines, few rows, two families: under two minutes
  --native        torch's own arithmetic, which is expected to differ: shows that the drill can fail
  --arch aarch64  on an emulated ARM processor instead, compared with this one and with the release's lock; installs
                  what it needs into .machines/aarch64, 5 GB, the first time
  --here JSON     the work of one machine in this process, told on the last line: what every machine is called with
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import family_models

ROOT = Path(__file__).parents[2]
AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"}
NEEDS = {"DEFAULT": set[str](), "AVX512_CORE": AVX512, "AVX2": {"avx2", "fma"}}
NEEDS |= {"avx512": AVX512, "avx2": {"avx2", "fma"}, "default": set[str]()}
NO_AVX512 = "X86_V4 AVX512_ICL AVX512_SPR"
LOOPS = {  # what BLAS libraries, numpy and compiled loops are told, from the most to the least
    "AVX512_CORE": {
        "MKL_CBWR": "AVX512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "NUMBA_CPU_NAME": "skylake-avx512",
        "NUMBA_CPU_FEATURES": "",
        "NPY_DISABLE_CPU_FEATURES": "AVX512_ICL AVX512_SPR",
        "OPENBLAS_CORETYPE": "SkylakeX",
    },
    "AVX2": {
        "MKL_CBWR": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "",
        "NPY_DISABLE_CPU_FEATURES": NO_AVX512,
        "OPENBLAS_CORETYPE": "Haswell",
    },
    "baseline": {  # no fused multiply-add: what every x86_64 has
        "MKL_CBWR": "COMPATIBLE",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "NUMBA_CPU_NAME": "x86-64",
        "NUMBA_CPU_FEATURES": "",
        "NPY_DISABLE_CPU_FEATURES": f"X86_V3 {NO_AVX512}",
        "OPENBLAS_CORETYPE": "Nehalem",
    },
}
BEYOND = {  # what oneDNN may not multiply with
    "DEFAULT": (),
    "AVX512_CORE": ("amx", "avx512_core_bf16", "avx512_core_fp16", "avx10"),
    "AVX2": ("amx", "avx512", "avx10"),
}
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
OWN = {"ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", *THREADS, *LOOPS["AVX2"]}


@dataclass(frozen=True)
class Machine:
    """onednn: DEFAULT | AVX512_CORE | AVX2. aten: avx512 | avx2 | default."""

    onednn: str
    aten: str
    threads: int

    @property
    def name(self) -> str:
        plural = "s" if self.threads > 1 else ""
        return f"oneDNN {self.onednn:<11}  ATen {self.aten:<7}  {self.threads} thread{plural:<1}"

    @property
    def lacking(self) -> set[str]:
        """The instructions that it would need and this processor does not have."""
        return (NEEDS[self.onednn] | NEEDS[self.aten]) - read_flags()

    def environment(self) -> dict[str, str]:
        """The variables of its process: BLAS and loops get the lesser of what torch's two halves have."""
        variables = {name: value for name, value in os.environ.items() if name not in OWN}
        variables |= {name: str(self.threads) for name in THREADS} | {"PYTHONPATH": str(ROOT)}
        if not is_x86():
            return variables
        variables["ATEN_CPU_CAPABILITY"] = self.aten
        if self.onednn != "DEFAULT":
            variables["ONEDNN_MAX_CPU_ISA"] = self.onednn
        if self.aten == "default":
            return variables | LOOPS["baseline"]
        if "avx512f" not in read_flags() or "AVX2" in (self.onednn, self.aten.upper()):
            return variables | LOOPS["AVX2"]
        return variables | LOOPS.get(self.onednn, {})


ALL = [
    Machine(onednn, aten, threads)
    for onednn in ("DEFAULT", "AVX512_CORE", "AVX2")
    for aten in ("avx512", "avx2", "default")
    for threads in (2, 1)
]
THREE = [Machine("DEFAULT", "avx512", 2), Machine("AVX512_CORE", "avx2", 1), Machine("AVX2", "default", 1)]


def is_x86() -> bool:
    return platform.machine() in ("x86_64", "AMD64")


def read_flags() -> set[str]:
    """The instruction sets of this processor, as Linux names them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


def choose_machines(machines: Sequence[Machine]) -> list[Machine]:
    """Those that this processor can be; the others are told of. Elsewhere than on x86 only threads can be chosen."""
    if not is_x86():
        print(f"only the number of threads can be chosen on {platform.machine()}")
        return [Machine("DEFAULT", "default", threads) for threads in (2, 1)]
    chosen = []
    for machine in machines:
        if machine.lacking:
            print(f"{machine.name}  skipped: this processor has no {', '.join(sorted(machine.lacking))}")
        else:
            chosen.append(machine)
    return chosen


def run_machine(name: str, command: Sequence[str], environment: Mapping[str, str], job: Mapping[str, Any]) -> Any:
    """A machine's results, of a process of its own. Prints a line on them; ends the drill if the process fails."""
    command = [*command, str(Path(__file__)), "--here", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(environment), cwd=ROOT, check=False)
    if done.returncode:
        print(f"{name}  failed\n{done.stderr[-4000:]}")
        raise SystemExit(1)
    result = json.loads(done.stdout.splitlines()[-1])
    multiplied = re.search(r"exec,cpu,matmul,([^,]+),", done.stdout)
    result["machine"]["onednn"] = multiplied[1] if multiplied else "not used"
    found = "  ".join(f"{what} {shorten(value)}" for what, value in result["found"].items() if what in SHOWN)
    families = [what for what in result["found"] if what in family_models.FAMILIES]
    told = f"  {len(families)} families" if families else ""
    print(f"{name}  {result['machine']['onednn']:<27}  {found}{told}  {result['seconds']:.1f} s", flush=True)
    for family, why in result["refused"].items():
        print(f"  {family} was refused: {why}")
    return result


SHOWN = ("amax", "perplexity", "payload")


def shorten(value: str) -> str:
    return value[:12] if len(value) == 64 else value


def check_limits(machine: Machine, result: Mapping[str, Any]) -> None:
    """Make sure that the process was the machine that it was to be."""
    told = result["machine"]
    wanted = {"avx512": "AVX512", "avx2": "AVX2", "default": "DEFAULT"}[machine.aten]
    wrong = told["threads"] != machine.threads or (is_x86() and told["capability"] != wanted)
    if wrong or any(word in told["onednn"] for word in BEYOND[machine.onednn]):
        print(f"{machine.name}  was not what it was to be: {told}")
        raise SystemExit(1)


def compare(results: Mapping[str, Mapping[str, Any]]) -> int:
    """Tell whether all that was found by several machines is one; returns how many things differ."""
    differing = 0
    things: dict[str, dict[str, list[str]]] = {}
    for name, result in results.items():
        for what, value in result["found"].items():
            things.setdefault(what, {}).setdefault(value, []).append(name)
    for what, by_value in things.items():
        if len(by_value) == 1:
            continue
        differing += 1
        print(f"{what}: {len(by_value)} on {sum(map(len, by_value.values()))} machines")
        for value, names in by_value.items():
            print(f"  {shorten(value)}  " + f"\n  {'':{len(shorten(value))}}  ".join(names))
        for line in list_differences([result["tables"].get(what, {}) for result in results.values()])[:10]:
            print(f"    {line}")
    return differing


def list_differences(tables: Sequence[Mapping[str, str]]) -> list[str]:
    """The keys whose values differ among tables of hex floats, with the least and the largest value."""
    lines = []
    for key in sorted(set().union(*tables)):
        values = sorted({float.fromhex(table[key]) for table in tables if key in table})
        if len(values) > 1:
            lines.append(f"{key}: {values[0]} to {values[-1]}")
    return lines


def conclude(results: Mapping[str, Mapping[str, Any]], beside: Mapping[str, Mapping[str, Any]] | None = None) -> int:
    """The last line, and the drill's exit status. beside: what machines are compared with that is none."""
    differing = compare({**results, **(beside or {})})
    if differing:
        print(f"{differing} of {len({what for result in results.values() for what in result['found']})} results differ")
        return 1
    print(f"1 digest on {len(results)} machines" + "".join(f", that of {name}" for name in beside or {}))
    return 0


def run_grid(*, short: bool, native: bool) -> int:
    """The drill on this processor; returns its exit status."""
    job = {"native": native, "rows": None, "windows": None, "families": [], "build": False}
    families = list(family_models.FAMILIES)
    machines = ALL
    if short:
        job |= {"rows": 4, "windows": 2}
        families, machines = ["gemma3", "mixtral"], THREE
    results = {}
    for machine in choose_machines(machines):
        own = families if machine in THREE or not is_x86() else []
        command = [sys.executable]
        results[machine.name] = run_machine(machine.name, command, machine.environment(), job | {"families": own})
        check_limits(machine, results[machine.name])
    return conclude(results)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--native", action="store_true")
    parser.add_argument("--arch", default=platform.machine())
    parser.add_argument("--here", type=json.loads, metavar="JSON")
    asked = parser.parse_args()
    if asked.here:
        import work

        print(json.dumps(work.do_work(asked.here)))
        return 0
    if asked.arch == platform.machine():
        return run_grid(short=asked.short, native=asked.native)
    if asked.arch != "aarch64":
        parser.error(f"no emulation of {asked.arch}: use aarch64")
    import aarch64

    return aarch64.run(short=asked.short, native=asked.native)


if __name__ == "__main__":
    sys.exit(main())
