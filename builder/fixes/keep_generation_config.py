"""A generation_config.json made from the exporter's template."""

from builder.fixes.copied_files import CopiedFiles
from builder.fixes.fix import Fix

FILES = CopiedFiles(("generation_config.json",))

FIX = Fix(
    name="keep-generation-config",
    title="generation_config.json is the base's",
    symptom="Answers do not end, or are sampled otherwise than the base's: the end tokens and defaults are gone.",
    upstream=(
        "nvidia-modelopt saves the generation config of whatever it exports: a template without token ids yields one "
        "that holds use_cache alone, and the published pipeline kept it."
    ),
    healthy="generation_config.json is the base's, byte for byte, or neither has one.",
    detect=FILES.detect,
    apply=FILES.apply,
)
