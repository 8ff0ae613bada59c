"""Quantized linears without the scale of their inputs, which loaders then take from uninitialised memory."""

from collections import defaultdict

from builder.artifact import Draft
from builder.errors import BuildError
from builder.fixes.fix import Fix

SCALES = {  # layout -> the weights' global scale, the inputs', the shape of both
    "compressed-tensors": (".weight_global_scale", ".input_global_scale", (1,)),
    "modelopt": (".weight_scale_2", ".input_scale", ()),
}
UNIT = 1.0  # the same in both layouts, though one of them stores reciprocals


def find_missing(draft: Draft) -> dict[str, str]:
    """{input scale that is not there: the file with its linear's weight scale}; empty if inputs are not quantized."""
    config = draft.read_json("config.json")["quantization_config"]
    groups = [group for group in config["config_groups"].values() if group.get("input_activations")]
    targets = {target for group in groups for target in group["targets"]}  # linears by name, or `Linear` for all
    weight, inputs, _ = SCALES[draft.layout]
    names = draft.tensor_names()
    linears = {name.removesuffix(weight): file for name, file in sorted(names.items()) if name.endswith(weight)}
    wanted = {f"{linear}{inputs}": file for linear, file in linears.items() if {linear, "Linear"} & targets}
    return {name: file for name, file in wanted.items() if name not in names}


def detect(draft: Draft) -> str | None:
    missing = find_missing(draft)
    if not missing:
        return None
    return f"Quantized linears without an input scale: {len(missing)}, the first missing is {next(iter(missing))}."


def apply(draft: Draft) -> None:
    """Add 1.0 for each scale that is missing. Raises BuildError where scales were to be measured."""
    import torch

    missing = find_missing(draft)
    if missing and draft.input_scale != "unit":
        raise BuildError(
            f"{next(iter(missing))} was not measured, and 1.0 in its place would pass for a measurement",
            f"{draft.folder}: inject-input-scale",
            "calibrate again, or ask for constants with scheme.input_scale: unit",
        )
    by_file: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, file in missing.items():
        by_file[file][name] = torch.full(SCALES[draft.layout][2], UNIT)
    for file, tensors in by_file.items():
        draft.add_tensors(file, tensors)


FIX = Fix(
    name="inject-input-scale",
    title="Every quantized linear has an input scale",
    symptom="vLLM loads the model without an error and answers “!!!!!!!!”: the scale is whatever was in memory.",
    upstream=(
        "nvidia-modelopt exports input scales only where inputs were calibrated, and in the published pipeline they "
        "were not: mtq.quantize(..., forward_loop=None) ends calibration before the first row. "
        "https://github.com/KaletoAI/distrib-nvfp4/blob/8ae5fa5da99af8e39672e3ff8112ab200a9c4b11/docs/debugging-notes.md"
    ),
    schemes=("nvfp4",),
    healthy="Every linear with quantized inputs has its input scale.",
    detect=detect,
    apply=apply,
)
