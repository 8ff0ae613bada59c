"""A finished artifact, read as a stranger would read it: what is wrong with it, and what was looked at.

Nothing here knows how the files were made. Headers, bits and scales are read anew with numpy; a sample of linears is
quantized again by the reference library, and where memory allows the whole model is loaded by transformers, each in a
process of its own. One tensor's band of rows is in memory at a time, so the model's size does not matter.

Shape legend: N outputs, K inputs of a linear; a block is 16 inputs; a byte holds two codes, the even column low.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np

from builder.errors import BaseError, VerifyError, nearest
from builder.files import CHUNK_BYTES, PUBLISHED_MODE, read_json, sha256_file
from builder.machine import available_memory, end_with_parent
from builder.readback import (
    EPSILON,
    FLOAT4,
    FLOAT8,
    ITEM_BYTES,
    LARGEST,
    NAN,
    ONE,
    REBUILD,
    ROUNDINGS,
    SMALLEST_NORMAL,
    USES_SIX,
    Entry,
    read_amax,
    read_base,
    read_floats,
    read_header,
    round_floats,
)

CHECKS = {
    "files": "the folder holds only regular files of mode 0644: no links, pickles, code, leftovers or stray weights",
    "digests": "every file has the recorded sha256, and there is no other file",
    "headers": "every weight file is whole: its header fits its size, without holes, overlaps or misaligned tensors",
    "index": "index and files name the same tensors in the same files, and the total size is right",
    "plan": "every tensor has the name, dtype, shape and file that were planned",
    "layout": "each quantized linear has exactly the tensors that the layout's loaders read, shaped after the base's",
    "bits": "quantized linears take the bits per weight that the scheme promises",
    "unquantized": "every other tensor equals the base's bit for bit, and none is lost",
    "block scales": "block scales are finite and positive, and the largest of each fused set is 448",
    "global scales": "each is the base's amax / 2688 (modelopt) or the inverse (compressed-tensors), to the last bit",
    "scales": "each row's or group's scale is its amax / the largest code, in its weight's dtype, to the last bit",
    "codes": "every block, row or group uses its largest code, so nothing was left unwritten",
    "dequantized": "rows read back from codes and scales are close to the base's",
    "fused": "linears that inference engines fuse share their global scales",
    "input scales": "all 1 if planned so; else plausible as maxima of activations, neither inverted nor injected",
    "kv cache": "each layer's two scales are its measured amax / 448, to the last bit, and config.json speaks of them",
    "config": "config.json says what the base's says, apart from quantization_config",
    "quantization config": "it describes this layout and leaves out exactly the linears that were not quantized",
    "copied files": "tokenizer, chat template, generation config: the base's, byte for byte, none forgotten",
    "reference": "a sample of linears, quantized again by the reference library, has the same bytes",
    "loading": "transformers loads it with no missing or unexpected keys, and a forward gives finite logits",
}

NVFP4 = ("nvfp4", "nvfp4a16")
ONLY_OF_NVFP4 = frozenset({"block scales", "global scales", "fused"})
Severity = Literal["error", "warning"]


def list_checks(*schemes: str, kv_cache: bool = False) -> tuple[str, ...]:
    """The names of the checks that any of the schemes has; kv_cache: and that scales of the KV cache have."""
    foreign = set() if kv_cache else {"kv cache"}
    if "nvfp4" not in schemes:
        foreign.add("input scales")
    if not set(NVFP4) & set(schemes):
        foreign |= ONLY_OF_NVFP4
    if not ROUNDINGS.keys() & set(schemes):
        foreign.add("scales")
    return tuple(name for name in CHECKS if name not in foreign)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong; prints as three lines."""

    check: str
    severity: Severity
    where: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.severity} ({self.check}): {self.what}\n  in {self.where}\n  fix: {self.fix}"


@dataclass(frozen=True)
class Report:
    """checks: how many things each check that the scheme has looked at; 0 means that it did not run."""

    findings: tuple[Finding, ...]
    checks: dict[str, int]
    loaded_whole: bool
    reference_sampled: tuple[str, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == "error")


def verify_artifact(
    artifact: Path, base: Path, expected: Mapping[str, Any], *, sample: int = 8, whole_model: bool | None = None
) -> Report:
    """Compare an artifact with its base model and with what was planned.

    expected: scheme, layout, input_scale, block_scale_floor, ignore; `tensors` {name: {dtype, shape,
    file}}; `quantized` module names; `fused` lists of module names that share a global scale; `unused` (may be absent)
    tensors of the base that the model has no place for. May be absent as well: `payload` {name: sha256} of every file;
    `beside` names of files that may lie around it; `input_amax` {linear: hex float} as calibration measured it;
    `cache_amax` {attention: {"key": hex float, "value": hex float}} likewise, if the KV cache is meant to have scales;
    `from_template`, whether the configs are meant to be those of an export template, and `copied_files`, the names of
    the base's files that are meant to be here if not all are: what is worse for that is a warning; and where there are
    several schemes, `parts`: a list of {scheme, input_scale, block_scale_floor, modules} instead.
    sample: how many fused sets the reference library quantizes again; 0 for none.
    whole_model: load it with transformers; None decides by the memory there is.
    Raises BaseError if the base cannot be read, VerifyError if the scheme is unknown here or a helper process dies.
    """
    reading = Reading(artifact, base, expected)
    schemes = {part["scheme"] for part in reading.parts}
    for scheme in schemes.difference(NVFP4, ROUNDINGS):
        raise VerifyError(f"no check knows the scheme {scheme}", "the plan", nearest(scheme, (*NVFP4, *ROUNDINGS)))
    check_files(reading)
    check_digests(reading)
    check_index(reading)
    check_plan(reading)
    check_layout(reading)
    sampled = [group for group in spread(reading.fused, sample) if reading.sound.issuperset(group)]
    loaded = fits_in_memory(reading) if whole_model is None else whole_model
    with ThreadPoolExecutor(1) as beside:  # the reference library is slow: it works while all else is checked
        reference = beside.submit(ask_reference, reading, sampled)
        check_unquantized(reading)
        for group in reading.fused:
            check_weights(reading, group)
        check_fused(reading)
        check_input_scales(reading)
        check_cache_scales(reading)
        check_config(reading)
        check_quantization_config(reading)
        check_copied_files(reading)
        if loaded:
            check_loading(reading)
        check_reference(reading, reference.result())
    names = tuple(module for group in sampled for module in group)
    return Report(
        tuple(reading.findings),
        {name: reading.counts[name] for name in list_checks(*schemes, kv_cache=bool(reading.cache_amax))},
        loaded,
        names,
    )


# ------------------------------------------------------------------------------------------------ the layouts

STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
INPUT_SCALE = {"compressed-tensors": "input_global_scale", "modelopt": "input_scale"}
GLOBAL_SCALE = {"compressed-tensors": "weight_global_scale", "modelopt": "weight_scale_2"}
CODES = {"compressed-tensors": "weight_packed", "modelopt": "weight"}
FULL_SCALE = np.float32(6 * 448)  # largest code times largest block scale

FUSED_BY_ENGINES = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)


def contract(scheme: str, layout: str, weight: Entry) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{suffix: (dtype, shape)} of what loaders of scheme and layout read for a linear, given the base's weight."""
    num_outputs, num_inputs = weight.shape
    if scheme in ROUNDINGS:
        return ROUNDINGS[scheme].contract(num_outputs, num_inputs, weight.dtype)
    scalar = (1,) if layout == "compressed-tensors" else ()
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        CODES[layout]: ("U8", (num_outputs, num_inputs // 2)),
        "weight_scale": ("F8_E4M3", (num_outputs, num_inputs // 16)),
        GLOBAL_SCALE[layout]: ("F32", scalar),
    }
    return tensors if scheme == "nvfp4a16" else {**tensors, INPUT_SCALE[layout]: ("F32", scalar)}


def promised_bits(scheme: str, dtype: str) -> tuple[float, tuple[str, ...]]:
    """Bits per weight, and the suffixes of what they are spent on: scales too, but those of whole rows or tensors.

    dtype: the weight's.
    """
    if scheme in ROUNDINGS:
        rounding = ROUNDINGS[scheme]
        shared = 8 * ITEM_BYTES[dtype] / rounding.group if rounding.group else 0
        return rounding.bits + shared, (rounding.codes, *(["weight_scale"] if shared else []))
    return 4.5, (*CODES.values(), "weight_scale")


@dataclass
class Reading:
    """What is read, what it is compared with, and what came of it so far."""

    artifact: Path
    base: Path
    expected: Mapping[str, Any]
    findings: list[Finding] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    entries: dict[str, Entry] = field(default_factory=dict)  # of the artifact
    sound: set[str] = field(default_factory=set)  # quantized linears whose tensors can be read as the layout says

    def __post_init__(self) -> None:
        self.layout: str = self.expected["layout"]
        self.cache_amax: Mapping[str, Mapping[str, str]] = self.expected.get("cache_amax", {})
        self.from_template = bool(self.expected.get("from_template"))
        self.source = read_base(self.base)
        self.quantized: list[str] = list(self.expected["quantized"])
        grouped = {module for group in self.expected["fused"] for module in group}
        self.fused: list[list[str]] = [list(group) for group in self.expected["fused"]]
        self.fused += [[module] for module in self.quantized if module not in grouped]
        whole = {**self.expected, "modules": self.quantized}
        self.parts: list[Mapping[str, Any]] = self.expected.get("parts") or [whole]
        self.part = {module: part for part in self.parts for module in part["modules"]}
        self.base_config = read_json(self.base / "config.json")
        if not isinstance(self.base_config, dict):
            raise BaseError("config.json is missing or not JSON", str(self.base), "fetch the base model again")
        self.dtype = self.find_dtype()

    def find_dtype(self) -> str:
        """What the model computes in: what the base's config.json says, or the dtype of most of its weights."""
        told = self.base_config.get("dtype") or self.base_config.get("torch_dtype")
        sizes = dict.fromkeys(STORED, 0)
        for entry in self.source.values():
            for name in (name for name, dtype in STORED.items() if dtype == entry.dtype):
                sizes[name] += entry.num_bytes // ITEM_BYTES[entry.dtype]
        return str(told or max(sizes, key=lambda name: sizes[name]))

    def add(self, check: str, where: str, what: str, fix: str = REBUILD, severity: Severity = "error") -> None:
        assert check in CHECKS
        self.findings.append(Finding(check, severity, where, what, fix))

    def scheme(self, module: str) -> str:
        found: str = self.part[module]["scheme"]
        return found

    def codes(self, module: str) -> Entry:
        return self.entries[f"{module}.{CODES[self.layout]}"]

    def global_scale(self, module: str) -> np.float32:
        return self.entries[f"{module}.{GLOBAL_SCALE[self.layout]}"].scalar()

    def input_scale(self, module: str) -> np.float32:
        return self.entries[f"{module}.{INPUT_SCALE[self.layout]}"].scalar()

    def implied_amax(self, scale: np.float32) -> float:
        """The largest magnitude that a global scale was made for."""
        return float(scale) * 2688 if self.layout == "modelopt" else 2688 / float(scale)

    def unquantized_linears(self) -> list[str]:
        """Linears of the base that stay as they are: matrices that are not embeddings, and lm_head even when tied."""
        matrices = {
            name.removesuffix(".weight")
            for name, entry in self.source.items()
            if name.endswith(".weight") and len(entry.shape) == 2 and not re.search(r"embed|\bwte\b|\bwpe\b", name)
        }
        unused = {name.removesuffix(".weight") for name in self.expected.get("unused", ())}
        return sorted((matrices | {"lm_head"}) - set(self.quantized) - unused)


# ------------------------------------------------------------------------------------------------ files and names

FORBIDDEN = {
    "a pickle or another framework's weights": "*.bin *.pt *.pth *.pkl *.pickle *.ckpt *.h5 *.msgpack *.npy *.npz",
    "program code": "*.py *.pyc *.so *.sh",
    "a leftover": "*.partial *.part *.tmp *.temp *.incomplete *.lock *.swp *.bak *~ .?*",
}


def check_files(reading: Reading) -> None:
    beside = reading.expected.get("beside", ())
    around = {Path(name).parts[0] for name in beside}
    for path in sorted(reading.artifact.rglob("*")):
        name = path.relative_to(reading.artifact).as_posix()
        if path.is_dir() and not path.is_symlink():
            if name not in around and (path.name.startswith(".") or path.name == "__pycache__"):
                reading.add("files", name, f"the folder {path.name} does not belong here", f"remove {name}")
            continue
        if name in beside:
            continue
        reading.counts["files"] += 1
        if path.is_symlink() or not path.is_file():
            reading.add("files", name, "not a regular file", "copy the file itself into the folder")
            continue
        if path.stat().st_mode & 0o777 != PUBLISHED_MODE:
            reading.add("files", name, f"mode {path.stat().st_mode & 0o777:04o}, not 0644", f"chmod 644 {name}")
        for kind, patterns in FORBIDDEN.items():
            if name != ".gitattributes" and any(fnmatchcase(path.name, pattern) for pattern in patterns.split()):
                reading.add("files", name, f"{path.name} is {kind}", f"remove {name}")
        with path.open("rb") as file:
            head = file.read(4)
        if head == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05" and len(head) > 1):
            reading.add("files", name, "its first bytes are those of a pickle or an archive", f"remove {name}")


def check_digests(reading: Reading) -> None:
    recorded = reading.expected.get("payload")
    if recorded is None:
        return
    found = {path.relative_to(reading.artifact).as_posix() for path in reading.artifact.rglob("*") if path.is_file()}
    for name in sorted(found - recorded.keys() - set(reading.expected.get("beside", ()))):
        reading.add("digests", name, f"{name} is no file of this release", f"remove {name}")
    for name, sha256 in sorted(recorded.items()):
        if name not in found:
            reading.add("digests", name, f"{name} is missing")
            continue
        reading.counts["digests"] += 1
        if sha256_file(reading.artifact / name) != sha256:
            fix = "remove build/NAME/artifact and build/NAME/parts, and build it again; see whether the disk is sound"
            reading.add("digests", name, f"{name} is not as it was written", fix)


def check_index(reading: Reading) -> None:
    """Also fills `reading.entries` from every weight file that can be read."""
    present = {path.name: path for path in sorted(reading.artifact.glob("*.safetensors")) if path.is_file()}
    index_path = reading.artifact / "model.safetensors.index.json"
    index = read_json(index_path)
    single = not index_path.exists() and set(present) == {"model.safetensors"}
    if not single and not (isinstance(index, dict) and isinstance(index.get("weight_map"), dict)):
        reading.add("index", index_path.name, "the index is missing or is not one")
    weight_map = index["weight_map"] if isinstance(index, dict) and isinstance(index.get("weight_map"), dict) else {}
    for name, path in present.items():
        try:
            entries = read_header(path)
        except VerifyError as error:
            reading.add("headers", error.where, error.what, error.fix)
            continue
        reading.counts["headers"] += 1
        for tensor in sorted(entries.keys() & reading.entries.keys()):
            reading.add("index", name, f"{tensor} is in {reading.entries[tensor].file.name} as well")
        reading.entries |= entries
        if not single and name not in weight_map.values():
            reading.add("files", name, "a weight file that the index does not name", f"remove {name}")
    if single:
        reading.counts["index"] = len(reading.entries)
        return
    for tensor, file in sorted(weight_map.items()):
        reading.counts["index"] += 1
        if not isinstance(file, str) or file not in present:
            reading.add("index", index_path.name, f"{tensor} is said to be in {file}, which is not here")
        elif tensor not in reading.entries or reading.entries[tensor].file.name != file:
            reading.add("index", file, f"{tensor} is not in the file the index names")
    for tensor in sorted(reading.entries.keys() - weight_map.keys()):
        reading.add("index", reading.entries[tensor].file.name, f"{tensor} is not in the index")
    metadata = index.get("metadata") if isinstance(index, dict) else None
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(entry.num_bytes for entry in reading.entries.values())
    if said != total:
        reading.add("index", index_path.name, f"total_size is {said}, the tensors have {total} bytes")


def check_plan(reading: Reading) -> None:
    planned = reading.expected["tensors"]
    for name, tensor in sorted(planned.items()):
        reading.counts["plan"] += 1
        if name not in reading.entries:
            reading.add("plan", tensor["file"], f"{name} is missing")
            continue
        entry = reading.entries[name]
        found, wanted = (
            (entry.dtype, list(entry.shape), entry.file.name),
            (tensor["dtype"], list(tensor["shape"]), tensor["file"]),
        )
        if found != wanted:
            reading.add("plan", entry.file.name, f"{name} is {describe(found)}, planned was {describe(wanted)}")
    for name in sorted(reading.entries.keys() - planned.keys()):
        reading.add("plan", reading.entries[name].file.name, f"{name} was not planned")


def describe(tensor: tuple[str, Sequence[int], str]) -> str:
    return f"{tensor[0]} {list(tensor[1])} in {tensor[2]}"


def check_layout(reading: Reading) -> None:
    """Also fills `reading.sound`, and counts the bits."""
    known = {*reading.source, *(name for name, _, _ in list_cache_scales(reading))}
    for module in reading.quantized:
        scheme = reading.scheme(module)
        block = ROUNDINGS[scheme].group or 1 if scheme in ROUNDINGS else 16
        weight = reading.source.get(f"{module}.weight")
        if weight is None or len(weight.shape) != 2 or weight.shape[1] % block:
            what = f"the base has no such matrix whose inputs divide by {block}"
            reading.add("layout", module, what, "correct the plan")
            continue
        known.discard(f"{module}.weight")
        promised, counted = promised_bits(scheme, weight.dtype)
        num_bytes, problems = 0, []
        for suffix, (dtype, shape) in contract(scheme, reading.layout, weight).items():
            known.add(f"{module}.{suffix}")
            reading.counts["layout"] += 1
            entry = reading.entries.get(f"{module}.{suffix}")
            if entry is None:
                problems.append(f"{suffix} is missing")
                continue
            num_bytes += entry.num_bytes if suffix in counted else 0
            if (entry.dtype, entry.shape) != (dtype, shape):
                problems.append(f"{suffix} is {entry.dtype} {list(entry.shape)}, not {dtype} {list(shape)}")
        for problem in problems:
            reading.add("layout", module, problem)
        if not problems:
            reading.sound.add(module)
        bits = 8 * num_bytes / (weight.shape[0] * weight.shape[1])
        reading.counts["bits"] += 1
        if bits != promised:
            reading.add("bits", module, f"{bits:.4g} bits per weight, the scheme promises {promised:g}")
    for name in sorted(reading.entries.keys() - known):
        reading.add("layout", reading.entries[name].file.name, f"{name} belongs neither to the base nor to the layout")


def check_unquantized(reading: Reading) -> None:
    replaced = {f"{module}.weight" for module in reading.quantized}
    tied = bool(reading.base_config.get("tie_word_embeddings"))
    for name, entry in sorted(reading.source.items()):
        if name in replaced:
            continue
        ours = reading.entries.get(name)
        if ours is None:
            dropped = name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")
            if name in reading.expected.get("unused", ()):
                reading.add("unquantized", name, "left out, as the model has no place for it", "none needed", "warning")
            elif not (dropped and name not in reading.expected["tensors"]):
                reading.add("unquantized", name, "the base has this tensor, the artifact has not")
            continue
        reading.counts["unquantized"] += 1
        if (ours.dtype, ours.shape) != (entry.dtype, entry.shape):
            reading.add(
                "unquantized",
                name,
                f"{ours.dtype} {list(ours.shape)}, in the base {entry.dtype} {list(entry.shape)}",
            )
        elif any(not np.array_equal(mine, theirs) for mine, theirs in zip(ours.chunks(), entry.chunks(), strict=True)):
            reading.add("unquantized", name, "its bytes differ from the base's")


# ------------------------------------------------------------------------------------------------ weights and scales

BAND_ROWS = 64  # rows of each linear that are read back
BAND_ELEMENTS = 1 << 20
MAX_RELATIVE_ERROR = 0.2  # about 0.1 for any real weight; the worst 16 values there are reach 0.19


def check_weights(reading: Reading, group: Sequence[str]) -> None:
    """Codes and scales of linears that share a global scale, if they have any, against the base's weights."""
    if not reading.sound.issuperset(group):
        return
    if reading.scheme(group[0]) in ROUNDINGS:
        for module in group:
            check_rounded(reading, module)
        return
    amax = max(read_amax(reading.source[f"{module}.weight"]) for module in group)
    multiplier = np.float32(amax) / FULL_SCALE
    with np.errstate(divide="ignore"):
        wanted = multiplier if reading.layout == "modelopt" else np.float32(1) / multiplier
    largest = 0
    for module in group:
        reading.counts["global scales"] += 1
        found = reading.global_scale(module)
        if found != wanted:
            inverted = bool(np.isclose(float(found) * float(wanted), 1, rtol=1e-3))
            reading.add(
                "global scales",
                f"{module}.{GLOBAL_SCALE[reading.layout]}",
                f"{found!s}, but the base's amax {amax:g} gives {wanted!s}"
                + (": it is the inverse" if inverted else ""),
            )
        largest = max(largest, check_blocks(reading, module))
        check_dequantized(reading, module)
    if largest != LARGEST:
        reading.add(
            "block scales",
            group[0],
            f"the largest of the set is {FLOAT8[largest]:g}, not 448: not made for its global scale",
        )


def check_rounded(reading: Reading, module: str) -> None:
    """Every scale of a linear, and every code: of full size where it must be, near the base's weight."""
    rounding = ROUNDINGS[reading.scheme(module)]
    weight = reading.source[f"{module}.weight"]
    codes, scales = (reading.entries[f"{module}.{suffix}"] for suffix in (rounding.codes, "weight_scale"))
    num_rows, num_columns = weight.shape
    step = max(1, BAND_ELEMENTS // num_columns)
    wrong = Counter[str]()
    for begin in range(0, num_rows, step):
        end = min(begin + step, num_rows)
        weights_NK = read_floats(weight.rows(begin, end), weight.dtype)
        scales_NG = read_floats(scales.rows(begin, end), weight.dtype)
        codes_NK = rounding.read_codes(codes.rows(begin, end))
        wrong["scales"] += int((scales_NG != rounding.make_scales(weights_NK, weight.dtype)).sum())
        wrong["codes"] += rounding.count_idle(codes_NK, weights_NK, weight.dtype)
        wrong["dequantized"] += rounding.count_far(codes_NK, scales_NG, weights_NK, weight.dtype)
    num_scales = scales.num_bytes // ITEM_BYTES[weight.dtype]
    looked_at = {"scales": num_scales, "codes": num_scales, "dequantized": num_rows}
    told = {
        "scales": f"{wrong['scales']} of {num_scales} are not what the base's weights give",
        "codes": f"{wrong['codes']} of {num_scales} rows or groups never use their largest code",
        "dequantized": f"{wrong['dequantized']} weights are farther from the base's than rounding brings them",
    }
    for check, number in looked_at.items():
        reading.counts[check] += number
        if wrong[check]:
            reading.add(check, f"{module}.weight_scale" if check == "scales" else module, told[check])
    if "weight_shape" in rounding.contract(num_rows, num_columns, weight.dtype):
        found = reading.entries[f"{module}.weight_shape"].read(0, 16).view(np.int64).tolist()
        if found != list(weight.shape):
            reading.add("layout", f"{module}.weight_shape", f"{found}, but the weight is {list(weight.shape)}")


def check_blocks(reading: Reading, module: str) -> int:
    """Every block scale and every code of a linear. Returns its largest scale as F8_E4M3 byte, at most 448.

    Rounding a scale to 4 bits moves it by 1/16 at most if it is not below 2^-6, so a block's largest weight lies
    above 6 / (1 + 1/16) > 5 and gets the code of 6. A block of zeros has the scale 1.
    """
    codes, scales = reading.codes(module), reading.entries[f"{module}.weight_scale"]
    num_rows = codes.shape[0]
    step = max(1, CHUNK_BYTES // max(1, codes.shape[1]))
    largest, bad, idle = 0, Counter[str](), 0
    for begin in range(0, num_rows, step):
        scales_NB = scales.rows(begin, min(begin + step, num_rows))
        codes_NH = codes.rows(begin, min(begin + step, num_rows))
        bad["NaN"] += int(((scales_NB & 0x7F) == NAN).sum())
        bad["negative"] += int((scales_NB > 0x7F).sum())
        bad["zero"] += int((scales_NB == 0).sum()) if reading.part[module]["block_scale_floor"] else 0
        used_NB = USES_SIX[codes_NH].view(np.uint64) != 0  # eight bytes to a block
        idle += int((~used_NB & (scales_NB >= SMALLEST_NORMAL) & (scales_NB != ONE)).sum())
        largest = max(largest, int(scales_NB.max()))
    reading.counts["block scales"] += scales.num_bytes
    reading.counts["codes"] += scales.num_bytes
    for kind, number in bad.items():
        if number:
            reading.add("block scales", f"{module}.weight_scale", f"{number} of {scales.num_bytes} are {kind}")
    if idle:
        reading.add(
            "codes", str(codes.file.name), f"{module}: {idle} of {scales.num_bytes} blocks never use their largest code"
        )
    return LARGEST if largest > LARGEST else largest


def check_dequantized(reading: Reading, module: str) -> None:
    """A band of rows, at a place that depends on the name, read back and compared with the base's."""
    weight, codes = reading.source[f"{module}.weight"], reading.codes(module)
    num_rows, num_columns = weight.shape
    place = int.from_bytes(hashlib.sha256(module.encode()).digest()[:4], "big")
    begin = place % max(1, num_rows - BAND_ROWS + 1)
    end = min(begin + BAND_ROWS, num_rows)
    codes_RH = codes.rows(begin, end)
    scales_RB = reading.entries[f"{module}.weight_scale"].rows(begin, end)
    values = np.stack([FLOAT4[codes_RH & 0xF], FLOAT4[codes_RH >> 4]], axis=-1).reshape(end - begin, -1, 16)
    scale = np.float32(reading.implied_amax(reading.global_scale(module)) / 2688)
    usable = scales_RB >= SMALLEST_NORMAL  # below, a block is too small beside its tensor to keep its digits
    values = values * (FLOAT8[scales_RB] * scale)[..., None]
    wanted = read_floats(weight.rows(begin, end), weight.dtype).reshape(end - begin, num_columns // 16, 16)
    difference = np.linalg.norm((values - wanted)[usable].astype(np.float64))
    size = np.linalg.norm(wanted[usable].astype(np.float64))
    reading.counts["dequantized"] += end - begin
    if not difference <= MAX_RELATIVE_ERROR * size:
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = difference / size
        reading.add("dequantized", module, f"rows {begin} to {end - 1} are off by {relative:.2g} of their size")


def check_fused(reading: Reading) -> None:
    siblings: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for module in reading.quantized:
        parent, _, name = module.rpartition(".")
        for names in FUSED_BY_ENGINES:
            if name in names:
                siblings[parent, *names].append(module)
    for group in {tuple(group): None for group in [*reading.fused, *siblings.values()] if len(group) > 1}:
        if not reading.sound.issuperset(group):
            continue
        schemes = {reading.scheme(module) for module in group}
        if len(schemes) > 1:
            what = f"engines run as one what is quantized in different ways: {', '.join(sorted(schemes))}"
            reading.add("fused", group[0].rpartition(".")[0], what, "give them one scheme")
        if len(schemes) > 1 or schemes & ROUNDINGS.keys():
            continue
        reading.counts["fused"] += 1
        read_scales = ((GLOBAL_SCALE, reading.global_scale), (INPUT_SCALE, reading.input_scale))
        for suffix, read in read_scales[: 2 if schemes == {"nvfp4"} else 1]:
            values = {module: read(module).tobytes() for module in group}
            if len(set(values.values())) > 1:
                listed = ", ".join(f"{module.rpartition('.')[2]} {read(module)!s}" for module in group)
                reading.add("fused", group[0].rpartition(".")[0], f"{suffix[reading.layout]} differs: {listed}")


HALF_MAX = 65504  # the largest number of float16, in which all these models can run: no activation lies above
DEAD_AMAX = 1e-6
NUM_MANY = 4  # so many linears do not share one measured value by chance


def check_input_scales(reading: Reading) -> None:
    """A multiplier read as a divisor gives 2688² / amax: above HALF_MAX for each amax below 110, and above 2688, where
    both readings agree, for the typical linear.
    """
    suffix = INPUT_SCALE[reading.layout]
    recalibrate = "calibrate again, and write the scales in the layout's own direction"
    modules = [module for module in reading.quantized if module in reading.sound and reading.scheme(module) == "nvfp4"]
    scales = {module: reading.input_scale(module) for module in modules}
    reading.counts["input scales"] = len(scales)
    usable = {}
    for module, scale in scales.items():
        where, unit = f"{module}.{suffix}", reading.part[module]["input_scale"] == "unit"
        if not (np.isfinite(scale) and scale > 0):
            reading.add("input scales", where, f"{scale!s} is no scale", recalibrate)
        elif unit and scale != 1:
            reading.add(
                "input scales", where, f"{scale!s}, but the plan says that all are 1.0", "plan input_scale: calibrated"
            )
        elif not unit and scale == 1:
            reading.add("input scales", where, "exactly 1.0: injected, not measured", recalibrate)
        elif not unit:
            usable[module] = scale
            amax = reading.implied_amax(scale)
            if not DEAD_AMAX < amax < HALF_MAX:
                reading.add("input scales", where, f"{scale!s} means activations up to {amax:.3g}", recalibrate)
    check_measured(reading, usable)
    if not usable:
        return
    middle = statistics.median(map(reading.implied_amax, usable.values()))
    if middle > 2688:
        reading.add(
            "input scales", f"*.{suffix}", f"half of all mean activations above {middle:.3g}: inverted", recalibrate
        )
    # Experts of one layer share a measured scale, so they count as one linear.
    places = {re.sub(r"\bexperts\.\d+\.", "experts.*.", module): scale for module, scale in usable.items()}
    value, number = Counter(places.values()).most_common(1)[0]
    if len(places) >= NUM_MANY and number > len(places) / 2:
        reading.add(
            "input scales",
            f"*.{suffix}",
            f"{number} of {len(places)} are {value!s}: injected, not measured",
            recalibrate,
        )


def check_measured(reading: Reading, scales: Mapping[str, np.float32]) -> None:
    """Input scales come from the amax that calibration recorded, the largest of each fused set, to the last bit."""
    measured = reading.expected.get("input_amax", {})
    for group in reading.fused:
        if not measured or not scales.keys() >= set(group):
            continue
        amax = np.float32(max(float.fromhex(measured[module]) for module in group if module in measured))
        wanted = amax / np.float32(2688)
        if reading.layout != "modelopt":
            wanted = np.float32(1) / wanted
        for module in group:
            if scales[module] != wanted:
                where = f"{module}.{INPUT_SCALE[reading.layout]}"
                reading.add("input scales", where, f"{scales[module]!s}, but {wanted!s} was measured")


CACHE_SCALES = {
    "compressed-tensors": {"key": "k_scale", "value": "v_scale"},
    "modelopt": {"key": "k_proj.k_scale", "value": "v_proj.v_scale"},
}


def list_cache_scales(reading: Reading) -> Iterator[tuple[str, str, str]]:
    """Name of each scale of the KV cache that there has to be, its attention, and of what it is."""
    for attention in reading.cache_amax:
        for kind, suffix in CACHE_SCALES[reading.layout].items():
            yield f"{attention}.{suffix}", attention, kind


def check_cache_scales(reading: Reading) -> None:
    """Each is a multiplier, as engines read it: the amax that calibration recorded / 448."""
    recalibrate = "calibrate again, and write the scales as multipliers"
    dtype, shape = ("F32", ()) if reading.layout == "modelopt" else (STORED[reading.dtype], (1,))
    found: dict[str, float] = {}
    for name, attention, kind in list_cache_scales(reading):
        reading.counts["kv cache"] += 1
        entry = reading.entries.get(name)
        if entry is None or (entry.dtype, entry.shape) != (dtype, shape):
            what = "missing" if entry is None else f"{entry.dtype} {list(entry.shape)}, not {dtype} {list(shape)}"
            reading.add("kv cache", name, f"the scale of {kind}s is {what}")
            continue
        scale = found[name] = float(read_floats(entry.read(0, entry.num_bytes), dtype)[0])
        amax = np.array([float.fromhex(reading.cache_amax[attention][kind])], np.float32)
        wanted = round_floats(amax / np.float32(448), dtype)[0] or EPSILON[dtype]
        if scale != float(wanted):
            inverted = ": it is the inverse" if np.isclose(scale * float(wanted), 1, rtol=1e-2) else ""
            reading.add("kv cache", name, f"{scale:g}, but {float(wanted):g} was measured{inverted}", recalibrate)
    if len(found) >= NUM_MANY and len(set(found.values())) == 1:
        what = f"all {len(found)} scales are {next(iter(found.values())):g}: injected, not measured"
        reading.add("kv cache", "*", what, recalibrate)


# ------------------------------------------------------------------------------------------------ configs, copied files

FLOAT4_BLOCKS = {"num_bits": 4, "type": "float", "group_size": 16}
TENSOR_GROUP = {**FLOAT4_BLOCKS, "strategy": "tensor_group", "symmetric": True}
QUANTIZATION_CONFIG: dict[str, dict[str, Any]] = {
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
    },
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_scheme": None},
}
# Loaders do not read `dynamic` here, and releases of both kinds are about.
MODELOPT_GROUP = {"targets": ["Linear"], "weights": FLOAT4_BLOCKS, "input_activations": FLOAT4_BLOCKS}


def by_token(kind: str) -> dict[str, Any]:
    return {"num_bits": 8, "type": kind, "strategy": "token", "symmetric": True, "dynamic": True}


def by_channel(kind: str) -> dict[str, Any]:
    return {"num_bits": 8, "type": kind, "strategy": "channel", "symmetric": True, "dynamic": False}


# In the layout compressed-tensors: the format, and how weights and inputs are quantized.
FORMATS: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "nvfp4": ("nvfp4-pack-quantized", {**TENSOR_GROUP, "dynamic": False}, {**TENSOR_GROUP, "dynamic": "local"}),
    "nvfp4a16": ("nvfp4-pack-quantized", {**TENSOR_GROUP, "dynamic": False}, None),
    "fp8_dynamic": ("float-quantized", by_channel("float"), by_token("float")),
    "w8a8": ("int-quantized", by_channel("int"), by_token("int")),
    "w4a16": (
        "pack-quantized",
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True, "dynamic": False},
        None,
    ),
}
CACHE_CONFIG = {
    "compressed-tensors": {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False},
    "modelopt": {"num_bits": 8, "type": "float", "dynamic": False},
}
MODELOPT_FILE = {"quantization": {"quant_algo": "NVFP4", "group_size": 16}}

COPIED = (
    *("tokenizer*", "*.tiktoken", "*.model", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("*.jinja", "chat_template*", "additional_chat_templates/*", "tekken.json", "*processor_config.json"),
    "generation_config.json",
)


LEAKED = ("use_cache",)  # what an export template has otherwise than its base, and nobody restores


def check_config(reading: Reading) -> None:
    config = read_json(reading.artifact / "config.json")
    if not isinstance(config, dict):
        reading.add("config", "config.json", "missing or not JSON")
        return
    ours, theirs = plain_config(config), {"dtype": reading.dtype, **plain_config(reading.base_config)}
    reading.counts["config"] = len(ours.keys() | theirs.keys())
    for key in sorted(ours.keys() | theirs.keys()):
        if key not in ours or key not in theirs or ours[key] != theirs[key]:
            found, wanted = (json.dumps(side[key]) if key in side else "absent" for side in (ours, theirs))
            known = reading.from_template and (key in LEAKED or "absent" in (found, wanted))
            severity: Severity = "warning" if known else "error"
            fix = "remove compatibility.export_template" if known else "add the fix restore-config"
            reading.add("config", f"config.json: {key}", f"{found}, in the base {wanted}", fix, severity)


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without what may differ; `torch_dtype` under its newer name."""
    renamed = {"dtype" if key == "torch_dtype" else key: value for key, value in config.items()}
    return {key: value for key, value in renamed.items() if key not in ("quantization_config", "transformers_version")}


def check_quantization_config(reading: Reading) -> None:
    check, where = "quantization config", "config.json: quantization_config"
    config = read_json(reading.artifact / "config.json")
    ours = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(ours, dict):
        reading.add(check, where, "missing")
        return
    groups = ours.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    cache = {"kv_cache_scheme": CACHE_CONFIG[reading.layout]} if reading.cache_amax else {}
    wrong = [*differences(QUANTIZATION_CONFIG[reading.layout] | cache, ours)]
    if len(groups) != len(reading.parts):
        wrong.append(f"there are {len(groups)} config_groups, not {len(reading.parts)}")
    formats = set()
    for part in reading.parts:
        form, weights, inputs = FORMATS[part["scheme"]]
        formats.add(form)
        targets = ["Linear"] if len(reading.parts) == 1 else sorted(part["modules"])
        wanted = {"targets": targets, "weights": weights, "input_activations": inputs}
        alike = [group for group in groups if isinstance(group, dict) and group.get("targets") == targets]
        group = (alike or groups or [None])[0]
        wrong += differences(MODELOPT_GROUP if reading.layout == "modelopt" else wanted, group, "config_groups.*")
        if reading.layout != "modelopt" and isinstance(group, dict) and group.get("format", form) != form:
            wrong.append(f"config_groups.*.format is {group['format']!r}, not {form!r}")
    check_ignore(reading, ours.get("ignore"), where)
    if reading.layout == "modelopt":
        beside = read_json(reading.artifact / "hf_quant_config.json")
        wrong += differences(MODELOPT_FILE, beside, "hf_quant_config.json")
        told = {"quantization": {"kv_cache_quant_algo": "FP8" if reading.cache_amax else None}}
        wrong += differences(told, beside, "hf_quant_config.json")
        quantization = beside.get("quantization") if isinstance(beside, dict) else None
        excluded = quantization.get("exclude_modules") if isinstance(quantization, dict) else None
        severity: Severity = "warning" if reading.from_template else "error"
        check_ignore(reading, excluded, "hf_quant_config.json: exclude_modules", severity)
    else:
        wrong += differences({"format": formats.pop() if len(formats) == 1 else "mixed-precision"}, ours)
    for sentence in wrong:
        reading.add(check, where, sentence)


def differences(wanted: Mapping[str, Any], found: Any, path: str = "") -> Iterator[str]:
    """Sentences on each key of `wanted` that `found` gives otherwise; a None may also be absent."""
    if not isinstance(found, dict):
        yield f"{path or 'it'} is {json.dumps(found)}, not a mapping"
        return
    for key, value in wanted.items():
        here = f"{path}.{key}" if path else key
        if isinstance(value, dict):
            yield from differences(value, found.get(key), here)
        elif found.get(key) != value or type(found.get(key)) is not type(value):
            yield f"{here} is {json.dumps(found.get(key))}, not {json.dumps(value)}"


def check_ignore(reading: Reading, ignore: Any, where: str, unlisted: Severity = "error") -> None:
    """unlisted: how grave it is that a linear which was not quantized is not listed."""
    patterns = ignore if isinstance(ignore, list) else []
    required = {*reading.unquantized_linears(), *reading.expected["ignore"]}
    reading.counts["quantization config"] += len(required) + len(reading.quantized)
    for module in sorted(required):
        if not any(matches(module, pattern, reading.layout) for pattern in patterns):
            what = f"{module} is not quantized, but not listed"
            reading.add("quantization config", where, what, f"list {module} there", unlisted)
    for module in reading.quantized:
        for pattern in patterns:
            if matches(module, pattern, reading.layout):
                reading.add("quantization config", where, f"{module} is quantized, but {pattern} leaves it out")


def matches(module: str, pattern: str, layout: str) -> bool:
    """As engines do: a regular expression after `re:` (compressed-tensors), wildcards (modelopt), or the name."""
    if layout == "compressed-tensors" and pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), module) is not None
    return module == pattern or (layout == "modelopt" and fnmatchcase(module, pattern))


def check_copied_files(reading: Reading) -> None:
    for name in sorted(copied_names(reading.base) | copied_names(reading.artifact)):
        reading.counts["copied files"] += 1
        ours, theirs = reading.artifact / name, reading.base / name
        switch = find_switch(reading, name)
        severity: Severity = "warning" if switch else "error"
        copy = f"remove compatibility.{switch}" if switch else "copy it from the base"
        if not ours.is_file():
            reading.add("copied files", name, "the base has this file, the artifact has not", copy, severity)
        elif not theirs.is_file():
            reading.add("copied files", name, "the base has no such file", f"remove {name}", severity)
        elif ours.read_bytes() != theirs.read_bytes():
            reading.add("copied files", name, "its bytes differ from the base's", copy, severity)


def find_switch(reading: Reading, name: str) -> str | None:
    """The switch of the manifest that has a file not be the base's."""
    if reading.from_template and name == "generation_config.json":
        return "export_template"
    copied = reading.expected.get("copied_files")
    return "copied_files" if copied is not None and name not in copied else None


def copied_names(folder: Path) -> set[str]:
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {
        name
        for name in names
        if not name.endswith((".py", ".safetensors"))
        and ("/" not in name or name.startswith("additional_chat_templates/"))
        and any(fnmatchcase(name, pattern) for pattern in COPIED)
    }


# ------------------------------------------------------------------------------------------------ other readers

MODEL_WORKSPACE_BYTES = 2 << 30
MAX_AMAX_RATIO = (
    1000  # between calibration's rows and a few arbitrary tokens; an inverted scale is off by (2688 / amax)²
)


def spread(groups: Sequence[list[str]], number: int) -> list[list[str]]:
    """`number` groups or fewer, each kind (name without its numbers) in turn, from the first layers to the last."""
    kinds: dict[str, list[list[str]]] = defaultdict(list)
    for group in groups:
        kinds[re.sub(r"\d+", "*", group[0])].append(group)
    members = list(kinds.values())
    chosen: dict[str, list[str]] = {}
    for turn in range(min(number, len(groups))):
        kind = members[turn % len(members)]
        group = kind[round(turn * (len(kind) - 1) / max(1, number - 1))]
        chosen[group[0]] = group
    return list(chosen.values())


def ask_reference(reading: Reading, groups: Sequence[Sequence[str]]) -> dict[str, str]:
    """{tensor name: sha256} as the reference library makes them from the base's weights."""
    if not groups:
        return {}
    described = [
        {
            "scheme": reading.scheme(group[0]),
            "block_scale_floor": reading.part[group[0]]["block_scale_floor"],
            "files": {module: str(reading.source[f"{module}.weight"].file) for module in group},
        }
        for group in groups
    ]
    return answer("builder.schemes.reference", {"layout": reading.layout, "groups": described})


def check_reference(reading: Reading, digests: Mapping[str, str]) -> None:
    for name, digest in sorted(digests.items()):
        reading.counts["reference"] += 1
        if reading.entries[name].sha256() != digest:
            reading.add("reference", name, "the reference library gives other bytes for the base's weight")


def fits_in_memory(reading: Reading) -> bool:
    """Whether transformers can hold it, and reads it rightly: it loads experts without an error, with wrong logits."""
    if any(".experts." in module for module in reading.quantized):
        return False
    available = available_memory()
    base_bytes = sum(entry.num_bytes for entry in reading.source.values())
    return available is not None and base_bytes * 3 // 2 + MODEL_WORKSPACE_BYTES < available


def check_loading(reading: Reading) -> None:
    job = {
        "artifact": str(reading.artifact),
        "layout": reading.layout,
        "quantized": reading.quantized,
        "cached": bool(reading.cache_amax),
        "ignore": reading.unquantized_linears(),
        # what compressed-tensors 0.20 makes of NVFP4 codes, whatever the model's own dtype
        "dtype": "bfloat16" if any(part["scheme"] in NVFP4 for part in reading.parts) else "auto",
    }
    told = answer("builder.verify", job)
    reading.counts["loading"] = len(told.get("observed", {}))
    if "error" in told:
        reading.add("loading", reading.artifact.name, f"transformers cannot load it: {told['error']}")
        return
    for kind in ("missing", "unexpected", "mismatched"):
        for name in told[kind]:
            reading.add("loading", name, f"transformers reports a key that is {kind}")
    if not told["finite"]:
        reading.add("loading", reading.artifact.name, "the logits of a short forward are not finite")
    for module, observed in told["observed"].items():
        if reading.part[module]["input_scale"] != "calibrated":
            continue
        scale = reading.input_scale(module) if module in reading.sound else np.float32(0)
        if not (observed > 0 and scale > 0 and np.isfinite(scale)):
            continue
        ratio = reading.implied_amax(scale) / observed
        if not 1 / MAX_AMAX_RATIO < ratio < MAX_AMAX_RATIO:
            reading.add(
                "input scales",
                f"{module}.{INPUT_SCALE[reading.layout]}",
                f"{scale!s} means activations up to {reading.implied_amax(scale):.3g}; a forward shows {observed:.3g}",
                "calibrate again, and write the scales in the layout's own direction",
            )


def answer(program: str, job: Mapping[str, Any]) -> dict[str, Any]:
    """Run a program of ours that reads a job as JSON and answers in JSON. Raises VerifyError if it does not."""
    paths = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", program],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise VerifyError(
            f"{program} ended with {done.returncode}: {last}", "verify", "see that memory and packages suffice"
        )
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def load_whole(job: Mapping[str, Any]) -> dict[str, Any]:
    """Load an artifact with transformers and compressed-tensors; which keys do not fit, what a short forward shows.

    Where the KV cache has scales, keys and values are rounded with them.
    The modelopt layout, which transformers refuses, is renamed in memory first.
    """
    import torch
    import transformers

    artifact = job["artifact"]
    auto = transformers.AutoModelForCausalLM
    options: dict[str, Any] = {"output_loading_info": True, "dtype": job["dtype"]}
    try:
        if job["layout"] == "modelopt":
            config = transformers.AutoConfig.from_pretrained(artifact)
            config.quantization_config = as_compressed_tensors(job["ignore"], cached=job["cached"])
            renamed = read_renamed(Path(artifact))
            model_class = getattr(transformers, config.architectures[0])
            model, info = model_class.from_pretrained(None, config=config, state_dict=renamed, **options)
        else:
            model, info = auto.from_pretrained(artifact, **options)
        observed: dict[str, float] = {}

        def observe(name: str) -> Any:
            def hook(_module: Any, inputs: tuple[Any, ...]) -> None:
                observed[name] = float(inputs[0].abs().amax())

            return hook

        for name, module in model.named_modules():
            if name in job["quantized"]:
                module.register_forward_pre_hook(observe(name))
        ids = torch.arange(16)[None] % model.get_input_embeddings().num_embeddings
        with torch.inference_mode():
            finite = bool(model(ids).logits.isfinite().all())
    except Exception as error:  # whatever stops a stranger from loading it is what we came to find
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "mismatched": sorted(str(key) for key in info["mismatched_keys"]),
        "finite": finite,
        "observed": observed,
    }


def read_renamed(artifact: Path) -> dict[str, Any]:
    """A modelopt artifact's tensors under the names, and in the directions, of compressed-tensors."""
    from safetensors.torch import load_file

    loaded = {
        name: tensor for path in sorted(artifact.glob("*.safetensors")) for name, tensor in load_file(path).items()
    }
    renamed = {}
    for name, tensor in loaded.items():
        module, _, suffix = name.rpartition(".")
        if suffix == "weight_scale_2":
            renamed[f"{module}.weight_global_scale"] = (1 / tensor).reshape(1)
        elif suffix == "input_scale":
            renamed[f"{module}.input_global_scale"] = (1 / tensor).reshape(1)
        elif name.endswith(tuple(CACHE_SCALES["modelopt"].values())):
            renamed[f"{module.rpartition('.')[0]}.{suffix}"] = tensor.reshape(1)
        elif suffix == "weight" and f"{module}.weight_scale" in loaded:
            renamed[f"{module}.weight_packed"] = tensor
        else:
            renamed[name] = tensor
    return renamed


def as_compressed_tensors(ignore: Iterable[str], *, cached: bool) -> dict[str, Any]:
    form, weights, inputs = FORMATS["nvfp4"]
    group = {"format": form, "targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        **QUANTIZATION_CONFIG["compressed-tensors"],
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
        "kv_cache_scheme": CACHE_CONFIG["compressed-tensors"] if cached else None,
    }


def main() -> None:
    """Load one artifact: see `load_whole`. Reads the job from standard input, answers on standard output."""
    end_with_parent()
    job = json.load(sys.stdin)
    with redirect_stdout(sys.stderr):
        told = load_whole(job)
    json.dump(told, sys.stdout)


if __name__ == "__main__":
    main()
