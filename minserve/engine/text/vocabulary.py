"""`Vocabulary`: what was read from a model's files, whatever their form."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from minserve.engine.text.backend import TokenizerBackend
from minserve.engine.text.sentencepiece_proto import new_model_proto
from minserve.errors import ModelLoadError

# What llama.cpp's converter calls ids that have no token, and what it does so for an empty token.
_PADDING = re.compile(r"\[(PAD|EMPTY_)\d+\]")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as its files describe it.

    Attributes:
        special_tokens: names as in ``bos_token``, ``eos_token`` to the tokens' text; chat
            templates see them under these names.
        eos_token_ids: every id that ends an output by these files' word, besides ``eos_token``.
        chat_templates: jinja templates by name; a model's only one is ``default``.
    """

    backend: TokenizerBackend
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    eos_token_ids: frozenset[int] = frozenset()
    chat_templates: Mapping[str, str] = field(default_factory=dict)


def are_alike(one: Mapping[str, int], other: Mapping[str, int]) -> bool:
    """Return whether no id means another token in one vocabulary than in the other.

    Each may have tokens that the other lacks, at ids that the other leaves open: GGUF files fill
    a vocabulary up to the size of the model's embedding, and some folders add a token for padding.

    Args:
        one, other: ids by token, as the vocabulary spells it.
    """
    first, second = _without_padding(one), _without_padding(other)
    by_id = {i: token for token, i in second.items()}
    return all(
        second.get(token, i) == i and by_id.get(i, token) == token for token, i in first.items()
    )


def _without_padding(ids: Mapping[str, int]) -> dict[str, int]:
    return {token: i for token, i in ids.items() if not _PADDING.fullmatch(token)}


def check_pieces(where: str, pieces: list[str]) -> None:
    """Check that no token stands in a vocabulary twice.

    Raises:
        ModelLoadError: naming the token.
    """
    if len(set(pieces)) < len(pieces):
        seen: dict[str, int] = {}
        for i, piece in enumerate(pieces):
            if piece in seen:
                raise ModelLoadError(
                    f"{where}: the vocabulary is broken: token {piece!r} has the ids "
                    f"{seen[piece]} and {i}"
                )
            seen[piece] = i


def parse_model_proto(where: str, data: bytes) -> Any:
    """Parse a sentencepiece model.

    Returns:
        A ``ModelProto``.

    Raises:
        ModelLoadError: where it is none.
    """
    from google.protobuf.message import DecodeError

    try:
        model = new_model_proto()
        model.ParseFromString(data)
    except DecodeError as error:
        raise ModelLoadError(
            f"{where}: is no sentencepiece model, or damaged: {error}; get the file again"
        ) from error
    if not model.pieces:
        raise ModelLoadError(f"{where}: holds no pieces, so it is no sentencepiece model")
    for i, piece in enumerate(model.pieces):
        # protobuf gives what is no UTF-8 as bytes.
        if not isinstance(piece.piece, str):
            raise ModelLoadError(
                f"{where}: is damaged: its piece {i} is no text, but {piece.piece!r:.80}; "
                "get the file again"
            )
    return model
