"""Configs of an export template, compared with what transformers 4.57.6 itself saved (see published/record.py)."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from builder.errors import BaseError
from builder.export_template import describe_generation, describe_template

TOOL = "transformers 4.57.6"
RECORDED: list[dict[str, Any]] = json.loads((Path(__file__).parent / "published" / "configs.json").read_text("utf-8"))


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda recorded: recorded["base"]["model_type"])
def test_a_templates_configs_are_those_the_library_saved_key_by_key_in_their_order(recorded: dict[str, Any]) -> None:
    base = copy.deepcopy(recorded["base"])
    template = describe_template(base, TOOL, "config.json")
    assert json.dumps(template) == json.dumps(dict(recorded["template"]))
    assert describe_generation(TOOL) == recorded["generation"]
    assert base == recorded["base"]


def test_a_model_type_whose_class_is_not_recorded_is_refused() -> None:
    with pytest.raises(BaseError) as caught:
        describe_template({"model_type": "gemma3_text"}, TOOL, "tiny.yaml:7")
    assert str(caught.value) == (
        "how an export template of a gemma3_text looks is not known\n"
        "  in tiny.yaml:7\n"
        "  fix: remove compatibility.export_template, or use a base of llama, mistral, qwen2, qwen3"
    )


def test_settings_of_generation_in_the_config_are_refused() -> None:
    with pytest.raises(BaseError) as caught:
        describe_template({**RECORDED[0]["base"], "temperature": 0.6}, TOOL, "tiny.yaml:7")
    assert str(caught.value) == (
        "config.json of the base sets temperature, which is for generation_config.json\n"
        "  in tiny.yaml:7\n"
        "  fix: remove compatibility.export_template: the configs are then the base's own"
    )
