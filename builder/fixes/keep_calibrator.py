"""Quantizers whose `_calibrator` was cleared to save memory; modelopt still needs it."""

import re

from builder.artifact import Draft
from builder.fixes.fix import Fix, list_briefly


def detect(draft: Draft) -> str | None:
    """A quantizer without a calibrator is switched off in silence, and its linear left as it was."""
    names = draft.tensor_names()
    quantized = {name.removesuffix(".weight_scale") for name in names if name.endswith(".weight_scale")}
    kinds = {name_kind(linear) for linear in quantized}
    plain = {name.removesuffix(".weight") for name in names if name.endswith(".weight")} - quantized
    skipped = sorted(linear for linear in plain.difference(draft.ignore) if name_kind(linear) in kinds)
    return f"Not quantized, unlike its like in other layers: {list_briefly(skipped)}." if skipped else None


def name_kind(linear: str) -> str:
    """A linear's name without the number of its layer."""
    return re.sub(r"\.\d+\.", ".*.", linear)


FIX = Fix(
    name="keep-calibrator",
    title="Quantizers keep their calibrators",
    symptom=(
        "Exporting ends in “'NoneType' object has no attribute '_num_bits'”; and where calibration starts once more, "
        "modelopt switches such a quantizer off without a word."
    ),
    upstream=(
        "nvidia-modelopt 0.43 to 0.47, TensorQuantizer.set_from_modelopt_state writes to _calibrator unasked, and "
        "enable_stats_collection disables a quantizer that has none."
    ),
    schemes=("nvfp4",),
    avoided=(
        "modelopt's quantizers only measure and are never exported; a linear whose statistics are missing stops the "
        "build."
    ),
    detect=detect,
)
