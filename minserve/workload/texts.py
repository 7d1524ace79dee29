"""`fill`: gives the turns of a workload real prompts, for servers with a tokenizer.

Prompts of a class's own kind are joined until a text has its length. No two texts begin alike,
so that a prefix cache finds only what a conversation repeats.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate
from types import MappingProxyType

from minserve.workload.conversation import Conversation, Turn
from minserve.workload.data_files import read_prompts

Count = Callable[[str], int]

CHARACTERS_PER_TOKEN = 4
# Longest piece of a word.
MOST_CHARACTERS = 12
# The first guess at a text's length in words.
WORDS_PER_TOKEN = 0.7
# A text is long enough with this share of its wanted tokens.
CLOSE = 0.98
# Two texts differ within so many words: fewer words than a block of a prefix cache holds.
BEGINNING = 8
# The set of prompts of each class; other classes use the prompts of a chat.
PROMPTS: Mapping[str, str] = MappingProxyType(
    {
        "chatbot": "self_instruct_user",
        "coding": "humaneval",
        "summarization": "scitldr_abstracts_test",
        "tool_loop": "toolbench_queries",
        "tool_final": "toolbench_queries",
        "reasoning": "s1k",
    }
)
OTHER = "self_instruct_user"


def estimate_tokens(text: str) -> int:
    """Return the number of tokens of a text, estimated from its characters."""
    return math.ceil(len(text) / CHARACTERS_PER_TOKEN)


def fill(
    workload: Sequence[Conversation], count: Count = estimate_tokens, *, seed: int = 0
) -> list[Conversation]:
    """Return the workload with a text in every turn.

    A first turn's text is its whole prompt; a later turn's text is the new part of its prompt.

    Args:
        count: returns the tokens of a text. A text has at most as many tokens as its turn says,
            and few less, but at least one character.
        seed: another seed gives other texts for the same workload.
    """
    rng = random.Random(f"{seed} texts")
    decks: dict[str, _Deck] = {}
    filled = []
    for conversation in workload:
        turns: list[Turn] = []
        for turn in conversation.turns:
            name = PROMPTS.get(turn.slo.name, OTHER)
            if name not in decks:
                decks[name] = _Deck(_words(name), rng)
            text = decks[name].text(turn.prompt_tokens - turn.shared_tokens, count)
            turns.append(replace(turn, text=text))
        filled.append(Conversation(conversation.arrival_s, tuple(turns)))
    return filled


class _Deck:
    """Texts from one set of prompts, which are joined in a random order.

    Args:
        prompts: each as a list of words.
    """

    def __init__(self, prompts: Sequence[Sequence[str]], rng: random.Random) -> None:
        self._rng = rng
        shuffled = rng.sample(prompts, len(prompts))
        self._lengths = [len(words) for words in shuffled]
        self._starts = [0, *accumulate(self._lengths[:-1])]
        self._words = [word for words in shuffled for word in words]
        self._num_texts = 0
        self._beginnings: set[str] = set()

    def text(self, num_tokens: int, count: Count) -> str:
        """Return the next text, of at most ``num_tokens`` tokens."""
        start = self._start()
        # The most words known to fit, and the fewest known not to fit.
        low, high = 0, math.inf
        length = max(1, int(num_tokens * WORDS_PER_TOKEN))
        best = ""
        while low + 1 < high:
            text = self._cut(start, length)
            found = max(1, count(text))
            if found > num_tokens:
                high = length
                length = int(length * num_tokens / found) if not low else (low + length) // 2
            else:
                low, best = length, text
                if found >= CLOSE * num_tokens:
                    break
                length = int(length * num_tokens / found) + 1
            length = int(max(low + 1, min(high - 1, length)))
        text = best or self._cut(start, 1)
        while len(text) > 1 and count(text) > num_tokens:
            text = text[: len(text) // 2]
        return text

    def _start(self) -> int:
        """Return the place of a word in the first half of the next prompt, new as a text's
        beginning.
        """
        if 2 * len(self._beginnings) > len(self._words):
            # So many texts were made that beginnings must repeat.
            self._beginnings.clear()
        prompt = self._num_texts % len(self._starts)
        self._num_texts += 1
        start = self._starts[prompt] + self._rng.randrange(self._lengths[prompt] // 2 + 1)
        # A text that begins like an earlier text would find its prefix cached.
        while (beginning := self._cut(start, BEGINNING)) in self._beginnings:
            start += 1
        self._beginnings.add(beginning)
        return start % len(self._words)

    def _cut(self, start: int, length: int) -> str:
        ring = self._words
        words = (ring[i % len(ring)] for i in range(start, start + length))
        return "".join(words).rstrip()


@cache
def _words(name: str) -> tuple[tuple[str, ...], ...]:
    """Return a set's prompts, without their common beginning, as words with trailing spaces."""
    texts = read_prompts(name)
    if name == "scitldr_abstracts_test":
        texts = tuple(text.split("\n\n", 1)[1] for text in texts)
    if name == "toolbench_queries":
        texts = tuple(_query_first(text) for text in texts)
    # Long words (formulas, addresses) are cut, so that a text can end near its wanted length.
    pattern = re.compile(rf"\S{{1,{MOST_CHARACTERS}}}\s*")
    return tuple(tuple(pattern.findall(text.strip() + "\n\n")) for text in texts)


def _query_first(text: str) -> str:
    """Return a ToolBench prompt without its rules, and with the user's words before the tools."""
    tools, query = text.split("\n\nUser: ", 1)
    return f"{query.strip()}\n\n{tools.split('APIs: ', 1)[1]}"
