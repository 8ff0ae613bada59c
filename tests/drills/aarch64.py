"""An ARM processor, emulated: this repository's environment for aarch64, from nothing, and the drill's work in it.

Debian's qemu-user runs an arm64 Python and the arm64 wheels of the very versions that are installed here. All of it
goes into .machines/aarch64: the packages are unpacked there, and nothing of this machine's own is changed. torch for
aarch64 is linked against CUDA's libraries, which come along although no GPU is used: 2.5 GB to fetch, 5 GB on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import machines

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".machines" / "aarch64"
SYSTEM, SITE, READY = FOLDER / "root", FOLDER / "site", FOLDER / "ready"
PYTHON = SYSTEM / "usr" / "bin" / "python3.11"
LOCK = ROOT / "releases" / "tiny-llama.lock.json"
DEBIAN = ("python3.11", "libgomp1", "libstdc++6")
NEEDED = (
    "compressed-tensors",
    "httpx",
    "huggingface_hub",
    "jinja2",
    "jsonschema",
    "numba",
    "numpy",
    "pyarrow",
    "pydantic",
    "pyyaml",
    "rich",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
)
PLATFORMS = [f"manylinux_2_{minor}_aarch64" for minor in range(17, 37)] + ["manylinux2014_aarch64"]
PROCESSORS = {  # as qemu calls them: the second has bf16 and int8 matrix instructions and SVE2, as a DGX Spark has
    "aarch64, Cortex-A76": "cortex-a76",
    "aarch64, everything": "max,pauth-impdef=on",
}
# What torch reads of a processor, which the emulation passes through from this one: a Neoverse N1 is told instead.
IDENTITY = "sys/devices/system/cpu/cpu{number}/regs/identification/midr_el1"
MIDR = "0x00000000413fd0c1\n"
CPUINFO = """\
processor	: {number}
BogoMIPS	: 50.00
Features	: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x3
CPU part	: 0xd0c
CPU revision	: 1

"""


def run(*, short: bool, native: bool) -> int:
    """The drill on emulated ARM processors, beside this one and the release's lock; returns its exit status."""
    set_up()
    job: dict[str, Any] = {"native": native, "rows": None, "windows": 2, "build": not native}
    job["families"] = ["gemma3", "mixtral"]
    if short:
        job |= {"rows": 4, "windows": 1, "build": False}
    here = machines.Machine("DEFAULT", "avx512" if "avx512f" in machines.read_flags() else "avx2", 1)
    results = {"this one": machines.run_machine("this one", [sys.executable], here.environment(), job)}
    for name, cpu in PROCESSORS.items():
        command = ["qemu-aarch64", "-cpu", cpu, "-L", str(SYSTEM), str(PYTHON), "-u"]
        results[name] = machines.run_machine(name, command, make_environment(), job)
    beside = {} if short or native else {LOCK.name: read_lock()}
    return machines.conclude(results, beside)


def read_lock() -> dict[str, Any]:
    """What the lock says, in the form of a machine's results."""
    lock = json.loads(LOCK.read_text("utf-8"))
    table = {f"{module} {kind}": value for module, kinds in lock["amax"].items() for kind, value in kinds.items()}
    digest = hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()
    return {"found": {"amax": digest, "payload": lock["payload_sha256"]}, "tables": {"amax": table}}


def make_environment() -> dict[str, str]:
    """The variables of an emulated process, which knows nothing of this machine's Python."""
    kept = {name: value for name, value in os.environ.items() if name in ("HOME", "LANG", "PATH", "TMPDIR")}
    return (
        kept
        | dict.fromkeys(machines.THREADS, "1")
        | {
            "PYTHONHOME": str(SYSTEM / "usr"),
            "PYTHONPATH": f"{ROOT}{os.pathsep}{SITE}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "XDG_CACHE_HOME": str(FOLDER / "cache"),
            "NUMBA_CACHE_DIR": str(FOLDER / "cache" / "numba"),
        }
    )


# -------------------------------------------------------------------------------------------------------- from nothing


def set_up() -> None:
    """Install what is not there. Ends the drill, with the reason, on a machine where that cannot be."""
    for tool, package in (("qemu-aarch64", "qemu-user"), ("apt-get", "apt"), ("dpkg", "dpkg")):
        if not shutil.which(tool):
            raise SystemExit(f"there is no {tool}\n  in PATH\n  fix: apt-get install {package}, on Debian 12")
    pins = list_pins()
    wanted = hashlib.sha256(Path(__file__).read_bytes() + "".join(pins).encode()).hexdigest()
    if READY.is_file() and READY.read_text() == wanted:
        return
    shutil.rmtree(FOLDER, ignore_errors=True)
    print(f"installing into {FOLDER.relative_to(ROOT)}: some minutes, 5 GB", flush=True)
    unpack_system()
    describe_processors()
    install_packages(pins)
    READY.write_text(wanted)


def call(command: Sequence[str]) -> None:
    """Run a command that installs something. Ends the drill with its last words if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        words = "\n".join(done.stderr.strip().splitlines()[-6:])
        raise SystemExit(
            f"{' '.join(command[:2])} failed: {words}\n  in {FOLDER}\n  fix: see what it says, and run again"
        )


def unpack_system() -> None:
    """Debian's arm64 Python and C libraries, unpacked and not installed, through lists of packages of their own."""
    state, cache = FOLDER / "apt" / "state", FOLDER / "apt" / "cache"
    for folder in (state / "lists" / "partial", cache / "archives" / "partial", SYSTEM):
        folder.mkdir(parents=True)
    (state / "status").touch()
    settings = {
        "Dir::State": state,
        "Dir::State::status": state / "status",
        "Dir::Cache": cache,
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Install-Recommends": "false",
        "Debug::NoLocking": "1",
    }
    apt = ["apt-get", *(f"-o{name}={value}" for name, value in settings.items())]
    call([*apt, "update"])
    call([*apt, "install", "--download-only", "--yes", *DEBIAN])
    for package in sorted((cache / "archives").glob("*.deb")):
        call(["dpkg", "-x", str(package), str(SYSTEM)])
    shutil.rmtree(FOLDER / "apt")


def describe_processors() -> None:
    """Files that qemu shows in the place of this machine's own: torch ends with a fault where they are an x86's."""
    cores = range(os.cpu_count() or 1)
    (SYSTEM / "proc").mkdir()
    (SYSTEM / "proc" / "cpuinfo").write_text("".join(CPUINFO.format(number=number) for number in cores))
    for number in cores:
        path = SYSTEM / IDENTITY.format(number=number)
        path.parent.mkdir(parents=True)
        path.write_text(MIDR)


def list_pins() -> list[str]:
    """The versions of all that is installed here, as lines of a constraints file."""
    found = {dist.name: dist.version.partition("+")[0] for dist in distributions()}
    return [f"{name}=={version}\n" for name, version in sorted(found.items()) if name != "release-builder"]


def install_packages(pins: Sequence[str]) -> None:
    """The wheels for aarch64, in the versions that this machine has; nothing is built or run."""
    constraints = FOLDER / "constraints.txt"
    constraints.write_text("".join(pins))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    pip += ["--target", str(SITE), "--constraint", str(constraints)]
    elsewhere = ["--only-binary=:all:", "--python-version", "3.11"]
    elsewhere += [word for platform in PLATFORMS for word in ("--platform", platform)]
    call([*pip, *elsewhere, *NEEDED])
    call([*pip, *elsewhere, "--no-deps", "nvidia-modelopt"])  # only its version is asked for
    call([*pip, "--no-deps", "--no-build-isolation", str(ROOT)])  # likewise: the code that runs is the checkout's
