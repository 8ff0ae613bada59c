"""Build the small release on three machines that share no storage, lose one of them on the way, and compare the bytes.

    .venv/bin/python tests/cluster.py

The machines are namespaces of this one (see hosts.py; needs root). While rows are calibrated the third loses its power;
while layers are quantized a worker of the second is killed. The payload has to be the locked one.
"""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import yaml
from hosts import ROOT, Host, start_hosts, start_ray, why_not

NAMES = ("spark-1", "spark-2", "spark-3")
CPUS = {"spark-1": 1, "spark-2": 2, "spark-3": 2}
TIMEOUT_S = 300.0


def prepare(hosts: list[Host]) -> None:
    """The project on the first machine; the base alone on the others."""
    for host in hosts:
        project = host.look(host.folder)
        shutil.copytree(ROOT / "releases" / "tiny-llama" / "base", project / "releases" / "tiny-llama" / "base")
    project = hosts[0].look(hosts[0].folder)
    shutil.copy(ROOT / "pyproject.toml", project)
    shutil.copytree(ROOT / "releases" / "tiny-llama", project / "releases" / "tiny-llama", dirs_exist_ok=True)
    shutil.copy(ROOT / "releases" / "tiny-llama.lock.json", project / "releases")
    manifest = yaml.safe_load((ROOT / "releases" / "tiny-llama.yaml").read_text("utf-8"))
    manifest["shards"] = len(hosts)
    (project / "releases" / "tiny-llama.yaml").write_text(yaml.safe_dump(manifest, allow_unicode=True), "utf-8")


def wait_for(condition: Callable[[], bool], builder: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert builder.poll() is None, "the build ended before it came so far"
        assert time.monotonic() < deadline, "it did not come so far in time"
        time.sleep(0.005)


def scratch_holds(host: Host, pattern: str) -> bool:
    return any(host.look(host.folder / "home" / ".cache" / "release-builder").glob(f"*/{pattern}"))


def build(hosts: list[Host], address: str, env: dict[str, str]) -> str:
    """Build with the two losses; returns the payload's digest."""
    first, second, third = hosts
    command = [sys.executable, "-m", "doit", "release:tiny-llama"]
    began = time.monotonic()
    builder = first.start(command, env | {"EXECUTOR": "ray", "RAY_ADDRESS": address})
    wait_for(lambda: scratch_holds(third, ".held") and bool(third.find_workers()), builder)
    print(f"--- {time.monotonic() - began:.1f} s: {third.name} loses its power", flush=True)
    third.unplug()
    wait_for(lambda: scratch_holds(second, "units"), builder)
    for worker in second.find_workers():
        worker.kill()
    print(f"--- {time.monotonic() - began:.1f} s: a worker of {second.name} is killed", flush=True)
    assert builder.wait(TIMEOUT_S) == 0
    print(f"--- {time.monotonic() - began:.1f} s: finished", flush=True)
    receipt = json.loads(first.look(first.folder / "build" / "tiny-llama" / "receipts" / "assemble.json").read_text())
    digest: str = receipt["facts"]["payload_sha256"]
    return digest


def main() -> None:
    if reason := why_not():
        sys.exit(f"machines cannot be emulated here: {reason}")
    locked = json.loads((ROOT / "releases" / "tiny-llama.lock.json").read_text())
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name, start_hosts(NAMES, Path(name)) as hosts:
        prepare(hosts)
        digest = build(hosts, start_ray(hosts, CPUS, env), env)
    assert digest == locked["payload_sha256"], "the bytes are not the locked ones"
    print("the payload is the locked one")


if __name__ == "__main__":
    main()
