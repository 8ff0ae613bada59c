"""A config.json that speaks of the exporter's template instead of the model."""

import json
from typing import Any

from builder.artifact import Draft
from builder.base import find_dtype
from builder.fixes.fix import Fix, list_briefly

OWN = ("quantization_config", "transformers_version")  # what the artifact may say by itself
SHRUNK = (  # all that the published pipeline puts back, in its order; it writes a None where the base has one
    *("num_hidden_layers", "vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "architectures"),
)


def detect(draft: Draft) -> str | None:
    ours, theirs = describe_model(draft.read_json("config.json")), describe_model(draft.read_base_json("config.json"))
    theirs |= take_dtype(ours, theirs)
    keys = [key for key in SHRUNK if key in theirs] if draft.from_template else sorted(ours.keys() | theirs.keys())
    wrong = [key for key in keys if show(ours, key) != show(theirs, key)]
    if not wrong:
        return None
    told = [f"{key} is {show(ours, key)}, but {show(theirs, key)} in the base" for key in wrong]
    return f"In config.json {list_briefly(told)}."


def describe_model(config: dict[str, Any]) -> dict[str, Any]:
    """What a config.json says of the model; `torch_dtype` under its newer name."""
    return {"dtype" if key == "torch_dtype" else key: value for key, value in config.items() if key not in OWN}


def take_dtype(config: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """The dtype that the artifact names where the base names none."""
    return {"dtype": config["dtype"]} if "dtype" in config and not find_dtype(base) else {}


def show(config: dict[str, Any], key: str) -> str:
    return json.dumps(config[key], sort_keys=True) if key in config else "absent"


def apply(draft: Draft) -> None:
    config, base = draft.read_json("config.json"), draft.read_base_json("config.json")
    if draft.from_template:
        config |= {key: base[key] for key in SHRUNK if key in base}
    else:
        config = {**base, **take_dtype(config, base), "quantization_config": config["quantization_config"]}
    draft.write_json("config.json", config)


FIX = Fix(
    name="restore-config",
    title="config.json describes the base model",
    symptom=(
        "vLLM refuses the embeddings because vocab_size is 2, or builds a model of one layer; generation lacks its "
        "token ids, or runs without a cache."
    ),
    upstream=(
        "nvidia-modelopt writes the config of whatever it exports: of a one-layer template its num_hidden_layers, "
        "vocab_size, token ids and use_cache. The published pipeline restored all but use_cache."
    ),
    healthy="config.json says of the model what the base's says.",
    detect=detect,
    apply=apply,
)
