"""Turn bytes into a checked JSON object: strict JSON, typed fields.

Python's own JSON reader takes more than JSON: NaN, duplicate keys, integers of any
length, halves of surrogate pairs. Each of these is refused here, so that the code that uses
the object need not think of them. msgspec checks the types of fields, but does not read the JSON:
it would keep the last of duplicate keys in silence.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any, TypeVar

import msgspec

from minserve.errors import InvalidRequestError

MAX_DIGITS = 20  # of an integer; enough for every 64-bit number
# The most of a name in a body that an error repeats.
MAX_NAME = 100
# Up to here each integer has a float of its own.
_MAX_WHOLE = 2.0**53
_LONG_NUMBER = re.compile(rf"[0-9]{{{MAX_DIGITS + 1}}}")

# msgspec names the place in a value at the end of its message, in the form of a JSON path.
_PLACE = " - at `$"
_STEP = re.compile(r"\.(\w+)|\[(\d+)\]")
_FIELD = re.compile(
    r"Object (missing required|contains unknown) field `(.*?)`(?: - at `\$(.*)`)?", re.DOTALL
)
_TYPE = re.compile(r"`([^`]*)`")
_WORDS = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "a string",
    "array": "a list",
    "object": "an object",
}

_T = TypeVar("_T")


class Form(msgspec.Struct, forbid_unknown_fields=True):
    """The fields of a JSON object, their types and what stands for those that are not given."""


def parse_object(raw: bytes) -> dict[str, Any]:
    """Parse strict JSON that must be an object.

    Fields of the object that are ``null`` are left out: ``null`` means "not given", because clients
    send it with that meaning. `convert` does the same for the objects in it.

    Raises:
        InvalidRequestError: naming what is wrong with it.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidRequestError("the request body is not UTF-8") from None
    value = read_json(text)
    if not isinstance(value, dict):
        raise InvalidRequestError("the request body must be a JSON object")
    return {name: each for name, each in value.items() if each is not None}


def read_json(text: str) -> Any:
    """Parse strict JSON.

    Raises:
        InvalidRequestError: naming what is wrong with it.
    """
    hooks: dict[str, Any] = {
        "object_pairs_hook": _unique_fields,
        "parse_constant": _refuse_constant,
        "parse_float": _finite_float,
    }
    if _LONG_NUMBER.search(text):
        hooks["parse_int"] = _bounded_int
    try:
        value = json.loads(text, **hooks)
        msgspec.json.encode(value)  # Half of a surrogate pair can be read, but not written.
    except RecursionError:
        raise InvalidRequestError("the request body is nested too deeply") from None
    except UnicodeEncodeError:
        raise InvalidRequestError("a string holds half of a surrogate pair") from None
    except ValueError as error:
        raise InvalidRequestError(f"the request body is not JSON: {error}") from None
    return value


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise InvalidRequestError(f"the field {twice[:MAX_NAME]!r} appears twice")
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


def convert(value: Any, form: type[_T], where: str = "") -> _T:
    """Return a JSON value as an instance of a type, such as a `Form`.

    Fields that are ``null`` count as not given, whatever their name: answers come back in the next
    turn of a chat with many empty fields. A whole number counts as an integer however it is
    written (``16.0``), as JSON has one kind of number. Nothing else is coerced.

    Args:
        value: the value, as `parse_object` returns it.
        form: the type.
        where: the place of the value in the body; empty for the body itself.

    Raises:
        InvalidRequestError: naming the field, what it must be and what it is.
    """
    try:
        value = _given(value)
        text = ""
        for attempt in (_as_it_is, _whole_as_integers):
            try:
                return msgspec.convert(attempt(value), form)
            except msgspec.ValidationError as error:
                text = str(error)
            if "got `float`" not in text:
                break
    except RecursionError:
        raise refusal(where, "is nested too deeply") from None
    if field := _FIELD.fullmatch(text):
        name = field[2][:MAX_NAME]
        place = f"{where}{field[3] or ''}.{name}".removeprefix(".")
        is_missing = field[1].startswith("missing")
        raise refusal(place, "is required" if is_missing else "is not supported by this server")
    problem, found, path = text.rpartition(_PLACE)
    if not found:  # the value as a whole
        problem, path = text, ""
    place = f"{where}{path.removesuffix('`')}".removeprefix(".")
    for name, index in _STEP.findall(path):
        value = value[name or int(index)]
    if problem.startswith("Invalid enum value"):
        raise refusal(place, f"{brief(value)} is not supported")
    expected = _TYPE.sub(_plain_words, problem.removeprefix("Expected ").partition(", got ")[0])
    raise refusal(place, f"must be {expected}, not {brief(value)}")


def _given(value: Any) -> Any:
    """Return a value without the fields of its objects that are ``None``, at any depth."""
    if isinstance(value, dict):
        return {name: _given(each) for name, each in value.items() if each is not None}
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        return [_given(each) for each in value]
    return value


def _as_it_is(value: Any) -> Any:
    return value


def _whole_as_integers(value: Any) -> Any:
    """Return a value with its whole numbers as integers, at any depth."""
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < _MAX_WHOLE else value
    if isinstance(value, dict):
        return {name: _whole_as_integers(each) for name, each in value.items()}
    return [_whole_as_integers(each) for each in value] if isinstance(value, list) else value


def _plain_words(types: re.Match[str]) -> str:
    return " or ".join(_WORDS.get(one, one) for one in types[1].split(" | ") if one != "null")


def refusal(param: str, problem: str) -> InvalidRequestError:
    """Return an error about one field, ready to raise."""
    return InvalidRequestError(f"{param}: {problem}", param)


def brief(value: Any) -> str:
    """Return a value as text for an error message, cut to 60 characters."""
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if isinstance(value, dict):
        return "an object"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
