"""Responses of scripted outputs, over a real socket, as OpenAI's client reads them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import openai
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from test_generation import (
    BROKEN,
    END,
    REFUSED,
    SOON_S,
    ScriptedHandle,
    failure,
    read,
    reader_of_comments,
    serve,
)
from test_reply import ByteTokenizer, entry, letters

from minserve.chat_formats import REASONING_FORMATS
from minserve.outputs import OutputDelta
from minserve.request import FinishReason
from minserve.server.answer.answer_parser import AnswerForm
from minserve.server.errors import error_body, to_http_error
from minserve.server.json_array import PIECE
from minserve.server.responses_api.response_reply import ResponseReply
from minserve.server.responses_api.responses_call import ResponsesCall, parse_responses
from minserve.slo.attainment import Outcome, SLOReport
from minserve.slo.objectives import Targets

EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
THINKS = AnswerForm(reasoning=REASONING_FORMATS["think"])
CALLS = AnswerForm(tools="hermes", tool_names=frozenset({"add"}), reasoning=THINKS.reasoning)
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
LOGPROBS = "message.output_text.logprobs"


def responses_of(
    form: AnswerForm | None = None,
) -> Callable[..., tuple[ResponsesCall, ResponseReply]]:
    """What makes the call and the reply of a response whose text is read in that way."""

    def make(handles: list[Any], fields: dict[str, Any]) -> tuple[ResponsesCall, ResponseReply]:
        call = replace(parse_responses({"input": "x", **fields}, {}), form=form)
        return call, ResponseReply(call, handles, "m", ByteTokenizer())  # type: ignore[arg-type]

    return make


def respond(*script: Any, form: AnswerForm | None = None, **fields: Any) -> Response:
    """A whole response, which fits the client's types."""
    handle = ScriptedHandle(*script)
    status, _, text = serve([handle], read, make=responses_of(form), **fields)
    assert status == 200
    return Response.model_validate_json(text)


def events_of(*script: Any, form: AnswerForm | None = None, **fields: Any) -> list[Any]:
    """The events of a stream, each of which fits the client's types and has its type as its name."""
    handle = ScriptedHandle(*script)
    _, kind, text = serve([handle], read, make=responses_of(form), stream=True, **fields)
    assert kind == "text/event-stream; charset=utf-8"
    events = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = EVENTS.validate_json(data.removeprefix("data: "))
        assert name == f"event: {event.type}"
        assert event.sequence_number == len(events)
        events.append(event)
    return events


def outline(response: Any) -> list[tuple[str, str]]:
    """The type and the text of each item."""
    return [
        (one.type, one.arguments if one.type == "function_call" else one.content[0].text)
        for one in response.output
    ]


# --- whole responses and streams tell the same ---


def pieces(text: str, size: int, **end: Any) -> list[OutputDelta]:
    """A text in deltas of so many characters, the last of which ends the output."""
    cut = [text[i : i + size] for i in range(0, len(text), size)]
    return [*map(letters, cut[:-1]), letters(cut[-1], **{**END, **end})]


def test_thinking_text_and_calls_are_items_however_the_text_is_cut() -> None:
    text = f"<think>hm, so</think>\n\nI add.\n{CALL}\n{CALL}"
    for size in (1, 3, 1000):
        whole = respond(*pieces(text, size), form=CALLS)
        assert outline(whole) == [
            ("reasoning", "hm, so"),
            ("message", "I add."),
            ("function_call", '{"a": 1}'),
            ("function_call", '{"a": 1}'),
        ]
        assert whole.status == "completed"
        assert whole.output_text == "I add."
        assert len({one.call_id for one in whole.output if one.type == "function_call"}) == 2
        events = events_of(*pieces(text, size), form=CALLS)
        assert [one.type for one in events[:2]] == ["response.created", "response.in_progress"]
        assert [one.response.output for one in events[:2]] == [[], []]
        assert events[-1].type == "response.completed"
        assert outline(events[-1].response) == outline(whole)


def test_usage_counts_the_thinking() -> None:
    usage = respond(*pieces("<think>hm</think>yes", 1), form=THINKS).usage
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (2, 20, 22)
    assert usage.output_tokens_details.reasoning_tokens == 2
    cached = respond(letters("a", num_cached_tokens=1, **END)).usage
    assert cached is not None
    assert cached.input_tokens_details.cached_tokens == 1


def test_an_output_that_is_cut_is_incomplete() -> None:
    cut = {"finish_reason": FinishReason.LENGTH}
    whole = respond(*pieces("<think>hm", 2, **cut), form=THINKS)
    assert whole.status == "incomplete"
    assert whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert [one.status for one in whole.output] == ["incomplete"]
    last = events_of(*pieces("<think>hm", 2, **cut), form=THINKS)[-1]
    assert last.type == "response.incomplete"
    assert outline(last.response) == outline(whole) == [("reasoning", "hm")]


def test_an_answer_that_may_call_once_ends_there() -> None:
    text = f"{CALL} and more"
    form = replace(CALLS, only_one=True)
    aborted = OutputDelta(request_id="r", index=0, finish_reason=FinishReason.ABORT)
    for script in (pieces(text, 4), [*map(letters, text), aborted]):
        whole = respond(*script, form=form)
        assert (whole.status, outline(whole)) == ("completed", [("function_call", '{"a": 1}')])
        assert outline(events_of(*script, form=form)[-1].response) == outline(whole)


def test_a_response_tells_what_was_asked() -> None:
    tool = {"type": "function", "name": "add", "parameters": {"type": "object", "default": None}}
    asked = {
        "instructions": "Be brief.",
        "tools": [tool],
        "tool_choice": {"type": "function", "name": "add"},
        "parallel_tool_calls": False,
        "temperature": 0.5,
        "max_output_tokens": 9,
        "metadata": {"a": "b"},
        "text": {"format": {"type": "json_object"}},
        "reasoning": {"effort": "low"},
    }
    told = json.loads(
        serve([ScriptedHandle(letters("a", **END))], read, make=responses_of(), **asked)[2]
    )
    for name, value in asked.items():
        if name not in ("tools", "reasoning"):
            assert told[name] == value, name
    assert told["tools"] == [{"description": None, "strict": None, **tool}]
    assert told["reasoning"]["effort"] == "low"
    assert told["store"] is told["background"] is False
    plain = respond(letters("a", **END))
    assert (plain.instructions, plain.tools, plain.tool_choice) == (None, [], "auto")


# --- log probabilities ---


def test_log_probabilities_are_those_of_the_text_alone() -> None:
    def with_logprobs(text: str, **end: Any) -> list[OutputDelta]:
        script = [letters(char, logprobs=(entry(ord(char)),)) for char in text]
        return [*script[:-1], script[-1]._replace(**end)]

    script = with_logprobs("<think>hm</think>yes", **END)
    fields: dict[str, Any] = {"form": THINKS, "include": [LOGPROBS]}
    content = respond(*script, **fields).output[1].content[0]  # type: ignore[union-attr, index]
    assert "".join(one.token for one in content.logprobs or ()) == content.text == "yes"  # type: ignore[union-attr]
    events = events_of(*script, **fields)
    deltas = [one for one in events if one.type == "response.output_text.delta"]
    assert ["".join(token.token for token in one.logprobs) for one in deltas] == ["y", "e", "s"]
    # Several tokens at once, as drafts make them.
    text = "<think>hm</think>yes"
    at_once = letters(text, logprobs=tuple(entry(ord(char)) for char in text), **END)
    content = respond(at_once, **fields).output[1].content[0]  # type: ignore[union-attr, index]
    assert "".join(one.token for one in content.logprobs or ()) == "yes"  # type: ignore[union-attr]
    plain = respond(*with_logprobs("<b>", **END), **fields).output[0].content[0]  # type: ignore[union-attr, index]
    assert "".join(one.token for one in plain.logprobs or ()) == "<b>"  # type: ignore[union-attr]


def test_a_stream_with_much_in_it_comes_in_pieces() -> None:
    top = tuple((token, -2.0) for token in range(10))
    script = [letters("x", logprobs=(entry(120, top=top),)) for _ in range(500)]
    handle = ScriptedHandle(*script, letters("", **END))
    fields = {"include": [LOGPROBS], "top_logprobs": 10, "stream": True}
    text = serve([handle], read, make=responses_of(), **fields)[2]
    *_, last = text.removesuffix("\n\n").split("\n\n")
    name, data = last.split("\n")
    assert name == "event: response.completed"
    assert len(data) > PIECE
    part = json.loads(data.removeprefix("data: "))["response"]["output"][0]["content"][0]
    assert part["text"] == "x" * 500
    assert [len(one["top_logprobs"]) for one in part["logprobs"]] == [10] * 500


# --- promises ---


def test_the_usage_tells_what_became_of_the_promise() -> None:
    report = SLOReport(
        name="coding", admitted=True, attained=True, attained_mean=True,
        outcome=Outcome.ATTAINED, targets=Targets(ttft_s=1.0), ttft_s=0.5,
    )  # fmt: skip
    script = [letters("a"), letters("b", slo=report, **END)]
    usage = respond(*script).to_dict()["usage"]
    assert usage["slo"]["class"] == "coding"  # type: ignore[index]
    assert events_of(*script)[-1].response.to_dict()["usage"] == usage


# --- failures ---


def test_a_failure_in_mid_stream_tells_what_there_was_and_is_an_error_to_clients() -> None:
    script = [*map(letters, "<think>hm</think>ye"), failure(BROKEN)]
    *_, failed, error = events_of(*script, form=THINKS)
    assert failed.type == "response.failed"
    assert failed.response.status == "failed"
    assert failed.response.error.code == "server_error"
    assert failed.response.error.message == str(BROKEN)
    assert outline(failed.response) == [("reasoning", "hm"), ("message", "ye")]
    assert [one.status for one in failed.response.output] == ["completed", "incomplete"]
    assert (error.type, error.message, error.code) == ("error", str(BROKEN), "generation_failed")

    async def use(url: str) -> tuple[list[str], str]:
        names = []
        async with openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0) as client:
            try:
                async for event in await client.responses.create(model="m", input="x", stream=True):
                    names.append(event.type)
            except openai.APIError as raised:
                return names, raised.code or ""
        return names, "no error"

    names, code = serve([ScriptedHandle(*script)], use, make=responses_of(), stream=True)
    assert names[-1] == "response.failed"
    assert code == "generation_failed"


def test_until_the_first_token_an_error_has_its_status() -> None:
    for stream in (False, True):
        handle = ScriptedHandle(failure(REFUSED))
        status, kind, text = serve([handle], read, make=responses_of(), stream=stream)
        assert (status, kind.split(";")[0]) == (429, "application/json")
        assert json.loads(text) == error_body(to_http_error(REFUSED))


def test_a_failure_behind_comments_alone_is_an_error_to_clients() -> None:
    go = asyncio.Event()
    handle = ScriptedHandle(go, failure(BROKEN))

    async def use(url: str) -> str:
        async with (
            openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0) as client,
            client.responses.stream(model="m", input="x") as stream,
        ):
            go.set()  # the status was there before any event
            try:
                await stream.get_final_response()
            except openai.APIError as error:
                return error.code or ""
        return "no error"

    settings = {"make": responses_of(), "first_byte_s": SOON_S, "stream": True}
    assert serve([handle], use, **settings) == "generation_failed"


def test_a_stream_that_waits_gets_comments_and_no_marker_at_its_end() -> None:
    go = asyncio.Event()
    handle = ScriptedHandle(go, letters("a", **END))
    use = reader_of_comments(2, go)
    settings = {"make": responses_of(), "first_byte_s": SOON_S, "stream": True}
    status, before, rest = serve([handle], use, **settings)
    assert (status, before.replace(": waiting\n\n", "")) == (200, "")
    assert "response.completed" in rest
    assert "[DONE]" not in rest
