"""The class of machine that native arithmetic gives the same bits on: what torch's libraries choose their code by."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# What oneDNN calls an instruction set, and the flags of /proc/cpuinfo that it takes beyond those of the ones above;
# https://uxlfoundation.github.io/oneDNN/dev_guide_cpu_dispatcher_control.html
ONEDNN_ISAS = {
    "SSE41": {"sse4_1"},
    "AVX": {"avx"},
    "AVX2": {"avx2"},
    "AVX2_VNNI": {"avx_vnni"},
    "AVX2_VNNI_2": {"avx_vnni_int8", "avx_ne_convert"},
    "AVX512_CORE": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "AVX512_CORE_VNNI": {"avx512_vnni"},
    "AVX512_CORE_BF16": {"avx512_bf16"},
    "AVX512_CORE_FP16": {"avx512_fp16"},
    "AVX512_CORE_AMX": {"amx_tile", "amx_int8", "amx_bf16"},
    "AVX512_CORE_AMX_FP16": {"amx_fp16"},
}
WITHOUT_AVX512 = ("AVX2_VNNI", "AVX2_VNNI_2")  # a processor may have those after them and not these
ALIASES = {  # what AVX10 adds to these names is no flag of its own
    "AVX10_1_512": "AVX512_CORE_FP16",
    "AVX10_1_512_AMX": "AVX512_CORE_AMX",
    "AVX10_1_512_AMX_FP16": "AVX512_CORE_AMX_FP16",
}
ARM_UNITS = ("asimd", "sve", "sve2", "bf16", "i8mm", "sme")
LIMITS = {  # variables by which a library is told to choose otherwise than the processor says
    "MKL": ("MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR"),
    "BLAS open": ("OPENBLAS_CORETYPE",),
    "oneDNN": ("ONEDNN_DEFAULT_FPMATH_MODE",),
}
VENDORS = {"AuthenticAMD": "AMD", "GenuineIntel": "Intel", "0x41": "Arm", "0x4e": "NVIDIA", "0x61": "Apple"}


def describe_machine(device: str) -> str:
    """The class of this machine, or of a GPU of it, in words: where they are the same, native magnitudes should be.

    device: as torch names it. Returns for example "NVIDIA GB10, CUDA 13.0", or "x86_64 AMD, ATen AVX512,
    oneDNN AVX512_CORE_BF16, MKL 2024.2": vendor, what torch's own kernels use, what oneDNN uses, and the BLAS.
    """
    import torch

    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    info = read_cpuinfo()
    onednn = name_onednn(info, os.environ) if torch._C._has_mkldnn else "no oneDNN"
    libraries = [f"ATen {torch.backends.cpu.get_cpu_capability()}", onednn, name_blas(torch.__config__.show())]
    return ", ".join([" ".join([platform.machine(), *name_vendor(info)]), *libraries, *list_limits(libraries)])


def list_limits(libraries: Sequence[str]) -> list[str]:
    """NAME=VALUE of each variable that is set and makes one of these libraries choose otherwise."""
    limits = [LIMITS[start] for library in libraries for start in LIMITS if library.startswith(start)]
    return [f"{name}={os.environ[name]}" for names in limits for name in names if os.environ.get(name)]


def read_cpuinfo(path: Path = CPUINFO) -> dict[str, str]:
    """The first processor's entries in /proc/cpuinfo; empty where there is no such file."""
    if not path.exists():
        return {}
    first = path.read_text("utf-8", "replace").strip().split("\n\n")[0]
    entries = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in entries}


def name_vendor(info: Mapping[str, str]) -> list[str]:
    """Who made the processor, and of Arm's kind which core it is; empty if nothing says so."""
    vendor = info.get("vendor_id") or info.get("CPU implementer") or ""
    return [text for text in (VENDORS.get(vendor, vendor), info.get("CPU part")) if text]


def name_onednn(info: Mapping[str, str], environment: Mapping[str, str]) -> str:
    """What oneDNN chooses its code by: the instruction set on x86, the units on Arm; ONEDNN_MAX_CPU_ISA is obeyed."""
    limit = (environment.get("ONEDNN_MAX_CPU_ISA") or environment.get("DNNL_MAX_CPU_ISA") or "").upper()
    if "Features" in info:  # Arm
        features = info["Features"].split()
        return " ".join(["oneDNN", *(unit for unit in ARM_UNITS if unit in features), *([limit] if limit else [])])
    return f"oneDNN {choose_isa(set(info.get('flags', '').split()), ALIASES.get(limit, limit))}"


def choose_isa(flags: set[str], limit: str) -> str:
    """The highest of oneDNN's instruction sets that a processor has, up to a limit.

    limit: a name of one of them; anything else is none, as for oneDNN.
    """
    chosen = "none"
    for name, needed in ONEDNN_ISAS.items():
        if needed <= flags:
            chosen = name
        elif name not in WITHOUT_AVX512:
            break
        if name == limit:
            break
    return chosen


def name_blas(config: str) -> str:
    """The BLAS and its version out of what torch says of how it was built: MKL 2024.2, open, accelerate.

    config: torch.__config__.show().
    """
    if found := re.search(r"Math Kernel Library Version (\S+?)-", config):
        return f"MKL {found[1]}"
    info = re.search(r"BLAS_INFO=(\w+)", config)
    return f"BLAS {info[1]}" if info else "no BLAS"
