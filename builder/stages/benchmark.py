"""A measurement of a release that is being served; no stage, for it decides nothing, and on request alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from builder.benchmarks import Load, read_size
from builder.endpoint import run_vllm_bench
from builder.engine import find_python
from builder.errors import BuildError
from builder.manifest import show_path
from builder.serving import reachable
from builder.stages.workspace import Workspace


def benchmark(
    workspace: Workspace, *, url: str, size: str, num_prompts: int, single: bool, of_base: bool
) -> tuple[Load, str]:
    """Measure one use of a served model, and keep the result beside the manifest.

    url: of the server; the serve profile's own if empty. size: `256/128`, prompt and output tokens.
    Returns what came out, and the entry of `benchmarks` that puts it on the card.
    Raises BuildError for what is wrong with the request, the server or the benchmark.
    """
    manifest, serve = workspace.manifest, workspace.manifest.release.serve
    tokens = [part.strip() for part in size.split("/")]
    if len(tokens) != 2 or not all(part.isdecimal() and int(part) for part in tokens) or num_prompts < 1:
        fix = "write for example --size=1024/128 --prompts=50, prompt and output tokens of each request"
        raise BuildError(f"{num_prompts} prompts of size {size} cannot be sent", "the command line", fix)
    url = url or (f"http://{reachable(serve.host)}:{serve.port}" if serve else "")
    if not url:
        fix = "add serve: to the manifest, or give --url=http://HOST:PORT"
        raise BuildError(f"{manifest.name} does not say how it is served", show_path(manifest.path), fix)
    ours = (serve.served_name if serve else None) or manifest.release.repo.rpartition("/")[2]
    side = "base" if of_base else "quantized"
    kind = "one" if single else "many"
    file = manifest.path.parent / manifest.name / f"speed-{side}-{'-'.join(tokens)}-{kind}.json"
    load = run_vllm_bench(
        str(find_python(serve.python if serve else None)),
        url,
        read_size("/".join(tokens)),
        tokenizer=find_tokenizer(workspace, of_base=of_base),
        num_prompts=num_prompts,
        single=single,
        file=file,
        model="" if of_base else ours,
    )
    entry: dict[str, Any] = {
        "file": file.relative_to(manifest.path.parent).as_posix(),
        "model": side,
        "gpu": "GPU",
        "num_gpus": 1,
    }
    return load, yaml.safe_dump([entry], default_flow_style=None, sort_keys=False, width=200).strip()


def find_tokenizer(workspace: Workspace, *, of_base: bool) -> str:
    """A folder with the tokenizer that the prompts are counted with, or else a Hub id."""
    release = workspace.manifest.release
    folders = [workspace.artifact, *([Path(release.serve.model_path)] if release.serve else [])]
    if of_base and release.base.path:
        folders.insert(0, workspace.manifest.resolve(release.base.path))
    found = [folder for folder in folders if (folder / "tokenizer_config.json").is_file()]
    hub = release.base.model if of_base else release.repo
    return str(found[0].absolute()) if found else str(hub)
