"""Make the small base model of this folder from the documentation strings of Python's standard library.

Run it as `python releases/tiny-llama/train.py`; about ten minutes on two cores. Everything is read from the running
Python, nothing is downloaded. Written beside this file:

    base/               a Llama checkpoint in bf16 with its tokenizer, chat template and licence text
    calibration.jsonl   texts to calibrate a quantization with, {"text": ...} a line
    heldout.txt         text to measure perplexity on

The three share no docstring: its text alone (a hash of it) decides where each one goes.
"""

import ast
import hashlib
import json
import math
import random
import re
import shutil
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
STDLIB = Path(sysconfig.get_path("stdlib"))
SEED = 0

VOCAB_SIZE = 2048
PAD, BOS, EOS = "<|pad|>", "<|begin|>", "<|end|>"
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|' + message.role + '|>\\n' + message.content + eos_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- endif %}
"""

NUM_STEPS, WARMUP_STEPS = 1000, 100
ROWS, CONTEXT = 4, 512  # tokens in a step: ROWS x CONTEXT
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 0.1
CHAT_SHARE, JOINED_SHARE = 0.1, 0.5  # chance that a text is shown as a chat, that another is joined to it
PERPLEXITY_WINDOW = 256


class Document(NamedTuple):
    digest: str  # of the text, whitespace normalised
    name: str  # such as asyncio.runners.run; of several with one text, the first
    text: str


def bears_its_own_notice(source: str) -> bool:
    """Whether a source file names a licence of its own, or a holder of rights other than the PSF."""
    if re.search(r"hereby +granted|is +granted|licen[sc]ed under", source, re.IGNORECASE):
        return True
    if "Licensed to PSF" in source:
        return False
    holders = [line for line in source.splitlines() if "copyright" in line.lower()]
    return not all("Python Software Foundation" in line for line in holders)


def collect_documents() -> list[Document]:
    """Every different docstring of the standard library, tests left out, in the order of their digests."""
    documents: dict[str, Document] = {}
    for path in sorted(STDLIB.rglob("*.py")):
        module = path.relative_to(STDLIB).with_suffix("").parts
        if {"site-packages", "test", "tests", "idle_test"} & set(module):
            continue
        source = path.read_text(encoding="utf-8")
        if bears_its_own_notice(source):
            continue
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if text := (ast.get_docstring(node) or "").strip():
                name = ".".join([*module, *([] if isinstance(node, ast.Module) else [node.name])])
                digest = hashlib.sha256(" ".join(text.split()).encode()).hexdigest()
                documents.setdefault(digest, Document(digest, name, text))
    return [documents[digest] for digest in sorted(documents)]


def split_documents(documents: list[Document]) -> tuple[list[Document], list[Document], list[Document]]:
    """Training, calibration and held-out documents: about 91, 6 and 3 of 100."""
    parts: tuple[list[Document], list[Document], list[Document]] = ([], [], [])
    for document in documents:
        place = int(document.digest[-8:], 16) % 100
        parts[2 if place < 3 else 1 if place < 9 else 0].append(document)
    return parts


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE that puts BOS before a text, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS, *ROLES],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    return ids


def training_batches(documents: list[Document], tokenizer: PreTrainedTokenizerFast) -> Iterator[Tensor]:
    """Token ids [ROWS, CONTEXT] without end: BOS, then a window of the documents, shuffled anew each time round."""
    shuffle = random.Random(SEED)
    plain = [encode(tokenizer, document.text) for document in documents]
    chats = [
        encode(
            tokenizer,
            tokenizer.apply_chat_template(
                [
                    {"role": "system", "content": "You document Python's standard library."},
                    {"role": "user", "content": f"Describe {document.name}."},
                    {"role": "assistant", "content": document.text},
                ],
                tokenize=False,
            ),
        )
        for document in documents
    ]
    joint = encode(tokenizer, "\n\n")
    stream: list[int] = []
    while True:
        order = iter(shuffle.sample(range(len(documents)), len(documents)))
        for index in order:
            if shuffle.random() < CHAT_SHARE:
                stream += chats[index]
            else:
                stream += [tokenizer.bos_token_id, *plain[index]]
                while shuffle.random() < JOINED_SHARE and (following := next(order, None)) is not None:
                    stream += joint + plain[following]
                stream.append(tokenizer.eos_token_id)
            while len(stream) >= ROWS * (CONTEXT - 1):
                rows = torch.tensor(stream[: ROWS * (CONTEXT - 1)]).view(ROWS, CONTEXT - 1)
                del stream[: ROWS * (CONTEXT - 1)]
                yield torch.nn.functional.pad(rows, (1, 0), value=tokenizer.bos_token_id)


def train(documents: list[Document], tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Train in fp32 weights with bf16 products; return the model in bf16."""
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / WARMUP_STEPS, 0.5 + 0.5 * math.cos(math.pi * step / NUM_STEPS)),
    )
    started = time.monotonic()
    batches = training_batches(documents, tokenizer)
    for step in range(1, NUM_STEPS + 1):
        ids = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step} of {NUM_STEPS}: loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)
    return model.to(torch.bfloat16).eval()


def windows(tokenizer: PreTrainedTokenizerFast, text: str) -> Iterator[Tensor]:
    """Token ids [1, up to PERPLEXITY_WINDOW]: BOS, then the text's next tokens; no token is in two windows."""
    ids = encode(tokenizer, text)
    for start in range(0, len(ids), PERPLEXITY_WINDOW - 1):
        yield torch.tensor([[tokenizer.bos_token_id, *ids[start : start + PERPLEXITY_WINDOW - 1]]])


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str) -> float:
    nats, count = 0.0, 0
    for ids in windows(tokenizer, text):
        logits = model(input_ids=ids, use_cache=False).logits
        nats += cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return math.exp(nats / count)


def unigram_perplexity(documents: list[Document], tokenizer: PreTrainedTokenizerFast, text: str) -> float:
    """Of a model that knows only how often each token occurs in training (one added to each count)."""
    seen = torch.tensor([token for document in documents for token in encode(tokenizer, document.text)])
    counts = torch.bincount(seen, minlength=VOCAB_SIZE).double() + 1
    return math.exp(-(counts / counts.sum()).log()[torch.tensor(encode(tokenizer, text))].mean().item())


def write_base(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, licence: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder, max_shard_size="5MB")
    tokenizer.save_pretrained(folder)
    (folder / "LICENSE").write_text(licence, encoding="utf-8")


def main() -> None:
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    licence = (STDLIB / "LICENSE.txt").read_text(encoding="utf-8")
    training, calibration, heldout = split_documents(collect_documents())
    heldout_text = "\n\n".join(document.text for document in heldout) + "\n"
    rows = [json.dumps({"text": document.text}) for document in calibration if len(document.text) >= 80]
    (HERE / "heldout.txt").write_text(heldout_text, encoding="utf-8")
    (HERE / "calibration.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    tokenizer = train_tokenizer([document.text for document in training])
    model = train(training, tokenizer)
    write_base(HERE / "base", model, tokenizer, licence)
    print(f"held-out perplexity: unigram {unigram_perplexity(training, tokenizer, heldout_text):.1f}")
    print(f"held-out perplexity: model {perplexity(model, tokenizer, heldout_text):.2f}")


if __name__ == "__main__":
    main()
