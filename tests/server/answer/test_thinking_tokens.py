"""The tokens of thinking are counted exactly."""

from __future__ import annotations

import pytest

from minserve.chat_formats import REASONING_FORMATS
from minserve.server.answer.thinking_tokens import ThinkingTokens

THINK = REASONING_FORMATS["think"]


def counted(*tokens: str, is_open: bool = False, at_once: int = 1) -> int:
    texts = [token.encode() for token in tokens]
    counter = ThinkingTokens(THINK, texts.__getitem__, is_open=is_open)
    for start in range(0, len(tokens), at_once):
        counter.add(range(start, min(start + at_once, len(tokens))))
    return counter.count


@pytest.mark.parametrize("at_once", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("tokens", "is_open", "count"),
    [
        (["<think>", "a", "b", "</think>", "c", "d"], False, 2),
        (["\n", "<think>", "a", "b", "</think>", "c"], False, 2),
        (["<", "think", ">", "a", "<", "/th", "ink", ">", "c"], False, 1),
        # A token that is partly thinking counts.
        (["<think>a", "b</", "think", ">c"], False, 2),
        (["<think", ">\n", "a", ".</think", ">", "c"], False, 3),
        (["<think>", "</think>", "c"], False, 0),
        (["<think>", "a", "</thi", "nk", "b"], False, 4),
        (["a", "b", "</think>", "c"], True, 2),
        (["\n", "a", "</think>", "c"], True, 2),
        (["<think>", "a", "</think>", "c"], True, 1),
        (["a", "b"], True, 2),
        (["a", "<think>", "b", "</think>"], False, 0),
        (["<th", "ing"], False, 0),
        (["<th"], False, 0),
        (["<th"], True, 1),
        (["\n"], False, 0),
        (["<think>", *["long"] * 500, "</think>", "c"], False, 500),
    ],
)
def test_tokens_between_the_markers_are_counted(
    tokens: list[str], is_open: bool, count: int, at_once: int
) -> None:
    assert counted(*tokens, is_open=is_open, at_once=at_once) == count
