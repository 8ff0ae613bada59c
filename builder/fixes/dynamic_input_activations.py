"""A config that promises measured activation scales where none were measured."""

from typing import Any

from builder.artifact import Draft
from builder.fixes.fix import Fix


def find_static(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The `input_activations` of a config.json that are not called dynamic."""
    groups = config["quantization_config"]["config_groups"].values()
    inputs = [group["input_activations"] for group in groups if group.get("input_activations")]
    return [entry for entry in inputs if entry.get("dynamic") is not True]


def detect(draft: Draft) -> str | None:
    if find_static(draft.read_json("config.json")):
        return "config.json calls the activation scales static, but they are constants and were not measured."
    return None


def apply(draft: Draft) -> None:
    config = draft.read_json("config.json")
    for entry in find_static(config):
        entry["dynamic"] = True
    draft.write_json("config.json", config)


FIX = Fix(
    name="dynamic-input-activations",
    title="Activation scales that were not measured are called dynamic",
    symptom="Readers of config.json take constant scales for measured ones. Engines do not: vLLM never reads the key.",
    upstream=(
        "nvidia-modelopt 0.43 to 0.47, modelopt/torch/export/convert_hf_config.py: input_activations.dynamic is false "
        "whether inputs were calibrated or not."
    ),
    schemes=("nvfp4",),
    layouts=("modelopt",),
    input_scales=("unit",),
    healthy="config.json calls the activation scales dynamic.",
    detect=detect,
    apply=apply,
)
