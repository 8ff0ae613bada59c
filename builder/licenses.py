"""Licence id -> what a quantized derivative must carry and show, united along the base's declared lineage.

This is bookkeeping, not legal advice. Obligations come from `base.licenses` alone, never from one tag of the base: an
MIT model distilled from Llama 3.3 owes the MIT text *and* the Llama agreement, its notice and "Built with Llama". Texts
reviewed 2026-11.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from builder.errors import BuildError, ManifestError, nearest, raise_all

T = TypeVar("T")
SHIPPED_TEXTS = Path(__file__).parent / "license_texts"
UNDECLARED = "undeclared-license"
WARNING_IDS = ("license-text", "name-prefix", UNDECLARED)


@dataclass(frozen=True, kw_only=True)
class License:
    """What one licence asks of a redistributed, quantized derivative; that its changes are stated is asked of each.

    hub_tag: the card's `license` value; None where the Hub has none: the card says `other` with a name and a link.
    phrases: all of them occur in the licence's text, case and white space aside; how a text is recognised.
    requires_text: a copy must accompany the artifact; `shipped` ones need none from the base.
    display, notice: lines for the card and for the NOTICE file, verbatim as the licence wants them.
    conditions: sentences that every recipient must be told.
    repeats: licences whose words this one's text holds as well, without their being another part of the lineage.
    name_prefix: how the name of a derived model must begin; a warning, for whether quantization counts is unclear.
    """

    id: str
    title: str
    phrases: tuple[str, ...]
    hub_tag: str | None = None
    requires_text: bool = True
    shipped: bool = False
    no_derivatives: bool = False
    display: tuple[str, ...] = ()
    notice: tuple[str, ...] = ()
    links: tuple[tuple[str, str], ...] = ()
    conditions: tuple[str, ...] = ()
    repeats: tuple[str, ...] = ()
    name_prefix: str | None = None

    @property
    def shipped_text(self) -> Path:
        return SHIPPED_TEXTS / f"{self.id}.txt"


def llama(
    id: str, *, name: str, built_with: str, prefix: str, policy: str, released: str, source: str, besides: str = ""
) -> License:
    """A Llama community licence; `name` as its attribution notice spells it.

    source: with what a model must have been made, that the name rule holds for it. besides: a condition of its own.
    """
    return License(
        id=id,
        title=f"{name} Community License Agreement",
        phrases=(f"{name} community license agreement",),
        hub_tag=id,
        shipped=True,
        display=(f"Built with {built_with}",),
        notice=(
            f"{name} is licensed under the {name} Community License, "
            "Copyright © Meta Platforms, Inc. All Rights Reserved.",
        ),
        links=((f"{name} Acceptable Use Policy", policy),),
        conditions=(
            f"Whoever had more than 700 million monthly active users in the calendar month before the {name} version "
            f"release date ({released}) must request a license from Meta.",
            f"Use of this model must follow the {name} Acceptable Use Policy.",
            f"A model that is created, trained or improved with {source}, and made available, must have a name that "
            f'begins with "{prefix}".',
            *([besides] if besides else []),
        ),
        name_prefix=prefix,
    )


def creative_commons(
    kind: str, *, title: str, hub_tag: str | None, non_commercial: bool = False, no_derivatives: bool = False
) -> License:
    """A Creative Commons 4.0 licence; a link to it stands in for its text."""
    return License(
        id=f"cc-{kind}-4.0",
        title=f"Creative Commons {title} 4.0 International",
        phrases=(f"{title} 4.0 international",),
        hub_tag=hub_tag,
        requires_text=False,
        no_derivatives=no_derivatives,
        links=((f"Creative Commons {title} 4.0 International", f"https://creativecommons.org/licenses/{kind}/4.0/"),),
        conditions=("Non-commercial use only.",) if non_commercial else (),
    )


LICENSES: Mapping[str, License] = {
    license.id: license
    for license in (
        License(
            id="apache-2.0",
            title="Apache License 2.0",
            phrases=("apache license version 2.0, january 2004",),
            hub_tag="apache-2.0",
            shipped=True,
        ),
        License(
            id="bsd-3-clause",
            title="BSD 3-Clause License",
            phrases=("redistributions in binary form must reproduce", "neither the name"),
            hub_tag="bsd-3-clause",
        ),
        creative_commons("by", title="Attribution", hub_tag="cc-by-4.0"),
        creative_commons("by-nc", title="Attribution-NonCommercial", hub_tag="cc-by-nc-4.0", non_commercial=True),
        creative_commons("by-nd", title="Attribution-NoDerivatives", hub_tag=None, no_derivatives=True),
        creative_commons(
            "by-nc-nd",
            title="Attribution-NonCommercial-NoDerivatives",
            hub_tag=None,
            non_commercial=True,
            no_derivatives=True,
        ),
        License(
            id="cohere",
            title="Creative Commons Attribution-NonCommercial 4.0 International with Acceptable Use Addendum",
            phrases=("acceptable use addendum",),
            hub_tag="cc-by-nc-4.0",
            requires_text=False,
            links=(
                (
                    "Creative Commons Attribution-NonCommercial 4.0 International",
                    "https://creativecommons.org/licenses/by-nc/4.0/",
                ),
                ("Cohere Acceptable Use Policy", "https://docs.cohere.com/docs/c4ai-acceptable-use-policy"),
            ),
            conditions=("Non-commercial use only.", "Use of this model must follow the Cohere Acceptable Use Policy."),
            repeats=("cc-by-nc-4.0",),
        ),
        License(
            id="gemma",
            title="Gemma Terms of Use",
            phrases=("gemma terms of use",),
            hub_tag="gemma",
            notice=(
                "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
            ),
            links=(
                ("Gemma Terms of Use", "https://ai.google.dev/gemma/terms"),
                ("Gemma Prohibited Use Policy", "https://ai.google.dev/gemma/prohibited_use_policy"),
            ),
            conditions=(
                "The use restrictions of the Gemma Terms of Use apply to this model and to whatever is derived from "
                "it, and must be passed on with it.",
            ),
        ),
        llama(
            "llama3",
            name="Meta Llama 3",
            built_with="Meta Llama 3",
            prefix="Llama 3",
            policy="https://llama.meta.com/llama3/use-policy",
            released="April 18, 2024",
            source="this model",
            besides="Neither this model nor its outputs may improve another large language model, derivatives of Meta "
            "Llama 3 aside.",
        ),
        llama(
            "llama3.1",
            name="Llama 3.1",
            built_with="Llama",
            prefix="Llama",
            policy="https://llama.meta.com/llama3_1/use-policy",
            released="July 23, 2024",
            source="this model or its outputs",
        ),
        llama(
            "llama3.2",
            name="Llama 3.2",
            built_with="Llama",
            prefix="Llama",
            policy="https://www.llama.com/llama3_2/use-policy",
            released="September 25, 2024",
            source="this model or its outputs",
        ),
        llama(
            "llama3.3",
            name="Llama 3.3",
            built_with="Llama",
            prefix="Llama",
            policy="https://www.llama.com/llama3_3/use-policy",
            released="December 6, 2024",
            source="this model or its outputs",
        ),
        License(
            id="mit",
            title="MIT License",
            phrases=("permission is hereby granted, free of charge, to any person obtaining a copy",),
            hub_tag="mit",
        ),
        License(
            id="mrl",
            title="Mistral AI Research License",
            phrases=("mistral ai research license",),
            notice=("Licensed by Mistral AI under the Mistral AI Research License",),
            links=(("Mistral AI Research License", "https://mistral.ai/licenses/MRL-0.1.md"),),
            conditions=("Research and non-commercial use only.",),
        ),
        License(
            id="nvidia-open-model",
            title="NVIDIA Open Model License",
            phrases=("nvidia open model license",),
            notice=("Licensed by NVIDIA Corporation under the NVIDIA Open Model License",),
            links=(
                (
                    "NVIDIA Open Model License",
                    "https://www.nvidia.com/en-us/agreements/enterprise-software/nvidia-open-model-license/",
                ),
            ),
        ),
        License(
            id="psf-2.0",
            title="Python Software Foundation License 2.0",
            phrases=("python software foundation license version 2",),
        ),
        License(
            id="qwen",
            title="Qwen LICENSE AGREEMENT",
            phrases=("qwen license agreement",),
            display=("Built with Qwen",),
            notice=(
                "Qwen is licensed under the Qwen LICENSE AGREEMENT, Copyright (c) Alibaba Cloud. All Rights Reserved.",
            ),
            conditions=(
                "Whoever uses it commercially with more than 100 million monthly active users must request a license "
                "from Alibaba Cloud.",
            ),
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Text:
    """A file to be copied into the artifact: `name` there, `path` now."""

    name: str
    path: Path


@dataclass(frozen=True, kw_only=True)
class Warning:
    """Something only the publisher can judge; silenced by its id in `base.acknowledge`. where: the manifest's line."""

    id: str
    text: str
    where: str

    def __str__(self) -> str:
        told = f"base.acknowledge: [{self.id}] says that you have read this"
        return f"warning ({self.id}): {self.text}, in {self.where}; {told}"


@dataclass(frozen=True, kw_only=True)
class Obligations:
    """What the card, the NOTICE file and the artifact's folder owe to the licences of the lineage.

    texts: the first licence's text is LICENSE, the others LICENSE.<id>; what else the base had keeps its name, or
    gets the ending .base where that name is taken.
    upstream_notices: the base's NOTICE files, whose words the artifact's NOTICE repeats.
    warnings, acknowledged: what the publisher has still to read, and has read.
    front_matter: `license`, and `license_name` and `license_link` where that is `other`.
    """

    licenses: tuple[License, ...]
    texts: tuple[Text, ...]
    upstream_notices: tuple[Path, ...]
    warnings: tuple[Warning, ...]
    acknowledged: tuple[Warning, ...]
    display_lines: tuple[str, ...]
    notice_lines: tuple[str, ...]
    links: tuple[tuple[str, str], ...]
    conditions: tuple[str, ...]
    front_matter: Mapping[str, str]


def collect_obligations(
    licenses: Sequence[str],
    *,
    repo_name: str,
    acknowledged: Collection[str],
    base_files: Mapping[str, Path],
    license_files: Mapping[str, Path],
    where: Callable[..., str],
) -> Obligations:
    """The union of what the licences of a lineage ask, in the order they are declared.

    repo_name: as published, with or without its owner.
    base_files: the base's LICENSE*, NOTICE*, USE_POLICY* and such, by name.
    license_files: texts the manifest adds, by licence id.
    where: manifest keys -> where they stand, for errors.
    Raises ManifestError, or Problems with several: no licence, an unknown one, one that allows no derivatives, a text
    that must be carried and is nowhere, one of the base's that reads like a licence that is not declared (unless that
    is acknowledged), an unknown entry in `acknowledge` or `license_files`.
    """
    lineage = bind_licenses(licenses, acknowledged=acknowledged, license_files=license_files, where=where)
    texts, text_warnings, problems = choose_texts(lineage, base_files, license_files, where)
    contradictions, fix = find_contradictions(lineage, base_files, where)
    if UNDECLARED not in acknowledged:
        problems = [*(ManifestError(found.text, found.where, fix) for found in contradictions), *problems]
    raise_all(problems)
    warnings = (*name_warnings(lineage, repo_name, where), *contradictions, *text_warnings)
    return Obligations(
        licenses=lineage,
        texts=texts,
        upstream_notices=tuple(base_files[name] for name in sorted(base_files) if is_notice(name)),
        warnings=tuple(warning for warning in warnings if warning.id not in acknowledged),
        acknowledged=tuple(warning for warning in warnings if warning.id in acknowledged),
        display_lines=unique(line for license in lineage for line in license.display),
        notice_lines=unique(line for license in lineage for line in license.notice),
        links=unique(link for license in lineage for link in license.links),
        conditions=unique(line for license in lineage for line in license.conditions),
        front_matter=describe_for_hub(lineage, has_text=any(text.name == "LICENSE" for text in texts)),
    )


def bind_licenses(
    licenses: Sequence[str],
    *,
    acknowledged: Collection[str],
    license_files: Mapping[str, Path],
    where: Callable[..., str],
) -> tuple[License, ...]:
    """The rows of the table that a manifest names, each once; a wrong name is told before the base is there."""
    problems: list[BuildError] = []
    possible = sorted(id for id, license in LICENSES.items() if not license.no_derivatives)
    if not licenses:
        problems.append(
            ManifestError(
                "no licence is declared",
                where("base", "licenses"),
                f"list the whole lineage, as in [mit, llama3.3]; possible are {', '.join(possible)}",
            )
        )
    for id in unique(licenses):
        if id not in LICENSES:
            problems.append(ManifestError(f"unknown licence: {id}", where("base", "licenses"), nearest(id, possible)))
        elif LICENSES[id].no_derivatives:
            problems.append(
                ManifestError(
                    f"{id} allows no derivatives to be shared, and a quantized model is one",
                    where("base", "licenses"),
                    "quantize a base whose licence allows derivatives",
                )
            )
    for id in acknowledged:
        if id not in WARNING_IDS:
            problems.append(
                ManifestError(f"unknown warning: {id}", where("base", "acknowledge"), nearest(id, WARNING_IDS))
            )
    for id in license_files:
        if id not in licenses:
            problems.append(
                ManifestError(
                    f"a text is given for {id}, which is not among the licences",
                    where("base", "license_files"),
                    nearest(id, licenses) if licenses else f"add {id} to base.licenses",
                )
            )
        elif not license_files[id].is_file():
            problems.append(
                ManifestError(
                    f"no such file: {license_files[id]}",
                    where("base", "license_files"),
                    f"put the text of {id} there, or correct the path",
                )
            )
    raise_all(problems)
    return tuple(LICENSES[id] for id in unique(licenses))


def find_contradictions(
    lineage: Sequence[License], base_files: Mapping[str, Path], where: Callable[..., str]
) -> tuple[tuple[Warning, ...], str]:
    """Licences that the base's own files read like and the manifest does not declare; with them, what to declare.

    Whether or not the declared ones are there too: a Llama agreement below an MIT text binds all the same.
    """
    declared = unique(license.id for license in lineage)
    covered = {*declared, *(id for license in lineage for id in license.repeats)}
    found = {name: recognise_licenses(read_text(base_files[name])) - covered for name in sorted(base_files)}
    found = {name: ids for name, ids in found.items() if ids and is_license(name)}
    warnings = tuple(
        Warning(
            id=UNDECLARED,
            text=f"the base's {name} reads like {spell(ids)}, which base.licenses does not declare",
            where=where("base", "licenses"),
        )
        for name, ids in found.items()
    )
    all_of_them = unique([*declared, *sorted(set().union(*found.values()))])
    fix = (
        f"write licenses: [{', '.join(all_of_them)}], without what is not in the lineage; or, if such a file is not "
        f"about these weights, acknowledge: [{UNDECLARED}]"
    )
    return warnings, fix


def choose_texts(
    lineage: Sequence[License],
    base_files: Mapping[str, Path],
    license_files: Mapping[str, Path],
    where: Callable[..., str],
) -> tuple[tuple[Text, ...], tuple[Warning, ...], list[BuildError]]:
    """Each licence's text: the manifest's, else the base's that reads like it, else ours, else an unrecognised one.

    Returns also what is odd about them, and a problem for each that is nowhere.
    """
    candidates = {name: base_files[name] for name in sorted(base_files) if is_license(name)}
    reads_like = {name: recognise_licenses(read_text(path)) for name, path in candidates.items()}
    unrecognised = [name for name in candidates if not reads_like[name]]
    warnings: list[Warning] = []
    problems: list[BuildError] = []
    chosen: dict[str, Path] = {}
    used: set[str] = set()
    for license in lineage:
        own = [name for name in candidates if license.id in reads_like[name]]
        if license.id in license_files:
            path = license_files[license.id]
            if license.id not in (found := recognise_licenses(read_text(path))):
                warnings.append(odd_text(license, path.name, found, where("base", "license_files")))
            chosen[license.id] = path
        elif own:
            if own[0] not in used:  # one file may hold the texts of several licences
                chosen[license.id] = candidates[own[0]]
            used.add(own[0])
        elif license.shipped:
            chosen[license.id] = license.shipped_text
        elif license.requires_text and unrecognised:
            name = unrecognised.pop(0)
            warnings.append(odd_text(license, name, frozenset(), where("base", "licenses")))
            chosen[license.id] = candidates[name]
            used.add(name)
        elif license.requires_text:
            found_there = f"has {', '.join(candidates)}, which is not it" if candidates else "has no licence file"
            problems.append(
                ManifestError(
                    f"the text of {license.id} must be carried, and the base {found_there}",
                    where("base", "licenses"),
                    f"save the text beside the manifest and declare it: license_files: {{{license.id}: path}}",
                )
            )
    texts = [
        Text(name="LICENSE" if place == 0 else f"LICENSE.{id}", path=path)
        for place, (id, path) in enumerate(chosen.items())
    ]
    taken = {text.name.casefold() for text in texts}
    texts += [
        Text(name=f"{name}.base" if name.casefold() in taken else name, path=base_files[name])
        for name in sorted(base_files)
        if name not in used and not is_notice(name)
    ]
    return tuple(texts), tuple(warnings), problems


def odd_text(license: License, name: str, found: frozenset[str], where: str) -> Warning:
    reads = f"reads like {spell(found)}" if found else "is not recognised as such"
    return Warning(id="license-text", text=f"{name} is carried as the text of {license.id}, but {reads}", where=where)


def tell_source(license: License, license_files: Collection[str]) -> str:
    """Where the text of a licence comes from, as far as that is known without the base's files."""
    if license.id in license_files:
        return "the manifest's license_files"
    if license.shipped:
        return "the base's own, else the one shipped with the builder"
    return "the base's own, else named by license_files" if license.requires_text else "the base's own, else a link"


def name_warnings(lineage: Sequence[License], repo_name: str, where: Callable[..., str]) -> tuple[Warning, ...]:
    """A warning for each licence whose name rule the published name does not follow; hyphens count as spaces."""
    name = repo_name.rpartition("/")[2]
    plain = re.sub(r"[-_]", " ", name).casefold()
    return tuple(
        Warning(
            id="name-prefix",
            text=f"{license.title} wants the name of a model improved with its materials to begin with "
            f'"{license.name_prefix}", and {name} does not; whether quantization alone counts is unclear',
            where=where("repo"),
        )
        for license in lineage
        if license.name_prefix and not plain.startswith(license.name_prefix.casefold())
    )


def describe_for_hub(lineage: Sequence[License], *, has_text: bool) -> dict[str, str]:
    """The card's licence keys. A lineage of several is `other`: any one of their tags would hide the rest."""
    tags = {license.hub_tag for license in lineage}
    if len(tags) == 1 and None not in tags:
        return {"license": str(lineage[0].hub_tag)}
    link = "LICENSE" if has_text else next(url for license in lineage for _, url in license.links)
    return {
        "license": "other",
        "license_name": "-and-".join(license.id for license in lineage),
        "license_link": link,
    }


def state_changes(*, base_model: str, scheme: str) -> str:
    """The statement of changes that a NOTICE file and a card carry."""
    return f"This work modifies {base_model}: its weights were quantized to {scheme}."


def recognise_licenses(text: str) -> frozenset[str]:
    """The licences whose phrases all occur in a text; white space, case and Markdown marks do not matter."""
    plain = " ".join(re.sub(r"[*\\#>_]", " ", text).casefold().split())
    return frozenset(
        license.id for license in LICENSES.values() if all(phrase.casefold() in plain for phrase in license.phrases)
    )


def is_legal(name: str) -> bool:
    """Whether a file of the base says under which terms it may be used."""
    return "/" not in name and (is_license(name) or is_notice(name) or name.casefold().startswith("use_policy"))


def is_license(name: str) -> bool:
    return name.casefold().startswith(("license", "licence", "copying"))


def is_notice(name: str) -> bool:
    return name.casefold().startswith("notice")


def spell(ids: Collection[str]) -> str:
    return " and ".join(sorted(ids))


def read_text(path: Path) -> str:
    return path.read_text("utf-8", errors="replace")


def unique(values: Iterable[T]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(values))
