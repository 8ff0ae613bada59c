"""The configs of an export template: the one-layer model that a published pipeline gave to modelopt for its base.

Such a pipeline reads the base's config, shrinks it to one layer and two tokens without ids or cache, exports each layer
as that model's only one, and restores most of what it had shrunk (the fix `restore-config`). What transformers 4.57
made of the config on the way stays: the class's own defaults are filled in, every model's defaults are left out.

`data/transformers-4.57-configs.json` holds these defaults, taken from that version by `tests/published/record.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from builder.base import find_dtype
from builder.errors import BaseError
from builder.files import read_json

DEFAULTS = Path(__file__).parent / "data" / "transformers-4.57-configs.json"
SHRUNK = {
    "num_hidden_layers": 1,
    "vocab_size": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_cache": False,
}


@cache
def read_defaults() -> dict[str, Any]:
    """{common, generation, dropped, classes: {model type: its own}}."""
    defaults: dict[str, Any] = read_json(DEFAULTS)
    return defaults


def describe_template(base_config: Mapping[str, Any], tool: str, where: str) -> dict[str, Any]:
    """config.json as the template's `save_pretrained` writes it, its keys in that order.

    tool: "transformers 4.57.6" or the like. The base's config is not modified.
    Raises BaseError for a model type whose defaults are not recorded, or settings of generation within the config,
    which that version moves about.
    """
    known, model_type = read_defaults(), base_config.get("model_type")
    if model_type not in known["classes"]:
        raise BaseError(
            f"how an export template of a {model_type} looks is not known",
            where,
            f"remove compatibility.export_template, or use a base of {', '.join(sorted(known['classes']))}",
        )
    if find_dtype(base_config) != "bfloat16":
        raise BaseError(
            f"how an export template of a base in {find_dtype(base_config)} looks is not known",
            where,
            "remove compatibility.export_template, or use a base in bfloat16",
        )
    moved = sorted(
        key for key, default in known["generation"].items() if base_config.get(key, default) not in (default, None)
    )
    if moved:
        raise BaseError(
            f"config.json of the base sets {moved[0]}, which is for generation_config.json",
            where,
            "remove compatibility.export_template: the configs are then the base's own",
        )
    common, own = known["common"], known["classes"][model_type]
    given = {key: value for key, value in base_config.items() if key not in known["dropped"]}
    config = {**compute_defaults({**common, **own, **given}), **SHRUNK}
    config |= {"dtype": "bfloat16", "transformers_version": tool.partition(" ")[2]}
    kept = {
        key: value
        for key, value in config.items()
        if key not in common or value != common[key] or value != own.get(key, value)
    }
    in_order: dict[str, Any] = json.loads(json.dumps(kept, sort_keys=True))
    return in_order


def compute_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """A whole config with what its class computes from other values where it is None."""
    model_type, rope, num_layers = config["model_type"], config.get("rope_scaling"), config["num_hidden_layers"]
    if config["num_key_value_heads"] is None:
        config["num_key_value_heads"] = config["num_attention_heads"]
    if model_type == "llama" and config["head_dim"] is None:
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    if model_type != "mistral" and rope and "type" in rope:
        config["rope_scaling"] = {**rope, "rope_type": rope["type"]}
    if model_type.startswith("qwen") and not config["use_sliding_window"]:
        config["sliding_window"] = None
    if model_type.startswith("qwen") and config["layer_types"] is None:
        first = num_layers if config["sliding_window"] is None else config["max_window_layers"]
        kinds = ["full_attention" if index < first else "sliding_attention" for index in range(num_layers)]
        config["layer_types"] = kinds
    return config


def describe_generation(tool: str) -> dict[str, Any]:
    """generation_config.json of a template without token ids."""
    return {"_from_model_config": True, "transformers_version": tool.partition(" ")[2], "use_cache": False}
