"""Each licence of the lineage gets its due, and what cannot be known is asked of the publisher."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import build
from fake_hub import serve_fake_hub
from rich.console import Console

from builder import hub
from builder.base import find_legal_files
from builder.errors import BuildError, ManifestError, Problems
from builder.files import sha256_file
from builder.licenses import (
    LICENSES,
    SHIPPED_TEXTS,
    Obligations,
    collect_obligations,
    recognise_licenses,
    state_changes,
    tell_source,
)
from builder.lock import describe_what, restore_manifest
from builder.manifest import load_manifest
from builder.stages import Workspace, run_stage
from builder.stages.assemble import is_companion
from builder.stages.fetch import STAGE as FETCH
from builder.stages.plan import gather_obligations
from builder.terminal import print_plan, tell_licenses

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
    assert license.links[0][1] in agreement.replace("\\_", "_")
    assert "adhere to the Acceptable Use Policy" in agreement
    assert "greater than 700 million monthly active users in the preceding calendar month" in agreement
    assert re.search(r"\((\w+ \d+, 20\d\d)\)", license.conditions[0])[1] in agreement  # type: ignore[index]


SHIPPED_HERE, OWN, LINK = (
    "the base's own, else the one shipped with the builder",
    "the base's own, else named by license_files",
    "the base's own, else a link",
)
AGREED = "Community License, Copyright © Meta Platforms, Inc. All Rights Reserved."


def llama_terms(name: str, released: str, prefix: str, source: str) -> list[str]:
    return [
        f"Whoever had more than 700 million monthly active users in the calendar month before the {name} version "
        f"release date ({released}) must request a license from Meta.",
        f"Use of this model must follow the {name} Acceptable Use Policy.",
        f"A model that is created, trained or improved with {source}, and made available, must have a name that "
        f'begins with "{prefix}".',
    ]


# id: (title, the card's tag, text from, on the card, in NOTICE, terms, how the name must begin, links)
TABLE: dict[str, tuple[str, str | None, str, list[str], list[str], list[str], str | None, int]] = {
    "apache-2.0": ("Apache License 2.0", "apache-2.0", SHIPPED_HERE, [], [], [], None, 0),
    "bsd-3-clause": ("BSD 3-Clause License", "bsd-3-clause", OWN, [], [], [], None, 0),
    "cc-by-4.0": ("Creative Commons Attribution 4.0 International", "cc-by-4.0", LINK, [], [], [], None, 1),
    "cc-by-nc-4.0": (
        "Creative Commons Attribution-NonCommercial 4.0 International",
        "cc-by-nc-4.0", LINK, [], [], ["Non-commercial use only."], None, 1,
    ),
    "cohere": (
        "Creative Commons Attribution-NonCommercial 4.0 International with Acceptable Use Addendum",
        "cc-by-nc-4.0", LINK, [], [],
        ["Non-commercial use only.", "Use of this model must follow the Cohere Acceptable Use Policy."], None, 2,
    ),
    "gemma": (
        "Gemma Terms of Use", "gemma", OWN, [],
        ["Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"],
        ["The use restrictions of the Gemma Terms of Use apply to this model and to whatever is derived from it, and "
         "must be passed on with it."], None, 2,
    ),
    "llama3": (
        "Meta Llama 3 Community License Agreement", "llama3", SHIPPED_HERE, ["Built with Meta Llama 3"],
        [f"Meta Llama 3 is licensed under the Meta Llama 3 {AGREED}"],
        [*llama_terms("Meta Llama 3", "April 18, 2024", "Llama 3", "this model"),
         "Neither this model nor its outputs may improve another large language model, derivatives of Meta Llama 3 "
         "aside."],
        "Llama 3", 1,
    ),
    **{
        f"llama3.{n}": (
            f"Llama 3.{n} Community License Agreement", f"llama3.{n}", SHIPPED_HERE, ["Built with Llama"],
            [f"Llama 3.{n} is licensed under the Llama 3.{n} {AGREED}"],
            llama_terms(f"Llama 3.{n}", released, "Llama", "this model or its outputs"), "Llama", 1,
        )
        for n, released in ((1, "July 23, 2024"), (2, "September 25, 2024"), (3, "December 6, 2024"))
    },
    "mit": ("MIT License", "mit", OWN, [], [], [], None, 0),
    "mrl": (
        "Mistral AI Research License", None, OWN, [],
        ["Licensed by Mistral AI under the Mistral AI Research License"],
        ["Research and non-commercial use only."], None, 1,
    ),
    "nvidia-open-model": (
        "NVIDIA Open Model License", None, OWN, [],
        ["Licensed by NVIDIA Corporation under the NVIDIA Open Model License"], [], None, 1,
    ),
    "psf-2.0": ("Python Software Foundation License 2.0", None, OWN, [], [], [], None, 0),
    "qwen": (
        "Qwen LICENSE AGREEMENT", None, OWN, ["Built with Qwen"],
        ["Qwen is licensed under the Qwen LICENSE AGREEMENT, Copyright (c) Alibaba Cloud. All Rights Reserved."],
        ["Whoever uses it commercially with more than 100 million monthly active users must request a license from "
         "Alibaba Cloud."], None, 0,
    ),
}  # fmt: skip


def test_every_licence_that_allows_derivatives_is_in_the_table() -> None:
    assert sorted(TABLE) == sorted(id for id, license in LICENSES.items() if not license.no_derivatives)
    assert ", ".join(sorted(TABLE)) == POSSIBLE
    assert {id for id in LICENSES if id not in TABLE} == {"cc-by-nd-4.0", "cc-by-nc-nd-4.0"}


@pytest.mark.parametrize("id", TABLE)
def test_a_licence_asks_for_what_the_table_says(id: str, tmp_path: Path) -> None:
    title, tag, source, display, notice, terms, prefix, num_links = TABLE[id]
    license = LICENSES[id]
    (tmp_path / "text").write_text(" ".join(license.phrases))
    obligations = collect(tmp_path, [id], license_files={id: tmp_path / "text"}, repo_name="o/Llama-3-X")
    assert (license.title, tell_source(license, ()), license.name_prefix) == (title, source, prefix)
    assert tell_source(license, {id}) == "the manifest's license_files"
    assert list(obligations.display_lines) == display
    assert list(obligations.notice_lines) == notice
    assert list(obligations.conditions) == terms
    assert len(obligations.links) == num_links
    other = {"license": "other", "license_name": id, "license_link": "LICENSE"}
    assert obligations.front_matter == ({"license": tag} if tag else other)
    assert texts(obligations) == {"LICENSE": tmp_path / "text"}
    assert obligations.warnings == obligations.acknowledged == ()  # its own phrases are recognised, the name is right
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
    assert list(obligations.conditions) == TABLE["llama3.3"][5]
    assert obligations.front_matter == {
        "license": "other",
        "license_name": "mit-and-llama3.3",
        "license_link": "LICENSE",
    }
    assert obligations.warnings == ()


def test_one_licence_keeps_its_own_tag_and_its_text_is_LICENSE(tmp_path: Path) -> None:  # noqa: N802
    obligations = collect(tmp_path, ["llama3.1"])
    assert obligations.front_matter == {"license": "llama3.1"}
    assert texts(obligations) == {"LICENSE": SHIPPED_TEXTS / "llama3.1.txt"}


def test_a_licence_without_a_tag_of_the_hubs_is_other_with_a_name_and_a_link(tmp_path: Path) -> None:
    obligations = collect(tmp_path, ["qwen"], {"LICENSE": QWEN})
    assert obligations.front_matter == {"license": "other", "license_name": "qwen", "license_link": "LICENSE"}
    assert obligations.display_lines == ("Built with Qwen",)


def test_a_lineage_of_links_alone_has_no_text_and_links_to_the_first(tmp_path: Path) -> None:
    obligations = collect(tmp_path, ["cc-by-nc-4.0", "cc-by-4.0"])
    assert obligations.texts == ()
    assert obligations.front_matter["license_link"] == "https://creativecommons.org/licenses/by-nc/4.0/"
    assert obligations.conditions == ("Non-commercial use only.",)
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
    assert refusal(tmp_path, ["gemma", "mit"], {"LICENSE": MIT}) == (
        "the text of gemma must be carried, and the base has LICENSE, which is not it\n"
        "  in releases/r.yaml:8: base.licenses\n"
        "  fix: save the text beside the manifest and declare it: license_files: {gemma: path}"
    )


# --- warnings ---------------------------------------------------------------------------------------------------------


def test_a_name_that_does_not_follow_the_rule_is_a_warning_until_it_is_acknowledged(tmp_path: Path) -> None:
    name = "Kaleto/DeepSeek-R1-NVFP4"
    (warning,) = collect(tmp_path, ["llama3.3"], repo_name=name).warnings
    assert str(warning) == (
        "warning (name-prefix): Llama 3.3 Community License Agreement wants the name of a model improved with its "
        'materials to begin with "Llama", and DeepSeek-R1-NVFP4 does not; whether quantization alone counts is '
        "unclear, in releases/r.yaml:8: repo; base.acknowledge: [name-prefix] says that you have read this"
    )
    read = collect(tmp_path, ["llama3.3"], repo_name=name, acknowledged=["name-prefix"])
    assert (read.warnings, read.acknowledged) == ((), (warning,))


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


def test_a_text_that_is_not_recognised_is_carried_with_a_warning(tmp_path: Path) -> None:
    obligations = collect(tmp_path, ["nvidia-open-model"], {"LICENSE": "Some words.\n"})
    assert texts(obligations) == {"LICENSE": tmp_path / "LICENSE"}
    assert [str(warning) for warning in obligations.warnings] == [
        "warning (license-text): LICENSE is carried as the text of nvidia-open-model, but is not recognised as such, "
        "in releases/r.yaml:8: base.licenses; base.acknowledge: [license-text] says that you have read this",
    ]
    (tmp_path / "mit.txt").write_text(MIT)
    (warning,) = collect(tmp_path, ["gemma"], license_files={"gemma": tmp_path / "mit.txt"}).warnings
    assert str(warning) == (
        "warning (license-text): mit.txt is carried as the text of gemma, but reads like mit, in releases/r.yaml:8: "
        "base.license_files; base.acknowledge: [license-text] says that you have read this"
    )


# --- refusals ---------------------------------------------------------------------------------------------------------

LLAMA = "LLAMA 3.3 COMMUNITY LICENSE AGREEMENT\n"
APACHE = "\n  Apache License\n  Version 2.0, January 2004\n"
COHERE = "Creative Commons Attribution-NonCommercial 4.0 International Public License with Acceptable Use Addendum\n"


@pytest.mark.parametrize(
    ("declared", "text", "reads", "declare"),
    [
        (["apache-2.0"], QWEN, "qwen", "apache-2.0, qwen"),
        (["llama3.3"], APACHE, "apache-2.0", "llama3.3, apache-2.0"),
        (["mit"], MIT + LLAMA, "llama3.3", "mit, llama3.3"),
        (["mit"], MIT + LLAMA + APACHE, "apache-2.0 and llama3.3", "mit, apache-2.0, llama3.3"),
        (["cc-by-nc-4.0"], COHERE, "cohere", "cc-by-nc-4.0, cohere"),
    ],
)
def test_a_base_whose_text_contradicts_the_declared_licence_is_refused(
    tmp_path: Path, declared: list[str], text: str, reads: str, declare: str
) -> None:
    assert refusal(tmp_path, declared, {"LICENSE": text}) == (
        f"the base's LICENSE reads like {reads}, which base.licenses does not declare\n"
        "  in releases/r.yaml:8: base.licenses\n"
        f"  fix: write licenses: [{declare}], without what is not in the lineage; or, if such a file is not about "
        "these weights, acknowledge: [undeclared-license]"
    )
    assert collect(tmp_path, declare.split(", "), {"LICENSE": text}).warnings == ()


def test_a_contradiction_and_the_text_it_hides_are_told_together(tmp_path: Path) -> None:
    with pytest.raises(Problems) as caught:
        collect(tmp_path, ["mit"], {"LICENSE": APACHE})
    assert [problem.what for problem in caught.value.problems] == [
        "the base's LICENSE reads like apache-2.0, which base.licenses does not declare",
        "the text of mit must be carried, and the base has LICENSE, which is not it",
    ]


def test_a_contradiction_that_is_acknowledged_is_told_and_its_text_still_carried(tmp_path: Path) -> None:
    obligations = collect(tmp_path, ["apache-2.0"], {"LICENSE": QWEN}, acknowledged=["undeclared-license"])
    assert [warning.text for warning in obligations.acknowledged] == [
        "the base's LICENSE reads like qwen, which base.licenses does not declare"
    ]
    assert (obligations.warnings, obligations.front_matter) == ((), {"license": "apache-2.0"})
    assert texts(obligations) == {"LICENSE": SHIPPED_TEXTS / "apache-2.0.txt", "LICENSE.base": tmp_path / "LICENSE"}


def test_an_addendum_that_repeats_a_licence_is_no_contradiction(tmp_path: Path) -> None:
    assert texts(collect(tmp_path, ["cohere"], {"LICENSE": COHERE})) == {"LICENSE": tmp_path / "LICENSE"}


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


# --- before a night of work -------------------------------------------------------------------------------------------


def test_a_plan_refuses_the_licences_of_a_base_that_is_at_hand(
    write_release: Callable[..., Path], tmp_path: Path
) -> None:
    manifest = write_release()
    (manifest.parent / "base" / "LICENSE").write_text(MIT)
    with pytest.raises(Problems) as caught:
        build(manifest, tmp_path / "build", "plan")
    where = f"{manifest}:6:3: base.licenses: [psf-2.0]"
    assert str(caught.value) == (
        "the base's LICENSE reads like mit, which base.licenses does not declare\n"
        f"  in {where}\n"
        "  fix: write licenses: [psf-2.0, mit], without what is not in the lineage; or, if such a file is not about "
        "these weights, acknowledge: [undeclared-license]\n"
        "the text of psf-2.0 must be carried, and the base has LICENSE, which is not it\n"
        f"  in {where}\n"
        "  fix: save the text beside the manifest and declare it: license_files: {psf-2.0: path}"
    )


def test_a_licence_without_its_text_is_refused_before_weights_are_downloaded(
    write_release: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"base.path": None, "base.model": "acme/tiny", "base.licenses": ["gemma"]}
    files = {path.name: path.read_bytes() for path in (write_release().parent / "base").iterdir()}
    files["LICENSE"] = b"Own words.\n"
    monkeypatch.setattr(hub, "MAX_RETRIES", 0)
    with serve_fake_hub(tmp_path, monkeypatch) as fake:
        revision = fake.add("acme/tiny", {**files, "LICENSE": MIT.encode()})
        workspace = Workspace(load_manifest(write_release(**given, **{"base.revision": revision})), tmp_path / "build")
        with pytest.raises(Problems) as caught:
            run_stage(workspace, FETCH)
        assert [problem.what for problem in caught.value.problems] == [
            "the base's LICENSE reads like mit, which base.licenses does not declare",
            "the text of gemma must be carried, and the base has LICENSE, which is not it",
        ]
        weights = [answer for answer in fake.answers if answer.name.endswith(".safetensors")]
        sizes = {name: len(content) for name, content in files.items()}
        assert weights and all(fake.num_bytes_sent(answer.name) < sizes[answer.name] / 10 for answer in weights)


def test_a_build_from_a_lock_asks_the_publisher_nothing(write_release: Callable[..., Path]) -> None:
    path = write_release(**{"base.licenses": ["apache-2.0", "llama3.3"]})
    locked = restore_manifest({"what": describe_what(load_manifest(path))}, path.with_suffix(".lock.json"), how={})
    found = gather_obligations(Workspace(locked, path.parent), find_legal_files(path.parent / "base"))
    assert [warning.id for warning in found.acknowledged] == ["name-prefix", "undeclared-license"]
    with pytest.raises(ManifestError, match=r"reads like psf-2\.0"):
        gather_obligations(Workspace(load_manifest(path), path.parent), find_legal_files(path.parent / "base"))


def test_legal_files_are_found_however_they_are_spelled_and_are_no_companions(tmp_path: Path) -> None:
    legal = {"COPYING", "LICENSE-MODEL", "Licence.pdf", "Notice", "USE_POLICY.md", "license.txt"}
    for name in (*legal, "config.json", "README.md", "Llama.gguf"):
        (tmp_path / name).write_text("{}")
    assert set(find_legal_files(tmp_path)) == legal
    assert not any(is_companion(name) for name in legal)


def test_a_plan_tells_what_the_licences_ask_for(write_release: Callable[..., Path], tmp_path: Path) -> None:
    changes = {"base.licenses": ["psf-2.0", "llama3.3"], "base.acknowledge": ["name-prefix"]}
    workspace = build(write_release(**changes), tmp_path / "build", "plan")
    rows = tell_licenses(workspace.manifest)
    asks = "Llama 3.3 Community License Agreement"
    assert rows == [
        ("licence", f"Python Software Foundation License 2.0: its text is {OWN}"),
        ("licence", f"{asks}: its text is {SHIPPED_HERE}"),
        ("on the card", "Built with Llama"),
        ("in NOTICE", f"Llama 3.3 is licensed under the Llama 3.3 {AGREED}"),
        *(("terms", line) for line in TABLE["llama3.3"][5]),
        (
            "acknowledged",
            f'{asks} wants the name of a model improved with its materials to begin with "Llama", and tiny-llama-NVFP4 '
            "does not; whether quantization alone counts is unclear",
        ),
    ]
    shown = io.StringIO()
    print_plan(workspace, Console(file=shown, width=400))
    lines = [" ".join(line.split()) for line in shown.getvalue().splitlines()]
    assert all(f"{label} {text}" in lines for label, text in rows)
