"""Perplexity measured layer by layer is that of the whole model as transformers runs it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build, release_writer
from safetensors.torch import load_file, save_file

from builder.errors import BaseError, BuildError, CalibrationError, VerifyError
from builder.perplexity import ArtifactStream, measure_perplexity, open_artifact, open_base, split_text
from builder.schemes.nvfp4 import Nvfp4
from builder.stages import Workspace
from builder.stages.perplexity import read_layout
from builder.streaming import Arithmetic

pytestmark = pytest.mark.xdist_group("modelopt")

WINDOW = 64
CONFIG = Nvfp4().quantization_config(["lm_head"])
WHERE = "releases/tiny.yaml:13:9: perplexity.path: heldout.txt"


@pytest.fixture(autouse=True, scope="module")
def single_thread() -> Iterator[None]:
    """Tensors as small as these take longer with several threads, and far longer where other tests run beside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Releases:
    """One release in both layouts, and some of its held-out text."""

    base: Path
    artifacts: dict[str, Path]
    text: Path
    windows: list[list[int]]

    def open(self, layout: str, arithmetic: Arithmetic = "exact") -> ArtifactStream:
        return open_artifact(self.artifacts[layout], CONFIG, arithmetic=arithmetic)

    @cached_property
    def of_base(self) -> float:
        return measure_perplexity(open_base(self.base), self.windows)

    @cached_property
    def of_artifact(self) -> float:
        return measure_perplexity(self.open("compressed-tensors"), self.windows)


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> Releases:
    folder = tmp_path_factory.mktemp("perplexity")
    write = release_writer(folder / "releases")
    artifacts = {}
    for layout in ("compressed-tensors", "modelopt"):
        manifest = write(layout, **{"scheme.layout": layout, "calibration.samples": 4, "calibration.tokens": [16, 32]})
        artifacts[layout] = build(manifest, folder / layout).artifact
    text = folder / "releases" / "some.txt"
    text.write_text((folder / "releases" / "heldout.txt").read_text("utf-8")[2000:3200], "utf-8")
    windows = split_text(text, folder / "releases" / "base", WINDOW, WHERE).windows
    return Releases(folder / "releases" / "base", artifacts, text, windows)


def measure_whole(folder: Path, windows: Sequence[Sequence[int]]) -> float:
    """Perplexity of a folder as transformers itself reads it, its loss and all."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    total = count = 0.0
    for window in windows:
        tokens = torch.tensor([window])
        with torch.inference_mode():
            total += (len(window) - 1) * float(model(input_ids=tokens, labels=tokens, use_cache=False).loss)
        count += len(window) - 1
    return math.exp(total / count)


def test_a_base_has_the_perplexity_that_transformers_finds(releases: Releases) -> None:
    """To 1e-6 in the same arithmetic: the loss of transformers is a float32 mean over each window, ours is exact."""
    wanted = measure_whole(releases.base, releases.windows)
    native = open_base(releases.base, arithmetic="native")
    assert measure_perplexity(native, releases.windows) == pytest.approx(wanted, rel=1e-6)
    assert releases.of_base == pytest.approx(wanted, rel=2e-3)
    assert releases.of_base < 100, "the model was trained; an untrained one has 2048"


def test_an_artifact_has_the_perplexity_that_transformers_and_compressed_tensors_find(releases: Releases) -> None:
    wanted = measure_whole(releases.artifacts["compressed-tensors"], releases.windows)
    native = releases.open("compressed-tensors", "native")
    assert measure_perplexity(native, releases.windows) == pytest.approx(wanted, rel=1e-6)
    assert releases.of_artifact == pytest.approx(wanted, rel=1e-2), "rounding to 4 bits makes much of the last bits"
    assert releases.of_artifact != releases.of_base


def test_an_artifacts_logits_are_those_of_the_whole_model_to_the_last_bit(releases: Releases) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(releases.artifacts["compressed-tensors"], dtype="auto").eval()
    stream = releases.open("compressed-tensors", "native")
    for window in (releases.windows[0][:20], releases.windows[-1]):
        with torch.inference_mode():
            wanted = model(torch.tensor([window]), use_cache=False).logits[0]
        assert torch.equal(read_logits(stream, window), wanted)


@pytest.mark.parametrize("scheme", ["fp8_dynamic", "w8a8", "w4a16", "nvfp4a16"])
def test_logits_of_every_scheme_are_those_of_the_whole_model_to_the_last_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("builder.perplexity.BAND_ELEMENTS", 25_000)  # several bands, the last of fewer rows
    manifest = release_writer(tmp_path / "releases")(**{"scheme.name": scheme, "calibration": None})
    workspace = build(manifest, tmp_path / "build")
    model = AutoModelForCausalLM.from_pretrained(workspace.artifact, dtype="auto").eval()
    window = list(range(5, 25))
    with torch.inference_mode():
        wanted = model(torch.tensor([window]), use_cache=False).logits[0]
    native, exact = (
        read_logits(open_artifact(workspace.artifact, read_layout(workspace), arithmetic=arithmetic), window)
        for arithmetic in ("native", "exact")
    )
    assert torch.equal(native, wanted)
    assert (exact - wanted).norm() < 0.05 * wanted.norm()


def read_logits(stream: ArtifactStream, window: Sequence[int]) -> torch.Tensor:
    row = stream.embed(window)
    for index in range(len(stream.layers)):
        with stream.open_layer(index) as layer:
            stream.run_layer(layer, index, row)
    return stream.read_logits(row)


def test_keys_and_values_are_rounded_with_the_scales_of_the_kv_cache_as_transformers_does(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    window = list(range(5, 25))
    few = {"kv_cache": "fp8", "calibration.samples": 2}
    write, logits = release_writer(tmp_path / "releases"), {}
    for layout, scheme in (("compressed-tensors", "fp8_dynamic"), ("modelopt", "nvfp4")):
        manifest = write(layout, **few, **{"scheme.name": scheme, "scheme.layout": layout})
        workspace = build(manifest, tmp_path / layout)
        config = read_layout(workspace)
        logits[layout], unrounded = (
            read_logits(open_artifact(workspace.artifact, {**config, **changes}, arithmetic="native"), window)
            for changes in ({}, {"kv_cache_scheme": None})
        )
        exact = read_logits(open_artifact(workspace.artifact, config), window)
        assert (exact - logits[layout]).norm() < 0.1 * exact.norm()
        assert 0 < (logits[layout] - unrounded).abs().max() < 2
        if layout == "compressed-tensors":
            model = AutoModelForCausalLM.from_pretrained(workspace.artifact, dtype="auto").eval()
            with torch.inference_mode():
                whole = model(torch.tensor([window]), use_cache=False).logits[0]
            assert torch.equal(logits[layout], whole)


def test_both_layouts_have_exactly_the_same_perplexity(releases: Releases) -> None:
    assert measure_perplexity(releases.open("modelopt"), releases.windows) == releases.of_artifact


def test_an_artifact_loses_little(releases: Releases) -> None:
    assert 0.97 < releases.of_artifact / releases.of_base < 1.1


def spoil(artifact: Path, folder: Path, suffix: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A copy of an artifact with every tensor of a kind changed."""
    shutil.copytree(artifact, folder)
    changed = 0
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith(suffix)]:
            tensors[name] = change(tensors[name])
            changed += 1
        save_file(tensors, file, metadata={"format": "pt"})
    assert changed == 28
    return folder


@pytest.mark.parametrize(
    ("layout", "suffix"), [("compressed-tensors", ".weight_global_scale"), ("modelopt", ".weight_scale_2")]
)
def test_a_scale_written_the_wrong_way_round_shows(
    releases: Releases, tmp_path: Path, layout: str, suffix: str
) -> None:
    spoilt = spoil(releases.artifacts[layout], tmp_path / "spoilt", suffix, lambda scale: 1 / scale)
    assert measure_perplexity(open_artifact(spoilt, CONFIG), releases.windows) > 1.2 * releases.of_artifact


def test_scales_of_inputs_are_used(releases: Releases, tmp_path: Path) -> None:
    """Scales a hundred thousand times too large push every block of an input below the smallest block scale."""
    layout = "compressed-tensors"
    spoilt = spoil(releases.artifacts[layout], tmp_path / "spoilt", ".input_global_scale", lambda scale: scale / 1e5)
    assert measure_perplexity(open_artifact(spoilt, CONFIG), releases.windows) > 1.2 * releases.of_artifact


def test_scales_that_are_not_numbers_end_in_a_sentence(releases: Releases, tmp_path: Path) -> None:
    layout = "compressed-tensors"
    nan = float("nan")
    spoilt = spoil(releases.artifacts[layout], tmp_path / "spoilt", ".weight_global_scale", lambda scale: scale * nan)
    with pytest.raises(VerifyError) as caught:
        measure_perplexity(open_artifact(spoilt, CONFIG), releases.windows[:1])
    with pytest.raises(VerifyError, match="the mean negative log-likelihood is nan, which is no perplexity"):
        measure_perplexity(open_artifact(spoilt, CONFIG, arithmetic="native"), releases.windows[:1])
    assert str(caught.value) == (
        "an operand of a matrix product holds a NaN or an infinity\n"
        f"  in model.layers.0 of {spoilt}\n"
        "  fix: see whether its weights and scales are sound"
    )


def test_only_the_open_layer_of_an_artifact_has_its_weights_in_memory(releases: Releases) -> None:
    stream = releases.open("compressed-tensors")
    with stream.open_layer(0) as layer:
        assert layer.mlp.up_proj.weight.shape == (768, 256) and not layer.mlp.up_proj.weight.is_meta
    for closed in (layer, *stream.layers):
        assert all(parameter.is_meta for parameter in closed.parameters())


# ------------------------------------------------------------------------------------------------------ windows


def test_windows_cut_the_whole_text_and_the_last_may_be_short(releases: Releases) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(releases.base)
    tokens = tokenizer(releases.text.read_text("utf-8"), add_special_tokens=False).input_ids
    assert [token for window in releases.windows for token in window[1:]] == tokens
    assert {window[0] for window in releases.windows} == {tokenizer.bos_token_id}, "each begins as the tokenizer begins"
    assert [len(window) for window in releases.windows[:-1]] == [WINDOW] * (len(releases.windows) - 1)
    assert 1 < len(releases.windows[-1]) < WINDOW, "the text is cut so that this test means something"


def use_beginning(base: Path, folder: Path, beginning: list[str]) -> Path:
    """A base's tokenizer that puts other tokens before a text."""
    folder.mkdir()
    for file in base.glob("*.json"):
        shutil.copy(file, folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    ids = {token: content["model"]["vocab"].get(token, 0) for token in beginning}
    ids |= {token["content"]: token["id"] for token in content["added_tokens"] if token["content"] in ids}
    pieces = [{"SpecialToken": {"id": token, "type_id": 0}} for token in beginning]
    text = {"Sequence": {"id": "A", "type_id": 0}}
    special = {token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in beginning}
    content["post_processor"] = beginning and {
        "type": "TemplateProcessing",
        "single": [*pieces, text],
        "pair": [*pieces, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": special,
    }
    content["post_processor"] = content["post_processor"] or None
    path.write_text(json.dumps(content), "utf-8")
    return folder


def test_windows_begin_with_as_many_tokens_as_the_tokenizer_puts_before_a_text(
    releases: Releases, tmp_path: Path
) -> None:
    begun = json.loads((releases.base / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    first, second = begun[0], begun[1]
    names = [first["content"], second["content"]]
    for number, beginning in enumerate(([], names[:1], names)):
        base = use_beginning(releases.base, tmp_path / str(number), beginning)
        held_out = split_text(releases.text, base, WINDOW, WHERE)
        assert held_out.beginning == [first["id"], second["id"]][: len(beginning)]
        assert held_out.first == max(1, len(beginning))
        assert held_out.num_measured == sum(len(window) for window in held_out.windows) - held_out.first * len(
            held_out.windows
        )
        assert all(window[: len(beginning)] == held_out.beginning for window in held_out.windows)


def test_a_last_window_of_one_token_is_read_after_the_beginning_alone(releases: Releases) -> None:
    length = sum(len(window) - 1 for window in releases.windows) - 1
    windows = split_text(releases.text, releases.base, length + 1, WHERE).windows
    assert [len(window) for window in windows] == [length + 1, 2]


def test_every_token_counts_the_same_whatever_its_window(releases: Releases) -> None:
    stream = open_base(releases.base)
    apart = [(len(window) - 1, math.log(measure_perplexity(stream, [window]))) for window in releases.windows]
    mean = sum(count * loss for count, loss in apart) / sum(count for count, _ in apart)
    assert math.log(measure_perplexity(stream, releases.windows)) == pytest.approx(mean, rel=1e-12)


def test_a_window_longer_than_a_chunk_of_logits_is_measured_whole(releases: Releases) -> None:
    window = [token for window in releases.windows for token in window][:300]
    found = measure_perplexity(open_base(releases.base, arithmetic="native"), [window])
    assert found == pytest.approx(measure_whole(releases.base, [window]), rel=1e-6)


@pytest.mark.parametrize(("content", "beginning"), [("", ["<s>"]), ("", []), ("a", [])])
def test_a_text_without_anything_to_predict_is_refused(
    releases: Releases, tmp_path: Path, content: str, beginning: list[str]
) -> None:
    (tmp_path / "short.txt").write_text(content)
    base = releases.base if beginning else use_beginning(releases.base, tmp_path / "base", [])
    with pytest.raises(BuildError) as caught:
        split_text(tmp_path / "short.txt", base, WINDOW, WHERE)
    assert str(caught.value) == (f"short.txt has no text to measure on\n  in {WHERE}\n  fix: give some thousand words")


def test_a_text_that_is_not_there_or_not_utf_8_is_refused(releases: Releases, tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    with pytest.raises(BuildError) as caught:
        split_text(path, releases.base, WINDOW, WHERE)
    assert str(caught.value) == (
        f"no such file: {path}\n  in {WHERE}\n  fix: give a text file relative to the manifest"
    )
    path.write_bytes("déjà vu".encode("latin-1"))
    with pytest.raises(BuildError) as caught:
        split_text(path, releases.base, WINDOW, WHERE)
    assert str(caught.value) == f"latin.txt is not UTF-8 text\n  in {WHERE}\n  fix: convert it to UTF-8"


def test_a_base_without_a_tokenizer_says_so(releases: Releases, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError) as caught:
        split_text(releases.text, tmp_path, WINDOW, WHERE)
    assert caught.value.what.startswith("the base model's tokenizer cannot be read: ")


def test_an_artifact_with_a_torn_config_is_refused(releases: Releases, tmp_path: Path) -> None:
    folder = tmp_path / "torn"
    shutil.copytree(releases.artifacts["modelopt"], folder)
    (folder / "config.json").write_text('{"architectures": [')
    with pytest.raises(BaseError) as caught:
        open_artifact(folder, CONFIG)
    assert str(caught.value) == f"{folder}/config.json cannot be read\n  in {folder}\n  fix: build the release again"


# -------------------------------------------------------------------------------------------------------- stage


def run_stage(workspace: Workspace) -> Any:
    from builder.stages import perplexity

    return perplexity.STAGE.run(workspace)


def test_the_stage_measures_both_on_windows_the_model_can_hold(tmp_path: Path) -> None:
    write = release_writer(tmp_path / "releases")
    manifest = write(**{"scheme.input_scale": "unit", "calibration": None})
    heldout = manifest.parent / "heldout.txt"
    heldout.write_text(heldout.read_text("utf-8")[:2200], "utf-8")
    config = json.loads((manifest.parent / "base" / "config.json").read_text())
    workspace = build(manifest, tmp_path / "build")
    facts = run_stage(workspace).facts
    assert facts["window"] == config["max_position_embeddings"] == 512
    windows = split_text(heldout, manifest.parent / "base", 512, WHERE).windows
    assert len(windows) == 2
    assert facts["num_tokens"] == sum(map(len, windows)) - len(windows)
    assert facts["base"] == measure_perplexity(open_base(manifest.parent / "base"), windows)
    assert facts["recovery_percent"] == 100 * facts["base"] / facts["artifact"]


def test_the_stage_says_that_nothing_was_measured_without_a_text(tmp_path: Path) -> None:
    manifest = release_writer(tmp_path / "releases")(perplexity=None)
    assert run_stage(build(manifest, tmp_path / "build", "plan")).facts == {"measured": False}
