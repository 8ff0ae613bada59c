"""Digests taken in the background are those of the files as they are."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import pytest

from builder.digests import Digester


def test_digests_are_right_whether_or_not_they_were_begun(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(20)]
    for number, path in enumerate(paths):
        path.write_bytes(os.urandom(1000 * number))
    digester = Digester()
    digester.begin(paths[::2])
    for path in paths:
        assert digester.sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_that_was_begun_and_then_changed_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    digester = Digester()
    before = digester.sha256(path)
    path.write_bytes(b"after.")
    os.utime(path, ns=(1, 1))
    assert digester.sha256(path) != before
    assert digester.sha256(path) == hashlib.sha256(b"after.").hexdigest()


def test_a_file_is_read_once_for_all_who_ask(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    digester = Digester()
    futures = [digester.submit(path) for _ in range(5)]
    assert len({id(future) for future in futures}) == 1


def test_an_error_is_told_and_the_file_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.symlink_to(tmp_path / "there")
    (tmp_path / "there").mkdir()  # opening it fails; looking at it does not
    digester = Digester()
    with pytest.raises(IsADirectoryError):
        digester.sha256(path)
    with pytest.raises(IsADirectoryError):
        digester.sha256(path)
    assert threading.active_count() >= 2, "the thread that met the error lives on"


def test_a_file_that_is_not_there_is_the_caller_s_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Digester().begin([tmp_path / "nothing"])
