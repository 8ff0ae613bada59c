"""A release is built again from its lock alone, and whatever is not as it was is refused or told."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import build, release_writer
from fake_hub import FakeHub, serve_fake_hub

from builder.base import read_header
from builder.errors import BuildError, Problems
from builder.files import digest, sha256_file, write_json
from builder.lock import digest_payload, list_versions
from builder.machine_class import describe_machine
from builder.published import find_place
from builder.stages import verify
from builder.stages.reproduce import compare_with_place, reproduce

pytestmark = pytest.mark.xdist_group("modelopt")

ROOT = Path(__file__).parents[1]
LOOKS = ("verify", "perplexity")  # stages that take a while and change nothing
SAMPLES = {"calibration.samples": 3, "perplexity": None}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `releases` and the finished `build` of a calibrated release; not to be changed."""
    folder = tmp_path_factory.mktemp("original")
    build(release_writer(folder / "releases")(**SAMPLES), folder / "build" / "tiny", "lock", without=LOOKS)
    return folder


@pytest.fixture(scope="module")
def native_original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, calibrated with native arithmetic."""
    folder = tmp_path_factory.mktemp("native")
    manifest = release_writer(folder / "releases")(**SAMPLES, **{"calibration.arithmetic": "native"})
    build(manifest, folder / "build" / "tiny", "lock", without=LOOKS)
    return folder


@pytest.fixture
def copy(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a stranger has, in the working directory: the lock and the base, but no manifest, no calibration data."""
    return take_copy(original, tmp_path, monkeypatch)


@pytest.fixture
def native(native_original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same of a release of native arithmetic, with its calibration data."""
    take_copy(native_original, tmp_path, monkeypatch)
    shutil.copy(native_original / "releases" / "calibration.jsonl", tmp_path / "releases")
    return tmp_path


def take_copy(original: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    monkeypatch.delenv("EXECUTOR", raising=False)
    (folder / "releases").mkdir()
    shutil.copytree(original / "releases" / "base", folder / "releases" / "base")
    shutil.copy(original / "releases" / "tiny.lock.json", folder / "releases")
    return folder


LINEAR = "model.layers.1.mlp.down_proj"
LOCK, BUILD = Path("releases/tiny.lock.json"), Path("build")


def edit_lock(change: Callable[[dict[str, Any]], None], *, seal: bool = True) -> None:
    """Change the lock; sealed, it vouches for what is in it now."""
    lock = json.loads(LOCK.read_text("utf-8"))
    change(lock)
    if seal:
        lock.pop("lock_sha256")
        lock["payload_sha256"] = digest_payload(lock["payload"])
        lock["lock_sha256"] = digest(lock)
    write_json(LOCK, lock)


def fail_to_reproduce(**options: Any) -> str:
    with pytest.raises(BuildError) as caught:
        reproduce(LOCK, BUILD, tell=lambda line: None, **options)
    return str(caught.value)


def read_payload(folder: Path) -> dict[str, bytes]:
    names = json.loads((folder / "releases" / "tiny.lock.json").read_text("utf-8"))["payload"]
    return {name: (folder / "build" / "tiny" / "artifact" / name).read_bytes() for name in names}


def assert_rebuilt(folder: Path, original: Path) -> None:
    rebuilt = folder / "build" / "_reproduced" / "tiny" / "artifact"
    payload = read_payload(original)
    assert len(payload) > 8
    assert {path.name: path.read_bytes() for path in rebuilt.iterdir()} == payload


# ------------------------------------------------------------------------------------------------ it works


def test_a_release_comes_out_of_its_lock_alone_twice(copy: Path, original: Path) -> None:
    for _ in range(2):
        told: list[str] = []
        result = reproduce(LOCK, BUILD, tell=told.append)
        stages = [line.split(":")[0].strip() for line in told]
        assert stages == ["plan", "fetch", "calibrate", "quantize", "assemble"], "the second time as the first"
        assert (result["tier"], result["verdict"], result["different"]) == (1, "equal", [])
        assert_rebuilt(copy, original)
    assert result["text"] == f"all {len(read_payload(original))} files are the same, bit for bit"


def test_a_release_comes_out_the_same_under_another_executor_and_number_of_shards(
    copy: Path, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (original / "releases" / "tiny.yaml").read_text("utf-8")
    (copy / "releases" / "tiny.yaml").write_text(text.replace("shards: 2", "shards: 3"))
    monkeypatch.setenv("EXECUTOR", "processes")
    assert reproduce(LOCK, BUILD)["executor"] == "processes"
    assert_rebuilt(copy, original)
    jobs = json.loads((BUILD / "_reproduced/tiny/receipts/quantize.json").read_text())["circumstances"]["jobs"]
    assert len(jobs) == 3


def run_doit(*args: str, **env: str) -> str:
    command = [sys.executable, "-m", "doit", *args]
    whole = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    done = subprocess.run(command, env=whole, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_another_number_of_threads_and_another_instruction_set_change_no_byte_of_tier_1(
    copy: Path, original: Path
) -> None:
    shutil.copy(ROOT / "pyproject.toml", copy)
    out = run_doit("reproduce:tiny", OMP_NUM_THREADS="1", NUMBA_NUM_THREADS="1", ATEN_CPU_CAPABILITY="default")
    num_files = len(read_payload(original))
    assert re.search(
        rf"^  tier 1 on .+, ATen DEFAULT, .+: all {num_files} files are the same, bit for bit$", out, flags=re.M
    )
    assert_rebuilt(copy, original)


# ------------------------------------------------------------------------------------------------ calibrated again


def test_under_exact_arithmetic_calibrating_again_is_tier_1_too(copy: Path, original: Path) -> None:
    shutil.copy(original / "releases" / "calibration.jsonl", copy / "releases")
    result = reproduce(LOCK, BUILD, recalibrate=True)
    assert (result["tier"], result["verdict"], result["recalibrated"]) == (1, "equal", True)
    assert result["text"] == f"calibrated again, all {len(read_payload(original))} files are the same, bit for bit"
    assert json.loads(LOCK.read_text())["machine_classes"] == []
    assert result["machine_class"] == describe_machine("cpu")
    assert_rebuilt(copy, original)


def test_under_exact_arithmetic_the_last_bit_of_a_magnitude_is_noticed(copy: Path, original: Path) -> None:
    shutil.copy(original / "releases" / "calibration.jsonl", copy / "releases")
    was = float.fromhex(json.loads(LOCK.read_text())["amax"][LINEAR]["input"])
    edit_lock(lambda lock: lock["amax"][LINEAR].update(input=math.nextafter(was, math.inf).hex()))
    assert fail_to_reproduce(recalibrate=True) == (
        f"the largest input of {LINEAR} is {was} here, and {math.nextafter(was, math.inf)} in the lock\n"
        f'  in {LOCK}: amax["{LINEAR}"].input\n'
        "  fix: likely cause: a processor or memory that computes wrongly, a lock that was changed, or a change in the "
        "builder's code: base, rows and versions are the lock's. Calibrate again, here and on another machine"
    )
    assert not (BUILD / "_reproduced" / "tiny" / "parts").exists(), "before anything is quantized"


def test_native_arithmetic_on_the_same_class_of_machine_is_tier_2_and_exact(
    native: Path, native_original: Path
) -> None:
    result = reproduce(LOCK, BUILD, recalibrate=True)
    assert (result["tier"], result["verdict"]) == (2, "equal")
    assert [result["machine_class"]] == json.loads(LOCK.read_text())["machine_classes"]
    assert_rebuilt(native, native_original)


def test_native_arithmetic_on_another_class_of_machine_is_tier_3_and_told_for_what_it_is(
    native: Path, native_original: Path
) -> None:
    shutil.copy(ROOT / "pyproject.toml", native)
    out = run_doit("reproduce:tiny", "--recalibrate", ONEDNN_MAX_CPU_ISA="SSE41")
    (result,) = json.loads((BUILD / "tiny/receipts/reproduce.json").read_text())["facts"]["results"]
    assert result["tier"] == 3 and re.search(r", oneDNN .*SSE41, ", result["machine_class"])
    assert f"  tier 3 on {result['machine_class']}: {result['text']}\n" in out
    if result["verdict"] == "equal":
        assert_rebuilt(native, native_original)
    else:
        assert 0 < result["largest_difference"] < 0.05
        assert re.search(r"\d+ of 28 input magnitudes differ from those of .+, by \d\.\d\d % at most", result["text"])
        assert all(name.endswith(".safetensors") for name in result["different"])


def make_others(factor: float, machine: str) -> None:
    """Make the lock that of a build which measured one input otherwise, on another class of machine."""
    was = json.loads(LOCK.read_text())["amax"][LINEAR]["input"]
    edit_lock(lambda lock: lock["amax"][LINEAR].update(input=(float.fromhex(was) * factor).hex()))
    fail_to_reproduce()
    artifact = BUILD / "_reproduced" / "tiny" / "artifact"

    def take_over(lock: dict[str, Any]) -> None:
        lock["machine_classes"] = [machine]
        for name, entry in lock["payload"].items():
            entry["sha256"] = sha256_file(artifact / name)

    edit_lock(take_over)
    assert reproduce(LOCK, BUILD)["verdict"] == "equal"


def test_native_magnitudes_that_differ_a_little_elsewhere_are_told_with_their_difference(
    native: Path, native_original: Path
) -> None:
    (here,) = json.loads(LOCK.read_text())["machine_classes"]
    make_others(1.0078125, "x86_64, SSE")
    result = reproduce(LOCK, BUILD, recalibrate=True)
    num_files = len(read_payload(native_original))
    assert (result["tier"], result["verdict"], len(result["different"])) == (3, "within tolerance", 1)
    assert result["largest_difference"] == pytest.approx(0.0078125, rel=0.01)
    assert result["text"] == (
        f"calibrated again, 1 of 28 input magnitudes differ from those of x86_64, SSE, by 0.78 % at most at {LINEAR}; "
        f"{num_files - 1} of {num_files} files are the same, bit for bit"
    )
    edit_lock(lambda lock: lock.update(machine_classes=[here]))
    told = fail_to_reproduce(recalibrate=True)
    assert told.startswith(f"the largest input of {LINEAR} is "), "in tier 2 all is the same"
    assert f"  fix: likely cause: native arithmetic on another machine of the same class, {here}. " in told


def test_native_magnitudes_that_differ_much_are_refused_with_both_values_and_the_likely_cause(native: Path) -> None:
    (here,) = json.loads(LOCK.read_text())["machine_classes"]
    was = float.fromhex(json.loads(LOCK.read_text())["amax"][LINEAR]["input"])
    make_others(1.125, "x86_64, SSE")
    assert fail_to_reproduce(recalibrate=True) == (
        f"the largest input of {LINEAR} is {was} here, and {was * 1.125} in the lock\n"
        f'  in {LOCK}: amax["{LINEAR}"].input\n'
        f"  fix: likely cause: native arithmetic on {here} instead of x86_64, SSE. calibration.arithmetic: exact gives "
        "the same magnitudes on every machine"
    )


def test_a_lock_from_before_exact_arithmetic_is_restored_as_native(native: Path, native_original: Path) -> None:
    def age(lock: dict[str, Any]) -> None:
        del lock["what"]["calibration"]["arithmetic"]
        lock |= {"lock": "1.1", "machine_classes": ["x86_64, AVX512"]}

    edit_lock(age)
    assert reproduce(LOCK, BUILD)["verdict"] == "equal"
    assert_rebuilt(native, native_original)
    assert reproduce(LOCK, BUILD, recalibrate=True)["tier"] == 3, "its class says less than classes do now"


def test_a_scheme_that_measures_nothing_has_no_further_tiers(
    write_release: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    manifest = write_release(**{"scheme.input_scale": "unit", "calibration": None, "perplexity": None})
    build(manifest, tmp_path / "build" / "tiny", "lock", without=LOOKS)
    assert reproduce(LOCK, BUILD, recalibrate=True)["tier"] == 1


@pytest.mark.parametrize("scheme", ["fp8_dynamic", "nvfp4"])
def test_scales_of_a_kv_cache_come_out_of_the_lock_too(
    write_release: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.chdir(tmp_path)
    manifest = write_release(**{"scheme.name": scheme, "kv_cache": "fp8"}, **SAMPLES)
    build(manifest, tmp_path / "build" / "tiny", "lock", without=LOOKS)
    data = manifest.with_name("calibration.jsonl").rename(tmp_path / "rows")
    result = reproduce(LOCK, BUILD)
    assert (result["tier"], result["verdict"]) == (1, "equal")
    data.rename(manifest.with_name("calibration.jsonl"))
    assert reproduce(LOCK, BUILD, recalibrate=True)["verdict"] == "equal"
    attention = "model.layers.2.self_attn"
    edit_lock(
        lambda lock: lock["amax"][attention].update(key=(2 * float.fromhex(lock["amax"][attention]["key"])).hex())
    )
    assert f"{attention}.k_scale" in fail_to_reproduce()
    edit_lock(lambda lock: lock["amax"].pop(attention))
    assert fail_to_reproduce().startswith(f"the key statistic of {attention} is missing")


def test_tools_that_change_no_byte_are_told_and_no_hindrance(copy: Path) -> None:
    edit_lock(lambda lock: lock["versions"].update({"tokenizers": "0.21.0", "release-builder": "0.0.1"}))
    told: list[str] = []
    assert reproduce(LOCK, BUILD, tell=told.append)["verdict"] == "equal"
    assert [line for line in told if "no hindrance" in line] == [
        f"  release-builder is {list_versions()['release-builder']}, and was 0.0.1: that changes no byte as long as "
        "the builder's number is the same; that is no hindrance",
        f"  tokenizers is {list_versions()['tokenizers']}, and was 0.21.0: it makes the token ids of the calibration "
        "rows, and nothing else; that is no hindrance",
    ]
    assert fail_to_reproduce(recalibrate=True).startswith("tokenizers is ")


# ------------------------------------------------------------------------------------------------ it is refused


def test_a_lock_with_a_flipped_digit_is_refused(copy: Path) -> None:
    edit_lock(lambda lock: lock["what"]["calibration"].update(samples=4), seal=False)
    assert fail_to_reproduce() == (
        "tiny.lock.json was edited: its lock_sha256 is not its content's\n"
        f"  in {LOCK}\n"
        "  fix: restore it from version control, or write it again from a build: doit relock:tiny"
    )
    assert not BUILD.exists()


def flip(text: str) -> str:
    """The same hex float with another digit before its exponent."""
    return re.sub(r"([0-9a-f])(?=0*p)", lambda match: "7" if match[0] != "7" else "5", text, count=1)


def test_a_weights_statistic_that_is_not_the_bases_is_refused_before_anything_is_quantized(copy: Path) -> None:
    was = json.loads(LOCK.read_text())["amax"][LINEAR]["weight"]
    edit_lock(lambda lock: lock["amax"][LINEAR].update(weight=flip(was)))
    assert fail_to_reproduce() == (
        f"the largest weight of {LINEAR} is {float.fromhex(was)}, but the lock's table has {float.fromhex(flip(was))}\n"
        f'  in {LOCK}: amax["{LINEAR}"].weight\n'
        "  fix: restore it from version control"
    )
    assert not (BUILD / "_reproduced" / "tiny" / "parts").exists()


def test_an_inputs_statistic_that_was_changed_is_traced_to_its_tensor(copy: Path, original: Path) -> None:
    was = json.loads(LOCK.read_text())["amax"][LINEAR]["input"]
    edit_lock(lambda lock: lock["amax"][LINEAR].update(input=flip(was)))
    told = fail_to_reproduce(original=original / "build" / "tiny" / "artifact")
    (file,) = [
        path.name
        for path in (original / "build" / "tiny" / "artifact").glob("*.safetensors")
        if f"{LINEAR}.input_global_scale" in {tensor.name for tensor in read_header(path)}
    ]
    rebuilt = Path("build/_reproduced/tiny/artifact")
    num_files = len(read_payload(original))
    assert re.fullmatch(
        rf"{LINEAR}\.input_global_scale of {file}: [1-4] of 4 bytes differ, first at \[0\]\n"
        rf"  in {rebuilt / file}\n"
        r"  fix: likely cause: other statistics of activations: calibrated elsewhere, or another amax table\n"
        rf"1 of {num_files} files are not the locked ones\n"
        rf"  in {LOCK}\n"
        rf"  fix: the rebuilt files are in {rebuilt}; `doit diff` compares folders and locks",
        told,
    )
    untraced = fail_to_reproduce()
    assert untraced.startswith(f"{file} is not the locked one (sha256 ")
    assert not (BUILD / "tiny" / "receipts").exists(), "only what came out as promised is recorded"


def test_a_digest_of_the_payload_that_was_changed_is_named(copy: Path) -> None:
    edit_lock(lambda lock: lock["payload"]["NOTICE"].update(sha256="0" * 64))
    told = fail_to_reproduce()
    assert re.match(r"NOTICE is not the locked one \(sha256 [0-9a-f]{12}, locked 000000000000\)\n", told)
    assert f"  in {LOCK}: payload.NOTICE\n" in told


def test_a_base_with_another_byte_is_refused_by_name_before_anything_is_quantized(copy: Path) -> None:
    path = copy / "releases" / "base" / "model-00002-of-00002.safetensors"
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    assert re.fullmatch(
        r"model-00002-of-00002\.safetensors of the base model is not the locked one "
        r"\(sha256 [0-9a-f]{12}, locked [0-9a-f]{12}\)\n"
        rf"  in {copy / LOCK}\n"
        r"  fix: restore model-00002-of-00002\.safetensors",
        fail_to_reproduce(),
    )
    assert not (BUILD / "_reproduced" / "tiny" / "parts").exists()


def test_a_base_elsewhere_is_taken_from_there(copy: Path, original: Path) -> None:
    (copy / "releases" / "base").rename(copy / "mine")
    assert "the base model's folder does not exist" in fail_to_reproduce()
    assert reproduce(LOCK, BUILD, base=copy / "mine")["verdict"] == "equal"
    assert_rebuilt(copy, original)


def test_another_modelopt_is_refused_with_the_reason_and_the_way_out(copy: Path) -> None:
    edit_lock(lambda lock: lock["versions"].update({"nvidia-modelopt": "0.46.0"}))
    assert fail_to_reproduce() == (
        f"nvidia-modelopt is {list_versions()['nvidia-modelopt']}, and was 0.46.0: its arithmetic makes the weights\n"
        f'  in {LOCK}: versions["nvidia-modelopt"]\n'
        "  fix: install what it was made with: `doit pin:tiny` writes the versions and says how"
    )
    assert not BUILD.exists()


def test_other_calibration_data_are_refused_where_they_are_used(copy: Path, original: Path) -> None:
    rows = (original / "releases" / "calibration.jsonl").read_text("utf-8")
    (copy / "releases" / "calibration.jsonl").write_text(rows.replace("a", "b", 1))
    told = fail_to_reproduce(recalibrate=True)
    assert re.match(r"calibration\.jsonl is not the locked one \(sha256 [0-9a-f]{12}, locked [0-9a-f]{12}\)\n", told)
    assert f"  in {LOCK}: inputs.calibration_sha256\n" in told
    assert not BUILD.exists()


def test_other_token_ids_of_the_same_data_are_refused(copy: Path, original: Path) -> None:
    """As another tokenizer would make them."""
    shutil.copy(original / "releases" / "calibration.jsonl", copy / "releases")
    found = json.loads(LOCK.read_text("utf-8"))["inputs"]["token_ids_sha256"]
    edit_lock(lambda lock: lock["inputs"].update(token_ids_sha256="0" * 64))
    assert fail_to_reproduce(recalibrate=True) == (
        f"the calibration rows are not the locked ones (sha256 of the token ids {found[:12]}, locked {'0' * 64})\n"
        f"  in {LOCK}: inputs.token_ids_sha256\n"
        "  fix: see that calibration data and tokenizers are those of the lock"
    )


def test_a_release_without_a_lock_is_told_to_be_built_first(copy: Path) -> None:
    LOCK.unlink()
    assert fail_to_reproduce() == (
        f"there is no tiny.lock.json\n  in {LOCK}\n  fix: build the release first: doit release:tiny"
    )


# ------------------------------------------------------------------------------------------------ the Hub


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serve_fake_hub(tmp_path, monkeypatch) as running:
        yield running


def test_a_wrong_revision_of_the_base_is_refused(copy: Path, fake: FakeHub, original: Path) -> None:
    base = copy / "releases" / "base"
    files = {path.name: path.read_bytes() for path in base.iterdir()}
    right = fake.add("acme/tiny", files)

    def move(revision: str) -> None:
        edit_lock(lambda lock: lock["what"]["base"].update(model="acme/tiny", revision=revision))

    shutil.rmtree(base)
    move("0" * 40)
    assert fail_to_reproduce().startswith(f"acme/tiny has no commit {'0' * 40}\n  in {LOCK}: what.base.model\n")
    other = fake.add("acme/tiny", {**files, "generation_config.json": b"{}"})
    move(other)
    assert fail_to_reproduce().startswith("generation_config.json of the base model is not the locked one (sha256 ")
    fake.add("acme/tiny", files)
    move(right)
    told = fail_to_reproduce()
    assert told.startswith("NOTICE is not the locked one"), "which names the base: all else is as it was"
    assert "1 of " in told


def publish(fake: FakeHub, original: Path, **changes: bytes | None) -> str:
    files = {**read_payload(original), "README.md": b"# Tiny", ".gitattributes": b"", **changes}
    return fake.add("me/tiny", {name: content for name, content in files.items() if content is not None})


def compare(place: str) -> Any:
    return compare_with_place(LOCK, find_place(place, "--with"))


def test_a_published_repository_is_compared_without_fetching_weights(copy: Path, fake: FakeHub, original: Path) -> None:
    revision = publish(fake, original)
    verdict = compare(f"me/tiny@{revision}")
    payload = read_payload(original)
    weights = [name for name in payload if name.endswith(".safetensors")]
    assert len(weights) > 1
    assert (verdict.num_files, verdict.by_hub) == (len(payload), len(weights))
    assert verdict.fetched == sum(len(content) for name, content in payload.items() if name not in weights)
    assert verdict.extra == (".gitattributes", "README.md")
    assert not {answer.name for answer in fake.answers} & {*weights, "README.md"}


def test_nothing_large_is_fetched_for_its_digest(
    copy: Path, fake: FakeHub, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = publish(fake, original)
    notice = len(read_payload(original)["NOTICE"])
    monkeypatch.setattr("builder.published.MAX_SMALL_BYTES", notice - 1)
    with pytest.raises(BuildError) as caught:
        compare(f"me/tiny@{revision}")
    assert re.fullmatch(
        r"the Hub keeps no sha256 of \S+\n  in --with\n  fix: compare with a folder instead", str(caught.value)
    )
    assert not [answer for answer in fake.answers if answer.name in read_payload(original)]


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_a_published_file_that_is_not_the_locked_one_is_named(
    copy: Path, fake: FakeHub, original: Path, place: str
) -> None:
    payload = read_payload(original)
    name = next(name for name in payload if name.endswith(".safetensors"))
    changed = {name: payload[name][:-1] + bytes([payload[name][-1] ^ 1]), "NOTICE": b"other", "config.json": None}
    if place == "hub":
        where = f"me/tiny@{publish(fake, original, **changed)}"
    else:
        where = "published"
        for file, content in {**payload, **changed}.items():
            if content is not None:
                (copy / where / file).parent.mkdir(exist_ok=True)
                (copy / where / file).write_bytes(content)
    with pytest.raises(Problems) as caught:
        compare(where)
    told = [problem.what for problem in caught.value.problems]
    assert told[0] == f"NOTICE has 5 bytes, and the locked one {len(payload['NOTICE'])}"
    assert told[1] == "config.json is missing"
    assert re.fullmatch(rf"{name} has sha256 [0-9a-f]{{12}}, and the locked one [0-9a-f]{{12}}", told[2])
    assert len(told) == 3


def test_a_wrong_revision_of_what_was_published_is_refused(copy: Path, fake: FakeHub, original: Path) -> None:
    publish(fake, original)
    with pytest.raises(BuildError) as caught:
        compare(f"me/tiny@{'1' * 40}")
    assert caught.value.what == f"me/tiny has no commit {'1' * 40}"
    with pytest.raises(BuildError) as caught:
        compare("me/tiny@main")
    assert caught.value.what == "revision 'main' is not a commit"
    with pytest.raises(BuildError) as caught:
        compare("nowhere")
    assert str(caught.value) == (
        "nowhere is neither a folder nor a Hub repository at a commit\n"
        "  in --with\n"
        "  fix: give a folder, or owner/name@ and the 40 hexadecimal digits of the commit"
    )


# ------------------------------------------------------------------------------------------------ on the card


def test_what_a_reproduction_came_to_is_on_the_card_and_beside_the_payload(
    write_release: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    manifest = write_release(**SAMPLES)
    artifact = build(manifest, tmp_path / "build" / "tiny", "card", without=LOOKS).artifact
    assert "| Reproduced | not yet |" in (artifact / "README.md").read_text("utf-8")
    assert not (artifact / "attestations" / "reproduction.json").exists()
    tiers = [reproduce(LOCK, BUILD), reproduce(LOCK, BUILD, recalibrate=True), reproduce(LOCK, BUILD)]
    workspace = build(manifest, tmp_path / "build" / "tiny", "card", without=LOOKS)
    rows = re.findall(r"^\| Reproduced \| (.+) \|$", (artifact / "README.md").read_text("utf-8"), flags=re.M)
    assert rows == [
        f"tier {result['tier']} on {result['machine_class']}, {result['date'][:10]}: {result['text']}"
        for result in (tiers[0], tiers[1])
    ]
    attested = json.loads((artifact / "attestations" / "reproduction.json").read_text())["reproductions"]
    assert attested == [tiers[2], tiers[1]]
    assert json.loads((artifact / "attestations" / "lock.json").read_text()) == json.loads(LOCK.read_text())
    monkeypatch.setattr("builder.stages.verify.SAMPLE", 0)
    assert verify.STAGE.run(workspace).facts["findings"] == [], "nothing beside the payload is taken for a stranger"
    write_release(**SAMPLES, **{"files.max_bytes": "1MiB"})
    build(manifest, tmp_path / "build" / "tiny", "card", without=LOOKS)
    assert "| Reproduced | not yet |" in (artifact / "README.md").read_text("utf-8"), "that was another payload"
    assert not (artifact / "attestations" / "reproduction.json").exists()
