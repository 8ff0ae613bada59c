"""What a manifest leaves open is asked of the Hub and written into its text, and nothing else there changes."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub, serve_fake_hub

from builder.errors import BaseError, ManifestError
from builder.manifest import load_manifest
from builder.pins import find_open, pin_manifest

MANIFEST = """\
# a comment before
manifest: 1
title: "Öpen"   # a comment behind
repo: a/b-NVFP4
base:
    model: owner/model  # the model
    # a comment between
    licenses: [mit]
scheme: {name: nvfp4}
calibration:
    column: article
    dataset: "owner/data"
card:
    why: |
        # revision: to be pinned, says this text
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serve_fake_hub(tmp_path, monkeypatch) as hub:
        hub.model = hub.add("owner/model", {"config.json": b"{}"})  # type: ignore[attr-defined]
        hub.data = hub.add("owner/data", {"a.parquet": b"rows"}, kind="dataset")  # type: ignore[attr-defined]
        yield hub


def pin(folder: Path, text: str) -> list[str]:
    """The lines that differ afterwards, as a diff has them."""
    path = folder / "open.yaml"
    path.write_bytes(text.encode())
    assert pin_manifest(load_manifest(path)).keys() == {"owner/model", "owner/data"}
    after = path.read_bytes().decode()
    assert not list(find_open(load_manifest(path)))
    assert pin_manifest(load_manifest(path)) == {} and path.read_bytes().decode() == after
    changes = difflib.ndiff(text.splitlines(keepends=True), after.splitlines(keepends=True))
    return [line for line in changes if line[0] in "+-"]


def test_revisions_are_written_below_what_they_are_of(fake: FakeHub, tmp_path: Path) -> None:
    assert pin(tmp_path, MANIFEST) == [
        f"+     revision: {fake.model}\n",  # type: ignore[attr-defined]
        f"+     revision: {fake.data}\n",  # type: ignore[attr-defined]
    ]


def test_a_marked_line_and_one_without_a_value_are_filled(fake: FakeHub, tmp_path: Path) -> None:
    marked = MANIFEST.replace("# a comment between", "# revision: to be pinned by `doit pin:open`")
    marked = marked.replace("    column: article\n", "    column: article\n    revision:   # still open\n")
    assert pin(tmp_path, marked.replace("\n", "\r\n")) == [
        "-     # revision: to be pinned by `doit pin:open`\r\n",
        f"+     revision: {fake.model}\r\n",  # type: ignore[attr-defined]
        "-     revision:   # still open\r\n",
        f"+     revision: {fake.data}\r\n",  # type: ignore[attr-defined]
    ]


def test_sections_in_braces_get_theirs_within_them(fake: FakeHub, tmp_path: Path) -> None:
    short = "{manifest: 1, title: t, repo: a/b, scheme: {name: nvfp4}, base: {model: owner/model, licenses: [mit]},\n"
    short += " calibration: {dataset: 'owner/data'}}"
    assert pin(tmp_path, short)[1::2] == [
        "+ {manifest: 1, title: t, repo: a/b, scheme: {name: nvfp4}, "
        f"base: {{model: owner/model, revision: {fake.model}, licenses: [mit]}},\n",  # type: ignore[attr-defined]
        f"+  calibration: {{dataset: 'owner/data', revision: {fake.data}}}}}",  # type: ignore[attr-defined]
    ]


def test_a_text_without_a_place_is_told_what_to_add_and_stays_as_it_was(fake: FakeHub, tmp_path: Path) -> None:
    path = tmp_path / "open.yaml"
    text = MANIFEST.replace("model: owner/model  # the model", "? model\n    : >-\n      owner/model")
    path.write_text(text)
    with pytest.raises(ManifestError) as caught:
        pin_manifest(load_manifest(path))
    assert caught.value.what == "there is no line for the revision of owner/model"
    assert caught.value.fix == f"add to base: revision: {fake.model}"  # type: ignore[attr-defined]
    assert path.read_text() == text


def test_a_repository_that_the_hub_does_not_have_leaves_the_manifest_as_it_was(fake: FakeHub, tmp_path: Path) -> None:
    path = tmp_path / "open.yaml"
    path.write_text(MANIFEST.replace("owner/data", "owner/gone"))
    before = path.read_bytes()
    with pytest.raises(BaseError, match="has no dataset owner/gone, or does not show it to you"):
        pin_manifest(load_manifest(path))
    assert path.read_bytes() == before


def test_a_folder_and_pinned_revisions_are_not_open(tmp_path: Path) -> None:
    path = tmp_path / "open.yaml"
    path.write_text(MANIFEST.replace("model: owner/model", "model: owner/model\n    path: base"))
    assert [pin.section for pin in find_open(load_manifest(path))] == ["calibration"]
