"""On request: a real vLLM loads the finished artifact, reads text through it, and serves it as the profile says.

`verify` and `perplexity` read an artifact through libraries; what it is worth shows in the engine that will serve it.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from builder.answers import Answer, find_degeneration, read_chat, read_completion
from builder.endpoint import run_vllm_bench
from builder.engine import Engine, Reading, Refusal, average_losses, find_engine, read_artifacts
from builder.errors import BuildError, VerifyError, raise_all
from builder.files import digest, read_json, read_receipt, write_receipt
from builder.manifest import Serve
from builder.server import Server, find_port, run_server
from builder.serving import health_check_timeout_s, serve_command
from builder.stages import perplexity, verify
from builder.stages.stage import hold, is_current
from builder.stages.workspace import Workspace

RECEIPT: Final = "check-serving"
TOLERANCE: Final = 0.01  # between the perplexities of vLLM and of transformers; 0.0015 is the most seen on a CPU
SERVED_TOLERANCE: Final = 0.05  # between vLLM loaded plainly, and served with the profile's options
WORST: Final = 1.25  # perplexity beside the base's, from which an artifact is not called good
SERVED_WINDOWS: Final = 2
LONGEST_ANSWER: Final = 64  # tokens
BENCHMARK_S: Final = 1800
CPU_TOKENS: Final = 4096  # of context that a check on a CPU asks for, at most
CHAT: Final = "What is a list? Answer in two sentences."
COMPLETION: Final = "Return a list of"
ON_GPUS_ALONE: Final = (
    "attention-backend",
    "data-parallel-size",
    "enable-expert-parallel",
    "gpu-memory-utilization",
    "linear-backend",
    "moe-backend",
    "pipeline-parallel-size",
    "tensor-parallel-size",
)


def check_serving(workspace: Workspace, tell: Callable[[str], None] = print) -> dict[str, Any]:
    """Check a built release with a real vLLM, and leave a receipt. Returns what it came to.

    Raises BuildError if the release is not built or there is no vLLM, and VerifyError or Problems, after they are
    written down too, for what is wrong with the artifact or its profile.
    """
    clock, release = time.monotonic(), workspace.manifest.release
    name = workspace.manifest.name
    for stage in (verify.STAGE, perplexity.STAGE):
        if not is_current(workspace, stage):
            what = f"{name} is not built: {stage.name} has not been done, or what it reads has changed since"
            raise BuildError(what, str(workspace.folder), f"doit release:{name}")
    with hold(workspace):
        engine = find_engine(release.serve.python if release.serve else None)
        tell(f"  {engine}, {engine.python}")
        windows = gather_windows(workspace)
        result, problems = check_reading(workspace, engine, windows, tell)
        if "losses" in result:
            served, more = check_server(workspace, engine, windows, result.pop("losses"), tell)
            result["served"] = served
            problems += more
        folder = f"{workspace.folder.absolute()}/"  # the machine's own matter, and vLLM's words are published
        if "error" in result:
            result["error"] = result["error"].replace(folder, "")
        result |= {
            "engine": "vllm",
            "version": engine.version,
            "platform": engine.platform,
            "devices": list(engine.devices),
            "verdict": "failed" if problems else "good",
            "problems": [problem.what.replace(folder, "") for problem in problems],
            "payload_sha256": workspace.facts("assemble")["payload_sha256"],
            "asked_sha256": digest_asked(workspace),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - clock, 1),
        }
        record(workspace, result)
    raise_all(problems)
    return result


def record(workspace: Workspace, result: Mapping[str, Any]) -> None:
    """Leave the result where the card finds it: the latest of each version and kind of machine, for one payload."""
    latest = {identify(other): other for other in [*list_results(workspace), result]}
    facts = {"results": [latest[key] for key in sorted(latest)]}
    receipt = {"stage": RECEIPT, "key": digest(facts), "facts": facts, "circumstances": {}}
    write_receipt(workspace.receipt_path(RECEIPT), receipt)


def clean_check(workspace: Workspace, *, dry_run: bool) -> list[Path]:
    """Take away the receipt and what vLLM said; or only look. Returns what goes."""
    receipt, folder = workspace.receipt_path(RECEIPT), workspace.folder / RECEIPT
    removed = [path for path in (receipt, folder) if path.exists()]
    if removed and not dry_run:
        receipt.unlink(missing_ok=True)
        if folder.is_dir():
            shutil.rmtree(folder)
    return removed


def identify(result: Mapping[str, Any]) -> tuple[str, ...]:
    return (result["engine"], result["version"], result["platform"], *result["devices"])


def list_results(workspace: Workspace) -> list[dict[str, Any]]:
    """What engines made of this very payload, served and sampled as the manifest says now."""
    receipt = read_receipt(workspace.receipt_path(RECEIPT))
    results = receipt["facts"]["results"] if receipt else []
    if not results:
        return []
    wanted = workspace.facts("assemble")["payload_sha256"], digest_asked(workspace)
    return [result for result in results if (result["payload_sha256"], result.get("asked_sha256")) == wanted]


def digest_asked(workspace: Workspace) -> str:
    """The digest of what a check is about besides the payload: a changed profile is not a checked one."""
    release = workspace.manifest.release
    asked = {
        "serve": release.serve and release.serve.model_dump(mode="json", include={"args", "env", "served_name"}),
        "sampling": release.sampling and release.sampling.model_dump(mode="json", exclude={"notes"}),
        "perplexity": workspace.facts("perplexity"),
    }
    return digest(asked)


def gather_windows(workspace: Workspace) -> list[list[int]]:
    """The windows of the held-out text that `perplexity` measured on; none if the manifest gives no text."""
    from builder.perplexity import split_text

    measured, spec = workspace.facts("perplexity"), workspace.manifest.release.perplexity
    if spec is None or not measured["measured"]:
        return []
    where = workspace.manifest.where("perplexity", "path")
    text = workspace.manifest.resolve(spec.path)
    return split_text(text, workspace.base_folder(), measured["window"], where).windows


def find_first(workspace: Workspace) -> int:
    """The first token of a window that `perplexity` measured."""
    return max(1, len(workspace.facts("perplexity").get("beginning", [])))


# --- loaded, and read through -----------------------------------------------------------------------------------------


def check_reading(
    workspace: Workspace, engine: Engine, windows: Sequence[Sequence[int]], tell: Callable[[str], None]
) -> tuple[dict[str, Any], list[BuildError]]:
    """Load the artifact with every weight accounted for, and compare perplexities."""
    tell("  loading it with every weight accounted for" + (", reading held-out text" if windows else ""))
    log = workspace.folder / RECEIPT / "reading.log"
    measured = workspace.facts("perplexity")
    options = choose_options(workspace, engine)
    [found] = read_artifacts(engine, [workspace.artifact], windows, log, options, first=find_first(workspace))
    problems = judge_reading(found, measured if windows else None, workspace.artifact)
    if isinstance(found, Refusal):
        return {"error": found.error}, problems
    result: dict[str, Any] = {
        "kernels": dict(found.kernels),
        "load_seconds": round(found.seconds, 1),
        "peak_bytes": found.peak_bytes,
        "losses": found.losses,
        "perplexity": None,
    }
    if windows:
        result["perplexity"] = {
            "vllm": found.perplexity if math.isfinite(found.perplexity) else None,
            "transformers": measured["artifact"],
            "base": measured["base"],
            "num_tokens": measured["num_tokens"],
            "window": measured["window"],
            "tolerance": TOLERANCE,
        }
        others = f"transformers {measured['artifact']:.3f}, base {measured['base']:.3f}"
        tell(f"  perplexity {found.perplexity:.3f} ({others})")
    tell(f"  kernels: {', '.join(f'{count} x {kernel}' for kernel, count in found.kernels.items())}")
    return result, problems


def judge_reading(found: Reading | Refusal, expected: Mapping[str, float] | None, artifact: Path) -> list[BuildError]:
    """What vLLM's reading says against an artifact.

    expected: the perplexities that transformers reads, of the `artifact` and of the `base`; None if no text is read.
    """
    where = str(artifact)
    if isinstance(found, Refusal):
        return [VerifyError(f"vLLM does not load it: {found.error}", where, "build the release again, and verify it")]
    if expected is None:
        return []
    ours, theirs = found.perplexity, expected["artifact"]
    problems: list[BuildError] = []
    if not abs(ours / theirs - 1) <= TOLERANCE:
        what = f"vLLM reads a perplexity of {ours:.3f}, transformers {theirs:.3f}: more than {TOLERANCE:.0%} apart"
        fix = "see which tensors vLLM reads otherwise: scales, their direction, those of fused linears"
        problems.append(VerifyError(what, where, fix))
    if not ours <= WORST * expected["base"]:
        what = f"vLLM reads a perplexity of {ours:.3f}, more than {WORST} times the base's {expected['base']:.3f}"
        problems.append(VerifyError(what, where, "choose another scheme, or see whether its scales are sound"))
    return problems


def choose_options(workspace: Workspace, engine: Engine) -> dict[str, Any]:
    """What the profile says about the machine, for vLLM's LLM class."""
    serve = workspace.manifest.release.serve
    if engine.on_cpu or serve is None:
        return {}
    kinds: dict[str, Callable[[str], Any]] = {"tensor_parallel_size": int, "gpu_memory_utilization": float}
    args = {name.replace("-", "_"): value for name, value in serve.args.items()}
    return {name: kind(str(args[name])) for name, kind in kinds.items() if name in args}


# --- served -----------------------------------------------------------------------------------------------------------


def check_server(
    workspace: Workspace,
    engine: Engine,
    windows: Sequence[Sequence[int]],
    losses: Sequence[Sequence[float]],
    tell: Callable[[str], None],
) -> tuple[dict[str, Any], list[BuildError]]:
    """Start the server as the profile says, ask it, measure its speed, and stop it."""
    release, folder = workspace.manifest.release, workspace.folder / RECEIPT
    served_name = (release.serve and release.serve.served_name) or release.repo.rpartition("/")[2]
    plan = workspace.facts("plan")
    context = plan["numbers"].get("max_position_embeddings")
    profile, adapted = adapt_profile(release.serve, engine, workspace.artifact, context)
    words = serve_command(profile, served_name=served_name, where=workspace.manifest.where)
    words = words[words.index("serve") :]
    for line in adapted:
        tell(f"  for this machine: {line}")
    shown = ["artifact" if word == profile.model_path else word for word in words]  # paths are the machine's own matter
    result: dict[str, Any] = {"words": ["vllm", *shown], "adapted": adapted}
    tell(f"  starting the server: vllm {' '.join(shown)}")
    timeout_s = health_check_timeout_s(plan["num_bytes"])
    running = run_server(
        engine,
        words,
        port=profile.port,
        served_name=served_name,
        variables=profile.env,
        timeout_s=timeout_s,
        log=folder / "server.log",
    )
    try:
        with running as server:
            tell(f"  ready after {server.seconds:.0f} s")
            result |= {"start_seconds": round(server.seconds, 1), "timeout_seconds": timeout_s}
            result["perplexity"], problems = check_served_text(server, windows[:SERVED_WINDOWS], losses)
            answers = ask_both(workspace, server)
            result["answers"] = [describe_answer(answer) for answer in answers]
            for answer in answers:
                tell(f"  {answer.kind}: {' '.join(answer.text.split())[:100]!r}")
                if wrong := find_degeneration(answer):
                    what = f"the answer to a {answer.kind} request {wrong}"
                    problems.append(VerifyError(what, str(server.log), f"asked was {answer.prompt!r}"))
            size = (4, 32, 32) if engine.on_cpu else (16, 256, 128)
            result["speed"] = measure_speed(engine, server, workspace, size)
            speed = result["speed"]
            told = f"first token after {speed['ttft_ms']:.0f} ms, {speed['tokens_per_s']:.1f} tokens/s"
            tell(f"  {told}, one request at a time")
    except VerifyError as error:
        return result, [error]
    return result, problems


def adapt_profile(serve: Serve | None, engine: Engine, artifact: Path, context: int | None) -> tuple[Serve, list[str]]:
    """The profile as this machine can run it, and in words what was changed besides the address and the folder.

    Raises BuildError if it asks for more GPUs than there are.
    """
    given = serve or Serve(version=engine.version, model_path=str(artifact))
    args, adapted = dict(given.args), []
    if serve is None:
        adapted.append("vLLM's defaults, for the manifest has no serve profile")
    if engine.on_cpu:
        dropped = [name for name in ON_GPUS_ALONE if args.pop(name, None) is not None]
        if dropped:
            adapted.append(f"without {', '.join(dropped)}, for GPUs alone")
        wanted = args.get("max-model-len")
        fits = min(CPU_TOKENS, context or CPU_TOKENS)
        if not str(wanted).isdigit() or int(str(wanted)) > fits:
            args["max-model-len"] = str(fits)
            instead = f" instead of {wanted}" if wanted else ""
            adapted.append(f"max-model-len {fits}{instead}, which fits a check on a CPU")
        args["enforce-eager"] = True
        adapted.append("enforce-eager, for nothing is compiled for a check")
    else:
        num_gpus = math.prod(int(str(args.get(f"{kind}-parallel-size", 1))) for kind in ("tensor", "pipeline"))
        if num_gpus > len(engine.devices):
            raise BuildError(
                f"the serve profile asks for {num_gpus} GPUs, and vLLM sees {len(engine.devices)} here",
                "serve.args",
                "check on the machine that is going to serve it",
            )
    changed = {"args": args, "model_path": str(artifact.absolute()), "host": "127.0.0.1", "port": find_port()}
    return given.model_copy(update=changed), adapted


def check_served_text(
    server: Server, windows: Sequence[Sequence[int]], losses: Sequence[Sequence[float]]
) -> tuple[float | None, list[BuildError]]:
    """The same text through the server: its options, such as an 8-bit KV cache, must cost next to nothing."""
    if not windows:
        return None, []
    served, plain = [], []
    for window, known in zip(windows, losses, strict=False):
        first = len(window) - len(known)
        tokens = list(window[: server.context - 1])
        reply = server.ask("/v1/completions", {"prompt": tokens, "max_tokens": 1, "echo": True, "logprobs": 0})
        with explain_reply(server):
            told = reply["choices"][0]["prompt_logprobs"][first:]
            values = [entry[str(token)]["logprob"] for token, entry in zip(tokens[first:], told, strict=True)]
        served.append([math.nan if value is None else -float(value) for value in values])
        plain.append(list(known[: len(values)]))
    ours, theirs = average_losses(served), average_losses(plain)
    if abs(ours / theirs - 1) <= SERVED_TOLERANCE:
        return ours, []
    what = (
        f"the server reads a perplexity of {ours:.3f} where vLLM without its options reads {theirs:.3f}: "
        f"more than {SERVED_TOLERANCE:.0%} apart"
    )
    fix = "see which option of the serve profile costs that much, kv-cache-dtype first"
    return ours if math.isfinite(ours) else None, [VerifyError(what, str(server.log), fix)]


@contextmanager
def explain_reply(server: Server) -> Iterator[None]:
    """Turn what goes wrong where a reply lacks what was asked for into a VerifyError."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        what = f"the server's reply lacks what was asked for: {type(error).__name__}: {error}"
        raise VerifyError(what, str(server.log), "see what the server says there") from error


def ask_both(workspace: Workspace, server: Server) -> list[Answer]:
    """A chat, if the model has a template for one, and a completion, with the recommended sampling."""
    release = workspace.manifest.release
    sampling = release.sampling.model_dump(exclude={"notes"}, exclude_none=True) if release.sampling else {}
    length = min(int(sampling.pop("max_tokens", LONGEST_ANSWER)), LONGEST_ANSWER, max(1, server.context // 2))
    common = {**sampling, "max_tokens": length, "seed": 0}
    answers = []
    if has_chat_template(workspace.artifact):
        messages = [{"role": "user", "content": CHAT}]
        reply = server.ask("/v1/chat/completions", {**common, "messages": messages, "logprobs": True})
        with explain_reply(server):
            answers.append(read_chat(CHAT, reply))
    reply = server.ask("/v1/completions", {**common, "prompt": COMPLETION, "logprobs": 0})
    with explain_reply(server):
        answers.append(read_completion(COMPLETION, reply))
    return answers


def has_chat_template(artifact: Path) -> bool:
    config = read_json(artifact / "tokenizer_config.json") or {}
    return bool(config.get("chat_template")) or (artifact / "chat_template.jinja").is_file()


def describe_answer(answer: Answer) -> dict[str, Any]:
    described = dataclasses.asdict(answer)
    del described["tokens"], described["logprobs"]
    return {**described, "num_tokens": len(answer.tokens)}


def measure_speed(engine: Engine, server: Server, workspace: Workspace, size: tuple[int, int, int]) -> dict[str, Any]:
    """Medians of `vllm bench serve`: ms to the first token, tokens a second, one request at a time.

    Raises VerifyError if the benchmark fails, or a request of it.
    """
    num_prompts, *lengths = size
    prompt, output = (min(length, server.context // 4) for length in lengths)
    try:
        load = run_vllm_bench(
            str(engine.python),
            server.address,
            (prompt, output),
            tokenizer=str(workspace.artifact.absolute()),
            num_prompts=num_prompts,
            single=True,
            file=workspace.folder / RECEIPT / "benchmark.json",
            model=server.served_name,
            timeout_s=BENCHMARK_S,
        )
    except BuildError as error:
        raise VerifyError(error.what, error.where, error.fix) from error
    if load.num_failed:
        what = f"{load.num_failed} of {num_prompts} requests of the benchmark failed"
        raise VerifyError(what, str(server.log), "see what the server says there")
    return {
        "ttft_ms": load.first_token_ms,
        "tokens_per_s": load.output_tokens_per_s,
        "num_prompts": num_prompts,
        "prompt_tokens": prompt,
        "output_tokens": output,
    }
