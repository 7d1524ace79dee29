"""`SentencePieceBackend`: vocabularies of the sentencepiece library, run by that library itself.

A text is cut at its added tokens first, by the Rust library's rules for these, and
sentencepiece tokenizes what lies between. Neither keeps state between calls, and
sentencepiece lets other threads run while it works, so any number of threads may call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minserve.engine.text.backend import LONG_TEXT, marks_among
from minserve.engine.text.sentencepiece_proto import BYTE, CONTROL, UNKNOWN, new_model_proto

if TYPE_CHECKING:
    from tokenizers import AddedToken

SPACE = "▁"


class PrefixSpace(Enum):
    """Where a space is put that the text does not have, so that words begin alike everywhere."""

    ALWAYS = "always"  # before each fragment: at the start, and after each added token
    FIRST = "first"  # at the start, unless the text begins with a space or an added token
    NEVER = "never"


@dataclass(frozen=True)
class SentencePieceRules:
    """What a model file does not say about its use.

    Attributes:
        added: added tokens by id, those of the model's own pieces included. They are found
            wherever they are written in a text.
        before: ids put before a text where special tokens are wanted.
        after: ids put behind it.
    """

    prefix: PrefixSpace
    added: Mapping[int, AddedToken]
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


class SentencePieceBackend:
    """A sentencepiece model with added tokens. Implements `TokenizerBackend`."""

    def __init__(self, model: Any, rules: SentencePieceRules, kind: str) -> None:
        """Load a model.

        Args:
            model: a ``ModelProto``. Its dummy prefix is set here, as the rules want it.

        Raises:
            RuntimeError: where sentencepiece finds the model broken.
            ValueError: where it is broken in another way.
        """
        from sentencepiece import SentencePieceProcessor

        if (count := sum(piece.type == UNKNOWN for piece in model.pieces)) != 1:
            raise ValueError(f"{count} pieces stand for what is unknown; there must be one")
        model.normalizer_spec.add_dummy_prefix = rules.prefix is PrefixSpace.ALWAYS
        self.model = model
        self.rules = rules
        self.kind = kind
        self.texts_add_up = True
        self._processor = SentencePieceProcessor()
        self._processor.LoadFromSerializedProto(model.SerializeToString())
        self._splitter, self._added_ids = _make_splitter(rules.added)
        self.special_ids = frozenset(i for i, token in rules.added.items() if token.special)
        pieces = (i for i, one in enumerate(model.pieces) if one.type in (CONTROL, UNKNOWN))
        self.mark_ids = marks_among(rules.added) | frozenset(pieces)
        self._bytes = _token_bytes(model, rules.added)
        self.vocab_size = len(self._bytes)
        self.max_token_bytes = max(map(len, self._bytes))
        self._vocabulary = {piece.piece: i for i, piece in enumerate(model.pieces)}
        self._vocabulary.update({token.content: i for i, token in rules.added.items()})

    def __reduce__(self) -> tuple[Any, ...]:
        # The library's model is made again in the other process.
        return _from_bytes, (self.model.SerializeToString(), self.rules, self.kind)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = list(self.rules.before) if add_special_tokens else []
        for token, start, end in self._fragments(text):
            if token is not None:
                ids.append(token)
            elif fragment := text[start:end]:
                if (
                    self.rules.prefix is PrefixSpace.FIRST
                    and start == 0
                    and fragment[0] not in (" ", SPACE)
                ):
                    fragment = SPACE + fragment
                ids += self._processor.encode(fragment)
        return ids + list(self.rules.after) if add_special_tokens else ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        size = len(self._bytes)
        skipped = self.special_ids if skip_special_tokens else ()
        found = b"".join(self._bytes[i] for i in ids if 0 <= i < size and i not in skipped)
        text = found.decode("utf-8", errors="replace")
        if self.rules.prefix is not PrefixSpace.NEVER:
            return text.removeprefix(" ")
        return text

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    def token_to_id(self, token: str) -> int | None:
        return self._vocabulary.get(token)

    def vocabulary(self) -> Mapping[str, int]:
        return self._vocabulary

    def save(self, folder: Path) -> dict[str, Any]:
        from minserve.engine.text.sentencepiece_export import to_rust

        to_rust(self).save(str(folder / "tokenizer.json"))
        return {"tokenizer_class": "PreTrainedTokenizerFast"}

    def _fragments(self, text: str) -> list[tuple[int | None, int, int]]:
        """Return the parts of a text: the id of an added token or ``None``, start and end."""
        if len(text) < LONG_TEXT:
            found = self._splitter.encode(text, add_special_tokens=False)
        else:  # the batch call lets other threads run
            [found] = self._splitter.encode_batch([text], add_special_tokens=False)
        return [
            (self._added_ids.get(number), start, end)
            for number, (start, end) in zip(found.ids, found.offsets, strict=True)
        ]


def _from_bytes(data: bytes, rules: SentencePieceRules, kind: str) -> SentencePieceBackend:
    model = new_model_proto()
    model.ParseFromString(data)
    return SentencePieceBackend(model, rules, kind)


def _make_splitter(added: Mapping[int, AddedToken]) -> tuple[Any, dict[int, int]]:
    """Return a Rust tokenizer that knows added tokens and nothing else, and their ids by its own."""
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers import models

    ids: dict[str, int] = {}
    for i, token in added.items():
        if ids.setdefault(token.content, i) != i:
            raise ValueError(f"the added token {token.content!r} stands there twice")
    # The unknown token's name is nothing that an added token could be called.
    splitter = RustTokenizer(models.WordLevel({"\0": 0}, unk_token="\0"))
    splitter.add_tokens(list(added.values()))
    known = splitter.get_added_tokens_decoder()
    return splitter, {number: ids[token.content] for number, token in known.items()}


def _token_bytes(model: Any, added: Mapping[int, AddedToken]) -> list[bytes]:
    """Return the bytes of each id; ids between the pieces and an added token have none."""
    size = max([len(model.pieces), *(i + 1 for i in added)])
    found = [b""] * size
    for i, piece in enumerate(model.pieces):
        if piece.type == BYTE:
            found[i] = bytes([int(piece.piece[3:5], 16)])
        else:
            found[i] = piece.piece.replace(SPACE, " ").encode()
    for i, token in added.items():
        found[i] = token.content.replace(SPACE, " ").encode()
    return found
