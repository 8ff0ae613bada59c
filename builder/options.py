"""What a version of vLLM takes on its command line and from its environment; what of a profile it would refuse.

`data/vllm-VERSION-cli.json` lists options and variables of a version as vLLM's own parser declares them;
`tests/golden/list_vllm_options.py` makes such a list in an environment that has another one.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from builder.errors import ManifestError
from builder.manifest import Serve

LISTS = Path(__file__).parent / "data"
NAMED_LISTS = {"attention-backend": "attention_backends", "quantization": "quantization_methods"}
# Variables that published profiles still set, and the option that stands for each.
SUCCESSORS = {
    "VLLM_ATTENTION_BACKEND": "attention-backend",
    "VLLM_NVFP4_GEMM_BACKEND": "linear-backend",
    "VLLM_TEST_FORCE_FP8_MARLIN": "linear-backend: marlin",
}
JSON = ("parse_dataclass", "loads", "union_dict_and_str", "_parse_type")
AMOUNT = r"[0-9]+|[0-9]+(\.[0-9]+)?[kmgt]|[0-9]+[KMGT]"
FORMS = {
    "int": (r"[+-]?[0-9]+", "a whole number"),
    "float": (r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", "a number"),
    "human_readable_int": (AMOUNT, "a whole number, or one such as 16k"),
    "human_readable_int_or_auto": (rf"{AMOUNT}|-1|[aA][uU][tT][oO]", "a whole number, one such as 32k, or auto"),
}


@dataclass(frozen=True)
class Options:
    """A version of vLLM. options: by name without hyphens; each has type, nargs, choices and default."""

    version: str
    options: Mapping[str, Mapping[str, Any]]
    variables: frozenset[str]
    named: Mapping[str, tuple[str, ...]]  # names that an option takes, where its parser leaves them open

    def repeats(self, name: str) -> bool:
        """Whether each value of a list is given with the option before it."""
        option = self.options.get(name)
        return option is not None and option["nargs"] is None and option["default"] == [] and option["type"] == "str"


def list_versions() -> dict[str, Path]:
    """The versions there are lists of, as major.minor."""
    return {path.name.split("-")[1]: path for path in sorted(LISTS.glob("vllm-*-cli.json"))}


@cache
def find_options(version: str) -> Options | None:
    """The engine that a manifest's `serve.version` names, to its minor version; None where there is no list of it."""
    path = list_versions().get(".".join(version.split(".")[:2]))
    if path is None:
        return None
    content = json.loads(path.read_text("utf-8"))
    return Options(
        version=content["vllm"],
        options={flag.removeprefix("--"): option for flag, option in content["flags"].items()},
        variables=frozenset(content["env"]),
        named={option: tuple(content[names]) for option, names in NAMED_LISTS.items()},
    )


def find_refused(serve: Serve, where: Callable[..., str]) -> Iterator[ManifestError]:
    """The options and variables that the profile's version does not have, or not with these values.

    Only variables of vLLM's own are known; others may be for what it runs on.
    """
    engine = find_options(serve.version)
    if engine is None:
        return
    for name, value in serve.args.items():
        if found := check_option(engine, name, value):
            yield ManifestError(found[0], where("serve", "args", name), found[1])
    for name, text in serve.env.items():
        if name.startswith("VLLM_") and name not in engine.variables:
            what = f"vLLM {engine.version} has no variable {name}"
            yield ManifestError(what, where("serve", "env", name), replace_variable(engine, name, text))


def replace_variable(engine: Options, name: str, text: str) -> str:
    """What to do instead of setting a variable that is gone, or was never there."""
    option, written, value = SUCCESSORS.get(name, "").partition(": ")
    if not option:
        close = difflib.get_close_matches(name, sorted(engine.variables), n=1, cutoff=0.7)
        return f"did you mean {close[0]}?" if close else "remove it"
    if not written:
        value = text.lower().replace("-", "_") if option == "linear-backend" else text
    if check_option(engine, option, value):
        value = "auto"
    return f"remove it, and write {option}: {value} in serve.args"


def check_option(engine: Options, name: str, value: bool | str | tuple[str, ...]) -> tuple[str, str] | None:
    """What is wrong with an option, and its remedy; None if the engine takes it."""
    plain, dot, _ = name.partition(".")
    option = engine.options.get(plain)
    if option is None or (dot and option["type"] not in JSON):
        close = difflib.get_close_matches(name, sorted(engine.options), n=3, cutoff=0.6)
        ask = "`vllm serve --help=all` shows all options"
        return f"vLLM {engine.version} has no option {name}", f"did you mean {' or '.join(close)}?" if close else ask
    if option["nargs"] == 0 and not isinstance(value, bool):
        return f"{name} is a switch and takes no value", f"write {name}: true, or leave it out"
    if option["nargs"] == 0:
        off = value is False and f"no-{name}" not in engine.options
        return (f"{name} cannot be switched off", "leave it out") if off else None
    if isinstance(value, bool):
        return None if value and option["nargs"] == "?" else (f"{name} is no switch", f"write {name}: with a value")
    if isinstance(value, tuple) and option["nargs"] not in ("+", "*") and not engine.repeats(name):
        return f"{name} takes one value, not a list", "write one value (JSON goes in single quotes)"
    for text in value if isinstance(value, tuple) else (value,):
        if not dot and (expected := check_value(engine, name, option, text)):
            if name == "quantization":
                expected = f"{expected}; or leave it out: vLLM reads it from config.json"
            return f"{name} of vLLM {engine.version} cannot be {text or 'an empty text'}", f"write {expected}"
    return None


def check_value(engine: Options, name: str, option: Mapping[str, Any], text: str) -> str | None:
    """What the value must be, if it is not; types that the parser hides take any text."""
    if name in engine.named:
        known = {other.lower() for other in engine.named[name]}
        return None if text.lower() in known or text in ("", "None") else nearest_of(text, engine.named[name])
    kind, choices = option["type"], option["choices"]
    if choices is not None:
        spelled = text.lower().replace("-", "_") if kind == "<lambda>" else text
        names = [str(choice) for choice in choices]
        return None if spelled in names or ("None" in names and not text) else nearest_of(text, names)
    if kind in FORMS:
        pattern, expected = FORMS[kind]
        return None if re.fullmatch(pattern, text) else expected
    if kind == "loads" or (kind in JSON and text.lstrip().startswith("{")):
        return None if is_json(text) else "JSON in single quotes"
    return None


def is_json(text: str) -> bool:
    """Whether it is JSON, its numbers as vLLM takes them: 16k for 16000."""
    try:
        json.loads(re.sub(r"(?<![\w\".])([0-9]+(?:\.[0-9]+)?)[kKmMgGtT]\b", r"\1", text))
    except (ValueError, RecursionError):
        return False
    return True


def nearest_of(text: str, names: Sequence[str]) -> str:
    """The nearest name if one is near, then all of them."""
    close = difflib.get_close_matches(text.lower(), [name.lower() for name in names], n=1, cutoff=0.6)
    listed = ", ".join(name for name in names if name != "None")
    return f"{close[0]}? Valid: {listed}" if close else f"one of {listed}"
