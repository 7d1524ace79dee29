"""Messages of a chat: what clients and agents send is taken as templates want it, or refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from minserve.errors import InvalidRequestError
from minserve.server.body import parse_object
from minserve.server.protocol import parse_chat

HELLO = [{"role": "user", "content": "hello"}]
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "add", "arguments": '{"x": [1, {"y": null}]}'},
}
ASSISTANT = {"role": "assistant", "content": None, "tool_calls": [CALL]}
# Templates take arguments as an object.
PLAIN_CALL = {**CALL, "function": {"name": "add", "arguments": {"x": [1, {"y": None}]}}}


def chat(messages: Any) -> Any:
    return parse_chat(parse_object(json.dumps({"messages": messages}).encode()), {})


def test_text_parts_are_joined_and_developer_is_system() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    call = chat(
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": parts, "name": "ann"},
            {"role": "assistant", "content": "ok", "refusal": None, "tool_calls": []},
        ]
    )
    assert call.prompts == [
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "one\ntwo", "name": "ann"},
            {"role": "assistant", "content": "ok"},
        ]
    ]


def test_what_agents_send_back_is_taken() -> None:
    call = chat(
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}]},
            {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": []},
            {"role": "assistant", "refusal": "no", "tool_calls": [CALL]},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "never"}]},
            {"role": "assistant", "content": "x", "refusal": "y", "annotations": [{"type": "u"}]},
            {"role": "tool", "content": "42", "tool_call_id": "call_1"},
            {"role": "function", "content": "43", "name": "sum", "audio": None},
        ]
    )
    assert call.prompts == [
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "reasoning_content": "hm"},
            {"role": "assistant", "content": "no", "tool_calls": [PLAIN_CALL]},
            {"role": "assistant", "content": "never"},
            {"role": "assistant", "content": "x"},
            {"role": "tool", "content": "42", "name": "add", "tool_call_id": "call_1"},
            {"role": "tool", "content": "43", "name": "sum"},
        ]
    ]
    assert call.ignored == (
        "messages.content.cache_control",
        "messages.refusal",
        "messages.annotations",
    )


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ("hello", "messages"),
        (["hello"], "messages[0]"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "wizard", "content": "x"}], "messages[0].role"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([*HELLO, {"role": "user", "content": ["x"]}], "messages[1].content[0]"),
        (
            [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "http://x"}}],
                }
            ],
            "messages[0].content[0].type",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a", "refusal": "b"}]}],
            "messages[0].content[0].refusal",
        ),
        ([{"role": "user", "content": "x", "audio": {}}], "messages[0].audio"),
        ([{"role": "assistant", "content": "x", "tool_calls": [1]}], "messages[0].tool_calls[0]"),
        ([{"role": "user", "content": "x", "tool_calls": [CALL]}], "messages[0].tool_calls"),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls[0].id"),
        (
            [{"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]}],
            "messages[0].tool_calls[0].type",
        ),
        ([{"role": "tool", "content": "x"}], "messages[0].tool_call_id"),
        ([{"role": "tool", "content": "x", "tool_call_id": "a"}], "messages[0].tool_call_id"),
        (
            [{"role": "tool", "content": "x", "tool_call_id": "call_1"}, ASSISTANT],
            "messages[0].tool_call_id",
        ),
    ],
)
def test_messages_are_refused_by_place(messages: Any, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        chat(messages)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("sent", "taken"),
    [
        ('{"a": 1}', {"a": 1}),
        ({"a": 1}, {"a": 1}),
        ("", {}),
        ("  ", {}),
        # Whatever a model wrote wrong goes back to it as it is.
        ('{"a": ', '{"a": '),
        ("[1]", "[1]"),
        ("[" * 100_000, "[" * 100_000),
    ],
)
def test_arguments_are_an_object_for_templates_where_they_are_one(sent: Any, taken: Any) -> None:
    call = {**CALL, "function": {"name": "add", "arguments": sent}}
    [[message]] = chat([{**ASSISTANT, "tool_calls": [call]}]).prompts
    assert message["tool_calls"][0]["function"]["arguments"] == taken
