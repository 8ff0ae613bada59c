"""From facts to the lock, and from a lock alone to the release: what a rebuild is compared with."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from builder.errors import BuildError
from builder.files import digest, read_json
from builder.manifest import Key, Manifest, Node, Release, show_path

FORMAT = "1.2"  # 1.1: it says by a digest that it is whole; the builder's number; numba, the builder's version
# 1.2: calibration.arithmetic; without it, it was native. Exact arithmetic names no machine classes
ENDING = ".lock.json"
RESTORE = "restore it from version control"
PAYLOAD_KEYS = ("manifest", "base", "scheme", "kv_cache", "calibration", "fixes", "files", "compatibility")
PACKAGES = (
    "compressed-tensors",
    "numba",
    "numpy",
    "nvidia-modelopt",
    "release-builder",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
)
HUB_RESULTS = ".eval_results/results.yaml"
SERVE_FILES = ("compose.yaml", "llama-swap.yaml", "serve.sh", "vllm.service")
CARD_FILES = ("README.md", *SERVE_FILES, HUB_RESULTS)
SIGNATURE = "attestations/model.sig"
RECORDS = tuple(f"attestations/{name}.json" for name in ("lock", "provenance", "reproduction", "serving"))
ATTESTATIONS = (*RECORDS, SIGNATURE)
BESIDE = (*CARD_FILES, *ATTESTATIONS)  # what lies around the payload, and is no part of it


# --- what a lock holds ------------------------------------------------------------------------------------------------


def check_name(name: str) -> str:
    """A file's name below a release's folder, with / between its parts."""
    if not name.isprintable() or "\\" in name or {"", ".", ".."} & set(name.split("/")):
        raise ValueError("not the name of a file in a folder")
    return name


def check_hex_float(text: str) -> str:
    float.fromhex(text)
    return text


Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
FileName = Annotated[str, AfterValidator(check_name)]
HexFloat = Annotated[str, AfterValidator(check_hex_float)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class File(Section):
    sha256: Sha256
    num_bytes: Annotated[int, Field(ge=0)]


class Inputs(Section):
    base: dict[FileName, File]
    token_ids_sha256: Sha256 | None = None
    num_rows: int | None = None
    calibration_sha256: Sha256 | None = None
    license_files: dict[str, Sha256 | None] = {}


class Lock(Section):
    """The shape of a lock. `what` is a manifest's, and read by its rules when a release is restored from it."""

    lock: Annotated[str, Field(pattern=r"^[0-9]+\.[0-9]+$")]
    name: str
    builder: str | None = None
    what: dict[str, Any]
    inputs: Inputs
    versions: dict[str, str]
    machine_classes: list[str]
    amax: dict[str, dict[str, HexFloat]]
    payload: dict[FileName, File]
    payload_sha256: Sha256
    lock_sha256: Sha256 | None = None


# --- making one -------------------------------------------------------------------------------------------------------


def describe_what(manifest: Manifest) -> dict[str, Any]:
    """The part of a manifest that the payload's bytes are a function of.

    Title, card, serve profile and the like shape what is rendered around the payload, which is outside the lock.
    `kv_cache` and the compatibility switches are told only where they are set: a lock outlives the invention of more.
    """
    what = {key: manifest.what()[key] for key in PAYLOAD_KEYS}
    if manifest.release.kv_cache is None:
        what.pop("kv_cache")
    what["base"].pop("acknowledge")
    what["compatibility"] = manifest.release.compatibility.model_dump(mode="json", exclude_defaults=True)
    return what


def list_versions() -> dict[str, str]:
    """The versions of the packages that a payload's bytes may depend on."""
    import platform

    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError as error:
            raise BuildError(f"{package} is not installed", "the environment", "run make setup") from error
    return found


def make_lock(
    manifest: Manifest,
    *,
    fixes: tuple[str, ...],
    inputs: Mapping[str, Any],
    machine_classes: list[str],
    amax: Mapping[str, Any],
    payload: Mapping[str, Any],
    builder: str,
) -> dict[str, Any]:
    """The lock of a release: facts alone, so that two builds of the same release have the same lock.

    builder: a number that is another one whenever a change of code changes what a build yields.
    """
    what = describe_what(manifest)
    what["fixes"] = list(fixes)
    lock = {
        "lock": FORMAT,
        "name": manifest.name,
        "builder": builder,
        "what": what,
        "inputs": dict(inputs),
        "versions": list_versions(),
        "machine_classes": machine_classes,
        "amax": dict(amax),
        "payload": dict(payload),
        "payload_sha256": digest_payload(payload),
    }
    return {**lock, "lock_sha256": digest(lock)}


def digest_payload(payload: Mapping[str, Mapping[str, Any]]) -> str:
    """One sha256 for a set of files: of their names and digests in canonical JSON."""
    return digest({name: entry["sha256"] for name, entry in payload.items()})


# --- reading one ------------------------------------------------------------------------------------------------------


def read_lock(path: Path) -> dict[str, Any] | None:
    """A lock; None if there is none. Raises BuildError if it is not one, not whole, or of an unknown major format."""
    if not path.exists():
        return None
    lock = read_json(path)
    if not isinstance(lock, dict) or "lock" not in lock:
        raise BuildError(f"{path.name} is not a lock", str(path), restore(path))
    if str(lock["lock"]).split(".")[0] != FORMAT.split(".")[0]:
        raise BuildError(
            f"{path.name} has format {lock['lock']}, but this builder knows {FORMAT}",
            str(path),
            f"use the builder it was made with, or write it again from a build: doit relock:{name_release(path)}",
        )
    missing = sorted(name for name, info in Lock.model_fields.items() if info.is_required() and name not in lock)
    if missing:
        raise BuildError(f"{path.name} lacks {', '.join(missing)}", str(path), restore(path))
    try:
        Lock.model_validate(lock, extra="allow" if is_newer(lock) else "forbid")
    except ValidationError as error:
        raise explain(error, path) from None
    if lock["payload_sha256"] != digest_payload(lock["payload"]):
        raise BuildError(f"{path.name} was edited: its payload_sha256 is not its payload's", str(path), restore(path))
    sealed = {key: value for key, value in lock.items() if key != "lock_sha256"}
    if lock.get("lock_sha256", digest(sealed)) != digest(sealed) or ("lock_sha256" not in lock and not is_older(lock)):
        raise BuildError(f"{path.name} was edited: its lock_sha256 is not its content's", str(path), restore(path))
    return lock


def restore(path: Path) -> str:
    """What to do about a lock that is damaged."""
    return f"{RESTORE}, or write it again from a build: doit relock:{name_release(path)}"


def require_lock(path: Path) -> dict[str, Any]:
    """A lock that has to be there."""
    lock = read_lock(path)
    if lock is None:
        fix = f"build the release first: doit release:{name_release(path)}"
        raise BuildError(f"there is no {path.name}", str(path), fix)
    return lock


def name_release(path: Path) -> str:
    """The release that a lock is of, by the file's name."""
    return path.name.removesuffix(ENDING)


def parse_format(lock: Mapping[str, Any]) -> list[int]:
    return [int(number) for number in re.findall("[0-9]+", str(lock["lock"]))]


def is_newer(lock: Mapping[str, Any]) -> bool:
    """Whether a lock is of a later minor format, and may say more than this builder knows of."""
    return parse_format(lock) > parse_format({"lock": FORMAT})


def is_older(lock: Mapping[str, Any]) -> bool:
    return parse_format(lock) < parse_format({"lock": FORMAT})


def warn_of_format(lock: Mapping[str, Any]) -> tuple[str, ...]:
    """What to tell of a lock that a later builder made."""
    if not is_newer(lock):
        return ()
    text = f"warning: the lock has format {lock['lock']}, and this builder knows {FORMAT}: what is new in it is ignored"
    return (text,)


def spell_path(keys: Sequence[Key]) -> str:
    """Keys as they are written to get at a value: inputs.base["config.json"].sha256, what.scheme[0].name."""
    text = ""
    for key in keys:
        if isinstance(key, int):
            text += f"[{key}]"
        elif re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", key):
            text += f".{key}" if text else key
        else:
            text += f'["{key}"]'
    return text


def point_at(path: Path, *keys: Key) -> str:
    """Where in a lock a value is: releases/NAME.lock.json: inputs.base["config.json"]."""
    return f"{show_path(path.absolute())}: {spell_path(keys)}"


def explain(error: ValidationError, path: Path, *, inside: Sequence[Key] = ()) -> BuildError:
    """The first of pydantic's findings, with the place in the lock that it is about.

    inside: where in the lock the value that was validated lies.
    """
    finding = error.errors(include_url=False)[0]
    keys = (*inside, *(key for key in finding["loc"] if key != "[key]"))
    place = spell_path(keys)
    value = finding["input"]
    what = {"missing": f"{place} is missing", "extra_forbidden": f"{place} is unknown"}.get(finding["type"])
    shown = repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
    return BuildError(what or f"{place} cannot be {shown}", point_at(path, *keys), restore(path))


# --- the release again, from the lock alone ---------------------------------------------------------------------------


@dataclass(frozen=True)
class LockedManifest(Manifest):
    """A release restored from its lock. It points at the lock's keys where a manifest points at lines.

    places: where files that the lock names by a path lie on this machine, if elsewhere.
    """

    places: Mapping[str, Path] = field(default_factory=dict)

    def where(self, *keys: Key) -> str:
        return point_at(self.path.with_suffix(ENDING), "what", *keys)

    def resolve(self, relative: str) -> Path:
        return self.places.get(relative) or super().resolve(relative)


def fill_what(what: Mapping[str, Any]) -> dict[str, Any]:
    """A lock's `what` with the arithmetic that locks before format 1.2 do not name: it was native."""
    calibration = what.get("calibration")
    return {**what, "calibration": {"arithmetic": "native", **calibration}} if calibration else dict(what)


def restore_manifest(
    lock: Mapping[str, Any], path: Path, *, how: Mapping[str, Any], base: Path | None = None
) -> LockedManifest:
    """The release that a lock describes.

    path: the lock's. how: `shards`, `executor` and `device`, which change no byte.
    base: the base model's folder on this machine; without it the lock's own path, or its pinned Hub revision if nothing
    is there.
    Raises BuildError naming the key that is not a release's.
    """
    path, name = path.absolute(), name_release(path)
    what = {**fill_what(lock["what"]), "base": dict(lock["what"].get("base") or {})}
    spec = what["base"]
    file = path.with_name(f"{name}.yaml")
    places = {}
    if base is not None:
        spec["path"] = spec.get("path") or str(base)
        places[spec["path"]] = base
    elif spec.get("path") and spec.get("revision") and not (file.parent / spec["path"]).is_dir():
        spec["path"] = None
    named = {"title": name, "repo": f"reproduced/{name}"}
    try:
        release = Release.model_validate({**named, **what, **how})
    except ValidationError as error:
        raise explain(error, path, inside=("what",)) from None
    return LockedManifest(name, file, release, Node(None, 1, 1), places)


# --- tools ------------------------------------------------------------------------------------------------------------

ARITHMETIC = "its arithmetic makes the weights"
EFFECTS = {  # package -> the first tier whose bytes another version of it may change, and why
    "compressed-tensors": (1, "its version and its formats are written into config.json"),
    "numba": (1, "it compiles the loops that quantize"),
    "numpy": (1, ARITHMETIC),
    "nvidia-modelopt": (1, ARITHMETIC),
    "safetensors": (1, "it lays the files out"),
    "torch": (1, ARITHMETIC),
    "transformers": (1, "it says what a model's layers are"),
    "tokenizers": (2, "it makes the token ids of the calibration rows, and nothing else"),
}


@dataclass(frozen=True)
class Change:
    """A tool that is another one than the lock's.

    tier: the first whose bytes that may change; None if it changes none.
    """

    tool: str
    locked: str
    found: str
    tier: int | None
    why: str

    def __str__(self) -> str:
        return f"{self.tool} is {self.found}, and was {self.locked}: {self.why}"


def compare_versions(lock: Mapping[str, Any], found: Mapping[str, str], builder: str) -> list[Change]:
    """The tools that differ from the lock's, each with what that may change."""
    changes = []
    if lock.get("builder", builder) != builder:
        why = "the builder's code has changed since in what it yields"
        changes.append(Change("the builder's number", lock["builder"], builder, 1, why))
    for tool, was in sorted(lock["versions"].items()):
        now = found.get(tool, "not installed")
        if now == was:
            continue
        tier: int | None
        tier, why = EFFECTS.get(tool, (1, "nothing is known of what it changes"))
        if tool == "release-builder":
            tier, why = None, "that changes no byte as long as the builder's number is the same"
        elif tool == "python" and now.split(".")[:2] == was.split(".")[:2]:
            tier, why = None, "a patch of Python changes no byte"
        elif tool == "torch" and now.partition("+")[0] == was.partition("+")[0]:
            tier, why = 3, "another build of the same version; it may measure activations differently, nothing else"
        changes.append(Change(tool, was, now, tier, why))
    return changes


def write_constraints(lock: Mapping[str, Any], name: str, path: str) -> str:
    """A constraints file for pip with the versions a release was made with.

    name: the release's. path: the file's own, for the command in its head.
    """
    python = lock["versions"].get("python", "3.11")
    short = ".".join(python.split(".")[:2])
    lines = [
        f"# What the payload {lock['payload_sha256'][:12]} of {name} was made with, besides Python {python}:",
        f"#   python{short} -m venv .venv-{name}",
        f"#   .venv-{name}/bin/pip install --constraint {path} --editable .",
        "# If that conflicts with pyproject.toml, check the builder out as it was when the lock was committed:",
        f"#   git log -1 --format=%H -- releases/{name}{ENDING}",
    ]
    for tool, was in sorted(lock["versions"].items()):
        public, _, build = was.partition("+")
        if tool not in ("python", "release-builder"):
            lines.append(f"{tool}=={public}" + (f"  # the build for {build}" if build else ""))
    return "\n".join(lines) + "\n"
