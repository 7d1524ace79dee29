"""Workloads whose texts have the wanted number of tokens and are in no prefix cache."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from minserve.config import EngineConfig
from minserve.engine.intake import load_tokenizer
from minserve.workload.conversation import Conversation, Turn
from minserve.workload.texts import fill

# Tokens of the number with which every prompt begins.
MARK_TOKENS = 7


class Counter:
    """Counts the tokens of texts, and remembers the counts.

    Args:
        model: the model whose tokenizer counts.
    """

    def __init__(self, model: str) -> None:
        self._tokenizer = load_tokenizer(EngineConfig.create(model))
        self._counts: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        if text not in self._counts:
            self._counts[text] = len(self._tokenizer.encode(text))
        return self._counts[text]


def with_texts(
    drawn: Sequence[Conversation], count: Callable[[str], int], *, seed: int, salt: str
) -> list[Conversation]:
    """Return a workload with texts.

    Args:
        count: returns the tokens of a text.
        salt: another salt gives other marks for the same workload.
    """
    return marked(fill(drawn, lambda text: MARK_TOKENS + count(text), seed=seed), salt)


def marked(workload: Sequence[Conversation], salt: str) -> list[Conversation]:
    """Return the same workload with a number before the first prompt of every conversation.

    The same texts come again in other runs; a prefix cache must not find them.

    Args:
        salt: another salt gives other numbers for the same workload.
    """
    rng = random.Random(salt)
    return [
        replace(one, turns=(_marked(one.turns[0], rng.randrange(10**6)), *one.turns[1:]))
        for one in workload
    ]


def _marked(turn: Turn, number: int) -> Turn:
    return replace(turn, text=f"{number:06d} {turn.text}")
