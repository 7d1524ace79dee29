"""`PlainTokens`: the texts of those tokens that add the same text behind any other text.

Most tokens are such, so that most of an output becomes text by looking it up: decoding a window of
tokens for each of them takes ten times as long.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

# Decoders put this in place of bytes that are not (yet) a character.
REPLACEMENT = "\ufffd"


class PlainText(NamedTuple):
    """The text of a token.

    Attributes:
        behind: what it adds behind other text.
        alone: what it is with nothing before it; decoders may leave out the first space of a text.
    """

    behind: str
    alone: str


class PlainTokens(dict[int, PlainText | None]):
    """By token id, its text; ``None`` where its text depends on others, or may be left out.

    A token is looked at when it is first asked for. Any number of threads may ask at once.

    Args:
        decode: ``decode(token_ids, skip_special_tokens)`` of a vocabulary whose texts add up: that
            of several tokens is theirs in a row, but for its first space and for characters that
            are split over tokens.
        special_ids: tokens that requests may want left out.
    """

    def __init__(
        self, decode: Callable[[SequenceOf[int], bool], str], special_ids: frozenset[int]
    ) -> None:
        super().__init__()
        self._decode, self._special_ids = decode, special_ids

    def __missing__(self, token_id: int) -> PlainText | None:
        found = self[token_id] = self._look(token_id)
        return found

    def _look(self, token_id: int) -> PlainText | None:
        if token_id in self._special_ids:
            return None
        alone, twice = (self._decode([token_id] * num, False) for num in (1, 2))
        behind = twice[len(alone) :]
        return PlainText(behind, alone) if behind and REPLACEMENT not in twice else None
