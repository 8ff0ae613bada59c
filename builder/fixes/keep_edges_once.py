"""A part's stand-in for embeddings, final norm or lm_head in the place of the base's own."""

import re
from collections import Counter

from builder.artifact import Draft
from builder.base import Stored, read_header, read_tensors
from builder.fixes.fix import Fix, list_briefly

SAMPLE_BYTES = 64 << 10  # enough to tell a stand-in, which is all zero; verifying compares every byte


def detect(draft: Draft) -> str | None:
    base = {name: tensor for name, tensor in read_tensors(draft.base, str(draft.base)).items() if is_edge(name)}
    ours = [tensor for file in sorted(draft.folder.glob("*.safetensors")) for tensor in read_header(file)]
    edges = [tensor for tensor in ours if tensor.name in base]
    twice = sorted(name for name, number in Counter(tensor.name for tensor in edges).items() if number > 1)
    if twice:
        return f"In more than one file: {list_briefly(twice)}."
    replaced = sorted(tensor.name for tensor in edges if not looks_the_same(draft, tensor, base[tensor.name]))
    return f"Not the base's: {list_briefly(replaced)}." if replaced else None


def is_edge(name: str) -> bool:
    """Whether a tensor lies outside all numbered layers."""
    return re.search(r"\.\d+\.", name) is None


def looks_the_same(draft: Draft, ours: Stored, theirs: Stored) -> bool:
    """Whether dtype, shape and the first bytes agree."""
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return False
    samples = []
    for folder, tensor in ((draft.folder, ours), (draft.base, theirs)):
        with (folder / tensor.file).open("rb") as file:
            file.seek(tensor.start)
            samples.append(file.read(min(SAMPLE_BYTES, tensor.num_bytes)))
    return samples[0] == samples[1]


FIX = Fix(
    name="keep-edges-once",
    title="Embeddings, final norm and lm_head are the base's own",
    symptom="The model loads and answers the same to everything: a stand-in of zeros took the place of an edge.",
    upstream=(
        "The published pipeline exports every part from a template with stand-ins; a merge must keep the first part's "
        "embeddings, the last part's norm and lm_head, and no others. https://github.com/KaletoAI/distrib-nvfp4/blob/"
        "808efee2aac141da8a0452ef1fa09e09a91d32b1/scripts/distrib_quant.py (merge_exports)"
    ),
    avoided="There are no stand-ins: the plan gives each edge to one shard, which copies it from the base.",
    detect=detect,
)
