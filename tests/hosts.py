"""Machines that share nothing but a network, emulated by Linux namespaces: for tests of a real cluster.

Each has its own network address, host name, processes, /dev/shm, and an empty folder where the others have theirs.
Needs root; where namespaces are not allowed, `why_not` says so. All of it ends with the process that started it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from builder.machine import end_with_parent

ROOT = Path(__file__).parents[1]
RAY = Path(sys.executable).with_name("ray")
PORT = 6379
NAMESPACES = {"--net": "net", "--mount": "mnt", "--uts": "uts", "--pid": "pid"}
MEMORY_BYTES = 2_000_000_000


def why_not() -> str:
    """Why machines cannot be emulated here; empty if they can."""
    if missing := [tool for tool in ("unshare", "nsenter", "ip", "mount") if not shutil.which(tool)]:
        return f"{missing[0]} is not installed"
    attempt = [
        "unshare",
        *NAMESPACES,
        "--fork",
        "sh",
        "-c",
        "mount -t tmpfs tmpfs /mnt && ip link add probe0 type bridge",
    ]
    done = subprocess.run(attempt, capture_output=True, text=True)
    return done.stderr.strip().splitlines()[0] if done.returncode else ""


@dataclass(frozen=True, kw_only=True)
class Host:
    """An emulated machine. folder: the path at which it sees files of its own."""

    name: str
    address: str
    folder: Path
    holder: subprocess.Popen[bytes]

    @property
    def first_process(self) -> int:
        """The process without which nothing runs in its namespaces."""
        return first_child(self.holder)

    def look(self, path: Path) -> Path:
        """A path as the machine sees it, for us to read."""
        return Path(f"/proc/{self.first_process}/root") / path.relative_to("/")

    def find_workers(self) -> list[psutil.Process]:
        """The processes that do a job on it."""
        return [
            process
            for process in psutil.process_iter(["name"])
            if process.info["name"].startswith("ray::work_here") and is_inside(process.pid, self.first_process, "pid")
        ]

    def start(self, command: Sequence[str], env: Mapping[str, str], **more: object) -> subprocess.Popen[str]:
        """Run a command on the machine, in its folder."""
        enter = ["nsenter", "-t", str(self.first_process), *NAMESPACES, "env", "-C", str(self.folder)]
        own = {"HOME": str(self.folder / "home"), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        environment = os.environ | own | dict(env)
        return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
            [*enter, *command], env=environment, text=True, preexec_fn=end_with_parent, **more
        )

    def run(self, command: Sequence[str], env: Mapping[str, str], timeout_s: float = 120) -> str:
        """Run a command to its end; its output."""
        process = self.start(command, env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output, _ = process.communicate(timeout=timeout_s)
        assert process.returncode == 0, output
        return output

    def unplug(self) -> None:
        """Take it off the network and then away, as when the power fails: nobody is told."""
        subprocess.run(
            ["nsenter", "-t", str(self.first_process), "--net", "ip", "link", "set", "eth0", "down"], check=True
        )
        self.stop()

    def stop(self) -> None:
        """End every process of the machine, all at once."""
        release(self.holder)


@contextmanager
def start_hosts(names: Sequence[str], folder: Path) -> Iterator[list[Host]]:
    """Machines 10.77.0.1, .2, ... on one network."""
    switch = hold(["--net"])
    hosts: list[Host] = []
    try:
        inside(first_child(switch), "ip link add switch type bridge && ip link set switch up")
        for number, name in enumerate(names, 1):
            host = Host(name=name, address=f"10.77.0.{number}", folder=folder, holder=hold(list(NAMESPACES)))
            hosts.append(host)
            first_child(host.holder)
            plug = f"ip link add port{number} type veth peer name eth0 netns {host.first_process}"
            inside(first_child(switch), f"{plug} && ip link set port{number} master switch up")
            mounts = " && ".join(
                f"mkdir -p {path} && mount -t tmpfs tmpfs {path}" for path in ("/tmp/ray", "/dev/shm", folder)
            )
            network = f"ip link set lo up && ip address add {host.address}/24 dev eth0 && ip link set eth0 up"
            inside(host.first_process, f"mount -t proc proc /proc && {mounts} && mkdir {folder}/home && {network}")
            inside(host.first_process, f"echo {name} > /proc/sys/kernel/hostname")
        yield hosts
    finally:
        for host in hosts:
            host.stop()
        release(switch)


def hold(namespaces: Sequence[str]) -> subprocess.Popen[bytes]:
    """A process that keeps new namespaces alive."""
    command = ["unshare", *namespaces, "--fork", "--kill-child", "sleep", "infinity"]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL, preexec_fn=end_with_parent)


def release(holder: subprocess.Popen[bytes]) -> None:
    if holder.poll() is None:
        psutil.Process(first_child(holder)).kill()
        holder.wait()


def first_child(holder: subprocess.Popen[bytes]) -> int:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        children = psutil.Process(holder.pid).children()
        if children and children[0].name() == "sleep":
            return children[0].pid
        time.sleep(0.01)
    raise AssertionError("no namespace came to be")


def inside(process: int, script: str) -> None:
    """Run a shell script in the network, mounts and host name of a process."""
    kinds = [kind for kind, name in NAMESPACES.items() if not is_inside(os.getpid(), process, name)]
    subprocess.run(["nsenter", "-t", str(process), *kinds, "sh", "-ec", script], check=True)


def is_inside(one: int, other: int, kind: str) -> bool:
    """Whether two processes share a namespace."""
    try:
        return (Path(f"/proc/{one}/ns") / kind).readlink() == (Path(f"/proc/{other}/ns") / kind).readlink()
    except FileNotFoundError:
        return False


def start_ray(hosts: Sequence[Host], cpus: Mapping[str, int], env: Mapping[str, str]) -> str:
    """Ray on every host, the head on the first; its address."""
    address = f"{hosts[0].address}:{PORT}"
    starting = []
    for host in hosts:
        command = [str(RAY), "start", f"--node-name={host.name}", f"--node-ip-address={host.address}"]
        command += [f"--num-cpus={cpus[host.name]}", f"--memory={MEMORY_BYTES}", "--object-store-memory=100000000"]
        command += ["--disable-usage-stats"]
        if host is hosts[0]:
            host.run([*command, "--head", f"--port={PORT}", "--include-dashboard=false"], env)
        else:
            starting.append((host, host.start([*command, f"--address={address}"], env, stdout=-1, stderr=-2)))
    for host, process in starting:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, f"{host.name}: {output}"
    return address
