"""What others do with the same base, each run as a process of its own and measured from outside.

    python tests/benchmarks/peers.py PEER BASE ROWS TARGET

PEER: forward | modelopt-weights | modelopt-calibrated | llm-compressor. ROWS: JSON lines of token ids.
`forward` prints the seconds of its forward passes alone, after a first one to warm up.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def load_model(base: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()


def read_rows(path: str) -> list[Any]:
    import torch

    return [torch.tensor([json.loads(line)]) for line in Path(path).read_text().splitlines()]


def run_rows(model: Any, rows: list[Any]) -> None:
    import torch

    with torch.inference_mode():
        for row in rows:
            model(row, use_cache=False)


def forward(base: str, rows: str, target: str) -> None:
    """The decoder layers alone, without lm_head: what calibration cannot do without."""
    model, tokens = load_model(base).model, read_rows(rows)
    run_rows(model, tokens[:1])
    started = time.perf_counter()
    run_rows(model, tokens)
    print(json.dumps({"forward_s": time.perf_counter() - started}))


def modelopt_weights(base: str, rows: str, target: str) -> None:
    """NVFP4 of the weights alone: nothing is run through the model."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    model = load_model(base)
    mtq.quantize(model, mtq.W4A16_NVFP4_CFG)
    export_hf_checkpoint(model, export_dir=target)


def modelopt_calibrated(base: str, rows: str, target: str) -> None:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    model, tokens = load_model(base), read_rows(rows)
    mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, lambda model: run_rows(model, tokens))
    export_hf_checkpoint(model, export_dir=target)


def llm_compressor(base: str, rows: str, target: str) -> None:
    """FP8_DYNAMIC as its own example does it; needs an environment of its own."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    recipe = QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"])
    oneshot(model=base, recipe=recipe, output_dir=target)


PEERS = {
    "forward": forward,
    "modelopt-weights": modelopt_weights,
    "modelopt-calibrated": modelopt_calibrated,
    "llm-compressor": llm_compressor,
}

if __name__ == "__main__":
    PEERS[sys.argv[1]](*sys.argv[2:])
