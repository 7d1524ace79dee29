"""`JsonArray`: a JSON array that is written while its values come, and sent in pieces.

An answer may have a million log probabilities. Each of them is written as JSON when it comes, so
that nothing is left to do at the end but to send bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

# Bytes that are sent at a time.
PIECE = 2**17


class JsonArray:
    """A JSON array in UTF-8 that grows at its end."""

    __slots__ = ("_open", "_parts")

    def __init__(self) -> None:
        self._parts: list[bytes | bytearray] = []
        # The last part, while no other array shares it.
        self._open: bytearray | None = None

    def __bool__(self) -> bool:
        return bool(self._parts)

    def extend(self, values: Sequence[Any]) -> None:
        """Append values."""
        if not values:
            return
        if self._open is None:
            self._open = bytearray(b"," if self._parts else b"")
            self._parts.append(self._open)
        else:
            self._open += b","
        self._open += memoryview(_encoder.encode(values))[1:-1]

    def join(self, other: JsonArray) -> None:
        """Append all values of another array, whose bytes both have then."""
        if other:
            self._parts += [b",", *other._parts] if self._parts else other._parts
            self._open = other._open = None

    def pieces(self) -> Iterator[bytes | bytearray | memoryview]:
        """Yield the array's JSON."""
        yield b"["
        for part in self._parts:
            view = memoryview(part)
            for start in range(0, len(view), PIECE):
                yield view[start : start + PIECE]
        yield b"]"


def dump_json(value: Any) -> bytes:
    """Return a value as compact JSON in UTF-8; NaN and infinity, which JSON lacks, as ``null``.

    Raises:
        UnicodeEncodeError: for a string with half of a surrogate pair.
    """
    return _encoder.encode(value)


def dump_pieces(value: Any) -> Iterator[bytes]:
    """Yield what `dump_json` returns, for a value with large `JsonArray`s, in pieces."""
    return coalesced(_pieces(value))


def coalesced(pieces: Iterable[bytes | bytearray | memoryview]) -> Iterator[bytes]:
    """Yield the same bytes, all but the last time at least `PIECE` and never twice as many."""
    gathered = bytearray()
    for piece in pieces:
        gathered += piece
        if len(gathered) >= PIECE:
            yield bytes(gathered)
            gathered.clear()
    if gathered:
        yield bytes(gathered)


def _pieces(value: Any) -> Iterator[bytes | bytearray | memoryview]:
    if isinstance(value, JsonArray):
        yield from value.pieces()
    elif isinstance(value, dict) and value:
        separator = b"{"
        for name, one in value.items():
            yield separator + _encoder.encode(name) + b":"
            yield from _pieces(one)
            separator = b","
        yield b"}"
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        separator = b"["
        for one in value:
            yield separator
            yield from _pieces(one)
            separator = b","
        yield b"]"
    else:
        yield _encoder.encode(value)


def _raw(value: Any) -> msgspec.Raw:
    if isinstance(value, JsonArray):
        return msgspec.Raw(b"".join(value.pieces()))
    raise TypeError(f"{type(value).__name__} has no form in JSON")


_encoder = msgspec.json.Encoder(enc_hook=_raw)
