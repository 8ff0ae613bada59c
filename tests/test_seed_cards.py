"""Whatever the two published cards that this project began with say has a place on ours, or a reason why it has none.

A card is "nvfp4", the better release of the first; "published", its recipe to the byte; "fp8", the second; "swap", the
llama-swap entry of "nvfp4"; all as previews. "built" is the card of a miniature with the shape of the first, 80 layers.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import build

from builder.manifest import load_manifest
from builder.stages import Workspace
from builder.stages.preview import preview

ROOT = Path(__file__).parents[1]
RELEASES = {
    "nvfp4": "deepseek-r1-70b",
    "published": "deepseek-r1-70b-as-published",
    "fp8": "deepseek-r1-70b-fp8-dynamic",
}


class Told(NamedTuple):
    """A fact of theirs and the pattern by which ours has it. otherwise: what was wrong with theirs."""

    section: str
    fact: str
    card: str
    pattern: str
    otherwise: str = ""


class Left(NamedTuple):
    """A fact of theirs that ours does not have, and why."""

    section: str
    fact: str
    reason: str


NVFP4_SECTIONS = (
    "Title", "Quick facts", "Why this exists", "Quantization pipeline", "Performance", "Usage: vLLM",
    "Usage: llama-swap", "Recommended sampling", "Files", "Fixes", "Acknowledgments", "License", "Status",
    "The Hub's own box",
)  # fmt: skip
NVFP4: tuple[Told | Left, ...] = (
    Told("Title", "model and format", "nvfp4", r"^# DeepSeek-R1-Distill-Llama-70B — NVFP4$"),
    Told("Title", "Built with Llama, on top", "nvfp4", r"---\n\n\*\*Built with Llama\*\*\n\n# "),
    Told(
        "Title", "NVFP4, W4A4, of which base", "nvfp4", r"NVFP4 \(W4A4\) quantization of \[deepseek-ai/DeepSeek-R1-Dis"
    ),
    Told("Title", "groups of 16", "nvfp4", r"4-bit floats \(E2M1\) in blocks of 16, with an FP8 scale to each block"),
    Told("Title", "made by two nodes", "nvfp4", r"One decoder layer at a time, the layers in 2 shards"),
    Told("Title", "which hardware made it", "built", r"^Machine: .+ cores\."),
    Left(
        "Title", "the first public NVFP4 of it, so many downloads", "of a day and of the Hub: no build can measure it"
    ),
    Told(
        "Quick facts", "base model", "nvfp4", r"\| Base model \| \[deepseek-ai/DeepSeek-R1-Distill-Llama-70B\]\(https"
    ),
    Told("Quick facts", "a Llama 3.3 distilled from R1", "nvfp4", r"^- Llama 3\.3 Community License Agreement$"),
    Told("Quick facts", "architecture, layers", "nvfp4", r"\| Architecture \| `LlamaForCausalLM`, 80 layers \|"),
    Told("Quick facts", "hidden size", "nvfp4", r"hidden size 8192,"),
    Told("Quick facts", "heads", "nvfp4", r"attention heads 64, key/value heads 8, head dimension 128"),
    Told("Quick facts", "original size", "nvfp4", r"\| Original size \| 141 GB \|", "132 are GiB, and called GB"),
    Told("Quick facts", "quantized size", "nvfp4", r"\| Quantized size \| 42\.7 GB in", "40 are GiB, and called GB"),
    Told("Quick facts", "format", "nvfp4", r"\| Format \| NVFP4 \(W4A4\), 560 linears \|"),
    Told(
        "Quick facts", "made with modelopt 0.43.0", "published", r"The configs name modelopt 0\.43\.0 as their producer"
    ),
    Told("Quick facts", "layout", "nvfp4", r"\| Layout \| `compressed-tensors` \|"),
    Told(
        "Quick facts",
        "the published files' layout",
        "published",
        r"\| Layout \| `modelopt` \|",
        "called compressed-tensors, while names and configs of the files are modelopt's",
    ),
    Told("Quick facts", "lm_head stays", "nvfp4", r"\| Kept as in the base \| `lm_head` and all that is no linear"),
    Told("Quick facts", "KV cache", "nvfp4", r"\| KV cache \| `fp8`, chosen when serving \|"),
    Told("Quick facts", "calibration data", "nvfp4", r"\| 256 rows of \[abisee/cnn_dailymail\]"),
    Told("Quick facts", "lengths of the rows", "nvfp4", r"\| Calibration rows \| 150 to 1200 tokens each"),
    Told(
        "Quick facts",
        "what calibrating did to the published files",
        "published",
        r"\| Calibration \| none: no activations",
        "256 rows were run, and nothing that was measured on them is in the files",
    ),
    Told("Quick facts", "date", "built", r"\| Date \| \d{4}-\d\d-\d\d \|"),
    Told("Why this exists", "fits one DGX Spark", "nvfp4", r"^A reasoning model .* fits a single DGX Spark of 128 GB"),
    Told("Why this exists", "room for long chains of thought", "nvfp4", r"at most 61\.7 GB, room for 376,857 tokens"),
    Told("Why this exists", "by the tool that makes the larger ones", "built", r"release-builder \d+\.\d+"),
    Told("Why this exists", "no whole model in memory is needed", "nvfp4", r"^One decoder layer at a time"),
    Told("Why this exists", "reproducible", "nvfp4", r"^## Reproduce\n\n.*the same files again, bit for bit"),
    Left("Why this exists", "where the pipeline is published", "another program; this one is named with its version"),
    Told(
        "Quantization pipeline",
        "40 layers for each of two",
        "nvfp4",
        r"\| 1 \| 0 to 39 \| 280 \|\n\| 2 \| 40 to 79 \| 280 \|",
    ),
    Told(
        "Quantization pipeline",
        "calibrates layer by layer",
        "nvfp4",
        r"`calibrate`: largest magnitudes measured on the unq",
    ),
    Told(
        "Quantization pipeline",
        "one-layer export template",
        "published",
        r"which is an export template's and not the base",
    ),
    Told(
        "Quantization pipeline",
        "use_cache=False",
        "published",
        r"^- config\.json says use_cache: false",
        "left in the files",
    ),
    Told("Quantization pipeline", "layers renumbered", "nvfp4", r"`renumber-layers`"),
    Told("Quantization pipeline", "lm_head out of the config", "nvfp4", r"`keep-lm-head-bf16`"),
    Told(
        "Quantization pipeline",
        "input scales of 1",
        "published",
        r"^- The input scales are the constant 1; a new release mea",
    ),
    Told(
        "Quantization pipeline",
        "input scales that were measured",
        "nvfp4",
        r"Every quantized linear has an input scale",
        "vLLM needs them to be there, and 1 is not what they are",
    ),
    Told(
        "Quantization pipeline", "health of shard 0", "built", r"\| 1 \| 0 to 39 \| 280 \| 280 of 280 \| 0 / 0 / 0 \|"
    ),
    Told(
        "Quantization pipeline", "health of shard 1", "built", r"\| 2 \| 40 to 79 \| 280 \| 280 of 280 \| 0 / 0 / 0 \|"
    ),
    Told(
        "Quantization pipeline",
        "times of the stages",
        "built",
        r"\| `quantize` \| .+ \| 2 jobs, `in_process`.* \| [\d.]+ m?s",
    ),
    Told("Quantization pipeline", "time in all", "built", r"\| \*\*Total\*\* \| \| \| \*\*[\d.]+ (s|min)"),
    Left("Quantization pipeline", "modelopt's calls, Ray, eviction to disk", "how it is done, here by other means"),
    Left("Quantization pipeline", "the addresses of its network", "a matter of the publisher's hosts"),
    Told("Performance", "not measured yet", "nvfp4", r"Serving speed: not measured\."),
    Told(
        "Performance",
        "what to expect on a Spark",
        "nvfp4",
        r"^Computed from the plan(.|\n)*^\| 1 \| yes \| 6\.7 \| 5\.9 \|$",
        "guessed from other models; this is what the memory's bandwidth allows at most",
    ),
    Left("Performance", "tokens per second of other releases", "not of this model; each has a card of its own"),
    Told("Performance", "quality is kept", "nvfp4", r"Perplexity: not measured\.", "claimed, and measured by nothing"),
    Told(
        "Performance", "reasoning of the base is kept", "nvfp4", r"Scores on the base model's card are the base model's"
    ),
    Told("Usage: vLLM", "the command", "nvfp4", r"^vllm serve Kaleto/DeepSeek-R1-Distill-Llama-70B-NVFP4 \\$"),
    *(
        Told("Usage: vLLM", option, "nvfp4", rf"^  --{option}( \\)?$")
        for option in (
            "served-model-name DeepSeek-R1-Distill-Llama-70B-NVFP4",
            "attention-backend flashinfer",
            "dtype auto",
            "kv-cache-dtype fp8",
            "max-model-len 32768",
            "max-num-seqs 4",
            r"gpu-memory-utilization 0\.80",
            "enable-chunked-prefill",
            "enable-prefix-caching",
            "port 9007",
        )
    ),
    Told(
        "Usage: vLLM",
        "Marlin",
        "nvfp4",
        r"^  --linear-backend marlin \\$",
        "by VLLM_NVFP4_GEMM_BACKEND and VLLM_TEST_FORCE_FP8_MARLIN, which vLLM no longer knows",
    ),
    Told("Usage: vLLM", "atomic additions", "nvfp4", r"^VLLM_MARLIN_USE_ATOMIC_ADD=1 \\$"),
    Told(
        "Usage: vLLM",
        "the format",
        "nvfp4",
        r"^vLLM reads the format from config\.json",
        "by --quantization, which decides nothing beside what the files say",
    ),
    Told("Usage: vLLM", "share of the memory, room that is left", "nvfp4", r"in 104 GB, a share of 0\.80;"),
    Told(
        "Usage: vLLM", "four sequences of 32k fit", "nvfp4", r"\| Sequences \| 11 at a time with 32,768 tokens each \|"
    ),
    Told("Usage: llama-swap", "an entry", "nvfp4", r"entry for \[llama-swap\]"),
    Told("Usage: llama-swap", "name", "swap", r"^  DeepSeek-R1-Distill-Llama-70B-NVFP4:$"),
    Told("Usage: llama-swap", "proxy", "swap", r"^    proxy: http://127\.0\.0\.1:9007$"),
    Told("Usage: llama-swap", "ttl", "swap", r"^    ttl: 0$"),
    Told("Usage: llama-swap", "checkEndpoint", "swap", r"^    checkEndpoint: /health$"),
    Told("Usage: llama-swap", "env", "swap", r"^    env:\n    - VLLM_MARLIN_USE_ATOMIC_ADD=1$"),
    Told("Usage: llama-swap", "host", "swap", r"^      --host 127\.0\.0\.1$"),
    Told(
        "Usage: llama-swap",
        "cmd",
        "swap",
        r"^    cmd: >-\n      /opt/vllm/bin/vllm serve /models/",
        "by a module of the server instead of its command",
    ),
    Told(
        "Usage: llama-swap", "time to load", "swap", r"^healthCheckTimeout: \d+$", "absent: it ends after two minutes"
    ),
    Left("Usage: llama-swap", "--trust-remote-code", "runs whatever code a repository holds, and this one holds none"),
    Told("Recommended sampling", "temperature", "nvfp4", r"^- `temperature`: 0\.6$"),
    Told("Recommended sampling", "top_p", "nvfp4", r"^- `top_p`: 0\.95$"),
    Told("Recommended sampling", "no system prompt", "nvfp4", r"^- Avoid system prompts"),
    Told(
        "Recommended sampling",
        "thinking is not capped, 4096",
        "nvfp4",
        r"^- Let the \\<think\\> block .* 4096 tokens and more",
    ),
    Told("Files", "8 weight files", "published", r"\| `model-00001-of-00008\.safetensors` \| 5\.\d+ GB \|"),
    Told("Files", "about 40 GB", "published", r"\| Quantized size \| 42\.7 GB in 8 weight files \|"),
    Told("Files", "2,403 keys", "published", r"^2403 tensors in 8 weight files\.$"),
    Told(
        "Files",
        "every file with its size",
        "built",
        r"\| `model\.safetensors\.index\.json` \| [\d.]+ kB \| `[0-9a-f]{12}` \|",
    ),
    Told("Files", "hf_quant_config.json", "built", r"\| `hf_quant_config\.json` \|"),
    Told(
        "Files",
        "generation_config.json",
        "published",
        r"^- generation_config\.json is an export template's",
        "not the base's",
    ),
    Told("Files", "tokenizer", "published", r"only these are taken along: tokenizer\.json, tokenizer_config\.json"),
    Told(
        "Files",
        "lm_head in the config's ignore",
        "published",
        r"hf_quant_config\.json does not say that lm_head is left out",
    ),
    Left(
        "Files",
        "tiktoken, no tokenizer.model",
        "tokenizer.json is in the format of tokenizers; what is absent is unlisted",
    ),
    Told("Fixes", "1: vocabulary of the template", "published", r"`template-vocab-size`"),
    Told("Fixes", "2: token ids of the template", "published", r"`template-token-ids`"),
    Told("Fixes", "3: calibrators are kept", "published", r"`keep-calibrator`"),
    Told("Fixes", "4: input scales are there", "published", r"`inject-input-scale`"),
    Told("Fixes", "5: activations are called dynamic", "published", r"`dynamic-input-activations`"),
    Told("Fixes", "6: numbers of the base's config", "published", r"`restore-config`"),
    Told(
        "Fixes",
        "and what became of each",
        "built",
        r"`restore-config`\) \| not needed \| config\.json says of the model",
    ),
    Told("Fixes", "three more for more than two shards", "nvfp4", r"`reset-layer-index`(.|\n)*`keep-edges-once`"),
    *(
        Told("Acknowledgments", name, "nvfp4", rf"^## Acknowledgments\n(.|\n)*^- .*{name}")
        for name in ("DeepSeek-AI", "Avarok-Cybersecurity", "entrpi and antirez", "saricles", "NVIDIA", "vLLM project")
    ),
    Told("License", "MIT", "nvfp4", r"^- MIT License$"),
    Told("License", "in the front matter", "nvfp4", r"^license_name: mit-and-llama3\.3$", "MIT alone, of a Llama"),
    Told(
        "License",
        "the notice of Llama",
        "nvfp4",
        r"^> Llama 3\.3 is licensed under .* All Rights Reserved\.$",
        "missing",
    ),
    Told("License", "the use policy", "nvfp4", r"\[Llama 3\.3 Acceptable Use Policy\]\(https", "missing"),
    Told(
        "License",
        "what was changed",
        "nvfp4",
        r"^This work modifies deepseek-ai/.*: its weights were quantized",
        "missing",
    ),
    Told("License", "the texts", "nvfp4", r"`LICENSE`, `LICENSE\.llama3\.3`, `NOTICE`\.$", "missing"),
    Left("License", "the pipeline's own licence", "of a program, not of the files here"),
    Left(
        "Status", "a single author, who wants to hear of issues", "the publisher's own words: `card.notes` holds them"
    ),
    Told("The Hub's own box", "base, and that it is quantized", "nvfp4", r"^base_model_relation: quantized$"),
    Told(
        "The Hub's own box", "parameters", "nvfp4", r"\| Parameters \| 70\.6 billion \|", "41 B: packed codes counted"
    ),
    Left("The Hub's own box", "downloads, types, providers", "the Hub makes them of files and visits"),
)

FP8_SECTIONS = (
    "Front matter", "Model overview", "Model optimizations", "Use with vLLM", "Creation", "Evaluation", "Accuracy",
    "Inference performance", "Single-stream performance", "Multi-stream performance",
)  # fmt: skip
USES = (
    "Instruction following, 256 / 128", "Multi-turn chat, 512 / 256", "Docstring generation, 768 / 128",
    "RAG, 1024 / 128", "Code completion, 256 / 1024", "Code fixing, 1024 / 1024", "Large summarization, 4096 / 512",
    "Large RAG, 10240 / 1536",
)  # fmt: skip
FP8: tuple[Told | Left, ...] = (
    Told("Front matter", "licence", "fp8", r"^license_name: mit-and-llama3\.3$", "MIT alone, of a Llama"),
    Told("Front matter", "Built with Llama", "fp8", r"^\*\*Built with Llama\*\*$", "missing"),
    Told("Front matter", "tags", "fp8", r"^- fp8_dynamic\n(- .*\n)*- vllm$"),
    Told("Front matter", "base model", "fp8", r"^base_model: deepseek-ai/DeepSeek-R1-Distill-Llama-70B$"),
    Told("Front matter", "library", "fp8", r"^library_name: transformers$"),
    Told("Model overview", "architecture", "fp8", r"\| Architecture \| `LlamaForCausalLM`"),
    Told("Model overview", "text in, text out", "fp8", r"^pipeline_tag: text-generation$"),
    Told(
        "Model overview", "weights and activations in FP8", "fp8", r"\| Format \| FP8 dynamic \(W8A8\), 560 linears \|"
    ),
    Told("Model overview", "release date", "built", r"\| Date \| \d{4}-\d\d-\d\d \|"),
    Told("Model overview", "developers", "fp8", r"^quantized_by: neuralmagic$"),
    Left("Model overview", "version 1.0", "a release is told from another by its lock and the digest of its payload"),
    Told(
        "Model optimizations", "of which base", "fp8", r"quantization of \[deepseek-ai/DeepSeek-R1-Distill-Llama-70B\]"
    ),
    Told(
        "Model optimizations",
        "16 bits become 8",
        "fp8",
        r"\| Bits per parameter \| 8\.24, embeddings and scales included",
    ),
    Told("Model optimizations", "about half the size", "fp8", r": 141 GB become 72\.7 GB\.$"),
    Told(
        "Model optimizations",
        "linears of the blocks only",
        "fp8",
        r"`lm_head` and all that is no linear: embeddings, norms",
    ),
    Told(
        "Model optimizations",
        "weights per channel",
        "fp8",
        r"8-bit floats \(E4M3\) with a scale to each output channel",
    ),
    Told(
        "Model optimizations",
        "activations per token",
        "fp8",
        r"activations are quantized to FP8 while serving, token by token",
        "it calls them quantizations",
    ),
    Told("Model optimizations", "LLM Compressor", "fp8", r"llm-compressor 0\.14 makes the same weights"),
    Told("Use with vLLM", "without a server", "fp8", r"^from vllm import LLM, SamplingParams$"),
    Told("Use with vLLM", "two GPUs", "fp8", r"^    tensor_parallel_size=2,$"),
    Told("Use with vLLM", "temperature, tokens", "fp8", r"^    temperature=0\.6,\n(    .*\n)*    max_tokens=256,$"),
    Told("Use with vLLM", "a pirate is asked", "fp8", r"Who are you\? Please respond in pirate speak!"),
    Told("Use with vLLM", "chat template, stop tokens", "fp8", r"^outputs = llm\.chat\(messages, sampling\)$"),
    Told("Use with vLLM", "the answer is printed", "fp8", r"^print\(outputs\[0\]\.outputs\[0\]\.text\)$"),
    Told(
        "Use with vLLM",
        "a server of OpenAI's kind",
        "fp8",
        r"^vllm serve neuralmagic/DeepSeek-R1-Distill-Llama-70B-FP8",
    ),
    Left("Use with vLLM", "trust_remote_code=True", "runs whatever code a repository holds, and this one holds none"),
    Told(
        "Creation", "oneshot", "fp8", r"^from llmcompressor import oneshot$", "from a module of an older llm-compressor"
    ),
    Told("Creation", "targets", "fp8", r'^    targets="Linear",$'),
    Told("Creation", "scheme", "fp8", r'^    scheme="FP8_DYNAMIC",$'),
    Told("Creation", "ignore", "fp8", r'^    ignore=\["lm_head"\],$'),
    Told(
        "Creation",
        "save path",
        "fp8",
        r'^save_path = "DeepSeek-R1-Distill-Llama-70B-FP8-dynamic"$',
        "a quotation mark is missing, so that theirs does not run",
    ),
    Told(
        "Creation",
        "model and tokenizer are saved",
        "fp8",
        r"^model\.save_pretrained\(save_path, (.|\n)*^tokenizer\.save_",
    ),
    Left(
        "Creation", "a device map with room for Hessians", "this scheme has none, and the model is loaded without a map"
    ),
    Told(
        "Evaluation", "command of V1", "fp8", r"^lm_eval .*max_model_len=4096,tensor_parallel_size=2.* --tasks openllm "
    ),
    Told(
        "Evaluation",
        "command of V2",
        "fp8",
        r"^lm_eval .* --apply_chat_template --fewshot_as_multiturn --tasks leaderboard ",
    ),
    Told("Accuracy", "columns", "fp8", r"^\| Category \| Metric \| Base \| This model \| Recovery \|$"),
    Told(
        "Accuracy",
        "Reasoning",
        "fp8",
        r"\| \*\*Reasoning\*\* \| AIME 2024 \(pass@1\) \| 67\.83 \| 69\.17 \| 101\.98 % \|",
    ),
    Told(
        "Accuracy",
        "OpenLLM V1",
        "fp8",
        r"\| \*\*OpenLLM V1\*\* \| ARC-Challenge \(Acc-Norm, 25-shot\) \| 63\.65 \| 63\.05 \|",
    ),
    Told(
        "Accuracy",
        "OpenLLM V2",
        "fp8",
        r"\| \*\*OpenLLM V2\*\* \| IFEval \(Inst Level Strict Acc, 0-shot\) \| 42\.45 \|",
    ),
    Told("Accuracy", "Coding", "fp8", r"\| \*\*Coding\*\* \| HumanEval \(pass@1\) \| 81\.10 \| 81\.00 \|"),
    Told(
        "Accuracy", "averages", "fp8", r"\| \*\*Average\*\* \| \*\*75\.74\*\* \| \*\*75\.55\*\* \| \*\*99\.75 %\*\* \|"
    ),
    Told("Accuracy", "no recovery over a base of zero", "fp8", r"\| Math-Hard .* \| 0\.00 \| 0\.00 \| --- \|"),
    Told(
        "Accuracy",
        "recovery of GPQA",
        "fp8",
        r"\| 9\.51 \| 6\.97 \| 73\.29 % \|",
        "withheld, though its base is not zero",
    ),
    Told("Accuracy", "HumanEval+", "fp8", r"\| HumanEval\+ \(pass@1\) \| 75\.20 \|", "called pass@10 twice"),
    Told(
        "Accuracy",
        "whose figures they are",
        "fp8",
        r"^- This model: .*\*\*These are another build's figures",
        "not said",
    ),
    Told("Inference performance", "up to 1.4 times as fast", "fp8", r"is up to 1\.4 times as fast as the base"),
    Told("Inference performance", "up to 3.0 times as fast", "fp8", r"is up to 3\.0 times as fast as the base"),
    Told("Inference performance", "with what it was measured", "fp8", r"vLLM 0\.7\.2 and GuideLLM, recorded from"),
    Told("Inference performance", "its command", "fp8", r"^guidellm --model neuralmagic/.* --max seconds 360"),
    Told(
        "Single-stream performance",
        "latencies",
        "fp8",
        r"^### One request at a time\n\nSeconds of a request, then queries per",
    ),
    *(
        Told("Single-stream performance", use, "fp8", rf"^\| GPUs \| Model \| Average cost reduction \|.* {use} \|")
        for use in USES
    ),
    *(Told("Single-stream performance", gpu, "fp8", rf"^\| 2 × {gpu} \|") for gpu in ("A6000", "A100", "H100")),
    Told("Single-stream performance", "cost reduction", "fp8", r"^\| 2 × A6000 \| .*w8a8` \| 1\.93 \| 7\.7 s, 292 \|"),
    Told("Single-stream performance", "prompt and generated tokens", "fp8", r"columns are prompt / output tokens\."),
    Told(
        "Single-stream performance",
        "whose prices, and when",
        "fp8",
        r"\(2025-02-18, <https://lambdalabs\.com/service/gpu-cloud>",
    ),
    Told(
        "Multi-stream performance",
        "throughput",
        "fp8",
        r"^### Many requests at once\n\nRequests a second, at most, then quer",
    ),
    *(Told("Multi-stream performance", gpu, "fp8", rf"^\| 4 × {gpu} \|") for gpu in ("A6000", "A100", "H100")),
    Told(
        "Multi-stream performance",
        "cost reduction",
        "fp8",
        r"^\| 4 × H100 \| .*FP8-dynamic` \| 1\.77 \| 41\.44/s, 6237 \|",
    ),
)

GONE = (
    "VLLM_NVFP4_GEMM_BACKEND",
    "VLLM_TEST_FORCE_FP8_MARLIN",
    "--quantization",
    "trust_remote_code",
    "trust-remote-code",
)

MINIATURE = """\
manifest: 1
title: Miniature of 80 layers — NVFP4
repo: release-builder/miniature-NVFP4
base: {path: base, licenses: [apache-2.0]}
scheme: {name: nvfp4, layout: modelopt}
calibration: {path: calibration.jsonl, samples: 2, tokens: [8, 16]}
files: {packing: balanced, max_bytes: 76000}
shards: 2
executor: in_process
device: cpu
"""


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A release with the shape of the first card's, tiny in all but its 80 layers, all the way to its card."""
    folder = tmp_path_factory.mktemp("miniature")
    shutil.copytree(ROOT / "tests" / "published" / "base80", folder / "base")
    shutil.copy(ROOT / "releases" / "tiny-llama" / "calibration.jsonl", folder)
    (folder / "miniature.yaml").write_text(MINIATURE, "utf-8")
    return build(folder / "miniature.yaml", folder / "build", "card")


@pytest.fixture(scope="module")
def previews(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("seeds")
    manifests = {card: load_manifest(ROOT / "releases" / f"{name}.yaml") for card, name in RELEASES.items()}
    return {card: preview(Workspace(manifest, folder / card)) for card, manifest in manifests.items()}


@pytest.fixture(scope="module")
def cards(previews: dict[str, Path], miniature: Workspace) -> dict[str, str]:
    """All that is compared, by the names of the tables above."""
    texts = {card: (folder / "README.md").read_text("utf-8") for card, folder in previews.items()}
    swap = (previews["nvfp4"] / "llama-swap.yaml").read_text("utf-8")
    return texts | {"swap": swap, "built": (miniature.artifact / "README.md").read_text("utf-8")}


def find_untold(rows: tuple[Told | Left, ...], cards: dict[str, str]) -> Iterator[str]:
    """The facts whose pattern the card does not have."""
    for row in rows:
        if isinstance(row, Told) and not re.search(row.pattern, cards[row.card], re.MULTILINE):
            yield f"{row.section}: {row.fact}"


@pytest.mark.xdist_group("seeds")
@pytest.mark.parametrize("rows", [NVFP4, FP8], ids=["nvfp4", "fp8"])
def test_every_fact_of_a_published_card_has_its_place_on_ours(
    rows: tuple[Told | Left, ...], cards: dict[str, str]
) -> None:
    assert list(find_untold(rows, cards)) == []


@pytest.mark.xdist_group("seeds")
@pytest.mark.parametrize("rows", [NVFP4, FP8], ids=["nvfp4", "fp8"])
def test_a_fact_is_not_found_where_it_is_not(rows: tuple[Told | Left, ...], cards: dict[str, str]) -> None:
    told = [f"{row.section}: {row.fact}" for row in rows if isinstance(row, Told)]
    assert list(find_untold(rows, dict.fromkeys(cards, "nothing"))) == told
    emptied = {card: re.sub(r"[0-9`*|]", "", text) for card, text in cards.items()}
    assert len(list(find_untold(rows, emptied))) > len(told) / 2


@pytest.mark.parametrize(("rows", "sections"), [(NVFP4, NVFP4_SECTIONS), (FP8, FP8_SECTIONS)], ids=["nvfp4", "fp8"])
def test_every_section_of_a_published_card_is_gone_through(
    rows: tuple[Told | Left, ...], sections: tuple[str, ...]
) -> None:
    assert tuple(dict.fromkeys(row.section for row in rows)) == sections
    assert all(row.reason for row in rows if isinstance(row, Left))


@pytest.mark.xdist_group("seeds")
def test_what_no_engine_knows_any_more_and_what_is_not_safe_is_in_no_file(previews: dict[str, Path]) -> None:
    for folder in previews.values():
        for path in folder.iterdir():
            assert [word for word in GONE if word in path.read_text("utf-8")] == [], path


@pytest.mark.xdist_group("seeds")
def test_the_miniature_of_80_layers_has_the_published_figures(miniature: Workspace, cards: dict[str, str]) -> None:
    weight_map = json.loads((miniature.artifact / "model.safetensors.index.json").read_text("utf-8"))["weight_map"]
    assert (len(weight_map), len(set(weight_map.values()))) == (2403, 8)
    assert "2403 tensors in 8 weight files." in cards["built"]
    health = re.findall(
        r"^\| (\d) \| (\d+ to \d+) \| 280 \|(?: 280 of 280 \| 0 / 0 / 0 \|){2}$", cards["built"], re.MULTILINE
    )
    assert health == [("1", "0 to 39"), ("2", "40 to 79")]
    assert " 0 errors, 0 warnings." in cards["built"] and "Nothing has been built" not in cards["built"]
