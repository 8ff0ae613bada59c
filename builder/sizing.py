"""What a release will take: bytes and time to build it, memory and bandwidth to serve it. All computed, none measured.

Serving is bound by memory: a token is read from all weights but the embeddings, of which it takes one row, and from
the keys and values of the tokens before it. Only tensor parallelism adds bandwidth to a single stream.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from builder.errors import ManifestError, nearest, raise_all
from builder.manifest import Serve
from builder.plan import Plan

HARDWARE = Path(__file__).parent / "data" / "hardware.json"
MEMORY_SHARE = 0.92  # of the memory, that vLLM 0.32 takes where --gpu-memory-utilization does not say
KV_BYTES = {"auto": 2, "bfloat16": 2, "float16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
STRETCHED = ("llama3", "longrope", "su")  # RoPE whose factor is in max_position_embeddings already, for every vLLM


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device, as its maker's data sheet has it; data/hardware.json names the sources.

    memory_bytes: decimal gigabytes, or what is known to be usable. bandwidth, link: bytes a second, a link's both ways
    together; None where the data sheet does not say.
    """

    title: str
    memory_bytes: int
    bandwidth: int
    link: int | None
    source: str


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast a machine builds. source: what was measured.

    quantize: bytes of the base a second, digests and writing included. calibrate: parameters times tokens a second.
    """

    quantize: float
    calibrate: float | None
    source: str


# tests/benchmarks/results/build.json: the 16 GB base beside the 3 GB one; 16 rows of 256 tokens through the latter
REFERENCE = Rates(quantize=0.83e9, calibrate=2.2e11, source="2 cores of an AMD EPYC without a GPU")


@cache
def list_hardware() -> dict[str, Hardware]:
    return {name: Hardware(**numbers) for name, numbers in json.loads(HARDWARE.read_text("utf-8")).items()}


def size_build(plan: Plan, *, joined_bytes: int, rows: tuple[int, int], held_out: bool, rates: Rates) -> dict[str, Any]:
    """Bytes that a build reads and writes, and about how long calibrating and quantizing take on one machine.

    joined_bytes: of files that are put together from parts. rows: calibration rows, and the most tokens of one.
    """
    base, made = plan.base_num_bytes, plan.num_bytes
    num_rows, longest = rows if plan.measures_inputs else (0, 0)
    read = {
        "fetch": base,
        "calibrate": base * min(len(plan.shards), num_rows),
        "quantize": base,
        "assemble": joined_bytes,
        "verify": made,
        "perplexity": (base + made) * held_out,
    }
    work = plan.architecture.num_parameters * num_rows * longest
    return {
        "read": read,
        "written": made + joined_bytes,
        "calibrate_s": work / rates.calibrate if rates.calibrate else None,
        "quantize_s": base / rates.quantize,
        "rates": rates.source,
    }


def weight_bytes_read(plan: Plan) -> int:
    """Bytes of weights that one token is computed from: all but the embeddings, unless they are lm_head too."""
    total = sum(tensor.num_bytes for tensor in plan.tensors.values())
    return total if plan.architecture.tied else total - sum(t.num_bytes for t in plan.architecture.first_edge)


def kv_bytes_per_token(facts: Mapping[str, Any], num_layers: int, kv_dtype: str) -> int | None:
    """Keys and values of one token in all layers, as if none of them had a window; None for a dtype not known here."""
    width = KV_BYTES.get(kv_dtype)
    if width is None or not {"num_key_value_heads", "head_dim"} <= facts.keys():
        return None
    return int(2 * num_layers * facts["num_key_value_heads"] * facts["head_dim"] * width)


def tokens_per_s(hardware: Hardware, num_devices: int, read_bytes: float) -> float:
    """No stream gets more: each token reads these bytes once, over the devices' bandwidths together."""
    return num_devices * hardware.bandwidth / read_bytes


def read_amount(text: str) -> int | None:
    """A count as vLLM reads it: 32768, 32k (of thousands), 32K (of 1024); None for what leaves it to vLLM."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([kmgtKMGT]?)", text)
    return int(float(match[1]) * SUFFIXES[match[2]]) if match else None


def read_positive(args: Mapping[str, str], name: str, default: float, where: Callable[..., str]) -> float:
    """An option's number; the default where it is not given. Raises ManifestError unless it is above 0."""
    if name not in args:
        return default
    if re.fullmatch(r"[0-9]*\.?[0-9]+", args[name]) and float(args[name]) > 0:
        return float(args[name])
    what = f"{name} must be a number above 0, not {args[name]}"
    raise ManifestError(what, where("serve", "args", name), "write a number, or leave it out")


def longest_context(config: Mapping[str, Any], positions: int) -> int:
    """The most tokens vLLM takes for a sequence: the model's positions, and what its RoPE config adds to them."""
    text = config.get("text_config") or config
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    entries = [rope, *(entry for entry in rope.values() if isinstance(entry, Mapping))]
    factors = [
        entry.get("factor") or 1 for entry in entries if entry.get("rope_type", entry.get("type")) not in STRETCHED
    ]
    return max(int(positions * max([1, *factors])), text.get("model_max_length") or 0)


def check_context(serve: Serve, config: Mapping[str, Any], positions: int | None, where: Callable[..., str]) -> None:
    """Refuse a context that vLLM would not start with. Raises ManifestError.

    Not judged: a config that the profile changes, and a profile that insists (VLLM_ALLOW_LONG_MAX_MODEL_LEN).
    """
    asked = read_amount(str(serve.args.get("max-model-len", "auto")))
    insists = serve.env.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "0") != "0"
    if (
        not (asked and positions)
        or insists
        or any(name.startswith(("hf-overrides", "hf-config-path")) for name in serve.args)
    ):
        return
    if asked > (most := longest_context(config, positions)):
        what = f"{asked} tokens of context, but the model was made for {most}, and vLLM would not start"
        raise ManifestError(what, where("serve", "args", "max-model-len"), f"set it to {most} or less, or leave it out")


def check_heads(serve: Serve, num_heads: int | None, where: Callable[..., str]) -> None:
    """Refuse devices that vLLM could not share the attention heads among. Raises ManifestError."""
    asked = read_amount(str(serve.args.get("tensor-parallel-size", "1")))
    if asked and num_heads and num_heads % asked:
        what = f"{num_heads} attention heads are not shared evenly by {asked} devices, and vLLM would not start"
        fits = ", ".join(str(count) for count in range(1, min(num_heads, 16) + 1) if num_heads % count == 0)
        raise ManifestError(what, where("serve", "args", "tensor-parallel-size"), f"use one of {fits}")


def find_hardware(serve: Serve, where: Callable[..., str]) -> Hardware | None:
    """The hardware that a profile is sized for. Raises ManifestError for a name there is none of."""
    if serve.hardware is None:
        return None
    known = list_hardware()
    if serve.hardware not in known:
        what = f"unknown hardware: {serve.hardware}"
        raise ManifestError(what, where("serve", "hardware"), nearest(serve.hardware, known))
    return known[serve.hardware]


def size_serving(plan: Plan, serve: Serve, where: Callable[..., str]) -> dict[str, Any] | None:
    """What serving takes and can give, JSON-able; None for a profile that names no hardware.

    The pool is what weights leave of the memory that vLLM may take; what activations and graphs need goes off it.
    Raises ManifestError, or Problems, where vLLM would not start: weights that do not fit, or no room for one sequence.
    """
    hardware = find_hardware(serve, where)
    if hardware is None:
        return None
    args = {name: value for name, value in serve.args.items() if isinstance(value, str)}
    tensor_parallel = int(read_positive(args, "tensor-parallel-size", 1, where))
    num_devices = tensor_parallel * int(read_positive(args, "pipeline-parallel-size", 1, where))
    share = read_positive(args, "gpu-memory-utilization", MEMORY_SHARE, where)
    facts, num_layers = plan.architecture.facts, len(plan.architecture.layers)
    budget = int(share * hardware.memory_bytes) * num_devices
    pool = budget - plan.num_bytes
    kv_dtype = args.get("kv-cache-dtype", "auto")
    if kv_dtype == "auto" and plan.measures_cache:  # vLLM takes a cache with scales for one of 8 bits
        kv_dtype = "fp8"
    kv_bytes = kv_bytes_per_token(facts, num_layers, kv_dtype)
    if kv_bytes:  # what there are fewer heads of than devices, several devices hold
        kv_bytes = kv_bytes * max(facts["num_key_value_heads"], tensor_parallel) // facts["num_key_value_heads"]
    context = read_amount(args.get("max-model-len", "auto")) or facts.get("max_position_embeddings")
    tokens = pool // kv_bytes if kv_bytes else None
    problems = []
    if pool <= 0:
        devices = math.ceil(plan.num_bytes / (share * hardware.memory_bytes) + 0.1)
        what = f"{plan.num_bytes / 1e9:.1f} GB of weights, but {share:.2f} of {describe(hardware, num_devices)}"
        what += f" are {budget / 1e9:.1f} GB"
        fix = f"set tensor-parallel-size to {devices} or more in serve.args, or name larger hardware"
        problems.append(ManifestError(what, where("serve", "hardware"), fix))
    elif tokens is not None and context and tokens < context:
        what = f"{context} tokens of context, but beside the weights there is room for {tokens}"
        fix = f"set max-model-len to {tokens // 1024 * 1024 or tokens} or less, or tensor-parallel-size to more"
        problems.append(ManifestError(what, where("serve", "args", "max-model-len"), fix))
    raise_all(problems)
    counts = sorted({1, 2, tensor_parallel})
    read = weight_bytes_read(plan)
    return {
        "name": describe(hardware, num_devices),
        "hardware": asdict(hardware),
        "num_devices": num_devices,
        "share": share,
        "budget_bytes": budget,
        "weight_bytes": plan.num_bytes,
        "read_bytes": read,
        "pool_bytes": pool,
        "kv_bytes_per_token": kv_bytes,
        "pool_tokens": tokens,
        "context": context,
        "num_sequences": tokens // context if tokens is not None and context else None,
        "wanted_sequences": int(read_positive(args, "max-num-seqs", 0, where)),
        "speeds": [
            {
                "num_devices": count,
                "tensor_parallel": count > 1,
                "fits": count * share * hardware.memory_bytes > plan.num_bytes + (kv_bytes or 0) * (context or 0),
                "at_start": tokens_per_s(hardware, count, read),
                "at_context": tokens_per_s(hardware, count, read + kv_bytes * context)
                if kv_bytes and context
                else None,
            }
            for count in counts
        ],
    }


def describe(hardware: Hardware, num_devices: int) -> str:
    return hardware.title if num_devices == 1 else f"{num_devices} x {hardware.title}"


def warn_of_serving(size: Mapping[str, Any] | None) -> tuple[str, ...]:
    """That not all sequences the profile allows have room at their full length."""
    if size is None or not size["num_sequences"] or not size["wanted_sequences"]:
        return ()
    if size["num_sequences"] >= size["wanted_sequences"]:
        return ()
    return (
        f"warning (serve): {size['wanted_sequences']} sequences of {size['context']} tokens are allowed, and "
        f"{size['num_sequences']} have room: vLLM would interrupt the others",
    )
