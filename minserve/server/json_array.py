"""`JsonArray`: a JSON array that is written while its values come.

An answer may have a million log probabilities. Each of them is written as JSON when it comes, so
that nothing is left to do at the end but to join bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from minserve.server.sse import dump_json


class JsonArray:
    """A JSON array in UTF-8 that grows at its end."""

    __slots__ = ("_inner",)

    def __init__(self) -> None:
        self._inner = bytearray()

    def __bool__(self) -> bool:
        return bool(self._inner)

    def extend(self, values: Sequence[Any]) -> None:
        """Append values."""
        if values:
            self._append(memoryview(dump_json(values))[1:-1])

    def join(self, other: JsonArray) -> None:
        """Append all values of another array."""
        if other:
            self._append(other._inner)

    def raw(self) -> msgspec.Raw:
        """Return the array as a value that `dump_json` writes as it is."""
        return msgspec.Raw(b"".join((b"[", self._inner, b"]")))

    def _append(self, values: bytearray | memoryview) -> None:
        if self._inner:
            self._inner += b","
        self._inner += values
