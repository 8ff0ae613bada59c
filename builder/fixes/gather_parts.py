"""Parts that stayed on the disk of the node that wrote them."""

from builder.artifact import Draft
from builder.base import INDEX
from builder.fixes.fix import Fix, list_briefly


def detect(draft: Draft) -> str | None:
    index = draft.read_json(INDEX)
    if index is None:
        return None
    names = draft.tensor_names()
    missing = sorted({file for name, file in index["weight_map"].items() if names.get(name) != file})
    return f"The index names tensors that are not in its files: {list_briefly(missing)}." if missing else None


FIX = Fix(
    name="gather-parts",
    title="Parts written on other nodes are brought together",
    symptom="Merging ends in a missing file, or goes on with the layers of one node.",
    upstream=(
        "The published pipeline writes parts to node-local disks and copies them to the driver afterwards. "
        "https://github.com/KaletoAI/distrib-nvfp4/blob/808efee2aac141da8a0452ef1fa09e09a91d32b1/scripts/"
        "distrib_quant.py (phase 6.5)"
    ),
    avoided=(
        "A file counts as finished only when its record and all of its bytes are in the build folder, whichever node "
        "wrote it, and assembling waits for every planned file."
    ),
    detect=detect,
)
