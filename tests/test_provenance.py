"""The provenance of a release says what its lock says, in the words of in-toto and SLSA."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from builder.lock import read_lock
from builder.provenance import make_statement

LOCK = Path(__file__).parents[1] / "releases" / "tiny-llama.lock.json"


@pytest.fixture
def lock() -> dict[str, Any]:
    found = read_lock(LOCK)
    assert found is not None
    return found


def test_every_file_of_the_payload_is_a_subject(lock: dict[str, Any]) -> None:
    statement = make_statement(lock)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    assert {one["name"]: one["digest"] for one in statement["subject"]} == {
        name: {"sha256": file["sha256"]} for name, file in lock["payload"].items()
    }


def test_inputs_and_tools_are_dependencies_with_their_digests(lock: dict[str, Any]) -> None:
    lock = copy.deepcopy(lock)
    lock["what"]["base"] |= {"model": "acme/tiny", "revision": "a" * 40}
    lock["inputs"]["license_files"] = {"psf-2.0": "c" * 64, "mit": None}
    definition = make_statement(lock)["predicate"]["buildDefinition"]
    found = {one["name"]: one for one in definition["resolvedDependencies"]}
    for name, file in lock["inputs"]["base"].items():
        assert found[f"base/{name}"]["digest"] == {"sha256": file["sha256"]}
        assert found[f"base/{name}"]["uri"] == f"pkg:huggingface/acme/tiny@{'a' * 40}#{name}"
    assert found["calibration"]["digest"] == {"sha256": lock["inputs"]["calibration_sha256"]}
    assert found["license/psf-2.0"]["digest"] == {"sha256": "c" * 64}
    assert "license/mit" not in found, "a text that was not there"
    assert found["token ids"]["digest"] == {"sha256": lock["inputs"]["token_ids_sha256"]}
    assert found["nvidia-modelopt"]["uri"] == f"pkg:pypi/nvidia-modelopt@{lock['versions']['nvidia-modelopt']}"
    assert found["torch"]["uri"] == "pkg:pypi/torch@2.13.0%2Bcpu"
    assert definition["externalParameters"] == {"name": "tiny-llama", "release": lock["what"]}
    assert definition["internalParameters"] == {"machineClasses": lock["machine_classes"]}
    assert all("digest" in one or "uri" in one for one in found.values())


def test_a_data_set_of_the_hub_is_a_dependency_at_its_commit(lock: dict[str, Any]) -> None:
    lock = copy.deepcopy(lock)
    lock["what"]["calibration"] |= {"path": None, "dataset": "acme/rows", "revision": "b" * 40}
    del lock["inputs"]["calibration_sha256"]
    dependencies = make_statement(lock)["predicate"]["buildDefinition"]["resolvedDependencies"]
    (data,) = [one for one in dependencies if one["name"] == "calibration"]
    assert data["digest"] == {"gitCommit": "b" * 40}
    assert data["uri"] == f"https://huggingface.co/datasets/acme/rows/tree/{'b' * 40}"


def test_the_amax_table_is_a_byproduct_by_its_digest(lock: dict[str, Any]) -> None:
    def digest_of(content: dict[str, Any]) -> str:
        (byproduct,) = make_statement(content)["predicate"]["runDetails"]["byproducts"]
        assert byproduct["name"] == "amax"
        return str(byproduct["digest"]["sha256"])

    other = copy.deepcopy(lock)
    other["amax"].popitem()
    assert digest_of(lock) != digest_of(other)


def test_a_statement_says_nothing_of_when_and_where(lock: dict[str, Any]) -> None:
    text = json.dumps(make_statement(lock))
    assert text == json.dumps(make_statement(copy.deepcopy(lock)))
    assert not re.search(r"\d\d:\d\d|startedOn|finishedOn|invocationId|hostname", text)
