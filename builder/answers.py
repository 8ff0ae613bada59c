"""Answers of a server, judged: text that only a broken model writes is found without knowing what should be there.

The published pipeline's first artifact loaded without a complaint and answered `!!!!!!!!`: its logits were no numbers,
so that token 0 was always the likeliest.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

LONG_ENOUGH: Final = 16  # tokens from which repetition says something
MOST_COMMON: Final = 0.5  # share of one token that is too much
LONGEST_CYCLE: Final = 8  # tokens
REPEATS: Final = 4  # of a cycle at the end that are too many
FLOOR: Final = -9999  # what vLLM writes for a logprob of minus infinity


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One request and what came back. logprobs: of the tokens that were sampled; finish_reason: in vLLM's words."""

    kind: str
    prompt: str
    text: str
    finish_reason: str
    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]


def read_chat(prompt: str, reply: Mapping[str, Any]) -> Answer:
    """The answer in a reply of /v1/chat/completions that was asked for with logprobs."""
    choice = reply["choices"][0]
    message, content = choice["message"], (choice["logprobs"] or {}).get("content") or []
    return Answer(
        kind="chat",
        prompt=prompt,
        text=(message.get("reasoning") or "") + (message.get("content") or ""),  # a parser of thoughts takes them out
        finish_reason=choice["finish_reason"],
        tokens=tuple(entry["token"] for entry in content),
        logprobs=tuple(read_number(entry["logprob"]) for entry in content),
    )


def read_completion(prompt: str, reply: Mapping[str, Any]) -> Answer:
    """The answer in a reply of /v1/completions that was asked for with logprobs."""
    choice = reply["choices"][0]
    found = choice["logprobs"] or {}
    return Answer(
        kind="completion",
        prompt=prompt,
        text=choice["text"],
        finish_reason=choice["finish_reason"],
        tokens=tuple(found.get("tokens") or ()),
        logprobs=tuple(read_number(value) for value in found.get("token_logprobs") or ()),
    )


def read_number(value: Any) -> float:
    """A logprob; JSON has no word for one that is no number, and servers write null."""
    return math.nan if value is None else float(value)


def find_degeneration(answer: Answer) -> str | None:
    """What is wrong with an answer, as the end of a sentence; None if nothing is."""
    tokens = answer.tokens
    if not answer.text.strip():
        return "is empty"
    if not tokens or len(tokens) != len(answer.logprobs):
        return "came without the likelihoods of its tokens"
    if not all(math.isfinite(logprob) and logprob > FLOOR for logprob in answer.logprobs):
        return "has tokens whose likelihood is no number"
    if len(tokens) < LONG_ENOUGH:
        return None
    token, count = Counter(tokens).most_common(1)[0]
    if count > MOST_COMMON * len(tokens):
        return f"repeats {token!a}: {count} of {len(tokens)} tokens"
    for length in range(1, LONGEST_CYCLE + 1):
        tail = tokens[-REPEATS * length :]
        if length * REPEATS >= LONG_ENOUGH and all(tail[i] == tail[i - length] for i in range(length, len(tail))):
            return f"ends in a circle of {length} tokens: {''.join(tail[:length])!a}"
    return None
