"""Each fix sees its defect in a real draft, cures it to the byte, and says so when there is nothing to cure."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from builder.artifact import Draft, write_config, write_index
from builder.base import INDEX
from builder.errors import BuildError, ManifestError, Problems
from builder.files import write_json
from builder.fixes import FIXES, Fix, FixRecord, apply_fixes, bind_fixes, default_fixes
from builder.manifest import load_manifest
from builder.schemes.nvfp4 import Nvfp4

LINEARS = ("self_attn.o_proj", "mlp.down_proj")
FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "use_cache": True,
    "transformers_version": "4.57.6",
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.{layer}.{linear}.weight" for layer in range(2) for linear in LINEARS]
    tensors = {name: torch.randn(16, 32, generator=generator).bfloat16() for name in names}
    tensors["model.embed_tokens.weight"] = torch.randn(64, 32, generator=generator).bfloat16()
    tensors["lm_head.weight"] = torch.randn(64, 32, generator=generator).bfloat16()
    tensors["model.norm.weight"] = torch.ones(32).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", CONFIG)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 3], "temperature": 0.6}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_text(f'{{"file":  "{name}"}}')
    return folder


def make_draft(base: Path, layout: str = "modelopt", input_scale: str = "unit") -> Draft:
    """An artifact as it should be: two weight files with an index, configs, the base's other files."""
    folder = base.parent / f"{layout}-{input_scale}"
    folder.mkdir()
    for name in sorted(path.name for path in base.iterdir() if path.suffix != ".safetensors"):
        shutil.copyfile(base / name, folder / name)
    scheme = Nvfp4(layout=layout, input_scale=input_scale)
    weights = load_file(base / "model.safetensors")
    tensors = {name: weight for name, weight in weights.items() if "layers" not in name}
    for name in sorted(weights.keys() - tensors.keys()):
        linear = name.removesuffix(".weight")
        tensors |= scheme.quantize_group({linear: weights[name]}, {linear: 3.0})
    halves = [{name: tensor for name, tensor in tensors.items() if ("layers.1" in name) == last} for last in (0, 1)]
    for file, half in zip(FILES, halves, strict=True):
        save_file(half, folder / file, metadata={"format": "pt"})
    quantization = scheme.quantization_config(("lm_head",))
    if (layout, input_scale) == ("modelopt", "unit"):
        quantization["config_groups"]["group_0"]["input_activations"] = {"dynamic": True, "num_bits": 4}
    write_config(folder / "config.json", CONFIG, quantization)
    for name, content in scheme.extra_configs(("lm_head",)).items():
        write_json(folder / name, content)
    draft = Draft(folder, base, layout, input_scale, ("lm_head",))
    index_files(draft)
    return draft


def index_files(draft: Draft) -> None:
    num_bytes = sum(t.nbytes for file in FILES for t in load_file(draft.folder / file).values())
    write_index(draft.folder, draft.tensor_names(), num_bytes, 8192)


def read_folder(draft: Draft) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in draft.folder.iterdir()}


def change_json(draft: Draft, name: str, change: Callable[[Any], None]) -> None:
    content = draft.read_json(name)
    change(content)
    draft.write_json(name, content)


def change_tensors(draft: Draft, file: str, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(draft.folder / file)
    change(tensors)
    save_file(tensors, draft.folder / file, metadata={"format": "pt"})
    index_files(draft)


def drop_input_scales(draft: Draft) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "input_" in name]:
            del tensors[name]

    for file in FILES:
        change_tensors(draft, file, drop)


def say_static(draft: Draft) -> None:
    def change(config: Any) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["input_activations"]["dynamic"] = False

    change_json(draft, "config.json", change)


def leak_template(draft: Draft) -> None:
    template = {"num_hidden_layers": 1, "vocab_size": 2, "pad_token_id": None, "use_cache": False}
    change_json(draft, "config.json", lambda config: config.update(template))


def lose_ignore(draft: Draft) -> None:
    change_json(draft, "config.json", lambda config: config["quantization_config"].update(ignore=[]))
    if draft.layout == "modelopt":
        change_json(draft, "hf_quant_config.json", lambda config: config["quantization"].update(exclude_modules=[]))


def leak_generation_config(draft: Draft) -> None:
    draft.write_json("generation_config.json", {"_from_model_config": True, "use_cache": False})


def spoil_tokenizer(draft: Draft) -> None:
    draft.remove("special_tokens_map.json")
    draft.write_json("tokenizer_config.json", draft.read_json("tokenizer_config.json"))
    draft.write_json("added_tokens.json", {})


LEAKED = (
    "In config.json num_hidden_layers is 1, but 2 in the base; pad_token_id is null, but 2 in the base; "
    "use_cache is false, but true in the base; and 1 more."
)
CURABLE: Mapping[str, tuple[Callable[[Draft], None], str]] = {
    "inject-input-scale": (
        drop_input_scales,
        "Quantized linears without an input scale: 4, the first missing is model.layers.0.mlp.down_proj.input_scale.",
    ),
    "dynamic-input-activations": (
        say_static,
        "config.json calls the activation scales static, but they are constants and were not measured.",
    ),
    "restore-config": (leak_template, LEAKED),
    "keep-lm-head-bf16": (lose_ignore, "quantization_config.ignore of config.json lacks lm_head."),
    "keep-generation-config": (leak_generation_config, "generation_config.json differs from the base's."),
    "keep-chat-template": (lambda draft: draft.remove("chat_template.jinja"), "chat_template.jinja is missing."),
    "keep-tokenizer-files": (
        spoil_tokenizer,
        "added_tokens.json is none of the base's files; special_tokens_map.json is missing; "
        "tokenizer_config.json differs from the base's.",
    ),
}


def test_every_fix_has_either_a_cure_or_a_reason_why_it_needs_none() -> None:
    assert {name for name, fix in FIXES.items() if fix.apply} == CURABLE.keys()
    for name, fix in FIXES.items():
        assert fix.name == name
        assert bool(fix.healthy) == (fix.apply is not None)
        assert bool(fix.avoided) == (fix.apply is None)


def test_every_text_of_a_fix_can_be_printed_on_a_card() -> None:
    for fix in FIXES.values():
        for text in (fix.symptom, fix.healthy or fix.avoided):
            assert text[-1] == "." and "\n" not in text and "  " not in text
        assert fix.title and fix.title[-1] != "." and fix.upstream


@pytest.mark.parametrize("name", CURABLE)
def test_a_defect_is_cured_to_the_byte_and_a_second_application_changes_nothing(base: Path, name: str) -> None:
    draft, fix = make_draft(base), FIXES[name]
    healthy = read_folder(draft)
    spoil, evidence = CURABLE[name]
    spoil(draft)
    spoiled = read_folder(draft)
    assert spoiled != healthy
    assert fix.detect(draft) == evidence
    assert read_folder(draft) == spoiled

    assert apply_fixes(draft, [fix]) == (FixRecord(name, fix.title, "applied", evidence),)
    assert read_folder(draft) == healthy
    assert fix.apply is not None
    fix.apply(draft)
    assert read_folder(draft) == healthy


@pytest.mark.parametrize(
    ("layout", "input_scale"),
    [
        ("modelopt", "unit"),
        ("modelopt", "calibrated"),
        ("compressed-tensors", "unit"),
        ("compressed-tensors", "calibrated"),
    ],
)
def test_a_healthy_draft_needs_no_fix_and_is_left_as_it_is(base: Path, layout: str, input_scale: str) -> None:
    draft = make_draft(base, layout, input_scale)
    healthy = read_folder(draft)
    fixes = [FIXES[name] for name in default_fixes("nvfp4", layout, input_scale)]
    expected = [
        FixRecord(
            fix.name, fix.title, *(("avoided by design", fix.avoided) if fix.avoided else ("not needed", fix.healthy))
        )
        for fix in fixes
    ]
    assert list(apply_fixes(draft, fixes)) == expected
    assert read_folder(draft) == healthy


def test_all_defects_at_once_are_all_cured(base: Path) -> None:
    draft = make_draft(base)
    healthy = read_folder(draft)
    for spoil, _ in CURABLE.values():
        spoil(draft)
    records = apply_fixes(draft, list(FIXES.values()))
    assert {record.name for record in records if record.status == "applied"} == CURABLE.keys()
    assert read_folder(draft) == healthy


def test_input_scales_are_injected_for_each_linear_that_lacks_one_and_no_other(base: Path) -> None:
    draft = make_draft(base)
    kept, lost = "model.layers.0.mlp.down_proj.input_scale", "model.layers.0.self_attn.o_proj.input_scale"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[kept] = torch.tensor(0.25)
        del tensors[lost]

    change_tensors(draft, FILES[0], change)
    [record] = apply_fixes(draft, [FIXES["inject-input-scale"]])
    assert record.evidence == f"Quantized linears without an input scale: 1, the first missing is {lost}."
    tensors = load_file(draft.folder / FILES[0])
    assert tensors[kept].item() == 0.25
    assert tensors[lost].item() == 1.0 and tensors[lost].shape == () and tensors[lost].dtype == torch.float32
    assert draft.read_json(INDEX)["weight_map"] == draft.tensor_names()


def test_input_scales_of_compressed_tensors_are_injected_with_its_names_and_shape(base: Path) -> None:
    draft = make_draft(base, "compressed-tensors")
    healthy = read_folder(draft)
    drop_input_scales(draft)
    apply_fixes(draft, [FIXES["inject-input-scale"]])
    assert read_folder(draft) == healthy


def test_an_input_scale_that_was_to_be_measured_is_never_replaced_by_a_constant(base: Path) -> None:
    draft = make_draft(base, "modelopt", "calibrated")
    drop_input_scales(draft)
    spoiled = read_folder(draft)
    with pytest.raises(BuildError) as caught:
        apply_fixes(draft, [FIXES["inject-input-scale"]])
    assert str(caught.value) == (
        "model.layers.0.mlp.down_proj.input_scale was not measured, and 1.0 in its place would pass for a measurement\n"
        f"  in {draft.folder}: inject-input-scale\n"
        "  fix: calibrate again, or ask for constants with scheme.input_scale: unit"
    )
    assert read_folder(draft) == spoiled


def test_weights_whose_inputs_stay_in_16_bits_need_no_input_scale(base: Path) -> None:
    draft = make_draft(base, "compressed-tensors")
    drop_input_scales(draft)

    def change(config: Any) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = None

    change_json(draft, "config.json", change)
    assert FIXES["inject-input-scale"].detect(draft) is None


def test_the_modelopt_file_beside_the_config_names_lm_head_too(base: Path) -> None:
    draft = make_draft(base)
    change_json(draft, "hf_quant_config.json", lambda config: config["quantization"].update(exclude_modules=["x"]))
    [record] = apply_fixes(draft, [FIXES["keep-lm-head-bf16"]])
    assert record.evidence == "exclude_modules of hf_quant_config.json lacks lm_head."
    assert draft.read_json("hf_quant_config.json")["quantization"]["exclude_modules"] == ["lm_head", "x"]


def test_a_pattern_that_names_lm_head_is_as_good_as_its_name(base: Path) -> None:
    draft = make_draft(base, "compressed-tensors")
    change_json(draft, "config.json", lambda config: config["quantization_config"].update(ignore=["re:.*lm_head"]))
    assert FIXES["keep-lm-head-bf16"].detect(draft) is None


def test_the_dtype_and_the_version_of_transformers_are_no_differences_of_the_model(base: Path) -> None:
    draft = make_draft(base)

    def change(config: Any) -> None:
        config["torch_dtype"] = config.pop("dtype")
        config["transformers_version"] = "5.14.1"

    change_json(draft, "config.json", change)
    assert FIXES["restore-config"].detect(draft) is None


def test_a_generation_config_that_the_base_does_not_have_is_removed(base: Path) -> None:
    draft = make_draft(base)
    (base / "generation_config.json").unlink()
    [record] = apply_fixes(draft, [FIXES["keep-generation-config"]])
    assert record.evidence == "generation_config.json is none of the base's files."
    assert not (draft.folder / "generation_config.json").exists()


# --------------------------------------------------------------------- what the design avoids leaves traces if it fails


def leave_unquantized(draft: Draft) -> None:
    linear = "model.layers.1.mlp.down_proj"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(linear)]:
            del tensors[name]
        tensors[f"{linear}.weight"] = torch.ones(16, 32).bfloat16()

    change_tensors(draft, FILES[1], change)


def rename_layer(new: str) -> Callable[[Draft], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "layers.1" in name]:
            tensors[name.replace("layers.1", new)] = tensors.pop(name)

    return lambda draft: change_tensors(draft, FILES[1], change)


def keep_own_edges(draft: Draft) -> None:
    stand_in = {"model.embed_tokens.weight": torch.zeros(2, 32).bfloat16()}
    change_tensors(draft, FILES[1], lambda tensors: tensors.update(stand_in))


def replace_edges(draft: Draft) -> None:
    edges = {"lm_head.weight": torch.zeros(2, 32).bfloat16(), "model.norm.weight": torch.zeros(32).bfloat16()}
    change_tensors(draft, FILES[0], lambda tensors: tensors.update(edges))


AVOIDED: Iterable[tuple[str, Callable[[Draft], None], str]] = [
    (
        "keep-calibrator",
        leave_unquantized,
        "Not quantized, unlike its like in other layers: model.layers.1.mlp.down_proj.",
    ),
    ("renumber-layers", rename_layer("layers.0"), "Layers of the base are missing: model.layers.1."),
    ("renumber-layers", rename_layer("layers.2"), "Layers of the base are missing: model.layers.1."),
    ("keep-edges-once", keep_own_edges, "In more than one file: model.embed_tokens.weight."),
    ("keep-edges-once", replace_edges, "Not the base's: lm_head.weight; model.norm.weight."),
    (
        "gather-parts",
        lambda draft: (draft.folder / FILES[1]).unlink(),
        f"The index names tensors that are not in its files: {FILES[1]}.",
    ),
]


@pytest.mark.parametrize(("name", "spoil", "evidence"), AVOIDED)
def test_a_defect_that_the_design_avoids_stops_the_build_if_it_shows(
    base: Path, name: str, spoil: Callable[[Draft], None], evidence: str
) -> None:
    draft = make_draft(base)
    spoil(draft)
    with pytest.raises(BuildError) as caught:
        apply_fixes(draft, [FIXES[name]])
    assert str(caught.value) == (
        f"{evidence}\n"
        f"  in {draft.folder}: {name}\n"
        "  fix: build the release anew; if that does not help, report this as a defect of the release builder"
    )


def test_a_layer_that_the_base_does_not_have_stops_the_build(base: Path) -> None:
    draft = make_draft(base)
    extra = {"model.layers.2.mlp.down_proj.weight": torch.ones(16, 32).bfloat16()}
    change_tensors(draft, FILES[1], lambda tensors: tensors.update(extra))
    assert FIXES["renumber-layers"].detect(draft) == "The base has no such layers: model.layers.2."


def test_layers_of_the_base_beyond_those_its_config_counts_are_not_missed(base: Path) -> None:
    draft = make_draft(base)
    extra = {"model.layers.2.mlp.down_proj.weight": torch.ones(16, 32).bfloat16()}
    save_file({**load_file(base / "model.safetensors"), **extra}, base / "model.safetensors")
    assert FIXES["renumber-layers"].detect(draft) is None


def test_of_a_template_s_config_only_what_was_shrunk_is_restored_and_in_the_published_order(base: Path) -> None:
    draft = replace(make_draft(base), from_template=True, spell=json.dumps)
    quantization = draft.read_json("config.json")["quantization_config"]
    template = {"eos_token_id": None, "head_dim": 16, "use_cache": False, "quantization_config": quantization}
    draft.write_json("config.json", {"num_hidden_layers": 1, **template})
    [record] = apply_fixes(draft, [FIXES["restore-config"]])
    assert record.evidence == (
        "In config.json num_hidden_layers is 1, but 2 in the base; vocab_size is absent, but 64 in the base; "
        "pad_token_id is absent, but 2 in the base; and 3 more."
    )
    config = draft.read_json("config.json")
    assert list(config) == [
        *("num_hidden_layers", "eos_token_id", "head_dim", "use_cache", "quantization_config"),
        *("vocab_size", "pad_token_id", "bos_token_id", "architectures"),
    ]
    assert config["use_cache"] is False and config["quantization_config"] == quantization
    assert {key: config[key] for key in CONFIG if key in config and key != "use_cache"}.items() <= CONFIG.items()


def test_a_cure_that_does_not_help_stops_the_build(base: Path) -> None:
    draft = make_draft(base)
    leak_generation_config(draft)
    useless = replace(FIXES["keep-generation-config"], apply=lambda draft: None)
    with pytest.raises(BuildError) as caught:
        apply_fixes(draft, [useless])
    assert str(caught.value) == (
        "the cure did not help: generation_config.json differs from the base's.\n"
        f"  in {draft.folder}: keep-generation-config\n"
        "  fix: report this as a defect of the release builder"
    )


# ------------------------------------------------------------------------------------------------ what a manifest lists


def bind(folder: Path, scheme: str, fixes: str | None, name: str = "nvfp4") -> tuple[Fix, ...]:
    path = folder / "tiny.yaml"
    text = (
        f"manifest: 1\ntitle: T\nrepo: o/n\nbase: {{path: base, licenses: [mit]}}\nscheme: {{name: {name}, {scheme}}}\n"
    )
    path.write_text(text + (f"fixes: {fixes}\n" if fixes else ""))
    return bind_fixes(load_manifest(path))


def test_without_a_list_a_release_gets_every_fix_that_is_for_it(tmp_path: Path) -> None:
    bound = bind(tmp_path, "layout: modelopt, input_scale: unit", None)
    assert [fix.name for fix in bound] == list(FIXES)
    bound = bind(tmp_path, "layout: compressed-tensors", None)
    assert [fix.name for fix in bound] == [name for name in FIXES if name != "dynamic-input-activations"]
    layouts = [("modelopt", "calibrated"), ("compressed-tensors", "unit")]
    assert len({default_fixes("nvfp4", *layout) for layout in layouts}) == 1


@pytest.mark.parametrize("name", ["fp8_dynamic", "w8a8", "w4a16"])
def test_a_scheme_without_modelopt_gets_the_fixes_that_look_at_any_artifact(tmp_path: Path, name: str) -> None:
    assert [fix.name for fix in bind(tmp_path, "ignore: [lm_head]", None, name)] == [
        *("restore-config", "keep-lm-head-bf16", "keep-generation-config", "keep-chat-template"),
        *("keep-tokenizer-files", "renumber-layers", "keep-edges-once", "gather-parts"),
    ]


def test_a_fix_for_input_scales_is_refused_where_a_scheme_stores_none(tmp_path: Path) -> None:
    with pytest.raises(ManifestError) as caught:
        bind(tmp_path, "ignore: [lm_head]", "[inject-input-scale]", "nvfp4a16")
    assert str(caught.value) == (
        "inject-input-scale is not for the scheme nvfp4a16\n"
        f"  in {tmp_path}/tiny.yaml:6:9: fixes[0]: inject-input-scale\n"
        "  fix: remove it; it is for the scheme nvfp4"
    )


def test_listed_fixes_come_in_the_list_s_order_and_none_besides(tmp_path: Path) -> None:
    bound = bind(tmp_path, "layout: modelopt", "[restore-config, keep-calibrator]")
    assert [fix.name for fix in bound] == ["restore-config", "keep-calibrator"]
    assert bind(tmp_path, "layout: modelopt", "[]") == ()


def test_the_six_published_fixes_can_be_listed_by_name(tmp_path: Path) -> None:
    published = [
        *("template-vocab-size", "template-token-ids", "keep-calibrator"),
        *("inject-input-scale", "dynamic-input-activations", "restore-config"),
    ]
    bound = bind(tmp_path, "layout: modelopt, input_scale: unit", json.dumps(published))
    assert [fix.name for fix in bound] == published


def test_an_unknown_fix_is_reported_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(ManifestError) as caught:
        bind(tmp_path, "layout: modelopt", "[restore-confg]")
    assert str(caught.value) == (
        "unknown fix: restore-confg\n"
        f"  in {tmp_path}/tiny.yaml:6:9: fixes[0]: restore-confg\n"
        f"  fix: did you mean restore-config? Valid: {', '.join(sorted(FIXES))}"
    )


def test_a_fix_for_another_layout_or_other_scales_is_refused_with_those_it_is_for(tmp_path: Path) -> None:
    name = "dynamic-input-activations"
    with pytest.raises(ManifestError) as caught:
        bind(tmp_path, "layout: compressed-tensors", f"[{name}]")
    assert str(caught.value) == (
        f"{name} is not for the layout compressed-tensors\n"
        f"  in {tmp_path}/tiny.yaml:6:9: fixes[0]: {name}\n"
        "  fix: remove it; it is for the layout modelopt"
    )
    with pytest.raises(ManifestError) as caught:
        bind(tmp_path, "layout: modelopt", f"[{name}]")
    assert str(caught.value) == (
        f"{name} is not for calibrated input scales\n"
        f"  in {tmp_path}/tiny.yaml:6:9: fixes[0]: {name}\n"
        "  fix: remove it; it is for scheme.input_scale: unit"
    )


def test_all_mistakes_in_a_list_of_fixes_are_reported_together(tmp_path: Path) -> None:
    with pytest.raises(Problems) as caught:
        bind(tmp_path, "layout: modelopt", "[one, restore-config, two]")
    assert [problem.what for problem in caught.value.problems] == ["unknown fix: one", "unknown fix: two"]
