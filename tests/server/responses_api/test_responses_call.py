"""Bodies of /v1/responses are what a chat is asked with."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest

from minserve.errors import InvalidRequestError
from minserve.server.body import parse_object
from minserve.server.protocol import parse_chat
from minserve.server.responses_api.responses_call import ResponsesCall, parse_responses
from minserve.structure import Structure

SCHEMA = {"enum": [None, "a"], "default": None}
TOOLS = [{"type": "function", "name": one, "parameters": SCHEMA} for one in ("f", "g")]


def parse(**fields: Any) -> ResponsesCall:
    return parse_responses(parse_object(json.dumps({"input": "x", **fields}).encode()), {})


def test_a_body_is_the_chat_that_it_stands_for() -> None:
    shared = {"temperature": 0.5, "top_k": 3, "stop": ["y"], "seed": 1, "slo": "coding",
              "priority": 2, "cache_salt": "s", "chat_template_kwargs": {"a": 1},
              "parallel_tool_calls": False}  # fmt: skip
    call = parse(
        **shared,
        instructions="i",
        max_output_tokens=7,
        tools=TOOLS,
        tool_choice={"type": "function", "name": "f"},
        text={"format": {"type": "json_object"}},
        include=["message.output_text.logprobs"],
        top_logprobs=2,
    )
    chat = parse_chat(
        {
            **shared,
            "messages": [{"role": "system", "content": "i"}, {"role": "user", "content": "x"}],
            "max_tokens": 7,
            "tools": [
                {"type": "function", "function": {"name": one["name"], "parameters": SCHEMA}}
                for one in TOOLS
            ],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
            "response_format": {"type": "json_object"},
            "logprobs": True,
            "top_logprobs": 2,
        },
        {},
    )
    assert call.params.structure == Structure.of_json(param="text.format")
    for name in ("prompts", "slo", "priority", "cache_salt", "prompt_options", "tool_use"):
        assert getattr(call, name) == getattr(chat, name), name
    settings = [
        {**{one: getattr(each.params, one) for one in each.params.__slots__}, "structure": None}
        for each in (call, chat)
    ]
    assert settings[0] == settings[1]


def test_schemas_keep_their_nulls() -> None:
    call = parse(text={"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}})
    assert call.params.structure is not None
    assert json.loads(call.params.structure.source) == SCHEMA
    assert parse(tools=TOOLS).tool_use.tools[0].parameters == SCHEMA  # type: ignore[union-attr]


def test_a_second_structure_is_refused() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse(text={"format": {"type": "json_object"}}, structured_outputs={"regex": "a"})
    assert caught.value.param == "structured_outputs"
    assert parse(structured_outputs={"regex": "a"}).params.structure is not None


def test_some_of_the_tools_may_be_allowed() -> None:
    allowed = {"type": "allowed_tools", "mode": "required",
               "tools": [{"type": "function", "name": "g"}]}  # fmt: skip
    use = parse(tools=TOOLS, tool_choice=allowed).tool_use
    assert use is not None
    assert ([one.name for one in use.tools], use.must_call) == (["g"], True)
    assert parse(tools=TOOLS, tool_choice="none").tool_use is None


def test_effort_is_named_as_it_was_sent() -> None:
    thinking = parse(reasoning={"effort": "low"}).thinking
    assert thinking.for_template(()) == ({}, ["reasoning.effort"])
    assert thinking.for_template(("reasoning_effort",)) == ({"reasoning_effort": "low"}, [])


@pytest.mark.parametrize("depth", [50, 400, 495, 600])
def test_what_is_nested_deeply_is_taken_or_refused_here_too(depth: int) -> None:
    deep = '{"a": [' * depth + "1" + "]}" * depth
    for body in (
        f'{{"input": {deep}}}',
        f'{{"input": [{{"role": "user", "content": [{deep}]}}]}}',
        f'{{"input": "x", "tools": [{{"type": "function", "name": "f", "parameters": {deep}}}]}}',
        f'{{"input": "x", "tool_choice": {deep}}}',
        f'{{"input": "x", "text": {{"format": {{"type": "json_schema", "schema": {deep}}}}}}}',
        f'{{"input": "x", "metadata": {deep}}}',
    ):
        with suppress(InvalidRequestError):
            parse_responses(parse_object(body.encode()), {})
