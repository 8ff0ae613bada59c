"""Options and variables that a version of vLLM does not have are told with what to write instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builder.errors import Problems
from builder.manifest import Serve, load_manifest
from builder.options import check_option, find_options, list_versions
from builder.serving import check_serve
from builder.stages.plan import warn_of_engine


def profile(**changes: Any) -> Serve:
    return Serve.model_validate({"version": "0.32", "model_path": "/m", **changes})


def test_the_published_profile_passes_but_for_its_two_variables() -> None:
    args = {
        "attention-backend": "flashinfer",
        "quantization": "compressed-tensors",
        "dtype": "auto",
        "kv-cache-dtype": "fp8",
        "max-model-len": "32768",
        "max-num-seqs": "4",
        "gpu-memory-utilization": "0.80",
        "trust-remote-code": True,
        "enable-chunked-prefill": True,
        "enable-prefix-caching": True,
    }
    env = {
        "VLLM_NVFP4_GEMM_BACKEND": "marlin",
        "VLLM_TEST_FORCE_FP8_MARLIN": "1",
        "VLLM_MARLIN_USE_ATOMIC_ADD": "1",
        "CUDA_VISIBLE_DEVICES": "0",
        "NCCL_DEBUG": "INFO",
    }
    with pytest.raises(Problems) as caught:
        check_serve(profile(args=args, env=env))
    assert str(caught.value) == (
        "vLLM 0.32.0 has no variable VLLM_NVFP4_GEMM_BACKEND\n  in serve.env.VLLM_NVFP4_GEMM_BACKEND\n"
        "  fix: remove it, and write linear-backend: marlin in serve.args\n"
        "vLLM 0.32.0 has no variable VLLM_TEST_FORCE_FP8_MARLIN\n  in serve.env.VLLM_TEST_FORCE_FP8_MARLIN\n"
        "  fix: remove it, and write linear-backend: marlin in serve.args"
    )
    check_serve(profile(args={**args, "linear-backend": "marlin"}, env={"VLLM_MARLIN_USE_ATOMIC_ADD": "1"}))


@pytest.mark.parametrize(
    ("name", "value", "what", "fix"),
    [
        ("max-model-length", "1", "vLLM 0.32.0 has no option max-model-length", "did you mean max-model-len"),
        ("xyzzy", "1", "vLLM 0.32.0 has no option xyzzy", "`vllm serve --help=all` shows all options"),
        ("max-num-seqs.x", "1", "vLLM 0.32.0 has no option max-num-seqs.x", "did you mean max-num-seqs"),
        ("enable-prefix-caching", "1", "enable-prefix-caching is a switch and takes no value", "write enable-prefix"),
        ("no-enable-prefix-caching", False, "no-enable-prefix-caching cannot be switched off", "leave it out"),
        ("max-num-seqs", True, "max-num-seqs is no switch", "write max-num-seqs: with a value"),
        ("max-num-seqs", ("1", "2"), "max-num-seqs takes one value, not a list", "write one value (JSON goes in"),
        ("max-num-seqs", "4.5", "max-num-seqs of vLLM 0.32.0 cannot be 4.5", "write a whole number"),
        ("max-num-seqs", "", "max-num-seqs of vLLM 0.32.0 cannot be an empty text", "write a whole number"),
        ("max-model-len", "32Q", "max-model-len of vLLM 0.32.0 cannot be 32Q", "write a whole number, one such as 32k"),
        ("gpu-memory-utilization", "80%", "gpu-memory-utilization of vLLM 0.32.0 cannot be 80%", "write a number"),
        ("kv-cache-dtype", "fp9", "kv-cache-dtype of vLLM 0.32.0 cannot be fp9", "write fp8? Valid: auto, bf"),
        ("linear-backend", "marlyn", "linear-backend of vLLM 0.32.0 cannot be marlyn", "write marlin? Valid: aiter"),
        ("attention-backend", "flashinfr", "attention-backend of vLLM 0.32.0 cannot be flashinfr", "write flashinfer?"),
        ("quantization", "exl9", "quantization of vLLM 0.32.0 cannot be exl9", "write one of awq, auto_awq"),
        ("hf-overrides", "{a}", "hf-overrides of vLLM 0.32.0 cannot be {a}", "write JSON in single quotes"),
        ("allowed-origins", "*", "allowed-origins of vLLM 0.32.0 cannot be *", "write JSON in single quotes"),
    ],
)
def test_an_option_that_the_version_refuses_is_refused_with_what_it_takes(
    name: str, value: Any, what: str, fix: str
) -> None:
    engine = find_options("0.32")
    assert engine is not None
    found = check_option(engine, name, value)
    assert found is not None and found[0] == what and found[1].startswith(fix)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max-model-len", "32k"),
        ("max-model-len", "auto"),
        ("max-model-len", "-1"),
        ("gpu-memory-utilization", ".9"),
        ("linear-backend", "FlashInfer-Cutlass"),
        ("attention-backend", "FLASHINFER"),
        ("async-scheduling", False),
        ("api-key", ("a", "b")),
        ("api-key", "a"),
        ("middleware", ("a", "b")),
        ("hf-token", True),
        ("hf-overrides", '{"rope_theta": 1e6}'),
        ("compilation-config", '{"max_cudagraph_capture_size": 16k}'),
        ("compilation-config.mode", "3"),
        ("quantization", "compressed-tensors"),
        ("chat-template", ""),
    ],
)
def test_what_the_version_takes_is_let_through(name: str, value: Any) -> None:
    engine = find_options("0.32")
    assert engine is not None and check_option(engine, name, value) is None


def test_a_variable_near_one_that_is_there_is_named_and_a_strange_value_becomes_auto() -> None:
    with pytest.raises(Problems) as caught:
        check_serve(profile(env={"VLLM_LOGING_LEVEL": "DEBUG", "VLLM_NVFP4_GEMM_BACKEND": "gone"}))
    fixes = [problem.fix for problem in caught.value.problems]
    assert fixes == ["did you mean VLLM_LOGGING_LEVEL?", "remove it, and write linear-backend: auto in serve.args"]


def test_a_version_is_found_by_its_minor_number_and_an_unknown_one_is_not_guessed_about() -> None:
    assert list_versions().keys() == {"0.32"}
    found = {version: find_options(version) for version in ("0.32", "0.32.0", "0.32.1", "0.3", "0.33", "1")}
    assert [version for version, engine in found.items() if engine] == ["0.32", "0.32.0", "0.32.1"]
    check_serve(profile(version="0.9", args={"anything": True}, env={"VLLM_ANYTHING": "1"}))


def test_a_version_without_a_list_is_told_before_anything_is_built(write_release: Callable[..., Path]) -> None:
    serve = {"version": "0.9", "model_path": "/m"}
    assert warn_of_engine(load_manifest(write_release(serve=serve))) == (
        "warning (serve): no list of vLLM 0.9 is here (0.32): its options are not checked",
    )
    assert warn_of_engine(load_manifest(write_release(serve={**serve, "version": "0.32.1"}))) == ()
