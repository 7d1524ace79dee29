"""The input of a response becomes the messages of a chat."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minserve.errors import InvalidRequestError
from minserve.server.body import convert
from minserve.server.parameters.responses_forms import Input
from minserve.server.responses_api.input_items import chat_messages
from minserve.server.responses_api.kinds import refuse_kinds

USER = {"role": "user", "content": "q"}
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}", "id": "fc_1"}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "7"}
THOUGHT = {
    "type": "reasoning",
    "id": "rs_1",
    "summary": [],
    "content": [{"type": "reasoning_text", "text": "hm"}],
}
SAID = {
    "type": "message",
    "id": "msg_1",
    "role": "assistant",
    "status": "completed",
    "content": [{"type": "output_text", "text": "well", "annotations": [], "logprobs": []}],
}


def messages(value: Any, instructions: str | None = None) -> list[dict[str, Any]]:
    refuse_kinds({"input": value})
    return chat_messages(convert(value, Input, "input"), instructions)[0]  # type: ignore[arg-type]


def hints(*items: Any) -> list[str]:
    return chat_messages(convert(list(items), Input, "input"), None)[1]  # type: ignore[arg-type]


def refused(value: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        messages(value)
    return caught.value


def test_a_text_is_the_users() -> None:
    assert messages("q") == [USER]
    assert messages("q", "be nice") == [{"role": "system", "content": "be nice"}, USER]


def test_the_items_of_one_answer_are_one_message() -> None:
    call = {"type": "function", "id": "c1", "function": {"name": "f", "arguments": "{}"}}
    assert messages([USER, THOUGHT, SAID, CALL, RESULT, SAID]) == [
        USER,
        {"role": "assistant", "content": "well", "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "7"},
        {"role": "assistant", "content": "well"},
    ]


def test_calls_in_a_row_are_one_messages() -> None:
    (message, *results) = messages([CALL, {**CALL, "call_id": "c2"}, RESULT])
    assert [one["id"] for one in message["tool_calls"]] == ["c1", "c2"]
    assert message["content"] == ""
    assert [one["role"] for one in results] == ["tool"]


def test_what_comes_behind_an_answers_text_or_calls_is_another_answer() -> None:
    said = [(one.get("content"), "tool_calls" in one) for one in messages([SAID, SAID, CALL, SAID])]
    assert said == [("well", False), ("well", True), ("well", False)]
    assert [one.get("reasoning_content") for one in messages([SAID, THOUGHT, THOUGHT, SAID])] == [
        None,
        "hm\nhm",
    ]


def test_system_messages_at_the_beginning_are_one() -> None:
    first, second = {"role": "developer", "content": "b"}, {"role": "system", "content": "c"}
    assert messages([first, second, USER, second, second], "a") == [
        {"role": "system", "content": "a\n\nb\n\nc"},
        USER,
        {"role": "system", "content": "c"},
        {"role": "system", "content": "c"},
    ]
    assert [one["role"] for one in messages([SAID, second, SAID])] == [
        "assistant", "system", "assistant",
    ]  # fmt: skip


def test_parts_of_a_content_are_joined_as_those_of_a_chat() -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    assert messages([{"role": "user", "content": parts}])[0]["content"] == "a\nb"
    assert messages([CALL, {**RESULT, "output": parts}])[1]["content"] == "a\nb"
    refusal = [{"type": "refusal", "refusal": "no"}]
    assert messages([{"role": "assistant", "content": refusal}])[0]["content"] == "no"


def test_a_summary_stands_for_reasoning_that_is_not_given() -> None:
    summary = [{"type": "summary_text", "text": "in short"}]
    (message,) = messages([{"type": "reasoning", "summary": summary}])
    assert message["reasoning_content"] == "in short"
    (message,) = messages([{**THOUGHT, "summary": summary}])
    assert message["reasoning_content"] == "hm"


def test_what_changes_nothing_is_named() -> None:
    assert hints(USER, THOUGHT, SAID, CALL, RESULT) == []
    part = {**SAID["content"][0], "annotations": [{"type": "file_path"}], "logprobs": [{}]}  # type: ignore[index]
    summary = [{"type": "summary_text", "text": "in short"}]
    named = hints(
        {**SAID, "content": [part], "phase": "commentary"},
        {**THOUGHT, "summary": summary, "encrypted_content": "gAAA"},
    )
    assert named == [
        "input.phase",
        "input.content.annotations",
        "input.content.logprobs",
        "input.encrypted_content",
        "input.summary",
    ]


@pytest.mark.parametrize(
    ("items", "param", "advice"),
    [
        ([], "input", "length >= 1"),
        ([{"role": "user"}], "input[0].content", "is required"),
        ([{"content": "q"}], "input[0].role", "is required"),
        ([{"role": "robot", "content": "q"}], "input[0].role", '"robot" is not supported'),
        ([{**USER, "name": "x"}], "input[0].name", "does not belong"),
        ([{**USER, "surprise": 1}], "input[0].surprise", "is not supported"),
        ([USER, {**CALL, "call_id": ""}], "input[1].call_id", "is required"),
        ([USER, RESULT], "input[1].call_id", "send the whole conversation as input"),
        ([RESULT, CALL], "input[0].call_id", "send the whole conversation as input"),
        ([{"type": "item_reference", "id": "x"}], "input[0].type", "send the item itself"),
        ([{"type": "web_search_call", "id": "x"}], "input[0].type", "runs no tools"),
        (
            [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}],
            "input[0].content[0].type",
            "reads and writes text only",
        ),
        ([CALL, {**RESULT, "output": [{"type": "input_file"}]}], "input[1].output[0].type", "text"),
        ([{**THOUGHT, "content": [{"type": "input_text", "text": "a"}]}], "input[0].content[0].type", "must be one of"),
        ([{"role": "user", "content": [{"type": "input_text"}]}], "input[0].content[0].text", "is required"),
        (
            [{"role": "user", "content": [{"type": "input_text", "text": "a", "refusal": "b"}]}],
            "input[0].content[0].refusal",
            "does not belong",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_by_its_place(items: Any, param: str, advice: str) -> None:
    error = refused(items)
    assert error.param == param
    assert advice in str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.just("user"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)
ITEM = st.sampled_from([USER, CALL, RESULT, THOUGHT, SAID])


@settings(max_examples=50)
@given(st.lists(st.tuples(ITEM, st.sampled_from(["type", "content", "output", "call_id"]), JSON)))
def test_any_items_are_taken_or_refused_by_their_place(drawn: list[Any]) -> None:
    items = [{**item, name: value} for item, name, value in drawn]
    param = None
    try:
        messages(items)
    except InvalidRequestError as error:
        param = error.param
    assert param is None or param.startswith("input")
