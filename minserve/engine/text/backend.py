"""`TokenizerBackend`: what every form of vocabulary can do, and the one that runs on Rust.

`tokenizers.Tokenizer` is used itself, not transformers' wrapper around it: the wrapper sets
truncation and padding on each call, which fails with "Already borrowed" when another thread
is using the tokenizer. All methods only read, so any number of threads may call them at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as RustTokenizer

# Characters from which on tokenizing takes milliseconds.
LONG_TEXT = 10_000
# Marks that are not called special: <tool_call>, <think>, [THINK].
_MARK = re.compile(r"<\S+>|\[\S+\]")
_BYTE_LEVEL, _SENTENCEPIECE = "ByteLevel", "SentencePiece"


class TokenizerBackend(Protocol):
    """A vocabulary with the rules that cut a text into its tokens.

    Attributes:
        kind: a few words that name the form of the vocabulary.
        vocab_size: one more than the highest id.
        max_token_bytes: no token stands for more bytes of UTF-8 than this.
        special_ids: the tokens that ``skip_special_tokens`` leaves out.
        mark_ids: as in `Tokenizer`.
        texts_add_up: as `PlainTokens` needs it.
    """

    kind: str
    texts_add_up: bool
    vocab_size: int
    max_token_bytes: int
    special_ids: frozenset[int]
    mark_ids: frozenset[int]

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Return the token ids of a text; special tokens written out in it become single ids."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Return the text of token ids. Bytes that are no UTF-8 become U+FFFD.

        Ids that no token has add nothing.
        """

    def token_bytes(self, token_id: int) -> bytes:
        """Return the exact bytes of one token; empty if there is no such token."""

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token, as the vocabulary spells it."""

    def vocabulary(self) -> Mapping[str, int]:
        """Return every token, as the vocabulary spells it, with its id."""

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the vocabulary as Hugging Face's libraries read it.

        Returns:
            What belongs into tokenizer_config.json for it.
        """


class RustBackend:
    """A vocabulary in the form of tokenizer.json. Implements `TokenizerBackend`."""

    def __init__(self, tokenizer: RustTokenizer, kind: str = "tokenizer.json") -> None:
        # Files of embedding models may carry either; here both would cut or fill prompts.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.rust = tokenizer
        self.kind = kind
        self._added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in self._added.items() if token.special)
        self.mark_ids = marks_among(self._added)
        self._alphabet = _alphabet(tokenizer)
        self.texts_add_up = _adds_up(tokenizer)
        # DeepSeek Coder's has added tokens such as "ü". The library reads them as signs for a byte
        # (0xFC), like those of other tokens, and their text would be no character.
        self._misreads = self._alphabet == _BYTE_LEVEL and any(
            not token.content.isascii() and all(c in BYTE_OF_CHAR for c in token.content)
            for token in self._added.values()
        )
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1
        self.max_token_bytes: int = max(
            (len(t if self._alphabet == _BYTE_LEVEL else t.encode()) for t in vocabulary),
            default=1,
        )

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if len(text) < LONG_TEXT:
            return self.rust.encode(text, add_special_tokens=add_special_tokens).ids
        # The batch call lets other threads run meanwhile, which a single `encode` does not.
        [encoding] = self.rust.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        # Those of no token: the library takes none below 0 or of more than 32 bits.
        ids = [i for i in ids if 0 <= i < self.vocab_size]
        if not self._misreads:
            return self.rust.decode(ids, skip_special_tokens=skip_special_tokens)
        kept = [i for i in ids if not (skip_special_tokens and i in self.special_ids)]
        return b"".join(map(self.token_bytes, kept)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        added = self._added.get(token_id)
        if added is not None:
            return added.content.encode()
        is_token = 0 <= token_id < self.vocab_size
        token = self.rust.id_to_token(token_id) if is_token else None
        if token is None:
            return b""
        if self._alphabet == _BYTE_LEVEL:
            if all(c in BYTE_OF_CHAR for c in token):
                return bytes(BYTE_OF_CHAR[c] for c in token)
            return token.encode()
        if self._alphabet == _SENTENCEPIECE:
            if len(token) == 6 and token.startswith("<0x"):
                return bytes([int(token[3:5], 16)])
            return token.replace("▁", " ").encode()
        return self.rust.decode([token_id], skip_special_tokens=False).encode()

    def token_to_id(self, token: str) -> int | None:
        return self.rust.token_to_id(token)

    def vocabulary(self) -> Mapping[str, int]:
        return self.rust.get_vocab(with_added_tokens=True)

    def save(self, folder: Path) -> dict[str, Any]:
        self.rust.save(str(folder / "tokenizer.json"))
        return {"tokenizer_class": "PreTrainedTokenizerFast"}


def marks_among(added: Mapping[int, AddedToken]) -> frozenset[int]:
    """Return which added tokens are marks; the others are texts, such as runs of spaces."""
    return frozenset(
        i for i, token in added.items() if token.special or _MARK.fullmatch(token.content)
    )


def _byte_of_char() -> dict[str, int]:
    """Return GPT-2's alphabet: printable Latin-1 bytes as themselves, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


BYTE_OF_CHAR = _byte_of_char()


def _alphabet(tokenizer: RustTokenizer) -> str | None:
    """Return how the vocabulary spells bytes, which its decoder tells."""
    decoder = tokenizer.decoder.__getstate__().decode() if tokenizer.decoder else ""
    if '"ByteLevel"' in decoder:
        return _BYTE_LEVEL
    return _SENTENCEPIECE if "▁" in decoder else None


def _adds_up(tokenizer: RustTokenizer) -> bool:
    """Return whether the decoder is one of those that only put the texts of tokens in a row.

    Others change the end of one token by the beginning of the next, as WordPiece's do.
    """
    if tokenizer.decoder is None:
        return False
    state = json.loads(tokenizer.decoder.__getstate__())
    if state["type"] == "ByteLevel":
        return True
    parts = state.get("decoders", [])
    kinds = [one["type"] for one in parts]
    if kinds[:3] != ["Replace", "ByteFallback", "Fuse"] or kinds[3:] not in ([], ["Strip"]):
        return False
    spaces = {"pattern": {"String": "▁"}, "content": " "}
    strips = [(one["content"], one["start"], one["stop"]) for one in parts[3:]]
    return spaces.items() <= parts[0].items() and strips in ([], [(" ", 1, 0)])
