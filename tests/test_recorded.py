"""A release that has a lock is made from its magnitudes, wherever it is built; those that are measured are compared."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from conftest import build, release_writer

from builder.calibration import choose_rows
from builder.errors import BuildError, CalibrationError
from builder.files import digest, sha256_file, write_json
from builder.lock import FORMAT, Change, digest_payload, read_lock
from builder.machine_class import describe_machine
from builder.manifest import load_manifest
from builder.recorded import (
    Circumstances,
    Deviation,
    describe_deviations,
    list_deviations,
    require_agreement,
)
from builder.stages import STAGES, Workspace, is_current, run_stage
from builder.stages.relock import relock
from builder.stages.reproduce import reproduce

pytestmark = pytest.mark.xdist_group("modelopt")

LOOKS = ("verify", "perplexity")  # stages that take a while and change nothing
SAMPLES = {"calibration.samples": 3, "perplexity": None}
LINEAR = "model.layers.1.mlp.down_proj"
LOCK, BUILD, MANIFEST = Path("releases/tiny.lock.json"), Path("build"), Path("releases/tiny.yaml")
RENEW = "or release what is measured here as a new one: doit relock:tiny"


# ------------------------------------------------------------------------------------------------ tables


def measure(weight: float, value: float) -> dict[str, dict[str, str]]:
    return {"q_proj": {"weight": weight.hex(), "input": value.hex()}}


@pytest.mark.parametrize(
    ("found", "largest"),
    [
        (measure(0.5, 3.0), 0.25),
        (measure(0.5, 5.0), 0.25),
        (measure(0.25, 4.0), math.inf),
        (measure(0.5, math.nan), math.inf),
        (measure(0.5, math.inf), math.inf),
        (measure(0.5, -4.0), math.inf),
        (measure(0.5, 0.0), math.inf),
        ({}, math.inf),
        ({"q_proj": {"weight": (0.5).hex()}}, math.inf),
        (measure(0.5, 4.0) | {"k_proj": {"input": (1.0).hex()}}, math.inf),
    ],
)
def test_tables_differ_by_their_worst_input_and_in_nothing_else(
    found: dict[str, dict[str, str]], largest: float
) -> None:
    assert list_deviations(measure(0.5, 4.0), found)[0].relative == largest
    assert list_deviations(found, measure(0.5, 4.0))
    assert list_deviations(measure(0.5, 4.0), measure(0.5, 4.0)) == []


def test_keys_and_values_may_differ_as_inputs_may() -> None:
    one, other = ({"self_attn": {"key": key.hex(), "value": (3.0).hex()}} for key in (2.0, 2.25))
    assert list_deviations(one, other) == [Deviation("self_attn", "key", 2.0, 2.25)]
    assert describe_deviations(one, list_deviations(one, other)) == (
        "calibrated here, 1 of 2 input magnitudes differ from the lock's, by 12.50 % at most at self_attn (2.25 here, "
        "2.0 in the lock); the lock's make the bytes"
    )


TORCH = Change("torch", "2.12.0", "2.13.0", 1, "its arithmetic makes the weights")
MODELOPT = Change("nvidia-modelopt", "0.46.0", "0.47.0", 1, "its arithmetic makes the weights")


@pytest.mark.parametrize(
    ("found", "arithmetic", "changes", "classes", "what", "cause"),
    [
        (
            measure(0.5, 4.5),
            "exact",
            [MODELOPT, TORCH],
            ([], []),
            "the largest input of q_proj is 4.5 here, and 4.0 in the lock",
            "torch is 2.13.0, and was 2.12.0: its arithmetic makes the weights. Install the locked versions (`doit "
            f"pin:tiny` says how), {RENEW}",
        ),
        (
            measure(0.25, 4.5),
            "native",
            [],
            (["A"], ["A"]),
            "the largest weight of q_proj is 0.25 here, and 0.5 in the lock; 1 more differ",
            "the lock was changed, for the base is the locked one. Restore it from version control, " + RENEW,
        ),
        (
            measure(0.5, 4.0) | {"k_proj": {"input": (1.0).hex()}},
            "exact",
            [],
            ([], []),
            "the largest input of k_proj is 1.0 here, and the lock has none",
            "the builder's code measures something else than it did. Use the one of the lock, " + RENEW,
        ),
        (
            {"q_proj": {"weight": (0.5).hex()}},
            "exact",
            [],
            ([], []),
            "the lock has a largest input of q_proj, 4.0, and none is measured here",
            "the builder's code measures something else than it did. Use the one of the lock, " + RENEW,
        ),
        (
            measure(0.5, 4.5),
            "native",
            [],
            (["A"], ["B"]),
            "the largest input of q_proj is 4.5 here, and 4.0 in the lock",
            "native arithmetic on B instead of A. calibration.arithmetic: exact gives the same magnitudes on every "
            f"machine, {RENEW}",
        ),
    ],
    ids=["versions", "a weight", "one too many", "one too few", "another machine"],
)
def test_an_error_names_the_worst_magnitude_both_values_and_the_likely_cause(
    found: dict[str, dict[str, str]],
    arithmetic: str,
    changes: list[Change],
    classes: tuple[list[str], list[str]],
    what: str,
    cause: str,
) -> None:
    deviations = list_deviations(measure(0.5, 4.0), found)
    with pytest.raises(CalibrationError) as caught:
        require_agreement(LOCK, deviations, Circumstances(arithmetic, changes, *classes, publishes=True), 0.05)
    assert (caught.value.what, caught.value.fix) == (what, f"likely cause: {cause}")


# ------------------------------------------------------------------------------------------------ releases


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with `releases` and the finished `build` of a release, for each arithmetic; not to be changed."""
    folders = {}
    for arithmetic in ("exact", "native"):
        folders[arithmetic] = tmp_path_factory.mktemp(arithmetic)
        write = release_writer(folders[arithmetic] / "releases")
        manifest = write(**SAMPLES, **{"calibration.arithmetic": arithmetic})
        build(manifest, folders[arithmetic] / "build" / "tiny", "card", without=LOOKS)
    return folders


@pytest.fixture
def enter(originals: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a copy of one of them, build and all, the working directory."""

    def do(arithmetic: str) -> None:
        monkeypatch.delenv("EXECUTOR", raising=False)
        shutil.copytree(originals[arithmetic], tmp_path / "copy")
        monkeypatch.chdir(tmp_path / "copy")
        release()  # its files are others to the system, though not to whoever reads them

    return do


def edit_lock(change: Callable[[dict[str, Any]], None]) -> None:
    """Change the lock, which then vouches for what is in it now."""
    lock = json.loads(LOCK.read_text("utf-8"))
    change(lock)
    lock.pop("lock_sha256")
    lock["payload_sha256"] = digest_payload(lock["payload"])
    write_json(LOCK, lock | {"lock_sha256": digest(lock)})


def read_input() -> float:
    return float.fromhex(json.loads(LOCK.read_text("utf-8"))["amax"][LINEAR]["input"])


def set_input(value: float) -> None:
    edit_lock(lambda lock: lock["amax"][LINEAR].update(input=value.hex()))


def make_others(factor: float) -> None:
    """Make the lock that of another machine, which measured one input otherwise."""
    set_input(read_input() * factor)
    with pytest.raises(BuildError):
        reproduce(LOCK, BUILD, tell=lambda line: None)  # which makes the files of these magnitudes
    rebuilt = BUILD / "_reproduced" / "tiny" / "artifact"

    def take_over(lock: dict[str, Any]) -> None:
        lock["machine_classes"] = ["x86_64, SSE"]
        for name, entry in lock["payload"].items():
            entry["sha256"] = sha256_file(rebuilt / name)

    edit_lock(take_over)
    shutil.rmtree(BUILD / "_reproduced")


@dataclass
class Told:
    """What a build did, and what it said."""

    ran: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def release() -> Told:
    """What `doit release:tiny` does: every stage that is not current."""
    told = Told()
    workspace = open_workspace()
    for stage in STAGES:
        if stage.name not in LOOKS and not is_current(workspace, stage):
            told.ran.append(stage.name)
            told.lines += run_stage(workspace, stage)
    return told


def open_workspace() -> Workspace:
    return Workspace(load_manifest(MANIFEST), BUILD / "tiny")


def fail_to_release() -> str:
    with pytest.raises(BuildError) as caught:
        release()
    return str(caught.value)


def assert_locked() -> None:
    """The artifact is the lock's payload, and carries the lock."""
    lock, artifact = read_lock(LOCK), BUILD / "tiny" / "artifact"
    assert lock is not None
    assert {name: sha256_file(artifact / name) for name in lock["payload"]} == {
        name: file["sha256"] for name, file in lock["payload"].items()
    }
    assert json.loads((artifact / "attestations" / "lock.json").read_text("utf-8")) == lock


def test_exact_arithmetic_comes_to_the_magnitudes_of_the_lock(enter: Callable[[str], None]) -> None:
    enter("exact")
    lock = LOCK.read_bytes()
    assert release() == Told(), "what was just built is current, though the lock came after it was calibrated"
    shutil.rmtree(BUILD)
    told = release()
    assert "calibrated here, all 28 input magnitudes are the lock's" in told.lines
    assert LOCK.read_bytes() == lock and release() == Told()
    assert json.loads(lock)["machine_classes"] == [], "under exact arithmetic they decide nothing"
    assert open_workspace().circumstances("calibrate")["machines"] == [describe_machine("cpu")]


def test_the_last_bit_of_a_magnitude_is_noticed_under_exact_arithmetic(enter: Callable[[str], None]) -> None:
    enter("exact")
    was = read_input()
    other = math.nextafter(was, math.inf)
    set_input(other)
    lock = LOCK.read_bytes()
    told = fail_to_release()
    assert told.startswith(
        f"the largest input of {LINEAR} is {was} here, and {other} in the lock\n"
        f'  in {LOCK}: amax["{LINEAR}"].input\n'
        "  fix: likely cause: "
    )
    assert "delete" not in told and LOCK.read_bytes() == lock


def test_versions_that_differ_are_the_likely_cause(enter: Callable[[str], None]) -> None:
    enter("exact")
    set_input(read_input() * 1.5)
    edit_lock(lambda lock: lock["versions"].update(torch="1.0", numpy="1.0"))
    told = fail_to_release()
    assert f"  fix: likely cause: torch is {version('torch')}, and was 1.0: its arithmetic makes the weights. " in told
    assert "numpy" not in told and told.endswith(RENEW)


def test_versions_that_differ_and_change_nothing_are_no_hindrance(enter: Callable[[str], None]) -> None:
    enter("exact")
    edit_lock(lambda lock: lock["versions"].update(torch="1.0"))
    lock = LOCK.read_bytes()
    shutil.rmtree(BUILD)
    release()
    assert LOCK.read_bytes() == lock
    assert_locked()


def test_a_release_on_another_machine_ends_with_the_payload_of_the_lock(enter: Callable[[str], None]) -> None:
    """Native arithmetic, where one input is measured differently there: the line says so, and the lock stays."""
    enter("native")
    was = read_input()
    make_others(1.0078125)
    lock = LOCK.read_bytes()
    shutil.rmtree(BUILD)
    told = release()
    text = (
        f"calibrated here, 1 of 28 input magnitudes differ from the lock's, by 0.78 % at most at {LINEAR} "
        f"({was} here, {was * 1.0078125} in the lock); the lock's make the bytes"
    )
    assert [line for line in told.lines if "calibrated" in line] == [text]
    assert "lock: every file of the payload is the same, bit for bit" in told.lines
    assert LOCK.read_bytes() == lock
    assert_locked()
    assert release() == Told(), "and that is all there is to do"
    assert open_workspace().facts("calibrate")["machine_classes"] == ["x86_64, SSE"], "those that made the magnitudes"
    found = open_workspace().circumstances("calibrate")["against_lock"]
    assert (found["module"], found["kind"], found["found"], found["locked"]) == (LINEAR, "input", was, was * 1.0078125)
    assert text in (BUILD / "tiny" / "artifact" / "README.md").read_text("utf-8").replace("\\", "")


def test_a_lock_that_version_control_puts_back_is_noticed(enter: Callable[[str], None]) -> None:
    """Of another machine, in a build folder whose magnitudes are this machine's own."""
    enter("native")
    own = LOCK.read_bytes()
    make_others(1.0078125)
    assert release().ran == ["calibrate", "quantize", "assemble", "lock", "card"]
    assert_locked()
    LOCK.write_bytes(own)
    assert release().ran == ["calibrate", "quantize", "assemble", "lock", "card"]
    assert_locked()
    assert LOCK.read_bytes() == own and release() == Told()


def test_magnitudes_that_differ_by_more_than_native_arithmetic_does_are_refused(enter: Callable[[str], None]) -> None:
    enter("native")
    was = read_input()
    make_others(1.125)
    lock = LOCK.read_bytes()
    assert fail_to_release() == (
        f"the largest input of {LINEAR} is {was} here, and {was * 1.125} in the lock\n"
        f'  in {LOCK}: amax["{LINEAR}"].input\n'
        f"  fix: likely cause: native arithmetic on {describe_machine('cpu')} instead of x86_64, SSE. "
        f"calibration.arithmetic: exact gives the same magnitudes on every machine, {RENEW}"
    )
    assert LOCK.read_bytes() == lock


def test_the_magnitude_of_a_weight_may_not_differ_under_any_arithmetic(enter: Callable[[str], None]) -> None:
    enter("native")
    edit_lock(lambda lock: lock["amax"][LINEAR].update(weight=(1.0).hex()))
    told = fail_to_release()
    assert told.startswith(f"the largest weight of {LINEAR} is ") and " here, and 1.0 in the lock\n" in told


def test_a_magnitude_that_a_lock_lacks_is_refused(enter: Callable[[str], None]) -> None:
    enter("exact")
    edit_lock(lambda lock: lock["amax"].pop(LINEAR))
    told = fail_to_release()
    assert told.startswith(f"the largest input of {LINEAR} is ") and "and the lock has none; 1 more differ\n" in told


# ------------------------------------------------------------------------------------------------ other inputs


def flip_last_bit(path: Path) -> None:
    """The last bit of the last weight in a file: the lowest of a bfloat16."""
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        low = file.read(1)[0]
        file.seek(-2, os.SEEK_END)
        file.write(bytes([low ^ 1]))


def test_one_flipped_last_bit_of_one_weight_is_noticed(enter: Callable[[str], None]) -> None:
    enter("exact")
    flip_last_bit(Path("releases/base/model-00002-of-00002.safetensors"))
    told = fail_to_release()
    assert told.startswith("model-00002-of-00002.safetensors of the base model is not the locked one (sha256 ")
    assert told.endswith(
        "  fix: restore model-00002-of-00002.safetensors, or release from the base as it is now: doit relock:tiny"
    )


def test_one_changed_row_is_noticed(enter: Callable[[str], None]) -> None:
    enter("exact")
    file, base = Path("releases/calibration.jsonl"), Path("releases/base")
    rows, used = file.read_text("utf-8").splitlines(keepends=True), read_token_ids()
    for index, row in enumerate(rows):
        changed = row.replace(" the ", " a ", 1)
        file.write_text("".join([*rows[:index], changed, *rows[index + 1 :]]), "utf-8")
        if choose_rows(load_manifest(MANIFEST), base).digest != used:
            break
    told = release()
    keys = "inputs.calibration_sha256, inputs.token_ids_sha256"
    assert f"lock: rewritten, for {keys} changed since the last build" in told.lines
    assert read_token_ids() != used


def read_token_ids() -> str:
    digest: str = json.loads(LOCK.read_text("utf-8"))["inputs"]["token_ids_sha256"]
    return digest


def test_one_changed_seed_is_noticed(enter: Callable[[str], None]) -> None:
    enter("exact")
    text = MANIFEST.read_text("utf-8")
    MANIFEST.write_text(text.replace("calibration:\n", "calibration:\n  seed: 1\n"), "utf-8")
    assert (
        "lock: rewritten, for what.calibration.seed, inputs.token_ids_sha256 changed since the last build"
        in release().lines
    )


def test_another_arithmetic_is_another_release(enter: Callable[[str], None]) -> None:
    enter("native")
    make_others(1.0078125)
    text = MANIFEST.read_text("utf-8")
    MANIFEST.write_text(text.replace("arithmetic: native", "arithmetic: exact"), "utf-8")
    told = release()
    assert "lock: rewritten, for what.calibration.arithmetic changed since the last build" in told.lines
    assert not [line for line in told.lines if line.startswith("calibrated here")], "there is nothing to compare with"
    assert release() == Told()


def test_a_lock_from_before_exact_arithmetic_is_kept_by_a_manifest_that_says_native(
    enter: Callable[[str], None],
) -> None:
    enter("native")
    make_others(1.0078125)

    def age(lock: dict[str, Any]) -> None:
        del lock["what"]["calibration"]["arithmetic"]
        lock |= {"lock": "1.1", "versions": lock["versions"] | {"numpy": "1.0"}}

    edit_lock(age)
    old = json.loads(LOCK.read_text("utf-8"))
    told = release()
    assert f"lock: every file of the payload is the same, bit for bit; rewritten in format {FORMAT}" in told.lines
    new = read_lock(LOCK)
    assert new is not None
    assert {key for key in new if new[key] != old[key]} == {"lock", "what", "lock_sha256"}
    assert_locked()


def test_a_lock_from_before_exact_arithmetic_is_rewritten_for_a_manifest_that_says_nothing(
    enter: Callable[[str], None],
) -> None:
    enter("exact")

    def age(lock: dict[str, Any]) -> None:
        del lock["what"]["calibration"]["arithmetic"]
        lock |= {"lock": "1.1", "machine_classes": ["x86_64, AVX512"]}

    edit_lock(age)
    assert "lock: rewritten, for what.calibration.arithmetic changed since the last build" in release().lines
    assert read_lock(LOCK) == json.loads((BUILD / "tiny/artifact/attestations/lock.json").read_text("utf-8"))


# ------------------------------------------------------------------------------------------------ relock


def test_a_publisher_may_take_what_is_measured_now(enter: Callable[[str], None]) -> None:
    enter("native")
    own = LOCK.read_bytes()
    make_others(1.125)
    told: list[str] = []
    text = relock(MANIFEST, BUILD, tell=told.append)
    num_files = len(json.loads(own)["payload"])
    assert text == f"rewritten; changed: the magnitudes of 1 of 28 modules, 1 of {num_files} files of the payload"
    assert f"  lock: {text}" in told
    assert LOCK.read_bytes() == own, "this machine made it"
    assert_locked()
    assert release() == Told()


def test_a_lock_that_is_written_again_names_the_machine_that_wrote_it(enter: Callable[[str], None]) -> None:
    """Though it measured what the lock before it says of another."""
    enter("native")
    edit_lock(lambda lock: lock.update(machine_classes=["x86_64, SSE"]))
    assert release().ran == ["calibrate", "lock", "card"]
    relock(MANIFEST, BUILD, tell=lambda line: None)
    assert json.loads(LOCK.read_text("utf-8"))["machine_classes"] == [describe_machine("cpu")]


def test_a_publisher_may_release_from_another_base(enter: Callable[[str], None]) -> None:
    enter("exact")
    flip_last_bit(Path("releases/base/model-00002-of-00002.safetensors"))
    assert relock(MANIFEST, BUILD, tell=lambda line: None).startswith("rewritten; changed: inputs.base, ")
    assert_locked()
    assert release() == Told()


def test_a_damaged_lock_is_written_again_from_a_build(enter: Callable[[str], None]) -> None:
    enter("exact")
    own = LOCK.read_bytes()
    LOCK.write_bytes(b"<<<<<<< HEAD\n" + own)
    assert fail_to_release() == (
        f"tiny.lock.json is not a lock\n  in {LOCK.absolute()}\n"
        "  fix: restore it from version control, or write it again from a build: doit relock:tiny"
    )
    assert relock(MANIFEST, BUILD, tell=lambda line: None) == "rewritten; the one before could not be read"
    assert LOCK.read_bytes() == own


def test_a_relock_that_fails_leaves_the_lock_as_it_is(
    enter: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    enter("native")
    make_others(1.0078125)
    lock = LOCK.read_bytes()
    shutil.rmtree("releases/base")
    with pytest.raises(BuildError):
        relock(MANIFEST, BUILD, tell=lambda line: None)
    assert LOCK.read_bytes() == lock


def test_nothing_advises_to_delete_what_is_tracked() -> None:
    """A lock is in version control; `doit relock` is the way to another one."""
    for path in (Path(__file__).parents[1] / "builder").rglob("*.py"):
        assert not re.search(r"delete (it|the lock)", path.read_text("utf-8")), path
