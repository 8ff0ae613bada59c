"""Loads each artifact of a job with every weight accounted for, and reads held-out text through it.

Called with two paths: of the job {"folders": [...], "windows": [[token ids], ...], "first": 1, "options": {...of LLM}},
and of the results, one to a folder: {"seconds", "peak_bytes", "kernels", "losses"}, or {"error"} where vLLM refused the
artifact. The losses of a window are the negative log-likelihoods of its tokens from the first that is measured on; null
where one is not finite.
"""

import gc
import json
import math
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any


def read_artifact(folder: str, windows: list[list[int]], first: int, options: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    started = time.monotonic()
    engine = LLM(
        folder,
        enforce_eager=True,
        enable_prefix_caching=False,
        model_loader_extra_config={"enable_weights_track": True},
        **options,
    )
    try:
        seconds = time.monotonic() - started
        prompts = [{"prompt_token_ids": window} for window in windows]
        asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
        answers = engine.generate(prompts, asked, use_tqdm=False) if prompts else []
        losses = []
        for window, answer in zip(windows, answers, strict=True):
            told = zip(window[first:], answer.prompt_logprobs[first:], strict=True)
            found = [-logprobs[token].logprob for token, logprobs in told]
            losses.append([loss if math.isfinite(loss) else None for loss in found])
        kernels = engine.apply_model(count_kernels)[0]
    finally:
        engine.llm_engine.engine_core.shutdown()
        del engine
        gc.collect()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "peak_bytes": peak, "kernels": kernels, "losses": losses}


def count_kernels(model: Any) -> dict[str, int]:
    """What multiplies: the names of the linears' methods and kernels, and how many linears have each."""
    found: Counter[str] = Counter()
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is not None and hasattr(module, "input_size") and not hasattr(module, "num_embeddings"):
            owners = [owner for owner in (getattr(module, "scheme", None), method) if owner is not None]
            inner = [value for owner in owners for value in vars(owner).values()]
            kernels = [type(value).__name__ for value in inner if type(value).__name__.endswith("Kernel")]
            found[" ".join(dict.fromkeys([type(owners[0]).__name__, *kernels]))] += 1
    return dict(found)


def main(job_path: str, results_path: str) -> None:
    job, results = json.loads(Path(job_path).read_text()), []
    for folder in job["folders"]:
        try:
            results.append(read_artifact(folder, job["windows"], job["first"], job["options"]))
        except Exception as error:  # whatever vLLM says of this artifact is the result
            results.append({"error": f"{type(error).__name__}: {error}"})
        Path(results_path).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
