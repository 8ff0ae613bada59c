"""Two releases are compared from headers, configs and locks, and nothing that differs is passed over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import build, release_writer
from fake_hub import serve_fake_hub
from rich.console import Console

from builder.comparison import compare_sides, fold_layers, is_same, load_side
from builder.errors import BuildError
from builder.files import digest, write_json
from builder.terminal import print_diff

pytestmark = pytest.mark.xdist_group("modelopt")

RELEASES, BUILD = Path("releases"), Path("build")
NO_TEXT = {"perplexity": None}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two releases of one base that differ in layout and input scales; not to be changed."""
    folder = tmp_path_factory.mktemp("built")
    write = release_writer(folder / "releases")
    changes: dict[str, dict[str, Any]] = {
        "one": {"calibration.samples": 2},
        "two": {"calibration.samples": 3, "files.max_bytes": "1MiB"},
        "three": {"scheme.layout": "modelopt", "scheme.input_scale": "unit", "calibration": None},
    }
    for name, changed in changes.items():
        build(write(name, **NO_TEXT, **changed), folder / "build" / name, "card", without=("verify", "perplexity"))
    return folder


@pytest.fixture
def here(built: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(built)
    return built


def compare(one: str, two: str) -> dict[str, Any]:
    return compare_sides(load_side(one, RELEASES, BUILD), load_side(two, RELEASES, BUILD))


def show(found: dict[str, Any]) -> str:
    console = Console(width=300, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    print_diff(found, console)
    return console.export_text()


def test_a_release_differs_nowhere_from_itself(here: Path) -> None:
    found = compare("one", "build/one/artifact")
    assert is_same(found) and found["not_compared"] == []
    assert show(found) == "one -> build/one/artifact\nnothing differs in what was compared\n"


def test_other_calibration_rows_show_in_scales_statistics_and_locks(here: Path) -> None:
    found = compare("one", "two")
    assert found["lock"]["what"]["changed"]["calibration.samples"] == [2, 3]
    assert found["lock"]["inputs"]["changed"]["num_rows"] == [2, 3]
    changed = found["scales"]["changed"]
    assert changed and all(name.endswith("input_global_scale") for name in changed)
    for name, (one, two) in changed.items():
        assert one != two, name
    assert 0 < found["scales"]["largest_relative"] < 1
    amax = found["lock"]["amax"]
    assert all(name.endswith(".input") for name in amax["changed"])
    assert found["tensors"]["added"] == found["tensors"]["removed"] == found["tensors"]["changed"] == {}
    assert found["tensors"]["moved"] > 0, "the files are smaller"
    told = show(found)
    assert f"scales: {len(changed)} differ, by " in told
    assert "  ~ calibration.samples: 2 -> 3\n" in told
    assert f"tensors: {found['tensors']['num_tensors'][0]:,} -> " in told


def test_another_layout_shows_in_names_dtypes_configs_and_sizes(here: Path) -> None:
    found = compare("one", "three")
    name = "model.layers.0.mlp.down_proj"
    assert found["tensors"]["removed"][f"{name}.weight_packed"].startswith("U8 [")
    assert found["tensors"]["added"][f"{name}.weight"].startswith("U8 [")
    assert found["tensors"]["removed"][f"{name}.input_global_scale"] == "F32 [1]"
    assert found["tensors"]["added"][f"{name}.input_scale"] == "F32 []"
    assert found["configs"]["config.json"]["changed"]["quantization_config.quant_method"] == [
        "compressed-tensors",
        "modelopt",
    ]
    assert found["configs"]["hf_quant_config.json"]["added"]["quantization.quant_algo"] == "NVFP4"
    assert "hf_quant_config.json" in found["sizes"]["added"]
    assert found["figures"]["changed"]["plan.num_bytes"][0] > 1e6
    told = show(found)
    assert "  - model.layers.*.mlp.down_proj.input_global_scale: F32 [1] (4 of them)\n" in told
    assert "  ~ quantization_config.quant_method: compressed-tensors -> modelopt\n" in told
    assert json.loads(json.dumps(found)) == found


def test_two_locks_are_compared_alone_and_what_could_not_be_is_said(here: Path, tmp_path: Path) -> None:
    lock = tmp_path / "two.lock.json"
    shutil.copy("releases/two.lock.json", lock)
    found = compare("one", str(lock))
    assert found["not_compared"] == [f"{part}: there are none of {lock}" for part in ("tensors", "scales", "configs")]
    assert found["lock"]["what"]["changed"]["calibration.samples"] == [2, 3]
    assert f"not compared: tensors: there are none of {lock}\n" in show(found)


def test_what_lies_around_a_payload_is_no_difference(here: Path, tmp_path: Path) -> None:
    assert (here / "build/one/artifact/README.md").is_file() and (here / "build/one/artifact/attestations").is_dir()
    found = compare("one", "releases/one.lock.json")
    assert is_same(found), "a lock names the payload alone"
    assert "sizes" in found and "lock" in found


def test_locks_of_the_same_files_made_with_other_tools_differ(here: Path, tmp_path: Path) -> None:
    lock = json.loads(Path("releases/one.lock.json").read_text())
    lock["versions"]["torch"] += "1"
    lock.pop("lock_sha256")
    write_json(tmp_path / "other.lock.json", {**lock, "lock_sha256": digest(lock)})
    found = compare("releases/one.lock.json", str(tmp_path / "other.lock.json"))
    assert list(found["lock"]) == ["versions"]
    assert not is_same(found)


def test_a_repository_is_compared_by_its_headers_and_configs(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = here / "build" / "three" / "artifact"
    files = {path.relative_to(artifact).as_posix(): path.read_bytes() for path in artifact.rglob("*") if path.is_file()}
    with serve_fake_hub(tmp_path, monkeypatch) as fake:
        revision = fake.add("me/three", files)
        found = compare("three", f"me/three@{revision}")
        weights = sum(len(content) for name, content in files.items() if name.endswith(".safetensors"))
        sent = sum(fake.num_bytes_sent(name) for name in files if name.endswith(".safetensors"))
    assert 0 < sent < weights / 10
    assert "tensors" in found and not any(found["tensors"][kind] for kind in ("added", "removed", "changed"))
    assert found["configs"] == {}
    assert [text.partition(":")[0] for text in found["not_compared"]] == ["scales", "lock"]


def test_what_is_nothing_is_refused_with_the_nearest_name(here: Path) -> None:
    with pytest.raises(BuildError) as caught:
        compare("one", "twoo")
    assert str(caught.value) == (
        "twoo is nothing that can be compared\n"
        "  in the command line\n"
        "  fix: give a release, a folder, a lock or owner/name@commit; did you mean two? Valid: one, three, two"
    )


def test_the_tensors_of_all_layers_are_told_in_one_line() -> None:
    changes = {f"model.layers.{layer}.mlp.up_proj.weight": ["U8 [1]", "BF16 [1]"] for layer in range(12)}
    assert fold_layers(changes) == {("model.layers.*.mlp.up_proj.weight", "U8 [1] -> BF16 [1]"): 12}
