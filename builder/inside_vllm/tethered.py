"""Runs a command in a session and a temporary folder of its own; all of it ends with the command, or with our parent.

vLLM's engine and its workers live on when the process that started them is killed. The exit code is the command's; 128
and the signal's number, as shells have it, if a signal ended it.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h
GRACE_S = 30  # what has not ended by then is killed


def main(words: list[str]) -> int:
    parent = os.getppid()
    os.setsid()
    signal.signal(signal.SIGTERM, leave)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before it could be asked for
        return 128 + signal.SIGTERM
    with tempfile.TemporaryDirectory(prefix="serving-", ignore_cleanup_errors=True) as scratch:
        try:
            code = subprocess.Popen(words, env={**os.environ, "TMPDIR": scratch}).wait()
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            end_session()
    return code if code >= 0 else 128 - code


def leave(number: int, frame: object) -> None:
    sys.exit(128 + number)


def end_session() -> None:
    """End every other process of this session, and wait for it."""
    end = time.monotonic() + GRACE_S
    for process in list_session():
        send(process, signal.SIGTERM)
        send(process, signal.SIGCONT)  # one that is stopped would not hear of it
    while left := list_session():
        if time.monotonic() > end:
            for process in left:
                send(process, signal.SIGKILL)
        time.sleep(0.1)


def list_session() -> list[int]:
    """The processes of this session that have not ended, without this one."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text("utf-8", "replace").rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[3]) == os.getpid() and fields[0] not in "ZX" and int(stat.parent.name) != os.getpid():
            found.append(int(stat.parent.name))
    return found


def send(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
