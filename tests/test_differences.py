"""A difference between two files is told by tensor, key or line, with the place where it begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from builder.differences import Difference, compare_values, flatten, list_changes, show_value, trace_file

WEIGHT = "model.layers.0.mlp.up_proj"
NORM = "model.norm.weight"


def write_weights(path: Path, **changes: torch.Tensor | None) -> Path:
    tensors = {
        f"{WEIGHT}.weight_packed": torch.arange(64, dtype=torch.uint8).reshape(8, 8),
        f"{WEIGHT}.input_global_scale": torch.tensor([2.0]),
        NORM: torch.ones(3, 5, dtype=torch.bfloat16),
    }
    whole = {name: tensor for name, tensor in {**tensors, **changes}.items() if tensor is not None}
    path.parent.mkdir(exist_ok=True)
    save_file(whole, path, metadata={"format": "pt"})
    return path


def trace_weights(folder: Path, **changes: torch.Tensor | None) -> list[Difference]:
    ours, theirs = write_weights(folder / "a" / "w", **changes), write_weights(folder / "b" / "w")
    return trace_file("w.safetensors", ours, theirs)


def test_equal_weights_differ_nowhere(tmp_path: Path) -> None:
    assert trace_weights(tmp_path) == []


def test_a_tensor_that_differs_is_told_with_its_bytes_and_its_first_element(tmp_path: Path) -> None:
    norm = torch.ones(3, 5, dtype=torch.bfloat16)
    norm[1, 2] = 2.0  # both bytes of it
    norm[2, 4] = 1.0078125  # the low byte alone
    packed = torch.arange(64, dtype=torch.uint8).reshape(8, 8)
    packed[7, 7] = 0
    found = trace_weights(tmp_path, **{NORM: norm, f"{WEIGHT}.weight_packed": packed})
    assert {difference.place: (difference.text, difference.cause) for difference in found} == {
        NORM: (
            "3 of 30 bytes differ, first at [1, 2]",
            "another base: this tensor is copied from it",
        ),
        f"{WEIGHT}.weight_packed": (
            "1 of 64 bytes differ, first at [7, 7]",
            "another weight in the base, or another version of what quantizes it",
        ),
    }


def test_the_first_difference_is_found_in_any_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builder.differences.CHUNK_BYTES", 7)
    packed = torch.arange(64, dtype=torch.uint8).reshape(8, 8)
    packed[4:, 3] = 255
    (found,) = trace_weights(tmp_path, **{f"{WEIGHT}.weight_packed": packed})
    assert found.text == "4 of 64 bytes differ, first at [4, 3]"


@pytest.mark.parametrize(
    ("changes", "place", "text"),
    [
        ({"extra": torch.zeros(1)}, "extra", "is there and should not be"),
        ({NORM: None}, NORM, "is missing"),
        ({NORM: torch.ones(2, dtype=torch.bfloat16)}, NORM, "is BF16 [2], and should be BF16 [3, 5]"),
        ({NORM: torch.ones(3, 5)}, NORM, "is F32 [3, 5], and should be BF16 [3, 5]"),
    ],
)
def test_tensors_of_another_kind_are_told(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], place: str, text: str
) -> None:
    assert [(difference.place, difference.text) for difference in trace_weights(tmp_path, **changes)] == [(place, text)]


def test_a_header_that_alone_differs_is_told_as_such(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", write_weights(tmp_path / "theirs")
    ours.write_bytes(theirs.read_bytes().replace(b'"format":"pt"', b'"format":"np"'))
    (found,) = trace_file("w.safetensors", ours, theirs)
    assert (found.place, found.text) == ("the header", "differs, and no tensor does")


def test_a_json_file_is_told_by_its_keys_and_a_text_by_its_line(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.write_text('{"a": {"b": [1, 2]}, "quantization_config": {"version": "0.21"}, "more": null}')
    theirs.write_text('{"less": true, "a": {"b": [1, 3]}, "quantization_config": {"version": "0.20"}}')
    assert [(d.place, d.text, d.cause) for d in trace_file("config.json", ours, theirs)] == [
        ("more", "null should not be there", "another base, or another fix"),
        ("less", "is missing (true)", "another base, or another fix"),
        ("a.b", "[1, 2] instead of [1, 3]", "another base, or another fix"),
        (
            "quantization_config.version",
            "0.21 instead of 0.20",
            "another version of the tool that is named there",
        ),
    ]
    ours.write_text("one\ntwo\nthree")
    theirs.write_text("one\ntwx\nthree\n")
    (found,) = trace_file("NOTICE", ours, theirs)
    assert (found.place, found.text) == ("line 2", "differs from byte 6 on (13 and 14 bytes)")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)


@given(JSON, JSON)
def test_values_differ_nowhere_if_and_only_if_they_are_the_same(one: Any, two: Any) -> None:
    changes = list(list_changes(compare_values(one, two)))
    assert bool(changes) == (list(flatten(one)) != list(flatten(two)) and dict(flatten(one)) != dict(flatten(two)))
    if one == two:
        assert not changes


def test_a_long_value_is_shown_on_one_short_line() -> None:
    assert show_value(None) == "null"
    assert show_value("a\nb") == "a b"
    assert len(show_value("x" * 100)) == 60
