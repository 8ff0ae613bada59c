"""Serve profile -> a service of the host: a compose file, and the words of a systemd unit."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import yaml

from builder.manifest import Serve
from builder.serving import dotted, environment, is_folder, name_image, serve_words

PLAIN_WORD = re.compile(r"[A-Za-z0-9_./:=,@+-]+", re.ASCII)


class Quoted(str):
    """Text that YAML shows in double quotes: plain, one reader's text is another's number."""


class ComposeDumper(yaml.SafeDumper):
    """Writes Quoted in double quotes."""


ComposeDumper.add_representer(
    Quoted, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", str(text), style='"')
)


def compose_yaml(serve: Serve, *, name: str, served_name: str, where: Callable[..., str] = dotted) -> str:
    """A docker compose file with one service, on the host's network, for docker reads ports as it likes.

    name: of the release, names the project. A model that is no absolute path is a Hub id, kept in a volume.
    Raises ManifestError for a value that would not arrive as it is written.
    """
    words = serve_words(serve, served_name, where, str(serve.port))
    variables = [f"{name}={value}" for name, value in environment(serve, where=where)]
    volume: dict[str, Any] = {"type": "volume", "source": "huggingface", "target": "/root/.cache/huggingface"}
    if is_folder(serve):
        path = spell(serve.model_path)
        volume = {"type": "bind", "source": path, "target": path, "read_only": True}
    gpus = {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    service = {
        "image": spell(name_image(serve, where)),
        "entrypoint": ["vllm"],
        "command": [spell(word) for word in words],
        "environment": [spell(variable) for variable in variables],
        "volumes": [volume],
        "network_mode": "host",
        "ipc": "host",
        "init": True,
        "restart": "unless-stopped",
        "deploy": {"resources": {"reservations": {"devices": [gpus]}}},
    }
    content: dict[str, Any] = {
        "name": name_project(name),
        "services": {"vllm": {key: value for key, value in service.items() if value != []}},
    }
    if not is_folder(serve):
        content["volumes"] = {"huggingface": {}}
    return yaml.dump(content, Dumper=ComposeDumper, sort_keys=False, allow_unicode=True, width=math.inf)


def spell(text: str) -> Quoted:
    """A value as compose's interpolation leaves it: every dollar sign twice."""
    return Quoted(text.replace("$", "$$"))


def name_project(name: str) -> str:
    """The release's name in the letters that compose allows."""
    return re.sub(r"[^a-z0-9_-]", "-", name.lower())


def quote_systemd(text: str) -> str:
    """A word of a unit file, for `Environment=`, and for `ExecStart=:`, which leaves dollar signs alone."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return text if PLAIN_WORD.fullmatch(text) else f'"{escaped}"'
