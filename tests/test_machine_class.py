"""A class of machine tells processors apart as torch's libraries do."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from builder.machine_class import (
    choose_isa,
    describe_machine,
    list_limits,
    name_blas,
    name_onednn,
    name_vendor,
    read_cpuinfo,
)

X86 = "fpu sse4_1 avx avx2"
SKYLAKE = f"{X86} avx512f avx512dq avx512bw avx512vl"
ZEN5 = f"{SKYLAKE} avx512_vnni avx_vnni avx512_bf16"
SAPPHIRE = f"{ZEN5} avx512_fp16 amx_tile amx_int8 amx_bf16"
GRACE = {"Features": "fp asimd aes sve sve2 i8mm bf16", "CPU implementer": "0x41", "CPU part": "0xd4f"}
SAYS = {  # oneDNN's own words for its instruction sets, of its verbose mode
    "Intel AVX-512 with AVX512BW, AVX512VL, and AVX512DQ extensions": "AVX512_CORE",
    "Intel AVX-512 with Intel DL Boost": "AVX512_CORE_VNNI",
    "Intel AVX-512 with Intel DL Boost and bfloat16 support": "AVX512_CORE_BF16",
    "Intel AVX-512 with float16, Intel DL Boost and bfloat16 support": "AVX512_CORE_FP16",
    "Intel AVX-512 with float16, Intel DL Boost and bfloat16 support and Intel AMX with bfloat16 and 8-bit integer "
    "support": "AVX512_CORE_AMX",
}


@pytest.mark.parametrize(
    ("flags", "limit", "isa"),
    [
        (X86, "", "AVX2"),
        (f"{X86} avx_vnni", "", "AVX2_VNNI"),
        (SKYLAKE, "", "AVX512_CORE"),
        (ZEN5, "", "AVX512_CORE_BF16"),
        (SAPPHIRE, "", "AVX512_CORE_AMX"),
        (f"{SAPPHIRE} amx_fp16", "", "AVX512_CORE_AMX_FP16"),
        (SAPPHIRE, "AVX512_CORE_BF16", "AVX512_CORE_BF16"),
        (SAPPHIRE, "AVX512_CORE", "AVX512_CORE"),
        (ZEN5, "AVX512_CORE_AMX", "AVX512_CORE_BF16"),
        (ZEN5, "AVX2", "AVX2"),
        (ZEN5, "DEFAULT", "AVX512_CORE_BF16"),
        ("fpu", "", "none"),
    ],
)
def test_processors_differ_down_to_their_bf16_units_and_amx(flags: str, limit: str, isa: str) -> None:
    assert choose_isa(set(flags.split()), limit) == isa


@pytest.mark.skipif(platform.machine() != "x86_64", reason="oneDNN's words are those of x86")
@pytest.mark.parametrize("limit", ["", "AVX512_CORE", "avx512_core_vnni"])
def test_it_is_the_instruction_set_that_onednn_itself_says(limit: str) -> None:
    code = (
        "import torch; m = torch.ones(64, 64, dtype=torch.bfloat16); m @ m; import builder.machine_class as own; "
        "print('ours:' + own.describe_machine('cpu'))"
    )
    env = {**os.environ, "ONEDNN_VERBOSE": "1", "ONEDNN_MAX_CPU_ISA": limit}
    env["PYTHONPATH"] = str(Path(__file__).parents[1])
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    said = re.search(r"^onednn_verbose,.*,isa:(.+)$", out, flags=re.M)
    if said is None or said[1] not in SAYS:
        pytest.skip(
            "this processor has no instruction set that oneDNN multiplies bfloat16 with, or one of another name"
        )
    assert f", oneDNN {SAYS[said[1]]}, " in out


def test_a_class_names_the_vendor_the_instructions_of_each_library_and_the_blas() -> None:
    machine, aten, onednn, blas, *_ = describe_machine("cpu").split(", ")
    assert machine.split()[0] == platform.machine()
    assert aten == f"ATen {torch.backends.cpu.get_cpu_capability()}"
    assert onednn.startswith("oneDNN ") and blas == name_blas(torch.__config__.show())


def test_processors_of_two_vendors_are_two_classes() -> None:
    """MKL takes other code on AMD's, though the instructions are the same."""
    assert name_vendor({"vendor_id": "AuthenticAMD"}) == ["AMD"]
    assert name_vendor({"vendor_id": "GenuineIntel"}) == ["Intel"]
    assert name_vendor({"vendor_id": "HygonGenuine"}) == ["HygonGenuine"]
    assert name_vendor(GRACE) == ["Arm", "0xd4f"]
    assert name_vendor({}) == []


def test_units_of_arm_are_named() -> None:
    assert name_onednn(GRACE, {}) == "oneDNN asimd sve sve2 bf16 i8mm"
    assert name_onednn({"Features": "fp asimd"}, {"ONEDNN_MAX_CPU_ISA": "advsimd"}) == "oneDNN asimd ADVSIMD"


def test_variables_that_limit_a_library_are_part_of_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MKL_ENABLE_INSTRUCTIONS", "AVX2")
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    assert list_limits(["ATen AVX512", "oneDNN AVX2", "MKL 2024.2"]) == ["MKL_ENABLE_INSTRUCTIONS=AVX2"]
    assert list_limits(["ATen AVX512", "no oneDNN", "BLAS open"]) == ["OPENBLAS_CORETYPE=Haswell"]
    flags = {"flags": SAPPHIRE}
    assert name_onednn(flags, {"DNNL_MAX_CPU_ISA": "avx512_core"}) == "oneDNN AVX512_CORE"
    both = {"DNNL_MAX_CPU_ISA": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}
    assert name_onednn(flags, both) == "oneDNN AVX512_CORE", "the newer name wins, as for oneDNN"


def test_the_first_processor_is_read(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(
        "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu sse4_1\n\nprocessor\t: 1\nvendor_id : X\n"
    )
    assert read_cpuinfo(path) == {"processor": "0", "vendor_id": "GenuineIntel", "flags": "fpu sse4_1"}
    assert read_cpuinfo(tmp_path / "absent") == {}


def test_the_blas_is_named_with_its_version() -> None:
    mkl = "  - Intel(R) oneAPI Math Kernel Library Version 2024.2-Product Build 20240605\n BLAS_INFO=mkl, X=1"
    assert name_blas(mkl) == "MKL 2024.2"
    assert name_blas("  - Build settings: BLAS_INFO=open, BUILD_TYPE=Release") == "BLAS open"
    assert name_blas("") == "no BLAS"
