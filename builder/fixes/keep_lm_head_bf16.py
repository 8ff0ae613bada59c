"""Linears left in 16 bits that the config does not name, so that loaders look for their scales."""

from builder.artifact import Draft
from builder.fixes.fix import Fix, list_briefly
from builder.plan import match_names

MODELOPT_CONFIG = "hf_quant_config.json"


def find_unlisted(draft: Draft, patterns: list[str]) -> list[str]:
    """The linears that stay as they were and that no pattern names."""
    return [linear for linear in draft.ignore if not any(match_names(pattern, [linear]) for pattern in patterns)]


def detect(draft: Draft) -> str | None:
    unlisted = find_unlisted(draft, draft.read_json("config.json")["quantization_config"].get("ignore", []))
    if unlisted:
        return f"quantization_config.ignore of config.json lacks {list_briefly(unlisted)}."
    beside = draft.read_json(MODELOPT_CONFIG)
    unlisted = find_unlisted(draft, beside["quantization"].get("exclude_modules", [])) if beside else []
    return f"exclude_modules of {MODELOPT_CONFIG} lacks {list_briefly(unlisted)}." if unlisted else None


def apply(draft: Draft) -> None:
    config = draft.read_json("config.json")
    ignored = config["quantization_config"].get("ignore", [])
    config["quantization_config"]["ignore"] = sorted([*ignored, *find_unlisted(draft, ignored)])
    draft.write_json("config.json", config)
    beside = draft.read_json(MODELOPT_CONFIG)
    if beside:
        excluded = beside["quantization"].get("exclude_modules", [])
        beside["quantization"]["exclude_modules"] = sorted([*excluded, *find_unlisted(draft, excluded)])
        draft.write_json(MODELOPT_CONFIG, beside)


FIX = Fix(
    name="keep-lm-head-bf16",
    title="The config names every linear that is not quantized, lm_head first of all",
    symptom="Loading ends in an error about lm_head's shape or its missing scales.",
    upstream=(
        "nvidia-modelopt lists what it left out of the model it was given: of a template whose lm_head is a stand-in, "
        "0.43 lists nothing."
    ),
    healthy="The config names every linear that is not quantized.",
    detect=detect,
    apply=apply,
)
