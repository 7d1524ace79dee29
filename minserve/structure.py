"""The form that an output must have: JSON, a schema, a regex, a choice, a grammar. No torch here.

What a `Structure` means for tokens is worked out by `minserve.engine.structure`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from minserve.errors import InvalidRequestError

# Characters of a source. What is longer takes too long to compile, and is hardly meant.
MAX_STRUCTURE_LENGTH = 2**18
MAX_CHOICES = 4096
MAX_MARKER_LENGTH = 256


class StructureKind(StrEnum):
    """What the source of a `Structure` is."""

    JSON = "json"  # any JSON object; no source
    JSON_SCHEMA = "json_schema"  # a JSON Schema, as JSON
    REGEX = "regex"  # a regular expression (syntax of Rust's regex), which the whole output matches
    CHOICE = "choice"  # a JSON list of strings, one of which is the output
    LARK = "lark"  # a grammar like Lark's: https://github.com/guidance-ai/llguidance docs/syntax.md
    GBNF = "gbnf"  # a grammar in llama.cpp's form (GBNF), which is also a common form of EBNF


@dataclass(frozen=True, slots=True)
class Structure:
    """The form that an output has, as far as it goes: one that ends by its length is a beginning.

    Attributes:
        kind: what ``source`` is.
        source: as `StructureKind` says.
        begins_after: a text, such as ``</think>``, until which the output is free; the form is that
            of what follows. ``None``: the whole output has it.
        opener: a token's text, such as ``<think>``, with which an output may begin such a free part.
            Without it as the first token the form holds at once. ``None``: there is a free part.
        param: the field of a request that asked for it, which errors name.

    Raises:
        InvalidRequestError: where it cannot be a structure. Whether a grammar is valid is seen when
            it is compiled.
    """

    kind: StructureKind
    source: str = ""
    begins_after: str | None = None
    opener: str | None = None
    param: str = "structure"

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "kind", StructureKind(self.kind))
        except ValueError:
            kinds = ", ".join(StructureKind)
            raise self.refusal(f"has the kind {self.kind!r:.40}; kinds are {kinds}") from None
        if not isinstance(self.source, str):
            raise self.refusal(f"must be given as a text, not {self.source!r:.80}")
        if len(self.source) > MAX_STRUCTURE_LENGTH:
            raise self.refusal(
                f"has {len(self.source)} characters, and at most {MAX_STRUCTURE_LENGTH} are taken"
            )
        for marker in (self.begins_after, self.opener):
            if marker is not None and not (
                isinstance(marker, str) and 0 < len(marker) <= MAX_MARKER_LENGTH
            ):
                raise self.refusal(f"begins after a text, which {marker!r:.40} is not")
        _CHECKS[self.kind](self)

    @classmethod
    def of_json(cls, **more: Any) -> Structure:
        """Return the structure of any JSON object."""
        return cls(StructureKind.JSON, **more)

    @classmethod
    def of_schema(cls, schema: Mapping[str, Any] | bool | str, **more: Any) -> Structure:
        """Return the structure of a JSON Schema, as an object or as its JSON."""
        source = schema if isinstance(schema, str) else _to_json(schema, **more)
        return cls(StructureKind.JSON_SCHEMA, source, **more)

    @classmethod
    def of_choice(cls, choices: SequenceOf[str], **more: Any) -> Structure:
        """Return the structure of one of some strings."""
        return cls(StructureKind.CHOICE, _to_json(list(choices), **more), **more)

    @property
    def choices(self) -> list[str]:
        """The strings of a choice."""
        return json.loads(self.source)

    def refusal(self, what: str) -> InvalidRequestError:
        """Return the error of a structure that cannot be held; ``what`` follows its name."""
        return InvalidRequestError(f"{self.param} {what}", self.param)


def _to_json(value: Any, param: str = "structure", **_: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise InvalidRequestError(f"{param} cannot be written as JSON", param) from None


def _from_json(structure: Structure) -> Any:
    try:
        return json.loads(structure.source)
    except (ValueError, RecursionError) as error:
        raise structure.refusal(f"is not JSON: {error}"[:200]) from None


def _check_empty(structure: Structure) -> None:
    if structure.source:
        raise structure.refusal("is any JSON, which has no source")


def _check_schema(structure: Structure) -> None:
    if not isinstance(_from_json(structure), (dict, bool)):
        raise structure.refusal("must be a JSON Schema: an object, or true or false")


def _check_choice(structure: Structure) -> None:
    choices = _from_json(structure)
    if not isinstance(choices, list) or not choices:
        raise structure.refusal("must be a list of one string or more")
    if len(choices) > MAX_CHOICES:
        raise structure.refusal(f"has {len(choices)} choices, and at most {MAX_CHOICES} are taken")
    if not all(isinstance(one, str) and one for one in choices):
        raise structure.refusal("must hold non-empty strings")


def _check_text(structure: Structure) -> None:
    if not structure.source.strip():
        raise structure.refusal("is empty")


_CHECKS = {
    StructureKind.JSON: _check_empty,
    StructureKind.JSON_SCHEMA: _check_schema,
    StructureKind.REGEX: _check_text,
    StructureKind.CHOICE: _check_choice,
    StructureKind.LARK: _check_text,
    StructureKind.GBNF: _check_text,
}
