"""`Structure`s in the language of llguidance, which runs them: https://github.com/guidance-ai/llguidance.

A JSON Schema's keywords that llguidance does not know how to hold are errors, never passed over.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

from llguidance import LLMatcher, LLParserLimits
from llguidance.gbnf_to_lark import any_to_lark

from minserve.structure import Structure, StructureKind

# They bound what compiling and each token may cost; the library's own are 2 to 25 times as high.
# An ambiguous grammar takes time that grows with the square of its items in a row.
LIMITS = LLParserLimits(
    max_items_in_row=1000,
    initial_lexer_fuel=500_000,
    step_lexer_fuel=100_000,
    step_max_items=10_000,
    max_lexer_states=10_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
# Between two parts of JSON is nothing, a space, or the indentation of a new line. Were any spaces
# allowed, a model may write them to its end.
_JSON_OPTIONS: Any = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": r"( |\r?\n[ \t]{0,24})",
    "coerce_one_of": False,
    "lenient": False,
}
# Its translation to Lark, in Python, takes time that grows with the square of its length.
MAX_GBNF_LENGTH = 2**14
# The library looks from the beginning of each of them for what stands behind them all.
_BLANK_LINES = re.compile(r"\n\s*\n")
MAX_ERROR_LENGTH = 300
_SPECIAL = re.compile(r"([\\.+*?()|\[\]{}^$#&\-~/])")


class GrammarError(Exception):
    """A structure that is no valid grammar, or that asks for too much; says what is wrong."""


def simplified(structure: Structure) -> Structure:
    """Return the structure, in a form that is cheaper to compile where it is GBNF.

    Raises:
        GrammarError: for what is no GBNF, or too long for it.
    """
    if structure.kind is not StructureKind.GBNF:
        return structure
    if len(structure.source) > MAX_GBNF_LENGTH:
        raise GrammarError(
            f"has {len(structure.source)} characters, and at most {MAX_GBNF_LENGTH} of a grammar "
            "are taken"
        )
    try:
        lark = any_to_lark(_BLANK_LINES.sub("\n", structure.source))
    except RecursionError:
        raise GrammarError("is nested too deeply") from None
    except Exception as error:  # the library raises bare ones
        raise GrammarError(f"is no valid grammar: {brief(str(error))}") from None
    return replace(structure, kind=StructureKind.LARK, source=lark)


def to_grammar(structure: Structure) -> str:
    """Return a structure as llguidance takes it.

    Raises:
        GrammarError: where it is none.
    """
    structure = simplified(structure)
    source = structure.source
    match structure.kind:
        case StructureKind.JSON:
            return _json('{"type": "object"}')
        case StructureKind.JSON_SCHEMA:
            schema = json.loads(source)
            if schema is False:
                raise GrammarError("allows no output at all")
            if schema is True:
                return _json("{}")
            if "x-guidance" in schema:
                raise GrammarError("has x-guidance, whose options are not the request's to set")
            return _json(source)
        case StructureKind.REGEX:
            return LLMatcher.grammar_from_regex(source)
        case StructureKind.CHOICE:
            # As a regex: alternatives of a Lark grammar take a hundred times as long.
            return LLMatcher.grammar_from_regex(
                "|".join(_SPECIAL.sub(r"\\\1", one) for one in structure.choices)
            )
        case _:
            return LLMatcher.grammar_from_lark(source)


def brief(text: str) -> str:
    """Return the beginning of an error, on one line."""
    text = " ".join(text.replace("<non-verbose/>", "").split())
    return text if len(text) <= MAX_ERROR_LENGTH else text[: MAX_ERROR_LENGTH - 3] + "..."


def _json(schema: str) -> str:
    try:
        return LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_OPTIONS)
    except ValueError as error:
        raise GrammarError(f"is no JSON schema: {brief(str(error))}") from None
