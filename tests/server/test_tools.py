"""What a request says of tools is checked, each mistake named by its place."""

from __future__ import annotations

from typing import Any

import pytest

from minserve.errors import InvalidRequestError
from minserve.server.protocol import parse_chat, parse_tokenize
from minserve.server.tools import MAX_TOOL_NAME, MAX_TOOLS, NO_PARAMETERS, ToolUse

HELLO = [{"role": "user", "content": "hello"}]


def tool(name: str = "f", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


def use(tools: Any, **more: Any) -> ToolUse | None:
    return parse_chat({"messages": HELLO, "tools": tools, **more}, {}).tool_use


def test_a_tool_is_taken_as_it_was_sent() -> None:
    schema = {"type": "object", "properties": {"x": {"enum": ["a", None], "default": None}}}
    found = use([tool("a.b-c:d/e_1", description="d", parameters=schema, strict=True)])
    assert found is not None
    [one] = found.tools
    assert one == ("a.b-c:d/e_1", "d", schema, True)
    assert one.for_template() == {
        "type": "function",
        "function": {"name": "a.b-c:d/e_1", "description": "d", "parameters": schema},
    }
    assert (found.must_call, found.forced, found.parallel) == (False, None, True)


def test_a_tool_without_parameters_takes_none() -> None:
    for more in ({}, {"parameters": None}, {"parameters": {}}, {"description": None}):
        found = use([tool(**more)])
        assert found is not None
        assert found.tools[0].parameters == NO_PARAMETERS


def test_choices() -> None:
    both = [tool("f"), tool("g")]
    assert use([]) is None
    assert use(both, tool_choice="none") is None
    assert parse_chat({"messages": HELLO, "tool_choice": "none"}, {}).tool_use is None
    required = use(both, tool_choice="required", parallel_tool_calls=False)
    assert required is not None
    assert (required.must_call, required.parallel, len(required.callable)) == (True, False, 2)
    named = use(both, tool_choice=tool("g"))
    assert named is not None
    assert (named.must_call, named.forced) == (True, "g")
    assert [one.name for one in named.callable] == ["g"]
    for mode in ("auto", "required"):
        allowed = {"mode": mode, "tools": [tool("g")]}
        some = use(both, tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
        assert some is not None
        assert [one.name for one in some.tools] == ["g"]
        assert some.must_call == (mode == "required")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": {"a": 1}}, "tools"),
        ({"tools": "f"}, "tools"),
        ({"tools": [tool(f"t{i}") for i in range(10_000)]}, "tools"),
        ({"tools": [1]}, "tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [{**tool(), "type": "custom"}]}, "tools[0].type"),
        ({"tools": [tool(), tool("g", parameters=[1])]}, "tools[1].function.parameters"),
        ({"tools": [tool(parameters="x")]}, "tools[0].function.parameters"),
        ({"tools": [tool(description=5)]}, "tools[0].function.description"),
        ({"tools": [tool(strict="yes")]}, "tools[0].function.strict"),
        ({"tools": [tool("")]}, "tools[0].function.name"),
        ({"tools": [tool("a b")]}, "tools[0].function.name"),
        ({"tools": [tool('x"}')]}, "tools[0].function.name"),
        ({"tools": [tool("ü")]}, "tools[0].function.name"),
        ({"tools": [tool("x" * (MAX_TOOL_NAME + 1))]}, "tools[0].function.name"),
        ({"tools": [tool("x" * 2**20)]}, "tools[0].function.name"),
        ({"tools": [tool(), tool("g"), tool()]}, "tools[2].function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": tool()}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": "f"}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": 5}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": tool("g")}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": tool("g" * 2**20)}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tools": [tool()], "tool_choice": {"type": "other"}}, "tool_choice.type"),
        (
            {
                "tools": [tool()],
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "auto", "tools": [tool("g")]},
                },
            },
            "tool_choice",
        ),
        ({"tools": [tool()], "parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"reasoning_format": "deepseek-legacy"}, "reasoning_format"),
        ({"include_reasoning": 1}, "include_reasoning"),
        ({"reasoning_effort": [1]}, "reasoning_effort"),
    ],
)
def test_mistakes_are_named_by_their_place(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_chat({"messages": HELLO, **fields}, {})
    assert caught.value.param == param
    assert len(str(caught.value)) < 1000


def test_as_many_tools_as_there_may_be() -> None:
    found = use([tool(f"t{i}") for i in range(MAX_TOOLS)])
    assert found is not None
    assert len(found.tools) == MAX_TOOLS


def test_texts_have_no_tools() -> None:
    assert parse_tokenize({"messages": HELLO, "tools": [tool()]}).tool_use is not None
    with pytest.raises(InvalidRequestError) as caught:
        parse_tokenize({"prompt": "x", "tools": [tool()]})
    assert caught.value.param == "tools"
