"""Digests of large files, taken by several threads in the background, each of them once."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path

from builder.files import sha256_file

Identity = tuple[Path, int, int, int]


def identify_file(path: Path) -> list[int]:
    """Size in bytes, mtime in ns and inode: while these stay, a file's digest is taken as known."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


class Digester:
    """Hashes files in daemon threads, one for each core: a build that is refused meanwhile does not wait for them."""

    def __init__(self) -> None:
        self.futures: dict[Identity, Future[str]] = {}
        self.waiting: queue.SimpleQueue[tuple[Path, Future[str]]] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.num_threads = 0

    def begin(self, paths: Iterable[Path]) -> None:
        """Hash these files, in this order, while the caller goes on."""
        for path in paths:
            self.submit(path)

    def sha256(self, path: Path) -> str:
        """A file's sha256 in hex, waited for."""
        return self.submit(path).result()

    def submit(self, path: Path) -> Future[str]:
        size, modified, inode = identify_file(path)
        with self.lock:
            future = self.futures.get((path, size, modified, inode))
            if future is None or (future.done() and future.exception()):  # a disk may get over an error
                future = self.futures[path, size, modified, inode] = Future()
                self.waiting.put((path, future))
                if self.num_threads < (os.cpu_count() or 1):
                    self.num_threads += 1
                    threading.Thread(target=self.work, daemon=True).start()
        return future

    def work(self) -> None:
        while True:
            path, future = self.waiting.get()
            try:
                future.set_result(sha256_file(path))
            except BaseException as error:  # whoever waits for it gets it
                future.set_exception(error)


DIGESTER = Digester()
