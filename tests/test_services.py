"""A profile reaches vLLM as it was written, through a shell, docker compose and systemd, each really asked."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from builder.errors import ManifestError
from builder.lock import CARD_FILES, SERVE_FILES
from builder.manifest import Manifest, load_manifest
from builder.render import describe_serving, render
from builder.serving import environment, serve_command

ODD = [
    "a b",
    "it's",
    'say "so"',
    "$HOME",
    "$(id) `id`",
    "# no comment",
    "größe 大小 🦙",
    "back\\slash\\",
    "\\n",
    "",
    "a: b",
    "{'k': 1}",
    "*",
    "~",
    ";",
    "|",
    "%h %% 100%",
    "1e3",
    "0o17",
    "yes",
    "null",
    " padded ",
    "\u00a0\ufeff",
]


def write_profile(folder: Path, **serve: Any) -> Manifest:
    """A manifest with this serve profile; only that matters here."""
    content = {
        "manifest": 1,
        "title": "Odd",
        "repo": "owner/Odd",
        "base": {"path": "base", "licenses": ["mit"]},
        "scheme": {"name": "fp8_dynamic"},
        "serve": {"version": "0.32", "model_path": "/models/odd", **serve},
    }
    path = folder / "Odd-1.0.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), "utf-8")
    return load_manifest(path)


def render_files(manifest: Manifest) -> dict[str, str]:
    assert manifest.release.serve is not None
    context = {"release": manifest.release, "name": manifest.name}
    context |= describe_serving(manifest, manifest.release.serve, None)
    return {name: render(name, context) for name in SERVE_FILES}


def expect(manifest: Manifest) -> tuple[list[str], list[str]]:
    """The words and variables that have to arrive."""
    serve = manifest.release.serve
    assert serve is not None
    words = [*serve_command(serve, served_name=serve.served_name or "Odd")]
    return words, [f"{name}={value}" for name, value in environment(serve)]


def odd_profile(folder: Path, **changes: Any) -> Manifest:
    args = {"api-key": tuple(ODD), "chat-template": ODD[3], "middleware": ["a b", "$c"], "enforce-eager": "true"}
    env = {f"VALUE_{place}": text for place, text in enumerate(ODD)}
    odd = {"args": {**args, "enforce-eager": True}, "env": env, "model_path": "/models/it's a $MODEL; echo #"}
    return write_profile(folder, **{**odd, "served_name": "größe & 大小", **changes})


# --- who reads them ---------------------------------------------------------------------------------------------------


def read_compose(text: str) -> tuple[list[str], list[str]]:
    """Words and variables of a compose file: YAML, then compose's own `$$`, where a single `$` would be replaced."""
    service = yaml.safe_load(text)["services"]["vllm"]
    values = [*service["entrypoint"], *service["command"]], service.get("environment", [])
    for value in (*values[0], *values[1]):
        assert isinstance(value, str) and not re.search(r"(?<!\$)\$(\$\$)*(?!\$)", value)
    return [word.replace("$$", "$") for word in values[0]], [text.replace("$$", "$") for text in values[1]]


ESCAPES = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "s": " "}


def split_systemd(line: str) -> list[str]:
    """Words of a line as systemd.syntax(7) and systemd.service(5) describe them, `%%` read as one."""
    words: list[str] = []
    word, quote, place = None, "", 0
    while place < len(line):
        char = line[place]
        place += 1
        if char == "\\":
            following = line[place]
            place += 1
            char = ESCAPES.get(following, following)
            assert following in "abfnrtvs\\\"'", f"systemd does not know \\{following}"
        elif char == "%":
            assert line[place] == "%", "a specifier"
            place += 1
        elif quote:
            if char == quote:
                quote = ""
                continue
        elif char in "\"'":
            quote, word = char, word or ""
            continue
        elif char in " \t":
            words += [word] if word is not None else []
            word = None
            continue
        word = (word or "") + char
    assert not quote
    return [*words, *([word] if word is not None else [])]


def read_unit(text: str) -> tuple[list[str], list[str]]:
    """Words and variables of a unit file."""
    lines = [line for line in text.replace("\\\n", " ").splitlines() if not line.startswith(("#", ";"))]
    [start] = [line.removeprefix("ExecStart=") for line in lines if line.startswith("ExecStart=")]
    variables = [split_systemd(line.removeprefix("Environment=")) for line in lines if line.startswith("Environment=")]
    assert start.startswith(":"), "else systemd replaces variables"
    assert all(len(words) == 1 for words in variables)
    return split_systemd(start[1:]), [words[0] for words in variables]


# --- the files --------------------------------------------------------------------------------------------------------


def test_compose_values_are_quoted_for_what_is_text_to_one_yaml_is_a_number_to_another(tmp_path: Path) -> None:
    text = render_files(odd_profile(tmp_path))["compose.yaml"]
    words, variables = expect(odd_profile(tmp_path))
    quoted = [event.value for event in yaml.parse(text) if isinstance(event, yaml.ScalarEvent) and event.style == '"']
    assert {word.replace("$", "$$") for word in (*words[1:], *variables)} < set(quoted)


def test_what_serves_is_part_of_the_card_and_outside_the_lock() -> None:
    assert set(SERVE_FILES) < set(CARD_FILES)


def test_a_shell_hands_every_word_and_variable_on_as_it_was_written(tmp_path: Path) -> None:
    """The script is run by a real shell, with a program in vllm's place that shows what it was given."""
    manifest = odd_profile(tmp_path, python=str(tmp_path / "an env/bin/python3"))
    words, variables = expect(manifest)
    shown = Path(words[0])
    shown.parent.mkdir(parents=True)
    shown.write_text('#!/bin/sh\nprintf \'%s\\0\' "$0" "$@"\nenv -0 | grep -z ^VALUE_ | sort -z\n')
    shown.chmod(0o755)
    script = tmp_path / "serve.sh"
    script.write_text(render_files(manifest)["serve.sh"])
    for shell in ("bash", "sh"):
        subprocess.run([shell, "-n", script], check=True)
        run = subprocess.run(
            [shell, script, "--more"], check=True, capture_output=True, env={"PATH": os.environ["PATH"], "LC_ALL": "C"}
        )
        said = run.stdout.decode().split("\0")[:-1]
        assert said == [*words, "--more", *sorted(variables, key=str.encode)]


def test_compose_and_systemd_hand_every_word_and_variable_on_as_it_was_written(tmp_path: Path) -> None:
    manifest = odd_profile(tmp_path)
    files = render_files(manifest)
    assert read_compose(files["compose.yaml"]) == expect(manifest)
    assert read_unit(files["vllm.service"]) == expect(manifest)
    mount = yaml.safe_load(files["compose.yaml"])["services"]["vllm"]["volumes"][0]
    assert mount["source"] == mount["target"] == "/models/it's a $$MODEL; echo #"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd here")
def test_systemd_itself_reads_the_unit_as_it_was_written(tmp_path: Path) -> None:
    program = tmp_path / "an env" / "vllm"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / "odd.service"
    manifest = odd_profile(tmp_path, python=str(program.with_name("python3")))
    unit.write_text(render_files(manifest)["vllm.service"], "utf-8")
    command = ["systemd-analyze", "verify", "--user", "--man=no", "--recursive-errors=no", str(unit)]
    env = {**os.environ, "SYSTEMD_LOG_LEVEL": "debug", "LC_ALL": "C.UTF-8", "XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    words, variables = expect(manifest)
    dumped = [line.lstrip("\t") for line in done.stdout.split("\n")]
    [line] = [line.removeprefix("Command Line: ") for line in dumped if line.startswith("Command Line: ")]
    assert decode_dump(line) == words
    told = [line.removeprefix("Environment: ") for line in dumped if line.startswith("Environment: VALUE_")]
    assert told == variables
    complaints = [line for line in done.stderr.splitlines() if re.search(r"odd\.service:[0-9]", line)]
    assert complaints == []


def decode_dump(line: str) -> list[str]:
    """A command line as systemd prints it, in words."""
    return split_systemd(line.replace("\\$", "$").replace("\\`", "`").replace("%", "%%"))


ANY_TEXTS = st.text(st.characters() | st.sampled_from(" '\"\\$#{}:%-;\n\t\x85\u2028"), max_size=30)


@settings(max_examples=150, deadline=None)
@given(text=ANY_TEXTS, path=ANY_TEXTS)
@example(text="$", path="%")
@example(text="\\", path='"')
def test_any_value_reaches_every_reader_or_is_refused_with_a_remedy(
    tmp_path_factory: pytest.TempPathFactory, text: str, path: str
) -> None:
    manifest = write_profile(tmp_path_factory.getbasetemp())
    assert manifest.release.serve is not None
    changes = {
        "model_path": f"/{path}",
        "args": {"chat-template": text, "api-key": (text,)},
        "env": {"VALUE": text},
        "served_name": text or "n",
    }
    serve = manifest.release.serve.model_copy(update=changes)
    changed = Manifest(
        manifest.name, manifest.path, manifest.release.model_copy(update={"serve": serve}), manifest.root
    )
    try:
        files = render_files(changed)
    except ManifestError as refusal:
        unfit = [char for char in text + path if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")]
        assert unfit or "${" in text or "${" in path or text.startswith("-")
        assert len(str(refusal).splitlines()) == 3
        return
    words, variables = expect(changed)
    assert read_compose(files["compose.yaml"]) == read_unit(files["vllm.service"]) == (words, variables)
    exports, command = files["serve.sh"].split("\nexec ")
    assert shlex.split(command.replace("\\\n", "")) == [*words, "$@"]
    assert shlex.split(exports.split("set -eu\n")[1]) == ["export", *variables]


def test_the_services_read_well(tmp_path: Path) -> None:
    manifest = write_profile(
        tmp_path, python="/opt/vllm/bin/python3", args={"max-model-len": 32768, "enforce-eager": True}, env={"A": "b c"}
    )
    files = render_files(manifest)
    assert files["vllm.service"] == (
        "# Serves owner/Odd with vllm 0.32, as a service of a user:\n"
        "#   cp vllm.service ~/.config/systemd/user/Odd-1.0.service\n"
        "#   systemctl --user enable --now Odd-1.0     (and `loginctl enable-linger`, to run without a login)\n"
        "[Unit]\nDescription=owner/Odd\n\n"
        '[Service]\nType=exec\nEnvironment="A=b c"\n'
        "ExecStart=:/opt/vllm/bin/vllm serve /models/odd \\\n  --served-model-name Odd \\\n  --max-model-len 32768 \\\n"
        "  --enforce-eager \\\n  --host 127.0.0.1 \\\n  --port 8000\n"
        "Restart=on-failure\n\n[Install]\nWantedBy=default.target\n"
    )
    compose = yaml.safe_load(files["compose.yaml"])
    service = compose["services"]["vllm"]
    assert compose["name"] == "odd-1-0" and service["image"] == "vllm/vllm-openai:v0.32.0"
    assert (service["network_mode"], service["ipc"]) == ("host", "host")
    from_hub = yaml.safe_load(render_files(write_profile(tmp_path, model_path="a/b", image="own:1"))["compose.yaml"])
    assert from_hub["volumes"] == {"huggingface": {}} and from_hub["services"]["vllm"]["image"] == "own:1"
