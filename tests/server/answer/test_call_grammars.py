"""Grammars of calls allow what the parsers read, with arguments by their schemas, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from minserve.engine.structures.compiler import compile_matcher
from minserve.engine.structures.trie import TokenTrie
from minserve.server.answer.formats import TOOL_PARSERS
from minserve.server.answer.grammar import CallRules
from minserve.server.tools import ToolSpec
from minserve.structure import Structure, StructureKind

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = (ToolSpec("f", None, CITY), ToolSpec("g.h", strict=True, parameters=CITY), ToolSpec("i"))
MARKS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>")
F, G = '{"name": "f", "arguments": {"city": "K"}}', '{"name": "g.h", "arguments": {"city": "K"}}'
NO = '{"name": "f", "arguments": {"town": "K"}}'


def allows(text: str, name: str, marks: bool = False, **rules: Any) -> bool:
    """Whether a whole output may be a text, where its marks are tokens of their own or not."""
    tokens = [bytes([i]) for i in range(256)] + [one.encode() for one in MARKS]
    trie = TokenTrie(tokens, range(256, len(tokens)), list)
    ids = {one: 256 + i for i, one in enumerate(MARKS)} if marks else {}
    given = CallRules(**{"tools": TOOLS, "mark_ids": ids, **rules})
    grammar = TOOL_PARSERS[name].grammar(given)
    matcher = compile_matcher(Structure(StructureKind.LARK, grammar), trie)
    encoded: list[int] = []
    while text:
        mark = next((one for one in ids if text.startswith(one)), None)
        encoded += text[0].encode() if mark is None else [ids[mark]]
        text = text[len(mark or "x") :]
    return matcher.try_consume_tokens(encoded) == len(encoded) and matcher.is_accepting()


def hermes(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


@pytest.mark.parametrize("marks", [False, True])
def test_hermes(marks: bool) -> None:
    def held(text: str, **rules: Any) -> bool:
        return allows(text, "hermes", marks, **rules)

    assert held(hermes(F))
    assert held("\n\n" + hermes(G, F, '{"name": "i", "arguments": {"any": [1]}}'))
    assert not held(hermes(F, F), many=False)
    assert not any(
        map(held, ("", "Hello", hermes(NO), hermes(F) + "x", hermes(F.replace("f", "x"))))
    )
    assert held(hermes(F), tools=TOOLS[:1])
    assert not held(hermes(G), tools=TOOLS[:1])


@pytest.mark.parametrize("marks", [False, True])
def test_free_answers_hold_strict_calls_to_their_schemas(marks: bool) -> None:
    def held(text: str, **rules: Any) -> bool:
        return allows(text, "hermes", marks, freely=True, **rules)

    assert held("")
    assert held("Hello, <b>you</b>")
    assert held(f"So:\n{hermes(G, F)}\nbye")
    assert held(hermes(NO))  # a tool that is not strict
    assert not held(hermes(NO.replace("f", "g.h")))
    assert not held(hermes(F, F), many=False)
    if not marks:
        assert not held("<tool_call> x")


@pytest.mark.parametrize("marks", [False, True])
def test_mistral(marks: bool) -> None:
    def held(text: str, **rules: Any) -> bool:
        return allows(text, "mistral", marks, **rules)

    assert held(f"[TOOL_CALLS] [{F}, {G}]")
    assert not any(map(held, (f"[TOOL_CALLS] [{F}", f"[TOOL_CALLS] [{NO}]", "[TOOL_CALLS] []")))
    assert not held(f"[TOOL_CALLS] [{F}, {G}]", many=False)
    assert held(f"Hi [TOOL_CALLS] [{F}]", freely=True)
    newer = {"template": "... [ARGS] ..."}
    f, g = '[TOOL_CALLS]f[ARGS]{"city": "K"}', '[TOOL_CALLS]g.h[ARGS]{"city": "K"}'
    assert held(f + g, **newer)
    assert not held(f + g, **newer, many=False)
    assert not held(f.replace("city", "town"), **newer)
    assert held(f"Hi {f} and {g}.", **newer, freely=True)


def test_llama3() -> None:
    call = F.replace("arguments", "parameters")
    assert allows(call, "llama3")
    assert not allows(f"{call}; {call}", "llama3")
    assert not allows(NO.replace("arguments", "parameters"), "llama3")
    assert not allows("Hello", "llama3")
