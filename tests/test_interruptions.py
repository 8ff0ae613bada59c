"""What happens to a build when it is ended, when a disk is full or fails, when its base changes, when two meet."""

from __future__ import annotations

import dataclasses
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import test_graph
import torch
from conftest import build, hear_signals
from crash import list_session
from test_graph import QUICK, ROOT, STEPS, Run, digest_payload, flip_byte, is_done

from builder.errors import BuildError
from builder.files import read_receipt
from builder.manifest import load_manifest
from builder.stages import STAGES, Workspace, hold, run_stage
from builder.streaming import Row
from builder.worker import SavedStates

project, doit = test_graph.project, test_graph.doit

Write = Callable[..., Path]
GO_ON = "what is done is kept, and the same command goes on from here\n"
WEIGHTS = "model-00001-of-00002.safetensors"
FULL = re.compile(r"(no space left while|the build needs) .+\n  in .+\n  fix: .+\n")
needs_root = pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounting takes root, on Linux")


# ------------------------------------------------------------------------------------------------ ended


def start(project: Path, *command: str, **options: Any) -> subprocess.Popen[str]:
    """doit in a process and a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "doit", *command],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **{"preexec_fn": hear_signals, **options},
    )


@pytest.mark.parametrize(
    ("stage", "number", "code", "text"),
    [
        ("calibrate", signal.SIGTERM, 143, "ended by SIGTERM"),
        ("quantize", signal.SIGHUP, 129, "ended by SIGHUP: its terminal was closed"),
        ("verify", signal.SIGINT, 130, "interrupted"),
    ],
)
def test_a_signal_ends_a_build_and_all_its_processes_at_once_and_says_how_to_go_on(
    project: Path, write_release: Write, stage: str, number: int, code: int, text: str
) -> None:
    path = write_release(executor="in_process" if stage == "verify" else "processes", perplexity=None)
    before = [known.name for known in STAGES][STEPS.index(stage) - 1]
    build(path, project / "build" / "tiny", before)
    process = start(project, f"{stage}:tiny")
    while len(list_session(process.pid)) < 2:  # workers, or a program that verifies
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(number)
    sent = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - sent < 2  # it takes a tenth of a second on an idle machine
    assert (process.returncode, err) == (code, f"\n{text}; {GO_ON}")
    deadline = time.monotonic() + 5
    while list_session(process.pid):
        assert time.monotonic() < deadline, "processes were left behind"
        time.sleep(0.05)
    assert not is_done(project / "build" / "tiny", stage)


def test_under_nohup_a_build_outlives_its_terminal(project: Path, write_release: Write) -> None:
    build(write_release(**QUICK), project / "build" / "tiny", "plan")
    process = start(project, "fetch:tiny", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    while process.poll() is None:
        process.send_signal(signal.SIGHUP)
        time.sleep(0.01)
    assert process.returncode == 0
    assert is_done(project / "build" / "tiny", "fetch")


# ------------------------------------------------------------------------------------------------ a full disk


@contextmanager
def mount(folder: Path, *options: str) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    if subprocess.run(["mount", *options, str(folder)], check=False, capture_output=True).returncode:
        pytest.skip("this machine does not let tests mount anything")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, room: int) -> None:
    """Leave that many bytes free."""
    status = os.statvfs(folder)
    with (folder / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, status.f_bavail * status.f_frsize - room))


def check_nothing_is_half_written(build: Path) -> None:
    assert not [path for path in build.rglob("*.tmp") if not path.name.endswith(".progress.json.tmp")]
    for receipt in [*build.rglob("receipts/*.json"), *build.rglob("*.record.json"), *build.rglob("block-*.json")]:
        assert read_receipt(receipt), receipt
    for record in build.rglob("*.record.json"):
        path = record.with_name(record.name.removesuffix(".record.json"))
        assert path.stat().st_size == (read_receipt(record) or {})["num_bytes"]
    assert is_done(build, "assemble") or not (build / "artifact").exists()


@needs_root
def test_a_full_disk_is_told_by_every_stage_that_makes_the_payload_and_the_build_goes_on_when_there_is_room(
    doit: Run, project: Path, write_release: Write
) -> None:
    payload = build(write_release("undisturbed"), project / "undisturbed").facts("assemble")["payload_sha256"]
    write_release()
    here, failed = project / "build", []
    with mount(here, "-t", "tmpfs", "-o", "size=32m", "none"):
        for stage, room in (
            ("plan", 0),
            ("fetch", 0),
            ("calibrate", 0),
            ("calibrate", 9000),
            ("quantize", 0),
            ("quantize", 100_000),
            ("quantize", 3_000_000),
            ("assemble", 0),
            ("assemble", 9000),
            ("assemble", 40_000),
        ):
            if stage != "plan":
                assert doit(f"{STEPS[STEPS.index(stage) - 1]}:tiny").code == 0
            fill(here, room)
            told = doit(f"{stage}:tiny")
            (here / "filler").unlink()
            failed += told.ran
            assert told.code != 0
            assert FULL.fullmatch(told.err), told.err
            check_nothing_is_half_written(here / "tiny")
        assert failed == ["plan", "fetch", *["calibrate"] * 2, *["quantize"] * 3, *["assemble"] * 3]
        assert doit("assemble:tiny").code == 0
        assert digest_payload(here / "tiny") == payload


@needs_root
@pytest.mark.parametrize("stage", ["verify", "perplexity", "lock", "card"])
def test_a_full_disk_leaves_no_receipt_of_a_stage_that_describes_the_payload(
    doit: Run, project: Path, write_release: Write, stage: str
) -> None:
    path, here = write_release(**QUICK), project / "build"
    run = next(known for known in STAGES if known.name == stage)
    with mount(here, "-t", "tmpfs", "-o", "size=32m", "none"):
        workspace = build(path, here / "tiny")
        if stage == "card":
            for known in STAGES[STEPS.index("perplexity") : STEPS.index("card")]:
                run_stage(workspace, known)
        for room in (0, 9000) if stage == "card" else (0,):
            fill(here, room)
            with pytest.raises(BuildError, match="no space left while writing"):
                run_stage(workspace, run)
            (here / "filler").unlink()
            assert not is_done(here / "tiny", stage)
            check_nothing_is_half_written(here / "tiny")
        if stage != "verify":  # it takes long
            run_stage(workspace, run)
            assert is_done(here / "tiny", stage)


def test_a_limit_on_the_size_of_files_is_told_as_such(doit: Run, project: Path, write_release: Write) -> None:
    build(write_release(**QUICK), project / "build" / "tiny", "calibrate")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        told = doit("quantize:tiny")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert told.code != 0
    assert re.fullmatch(
        r"model-\d+-of-\d+\.safetensors\.partial grows larger than a file may be\n  in build/tiny/parts\n"
        r"  fix: raise the limit \(`ulimit -f`\), or build on another file system; finished work is kept\n",
        told.err,
    )
    assert doit("assemble:tiny").code == 0


# ------------------------------------------------------------------------------------------------ a failing disk


@contextmanager
def failing_disk(folder: Path, contents: Sequence[Path]) -> Iterator[Callable[[], None]]:
    """A disk with these files; yields a function that makes the end of the largest one unreadable.

    It is an ext4 image behind a loop device: what is cut off the image under it can be read no more.
    """
    image, num_bytes = folder.with_suffix(".img"), 24 << 20
    with image.open("wb") as file:
        file.truncate(num_bytes)
    if subprocess.run(["mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-m", "0", str(image)], check=False).returncode:
        pytest.skip("this machine does not make ext4 file systems")
    largest = max(contents, key=lambda path: path.stat().st_size)
    with mount(folder, "-o", "loop,noatime", str(image)):
        for path in sorted(contents, key=lambda path: path is largest):  # in this order they lie on the disk
            shutil.copy(path, folder)
            os.sync()
    with mount(folder, "-o", "loop,ro,noatime", str(image)):

        def fail() -> None:
            middle = largest.stat().st_size // 2 // 4096 * 4096
            os.truncate(image, image.read_bytes().index(largest.read_bytes()[middle : middle + 512]))
            for path in folder.rglob("*.*"):  # what is in memory would still be read
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

        yield fail


def change_weight(path: Path) -> None:
    """Multiply a weight by four, or divide it; twice is not at all. The file keeps its size."""
    with path.open("r+b") as file:
        place = file.seek(path.stat().st_size // 2 | 1)  # the byte with most of a bfloat16's exponent
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def base_files() -> list[Path]:
    return [path for path in (ROOT / "releases" / "tiny-llama" / "base").iterdir() if path.is_file()]


@needs_root
def test_a_disk_that_fails_while_the_base_is_hashed_is_named(doit: Run, project: Path, write_release: Write) -> None:
    with failing_disk(project / "disk", base_files()) as fail:
        write_release(**{"base.path": "../disk"})
        fail()
        told = doit("fetch:tiny")
        assert told.code != 0
        assert told.ran == ["plan", "fetch"]
        assert (
            told.err
            == f"""\
the disk failed while {WEIGHTS} was read or written
  in {project}/releases/../disk
  fix: see the system's log (`dmesg`), restore the file, and run the same command again
"""
        )


@needs_root
def test_a_disk_that_fails_under_a_mapped_base_ends_a_worker_and_is_told(
    doit: Run, project: Path, write_release: Write
) -> None:
    with failing_disk(project / "disk", base_files()) as fail:
        write_release(executor="processes", perplexity=None, **{"base.path": "../disk"})
        assert doit("fetch:tiny").code == 0
        fail()
        told = doit("calibrate:tiny")
        assert told.code != 0
        assert re.fullmatch(r"a worker was ended by SIGBUS.*\n  in .+\n  fix: .+\n", told.err), told.err
        assert not is_done(project / "build" / "tiny", "calibrate")


@needs_root
def test_a_disk_that_fails_under_the_calibration_rows_is_named(doit: Run, project: Path, write_release: Write) -> None:
    rows = write_release().parent / "calibration.jsonl"
    with failing_disk(project / "disk", [rows]) as fail:
        write_release(**{"calibration.path": "../disk/calibration.jsonl"})
        assert doit("plan:tiny").code == 0
        fail()
        told = doit("calibrate:tiny")
        assert told.code != 0
        assert told.err.startswith("the disk failed while calibration.jsonl was read or written\n")


def test_an_error_that_nobody_foresaw_still_says_what_it_is_about(
    doit: Run, project: Path, write_release: Write
) -> None:
    write_release()
    (project / "build").write_text("a file where a folder must be")
    told = doit("plan:tiny")
    assert told.code != 0
    assert (
        told.err
        == """\
Not a directory
  in build/tiny
  fix: mend that (`dmesg` tells of failing disks), then run the same command again
"""
    )


# ------------------------------------------------------------------------------------------------ another base


def test_a_base_that_was_only_touched_is_hashed_again_and_nothing_is_redone(
    doit: Run, project: Path, write_release: Write
) -> None:
    base = write_release(**QUICK).parent / "base"
    doit("assemble:tiny")
    os.utime(base / WEIGHTS, ns=(1, 1))
    assert doit("assemble:tiny").ran == ["plan", "fetch"]
    assert doit("assemble:tiny").ran == []


def test_a_base_that_changed_between_two_runs_is_told_and_what_was_made_from_it_is_made_anew(
    doit: Run, project: Path, write_release: Write
) -> None:
    base = write_release(**QUICK).parent / "base"
    doit("assemble:tiny")
    payload = digest_payload(project / "build" / "tiny")
    change_weight(base / WEIGHTS)  # of the same size
    told = doit("assemble:tiny")
    assert told.ran == ["plan", "fetch", "quantize", "assemble"]
    assert f"  {WEIGHTS} has changed since the last build: what was made from it is made anew\n" in told.out
    assert digest_payload(project / "build" / "tiny") != payload
    change_weight(base / WEIGHTS)
    assert doit("assemble:tiny").code == 0
    assert digest_payload(project / "build" / "tiny") == payload


@pytest.mark.parametrize(("stage", "loop"), [("calibrate", "measure_layer"), ("quantize", "quantize_unit")])
def test_a_base_that_changes_while_it_is_read_leaves_no_receipt_and_nothing_made_from_it(
    doit: Run, project: Path, write_release: Write, monkeypatch: pytest.MonkeyPatch, stage: str, loop: str
) -> None:
    import builder.worker

    base = write_release(perplexity=None).parent / "base"
    doit("assemble:tiny")
    payload = digest_payload(project / "build" / "tiny")
    assert doit("clean", "assemble:tiny", f"{stage}:tiny").code == 0
    inner, calls = getattr(builder.worker, loop), []

    def change_the_base_once(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            change_weight(base / WEIGHTS)
        return inner(*args)

    monkeypatch.setattr(builder.worker, loop, change_the_base_once)
    told = doit(f"{stage}:tiny")
    assert told.code != 0
    assert (
        told.err
        == f"""\
{WEIGHTS} changed while {stage} was reading it
  in {base}
  fix: leave it alone, and run the same command again; what was made from it meanwhile is removed
"""
    )
    assert not is_done(project / "build" / "tiny", stage)
    change_weight(base / WEIGHTS)  # as it was: whatever had been made from the other one would now be believed
    assert doit("assemble:tiny").code == 0
    assert digest_payload(project / "build" / "tiny") == payload


@pytest.mark.parametrize("touched", [False, True])
def test_what_an_ended_run_left_is_used_only_if_nobody_touched_the_base_since(
    doit: Run, project: Path, write_release: Write, touched: bool
) -> None:
    path = write_release(perplexity=None)
    workspace = build(path, project / "build" / "tiny", "calibrate")
    calibrate = next(stage for stage in STAGES if stage.name == "calibrate")

    def end(_: Workspace) -> Any:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        run_stage(workspace, dataclasses.replace(calibrate, run=end))
    block = workspace.calibration / "block-00000.json"
    made = block.stat().st_ino, block.stat().st_mtime_ns
    if touched:
        os.utime(path.parent / "base" / WEIGHTS, ns=(1, 1))
    assert doit("calibrate:tiny").ran[-1] == "calibrate"
    assert ((block.stat().st_ino, block.stat().st_mtime_ns) == made) == (not touched)
    assert workspace.circumstances("calibrate")["resumed"] == (not touched)


# ------------------------------------------------------------------------------------------------ two at once


def test_a_second_build_of_the_same_release_says_who_is_at_it_since_when(
    doit: Run, project: Path, write_release: Write
) -> None:
    path = write_release(**QUICK)
    doit("assemble:tiny")
    with hold(Workspace(load_manifest(path), project / "build" / "tiny")):
        for command in (["verify:tiny"], ["clean", "release:tiny"], ["clean", "--dry-run", "card:tiny"]):
            told = doit(*command)
            assert told.code != 0
            assert re.fullmatch(
                rf"(ERROR: )?tiny is being built already, by process {os.getpid()} on \S+ since 20\S+ \d\d:\d\d:\S+\n"
                r"  in build/tiny\n  fix: wait for it, or end it and run the same command again\n",
                told.err,
            )
    assert doit("assemble:tiny").ran == [], "and nothing was taken away"


def test_a_build_that_was_killed_holds_nothing(doit: Run, project: Path, write_release: Write) -> None:
    path = write_release(**QUICK)
    held = (
        "import sys, time; from pathlib import Path; from builder.stages import Workspace, hold;"
        "from builder.manifest import load_manifest\n"
        "with hold(Workspace(load_manifest(Path(sys.argv[1])), Path('build/tiny'))): print(flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", held, str(path)]
    with subprocess.Popen(command, cwd=project, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=-1) as other:
        assert other.stdout and other.stdout.readline()
        assert f"by process {other.pid} on " in doit("plan:tiny").err
        other.kill()
    assert f"process {other.pid} on " in (project / "build" / "tiny" / ".held").read_text()
    assert doit("plan:tiny").code == 0


# ------------------------------------------------------------------------------------------------ space given back


def count_bytes(folder: Path) -> int:
    """What a folder takes on the disk, files with several names counted once."""
    return sum({path.stat().st_ino: path.stat().st_blocks for path in [folder, *folder.rglob("*")]}.values()) * 512


def show_kilobytes(told: test_graph.Told) -> float:
    sizes = re.findall(r"\(([\d.]+) (B|kB|MB)\)$", told.out, flags=re.M)
    return sum(float(number) * {"B": 0.001, "kB": 1, "MB": 1000}[unit] for number, unit in sizes)


def test_clean_gives_the_disk_back_and_keeps_lock_and_base(doit: Run, project: Path, write_release: Write) -> None:
    path = write_release(perplexity=None)
    releases, lock = path.parent, next(stage for stage in STAGES if stage.name == "lock")
    run_stage(build(path, project / "build" / "tiny"), lock)
    kept = {path: path.read_bytes() for path in releases.rglob("*") if path.is_file()}
    taken = count_bytes(project / "build" / "tiny")
    planned = doit("clean", "--dry-run", "release:tiny")
    assert re.search(r"^assemble:tiny: would remove \S+/assemble.json, build/tiny/artifact \(", planned.out, flags=re.M)
    assert show_kilobytes(planned) == pytest.approx(taken / 1000, rel=0.01, abs=10)
    assert doit("assemble:tiny").ran == [], "nothing was removed"
    done = doit("clean", "release:tiny")
    assert done.code == 0
    assert show_kilobytes(done) == pytest.approx(show_kilobytes(planned), rel=0.01)
    assert list((project / "build").iterdir()) == []
    assert {path: path.read_bytes() for path in releases.rglob("*") if path.is_file()} == kept
    assert kept.keys() >= {releases / "tiny.lock.json", releases / "base" / WEIGHTS}
    assert doit("clean", "release:tiny").out == ""
    again = run_stage(build(path, project / "build" / "tiny"), lock)
    assert again == ("lock: every file of the payload is the same, bit for bit",)


def test_a_step_alone_can_be_cleaned_and_is_repeated(doit: Run, project: Path, write_release: Write) -> None:
    write_release(**QUICK)
    doit("assemble:tiny")
    assert doit("clean", "assemble:tiny").out.startswith("assemble:tiny: removed ")
    assert not (project / "build" / "tiny" / "artifact").exists()
    assert doit("assemble:tiny").ran[-1] == "assemble"


def test_what_lies_behind_a_link_is_not_removed(doit: Run, project: Path, write_release: Write) -> None:
    write_release(**QUICK)
    doit("quantize:tiny")
    parts, elsewhere = project / "build" / "tiny" / "parts", project / "elsewhere"
    parts.rename(elsewhere)
    parts.symlink_to(elsewhere)
    before = sorted(elsewhere.iterdir())
    told = doit("clean", "release:tiny")
    assert (
        told.err
        == f"""\
ERROR: parts is a link to {elsewhere}, where nothing is removed
  in build/tiny/parts
  fix: empty the place it leads to yourself, and remove the link
"""
    )
    assert sorted(elsewhere.iterdir()) == before


def test_commands_that_would_do_nothing_or_too_much_say_what_to_do_instead(
    doit: Run, project: Path, write_release: Write
) -> None:
    write_release()
    for command in (["clean"], ["clean", "--clean-all"], ["clean", "quantize"]):
        told = doit(*command)
        assert told.code == 3
        assert (
            told.err
            == """\
ERROR: `doit clean` takes a release, or one step of a release
  in the command line
  fix: doit clean release:NAME, or doit clean card:NAME; --dry-run only says what would go
"""
        )
    assert "did you mean release:tiny?" in doit("clean", "release:tyni").err
    assert (
        doit("forget", "card:tiny").err
        == """\
ERROR: `doit forget` has nothing to change: what is done is known from build/NAME/receipts alone
  in the command line
  fix: delete a receipt to repeat its step; `doit clean STEP:NAME` takes away what the step left as well
"""
    )


# ------------------------------------------------------------------------------------------------ hidden states


def make_rows(*lengths: int) -> list[Row]:
    return [Row(torch.randn(1, length, 8).to(torch.bfloat16), []) for length in lengths]


def test_hidden_states_come_back_as_they_were_saved(tmp_path: Path) -> None:
    rows = make_rows(3, 5)
    saved = SavedStates(tmp_path, 0, "key", every_s=0.0)
    saved.keep(rows, 1, {"a": {"input": 0.1}})
    wanted = [row.hidden.clone() for row in rows]
    rows[0].hidden += 1  # the copy is not the row's own
    again = make_rows(3, 5)
    assert SavedStates(tmp_path, 0, "key", 60).restore(again) == (1, {"a": {"input": 0.1}})
    assert all(torch.equal(row.hidden, hidden) for row, hidden in zip(again, wanted, strict=True))
    saved.keep(rows, 2, {})
    assert SavedStates(tmp_path, 0, "key", 60).restore(again)[0] == 2
    assert len(list(tmp_path.glob("*.safetensors"))) == 1, "older states are dropped"
    saved.drop()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["torn", "altered", "foreign", "gone", "note torn"])
def test_hidden_states_that_are_torn_or_foreign_are_not_used(tmp_path: Path, damage: str) -> None:
    SavedStates(tmp_path, 0, "key", every_s=0.0).keep(make_rows(3), 1, {})
    (states,), (note,) = tmp_path.glob("*.safetensors"), tmp_path.glob("*.json")
    rows = make_rows(3)
    before = rows[0].hidden.clone()
    if damage == "torn":
        os.truncate(states, states.stat().st_size - 1)
    elif damage == "altered":
        flip_byte(states)
    elif damage == "gone":
        states.unlink()
    elif damage == "note torn":
        os.truncate(note, note.stat().st_size - 20)
    key = "another" if damage == "foreign" else "key"
    assert SavedStates(tmp_path, 0, key, 60).restore(rows) == (0, {})
    assert torch.equal(rows[0].hidden, before)


def test_states_killed_between_the_two_files_leave_those_before_them_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import builder.worker

    saved = SavedStates(tmp_path, 0, "key", every_s=0.0)
    rows = make_rows(3)
    saved.keep(rows, 1, {})

    def be_killed(*_: Any) -> None:
        raise InterruptedError

    monkeypatch.setattr(builder.worker, "write_receipt", be_killed)
    with pytest.raises(InterruptedError):
        saved.keep(make_rows(3), 2, {})
    again = make_rows(3)
    assert SavedStates(tmp_path, 0, "key", 60).restore(again)[0] == 1
    assert torch.equal(again[0].hidden, rows[0].hidden)


def test_writing_states_takes_at_most_a_twentieth_of_the_time(tmp_path: Path) -> None:
    saved = SavedStates(tmp_path, 0, "key", every_s=0.001)
    rows, started, written = make_rows(2000, 2000), time.monotonic(), []
    while time.monotonic() - started < 1:
        before = saved.writing
        saved.keep(rows, len(written), {})
        if saved.writing is not None and saved.writing is not before:
            written.append(saved.writing)
        time.sleep(0.001)
    saved.drop()
    assert len(written) >= 2
    assert sum(writing.result() for writing in written[:-1]) < 0.05 * (time.monotonic() - started)


@needs_root
def test_a_full_disk_is_told_when_states_are_kept_the_next_time(tmp_path: Path) -> None:
    with mount(tmp_path / "small", "-t", "tmpfs", "-o", "size=64k", "none"):
        saved = SavedStates(tmp_path / "small", 0, "key", every_s=0.001)
        rows = make_rows(10_000)
        time.sleep(0.002)
        saved.keep(rows, 1, {})
        with pytest.raises(BuildError, match="no space left while writing block-00000"):
            for _ in range(1000):
                time.sleep(0.01)
                saved.keep(rows, 2, {})
        assert not list((tmp_path / "small").iterdir())
