"""Each licence of the lineage gets its due, and what cannot be known is asked of the publisher."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from builder.errors import BuildError, ManifestError, Problems
from builder.files import sha256_file
from builder.licenses import (
    LICENSES,
    SHIPPED_TEXTS,
    Obligations,
    collect_obligations,
    recognise_licenses,
    state_changes,
)

ROOT = Path(__file__).parent.parent
MIT = (
    "MIT License\n\nCopyright (c) 2023 DeepSeek\n\nPermission is hereby granted, free of charge, to any person\n"
    "obtaining a copy of this software ...\n"
)
QWEN = "# Qwen LICENSE AGREEMENT\n\nQwen LICENSE AGREEMENT Release Date: September 19, 2024\n"
SHIPPED = ["apache-2.0", "llama3", "llama3.1", "llama3.2", "llama3.3"]
POSSIBLE = (
    "apache-2.0, bsd-3-clause, cc-by-4.0, cc-by-nc-4.0, cohere, gemma, llama3, llama3.1, llama3.2, llama3.3, mit, mrl, "
    "nvidia-open-model, psf-2.0, qwen"
)


def where(*keys: str) -> str:
    return f"releases/r.yaml:8: {'.'.join(keys)}"


def collect(folder: Path, licenses: list[str], base: dict[str, str] | None = None, **changes: Any) -> Obligations:
    """Obligations of a base folder that holds the given files."""
    for name, text in (base or {}).items():
        (folder / name).write_text(text, "utf-8")
    given = {"repo_name": "Kaleto/Llama-NVFP4", "acknowledged": (), "license_files": {}, **changes}
    return collect_obligations(licenses, base_files={name: folder / name for name in base or {}}, where=where, **given)


def texts(obligations: Obligations) -> dict[str, Path]:
    return {text.name: text.path for text in obligations.texts}


def refusal(folder: Path, *given: Any, **changes: Any) -> str:
    with pytest.raises(ManifestError) as caught:
        collect(folder, *given, **changes)
    return str(caught.value)


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_shipped_texts_are_the_reviewed_ones() -> None:
    rows = re.findall(r"^\| (\S+)\.txt \| ([0-9a-f]{64}) \|", (SHIPPED_TEXTS / "README.md").read_text(), re.MULTILINE)
    assert {id: sha256_file(SHIPPED_TEXTS / f"{id}.txt") for id in SHIPPED} == dict(rows)
    assert {path.name for path in SHIPPED_TEXTS.iterdir()} == {"README.md", *(f"{id}.txt" for id in SHIPPED)}
    assert [license.id for license in LICENSES.values() if license.shipped] == SHIPPED
    assert (SHIPPED_TEXTS / "apache-2.0.txt").read_bytes() == (ROOT / "LICENSE").read_bytes()


@pytest.mark.parametrize("id", SHIPPED)
def test_each_shipped_text_is_recognised_as_its_own_licence_and_no_other(id: str) -> None:
    assert recognise_licenses((SHIPPED_TEXTS / f"{id}.txt").read_text("utf-8")) == {id}


@pytest.mark.parametrize("id", SHIPPED[1:])
def test_what_a_llama_release_shows_is_word_for_word_what_its_agreement_asks(id: str) -> None:
    license = LICENSES[id]
    agreement = license.shipped_text.read_text("utf-8")
    assert f"prominently display “{license.display[0]}”" in agreement
    assert (
        f"following attribution notice within a “Notice” text file distributed as a part of such copies: "
        f"“{license.notice[0]}”" in agreement
    )
    assert f"include “{license.name_prefix}” at the beginning of any such AI model name" in agreement
    assert license.links[0][1] in agreement
    assert "greater than 700 million monthly active users in the preceding calendar month" in agreement
    assert re.search(r"\((\w+ \d+, 20\d\d)\)", license.conditions[0])[1] in agreement  # type: ignore[index]


def test_every_licence_can_be_described_to_the_hub_and_is_recognised_by_something() -> None:
    for license in LICENSES.values():
        assert license.phrases and license.title
        assert license.requires_text or license.links  # the card's link when there is no text


# --- obligations ------------------------------------------------------------------------------------------------------


def test_a_lineage_owes_the_union_in_its_own_order(tmp_path: Path) -> None:
    obligations = collect(tmp_path, ["mit", "llama3.3"], {"LICENSE": MIT})
    assert texts(obligations) == {
        "LICENSE": tmp_path / "LICENSE",
        "LICENSE.llama3.3": SHIPPED_TEXTS / "llama3.3.txt",
    }
    assert obligations.display_lines == ("Built with Llama",)
    assert obligations.notice_lines == (
        "Llama 3.3 is licensed under the Llama 3.3 Community License, Copyright © Meta Platforms, Inc. "
        "All Rights Reserved.",
    )
    assert obligations.links == (("Llama 3.3 Acceptable Use Policy", "https://www.llama.com/llama3_3/use-policy"),)
    assert obligations.conditions == (
        "Whoever had more than 700 million monthly active users in the calendar month before the Llama 3.3 version "
        "release date (December 6, 2024) must request a license from Meta.",
    )
    assert obligations.front_matter == {
        "license": "other",
        "license_name": "mit-and-llama3.3",
        "license_link": "LICENSE",
    }
    assert (obligations.warnings, obligations.non_commercial, obligations.state_changes) == ((), False, False)


def test_one_licence_keeps_its_own_tag_and_its_text_is_LICENSE(tmp_path: Path) -> None:  # noqa: N802
    obligations = collect(tmp_path, ["llama3.1"])
    assert obligations.front_matter == {"license": "llama3.1"}
    assert texts(obligations) == {"LICENSE": SHIPPED_TEXTS / "llama3.1.txt"}


def test_a_licence_without_a_tag_of_the_hubs_is_other_with_a_name_and_a_link(tmp_path: Path) -> None:
    obligations = collect(tmp_path, ["qwen"], {"LICENSE": QWEN})
    assert obligations.front_matter == {"license": "other", "license_name": "qwen", "license_link": "LICENSE"}
    assert obligations.display_lines == ("Built with Qwen",)
    assert obligations.state_changes


def test_a_lineage_of_links_alone_has_no_text_and_links_to_the_first(tmp_path: Path) -> None:
    obligations = collect(tmp_path, ["cc-by-nc-4.0", "cc-by-4.0"])
    assert obligations.texts == ()
    assert obligations.front_matter["license_link"] == "https://creativecommons.org/licenses/by-nc/4.0/"
    assert obligations.non_commercial and obligations.conditions == ("Non-commercial use only.",)
    assert collect(tmp_path, ["cc-by-nc-4.0", "cohere"]).front_matter == {"license": "cc-by-nc-4.0"}


def test_the_same_line_owed_twice_is_shown_once(tmp_path: Path) -> None:
    obligations = collect(tmp_path, ["llama3.1", "llama3.3", "llama3.1"])
    assert obligations.display_lines == ("Built with Llama",)
    assert len(obligations.notice_lines) == len(obligations.texts) == 2


def test_a_changed_work_says_so() -> None:
    assert state_changes(base_model="org/Base", scheme="NVFP4") == (
        "This work modifies org/Base: its weights were quantized to NVFP4."
    )


# --- texts ------------------------------------------------------------------------------------------------------------


def test_the_manifests_text_goes_before_the_bases_and_the_bases_before_the_shipped_one(tmp_path: Path) -> None:
    own = {"LICENSE.txt": (SHIPPED_TEXTS / "llama3.3.txt").read_text("utf-8")}
    assert texts(collect(tmp_path, ["llama3.3"], own)) == {"LICENSE": tmp_path / "LICENSE.txt"}
    declared = tmp_path / "declared.txt"
    declared.write_text("LLAMA 3.3 COMMUNITY LICENSE AGREEMENT\n")
    assert texts(collect(tmp_path, ["llama3.3"], own, license_files={"llama3.3": declared})) == {
        "LICENSE": declared,
        "LICENSE.txt": tmp_path / "LICENSE.txt",
    }


def test_nothing_of_the_base_is_lost_or_overwritten(tmp_path: Path) -> None:
    obligations = collect(
        tmp_path,
        ["llama3.3"],
        {"LICENSE": "Own words.\n", "NOTICE.txt": "By X.\n", "USE_POLICY.md": "Be good.\n"},
    )
    assert texts(obligations) == {
        "LICENSE": SHIPPED_TEXTS / "llama3.3.txt",
        "LICENSE.base": tmp_path / "LICENSE",
        "USE_POLICY.md": tmp_path / "USE_POLICY.md",
    }
    assert obligations.upstream_notices == (tmp_path / "NOTICE.txt",)


def test_one_file_with_the_texts_of_two_licences_is_carried_once(tmp_path: Path) -> None:
    both = MIT + "\nLlama 3.3\nCommunity License **Agreement**\n"
    assert texts(collect(tmp_path, ["mit", "llama3.3"], {"LICENSE": both})) == {"LICENSE": tmp_path / "LICENSE"}


def test_a_text_that_must_be_carried_and_is_nowhere_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, ["gemma"]) == (
        "the text of gemma must be carried, and the base has no licence file\n"
        "  in releases/r.yaml:8: base.licenses\n"
        "  fix: save the text beside the manifest and declare it: license_files: {gemma: path}"
    )
    assert refusal(tmp_path, ["gemma"], {"LICENSE": MIT}) == (
        "the text of gemma must be carried, and the base has LICENSE, which is not it\n"
        "  in releases/r.yaml:8: base.licenses\n"
        "  fix: save the text beside the manifest and declare it: license_files: {gemma: path}"
    )


# --- warnings ---------------------------------------------------------------------------------------------------------


def test_a_name_that_does_not_follow_the_rule_is_a_warning_until_it_is_acknowledged(tmp_path: Path) -> None:
    name = "Kaleto/DeepSeek-R1-NVFP4"
    (warning,) = collect(tmp_path, ["llama3.3"], repo_name=name).warnings
    assert (warning.id, warning.text) == (
        "name-prefix",
        "Llama 3.3 Community License Agreement wants the name of a model improved with its materials to begin with "
        '"Llama", and DeepSeek-R1-NVFP4 does not; whether quantization alone counts is unclear',
    )
    assert collect(tmp_path, ["llama3.3"], repo_name=name, acknowledged=["name-prefix"]).warnings == ()


@pytest.mark.parametrize(
    ("id", "name", "follows"),
    [
        ("llama3", "o/Llama-3-8B-NVFP4", True),
        ("llama3", "o/Meta-Llama-3-8B-NVFP4", False),
        ("llama3.3", "llama3-small", True),
        ("llama3.3", "llama/R1", False),
        ("apache-2.0", "o/R1", True),
    ],
)
def test_the_name_rule_looks_at_the_published_name_alone(tmp_path: Path, id: str, name: str, follows: bool) -> None:
    assert (collect(tmp_path, [id], repo_name=name).warnings == ()) is follows


def test_a_base_whose_text_contradicts_the_declared_licence_is_reported(tmp_path: Path) -> None:
    (warning,) = collect(tmp_path, ["apache-2.0"], {"LICENSE": QWEN}).warnings
    assert (warning.id, warning.text) == (
        "undeclared-license",
        "the base's LICENSE reads like qwen, which base.licenses does not declare",
    )


def test_a_text_that_is_not_recognised_is_carried_with_a_warning(tmp_path: Path) -> None:
    obligations = collect(tmp_path, ["nvidia-open-model"], {"LICENSE": "Some words.\n"})
    assert texts(obligations) == {"LICENSE": tmp_path / "LICENSE"}
    assert [(warning.id, warning.text) for warning in obligations.warnings] == [
        ("license-text", "LICENSE is carried as the text of nvidia-open-model, but is not recognised as such"),
    ]
    (tmp_path / "mit.txt").write_text(MIT)
    (warning,) = collect(tmp_path, ["gemma"], license_files={"gemma": tmp_path / "mit.txt"}).warnings
    assert (warning.id, warning.text) == (
        "license-text",
        "mit.txt is carried as the text of gemma, but reads like mit",
    )


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_an_unknown_licence_is_refused_with_the_nearest_one(tmp_path: Path) -> None:
    assert refusal(tmp_path, ["llama-3.3"]) == (
        "unknown licence: llama-3.3\n"
        "  in releases/r.yaml:8: base.licenses\n"
        f"  fix: did you mean llama3.3? Valid: {POSSIBLE}"
    )


def test_a_base_without_a_licence_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, []) == (
        "no licence is declared\n"
        "  in releases/r.yaml:8: base.licenses\n"
        f"  fix: list the whole lineage, as in [mit, llama3.3]; possible are {POSSIBLE}"
    )


def test_a_licence_that_allows_no_derivatives_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, ["cc-by-nc-nd-4.0"]) == (
        "cc-by-nc-nd-4.0 allows no derivatives to be shared, and a quantized model is one\n"
        "  in releases/r.yaml:8: base.licenses\n"
        "  fix: quantize a base whose licence allows derivatives"
    )


def test_an_unknown_warning_cannot_be_acknowledged(tmp_path: Path) -> None:
    assert refusal(tmp_path, ["llama3.3"], acknowledged=["name-prefx"]) == (
        "unknown warning: name-prefx\n"
        "  in releases/r.yaml:8: base.acknowledge\n"
        "  fix: did you mean name-prefix? Valid: license-text, name-prefix, undeclared-license"
    )


def test_a_declared_text_must_exist_and_belong_to_a_declared_licence(tmp_path: Path) -> None:
    missing = tmp_path / "no.txt"
    with pytest.raises(Problems) as caught:
        collect(tmp_path, ["gemma", "mit"], license_files={"gemma": missing, "qwen": missing})
    assert str(caught.value) == (
        f"no such file: {missing}\n"
        "  in releases/r.yaml:8: base.license_files\n"
        "  fix: put the text of gemma there, or correct the path\n"
        "a text is given for qwen, which is not among the licences\n"
        "  in releases/r.yaml:8: base.license_files\n"
        "  fix: use one of gemma, mit"
    )


def test_all_missing_texts_are_told_together(tmp_path: Path) -> None:
    with pytest.raises(BuildError) as caught:
        collect(tmp_path, ["gemma", "qwen"])
    assert isinstance(caught.value, Problems)
    assert [problem.what.split(" must")[0] for problem in caught.value.problems] == [
        "the text of gemma",
        "the text of qwen",
    ]
