"""`TokenTrie`: a model's vocabulary as llguidance takes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any

from llguidance import LLTokenizer, TokenizerWrapper

from minserve.engine.text.tokenizer import Tokenizer

_Encode = Callable[[bytes], list[int]]


class _WrappedTokens:
    """The form in which the library takes any tokenizer."""

    def __init__(
        self, tokens: SequenceOf[bytes], marks: SequenceOf[int], eos: int, encode: _Encode
    ) -> None:
        self.tokens, self.special_token_ids = tokens, marks
        self.eos_token_id, self.bos_token_id = eos, None
        self._encode = encode

    def __call__(self, text: bytes) -> list[int]:
        return self._encode(text)


class TokenTrie:
    """The tokens of a vocabulary by their bytes.

    Making it takes about 3 µs for each token, and most of that holds Python's lock.

    Attributes:
        tokens: the bytes of each id; the last one, the end, has none.
        eos_id: what the library takes for the end of an output, which is no token.
        size: the number of ids, ``eos_id`` included.
        llguidance: the library's own object.
    """

    def __init__(self, tokens: SequenceOf[bytes], marks: Iterable[int], encode: _Encode) -> None:
        """Make a trie.

        Args:
            marks: ids of tokens that are no text, which grammars know by name.
            encode: tokenizes a text, given as UTF-8.
        """
        # A token of its own stands for the end: which tokens end an output is a request's matter.
        end = len(tokens)
        self.tokens = [*tokens, b""]
        self.eos_id = end
        self.size = len(self.tokens)
        wrapped: Any = TokenizerWrapper(_WrappedTokens(self.tokens, [*marks], end, encode))
        self.llguidance = LLTokenizer(wrapped, n_vocab=self.size)

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocab_size: int) -> TokenTrie:
        """Return the trie of a model's tokens.

        Args:
            vocab_size: rows of the model's head; ids beyond its tokens' have no bytes.
        """
        marks = {i for i in tokenizer.mark_ids if i < vocab_size}
        tokens = [tokenizer.token_bytes(i) for i in range(vocab_size)]
        by_bytes = {token: i for i, token in enumerate(tokens) if token and i not in marks}
        usual = set(by_bytes.values())

        def encode(text: bytes) -> list[int]:
            # Where a grammar leaves one text only, the library allows its usual tokens alone.
            ids = tokenizer.encode(text.decode(errors="replace"), add_special_tokens=False)
            if all(i in usual for i in ids) and b"".join(tokens[i] for i in ids) == text:
                return ids
            # Some vocabularies put a space before a text.
            return _greedy(text, by_bytes, tokenizer.max_token_bytes)

        return cls(tokens, marks, encode)

    @classmethod
    def of_bytes(cls, tokenizer: Tokenizer) -> TokenTrie:
        """Return a trie of all bytes and the model's marks: enough to check grammars, and made at
        once.
        """
        marks = [tokenizer.token_bytes(i) for i in sorted(tokenizer.mark_ids)]
        tokens = [bytes([i]) for i in range(256)]
        return cls([*tokens, *marks], range(256, 256 + len(marks)), list)


def _greedy(text: bytes, by_bytes: Mapping[bytes, int], longest: int) -> list[int]:
    """Return the longest token at each place; bytes that no token has are left out."""
    ids, at = [], 0
    while at < len(text):
        size = min(longest, len(text) - at)
        while size > 1 and text[at : at + size] not in by_bytes:
            size -= 1
        if (found := by_bytes.get(text[at : at + size])) is not None:
            ids.append(found)
        at += size
    return ids
