"""Where tokens begin in a text, for `text_offset` of completions' log probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from os.path import commonprefix
from typing import TYPE_CHECKING

from minserve.engine.text.detokenizer import IncrementalDetokenizer
from minserve.engine.text.plain_tokens import REPLACEMENT
from minserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from minserve.engine.text.tokenizer import Tokenizer

# Tokenizers add no more special tokens than this before a text.
_MOST_ADDED = 2
# Tokens of a prompt that are compared with its text.
_COMPARED = 16


class TextOffsets:
    """Gives each token the number of characters that the tokens before it have completed.

    So a token that goes on within a character begins where the character does, as in OpenAI's
    answers, and one without text where the next one does.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        behind: Sequence[int] = (),
        num_added: int = 0,
        start: int = 0,
        text: str | None = None,
        skip_special_tokens: bool,
        preserved_tokens: Sequence[str] = (),
    ) -> None:
        """Begin behind some tokens.

        Args:
            behind: the tokens before the first one, whose text does not count.
            num_added: tokens at the beginning that are not in the text.
            start: the offset of the first token.
            text: the text, where it is known and may differ from what its tokens decode to.
            skip_special_tokens: special tokens are not in the text.
            preserved_tokens: special tokens that are in it all the same.
        """
        params = SamplingParams(skip_special_tokens=skip_special_tokens)
        decode = tokenizer.decoder(preserved_tokens) if preserved_tokens else tokenizer.decode
        self._detokenizer = IncrementalDetokenizer(decode, behind, params)
        self._num_added = num_added
        self._next = start
        # Text of tokens that may still become another.
        self._pending = ""
        self._text = text

    def take(self, token_ids: Sequence[int]) -> list[int]:
        """Return the offsets of the next tokens."""
        return [self._take(token_id) for token_id in token_ids]

    def _take(self, token_id: int) -> int:
        if self._num_added:
            self._num_added -= 1
            return self._next
        before, begin = self._pending, self._next
        piece = self._detokenizer.add([token_id])[0]
        self._pending = self._detokenizer.pending_text()
        # What the token leaves as it is stands before it. It may end one character and begin
        # another; what may still become a character is none yet.
        after = piece + self._pending.rstrip(REPLACEMENT)
        self._pass(piece)
        offset = begin + len(commonprefix((before, after)))
        return offset if self._text is None else min(offset, len(self._text))

    def _pass(self, piece: str) -> None:
        """Move behind a piece of what the tokens decode to."""
        text = self._text
        if text is None:
            self._next += len(piece)
            return
        # Some tokenizers put a space before a text, and behind each special token in it.
        if not text.startswith(piece, self._next) and text.startswith(piece[1:], self._next):
            piece = piece.removeprefix(" ")
        self._next = min(self._next + len(piece), len(text))


def _num_added_in_front(tokenizer: Tokenizer, text: str, token_ids: Sequence[int]) -> int:
    """Return how many tokens the tokenizer put before those of a text, such as a BOS.

    Args:
        token_ids: all tokens that were made of the text.
    """
    num_special = 0
    while num_special < min(_MOST_ADDED, len(token_ids)):
        token_id = token_ids[num_special]
        if tokenizer.decode([token_id]) != "" or not tokenizer.token_bytes(token_id):
            break
        num_special += 1
    for num in range(num_special + 1):
        beginning = token_ids[num : num + _COMPARED]
        told = tokenizer.decode(beginning, skip_special_tokens=False)
        if _bare(text[: 2 * len(told)]).startswith(_bare(told.rstrip(REPLACEMENT))):
            return num
    # The tokenizer has changed the text (its case, its accents).
    return num_special


def prompt_offsets(tokenizer: Tokenizer, text: str | None, token_ids: Sequence[int]) -> TextOffsets:
    """Return what finds the tokens of a prompt in its text.

    Args:
        text: the text as it was given, where the prompt was given as text.
    """
    if text is None:
        return TextOffsets(tokenizer, skip_special_tokens=False)
    num_added = _num_added_in_front(tokenizer, text, token_ids)
    return TextOffsets(tokenizer, num_added=num_added, text=text, skip_special_tokens=False)


def _bare(text: str) -> str:
    """Return a text without its spaces, of which tokenizers add and remove some."""
    return text.replace(" ", "")
