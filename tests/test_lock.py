"""The lock holds facts alone, and says what became of them in a rebuild."""

from __future__ import annotations

import copy
import json
import re
import socket
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import build, release_writer

from builder.errors import BuildError, VerifyError
from builder.files import write_json
from builder.lock import (
    Comparison,
    compare_amax,
    compare_lock,
    describe_what,
    digest_payload,
    list_versions,
    make_lock,
    read_lock,
)
from builder.manifest import load_manifest
from builder.stages import Workspace, lock

pytestmark = pytest.mark.xdist_group("modelopt")

UNIT = {"scheme.input_scale": "unit", "calibration": None, "perplexity": None}
HERE, THERE = "x86_64, AVX512", "x86_64, AVX2"
FIX = "restore the pinned versions (make setup), or delete the lock to release this build as a new one"
RESTORE = "restore it from version control, or delete it to lock anew"


def lock_release(manifest: Path, folder: Path) -> Any:
    """Build a release and run its lock stage; returns what the stage says."""
    return lock.STAGE.run(build(manifest, folder))


# -------------------------------------------------------------------------------------- locks of real releases


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """The folders of two builds of one calibrated release, with their locks beside their manifests."""
    folders = []
    for name in ("one", "two"):
        folders.append(tmp_path_factory.mktemp(name))
        manifest = release_writer(folders[-1] / "releases")(**{"shards": len(folders), "calibration.samples": 3})
        assert lock_release(manifest, folders[-1] / "build").circumstances["verdict"] == "first"
    yield folders[0], folders[1]


def read_whole(folder: Path) -> dict[str, Any]:
    found = read_lock(folder / "releases" / "tiny.lock.json")
    assert found is not None
    return found


def test_two_builds_of_a_release_have_the_same_lock_to_the_byte(calibrated: tuple[Path, Path]) -> None:
    one, two = ((folder / "releases" / "tiny.lock.json").read_bytes() for folder in calibrated)
    assert one == two


def test_a_lock_says_nothing_of_when_and_where_it_was_made(calibrated: tuple[Path, Path]) -> None:
    text = (calibrated[0] / "releases" / "tiny.lock.json").read_text("utf-8")
    now = datetime.now(UTC)
    host = f'"{socket.gethostname()}"'
    for circumstance in (
        *(str(calibrated[0]), str(Path.cwd()), tempfile.gettempdir(), host),
        *(now.strftime(form) for form in ("%Y-%m-%d", "%Y%m%d", "%d.%m.%Y")),
        *("in_process", "executor", "shards", "seconds", "identity", "mtime"),
    ):
        assert circumstance not in text, circumstance
    assert not re.search(r"\d\d:\d\d:\d\d", text)
    assert not re.search(r'"/', text), "an absolute path"


def test_a_lock_names_every_input_and_every_file_of_the_payload(calibrated: tuple[Path, Path]) -> None:
    folder, found = calibrated[0], read_whole(calibrated[0])
    artifact = folder / "build" / "artifact"
    assert found["payload"].keys() == {path.name for path in artifact.iterdir()}
    for name, entry in found["payload"].items():
        assert entry["num_bytes"] == (artifact / name).stat().st_size
    assert found["payload_sha256"] == digest_payload(found["payload"])
    assert found["inputs"]["base"].keys() == {path.name for path in (folder / "releases" / "base").iterdir()}
    assert found["inputs"]["num_rows"] == 3
    assert {len(found["inputs"][name]) for name in ("calibration_sha256", "token_ids_sha256")} == {64}
    assert found["what"]["fixes"] == [record["name"] for record in read_facts(folder, "assemble")["fixes"]]
    assert {kind for kinds in found["amax"].values() for kind in kinds} == {"weight", "input"}
    assert len(found["amax"]) == 28
    assert found["versions"] == list_versions()


def read_facts(folder: Path, stage: str) -> Any:
    return Workspace(load_manifest(folder / "releases" / "tiny.yaml"), folder / "build").facts(stage)


def test_the_same_amax_to_the_bit_comes_out_of_the_lock(calibrated: tuple[Path, Path]) -> None:
    assert read_whole(calibrated[0])["amax"] == read_facts(calibrated[0], "calibrate")["amax"]


def test_a_lock_is_read_as_it_was_made(calibrated: tuple[Path, Path], tmp_path: Path) -> None:
    made = read_whole(calibrated[0])
    again = make_lock(
        load_manifest(calibrated[0] / "releases" / "tiny.yaml"),
        fixes=tuple(made["what"]["fixes"]),
        inputs=made["inputs"],
        machine_classes=made["machine_classes"],
        amax=made["amax"],
        payload=made["payload"],
    )
    write_json(tmp_path / "lock.json", again)
    assert read_lock(tmp_path / "lock.json") == again == made
    assert read_lock(tmp_path / "absent.json") is None


def test_a_rebuild_is_equal_and_leaves_the_lock_alone(write_release: Callable[..., Path], tmp_path: Path) -> None:
    manifest = write_release(**UNIT)
    assert lock_release(manifest, tmp_path / "one").lines == ("lock: the first build of this release",)
    path = manifest.with_suffix(".lock.json")
    before, identity = path.read_bytes(), path.stat().st_ino
    outcome = lock_release(manifest, tmp_path / "two")
    assert outcome.circumstances["verdict"] == "equal"
    assert outcome.lines == ("lock: every file of the payload is the same, bit for bit",)
    assert (path.read_bytes(), path.stat().st_ino) == (before, identity)


def test_title_card_and_how_it_is_built_leave_the_lock_as_it_is(
    write_release: Callable[..., Path], tmp_path: Path
) -> None:
    manifest = write_release(**UNIT)
    lock_release(manifest, tmp_path / "build")
    path = manifest.with_suffix(".lock.json")
    before = path.read_bytes()
    write_release(**UNIT, **{"title": "Another title", "card.why": "Because.", "shards": 3, "device": "auto"})
    assert lock_release(manifest, tmp_path / "build").circumstances["verdict"] == "equal"
    path.unlink()
    assert lock_release(manifest, tmp_path / "other").circumstances["verdict"] == "first"
    assert path.read_bytes() == before


def test_another_scheme_replaces_the_lock(write_release: Callable[..., Path], tmp_path: Path) -> None:
    manifest = write_release(**UNIT)
    lock_release(manifest, tmp_path / "build")
    path = manifest.with_suffix(".lock.json")
    before = read_lock(path)
    write_release(**UNIT, **{"scheme.layout": "modelopt"})
    outcome = lock_release(manifest, tmp_path / "build")
    assert outcome.circumstances["verdict"] == "replaced"
    assert outcome.lines == ("lock: written anew, for what.fixes, what.scheme changed since the last one",)
    after = read_lock(path)
    assert before and after and before["payload_sha256"] != after["payload_sha256"]
    assert after["what"]["scheme"][0]["layout"] == "modelopt"


def test_another_licence_text_is_another_input(write_release: Callable[..., Path], tmp_path: Path) -> None:
    manifest = write_release(**UNIT, **{"base.license_files": {"psf-2.0": "psf.txt"}})
    (manifest.parent / "psf.txt").write_text("one")
    (manifest.parent / "base" / "LICENSE").unlink()
    lock_release(manifest, tmp_path / "build")
    (manifest.parent / "psf.txt").write_text("another")
    outcome = lock_release(manifest, tmp_path / "build")
    assert outcome.lines == ("lock: written anew, for inputs.license_files changed since the last one",)


def test_a_payload_that_is_not_the_locked_one_stops_the_build(
    write_release: Callable[..., Path], tmp_path: Path
) -> None:
    manifest = write_release(**UNIT)
    lock_release(manifest, tmp_path / "build")
    path = manifest.with_suffix(".lock.json")
    edited = json.loads(path.read_text())
    for name in ("NOTICE", "config.json"):
        edited["payload"][name]["sha256"] = "0" * 64
    edited["payload_sha256"] = digest_payload(edited["payload"])
    write_json(path, edited)
    before = path.read_bytes()
    with pytest.raises(VerifyError) as caught:
        lock_release(manifest, tmp_path / "build")
    num_files = len(edited["payload"])
    assert str(caught.value) == (
        f"NOTICE is not what the lock says (2 of {num_files} files differ; inputs and versions are the same)\n"
        f"  in {path}\n"
        f"  fix: {FIX}"
    )
    assert path.read_bytes() == before


# ----------------------------------------------------------------------------------------------- comparisons


@pytest.fixture
def locked() -> dict[str, Any]:
    """A lock as short as can be."""
    payload = {
        name: {"sha256": letter * 64, "num_bytes": 1} for name, letter in (("config.json", "c"), ("a.safetensors", "a"))
    }
    return {
        "lock": "1.0",
        "name": "tiny",
        "what": {"scheme": [{"name": "nvfp4"}], "files": {}},
        "inputs": {"base": {"config.json": {"sha256": "e" * 64}}, "num_rows": 8},
        "versions": {"torch": "2.13.0", "python": "3.11.7"},
        "machine_classes": [HERE],
        "amax": {"q_proj": {"weight": (0.5).hex(), "input": (4.0).hex()}},
        "payload": payload,
        "payload_sha256": digest_payload(payload),
    }


def change(locked: dict[str, Any], *files: str, **changes: Any) -> dict[str, Any]:
    """A lock with other contents of some files, and other values of some keys."""
    changed = copy.deepcopy(locked) | changes
    for name in files:
        changed["payload"][name] = {"sha256": "f" * 64, "num_bytes": 1}
    changed["payload_sha256"] = digest_payload(changed["payload"])
    return changed


def measure(weight: float, value: float) -> dict[str, dict[str, str]]:
    return {"q_proj": {"weight": weight.hex(), "input": value.hex()}}


PATH = Path("releases/tiny.lock.json")


def test_the_first_and_another_release_are_written_and_no_others(locked: dict[str, Any]) -> None:
    assert compare_lock(None, locked, PATH) == Comparison("first", "the first build of this release")
    written = {verdict: Comparison(verdict, "").writes for verdict in ("first", "equal", "replaced", "recalibrated")}
    assert written == {"first": True, "equal": False, "replaced": True, "recalibrated": False}


def test_equal_is_the_payload_whatever_it_was_made_with(locked: dict[str, Any]) -> None:
    new = change(locked, versions={"torch": "9"}, machine_classes=[THERE], amax=measure(0.5, 4.1))
    assert compare_lock(locked, new, PATH).verdict == "equal"


def test_a_manifest_that_changed_is_written_even_if_the_payload_stays(locked: dict[str, Any]) -> None:
    """Else the lock would speak of a manifest that is no more, and a payload that changes later would go unnoticed."""
    new = change(locked, what={"scheme": [{"name": "nvfp4"}], "files": {"packing": "balanced"}})
    comparison = compare_lock(locked, new, PATH)
    assert comparison == Comparison("replaced", "written anew, for what.files changed since the last one")


def test_every_changed_input_is_named(locked: dict[str, Any]) -> None:
    new = change(locked, "a.safetensors", inputs={"base": {}, "calibration_sha256": "x"})
    assert compare_lock(locked, new, PATH).text == (
        "written anew, for inputs.base, inputs.calibration_sha256, inputs.num_rows changed since the last one"
    )


def test_another_class_of_machine_may_measure_inputs_a_little_differently(locked: dict[str, Any]) -> None:
    new = change(locked, "a.safetensors", machine_classes=[THERE], amax=measure(0.5, 4.03125))
    assert compare_lock(locked, new, PATH) == Comparison(
        "recalibrated", f"calibrated on {HERE} and {THERE}: input scales differ by 0.78 % at most"
    )


@pytest.mark.parametrize(
    ("files", "changes"),
    [
        (("a.safetensors",), {"amax": measure(0.5, 4.03125)}),
        (("a.safetensors",), {"machine_classes": [THERE]}),
        (("a.safetensors",), {"machine_classes": [THERE], "amax": measure(0.5, 4.5)}),
        (("a.safetensors",), {"machine_classes": [THERE], "amax": measure(0.51, 4.03125)}),
        (("a.safetensors",), {"machine_classes": [THERE], "amax": {}}),
        (("a.safetensors", "config.json"), {"machine_classes": [THERE], "amax": measure(0.5, 4.03125)}),
    ],
    ids=["same class", "same amax", "far off", "weights differ", "nothing measured", "another config"],
)
def test_nothing_else_may_differ(locked: dict[str, Any], files: tuple[str, ...], changes: dict[str, Any]) -> None:
    with pytest.raises(VerifyError) as caught:
        compare_lock(locked, change(locked, *files, **changes), PATH)
    assert caught.value.what == (
        f"{sorted(files)[0]} is not what the lock says ({len(files)} of 2 files differ; "
        "inputs and versions are the same)"
    )


def test_versions_that_differ_are_named_where_the_payload_does(locked: dict[str, Any]) -> None:
    new = change(locked, "config.json", versions={"torch": "2.14.0", "python": "3.11.7", "numpy": "2.4"})
    with pytest.raises(VerifyError) as caught:
        compare_lock(locked, new, PATH)
    assert str(caught.value) == (
        "config.json is not what the lock says "
        "(1 of 2 files differ; versions differ: torch 2.13.0 -> 2.14.0, numpy None -> 2.4)\n"
        f"  in {PATH}\n"
        f"  fix: {FIX}"
    )


def test_a_file_too_many_is_a_difference(locked: dict[str, Any]) -> None:
    with pytest.raises(VerifyError) as caught:
        compare_lock(locked, change(locked, "NOTICE"), PATH)
    assert caught.value.what.startswith("NOTICE is not what the lock says (1 of 3 files differ; ")


@pytest.mark.parametrize(
    ("new", "largest"),
    [
        (measure(0.5, 4.0), 0.0),
        (measure(0.5, 3.0), 0.25),
        (measure(0.5, 5.0), 0.25),
        (measure(0.25, 4.0), float("inf")),
        (measure(0.5, float("nan")), float("inf")),
        (measure(0.5, 0.0), float("inf")),
        ({}, float("inf")),
        ({"q_proj": {"weight": (0.5).hex()}}, float("inf")),
        (measure(0.5, 4.0) | {"k_proj": {}}, float("inf")),
    ],
)
def test_amax_tables_differ_by_their_worst_input(new: dict[str, dict[str, str]], largest: float) -> None:
    assert compare_amax(measure(0.5, 4.0), new) == largest
    assert (compare_amax(new, measure(0.5, 4.0)) == 0.0) == (largest == 0.0)


# ------------------------------------------------------------------------------------------- what is not a lock


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"payload": {}}', '{"lock": "1.0", "pay'])
def test_what_is_not_a_lock_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tiny.lock.json"
    path.write_text(content)
    with pytest.raises(BuildError) as caught:
        read_lock(path)
    assert str(caught.value) == f"tiny.lock.json is not a lock\n  in {path}\n  fix: {RESTORE}"


def test_a_lock_of_a_later_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.lock.json"
    write_json(path, {"lock": "2.1", "files": {}})
    with pytest.raises(BuildError) as caught:
        read_lock(path)
    assert str(caught.value) == (
        "tiny.lock.json has format 2.1, but this builder knows 1.0\n"
        f"  in {path}\n"
        "  fix: use the builder it was made with, or delete it to lock anew"
    )


def test_a_lock_of_a_later_minor_format_is_read(tmp_path: Path, locked: dict[str, Any]) -> None:
    path = tmp_path / "tiny.lock.json"
    write_json(path, locked | {"lock": "1.7", "more": 1})
    assert read_lock(path) == locked | {"lock": "1.7", "more": 1}


def test_a_lock_that_was_edited_or_lost_a_part_is_refused(tmp_path: Path, locked: dict[str, Any]) -> None:
    path = tmp_path / "tiny.lock.json"
    write_json(path, {key: value for key, value in locked.items() if key not in ("what", "amax")})
    with pytest.raises(BuildError) as caught:
        read_lock(path)
    assert str(caught.value) == f"tiny.lock.json lacks amax, what\n  in {path}\n  fix: {RESTORE}"
    locked["payload"]["config.json"]["sha256"] = "0" * 64
    write_json(path, locked)
    with pytest.raises(BuildError) as caught:
        read_lock(path)
    assert caught.value.what == "tiny.lock.json was edited: its payload_sha256 is not its payload's"


def test_what_is_locked_is_not_what_is_shown(write_release: Callable[..., Path]) -> None:
    what = describe_what(load_manifest(write_release()))
    assert what.keys() == {"manifest", "base", "scheme", "calibration", "fixes", "files", "compatibility"}
