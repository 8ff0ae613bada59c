"""The pinned base model: found, fetched, verified; its headers, and one tensor at a time."""

from __future__ import annotations

import json
import math
import os
import socket
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from builder import hub
from builder.digests import DIGESTER, identify_file
from builder.errors import BaseError, ManifestError
from builder.files import read_exactly, read_receipt, write_receipt
from builder.floats import FLOATS, NAMES
from builder.licenses import is_legal
from builder.manifest import Manifest

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

# in the order in which the safetensors library lays tensors out
DTYPE_BYTES = {"I64": 8, "F64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2}
DTYPE_BYTES |= {"F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1}

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt", "*.md")
TEMPLATES = "additional_chat_templates"  # the one folder inside a model folder that tokenizers read
MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own bound
READ_AHEAD_BYTES = 512 << 20


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """What a safetensors header says of one tensor; dtype in the format's words (BF16, F8_E4M3, U8, ...)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class Stored(Tensor):
    """A tensor in a file: its bytes are [start, end) of `file`."""

    file: str
    start: int
    end: int


def parse_header(header: bytes, file: str, first_byte: int, where: str) -> tuple[Stored, ...]:
    """Read a safetensors header's JSON; tensors come in the order of their bytes, which leave no hole.

    first_byte: the offset in the file at which tensor data starts.
    Raises BaseError if it is not a safetensors header.
    """
    try:
        entries = json.loads(header)
        tensors = [
            Stored(
                name=name,
                dtype=str(entry["dtype"]),
                shape=tuple(entry["shape"]),
                file=file,
                start=first_byte + entry["data_offsets"][0],
                end=first_byte + entry["data_offsets"][1],
            )
            for name, entry in entries.items()
            if name != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise BaseError(f"{file} has no readable safetensors header: {error}", where, "fetch the file again") from error
    for tensor in tensors:
        if not all(type(number) is int and number >= 0 for number in (*tensor.shape, tensor.start, tensor.end)):
            raise BaseError(f"{tensor.name} in {file} has no proper shape and place", where, "fetch the file again")
        if tensor.dtype not in DTYPE_BYTES:
            raise BaseError(f"{tensor.name} in {file} has the unknown dtype {tensor.dtype}", where, "use another base")
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    expected = first_byte
    for tensor in tensors:
        if tensor.start != expected or tensor.end - tensor.start != tensor.num_bytes:
            raise BaseError(f"{tensor.name} in {file} does not lie where it must", where, "fetch the file again")
        expected = tensor.end
    return tuple(tensors)


def check_length(tensors: Sequence[Stored], file: str, first_byte: int, num_bytes: int, where: str) -> None:
    """Refuse a file that does not end where its header says; first_byte: the offset at which tensor data starts."""
    needed = tensors[-1].end if tensors else first_byte
    if num_bytes != needed:
        raise BaseError(
            f"{file} has {num_bytes} bytes, but its header needs {needed}",
            where,
            "the file is truncated or damaged: fetch it again",
        )


def read_header(path: Path) -> tuple[Stored, ...]:
    """The tensors of a safetensors file, in the order of their bytes. Raises BaseError if it is cut short or torn."""
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 0 < header_bytes <= min(MAX_HEADER_BYTES, num_bytes - 8):
            raise BaseError(
                f"{path.name} is not a whole safetensors file ({num_bytes} bytes)", str(path.parent), "fetch it again"
            )
        tensors = parse_header(file.read(header_bytes), path.name, 8 + header_bytes, str(path.parent))
    check_length(tensors, path.name, 8 + header_bytes, num_bytes, str(path.parent))
    return tensors


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors files with its config: the base model, or a finished artifact."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Stored]

    def load(self, name: str) -> torch.Tensor:
        """One tensor, mapped from its file: its pages are read when they are used. Not to be written to.

        They count as this process's memory until the tensor is let go.
        """
        from safetensors import safe_open

        with safe_open(self.folder / self.tensors[name].file, framework="pt") as file:
            loaded: torch.Tensor = file.get_tensor(name)
        return loaded

    def load_array(self, name: str) -> NDArray[Any]:
        """A weight, mapped as by `load`, without torch: float16 or float32, or the bits of a bfloat16 as uint16."""
        import numpy as np

        stored = self.tensors[name]
        path, dtype = self.folder / stored.file, FLOATS[stored.dtype].array
        return np.asarray(np.memmap(path, dtype, "c", stored.start, stored.shape))

    def read_chunks(self, name: str) -> Iterator[bytes]:
        """A tensor's bytes as they are stored, in chunks."""
        stored = self.tensors[name]
        with (self.folder / stored.file).open("rb", buffering=0) as file:
            file.seek(stored.start)
            yield from read_exactly(file, stored.end - stored.start, self.folder / stored.file)

    def read_ahead(self, names: Iterable[str], most_bytes: int = READ_AHEAD_BYTES) -> None:
        """Ask the system to have the bytes of these tensors in memory soon, the first `most_bytes` of them."""
        if not hasattr(os, "posix_fadvise"):
            return
        for name in names:
            stored = self.tensors[name]
            num_bytes = min(stored.end - stored.start, most_bytes)
            most_bytes -= num_bytes
            with (self.folder / stored.file).open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), stored.start, num_bytes, os.POSIX_FADV_WILLNEED)
            if not most_bytes:
                return


def read_config(folder: Path, where: str) -> dict[str, Any]:
    """config.json of a model that transformers can build without code of its own."""
    path = folder / "config.json"
    if not path.is_file():
        raise BaseError(f"no config.json in {folder}", where, "point it at a folder that holds a Hugging Face model")
    return check_config(path.read_bytes(), path, where)


def check_config(text: str | bytes, path: Path | str, where: str) -> dict[str, Any]:
    """Parse a config.json; refuse what could only be built with trust_remote_code, or is quantized already."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BaseError(f"{path} is not JSON: {error}", where, "fetch it again") from error
    match config:
        case {"architectures": [str(), *_], "model_type": str()}:
            pass
        case _:
            raise BaseError(
                f"{path} names no architecture", where, "use the config.json the base model was published with"
            )
    if config.get("auto_map"):
        raise BaseError(
            "the base model brings Python code of its own (auto_map in config.json), which is never run here",
            where,
            "use a base model that transformers knows by itself",
        )
    if config.get("quantization_config"):
        raise BaseError("the base model is quantized already", where, "use the model it was quantized from")
    return dict(config)


def open_checkpoint(folder: Path, where: str) -> Checkpoint:
    """Read the headers of a model folder. Nothing outside the folder is opened; a pickle is never read."""
    config, tensors = read_config(folder, where), read_tensors(folder, where)
    return Checkpoint(folder, name_dtype(config, tensors, where), tensors)


def find_dtype(config: Mapping[str, Any]) -> Any:
    """What a config.json says that the model computes in, under either of its names; None if it says nothing."""
    return config.get("dtype") or config.get("torch_dtype")


def name_dtype(config: dict[str, Any], tensors: Mapping[str, Tensor] | None, where: str) -> dict[str, Any]:
    """A config that names a `dtype`: its own, or else that of most of the weights.

    tensors: the model's, by name; None where they cannot be had. Raises BaseError if neither tells.
    """
    if find_dtype(config):
        return config
    counts = {kind.name: 0 for kind in FLOATS.values()}
    for tensor in (tensors or {}).values():
        if tensor.dtype in FLOATS:
            counts[FLOATS[tensor.dtype].name] += tensor.num_elements
    most = max(counts, key=lambda name: counts[name])
    if not counts[most]:
        raise BaseError(
            "config.json names no dtype, and there are no weights at hand that tell it",
            where,
            f'add "dtype" to config.json: {NAMES}',
        )
    return {**config, "dtype": most}


def read_tensors(folder: Path, where: str) -> dict[str, Stored]:
    """All tensors of a folder by name, sorted; the index must agree with the files it names."""
    weight_map = read_index(folder, where)
    names = {path.name for path in folder.iterdir() if path.is_file()}
    files = find_weights(weight_map, names, where)
    stored = [tensor for file in files for tensor in read_header(folder / file)]
    return gather_tensors(stored, weight_map, str(folder))


def read_index(folder: Path, where: str) -> dict[str, str] | None:
    """The weight map of a model folder; None if it has no index, as a model in a single file."""
    path = folder / INDEX
    return read_weight_map(path.read_bytes(), path, where) if path.is_file() else None


def find_weights(weight_map: Mapping[str, str] | None, names: Collection[str], where: str) -> list[str]:
    """The weight files, sorted, out of a folder's or repository's files. Raises BaseError if one is not among them."""
    files = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE]
    missing = [file for file in files if file not in names]
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if missing and pickles and not any(name.endswith(".safetensors") for name in names):
        raise BaseError(
            f"{pickles[0]} is a pickle, which can run code when it is read",
            where,
            "use a revision of the base model with safetensors weights",
        )
    if missing and weight_map is None:
        raise BaseError(f"the base model has no {SINGLE} and no {INDEX}", where, "use a base model with its weights")
    if missing:
        raise BaseError(f"{INDEX} names {missing[0]}, which is missing", where, "fetch the file again")
    return files


def read_weight_map(text: str | bytes, path: Path | str, where: str) -> dict[str, str]:
    """The index's tensor -> file map; every file must be a plain safetensors name inside the folder."""
    try:
        weight_map = json.loads(text)["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BaseError(f"{path} is not a weight index: {error!r}", where, "fetch it again") from error
    for name in names:
        if not isinstance(name, str) or PurePosixPath(name).name != name or "\\" in name or name in (".", ".."):
            raise BaseError(f"{path} names a file outside the folder: {name}", where, "do not use this base model")
        if not name.endswith(".safetensors"):
            raise BaseError(f"{path} names {name}, which is not safetensors", where, "use safetensors weights")
    return dict(weight_map)


def gather_tensors(stored: Iterable[Stored], weight_map: Mapping[str, str] | None, where: str) -> dict[str, Stored]:
    """The files' tensors by name, sorted. Raises BaseError unless each is in one file, the one that the index names."""
    tensors: dict[str, Stored] = {}
    for tensor in stored:
        if tensor.name in tensors:
            both = f"{tensors[tensor.name].file} and {tensor.file}"
            raise BaseError(f"{tensor.name} is in two files, {both}", where, "fetch the base model again")
        tensors[tensor.name] = tensor
    if weight_map is not None:
        compare_index(weight_map, tensors, where)
    return dict(sorted(tensors.items()))


def compare_index(weight_map: Mapping[str, str], stored: Mapping[str, Stored], where: str) -> None:
    """Refuse an index that names a tensor its file does not hold, or misses one it does."""
    for name in sorted(weight_map.keys() | stored.keys()):
        named = f"in {weight_map[name]}" if name in weight_map else "nowhere"
        found = f"in {stored[name].file}" if name in stored else "nowhere"
        if named != found:
            raise BaseError(f"{INDEX} says {name} is {named}, but it is {found}", where, "fetch the base model again")


def locate_base(manifest: Manifest) -> Path | None:
    """The base's folder where the manifest names one by `path`; None for a Hub id."""
    base = manifest.release.base
    if base.path is None:
        return None
    folder = manifest.resolve(base.path)
    if not folder.is_dir():
        raise BaseError(
            f"the base model's folder does not exist: {folder}",
            manifest.where("base", "path"),
            "give a folder relative to the manifest, or an absolute one",
        )
    return folder


def preview_base(manifest: Manifest) -> tuple[dict[str, Any], dict[str, Stored] | None]:
    """The config, and the headers where they can be had, before anything large is read or downloaded.

    Headers are None when all that is at hand is the manifest's own copy of config.json (`base.config`).
    """
    folder, base = locate_base(manifest), manifest.release.base
    where = manifest.where("base", "path" if folder else "model")
    if folder is not None:
        checkpoint = open_checkpoint(folder, where)
        return dict(checkpoint.config), dict(checkpoint.tensors)
    if base.config is not None:
        path = manifest.resolve(base.config)
        if not path.is_file():
            raise BaseError(f"no such file: {path}", manifest.where("base", "config"), "give a copy of config.json")
        return name_dtype(check_config(path.read_bytes(), path, where), None, where), None
    model, revision = require_revision(manifest)
    sizes = {file.name: file.num_bytes for file in hub.list_files(model, revision, where=where)}
    snapshot = hub.download_files(model, revision, ["config.json", *({INDEX} & sizes.keys())], where=where)
    config, weight_map = read_config(snapshot, where), read_index(snapshot, where)
    files = find_weights(weight_map, sizes.keys(), where)
    stored: list[Stored] = []
    for file, header in hub.read_headers(model, revision, files, where=where).items():
        tensors = parse_header(header, file, 8 + len(header), where)
        check_length(tensors, file, 8 + len(header), sizes[file], where)
        stored += tensors
    gathered = gather_tensors(stored, weight_map, where)
    return name_dtype(config, gathered, where), gathered


def require_revision(manifest: Manifest) -> tuple[str, str]:
    """The Hub id and its pinned revision; a base that is not pinned is not built from."""
    base = manifest.release.base
    assert base.model is not None
    if base.revision is None:
        raise ManifestError(
            f"base.revision is missing, and {base.model} may change under its name",
            manifest.where("base", "model"),
            f"run `doit pin:{manifest.name}`, or add `revision:` with a commit of "
            f"https://huggingface.co/{base.model}/commits/main",
        )
    return base.model, base.revision


def fetch_base(manifest: Manifest) -> Path:
    """The folder with the base's files; downloaded, resumably, when the manifest names a Hub repository."""
    folder = locate_base(manifest)
    if folder is not None:
        return folder
    model, revision = require_revision(manifest)
    where = manifest.where("base", "model")
    names = {file.name for file in hub.list_files(model, revision, where=where)}
    companions = sorted(name for name in names if is_companion(name))
    snapshot = hub.download_files(model, revision, companions, where=where)
    weights = find_weights(read_index(snapshot, where), names, where)
    return hub.download_files(model, revision, [*companions, *weights], where=where)


def preview_legal_files(manifest: Manifest) -> dict[str, Path]:
    """The base's licences, notices and use policies by name, before anything large is downloaded."""
    folder = locate_base(manifest)
    if folder is not None:
        return find_legal_files(folder)
    model, revision = require_revision(manifest)
    where = manifest.where("base", "model")
    names = [file.name for file in hub.list_files(model, revision, where=where) if is_legal(file.name)]
    snapshot = hub.download_files(model, revision, names, where=where)
    return {name: snapshot / name for name in names}


def find_legal_files(folder: Path) -> dict[str, Path]:
    """The licences, notices and use policies of a base, by name."""
    return {name: folder / name for name in list_base_files(folder) if is_legal(name)}


def is_companion(name: str) -> bool:
    """Whether a release needs a file besides the weights: configs, index, tokenizer, template, licences."""
    path = PurePosixPath(name)
    if path.parts[0] == TEMPLATES and len(path.parts) == 2:
        return path.suffix == ".jinja"
    if len(path.parts) != 1 or name.startswith(".") or name == "README.md":
        return False
    return is_legal(name) or any(path.match(pattern) for pattern in COMPANIONS)


def list_base_files(folder: Path) -> tuple[str, ...]:
    """The base's files that a release reads, sorted; weights that the index does not name are none of them."""
    weight_map = read_index(folder, str(folder))
    weights = {SINGLE} if weight_map is None else set(weight_map.values())
    paths = [*folder.iterdir(), *folder.glob(f"{TEMPLATES}/*")]
    names = {path.relative_to(folder).as_posix() for path in paths if path.is_file()}
    for name in names:
        if not name.isprintable():
            raise BaseError(f"a file's name is not text: {name!a}", str(folder), "rename it or remove it")
    return tuple(sorted(name for name in names if name in weights or is_companion(name)))


def find_difference(folder: Path, sizes: Mapping[str, int]) -> str | None:
    """How a base model's folder differs from the one that was fetched; None if it does not, as far as sizes tell."""
    for name, num_bytes in sizes.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found is None:
            return f"{name} is missing"
        if found != num_bytes:
            return f"{name} has {found} bytes, but had {num_bytes} when it was fetched"
    return None


def find_snapshot(model: str, revision: str, sizes: Mapping[str, int]) -> Path:
    """This machine's own copy of a Hub base at its commit, as it is in the Hub's cache, or else fetched."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(model, "config.json", revision=revision)
    if isinstance(config, str) and find_difference(Path(config).parent, sizes) is None:
        return Path(config).parent
    return hub.download_files(model, revision, sorted(sizes), where=f"{model} at {revision}")


def check_digests(folder: Path, digests: Mapping[str, str], notes: Path) -> None:
    """Raise BaseError if a file of the base is not the one that was fetched.

    digests: sha256 by name. notes: a file that keeps what was found, so that unchanged files are read once.
    """
    known = read_receipt(notes) or {}
    found = dict(hash_files(folder, known))
    if found != known:
        write_receipt(notes, found)
    for name, sha256 in digests.items():
        if name not in found or found[name]["sha256"] != sha256:
            ours = found[name]["sha256"][:12] if name in found else "absent"
            raise BaseError(
                f"{name} is not the one that was fetched (sha256 {ours}, fetched {sha256[:12]})",
                f"{folder} on {socket.gethostname()}",
                "copy the base model to that place there again",
            )


def begin_hashing(folder: Path, known: Mapping[str, Mapping[str, Any]]) -> None:
    """Have the digests that `hash_files` will ask for taken in the background."""
    names = (name for name in list_base_files(folder) if not is_known(folder / name, known.get(name)))
    DIGESTER.begin(folder / name for name in names)


def is_known(path: Path, before: Mapping[str, Any] | None) -> bool:
    """Whether a file is the one whose digest was taken before."""
    return before is not None and before["identity"] == identify_file(path)


def hash_files(
    folder: Path, known: Mapping[str, Mapping[str, Any]], report: Callable[[str, int], None] = lambda name, size: None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, {sha256, num_bytes, identity}) of each base file, several of them read at once.

    known: what an earlier call said; a file whose identity is the same is not read again.
    """
    begin_hashing(folder, known)
    for name in list_base_files(folder):
        identity = identify_file(folder / name)
        before = known.get(name)
        if before and before["identity"] == identity:
            yield name, dict(before)
            continue
        report(name, identity[0])
        yield name, {"sha256": DIGESTER.sha256(folder / name), "num_bytes": identity[0], "identity": identity}
