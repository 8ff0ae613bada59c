"""Answers that only a broken model gives are told from all others."""

from __future__ import annotations

import math
from typing import Any

import pytest

from builder.answers import Answer, find_degeneration, read_chat, read_completion

# as vLLM 0.32 answers, shortened to what is read
CHAT: dict[str, Any] = {
    "choices": [
        {
            "message": {"role": "assistant", "content": "Write it."},
            "logprobs": {
                "content": [
                    {"token": "W", "logprob": -3.6778061389923096, "bytes": [87], "top_logprobs": []},
                    {"token": "rite", "logprob": -0.5, "bytes": None, "top_logprobs": []},
                    {"token": " it.", "logprob": -1.25, "bytes": None, "top_logprobs": []},
                ]
            },
            "finish_reason": "stop",
        }
    ]
}
COMPLETION: dict[str, Any] = {
    "choices": [
        {
            "text": " all items",
            "logprobs": {"text_offset": [0, 4], "token_logprobs": [-3.79, -2.2], "tokens": [" all", " items"]},
            "finish_reason": "length",
        }
    ]
}


def answer(*tokens: str, logprob: float = -1.0) -> Answer:
    return Answer(
        kind="chat",
        prompt="?",
        text="".join(tokens),
        finish_reason="length",
        tokens=tokens,
        logprobs=(logprob,) * len(tokens),
    )


def test_both_kinds_of_reply_are_read() -> None:
    chat, completion = read_chat("?", CHAT), read_completion("?", COMPLETION)
    assert (chat.text, chat.tokens, chat.logprobs[0]) == ("Write it.", ("W", "rite", " it."), -3.6778061389923096)
    assert (completion.text, completion.tokens, completion.logprobs) == (
        " all items",
        (" all", " items"),
        (-3.79, -2.2),
    )
    assert find_degeneration(chat) is find_degeneration(completion) is None


def test_the_answer_of_the_published_pipelines_first_artifact_is_degenerate() -> None:
    assert find_degeneration(answer(*"!" * 32)) == "repeats '!': 32 of 32 tokens"


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf, -9999.0])
def test_a_likelihood_that_is_no_number_is_degenerate(value: float | None) -> None:
    reply = {"choices": [{**COMPLETION["choices"][0], "logprobs": {"tokens": [" all"], "token_logprobs": [value]}}]}
    assert find_degeneration(read_completion("?", reply)) == "has tokens whose likelihood is no number"


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_answer_is_degenerate(text: str) -> None:
    assert find_degeneration(answer(text)) == "is empty"


def test_going_in_circles_is_degenerate_and_repeating_a_little_is_not() -> None:
    words = [f"w{number}" for number in range(24)]
    assert (
        find_degeneration(answer(*words, *["and", " so", " on", ","] * 4))
        == "ends in a circle of 4 tokens: 'and so on,'"
    )
    assert find_degeneration(answer(*words, *["and", " so", " on", ","] * 3)) is None
    assert find_degeneration(answer(*words, *["no"] * 8)) is None  # of 32, a quarter
    assert find_degeneration(answer("ha", "ha", "ha")) is None  # too short to say
