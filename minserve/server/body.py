"""Turn bytes into a checked JSON object: size, encoding, strict JSON, typed fields.

Python's own JSON reader takes more than JSON: NaN, duplicate keys, integers of any
length, halves of surrogate pairs. Each of these is refused here, so that the code that uses
the object need not think of them.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from aiohttp import ClientPayloadError, web

from minserve.errors import InvalidRequestError
from minserve.server.errors import HttpError

INT_BOUND = 2**63
MAX_DIGITS = 20  # of an integer; enough for every 64-bit number
_LONG_NUMBER = re.compile(rf"[0-9]{{{MAX_DIGITS + 1}}}")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


async def read_object(request: web.Request) -> dict[str, Any]:
    """Read a request's body as one JSON object.

    Raises:
        HttpError: 413 for a body over the limit, 415 for a compressed one.
        InvalidRequestError: for a body that is not a strict JSON object.
    """
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        # A few kilobytes can unpack to gigabytes; prompts are small enough to send plain.
        raise HttpError(415, f"request bodies must not be compressed ({encoding})")
    limit = request.client_max_size
    if request.content_length is not None and request.content_length > limit:
        raise HttpError(413, f"the request body is larger than {limit / 2**20:g} MiB")
    try:
        raw = await request.read()
    except (ClientPayloadError, web.RequestPayloadError) as error:
        raise InvalidRequestError(f"the request body could not be read: {error}") from None
    return parse_object(raw)


def parse_object(raw: bytes) -> dict[str, Any]:
    """Parse strict JSON that must be an object.

    Raises:
        InvalidRequestError: naming what is wrong with it.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidRequestError("the request body is not UTF-8") from None
    hooks: dict[str, Any] = {
        "object_pairs_hook": _unique_keys,
        "parse_constant": _refuse_constant,
        "parse_float": _finite_float,
    }
    if _LONG_NUMBER.search(text):
        hooks["parse_int"] = _bounded_int
    try:
        value = json.loads(text, **hooks)
    except RecursionError:
        raise InvalidRequestError("the request body is nested too deeply") from None
    except ValueError as error:
        raise InvalidRequestError(f"the request body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequestError("the request body must be a JSON object")
    if _SURROGATE_ESCAPE.search(text):
        _refuse_lone_surrogates(value)
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise InvalidRequestError(f"the field {key!r} appears twice")
            seen.add(key)
    return result


def _refuse_constant(name: str) -> float:
    raise InvalidRequestError(f"{name} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise InvalidRequestError(f"the number {text[:40]} is too large")
    return value


def _bounded_int(text: str) -> int:
    if len(text.lstrip("-")) > MAX_DIGITS:
        raise InvalidRequestError(f"the number {text[:40]} is too large")
    return int(text)


def _refuse_lone_surrogates(value: Any) -> None:
    """Refuse a value with half of a surrogate pair in it. A loop, so that depth cannot overflow."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            if not item.isascii() and any("\ud800" <= char <= "\udfff" for char in item):
                raise InvalidRequestError("a string holds half of a surrogate pair")
        elif isinstance(item, dict):
            stack.extend(item)
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)


class Fields:
    """Takes typed fields out of a JSON object, then refuses the fields that were not taken.

    ``null`` means "not given" for every field, because clients send it with that meaning.

    Args:
        values: the object.
        where: prefix of field names in error messages, such as ``"messages[0]."``.
    """

    def __init__(self, values: dict[str, Any], where: str = "") -> None:
        self._left = {name: value for name, value in values.items() if value is not None}
        self._where = where

    def take(self, name: str) -> Any:
        """Take the raw value; ``None`` where the field is not given."""
        return self._left.pop(name, None)

    def integer(self, name: str, low: int = -INT_BOUND, high: int = INT_BOUND - 1) -> int | None:
        """Take an integer (no bool, no 1.0) in ``low..high``; ``None`` where it is not given."""
        value = self.take(name)
        if value is None:
            return None
        if not is_integer(value):
            raise self.error(name, f"must be an integer, not {brief(value)}")
        if not low <= value <= high:
            raise self.error(name, f"must be between {low} and {high}, not {value}")
        return value

    def number(self, name: str) -> float | None:
        """Take a finite number (no bool); ``None`` where it is not given."""
        value = self.take(name)
        if value is None or is_integer(value) or isinstance(value, float):
            return value
        raise self.error(name, f"must be a number, not {brief(value)}")

    def boolean(self, name: str, default: bool = False) -> bool:
        """Take ``true`` or ``false``; ``default`` where the field is not given."""
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, not {brief(value)}")
        return value

    def string(self, name: str) -> str | None:
        """Take a string; ``None`` where it is not given."""
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise self.error(name, f"must be a string, not {brief(value)}")
        return value

    def object(self, name: str) -> Fields:
        """Take a nested object's fields; those of an empty object where it is not given."""
        value = self.take(name)
        if value is not None and not isinstance(value, dict):
            raise self.error(name, f"must be an object, not {brief(value)}")
        return Fields(value or {}, f"{self._where}{name}.")

    def only(self, name: str, *harmless: Any) -> None:
        """Take an unsupported field; refuse it unless its value is absent or in ``harmless``."""
        value = self.take(name)
        if value is None or any(type(value) is type(one) and value == one for one in harmless):
            return
        raise self.error(name, f"{brief(value)} is not supported")

    def finish(self) -> None:
        """Refuse the fields that were not taken.

        Raises:
            InvalidRequestError: naming the first of these fields.
        """
        for name in self._left:
            raise self.error(name, "is not supported by this server")

    def error(self, name: str, problem: str) -> InvalidRequestError:
        """Return an error about one field, ready to raise."""
        full = f"{self._where}{name}"
        return InvalidRequestError(f"{full}: {problem}", full)


def is_integer(value: Any) -> bool:
    """Return whether JSON would write the value as an integer; a ``bool`` is an integer in Python
    only.
    """
    return isinstance(value, int) and not isinstance(value, bool)


def brief(value: Any) -> str:
    """Return a value as text for an error message, cut to 60 characters."""
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "an object"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
