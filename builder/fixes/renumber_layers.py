"""Parts merged under their own layer numbers, or under an offset that forgets a part."""

import math
import re
from collections.abc import Iterable

from builder.artifact import Draft
from builder.base import read_tensors
from builder.fixes.fix import Fix, list_briefly


def detect(draft: Draft) -> str | None:
    count = draft.read_base_json("config.json").get("num_hidden_layers", math.inf)
    base, found = find_layers(read_tensors(draft.base, str(draft.base))), find_layers(draft.tensor_names())
    missing = [f"{name}.{index}" for name, index in sorted(base - found) if index < count]
    foreign = [f"{name}.{index}" for name, index in sorted(found - base)]
    if missing:
        return f"Layers of the base are missing: {list_briefly(missing)}."
    return f"The base has no such layers: {list_briefly(foreign)}." if foreign else None


def find_layers(names: Iterable[str]) -> set[tuple[str, int]]:
    """The layers that tensors are in: ("model.layers", 3)."""
    matches = (re.match(r"(\D+?)\.(\d+)\.", name) for name in names)
    return {(match[1], int(match[2])) for match in matches if match}


FIX = Fix(
    name="renumber-layers",
    title="Every layer has its number in the whole model",
    symptom="Layers overwrite each other, and the model loads with layers missing or in the wrong places.",
    upstream=(
        "The published pipeline exports each part's layers from 0; with three parts and more, the offset must be the "
        "sum over all parts before. https://github.com/KaletoAI/distrib-nvfp4/blob/"
        "808efee2aac141da8a0452ef1fa09e09a91d32b1/scripts/distrib_quant.py (merge_exports)"
    ),
    avoided="Tensors have the base's own names from the plan to the file, so that there is no offset to add.",
    detect=detect,
)
