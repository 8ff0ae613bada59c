"""What the manifest says reaches the server, through a shell, YAML and llama-swap's splitter of words."""

from __future__ import annotations

import argparse
import shlex
import unicodedata
from typing import Any

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from builder.errors import BuildError, ManifestError, Problems
from builder.files import sha256_file
from builder.manifest import LlamaSwap, Serve
from builder.serving import (
    LLAMA_SWAP_SCHEMA,
    check_llama_swap,
    command_lines,
    environment,
    health_check_timeout_s,
    llama_swap_entry,
    llama_swap_yaml,
    serve_command,
)

NAME = "DeepSeek-R1-Distill-Llama-70B-NVFP4"


def profile(**changes: Any) -> Serve:
    return Serve.model_validate({"version": "0.32", "model_path": f"/models/{NAME}", **changes})


def spark() -> Serve:
    return profile(
        python="/opt/vllm/bin/python3",
        port=9007,
        args={
            "attention-backend": "flashinfer",
            "kv-cache-dtype": "fp8",
            "max-model-len": "32768",
            "gpu-memory-utilization": "0.80",
            "enable-prefix-caching": True,
        },
        env={"VLLM_MARLIN_USE_ATOMIC_ADD": "1"},
    )


def entry(serve: Serve, llama_swap: LlamaSwap | None = None, **changes: Any) -> dict[str, Any]:
    return llama_swap_entry(
        serve, llama_swap or LlamaSwap(), **{"served_name": NAME, "num_bytes": 43_000_000_000, **changes}
    )


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_command_has_the_model_first_then_the_manifests_options_and_the_address_last() -> None:
    assert shlex.join(serve_command(spark(), served_name=NAME)) == (
        f"/opt/vllm/bin/vllm serve /models/{NAME} --served-model-name {NAME} --attention-backend flashinfer "
        "--kv-cache-dtype fp8 --max-model-len 32768 --gpu-memory-utilization 0.80 --enable-prefix-caching "
        "--host 127.0.0.1 --port 9007"
    )


def test_nothing_is_added_to_a_profile_without_options() -> None:
    words = serve_command(profile(model_path="m"), served_name="n")
    assert " ".join(words) == "vllm serve m --served-model-name n --host 127.0.0.1 --port 8000"


def test_switches_lists_and_values_with_hyphens_are_spelled_as_argparse_reads_them() -> None:
    args = {"enforce-eager": True, "async-scheduling": False, "api-key": ("a", "b c"), "max-model-len": "-1"}
    parser = argparse.ArgumentParser()
    parser.add_argument("--enforce-eager", "--async-scheduling", action=argparse.BooleanOptionalAction)
    parser.add_argument("--api-key", nargs="+")
    parser.add_argument("--max-model-len", type=int)
    words = serve_command(profile(args=args), served_name="n")[5:-4]
    assert words == ("--enforce-eager", "--no-async-scheduling", "--api-key", "a", "b c", "--max-model-len=-1")
    read = parser.parse_args(words)
    assert (read.api_key, read.max_model_len) == (["a", "b c"], -1)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"args": {"port": "9000"}},
            "port is not set here\n  in serve.args.port\n  fix: set serve.port instead",
        ),
        (
            {"args": {"max_model_len": "1"}},
            "max_model_len has a second spelling\n  in serve.args.max_model_len\n"
            "  fix: write max-model-len, the documented one",
        ),
        (
            {"args": {"no-enable-prefix-caching": False}},
            "no-enable-prefix-caching: false says no twice\n  in serve.args.no-enable-prefix-caching\n"
            "  fix: write enable-prefix-caching: true",
        ),
        (
            {"args": {"api-key": ("a", "-b")}},
            "-b would be read as an option\n  in serve.args.api-key\n"
            "  fix: leave it out: no value of a list can begin with a hyphen",
        ),
        (
            {"python": "venv/bin/python3"},
            "venv/bin/python3 is relative, but llama-swap and systemd start programs elsewhere\n  in serve.python\n"
            "  fix: write an absolute path, or python3 for the one on the PATH",
        ),
        (
            {"model_path": "-m"},
            "-m would be read as an option\n  in serve.model_path\n  fix: write ./-m",
        ),
        (
            {"args": {"hf-overrides": "{\n}"}},
            "U+000A in '{\\n}' would not reach the server unchanged\n  in serve.args.hf-overrides\n"
            "  fix: write the value on one line, without control characters",
        ),
    ],
)
def test_what_would_not_arrive_is_refused_by_name(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ManifestError) as caught:
        serve_command(profile(**changes), served_name=NAME)
    assert str(caught.value) == text


def test_an_error_points_at_the_manifests_line() -> None:
    with pytest.raises(ManifestError) as caught:
        serve_command(profile(args={"host": "h"}), served_name=NAME, where=lambda *keys: f"r.yaml:7:5: {keys}")
    assert caught.value.where == "r.yaml:7:5: ('serve', 'args', 'host')"


def test_variables_are_sorted_by_name_and_kept_on_one_line() -> None:
    assert environment(profile(env={"B": "2 3", "A": "$x"})) == (("A", "$x"), ("B", "2 3"))
    with pytest.raises(ManifestError) as caught:
        environment(profile(env={"A": "1\r2"}))
    assert str(caught.value) == (
        "U+000D in '1\\r2' would not reach the server unchanged\n  in serve.env.A\n"
        "  fix: write the value on one line, without control characters"
    )


def test_the_program_is_beside_the_interpreter_or_on_the_path() -> None:
    programs = {
        python: serve_command(profile(python=python), served_name="n")[0]
        for python in ("python3", "/opt/a b/bin/python3.12", "/usr/bin/python3")
    }
    assert programs == {
        "python3": "vllm",
        "/opt/a b/bin/python3.12": "/opt/a b/bin/vllm",
        "/usr/bin/python3": "/usr/bin/vllm",
    }


def test_an_option_that_is_given_again_for_each_value_is_spelled_so() -> None:
    words = serve_command(profile(args={"middleware": ("a.b", "c d")}), served_name="n")
    assert words[5:-4] == ("--middleware", "a.b", "--middleware", "c d")


UNFIT = ("Cc", "Cs", "Zl", "Zp")
ANY_TEXTS = st.text(st.characters() | st.sampled_from(" '\"\\$#{}:-\n\t\x85\u2028"))


@settings(max_examples=200, deadline=None)
@given(text=ANY_TEXTS, name=ANY_TEXTS)
def test_any_value_survives_llama_swap_and_yaml_or_is_refused_with_a_remedy(text: str, name: str) -> None:
    assume(name)
    serve = profile(args={"chat-template": text}, env={"VALUE": text})
    try:
        config = entry(serve, served_name=name)
    except ManifestError as refusal:
        unfit = [character for character in text + name if unicodedata.category(character) in UNFIT]
        assert unfit or "${" in text or "${" in name
        assert len(str(refusal).splitlines()) == 3
        return
    read = yaml.safe_load(llama_swap_yaml(config))
    assert read == config
    words = shlex.split(read["models"][name]["cmd"])
    assert tuple(words) == serve_command(serve, served_name=name)
    assert read["models"][name]["env"] == [f"VALUE={text}"]


# --- llama-swap -------------------------------------------------------------------------------------------------------


def test_the_entry_is_shown_with_one_option_to_a_line() -> None:
    llama_swap = LlamaSwap(ttl=0, aliases=("r1-70b",), name="DeepSeek R1: 70B")
    assert llama_swap_yaml(entry(spark(), llama_swap)) == (
        "healthCheckTimeout: 1020\n"
        "models:\n"
        f"  {NAME}:\n"
        "    name: 'DeepSeek R1: 70B'\n"
        "    proxy: http://127.0.0.1:9007\n"
        "    ttl: 0\n"
        "    checkEndpoint: /health\n"
        "    aliases:\n"
        "    - r1-70b\n"
        "    env:\n"
        "    - VLLM_MARLIN_USE_ATOMIC_ADD=1\n"
        "    cmd: >-\n"
        f"      /opt/vllm/bin/vllm serve /models/{NAME}\n"
        f"      --served-model-name {NAME}\n"
        "      --attention-backend flashinfer\n"
        "      --kv-cache-dtype fp8\n"
        "      --max-model-len 32768\n"
        "      --gpu-memory-utilization 0.80\n"
        "      --enable-prefix-caching\n"
        "      --host 127.0.0.1\n"
        "      --port 9007\n"
    )


def test_a_quoted_value_is_never_broken_across_lines() -> None:
    cmd = "serve --a 'x --b  y' --c ''"
    assert command_lines(cmd) == ["serve", "--a 'x --b  y'", "--c ''"]
    config = {"models": {"m": {"cmd": cmd, "proxy": "http://127.0.0.1:1"}}}
    assert yaml.safe_load(llama_swap_yaml(config)) == config


@pytest.mark.parametrize("cmd", ["a \\\n--b c\n", " a --b", "a  --b   --c", "a\n\n# no\n--b", "a --b "])
def test_a_command_of_any_form_reads_back_as_it_was(cmd: str) -> None:
    config = {"models": {"m": {"cmd": cmd, "proxy": "http://127.0.0.1:1"}}}
    assert yaml.safe_load(llama_swap_yaml(config)) == config


@pytest.mark.parametrize(
    ("host", "url"),
    [("0.0.0.0", "http://127.0.0.1:8000"), ("::", "http://[::1]:8000"), ("10.0.0.2", "http://10.0.0.2:8000")],
)
def test_the_proxy_asks_where_the_server_listens(host: str, url: str) -> None:
    assert entry(profile(host=host))["models"][NAME]["proxy"] == url


def test_the_wait_for_a_healthy_server_grows_with_the_weights() -> None:
    sizes = (0, 1_000_000, 43_000_000_000, 141_000_000_000)
    assert [health_check_timeout_s(size) for size in sizes] == [300, 360, 1020, 2580]
    assert "healthCheckTimeout" not in entry(spark(), num_bytes=None)


@pytest.mark.parametrize(
    "changes", [{"args": {"seed": "${PORT}"}}, {"env": {"SEED": "${PORT}"}}, {"model_path": "${PORT}"}]
)
def test_a_value_that_llama_swap_would_replace_is_refused_there_and_only_there(changes: dict[str, Any]) -> None:
    serve = profile(**changes)
    assert serve_command(serve, served_name=NAME)
    with pytest.raises(ManifestError) as caught:
        entry(serve)
    assert str(caught.value) == (
        "llama-swap would read a macro in '${PORT}'\n  in llama_swap\n  fix: write the value without ${"
    )


def test_an_alias_that_is_the_models_own_name_is_refused() -> None:
    with pytest.raises(ManifestError) as caught:
        entry(spark(), LlamaSwap(aliases=(NAME,)))
    assert str(caught.value) == (
        f"the name {NAME} is given twice\n  in llama_swap\n  fix: give every model and alias a name of its own"
    )


def test_llama_swap_chooses_the_port_where_the_manifest_says_so() -> None:
    model = entry(spark(), LlamaSwap(automatic_port=True))["models"][NAME]
    assert model["proxy"] == "http://127.0.0.1:${PORT}"
    assert model["cmd"].endswith(" --port ${PORT}") and "9007" not in model["cmd"]


def test_a_container_is_started_with_all_it_needs_and_stopped_by_name() -> None:
    serve = profile(env={"VLLM_API_KEY": "a 'b'"}, model_path="/models/größe x")
    model = entry(serve, LlamaSwap(container=True))["models"][NAME]
    words = shlex.split(model["cmd"])
    image = words.index("vllm/vllm-openai:v0.32.0")
    assert words[image + 1 :] == list(serve_command(serve, served_name=NAME)[1:])
    assert words[:7] == ["docker", "run", "--init", "--rm", "--name", f"vllm-{NAME}", "--gpus"]
    assert "type=bind,source=/models/größe x,target=/models/größe x,readonly" in words[:image]
    assert "--env=VLLM_API_KEY=a 'b'" in words[:image] and "env" not in model
    assert model["cmdStop"] == f"docker stop vllm-{NAME}"
    from_hub = entry(profile(model_path="a/b", image="own:1"), LlamaSwap(container=True))["models"][NAME]["cmd"]
    assert "--volume huggingface:/root/.cache/huggingface --entrypoint vllm own:1 serve a/b " in from_hub
    with pytest.raises(ManifestError, match="docker would split the path '/models/a,b'"):
        entry(profile(model_path="/models/a,b"), LlamaSwap(container=True))


def test_a_model_is_in_the_group_that_the_manifest_names() -> None:
    llama_swap = LlamaSwap.model_validate({"group": {"name": "large", "exclusive": False}})
    config = entry(spark(), llama_swap)
    members = {"swap": True, "exclusive": False, "persistent": False, "members": [NAME]}
    assert config["groups"] == {"large": members}
    assert yaml.safe_load(llama_swap_yaml(config)) == config
    for found, what in (
        ({"one": {"members": ["x"]}}, "x in group one is no model"),
        ({"one": {"members": [NAME]}, "two": {"members": [NAME]}}, f"{NAME} is listed twice in groups"),
    ):
        with pytest.raises(BuildError) as caught:
            check_llama_swap({**config, "groups": found})
        assert what in str(caught.value)


GOOD: dict[str, Any] = {"cmd": "serve --port 1", "proxy": "http://127.0.0.1:1"}


@pytest.mark.parametrize(
    ("model", "what"),
    [
        ({"env": {"A": "1"}}, "llama-swap refuses models.m.env: {'A': '1'} is not of type 'array'"),
        ({"env": ["a=1"]}, "llama-swap refuses models.m.env.0: 'a=1' does not match '^[A-Z_][A-Z0-9_]*=.*$'"),
        ({"ttl": "0"}, "llama-swap refuses models.m.ttl: '0' is not of type 'integer'"),
        ({"cmd": ["serve"]}, "llama-swap refuses models.m.cmd: ['serve'] is not of type 'string'"),
        (
            {"checkEndpoint": "health"},
            "llama-swap refuses models.m.checkEndpoint: 'health' does not match '^/.*$|^none$'",
        ),
        ({"proxy": "http://localhost:${PORT}"}, "the proxy of m has ${PORT} and its cmd has not"),
        ({"cmd": "serve ${model}"}, "unknown macro ${model} in cmd of m"),
        ({"cmdStop": "kill ${PID}", "checkEndpoint": "/${PID}"}, "unknown macro ${PID} in checkEndpoint of m"),
        ({"cmd": "cd /m && serve"}, "&& in cmd of m means nothing: no shell runs it"),
        ({"cmd": "serve $MODEL"}, "$MODEL in cmd of m means nothing: no shell runs it"),
        ({"cmd": "serve 'x"}, "a quote is not closed in cmd of m"),
    ],
)
def test_what_llama_swap_would_refuse_is_refused(model: dict[str, Any], what: str) -> None:
    check_llama_swap({"models": {"m": GOOD}})
    with pytest.raises(ManifestError) as caught:
        check_llama_swap({"models": {"m": {**GOOD, **model}}})
    assert (caught.value.what, caught.value.where) == (what, "llama-swap.yaml")
    assert caught.value.fix


def test_macros_that_llama_swap_knows_are_let_through() -> None:
    model = {
        "cmd": "serve ${MODEL_ID} --port ${PORT} ${all} ${own} ${env.HOME} '$quoted' '&&'",
        "cmdStop": "kill ${PID}",
        "macros": {"own": "x"},
    }
    check_llama_swap({"models": {"m": model}, "macros": {"all": 1}})


def test_all_problems_of_a_configuration_are_told_together() -> None:
    models = {"m": {**GOOD, "aliases": ["x"]}, "n": {**GOOD, "aliases": ["x"], "cmd": "serve | tee"}}
    with pytest.raises(Problems) as caught:
        check_llama_swap({"models": models})
    assert [problem.what for problem in caught.value.problems] == [
        "| in cmd of n means nothing: no shell runs it",
        "the name x is given twice",
    ]
    with pytest.raises(BuildError, match="'models' is a required property"):
        check_llama_swap({})


def test_the_shipped_schema_is_the_reviewed_one_and_its_licence_is_beside_it() -> None:
    assert sha256_file(LLAMA_SWAP_SCHEMA) == "85c0101dbc8a4461bd4c751bc98b3441651a83a8ba855d0473ef6c8f4c2c5666"
    notice = LLAMA_SWAP_SCHEMA.with_name("llama-swap-config-schema.LICENSE.md").read_text("utf-8")
    assert notice.startswith("MIT License\n\nCopyright (c) 2024 Benson Wong\n")
