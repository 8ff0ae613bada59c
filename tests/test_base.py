from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import FakeHub, serve_fake_hub
from safetensors import safe_open
from safetensors.torch import save

from builder import base, hub
from builder.base import INDEX, Stored
from builder.errors import BaseError, BuildError, ManifestError
from builder.manifest import Manifest, load_manifest

WriteRelease = Callable[..., Path]
REPO = "acme/tiny"
WHERE = "releases/tiny.yaml:5:3: base.path: base"
SHARD_1, SHARD_2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def refusal(act: Callable[[], object], kind: type[BuildError] = BaseError) -> str:
    with pytest.raises(kind) as caught:
        act()
    return str(caught.value)


def make_file(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: object, start: object, end: object) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


# --- headers ----------------------------------------------------------------------------------------------------------


def test_a_header_lists_tensors_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "second": entry("BF16", [2, 3], 4, 16),
        "first": entry("F32", [], 0, 4),
        "empty": entry("U8", [0, 7], 16, 16),
    }
    (tmp_path / "x.safetensors").write_bytes(make_file(header, bytes(16)))
    data = 8 + len(json.dumps(header))
    assert base.read_header(tmp_path / "x.safetensors") == (
        Stored(name="first", dtype="F32", shape=(), file="x.safetensors", start=data, end=data + 4),
        Stored(name="second", dtype="BF16", shape=(2, 3), file="x.safetensors", start=data + 4, end=data + 16),
        Stored(name="empty", dtype="U8", shape=(0, 7), file="x.safetensors", start=data + 16, end=data + 16),
    )


def test_headers_agree_with_the_safetensors_library(tmp_path: Path) -> None:
    dtypes = [torch.float64, torch.int64, torch.float32, torch.int32, torch.bfloat16, torch.float16, torch.int16]
    dtypes += [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.bool]
    path = tmp_path / "x.safetensors"
    path.write_bytes(save({str(dtype): torch.zeros(3, index + 1, dtype=dtype) for index, dtype in enumerate(dtypes)}))
    tensors = base.read_header(path)
    with safe_open(path, framework="pt") as file:
        seen = {
            name: (file.get_slice(name).get_dtype(), tuple(file.get_slice(name).get_shape()))
            for name in file.keys()  # noqa: SIM118
        }
    assert {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors} == seen
    assert len(seen) == len(dtypes) == len(base.DTYPE_BYTES)
    assert [tensor.dtype for tensor in tensors] == list(base.DTYPE_BYTES), "the table is in the library's own order"


WHOLE = make_file({"a": entry("U8", [4], 0, 4)}, bytes(4))


@pytest.mark.parametrize(
    ("content", "what", "fix"),
    [
        (b"", "x.safetensors is not a whole safetensors file (0 bytes)", "fetch it again"),
        (WHOLE[:5], "x.safetensors is not a whole safetensors file (5 bytes)", "fetch it again"),
        (WHOLE[:30], "x.safetensors is not a whole safetensors file (30 bytes)", "fetch it again"),
        (b"<html>nothing here</html>", "x.safetensors is not a whole safetensors file (25 bytes)", "fetch it again"),
        (
            struct.pack("<Q", 1 << 60) + bytes(100),
            "x.safetensors is not a whole safetensors file (108 bytes)",
            "fetch it again",
        ),
        (
            WHOLE[:-1],
            f"x.safetensors has {len(WHOLE) - 1} bytes, but its header needs {len(WHOLE)}",
            "the file is truncated or damaged: fetch it again",
        ),
        (
            WHOLE + b"!",
            f"x.safetensors has {len(WHOLE) + 1} bytes, but its header needs {len(WHOLE)}",
            "the file is truncated or damaged: fetch it again",
        ),
        (
            make_file(b"garbage", b""),
            "x.safetensors has no readable safetensors header: Expecting value: line 1 column 1 (char 0)",
            "fetch the file again",
        ),
        (
            make_file([1, 2], b""),
            "x.safetensors has no readable safetensors header: 'list' object has no attribute 'items'",
            "fetch the file again",
        ),
        (
            make_file({"a": {"dtype": "U8", "shape": [4]}}, b""),
            "x.safetensors has no readable safetensors header: 'data_offsets'",
            "fetch the file again",
        ),
        (
            make_file({"a": entry("U8", "four", 0, 4)}, bytes(4)),
            "a in x.safetensors has no proper shape and place",
            "fetch the file again",
        ),
        (
            make_file({"a": entry("U8", [-2, -2], 0, 4)}, bytes(4)),
            "a in x.safetensors has no proper shape and place",
            "fetch the file again",
        ),
        (
            make_file({"a": entry("U8", [4], 0.0, 4.0)}, bytes(4)),
            "a in x.safetensors has no proper shape and place",
            "fetch the file again",
        ),
        (
            make_file({"a": entry("F4", [8], 0, 4)}, bytes(4)),
            "a in x.safetensors has the unknown dtype F4",
            "use another base",
        ),
        (
            make_file({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 6, 10)}, bytes(10)),
            "b in x.safetensors does not lie where it must",
            "fetch the file again",
        ),
        (
            make_file({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, bytes(6)),
            "b in x.safetensors does not lie where it must",
            "fetch the file again",
        ),
        (
            make_file({"a": entry("BF16", [4], 0, 4)}, bytes(4)),
            "a in x.safetensors does not lie where it must",
            "fetch the file again",
        ),
    ],
)
def test_a_damaged_weight_file_is_refused_plainly(tmp_path: Path, content: bytes, what: str, fix: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    said = refusal(lambda: base.read_header(tmp_path / "x.safetensors"))
    assert said == f"{what}\n  in {tmp_path}\n  fix: {fix}"


def test_a_header_nested_without_end_is_no_header(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(make_file(b"[" * 200_000, b""))
    said = refusal(lambda: base.read_header(tmp_path / "x.safetensors"))
    assert said.startswith("x.safetensors has no readable safetensors header: maximum recursion depth exceeded")
    assert said.endswith(f"\n  in {tmp_path}\n  fix: fetch the file again")


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def manifest(write_release: WriteRelease) -> Manifest:
    return load_manifest(write_release())


@pytest.fixture
def folder(manifest: Manifest) -> Path:
    return manifest.resolve("base")


def change_json(path: Path, **changes: object) -> None:
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def change_index(folder: Path, **changes: str | None) -> None:
    weight_map = {**json.loads((folder / INDEX).read_text())["weight_map"], **changes}
    change_json(folder / INDEX, weight_map={name: file for name, file in weight_map.items() if file is not None})


def test_a_preview_of_a_folder_gives_config_and_headers(manifest: Manifest, folder: Path) -> None:
    config, headers = base.preview_base(manifest)
    assert config == json.loads((folder / "config.json").read_text())
    assert headers is not None and list(headers) == sorted(headers)
    assert {name: tensor.file for name, tensor in headers.items()} == json.loads((folder / INDEX).read_text())[
        "weight_map"
    ]
    assert headers["lm_head.weight"].shape == (2048, 256)


def test_a_model_in_a_single_file_needs_no_index(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(save({"b": torch.zeros(2), "a": torch.zeros(3)}))
    assert list(base.read_tensors(tmp_path, WHERE)) == ["a", "b"]


def test_checkpoint_loads_what_safetensors_loads(folder: Path) -> None:
    checkpoint = base.open_checkpoint(folder, WHERE)
    assert {tensor.file for tensor in checkpoint.tensors.values()} == {SHARD_1, SHARD_2}
    read = 0
    for file in (SHARD_1, SHARD_2):
        with safe_open(folder / file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                loaded, tensor = checkpoint.load(name), checkpoint.tensors[name]
                assert torch.equal(loaded, opened.get_tensor(name)) and loaded.dtype == torch.bfloat16
                content = (folder / file).read_bytes()[tensor.start : tensor.end]
                assert loaded.view(torch.uint8).numpy().tobytes() == content
                read += 1
    assert read == len(checkpoint.tensors) == 39


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "a\\b.safetensors", ".."]
)
def test_an_index_that_leads_out_of_the_folder_is_refused(folder: Path, name: str) -> None:
    change_index(folder, **{"lm_head.weight": name})
    assert refusal(lambda: base.read_tensors(folder, WHERE)) == (
        f"{folder / INDEX} names a file outside the folder: {name}\n  in {WHERE}\n  fix: do not use this base model"
    )


def test_an_index_that_names_a_pickle_is_refused_before_it_is_read(folder: Path) -> None:
    change_index(folder, **{"lm_head.weight": "pytorch_model.bin"})
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert refusal(lambda: base.read_tensors(folder, WHERE)) == (
        f"{folder / INDEX} names pytorch_model.bin, which is not safetensors\n"
        f"  in {WHERE}\n  fix: use safetensors weights"
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "JSONDecodeError('Expecting property name enclosed in double quotes: line 1 column 2 (char 1)')"),
        ("{}", "KeyError('weight_map')"),
        ("[]", "TypeError('list indices must be integers or slices, not str')"),
        ('{"weight_map": ["a"]}', "AttributeError(\"'list' object has no attribute 'values'\")"),
    ],
)
def test_an_index_that_is_none_is_refused(folder: Path, content: str, reason: str) -> None:
    (folder / INDEX).write_text(content)
    assert refusal(lambda: base.read_tensors(folder, WHERE)) == (
        f"{folder / INDEX} is not a weight index: {reason}\n  in {WHERE}\n  fix: fetch it again"
    )


def test_a_missing_weight_file_is_named(folder: Path) -> None:
    (folder / SHARD_2).unlink()
    assert refusal(lambda: base.read_tensors(folder, WHERE)) == (
        f"{INDEX} names {SHARD_2}, which is missing\n  in {WHERE}\n  fix: fetch the file again"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lm_head.weight": None}, f"lm_head.weight is nowhere, but it is in {SHARD_2}"),
        ({"a.weight": SHARD_1}, f"a.weight is in {SHARD_1}, but it is nowhere"),
        ({"lm_head.weight": SHARD_1}, f"lm_head.weight is in {SHARD_1}, but it is in {SHARD_2}"),
    ],
)
def test_an_index_that_disagrees_with_its_files_is_refused(
    folder: Path, changes: dict[str, str | None], said: str
) -> None:
    change_index(folder, **changes)
    assert refusal(lambda: base.read_tensors(folder, WHERE)) == (
        f"{INDEX} says {said}\n  in {folder}\n  fix: fetch the base model again"
    )


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in (SHARD_1, SHARD_2):
        (tmp_path / name).write_bytes(save({"a": torch.zeros(1), name: torch.zeros(1)}))
    weight_map = {SHARD_1: SHARD_1, SHARD_2: SHARD_2, "a": SHARD_2}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert refusal(lambda: base.read_tensors(tmp_path, WHERE)) == (
        f"a is in two files, {SHARD_1} and {SHARD_2}\n  in {tmp_path}\n  fix: fetch the base model again"
    )


def test_a_folder_with_pickles_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert refusal(lambda: base.read_tensors(tmp_path, WHERE)) == (
        "pytorch_model.bin is a pickle, which can run code when it is read\n"
        f"  in {WHERE}\n  fix: use a revision of the base model with safetensors weights"
    )


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    assert refusal(lambda: base.read_tensors(tmp_path, WHERE)) == (
        f"the base model has no model.safetensors and no {INDEX}\n"
        f"  in {WHERE}\n  fix: use a base model with its weights"
    )


# --- config.json ------------------------------------------------------------------------------------------------------

CODE = "the base model brings Python code of its own (auto_map in config.json), which is never run here"
UNNAMED = "config.json names no architecture"
AS_PUBLISHED = "use the config.json the base model was published with"


@pytest.mark.parametrize(
    ("content", "what", "fix"),
    [
        (
            json.dumps({**LLAMA, "auto_map": {"AutoModelForCausalLM": "modeling.Evil"}}).encode(),
            CODE,
            "use a base model that transformers knows by itself",
        ),
        (
            json.dumps({**LLAMA, "quantization_config": {"quant_method": "gptq"}}).encode(),
            "the base model is quantized already",
            "use the model it was quantized from",
        ),
        (b"{}", UNNAMED, AS_PUBLISHED),
        (b"[1]", UNNAMED, AS_PUBLISHED),
        (b'{"architectures": [], "model_type": "llama"}', UNNAMED, AS_PUBLISHED),
        (b'{"architectures": "LlamaForCausalLM", "model_type": "llama"}', UNNAMED, AS_PUBLISHED),
        (b'{"architectures": ["LlamaForCausalLM"]}', UNNAMED, AS_PUBLISHED),
        (
            b'{"model_type": "llama"',
            "config.json is not JSON: Expecting ',' delimiter: line 1 column 23 (char 22)",
            None,
        ),
        (
            b'{"\xff": 1}',
            "config.json is not JSON: 'utf-8' codec can't decode byte 0xff in position 2: invalid start byte",
            None,
        ),
    ],
)
def test_a_config_that_cannot_be_built_from_is_refused(
    tmp_path: Path, content: bytes, what: str, fix: str | None
) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    what = what.replace("config.json ", f"{path} ", 1) if what.startswith("config.json ") else what
    said = refusal(lambda: base.read_config(tmp_path, WHERE))
    assert said == f"{what}\n  in {WHERE}\n  fix: {fix or 'fetch it again'}"


def test_a_folder_without_config_is_no_model(tmp_path: Path) -> None:
    assert refusal(lambda: base.read_config(tmp_path, WHERE)) == (
        f"no config.json in {tmp_path}\n  in {WHERE}\n  fix: point it at a folder that holds a Hugging Face model"
    )


# --- where the base is ------------------------------------------------------------------------------------------------


def test_a_missing_folder_is_named_as_it_was_looked_for(write_release: WriteRelease) -> None:
    manifest = load_manifest(write_release(**{"base.path": "bsae"}))
    for act in (base.preview_base, base.fetch_base):
        assert refusal(lambda act=act: act(manifest)) == (  # type: ignore[misc]
            f"the base model's folder does not exist: {manifest.path.parent / 'bsae'}\n"
            f"  in {manifest.where('base', 'path')}\n"
            "  fix: give a folder relative to the manifest, or an absolute one"
        )


def test_a_hub_id_without_revision_is_not_built_from(write_release: WriteRelease) -> None:
    manifest = load_manifest(write_release(**{"base.path": None, "base.model": REPO}))
    for act in (base.preview_base, base.fetch_base):
        assert refusal(lambda act=act: act(manifest), ManifestError) == (  # type: ignore[misc]
            f"base.revision is missing, and {REPO} may change under its name\n"
            f"  in {manifest.where('base', 'model')}\n"
            f"  fix: run `doit pin:tiny`, or add `revision:` with a commit of https://huggingface.co/{REPO}/commits/main"
        )


def test_a_copy_of_the_config_is_enough_to_plan_by(write_release: WriteRelease, folder: Path) -> None:
    shutil.copy(folder / "config.json", folder.parent / "copy.json")
    changes = {"base.path": None, "base.model": REPO, "base.config": "copy.json"}
    config, headers = base.preview_base(load_manifest(write_release(**changes)))
    assert config == json.loads((folder / "config.json").read_text()) and headers is None


def test_a_missing_copy_of_the_config_is_named(write_release: WriteRelease) -> None:
    manifest = load_manifest(write_release(**{"base.path": None, "base.model": REPO, "base.config": "copy.json"}))
    assert refusal(lambda: base.preview_base(manifest)) == (
        f"no such file: {manifest.path.parent / 'copy.json'}\n"
        f"  in {manifest.where('base', 'config')}\n  fix: give a copy of config.json"
    )


# --- the Hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr(hub, "MAX_RETRIES", 0)
    with serve_fake_hub(tmp_path, monkeypatch) as running:
        yield running


@pytest.fixture
def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def pin(write_release: WriteRelease, revision: str) -> Manifest:
    return load_manifest(write_release(**{"base.path": None, "base.model": REPO, "base.revision": revision}))


def test_a_preview_over_the_hub_reads_headers_and_no_weights(
    fake: FakeHub, write_release: WriteRelease, manifest: Manifest, files: dict[str, bytes]
) -> None:
    pinned = pin(write_release, fake.add(REPO, files))
    assert base.preview_base(pinned) == base.preview_base(manifest)
    for name in (SHARD_1, SHARD_2):
        header = 8 + struct.unpack("<Q", files[name][:8])[0]
        assert fake.num_bytes_sent(name) == header
    assert fake.num_bytes_sent("tokenizer.json") == 0


def test_a_preview_of_a_single_weight_file_needs_no_index(fake: FakeHub, write_release: WriteRelease) -> None:
    weights = save({"b": torch.zeros(4096), "a": torch.zeros(1)})
    revision = fake.add(REPO, {"config.json": json.dumps(LLAMA).encode(), "model.safetensors": weights})
    config, headers = base.preview_base(pin(write_release, revision))
    assert config == {**LLAMA, "dtype": "float32"} and headers is not None
    assert {name: tensor.shape for name, tensor in headers.items()} == {"a": (1,), "b": (4096,)}
    assert fake.num_bytes_sent("model.safetensors") < 300


def test_fetching_takes_what_a_release_needs_and_nothing_else(
    fake: FakeHub, write_release: WriteRelease, files: dict[str, bytes]
) -> None:
    unwanted = {
        "README.md": b"#",
        "pytorch_model.bin": b"pickle",
        "consolidated.00.safetensors": files[SHARD_1],
        "original/params.json": b"{}",
        ".gitattributes": b"",
        "modeling.py": b"raise SystemExit",
    }
    folder = base.fetch_base(pin(write_release, fake.add(REPO, {**files, **unwanted})))
    assert base.list_base_files(folder) == tuple(sorted(files))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert [name for name in unwanted if fake.num_bytes_sent(name)] == []
    opened = base.open_checkpoint(folder, WHERE)
    assert {tensor.file for tensor in opened.tensors.values()} == {SHARD_1, SHARD_2}


def test_files_beside_the_fetched_ones_do_not_belong_to_the_base(folder: Path) -> None:
    before = base.list_base_files(folder)
    (folder / "consolidated.safetensors").write_bytes(b"")
    (folder / "README.md").write_text("")
    assert base.list_base_files(folder) == before == tuple(sorted(before))
    assert {SHARD_1, SHARD_2, INDEX, "config.json", "tokenizer.json", "LICENSE", "chat_template.jinja"} < set(before)


def test_a_repository_that_lacks_a_weight_file_is_refused_at_the_preview(
    fake: FakeHub, write_release: WriteRelease, files: dict[str, bytes]
) -> None:
    del files[SHARD_2]
    manifest = pin(write_release, fake.add(REPO, {**files, "pytorch_model.bin": b"pickle"}))
    for act in (base.preview_base, base.fetch_base):
        assert refusal(lambda act=act: act(manifest)) == (  # type: ignore[misc]
            f"{INDEX} names {SHARD_2}, which is missing\n"
            f"  in {manifest.where('base', 'model')}\n  fix: fetch the file again"
        )


def test_a_repository_with_pickles_alone_is_refused(fake: FakeHub, write_release: WriteRelease) -> None:
    files = {"config.json": json.dumps(LLAMA).encode(), "pytorch_model.bin": b"pickle"}
    manifest = pin(write_release, fake.add(REPO, files))
    for act in (base.preview_base, base.fetch_base):
        assert refusal(lambda act=act: act(manifest)) == (  # type: ignore[misc]
            "pytorch_model.bin is a pickle, which can run code when it is read\n"
            f"  in {manifest.where('base', 'model')}\n"
            "  fix: use a revision of the base model with safetensors weights"
        )
    assert fake.num_bytes_sent("pytorch_model.bin") == 0


def test_a_file_cut_on_the_hub_is_found_before_it_is_downloaded(
    fake: FakeHub, write_release: WriteRelease, files: dict[str, bytes]
) -> None:
    size = len(files[SHARD_2])
    files[SHARD_2] = files[SHARD_2][:-1]
    manifest = pin(write_release, fake.add(REPO, files))
    assert refusal(lambda: base.preview_base(manifest)) == (
        f"{SHARD_2} has {size - 1} bytes, but its header needs {size}\n"
        f"  in {manifest.where('base', 'model')}\n  fix: the file is truncated or damaged: fetch it again"
    )
    assert fake.num_bytes_sent(SHARD_2) < 10_000


def test_an_index_on_the_hub_must_agree_with_its_files(
    fake: FakeHub, write_release: WriteRelease, folder: Path, files: dict[str, bytes]
) -> None:
    change_index(folder, **{"lm_head.weight": SHARD_1})
    manifest = pin(write_release, fake.add(REPO, {**files, INDEX: (folder / INDEX).read_bytes()}))
    assert refusal(lambda: base.preview_base(manifest)) == (
        f"{INDEX} says lm_head.weight is in {SHARD_1}, but it is in {SHARD_2}\n"
        f"  in {manifest.where('base', 'model')}\n  fix: fetch the base model again"
    )


# --- digests ----------------------------------------------------------------------------------------------------------


def hash_again(folder: Path, known: dict[str, dict[str, Any]]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    read: list[str] = []
    return dict(base.hash_files(folder, known, lambda name, size: read.append(name))), read


def test_files_are_hashed_once_and_again_when_they_look_changed(folder: Path) -> None:
    first, read = hash_again(folder, {})
    assert tuple(read) == base.list_base_files(folder) == tuple(first)
    known = json.loads(json.dumps(first))
    assert hash_again(folder, known) == (first, [])

    os.utime(folder / "config.json", ns=(1, 1))  # a new mtime, the same bytes
    shutil.copy2(folder / "tokenizer.json", folder / "new")  # the same size and mtime, a new inode
    (folder / "new").replace(folder / "tokenizer.json")
    change_json(folder / "generation_config.json", a=1)
    second, read = hash_again(folder, known)
    assert read == ["config.json", "generation_config.json", "tokenizer.json"]
    changed = [name for name in first if first[name]["sha256"] != second[name]["sha256"]]
    assert changed == ["generation_config.json"]


def test_a_digest_is_what_the_file_hashes_to(folder: Path) -> None:
    import hashlib

    content = (folder / SHARD_1).read_bytes()
    hashed = hash_again(folder, {})[0][SHARD_1]
    assert (hashed["sha256"], hashed["num_bytes"]) == (hashlib.sha256(content).hexdigest(), len(content))
