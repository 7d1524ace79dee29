"""Answers with thinking and calls, built from scripted deltas: whole and in chunks."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk
from test_reply import STOP, ByteTokenizer, Handle, chunks, entry, letters, whole

from minserve.chat_formats import REASONING_FORMATS
from minserve.outputs import OutputDelta
from minserve.request import FinishReason
from minserve.server.answer.answer_parser import AnswerForm
from minserve.server.protocol import parse_chat
from minserve.server.reply import Reply

CALLS = (
    'Well.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n'
    '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
)
THOUGHT = "<think>\nhm\n</think>\n\n"
END = OutputDelta(**STOP, stop_reason=10, token_ids=(10,))


class ToldHandle(Handle):
    """A handle that notes whether it was ended since all was told."""

    completed = False

    def complete(self) -> None:
        self.completed = True


def reply(handle: Any = None, only_one: bool = False, fields: Any = None, **form: Any) -> Reply:
    call = parse_chat({"messages": [{"role": "user", "content": "x"}], **(fields or {})}, {})
    read = AnswerForm(tools="hermes", only_one=only_one, **form)
    return Reply(replace(call, form=read), [handle or ToldHandle()], "m", ByteTokenizer())


def of(text: str, index: int = 0) -> list[OutputDelta]:
    return [letters(one, index=index) for one in text] + [END._replace(index=index)]


def joined(made: list[dict[str, Any]]) -> Any:
    """What the openai client makes of a stream."""
    state = ChatCompletionStreamState()
    for one in made:
        state.handle_chunk(ChatCompletionChunk.model_validate(one))
    return state.current_completion_snapshot


def test_a_whole_answer_has_thinking_content_and_calls() -> None:
    think = REASONING_FORMATS["think"]
    body = whole(reply(reasoning=think), *of(THOUGHT + CALLS))
    [choice] = body["choices"]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert (message["reasoning_content"], message["content"]) == ("hm", "Well.")
    assert message["role"] == "assistant"
    first, second = message["tool_calls"]
    assert first["type"] == "function"
    assert first["id"] != second["id"]
    assert first["function"] == {"name": "f", "arguments": '{"a": 1}'}
    assert second["function"] == {"name": "g", "arguments": "{}"}
    # "\nhm\n", each a token
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}
    assert body["usage"]["completion_tokens"] == len(THOUGHT + CALLS) + 1


def test_a_stream_tells_the_same_a_piece_at_a_time() -> None:
    think = REASONING_FORMATS["think"]
    made = chunks(reply(reasoning=think), *of(THOUGHT + CALLS))
    deltas = [one["choices"][0]["delta"] for one in made]
    assert deltas[0] == {"role": "assistant", "content": None, "reasoning_content": "h"}
    assert deltas[-1] == {}
    assert made[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert all(one["choices"][0]["finish_reason"] is None for one in made[:-1])
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [call["index"] for call in calls] == sorted(call["index"] for call in calls)
    assert calls[0]["function"] == {"name": "f", "arguments": "{"}
    assert set(calls[1]) == {"index", "function"}
    choice = joined(made).choices[0]
    assert choice.message.content == "Well."
    assert choice.message.reasoning_content == "hm"
    assert [one.function.arguments for one in choice.message.tool_calls] == ['{"a": 1}', "{}"]


def test_a_call_alone_has_no_content() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    assert whole(reply(), *of(text))["choices"][0]["message"]["content"] is None
    made = chunks(reply(), letters(text), END)
    assert made[0]["choices"][0]["delta"]["content"] is None
    [call] = made[0]["choices"][0]["delta"]["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": '{"a": 1}'}
    assert whole(reply(), END)["choices"][0]["message"]["content"] == ""


def test_an_output_that_is_cut_off_ends_by_its_length() -> None:
    cut = OutputDelta(request_id="r", finish_reason=FinishReason.LENGTH)
    deltas = [letters('<tool_call>{"name": "f", "arguments": {"a'), cut]
    [choice] = whole(reply(), *deltas)["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"a'
    [choice] = whole(reply(reasoning=REASONING_FORMATS["think"]), letters("<think>a b"), cut)[
        "choices"
    ]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("length", "")
    assert choice["message"]["reasoning_content"] == "a b"


def test_thinking_may_be_left_out_and_is_counted_all_the_same() -> None:
    think = REASONING_FORMATS["think"]
    body = whole(reply(reasoning=think, includes=False), *of("<think>ab</think>c"))
    assert body["choices"][0]["message"] == {
        "role": "assistant",
        "content": "c",
        "refusal": None,
    }
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2}
    made = chunks(reply(reasoning=think, includes=False), *of("<think>ab</think>c"))
    assert [one["choices"][0]["delta"] for one in made] == [
        {"role": "assistant", "content": "c"},
        {},
    ]


def test_one_call_ends_the_answer_and_the_output() -> None:
    for make in (whole, chunks):
        handle = ToldHandle()
        one = reply(handle, only_one=True)
        aborted = OutputDelta(request_id="r", finish_reason=FinishReason.ABORT)
        made: Any = make(one, *of(CALLS)[:-1], aborted)  # type: ignore[operator]
        assert handle.completed
        assert one.is_done(0, aborted)
        choice = joined(made).choices[0] if make is chunks else None
        if choice is None:
            [found] = made["choices"]
            assert found["finish_reason"] == "tool_calls"
            assert len(found["message"]["tool_calls"]) == 1
            ends = CALLS.index("}}") + len("}}")
            assert made["usage"]["completion_tokens"] == ends
        else:
            assert choice.finish_reason == "tool_calls"
            assert len(choice.message.tool_calls) == 1


def test_choices_do_not_mix() -> None:
    two = {"n": 2}
    first, second = of(CALLS), of("Hello there.", index=1)
    mixed = [delta for pair in zip(first, second, strict=False) for delta in pair]
    mixed += first[len(second) :] + second[len(first) :]
    one, other = whole(reply(fields=two), *mixed)["choices"]
    assert one["finish_reason"], other["finish_reason"] == ("tool_calls", "stop")
    assert other["message"]["content"] == "Hello there."
    assert len(one["message"]["tool_calls"]) == 2
    # The request is ended once nothing more of any choice is to be told.
    handle = ToldHandle()
    early = first[: CALLS.index("}}") + 2]
    told = reply(handle, only_one=True, fields=two)
    whole(told, *early, *second[:-1])
    assert not handle.completed
    aborted = OutputDelta(request_id="r", finish_reason=FinishReason.ABORT)
    made = whole(told, second[-1], aborted)
    assert handle.completed
    assert [choice["finish_reason"] for choice in made["choices"]] == ["tool_calls", "stop"]


def test_log_probabilities_are_of_all_tokens_in_their_order() -> None:
    think = REASONING_FORMATS["think"]
    text = f"{THOUGHT}a{CALLS}"
    deltas = [letters(one, logprobs=(entry(ord(one)),)) for one in text] + [END]
    fields = {"logprobs": True}
    [choice] = whole(reply(reasoning=think, fields=fields), *deltas)["choices"]
    assert "".join(one["token"] for one in choice["logprobs"]["content"]) == text
    made = chunks(reply(reasoning=think, fields=fields), *deltas)
    streamed = [
        one["token"]
        for chunk in made
        if (logprobs := chunk["choices"][0]["logprobs"]) is not None
        for one in logprobs["content"]
    ]
    assert "".join(streamed) == text
    json.dumps(made)
