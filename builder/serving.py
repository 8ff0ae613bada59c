"""Serve profile -> command line, environment and llama-swap entry; each word arrives as it is written, or is refused.

A value passes up to four readers on its way to vLLM: YAML, llama-swap's macros, a splitter of words, argparse. What one
of them would change is refused by name, and no option is added that the manifest does not ask for.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import jsonschema
import yaml

from builder.errors import BuildError, ManifestError, raise_all
from builder.manifest import LlamaSwap, Serve
from builder.options import find_options, find_refused

LLAMA_SWAP_SCHEMA = Path(__file__).parent / "data" / "llama-swap-config-schema.json"
DEFAULT_PROXY = "http://localhost:${PORT}"
START_S = 300
READ_BYTES_PER_S = 62_500_000
SET_ELSEWHERE = {
    "model": "serve.model_path",
    "served-model-name": "serve.served_name",
    "host": "serve.host",
    "port": "serve.port",
}
SHELL_OPERATORS = frozenset({"&&", "||", "|", ";", "&", ">", ">>", "<"})
MACRO = re.compile(r"\$\{([A-Za-z0-9_-]+)\}")
RAW_WORD = re.compile(r"""(?:[^\s'"]|'[^']*'|"[^"]*")+""")


def dotted(*keys: object) -> str:
    return ".".join(str(key) for key in keys)


def serve_command(serve: Serve, *, served_name: str, where: Callable[..., str] = dotted) -> tuple[str, ...]:
    """The words of `vllm serve MODEL_PATH ...`, unquoted; options in the manifest's order, the address last.

    The program is the one beside `serve.python`, for not every starter has its folder on the PATH.
    where: manifest keys -> where they stand, for errors.
    Raises ManifestError for an option that is set elsewhere, and for a value that would not arrive as it is written.
    """
    return (spell_program(serve, where), *serve_words(serve, served_name, where, str(serve.port)))


def serve_words(serve: Serve, served_name: str, where: Callable[..., str], port: str) -> tuple[str, ...]:
    """What follows the program's name."""
    return ("serve", spell_path(serve, where), *spell_options(serve, served_name, where, port))


def check_serve(serve: Serve, *, where: Callable[..., str] = dotted) -> None:
    """Refuse options and variables that the stated version of the engine does not have, all of them together."""
    raise_all([*find_refused(serve, where)])


def environment(serve: Serve, *, where: Callable[..., str] = dotted) -> tuple[tuple[str, str], ...]:
    """The profile's variables, unquoted and by name. Raises ManifestError for a value with control characters."""
    for name, value in serve.env.items():
        check_text(value, where("serve", "env", name))
    return tuple(sorted(serve.env.items()))


def llama_swap_entry(
    serve: Serve,
    llama_swap: LlamaSwap,
    *,
    served_name: str,
    num_bytes: int | None,
    where: Callable[..., str] = dotted,
) -> dict[str, Any]:
    """A whole llama-swap configuration with this one model, checked as llama-swap would check it.

    num_bytes: of the artifact's weights, sizes `healthCheckTimeout`; None leaves that at llama-swap's default, 120 s.
    Raises ManifestError or Problems, also for a value with "${": llama-swap would read it as a macro.
    """
    variables = environment(serve, where=where)
    words = serve_words(serve, served_name, where, str(serve.port))
    shown = {key: text for key in ("name", "description") if (text := getattr(llama_swap, key)) is not None}
    program = (spell_program(serve, where), serve.image or "")
    for text in (*program, *words, *(value for _, value in variables), *llama_swap.aliases, *shown.values()):
        if "${" in text:
            what = f"llama-swap would read a macro in {text!a}"
            raise ManifestError(what, where("llama_swap"), "write the value without ${")
    port = "${PORT}" if llama_swap.automatic_port else str(serve.port)
    words = serve_words(serve, served_name, where, port)
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", f"vllm-{served_name}")
    run = container_words(serve, name, variables, where) if llama_swap.container else (program[0],)
    model: dict[str, Any] = {
        **shown,
        "proxy": f"http://{reachable(serve.host)}:{port}",
        "ttl": llama_swap.ttl,
        "checkEndpoint": "/health",
        "aliases": list(llama_swap.aliases),
        "env": [] if llama_swap.container else [f"{name}={value}" for name, value in variables],
        "cmd": " ".join(shlex.quote(word) if word != port else port for word in (*run, *words)),
        "cmdStop": f"docker stop {name}" if llama_swap.container else [],
    }
    config: dict[str, Any] = {} if num_bytes is None else {"healthCheckTimeout": health_check_timeout_s(num_bytes)}
    config["models"] = {served_name: {key: value for key, value in model.items() if value != []}}
    if group := llama_swap.group:
        config["groups"] = {group.name: group.model_dump(exclude={"name"}) | {"members": [served_name]}}
    check_llama_swap(config, where=where("llama_swap"))
    return config


def container_words(
    serve: Serve, name: str, variables: Sequence[tuple[str, str]], where: Callable[..., str]
) -> tuple[str, ...]:
    """`docker run` up to the image; it sees the host's network and GPUs, and the model where the host has it."""
    mount = f"type=bind,source={serve.model_path},target={serve.model_path},readonly"
    if is_folder(serve) and re.search(r"[,\"]", serve.model_path):
        what = f"docker would split the path {serve.model_path!a}"
        raise ManifestError(what, where("serve", "model_path"), "use a path without commas and quotes")
    return (
        *("docker", "run", "--init", "--rm", "--name", name, "--gpus", "all", "--ipc", "host", "--network", "host"),
        *(("--mount", mount) if is_folder(serve) else ("--volume", "huggingface:/root/.cache/huggingface")),
        *(f"--env={name}={value}" for name, value in variables),
        *("--entrypoint", "vllm", name_image(serve, where)),
    )


def is_folder(serve: Serve) -> bool:
    """Whether the model is a folder of the host, and not a Hub id."""
    return serve.model_path.startswith("/")


def name_image(serve: Serve, where: Callable[..., str]) -> str:
    """The container image: the manifest's, or vLLM's own of the stated version."""
    engine = find_options(serve.version)
    image = serve.image or f"vllm/vllm-openai:v{engine.version if engine else serve.version}"
    check_text(image, where("serve", "image" if serve.image else "version"))
    if image.startswith("-"):
        raise ManifestError(f"{image} would be read as an option", where("serve", "image"), "name an image")
    return image


def health_check_timeout_s(num_bytes: int) -> int:
    """Seconds within which even a slow machine serves that many bytes of weights, rounded up to a whole minute.

    300 s for imports, compilation and graph capture, and the weights at 62.5 MB/s, half of a gigabit link. 43 GB give
    1020 s, where 900 are the least for a 70B model. A server that is ready ends the wait, so a long one costs nothing.
    """
    return 60 * math.ceil((START_S + num_bytes / READ_BYTES_PER_S) / 60)


def llama_swap_yaml(config: Mapping[str, Any]) -> str:
    """The configuration as YAML that reads back as the same mapping; a command has one option to a line."""
    models = {
        name: {**model, "cmd": model["cmd"] if re.search(r"\A\s|\n|\s\Z", model["cmd"]) else Command(model["cmd"])}
        for name, model in config["models"].items()
    }
    return yaml.dump(
        {**config, "models": models}, Dumper=ConfigDumper, sort_keys=False, allow_unicode=True, width=math.inf
    )


def check_llama_swap(config: Mapping[str, Any], *, where: str = "llama-swap.yaml") -> None:
    """Refuse what llama-swap v250 would: by its JSON schema first, then by its loader's stricter rules."""
    raise_all([*schema_problems(config, where)] or [*loader_problems(config, where)])


def schema_problems(config: Mapping[str, Any], where: str) -> Iterator[BuildError]:
    schema = json.loads(LLAMA_SWAP_SCHEMA.read_text("utf-8"))
    validator = jsonschema.Draft7Validator(schema)
    for error in sorted(validator.iter_errors(config), key=lambda error: error.json_path):
        place = dotted(*error.absolute_path)
        yield ManifestError(
            f"llama-swap refuses {place or 'its configuration'}: {error.message}",
            where,
            "see the key in llama-swap's configuration schema",
        )


def loader_problems(config: Mapping[str, Any], where: str) -> Iterator[BuildError]:
    names = list(config["models"])
    for name, model in config["models"].items():
        names += model.get("aliases", [])
        cmd = model["cmd"]
        if "${PORT}" in model.get("proxy", DEFAULT_PROXY) and "${PORT}" not in cmd:
            yield ManifestError(
                f"the proxy of {name} has ${{PORT}} and its cmd has not",
                where,
                "write the port in both, or ${PORT} in both",
            )
        macros = {"MODEL_ID", *config.get("macros", {}), *model.get("macros", {})}
        known = {"cmd": macros | {"PORT"}, "proxy": macros | {"PORT"}, "cmdStop": macros | {"PORT", "PID"}}
        for field in ("cmd", "cmdStop", "proxy", "checkEndpoint", "name", "description"):
            for macro in MACRO.findall(model.get(field, "")):
                if macro not in known.get(field, macros):
                    yield ManifestError(
                        f"unknown macro ${{{macro}}} in {field} of {name}",
                        where,
                        f"llama-swap knows {', '.join(sorted(known.get(field, macros)))} there",
                    )
        yield from command_problems(name, cmd, where)
    for alias in sorted({alias for alias in names if names.count(alias) > 1}):
        yield ManifestError(f"the name {alias} is given twice", where, "give every model and alias a name of its own")
    members = [(group, name) for group, found in config.get("groups", {}).items() for name in found["members"]]
    for group, name in members:
        if name not in config["models"]:
            yield ManifestError(f"{name} in group {group} is no model", where, "list names of models, not aliases")
        if [other for _, other in members].count(name) > 1:
            yield ManifestError(f"{name} is listed twice in groups", where, "put every model into one group at most")


def command_problems(name: str, cmd: str, where: str) -> Iterator[BuildError]:
    try:
        shlex.split(cmd)
    except ValueError:
        yield ManifestError(f"a quote is not closed in cmd of {name}", where, "quote values as a shell would")
        return
    for word in RAW_WORD.findall(cmd):
        if word in SHELL_OPERATORS or re.match(r"\$[A-Za-z_(]", word):
            yield ManifestError(
                f"{word} in cmd of {name} means nothing: no shell runs it",
                where,
                "quote it to pass it on as it is, or call a script that does the work",
            )


class Command(str):
    """A command line that YAML shows folded."""


class ConfigDumper(yaml.SafeDumper):
    """Writes a Command in a folded scalar, each option on its own line."""

    def write_folded(self, text: str) -> None:
        """A line break in a folded scalar reads back as the one space it replaces."""
        self.write_indicator(">-", True)
        for line in command_lines(text):
            self.write_indent()
            self.stream.write(line)
            self.column += len(line)


ConfigDumper.add_representer(
    Command, lambda dumper, command: dumper.represent_scalar("tag:yaml.org,2002:str", str(command), style=">")
)


def command_lines(cmd: str) -> list[str]:
    """A command cut before each word with two leading hyphens; joined by spaces it is the command again."""
    starts = [word.start() for word in RAW_WORD.finditer(cmd) if word.group().startswith("--") and word.start() > 0]
    cuts = [start for start in starts if cmd[start - 1] == " " and cmd[start - 2] != " "]
    return [cmd[begin:end].removesuffix(" ") for begin, end in zip([0, *cuts], [*cuts, len(cmd)], strict=True)]


def spell_program(serve: Serve, where: Callable[..., str]) -> str:
    """`vllm` beside the interpreter; on the PATH, as the interpreter, where that has no folder."""
    place = where("serve", "python")
    check_text(serve.python, place)
    if "/" not in serve.python and not serve.python.startswith("-"):
        return "vllm"
    if not serve.python.startswith("/"):
        what = f"{serve.python} is relative, but llama-swap and systemd start programs elsewhere"
        raise ManifestError(what, place, "write an absolute path, or python3 for the one on the PATH")
    return str(PurePosixPath(serve.python).parent / "vllm")


def spell_path(serve: Serve, where: Callable[..., str]) -> str:
    place = where("serve", "model_path")
    if serve.model_path.startswith("-"):
        raise ManifestError(f"{serve.model_path} would be read as an option", place, f"write ./{serve.model_path}")
    check_text(serve.model_path, place)
    return serve.model_path


def spell_options(serve: Serve, served_name: str, where: Callable[..., str], port: str) -> Iterator[str]:
    """All options as words: true is --flag, false --no-flag, and a list repeats values."""
    engine = find_options(serve.version)
    yield from spell_option("served-model-name", served_name, where("serve", "served_name"))
    for name, value in serve.args.items():
        place = where("serve", "args", name)
        plain, dot, rest = name.partition(".")
        if name in SET_ELSEWHERE:
            raise ManifestError(f"{name} is not set here", place, f"set {SET_ELSEWHERE[name]} instead")
        if "_" in plain:
            raise ManifestError(
                f"{name} has a second spelling",
                place,
                f"write {plain.replace('_', '-')}{dot}{rest}, the documented one",
            )
        if name.startswith("no-") and value is False:
            raise ManifestError(f"{name}: false says no twice", place, f"write {name.removeprefix('no-')}: true")
        if engine and engine.repeats(name) and isinstance(value, tuple):
            for item in value:
                yield from spell_option(name, item, place)
        else:
            yield from spell_option(name, value, place)
    yield from spell_option("host", serve.host, where("serve", "host"))
    yield from spell_option("port", port, where("serve", "port"))


def spell_option(name: str, value: bool | str | tuple[str, ...], place: str) -> list[str]:
    """The words of one option; `--name=value` where argparse would take the value for another option."""
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, str):
        check_text(value, place)
        return [f"--{name}={value}"] if value.startswith("-") else [f"--{name}", value]
    for item in value:
        check_text(item, place)
        if item.startswith("-"):
            raise ManifestError(
                f"{item} would be read as an option", place, "leave it out: no value of a list can begin with a hyphen"
            )
    return [f"--{name}", *value]


def check_text(text: str, place: str) -> None:
    """Refuse line ends, other control characters and lone surrogates."""
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
            raise ManifestError(
                f"U+{ord(character):04X} in {text!a} would not reach the server unchanged",
                place,
                "write the value on one line, without control characters",
            )


def reachable(host: str) -> str:
    """The address, as a URL has it, at which a server bound to `host` is reached from its own machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host
