"""Every release in this repository has a card before anything is built, offline, and it reads as a card should."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from doit.doit_cmd import DoitMain
from markdown_it import MarkdownIt

from builder.manifest import list_releases, load_manifest
from builder.render import NOT_MEASURED, SERVE_FILES
from builder.stages import STAGES, Workspace
from builder.stages.preview import preview
from builder.stages.stage import clean_stage

ROOT = Path(__file__).parents[1]
NAMES = list_releases(ROOT / "releases")
GOLDEN = Path(__file__).parent / "golden" / "README.md"
SECTIONS = ["Quick facts", "Usage", "Verification", "Evaluation", "How it was made", "Files", "Reproduce", "License"]
BANNER = "> **Nothing has been built yet: this card is a preview.**"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("previews")


@pytest.fixture(scope="module", params=NAMES)
def previewed(request: pytest.FixtureRequest, folder: Path) -> Path:
    """A release's preview, made while nothing can be asked of another machine."""

    def refuse(*args: Any) -> None:
        raise AssertionError("a preview asks nobody")

    manifest = load_manifest(ROOT / "releases" / f"{request.param}.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        started = time.process_time()
        made = preview(Workspace(manifest, folder / manifest.name))
        assert time.process_time() - started < 10
    return made


def read_card(card: str) -> list[Any]:
    return MarkdownIt("commonmark", {"html": True}).enable("table").parse(card.split("---\n", 2)[2])


def list_blemishes(card: str) -> list[str]:
    """What a reader would stumble over, whatever the release."""
    tokens, found = read_card(card), []
    headings = [
        (int(token.tag[1]), tokens[place + 1].content)
        for place, token in enumerate(tokens)
        if token.type == "heading_open"
    ]
    if [level for level, _ in headings].count(1) != 1 or headings[0][0] != 1:
        found.append("not one title, at the beginning")
    found += [f"{text} is too deep" for (above, _), (level, text) in pairwise(headings) if level > above + 1]
    for place, token in enumerate(tokens):
        if token.type == "heading_open" and (after := tokens[place + 3 :]):
            level = int(after[0].tag[1]) if after[0].type == "heading_open" else 9
            if level <= int(token.tag[1]):
                found.append(f"nothing under {tokens[place + 1].content}")
        if token.type == "thead_close" and tokens[place + 1].type != "tbody_open":
            found.append(f"an empty table at line {token.map}")
    text = re.sub(r"^(`{3,}).*?^\1$", "code", card, flags=re.DOTALL | re.MULTILINE)
    found += ["two blank lines"] * text.count("\n\n\n") + re.findall(r"\bNone\b|\b1 \w+s\b", text)
    return found + [line for line in text.splitlines() if line.startswith("|") and line.count(NOT_MEASURED) > 2]


@pytest.mark.xdist_group("previews")
def test_a_preview_has_every_section_and_says_on_top_that_nothing_is_built(previewed: Path) -> None:
    card = (previewed / "README.md").read_text("utf-8")
    tokens = read_card(card)
    titles = [
        tokens[place + 1].content for place, token in enumerate(tokens) if token.tag == "h2" and token.nesting == 1
    ]
    assert [title for title in titles if title in SECTIONS] == SECTIONS
    assert BANNER in card.partition("\n## ")[0]
    assert "The figures on this card are what the build recorded" not in card
    assert "Served by vLLM: not checked. Perplexity: not measured." in card
    assert 0 < card.count(NOT_MEASURED) < 8
    assert yaml.safe_load(card.split("---\n")[1])["license"]


@pytest.mark.xdist_group("previews")
def test_a_preview_reads_well(previewed: Path) -> None:
    assert list_blemishes((previewed / "README.md").read_text("utf-8")) == []


def test_the_card_of_a_built_release_reads_well_and_is_no_preview() -> None:
    card = GOLDEN.read_text("utf-8")
    assert list_blemishes(card) == []
    assert BANNER not in card


def test_a_blemish_is_found_wherever_it_is() -> None:
    card = GOLDEN.read_text("utf-8")
    for damaged in (
        card.replace("## Evaluation\n", "## Evaluation\n\n"),
        card.replace("### Calibration health", "#### Calibration health"),
        card.replace("## Usage", "# Usage"),
        card.replace("## Files\n", "## Files\n\n## Files\n", 1),
        card.replace("2 shards.", "1 shards."),
        card.replace("| Layout | `compressed-tensors` |", "| Layout | None |"),
        card.replace("| Layout | `compressed-tensors` |", "| not measured | not measured, not measured |"),
        card + "\n| a | b |\n|---|---|\n",
    ):
        assert damaged != card
        assert list_blemishes(damaged), damaged


@pytest.mark.xdist_group("previews")
def test_a_preview_has_what_starts_the_server_and_what_the_licences_ask_for(previewed: Path) -> None:
    manifest = load_manifest(ROOT / "releases" / f"{previewed.parent.name}.yaml")
    release, files = manifest.release, {path.name for path in previewed.iterdir()}
    assert bool(release.serve) == (files >= set(SERVE_FILES))
    promised = (previewed / "README.md").read_text("utf-8").partition("Their texts will be in this repository: ")[2]
    assert bool(promised) == release.compatibility.license_texts
    assert files >= set(re.findall("`(.+?)`", promised.partition("\n")[0]))
    if release.serve:
        assert os.access(previewed / "serve.sh", os.X_OK)
        subprocess.run(["sh", "-n", previewed / "serve.sh"], check=True)


def test_a_text_that_only_the_base_has_is_stood_in_for_and_one_that_we_have_is_not(tmp_path: Path) -> None:
    name = "behemoth-x-123b-v2.2"
    made = preview(Workspace(load_manifest(ROOT / "releases" / f"{name}.yaml"), tmp_path / name))
    assert (made / "LICENSE").read_text("utf-8") == (
        "In the release, this is TheDrummer/Behemoth-X-123B-v2.2's own file: the text of Mistral AI Research License.\n"
    )
    name = "anubis-pro-105b-v1"
    made = preview(Workspace(load_manifest(ROOT / "releases" / f"{name}.yaml"), tmp_path / name))
    assert "LLAMA 3.3 COMMUNITY LICENSE AGREEMENT" in (made / "LICENSE").read_text("utf-8")


def test_a_preview_is_asked_for_by_name_leaves_no_receipt_and_is_cleaned_with_the_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    (tmp_path / "releases" / "configs").mkdir(parents=True)
    for path in ("deepseek-r1-70b-w8a8.yaml", "configs/llama-70b.json"):
        (tmp_path / "releases" / path).write_bytes((ROOT / "releases" / path).read_bytes())
    monkeypatch.chdir(tmp_path)
    folder = Path("build/deepseek-r1-70b-w8a8")
    assert not DoitMain().run(["preview:deepseek-r1-70b-w8a8"])
    told = capfd.readouterr()
    assert (told.out, told.err) == (f"  {folder}/preview/README.md: nothing was built; 8 files in all\n", "")
    assert [path.name for path in folder.iterdir()] == ["preview"]
    workspace = Workspace(load_manifest(tmp_path / "releases" / "deepseek-r1-70b-w8a8.yaml"), folder)
    removed, _ = clean_stage(workspace, STAGES[-1], Counter(), dry_run=False)
    assert removed == [folder / "preview"] and not folder.exists()

    manifest = tmp_path / "releases" / "deepseek-r1-70b-w8a8.yaml"
    manifest.write_text(manifest.read_text("utf-8").replace("name: w8a8", "name: w8a9"), "utf-8")
    assert DoitMain().run(["preview:deepseek-r1-70b-w8a8"]) == 1
    assert capfd.readouterr().err.startswith("unknown scheme: w8a9\n  in ")
    assert not folder.exists()
