"""An export template with a vocabulary of one token, in which modelopt looks up token 1."""

from builder.fixes.fix import NVFP4, Fix

FIX = Fix(
    name="template-vocab-size",
    title="The export template has at least two tokens",
    symptom="Exporting ends in an IndexError (on a GPU: an assertion of indexSelectSmallIndex).",
    upstream=(
        "nvidia-modelopt 0.43 to 0.47, modelopt/torch/export/unified_export_hf.py: llm_dummy_forward runs the template "
        "on torch.ones([1, 2]), whatever its vocabulary."
    ),
    schemes=NVFP4,
    avoided="No template is exported: layers are quantized and written by themselves, and no token is looked up.",
)
