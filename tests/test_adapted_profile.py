"""A serve profile is changed for the machine that checks it as little as possible, and every change is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from builder.engine import Engine
from builder.errors import BuildError
from builder.manifest import Serve
from builder.stages.check_serving import adapt_profile

CPU = Engine(python=Path("python"), version="0.32.0", platform="cpu", devices=())
GPUS = Engine(python=Path("python"), version="0.32.0", platform="cuda", devices=("H200", "H200"))
PROFILE = Serve(
    version="0.32",
    model_path="/models/x",
    port=9007,
    host="0.0.0.0",
    args={
        "attention-backend": "flashinfer",
        "kv-cache-dtype": "fp8",
        "max-model-len": "32768",
        "enable-prefix-caching": True,
    },
    env={"VLLM_MARLIN_USE_ATOMIC_ADD": "1"},
)


def test_on_gpus_only_folder_and_address_change() -> None:
    profile, adapted = adapt_profile(PROFILE, GPUS, Path("/build/artifact"), 131072)
    assert adapted == []
    assert profile.args == PROFILE.args and profile.env == PROFILE.env
    assert (profile.model_path, profile.host) == ("/build/artifact", "127.0.0.1")
    assert profile.port != PROFILE.port


def test_on_a_cpu_options_of_gpus_go_and_the_context_fits() -> None:
    profile, adapted = adapt_profile(PROFILE, CPU, Path("/build/artifact"), 131072)
    assert profile.args == {
        "kv-cache-dtype": "fp8",
        "max-model-len": "4096",
        "enable-prefix-caching": True,
        "enforce-eager": True,
    }
    assert adapted == [
        "without attention-backend, for GPUs alone",
        "max-model-len 4096 instead of 32768, which fits a check on a CPU",
        "enforce-eager, for nothing is compiled for a check",
    ]


def test_a_context_that_fits_stays_and_is_never_longer_than_the_models() -> None:
    short = PROFILE.model_copy(update={"args": {"max-model-len": "300"}})
    assert adapt_profile(short, CPU, Path("/a"), 512)[0].args["max-model-len"] == "300"
    assert adapt_profile(PROFILE, CPU, Path("/a"), 512)[0].args["max-model-len"] == "512"
    open_end, adapted = adapt_profile(PROFILE.model_copy(update={"args": {}}), CPU, Path("/a"), 512)
    assert open_end.args["max-model-len"] == "512"
    assert adapted[0] == "max-model-len 512, which fits a check on a CPU"
    auto = PROFILE.model_copy(update={"args": {"max-model-len": "auto"}})
    assert adapt_profile(auto, CPU, Path("/a"), 512)[0].args["max-model-len"] == "512"


def test_without_a_profile_vllms_defaults_are_served_and_that_is_told() -> None:
    profile, adapted = adapt_profile(None, GPUS, Path("/a"), 512)
    assert profile.args == {}
    assert adapted == ["vLLM's defaults, for the manifest has no serve profile"]


def test_more_gpus_than_there_are_are_refused() -> None:
    wide = PROFILE.model_copy(update={"args": {"tensor-parallel-size": "2", "pipeline-parallel-size": "2"}})
    with pytest.raises(BuildError, match="the serve profile asks for 4 GPUs, and vLLM sees 2 here"):
        adapt_profile(wide, GPUS, Path("/a"), 512)
