"""Calls written as JSON, ``{"name": ..., "arguments": {...}}``, read while they come."""

from __future__ import annotations

import json
from collections.abc import Collection
from enum import Enum, auto

SPACE = " \t\r\n"
# Llama's templates say "parameters", all others "arguments".
_ARGUMENTS = ("arguments", "parameters")
_NAME = "name"


class JsonText:
    """A JSON value that begins with a brace, a bracket or a quotation mark, read to its end.

    Only its brackets and strings are looked at, as its end depends on nothing else.
    """

    __slots__ = ("_depth", "_escaped", "_quoted")

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = self._escaped = False

    def feed(self, text: str, start: int) -> tuple[int, bool]:
        """Read on.

        Args:
            start: where the value goes on in the text.

        Returns:
            Where the reading stopped, and whether the value has ended there.
        """
        for place in range(start, len(text)):
            char = text[place]
            if self._quoted:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._quoted = False
                    if not self._depth:
                        return place + 1, True
            elif char == '"':
                self._quoted = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return place + 1, True
        return len(text), False


class _Where(Enum):
    """Where in the object of a call the reading stands."""

    START = auto()
    KEY = auto()  # before a key, or the end
    COLON = auto()
    VALUE = auto()  # before a value
    IN_KEY = auto()
    IN_NAME = auto()
    IN_ARGUMENTS = auto()
    IN_TEXT = auto()  # arguments that are a string of JSON
    IN_OTHER = auto()  # the value of another key
    IN_WORD = auto()  # a number, or a word such as null
    COMMA = auto()  # behind a value


class JsonCall:
    """One call, an object with the tool's name and its arguments, in any order.

    It has begun when its name and the beginning of its arguments are known. Nothing but
    arguments follows then that a client would have to be told otherwise.

    Attributes:
        raw: all text of the call, as long as it has not begun.
        name: the tool's name; empty before it has begun.
        ended: the object is complete.
        broken: it cannot be a call; or, where it has begun, its object goes wrong behind the
            arguments.
    """

    def __init__(self, names: Collection[str] | None = None) -> None:
        """Begin before the object.

        Args:
            names: the only names that make it a call; ``None`` for any.
        """
        self.raw = self.name = ""
        self.ended = self.broken = False
        self._names = names
        self._where = _Where.START
        self._value = JsonText()
        self._text = self._key = self._found_name = ""
        self._new_arguments = ""
        self._has_arguments = False

    @property
    def begun(self) -> bool:
        """True from the beginning of the arguments on, where the name is known."""
        return bool(self.name)

    def feed(self, text: str) -> str:
        """Read on, to the object's end or to the first character that does not fit.

        Returns:
            What was not read: it stands behind the object, or does not fit.
        """
        place = 0
        while place < len(text) and not (self.ended or self.broken):
            before, place = place, self._step(text, place)
            if not self.begun:
                self.raw += text[before:place]
        return text[place:]

    def take_arguments(self) -> str:
        """Return the text of the arguments since the last time."""
        if not self.begun:
            return ""
        text, self._new_arguments = self._new_arguments, ""
        return text

    def _step(self, text: str, place: int) -> int:
        """Read a character, or a value as far as it is there; return the place behind it."""
        where, char = self._where, text[place]
        match where:
            case (
                _Where.IN_KEY
                | _Where.IN_NAME
                | _Where.IN_ARGUMENTS
                | _Where.IN_TEXT
                | _Where.IN_OTHER
            ):
                return self._read_value(text, place)
            case _Where.IN_WORD if char not in SPACE + ",}":
                return place + 1
            case _Where.IN_WORD:
                self._where = _Where.COMMA
                return place
        if char in SPACE and where is not _Where.START:
            return place + 1
        return self._read_sign(char, place)

    def _read_sign(self, char: str, place: int) -> int:
        """Read a character that is no part of a value."""
        match self._where, char:
            case _Where.START, "{":
                self._where = _Where.KEY
            case _Where.KEY, '"':
                return self._open(_Where.IN_KEY, place)
            case (_Where.KEY | _Where.COMMA, "}"):
                self._end()
                return place if self.broken else place + 1
            case _Where.COLON, ":":
                self._where = _Where.VALUE
            case _Where.COMMA, ",":
                self._where = _Where.KEY
            case _Where.VALUE, _:
                return self._open(self._kind(char), place)
            case _:
                self.broken = True
                return place
        return place + 1

    def _kind(self, char: str) -> _Where:
        """Return what the value is that begins with a character."""
        if self._key == _NAME and not self._found_name:
            if char == '"':
                return _Where.IN_NAME
            self.broken = True
        elif self._key in _ARGUMENTS and not self._has_arguments:
            if char in '{"':
                return _Where.IN_ARGUMENTS if char == "{" else _Where.IN_TEXT
            self.broken = char != "n"  # null, for no arguments
        elif char in '{["':
            return _Where.IN_OTHER
        elif char in ",}]:":
            self.broken = True
        return _Where.IN_WORD

    def _open(self, where: _Where, place: int) -> int:
        self._where, self._value, self._text = where, JsonText(), ""
        if where is _Where.IN_ARGUMENTS:
            self._has_arguments = True
            self._begin()
        return place

    def _read_value(self, text: str, place: int) -> int:
        stop, is_whole = self._value.feed(text, place)
        piece = text[place:stop]
        if self._where is _Where.IN_ARGUMENTS:
            self._new_arguments += piece
        else:
            self._text += piece
        if is_whole:
            self._close()
        return stop

    def _close(self) -> None:
        """Take a value that is complete."""
        where, self._where = self._where, _Where.COMMA
        if where in (_Where.IN_ARGUMENTS, _Where.IN_OTHER):
            return
        try:
            value: str = json.loads(self._text, strict=False)
            value.encode()  # Half of a surrogate pair can be read, but no answer can have it.
        except ValueError:
            self.broken = True
            return
        if where is _Where.IN_KEY:
            self._key, self._where = value, _Where.COLON
        elif where is _Where.IN_NAME:
            self._found_name = value
            self.broken = not value or (self._names is not None and value not in self._names)
            if self._has_arguments and not self.broken:
                self._begin()
        else:
            self._new_arguments, self._has_arguments = value, True
            self._begin()

    def _begin(self) -> None:
        if self._found_name and not self.broken:
            self.name = self._found_name

    def _end(self) -> None:
        if not self._found_name:
            self.broken = True
            return
        if not self._has_arguments:
            self._new_arguments = "{}"
        self.ended = True
        self._begin()
