"""Files are there complete or not at all, and JSON has one form."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.errors import BuildError
from builder.files import (
    CHUNK_BYTES,
    canonical_json,
    digest,
    explain_disk_errors,
    open_atomic,
    read_json,
    sha256_file,
    write_atomic,
    write_json,
)

TOO_LARGE = """
import resource, sys
from pathlib import Path
from builder.errors import BuildError
from builder.files import write_atomic
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_atomic(Path(sys.argv[1]), bytes(1 << 20))
except BuildError as error:
    sys.exit(error.__cause__.errno)
"""
KILLED = """
import os, sys
from pathlib import Path
from builder.files import open_atomic
with open_atomic(Path(sys.argv[1])) as file:
    file.write(b"new")
    file.flush()
    os.kill(os.getpid(), 9)
"""

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text("aé☃\n"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abé"), inner, max_size=3),
    max_leaves=8,
)


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run_python(program: str, *arguments: Path) -> int:
    return subprocess.run([sys.executable, "-c", program, *map(str, arguments)], check=False, timeout=60).returncode


def test_a_written_file_is_whole_and_readable_by_all(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "file"
    previous = os.umask(0o077)
    try:
        write_atomic(path, "žluť\n")
    finally:
        os.umask(previous)
    assert path.read_bytes() == "žluť\n".encode()
    assert path.stat().st_mode & 0o777 == 0o644
    assert listing(path.parent) == ["file"]


def test_writing_again_replaces_the_file_and_leaves_a_hard_link_as_it_was(tmp_path: Path) -> None:
    path, link = tmp_path / "file", tmp_path / "link"
    write_atomic(path, b"old")
    os.link(path, link)
    write_atomic(path, b"new")
    assert (path.read_bytes(), link.read_bytes()) == (b"new", b"old")


def test_a_failure_while_writing_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for before in (None, b"old"):
        if before:
            path.write_bytes(before)
        with pytest.raises(ZeroDivisionError), open_atomic(path) as file:
            file.write(b"half of the ne")
            raise ZeroDivisionError
        assert listing(tmp_path) == ([] if before is None else ["file"])
    assert path.read_bytes() == b"old"


def test_a_process_that_is_killed_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    assert run_python(KILLED, path) == -9
    assert path.read_bytes() == b"old"
    assert len(leftovers := [name for name in listing(tmp_path) if name != "file"]) == 1
    assert leftovers[0].startswith(".file.") and leftovers[0].endswith(".tmp"), "what the next stage sweeps away"


def test_a_file_that_cannot_grow_any_further_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert run_python(TOO_LARGE, path) == errno.EFBIG
    assert listing(tmp_path) == []
    path.write_bytes(b"old")
    assert run_python(TOO_LARGE, path) == errno.EFBIG
    assert (listing(tmp_path), path.read_bytes()) == (["file"], b"old")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_said_in_three_lines_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(BuildError) as caught, open_atomic(tmp_path / "file.bin"):
        Path("/dev/full").write_bytes(b"x")
    assert str(caught.value) == (
        "no space left while writing file.bin\n"
        f"  in {tmp_path}\n"
        "  fix: free some space there and run the same command again; finished work is kept"
    )
    assert listing(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_disk_and_quota_are_explained_alike(number: int) -> None:
    with pytest.raises(BuildError) as caught, explain_disk_errors(Path("/some/where/file")):
        raise OSError(number, os.strerror(number))
    assert (caught.value.what, caught.value.where) == ("no space left while writing file", "/some/where")


def test_other_errors_of_the_disk_stay_what_they_are() -> None:
    with pytest.raises(PermissionError), explain_disk_errors(Path("file")):
        raise PermissionError(errno.EACCES, "no")


@settings(deadline=None)
@given(JSON)
def test_canonical_json_says_what_it_was_given(value: Any) -> None:
    text = canonical_json(value)
    assert json.loads(text) == value
    assert canonical_json(json.loads(text)) == text
    assert text.endswith("\n") and not text.endswith("\n\n")


@settings(deadline=None)
@given(st.dictionaries(st.text("abcdeé"), JSON, min_size=2), st.randoms(use_true_random=False))
def test_the_order_of_keys_changes_neither_text_nor_digest(value: dict[str, Any], random: Any) -> None:
    keys = list(value)
    random.shuffle(keys)
    shuffled = {key: value[key] for key in keys}
    assert canonical_json(shuffled) == canonical_json(value)
    assert digest(shuffled) == digest(value)


def test_canonical_json_has_this_form() -> None:
    assert canonical_json({"b": [1, 0.1], "a": {"ü": None}}) == (
        '{\n  "a": {\n    "ü": null\n  },\n  "b": [\n    1,\n    0.1\n  ]\n}\n'
    )
    assert digest({"b": 1, "a": 2}) == hashlib.sha256(b'{\n  "a": 2,\n  "b": 1\n}\n').hexdigest()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_does_not_have_are_refused_before_anything_is_written(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "file.json", {"value": [value]})
    assert listing(tmp_path) == []


@settings(deadline=None, max_examples=25)
@given(JSON)
def test_whatever_is_torn_is_read_as_nothing(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "torn.json"
    whole = canonical_json({"value": value}).encode()
    path.write_bytes(whole)
    assert read_json(path) == {"value": value}
    for length in range(0, len(whole) - 2, 3):  # the last two bytes are the brace and a newline
        path.write_bytes(whole[:length])
        assert read_json(path) is None


@pytest.mark.parametrize("content", [b"", b"\0" * 40, b"\xff\xfe{}", b"[" * 100_000, b"{}{}", b"None"])
def test_what_is_not_json_is_read_as_nothing(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.json"
    assert read_json(path) is None
    path.write_bytes(content)
    assert read_json(path) is None


@pytest.mark.parametrize("num_bytes", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1])
def test_a_files_digest_is_that_of_all_its_bytes(tmp_path: Path, num_bytes: int) -> None:
    content = os.urandom(num_bytes)
    (tmp_path / "file").write_bytes(content)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()
