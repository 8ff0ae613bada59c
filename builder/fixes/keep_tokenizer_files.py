"""Tokenizer files that were left behind or written anew."""

from builder.fixes.copied_files import CopiedFiles
from builder.fixes.fix import Fix

FILES = CopiedFiles(
    (
        *("tokenizer*", "*.tiktoken", "*.model", "vocab.*", "merges.txt", "tekken.json"),
        *("special_tokens_map.json", "added_tokens.json", "*processor_config.json"),
    )
)

FIX = Fix(
    name="keep-tokenizer-files",
    title="The tokenizer's files are the base's",
    symptom="The model does not load, or reads its prompts as other tokens than those it was trained on.",
    upstream=(
        "nvidia-modelopt's export_hf_checkpoint writes no tokenizer, and the published pipeline copied four files by "
        "name; saving one through transformers changes its bytes."
    ),
    healthy="The tokenizer's files are the base's, byte for byte.",
    detect=FILES.detect,
    apply=FILES.apply,
)
