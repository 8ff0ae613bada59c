"""A lock as an in-toto statement with SLSA v1 provenance: which files, made how, out of what.

https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md and https://slsa.dev/spec/v1.0/provenance. It says
what the lock says and nothing of when and where, so that the same lock yields the same statement.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from builder.files import digest

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:release-builder:release:v1"
BUILDER_ID = "urn:release-builder"


def make_statement(lock: Mapping[str, Any]) -> dict[str, Any]:
    """The statement about a lock's payload."""
    versions = lock["versions"]
    return {
        "_type": STATEMENT,
        "subject": [
            {"name": name, "digest": {"sha256": file["sha256"]}} for name, file in sorted_items(lock["payload"])
        ],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"name": lock["name"], "release": lock["what"]},
                "internalParameters": {"machineClasses": lock["machine_classes"]},
                "resolvedDependencies": [*list_inputs(lock), *list_packages(versions)],
            },
            "runDetails": {
                "builder": {
                    "id": BUILDER_ID,
                    "version": {"release-builder": versions.get("release-builder", "unknown")},
                },
                "byproducts": [
                    {
                        "name": "amax",
                        "digest": {"sha256": digest(lock["amax"])},
                        "annotations": {"of": "the canonical JSON of `amax` in attestations/lock.json"},
                    }
                ],
            },
        },
    }


def sorted_items(mapping: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return sorted(mapping.items())


def list_inputs(lock: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The base's files, the calibration data and the licence texts that were given besides, as resource descriptors."""
    inputs, base = lock["inputs"], lock["what"]["base"]
    found = []
    for name, file in sorted_items(inputs["base"]):
        entry: dict[str, Any] = {"name": f"base/{name}", "digest": {"sha256": file["sha256"]}}
        if base.get("model") and base.get("revision"):
            entry["uri"] = f"pkg:huggingface/{base['model']}@{base['revision']}#{quote(name)}"
        found.append(entry)
    data = lock["what"].get("calibration") or {}
    if inputs.get("calibration_sha256"):
        found.append({"name": "calibration", "digest": {"sha256": inputs["calibration_sha256"]}})
    elif data.get("dataset") and inputs.get("token_ids_sha256"):
        uri = f"https://huggingface.co/datasets/{data['dataset']}/tree/{data['revision']}"
        found.append({"name": "calibration", "uri": uri, "digest": {"gitCommit": data["revision"]}})
    if inputs.get("token_ids_sha256"):
        found.append({"name": "token ids", "digest": {"sha256": inputs["token_ids_sha256"]}})
    for name, sha256 in sorted_items(inputs.get("license_files", {})):
        if sha256:
            found.append({"name": f"license/{name}", "digest": {"sha256": sha256}})
    return found


def list_packages(versions: Mapping[str, str]) -> list[dict[str, Any]]:
    """The tools as package URLs."""
    return [
        {"name": tool, "uri": f"pkg:{'generic' if tool == 'python' else 'pypi'}/{tool}@{quote(version)}"}
        for tool, version in sorted_items(versions)
        if tool != "release-builder"
    ]
