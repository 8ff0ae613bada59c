"""From facts to the lock, against which a rebuild is compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from builder.errors import BuildError, VerifyError
from builder.files import digest, read_json
from builder.manifest import Manifest

FORMAT = "1.0"
LOCAL = {"base": ("path", "config"), "calibration": ("path",)}  # where local files lie; their digests are inputs
KEYS = {"name", "what", "inputs", "versions", "machine_classes", "amax", "payload", "payload_sha256"}
RESTORE = "restore it from version control, or delete it to lock anew"
RECALIBRATED = 0.05  # the most by which an input's amax may differ elsewhere; 0.016 is the most that was measured
PAYLOAD_KEYS = ("manifest", "base", "scheme", "calibration", "fixes", "files", "compatibility")
PACKAGES = (
    "compressed-tensors",
    "numpy",
    "nvidia-modelopt",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
)


def describe_what(manifest: Manifest) -> dict[str, Any]:
    """The part of a manifest that the payload's bytes are a function of.

    Title, card, serve profile and the like shape what is rendered around the payload, which is outside the lock. Of the
    compatibility switches those alone are told that are set: a lock outlives the invention of further ones.
    """
    what = {key: manifest.what()[key] for key in PAYLOAD_KEYS}
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
) -> dict[str, Any]:
    """The lock of a release: facts alone, so that two builds of the same release have the same lock."""
    what = describe_what(manifest)
    what["fixes"] = list(fixes)
    return {
        "lock": FORMAT,
        "name": manifest.name,
        "what": what,
        "inputs": dict(inputs),
        "versions": list_versions(),
        "machine_classes": machine_classes,
        "amax": dict(amax),
        "payload": dict(payload),
        "payload_sha256": digest_payload(payload),
    }


def digest_payload(payload: Mapping[str, Mapping[str, Any]]) -> str:
    """One sha256 for a set of files: of their names and digests in canonical JSON."""
    return digest({name: entry["sha256"] for name, entry in payload.items()})


def read_lock(path: Path) -> dict[str, Any] | None:
    """A lock; None if there is none. Raises BuildError if it is not one, or of a format this code does not know."""
    if not path.exists():
        return None
    lock = read_json(path)
    if not isinstance(lock, dict) or "lock" not in lock:
        raise BuildError(f"{path.name} is not a lock", str(path), RESTORE)
    if str(lock["lock"]).split(".")[0] != FORMAT.split(".")[0]:
        raise BuildError(
            f"{path.name} has format {lock['lock']}, but this builder knows {FORMAT}",
            str(path),
            "use the builder it was made with, or delete it to lock anew",
        )
    missing = sorted(KEYS - lock.keys())
    if missing:
        raise BuildError(f"{path.name} lacks {', '.join(missing)}", str(path), RESTORE)
    if lock["payload_sha256"] != digest_payload(lock["payload"]):
        raise BuildError(f"{path.name} was edited: its payload_sha256 is not its payload's", str(path), RESTORE)
    return lock


@dataclass(frozen=True)
class Comparison:
    """How a build relates to the lock there was.

    verdict: first | equal | replaced | recalibrated. The lock is written for the first and the third.
    """

    verdict: str
    text: str

    @property
    def writes(self) -> bool:
        return self.verdict in ("first", "replaced")


def compare_lock(old: Mapping[str, Any] | None, new: Mapping[str, Any], path: Path) -> Comparison:
    """Compare a build with the lock of an earlier one.

    Raises VerifyError if the same release from the same inputs has another payload, unless it was calibrated on
    another class of machine, where inputs measure a little differently, and only weight files differ.
    """
    if old is None:
        return Comparison("first", "the first build of this release")
    changed = [
        f"{part}.{key}"
        for part in ("what", "inputs")
        for key in sorted(old[part].keys() | new[part].keys())
        if without_places(key, old[part].get(key)) != without_places(key, new[part].get(key))
    ]
    if changed:
        return Comparison("replaced", f"written anew, for {', '.join(changed)} changed since the last one")
    files = sorted(old["payload"].keys() | new["payload"].keys())
    different = [name for name in files if old["payload"].get(name) != new["payload"].get(name)]
    if not different:
        return Comparison("equal", "every file of the payload is the same, bit for bit")
    largest = compare_amax(old["amax"], new["amax"])
    elsewhere = old["machine_classes"] != new["machine_classes"]
    if elsewhere and 0 < largest <= RECALIBRATED and all(name.endswith(".safetensors") for name in different):
        classes = " and ".join(", ".join(lock["machine_classes"]) for lock in (old, new))
        return Comparison(
            "recalibrated", f"calibrated on {classes}: input scales differ by {100 * largest:.2f} % at most"
        )
    versions = [
        f"{name} {old['versions'].get(name)} -> {found}"
        for name, found in new["versions"].items()
        if old["versions"].get(name) != found
    ]
    why = f"versions differ: {', '.join(versions)}" if versions else "inputs and versions are the same"
    raise VerifyError(
        f"{different[0]} is not what the lock says ({len(different)} of {len(files)} files differ; {why})",
        str(path),
        "restore the pinned versions (make setup), or delete the lock to release this build as a new one",
    )


def without_places(section: str, value: Any) -> Any:
    """A section of a lock without the places of local files, which their digests identify wherever they lie."""
    if section not in LOCAL or not isinstance(value, dict):
        return value
    return {key: content for key, content in value.items() if key not in LOCAL[section]}


def compare_amax(old: Mapping[str, Mapping[str, str]], new: Mapping[str, Mapping[str, str]]) -> float:
    """The largest relative difference between two amax tables' inputs.

    Infinite if they measure different things, or if a weight differs, which measures the same anywhere.
    """
    largest = 0.0
    if old.keys() != new.keys() or any(old[linear].keys() != new[linear].keys() for linear in old):
        return float("inf")
    for linear, kinds in old.items():
        for kind, text in kinds.items():
            first, second = float.fromhex(text), float.fromhex(new[linear][kind])
            if first != second:
                comparable = kind == "input" and first > 0 and second > 0
                largest = max(largest, abs(first - second) / first if comparable else float("inf"))
    return largest
