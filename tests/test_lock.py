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
from builder.files import digest, write_json
from builder.lock import (
    FORMAT,
    compare_versions,
    describe_what,
    digest_payload,
    list_versions,
    make_lock,
    read_lock,
    restore_manifest,
    warn_of_format,
    write_constraints,
)
from builder.manifest import load_manifest
from builder.rebuild import Comparison, compare_lock, list_changed, renew_lock, upgrade_lock
from builder.stages import Workspace, lock

pytestmark = pytest.mark.xdist_group("modelopt")

UNIT = {"scheme.input_scale": "unit", "calibration": None, "perplexity": None}
HERE, THERE = "x86_64, AVX512", "x86_64, AVX2"
SCRATCH = "build from scratch: doit clean release:tiny"
INSTALL = "install the locked versions: `doit pin:tiny` says how"
RENEW = "if the change is meant, doit relock:tiny releases this build as a new one"
RESTORE = "restore it from version control, or write it again from a build: doit relock:tiny"


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
        builder=made["builder"],
    )
    write_json(tmp_path / "lock.json", again)
    assert read_lock(tmp_path / "lock.json") == again == made
    assert made["lock"] == FORMAT and made["lock_sha256"]
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
    assert outcome.lines == ("lock: rewritten, for what.fixes, what.scheme changed since the last build",)
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
    assert outcome.lines == ("lock: rewritten, for inputs.license_files changed since the last build",)


def test_a_payload_that_is_not_the_locked_one_stops_the_build(
    write_release: Callable[..., Path], tmp_path: Path
) -> None:
    manifest = write_release(**UNIT)
    lock_release(manifest, tmp_path / "build")
    path = manifest.with_suffix(".lock.json")
    edited = json.loads(path.read_text())
    for name in ("NOTICE", "config.json"):
        edited["payload"][name]["sha256"] = "0" * 64
    write_json(path, seal(edited))
    before = path.read_bytes()
    with pytest.raises(VerifyError) as caught:
        lock_release(manifest, tmp_path / "build")
    num_files = len(edited["payload"])
    assert str(caught.value) == (
        f"NOTICE is not what the lock says (2 of {num_files} files differ; inputs and versions are the same)\n"
        f"  in {path}\n"
        f"  fix: {SCRATCH}; {RENEW}"
    )
    assert path.read_bytes() == before


# ----------------------------------------------------------------------------------------------- comparisons


@pytest.fixture
def locked() -> dict[str, Any]:
    """A lock as short as can be."""
    payload = {
        name: {"sha256": letter * 64, "num_bytes": 1} for name, letter in (("config.json", "c"), ("a.safetensors", "a"))
    }
    made = {
        "lock": FORMAT,
        "name": "tiny",
        "builder": "1",
        "what": {"scheme": [{"name": "nvfp4"}], "files": {}},
        "inputs": {"base": {"config.json": {"sha256": "e" * 64, "num_bytes": 1}}, "num_rows": 8},
        "versions": {"torch": "2.13.0", "python": "3.11.7"},
        "machine_classes": [HERE],
        "amax": {"q_proj": {"weight": (0.5).hex(), "input": (4.0).hex()}},
        "payload": payload,
    }
    return seal(made)


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """A lock that vouches for its content, whatever was done to it."""
    content = {key: value for key, value in content.items() if key != "lock_sha256"}
    content["payload_sha256"] = digest_payload(content["payload"])
    return {**content, "lock_sha256": digest(content)}


def change(locked: dict[str, Any], *files: str, **changes: Any) -> dict[str, Any]:
    """A lock with other contents of some files, and other values of some keys."""
    changed = copy.deepcopy(locked) | changes
    for name in files:
        changed["payload"][name] = {"sha256": "f" * 64, "num_bytes": 1}
    return seal(changed)


def measure(weight: float, value: float) -> dict[str, dict[str, str]]:
    return {"q_proj": {"weight": weight.hex(), "input": value.hex()}}


PATH = Path("releases/tiny.lock.json")


def test_the_first_and_another_release_are_written_and_no_others(locked: dict[str, Any]) -> None:
    assert compare_lock(None, locked, PATH) == Comparison("first", "the first build of this release")
    written = {name for name in ("first", "equal", "replaced", "upgraded", "renewed") if Comparison(name, "").writes}
    assert written == {"first", "replaced", "upgraded", "renewed"}


def test_equal_is_the_payload_whatever_it_was_made_with(locked: dict[str, Any]) -> None:
    new = change(locked, versions={"torch": "9"}, machine_classes=[THERE], amax=measure(0.5, 4.1))
    assert compare_lock(locked, new, PATH).verdict == "equal"


def test_a_manifest_that_changed_is_written_even_if_the_payload_stays(locked: dict[str, Any]) -> None:
    """Else the lock would speak of a manifest that is no more, and a payload that changes later would go unnoticed."""
    new = change(locked, what={"scheme": [{"name": "nvfp4"}], "files": {"packing": "balanced"}})
    comparison = compare_lock(locked, new, PATH)
    assert comparison == Comparison("replaced", "rewritten, for what.files.packing changed since the last build")


def test_every_changed_input_is_named(locked: dict[str, Any]) -> None:
    new = change(locked, "a.safetensors", inputs={"base": {}, "calibration_sha256": "x"})
    assert compare_lock(locked, new, PATH).text == (
        "rewritten, for inputs.base, inputs.calibration_sha256, inputs.num_rows changed since the last build"
    )


@pytest.mark.parametrize(
    "changes",
    [{}, {"machine_classes": [THERE]}, {"machine_classes": [THERE], "amax": measure(0.5, 4.03125)}],
    ids=["nothing else", "another machine", "other magnitudes there"],
)
def test_the_payload_of_the_same_release_and_inputs_may_not_differ(
    locked: dict[str, Any], changes: dict[str, Any]
) -> None:
    """Other magnitudes are no excuse: where the release and its inputs are the lock's, so are the magnitudes."""
    with pytest.raises(VerifyError) as caught:
        compare_lock(locked, change(locked, "a.safetensors", **changes), PATH)
    what = "a.safetensors is not what the lock says (1 of 2 files differ; inputs and versions are the same)"
    assert str(caught.value) == f"{what}\n  in {PATH}\n  fix: {SCRATCH}; {RENEW}"


def test_versions_that_differ_are_named_where_the_payload_does(locked: dict[str, Any]) -> None:
    new = change(locked, "config.json", versions={"torch": "2.14.0", "python": "3.11.7", "numpy": "2.4"})
    with pytest.raises(VerifyError) as caught:
        compare_lock(locked, new, PATH)
    assert str(caught.value) == (
        "config.json is not what the lock says "
        "(1 of 2 files differ; versions differ: torch 2.13.0 -> 2.14.0, numpy None -> 2.4)\n"
        f"  in {PATH}\n"
        f"  fix: {INSTALL}; {RENEW}"
    )


def test_a_file_too_many_is_a_difference(locked: dict[str, Any]) -> None:
    with pytest.raises(VerifyError) as caught:
        compare_lock(locked, change(locked, "NOTICE"), PATH)
    assert caught.value.what.startswith("NOTICE is not what the lock says (1 of 3 files differ; ")


def test_another_builder_is_named_as_versions_are(locked: dict[str, Any]) -> None:
    with pytest.raises(VerifyError) as caught:
        compare_lock(locked, change(locked, "config.json", builder="2"), PATH)
    assert "; versions differ: the builder's number 1 -> 2)" in str(caught.value)


def test_a_lock_that_is_written_again_says_what_became_another(locked: dict[str, Any]) -> None:
    assert renew_lock(None, locked) == Comparison("renewed", "rewritten; the one before could not be read")
    assert renew_lock(locked, locked) == Comparison("renewed", "rewritten, and says what it said")
    new = change(locked, "a.safetensors", versions={"torch": "2.14.0", "python": "3.11.7"}, amax=measure(0.5, 4.5))
    assert renew_lock(locked, new).text == (
        "rewritten, with other values of torch 2.13.0 -> 2.14.0, the magnitudes of 1 of 1 modules, "
        "1 of 2 files of the payload"
    )


# ------------------------------------------------------------------------------------------------ arithmetic


def test_a_lock_from_before_there_was_exact_arithmetic_is_of_native(locked: dict[str, Any]) -> None:
    locked["what"]["calibration"] = {"path": "rows", "samples": 3}
    exact, native = (
        {**locked["what"], "calibration": {"path": "elsewhere", "samples": 3, "arithmetic": arithmetic}}
        for arithmetic in ("exact", "native")
    )
    assert list_changed(locked, native, locked["inputs"]) == []
    assert list_changed(locked, exact, locked["inputs"]) == ["what.calibration.arithmetic"]
    assert list_changed(locked | {"what": {"calibration": None}}, {"calibration": None}, locked["inputs"]) == []


def test_a_lock_in_a_later_format_keeps_the_versions_that_its_magnitudes_were_measured_with(
    tmp_path: Path, locked: dict[str, Any]
) -> None:
    old = change(locked, lock="1.1", versions={"torch": "2.12.0"}, builder="0")
    upgraded = upgrade_lock(old, locked)
    assert upgraded == seal(locked | {"versions": {"torch": "2.12.0"}, "builder": "0"})
    write_json(tmp_path / "lock.json", upgraded)
    assert read_lock(tmp_path / "lock.json") == upgraded


def test_a_release_restored_from_such_a_lock_is_of_native_arithmetic(calibrated: tuple[Path, Path]) -> None:
    path, old = calibrated[0] / "releases" / "tiny.lock.json", read_whole(calibrated[0])
    assert old["what"]["calibration"].pop("arithmetic") == "exact"
    restored = restore_manifest(old, path, how={}).release.calibration
    assert restored and restored.arithmetic == "native"


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
        f"tiny.lock.json has format 2.1, but this builder knows {FORMAT}\n"
        f"  in {path}\n"
        "  fix: use the builder it was made with, or write it again from a build: doit relock:tiny"
    )


def test_a_lock_of_a_later_minor_format_is_read_and_warned_of(tmp_path: Path, locked: dict[str, Any]) -> None:
    path = tmp_path / "tiny.lock.json"
    later = seal(locked | {"lock": "1.70", "more": 1, "inputs": {**locked["inputs"], "weather": "fair"}})
    write_json(path, later)
    assert read_lock(path) == later
    assert warn_of_format(later) == (
        f"warning: the lock has format 1.70, and this builder knows {FORMAT}: what is new in it is ignored",
    )
    assert warn_of_format(locked) == ()


def test_a_lock_of_an_earlier_minor_format_is_read_and_written_anew(tmp_path: Path, locked: dict[str, Any]) -> None:
    path = tmp_path / "tiny.lock.json"
    old = {key: value for key, value in locked.items() if key not in ("builder", "lock_sha256")} | {"lock": "1.0"}
    write_json(path, old)
    assert read_lock(path) == old
    assert compare_lock(old, locked, path) == Comparison(
        "upgraded", f"every file of the payload is the same, bit for bit; rewritten in format {FORMAT}"
    )


def test_any_flipped_digit_in_a_lock_is_noticed(tmp_path: Path, locked: dict[str, Any]) -> None:
    path = tmp_path / "tiny.lock.json"
    write_json(path, locked)
    text = path.read_text("utf-8")
    digits = [match.start() for match in re.finditer("[0-9]", text)]
    assert len(digits) > 50
    for place in digits:
        path.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])
        with pytest.raises(BuildError):
            read_lock(path)


@pytest.mark.parametrize(
    ("change", "place", "what"),
    [
        (
            lambda lock: lock["payload"]["config.json"].update(sha256="x"),
            'payload["config.json"].sha256',
            " cannot be 'x'",
        ),
        (
            lambda lock: lock["payload"]["config.json"].pop("num_bytes"),
            'payload["config.json"].num_bytes',
            " is missing",
        ),
        (
            lambda lock: lock["payload"].update({"../x": lock["payload"]["config.json"]}),
            'payload["../x"]',
            " cannot be '../x'",
        ),
        (lambda lock: lock["amax"]["q_proj"].update(input="4.x"), "amax.q_proj.input", " cannot be '4.x'"),
        (lambda lock: lock["inputs"].update(weather="fair"), "inputs.weather", " is unknown"),
        (lambda lock: lock["machine_classes"].append(7), "machine_classes[1]", " cannot be 7"),
        (lambda lock: lock.update(what=[]), "what", " cannot be a list"),
    ],
)
def test_what_is_wrong_in_a_lock_is_told_with_its_place(
    tmp_path: Path, locked: dict[str, Any], change: Callable[[dict[str, Any]], None], place: str, what: str
) -> None:
    path = tmp_path / "tiny.lock.json"
    change(locked)
    write_json(path, seal(locked))
    with pytest.raises(BuildError) as caught:
        read_lock(path)
    assert str(caught.value) == f"{place}{what}\n  in {path}: {place}\n  fix: {RESTORE}"


def test_a_lock_that_was_edited_or_lost_a_part_is_refused(tmp_path: Path, locked: dict[str, Any]) -> None:
    path = tmp_path / "tiny.lock.json"
    write_json(path, {key: value for key, value in locked.items() if key not in ("what", "amax")})
    with pytest.raises(BuildError) as caught:
        read_lock(path)
    assert str(caught.value) == f"tiny.lock.json lacks amax, what\n  in {path}\n  fix: {RESTORE}"
    write_json(path, locked | {"name": "other"})
    with pytest.raises(BuildError) as caught:
        read_lock(path)
    assert caught.value.what == "tiny.lock.json was edited: its lock_sha256 is not its content's"
    write_json(path, {key: value for key, value in locked.items() if key != "lock_sha256"})
    with pytest.raises(BuildError) as caught:
        read_lock(path)
    assert caught.value.what == "tiny.lock.json was edited: its lock_sha256 is not its content's", "it had one"
    locked["payload"]["config.json"]["sha256"] = "0" * 64
    write_json(path, locked)
    with pytest.raises(BuildError) as caught:
        read_lock(path)
    assert caught.value.what == "tiny.lock.json was edited: its payload_sha256 is not its payload's"


# ------------------------------------------------------------------------------------ the release, out of its lock


def test_the_release_of_a_lock_is_the_manifests(calibrated: tuple[Path, Path]) -> None:
    path = calibrated[0] / "releases" / "tiny.lock.json"
    written, restored = (
        load_manifest(path.parent / "tiny.yaml"),
        restore_manifest(read_whole(calibrated[0]), path, how={}),
    )
    assert {**describe_what(restored), "fixes": None} == describe_what(written)
    assert restored.name == "tiny" and restored.where("scheme", 0, "name") == f"{path}: what.scheme[0].name"


def test_a_lock_whose_release_is_none_names_the_key(locked: dict[str, Any]) -> None:
    locked["what"] = {"manifest": 1, "base": {"path": "base", "licenses": ["mit"]}, "scheme": [{"nam": "nvfp4"}]}
    with pytest.raises(BuildError) as caught:
        restore_manifest(locked, PATH, how={})
    assert str(caught.value) == (f"what.scheme[0].name is missing\n  in {PATH}: what.scheme[0].name\n  fix: {RESTORE}")


def test_a_base_that_is_not_where_it_was_is_had_from_the_hub_or_where_one_says(
    locked: dict[str, Any], tmp_path: Path
) -> None:
    base = {"path": "base", "model": "acme/tiny", "revision": "0" * 40, "licenses": ["mit"]}
    locked["what"] = {"manifest": 1, "base": base, "scheme": [{"name": "nvfp4"}]}
    path = tmp_path / "tiny.lock.json"
    assert restore_manifest(locked, path, how={}).release.base.path is None
    elsewhere = restore_manifest(locked, path, how={}, base=tmp_path / "mine")
    assert elsewhere.release.base.path == "base" and elsewhere.resolve("base") == tmp_path / "mine"
    (tmp_path / "base").mkdir()
    assert restore_manifest(locked, path, how={}).resolve("base") == tmp_path / "base"


def test_tools_that_differ_are_told_with_what_they_may_change(locked: dict[str, Any]) -> None:
    tools = ("nvidia-modelopt", "python", "release-builder", "tokenizers", "torch", "numpy")
    found = dict(zip(tools, ("0.47.0", "3.11.9", "0.2.0", "0.22.3", "2.13.0+cu130", "2.4.6"), strict=True))
    was = ("0.46.0", "3.11.7", "0.1.0", "0.22.2", "2.13.0+cpu", "2.4.6")
    locked["versions"] = dict(zip(tools, was, strict=True))
    changes = compare_versions(locked, found, "2")
    assert {change.tool: change.tier for change in changes} == {
        "the builder's number": 1,
        "nvidia-modelopt": 1,
        "python": None,
        "release-builder": None,
        "tokenizers": 2,
        "torch": 3,
    }
    assert str(changes[1]) == "nvidia-modelopt is 0.47.0, and was 0.46.0: its arithmetic makes the weights"
    (python,) = [c for c in compare_versions(locked, {**found, "python": "3.12.0"}, "1") if c.tool == "python"]
    assert python.tier == 1
    (torch,) = [c for c in compare_versions(locked, {**found, "torch": "2.14.0+cpu"}, "1") if c.tool == "torch"]
    assert torch.tier == 1, "another version, not only another build of the same"
    assert compare_versions(locked, locked["versions"], "1") == []


def test_constraints_name_every_tool_of_a_lock(locked: dict[str, Any]) -> None:
    locked["versions"] = {"python": "3.11.7", "torch": "2.13.0+cpu", "numpy": "2.4.6", "release-builder": "0.1.0"}
    lines = write_constraints(locked, "tiny", "build/c.txt").splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        "numpy==2.4.6",
        "torch==2.13.0  # the build for cpu",
    ]
    assert "#   python3.11 -m venv .venv-tiny" in lines
    assert "#   .venv-tiny/bin/pip install --constraint build/c.txt --editable ." in lines


def test_what_is_locked_is_not_what_is_shown(write_release: Callable[..., Path]) -> None:
    what = describe_what(load_manifest(write_release()))
    assert what.keys() == {"manifest", "base", "scheme", "calibration", "fixes", "files", "compatibility"}
    cached = describe_what(load_manifest(write_release(kv_cache="fp8")))
    assert cached == {**what, "kv_cache": "fp8"}, "a lock from before there was such a key lacks it"
