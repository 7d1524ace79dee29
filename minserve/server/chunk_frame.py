"""`ChunkFrame`: writes the chunks of a stream that differ in nothing but their text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Raw

from minserve.server.json_array import dump_json

# Stands where the text will be, behind which no other text comes that a user could choose.
PLACEHOLDER = "\ue000"


class ChunkFrame:
    """A chunk's JSON without its text, written once for a stream instead of once for a token.

    Args:
        chunk: a chunk whose text is `PLACEHOLDER`.
    """

    __slots__ = ("_before", "_behind")

    def __init__(self, chunk: Mapping[str, Any]) -> None:
        self._before, _, self._behind = dump_json(chunk).rpartition(dump_json(PLACEHOLDER))

    def around(self, text: str) -> Raw:
        """Return the JSON of the chunk with this text."""
        return Raw(b"".join((self._before, dump_json(text), self._behind)))
