"""A layer that keeps its number in the whole model while it runs in a template of one layer."""

from builder.fixes.fix import NVFP4, Fix

FIX = Fix(
    name="reset-layer-index",
    title="A layer in the export template counts as its first",
    symptom="Running the template with any layer but the first ends in an IndexError of the KV cache.",
    upstream=(
        "transformers: attention looks up its layer_idx in a cache that has as many places as the config has layers. "
        "nvidia-modelopt 0.47 exports without a cache; older pipelines had to reset the number."
    ),
    schemes=NVFP4,
    avoided="Layers are never put into a template; each runs under its own number, and without a cache.",
)
