"""Tools and thinking over a real server, with the official client."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from live_server import ENGINE_SETTINGS, RunningServer, post, run_server
from tool_templates import BY_NAME

from minserve import AsyncEngine
from minserve.server_config import ServerConfig

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
PLACE: Any = {"type": "function", "function": {"name": "place", "parameters": CITY}}
HELLO: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
ARGUMENTS = ({"city": "Paris"}, {"city": "Rome"})
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(
        **{"model": "tiny", "messages": HELLO, "temperature": 0, **fields}
    )


def held_to(text: str) -> dict[str, Any]:
    """Fields that have even a random model write a text."""
    return {"extra_body": {"structured_outputs": {"choice": [text]}}}


@pytest.fixture(scope="module")
def agents_server(tiny_llama_dir: Path) -> Iterator[RunningServer]:
    """A server whose tiny model has a template that knows tools and thinking."""
    path = tiny_llama_dir.parent / "hybrid.jinja"
    path.write_text(BY_NAME["hybrid"], encoding="utf-8")
    engine = AsyncEngine(str(tiny_llama_dir), **ENGINE_SETTINGS, chat_template=str(path))
    yield from run_server(engine, ServerConfig(served_model_name="tiny", max_body_mib=2.0))


@pytest.fixture
def agent(agents_server: RunningServer) -> Iterator[openai.OpenAI]:
    with agents_server.client() as client:
        yield client
    agents_server.wait_until_free()


def test_a_tool_is_called_and_its_result_answered(agent: openai.OpenAI) -> None:
    called = ask(agent, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False)
    [choice] = called.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    [call] = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "weather")
    assert json.loads(call.function.arguments) in ARGUMENTS
    result = {"role": "tool", "tool_call_id": call.id, "content": "Rain."}
    final = ask(agent, messages=[*HELLO, choice.message, result], tools=[WEATHER], max_tokens=4)
    assert final.choices[0].message.content
    assert final.choices[0].message.tool_calls is None


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "place"}}]
)
def test_a_stream_tells_of_the_same_calls(agent: openai.OpenAI, choice: Any) -> None:
    fields = {
        "tools": [WEATHER, PLACE],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "n": 2,
    }
    whole = ask(agent, **fields)
    with agent.chat.completions.stream(
        model="tiny", messages=HELLO, temperature=0, **fields
    ) as events:
        streamed = events.get_final_completion()
    assert len(whole.choices) == len(streamed.choices) == 2
    for one, other in zip(whole.choices, streamed.choices, strict=True):
        told = [call.function for call in one.message.tool_calls]
        assert [
            (call.function.name, call.function.arguments) for call in other.message.tool_calls
        ] == [(call.name, call.arguments) for call in told]
        assert all(json.loads(call.arguments) in ARGUMENTS for call in told)
        assert one.finish_reason == other.finish_reason == "tool_calls"
        if choice != "required":
            assert [call.name for call in told] == ["place"]


def test_a_call_that_the_model_chose_itself_is_told(agent: openai.OpenAI) -> None:
    text = f"I see.\n{CALL}\n{CALL}"
    fields = {"tools": [WEATHER], **held_to(text)}
    [choice] = ask(agent, **fields).choices
    assert choice.message.content == "I see."
    assert [json.loads(one.function.arguments) for one in choice.message.tool_calls] == [
        {"city": "Rome"}
    ] * 2
    # Without tools, or where they are not to be read, it is a text as any other.
    for other in ({"tools": [WEATHER], "tool_choice": "none"}, {"tools": openai.NOT_GIVEN}):
        [choice] = ask(agent, **{**fields, **other}).choices
        assert choice.message.content == text


def test_one_call_ends_the_output(agent: openai.OpenAI, agents_server: RunningServer) -> None:
    first = CALL.removesuffix("\n</tool_call>")
    fields = {"tools": [WEATHER], "parallel_tool_calls": False, **held_to(CALL + 2 * f"\n{CALL}")}
    num_tokens = len(agents_server.engine.tokenizer.encode(first, add_special_tokens=False))
    whole = ask(agent, **fields)
    assert [len(one.message.tool_calls) for one in whole.choices] == [1]
    assert whole.choices[0].finish_reason == "tool_calls"
    assert whole.usage.completion_tokens <= num_tokens + 5  # and not those of three calls
    chunks = list(ask(agent, **fields, stream=True, stream_options={"include_usage": True}))
    assert chunks[-2].choices[0].finish_reason == "tool_calls"
    assert chunks[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )


def test_an_answer_that_ends_behind_its_call_counts_for_its_task(agent: openai.OpenAI) -> None:
    fields = {"tools": [WEATHER], "parallel_tool_calls": False, **held_to(CALL + 2 * f"\n{CALL}")}
    task = {"task": {"id": "one call each", "finish_ms": 600_000, "calls": 3}}
    fields["extra_body"]["slo"] = task
    answers = [ask(agent, **fields).usage for _ in range(3)]
    assert [one.slo["task"]["call"] for one in answers] == [1, 2, 3]
    assert all(one.slo["attained"] for one in answers)


def test_strict_tools_are_held_where_the_model_may_call(agent: openai.OpenAI) -> None:
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    [choice] = ask(agent, tools=[strict], max_tokens=8).choices
    assert choice.finish_reason in ("stop", "length")


def test_thinking_is_told_apart(agent: openai.OpenAI) -> None:
    text = "<think>\nso and so\n</think>\n\nRain."
    fields = held_to(text)
    whole = ask(agent, **fields)
    message = whole.choices[0].message
    assert (message.reasoning_content, message.content) == ("so and so", "Rain.")
    counted = whole.usage.completion_tokens_details.reasoning_tokens
    assert 0 < counted < whole.usage.completion_tokens
    chunks = list(ask(agent, **fields, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    thoughts = [getattr(one, "reasoning_content", None) or "" for one in deltas]
    assert "".join(thoughts) == "so and so"
    assert "".join(one.content or "" for one in deltas) == "Rain."
    assert chunks[-1].usage.completion_tokens_details.reasoning_tokens == counted
    body = fields["extra_body"]
    for more, expected in (
        ({"include_reasoning": False}, (None, "Rain.")),
        ({"separate_reasoning": False}, (None, text)),
        ({"reasoning_format": "none"}, (None, text)),
    ):
        message = ask(agent, extra_body={**body, **more}).choices[0].message
        assert (getattr(message, "reasoning_content", None), message.content) == expected


def test_hints_of_thinking_are_named(agents_server: RunningServer) -> None:
    body = {"messages": HELLO, "max_tokens": 1, "reasoning_effort": "low"}
    status, headers, _ = post(agents_server, "/v1/chat/completions", body)
    assert (status, headers["x-minserve-ignored"]) == (200, "reasoning_effort")
    status, headers, answer = post(agents_server, "/tokenize", {**body, "max_tokens": None})
    assert (status, headers["x-minserve-ignored"]) == (200, "reasoning_effort")
    with_tools = post(agents_server, "/tokenize", {"messages": HELLO, "tools": [WEATHER]})
    assert json.loads(with_tools[2])["count"] > json.loads(answer)["count"]


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [WEATHER] * 10_000},
        {"tools": [{"type": "function", "function": {"name": "x" * 2**20}}]},
        {"tool_choice": {"type": "function", "function": {"name": "no"}}, "tools": [WEATHER]},
        {"tool_choice": "required"},
        {
            "tools": [
                {
                    "type": "function",
                    "function": {"name": "f", "parameters": {"type": "nonsense"}},
                }
            ],
            "tool_choice": "required",
        },
    ],
    ids=lambda fields: ",".join(fields),
)
def test_bad_tools_get_one_clear_400(fields: dict[str, Any], agents_server: RunningServer) -> None:
    status, _, body = post(agents_server, "/v1/chat/completions", {"messages": HELLO, **fields})
    error = json.loads(body)["error"]
    assert status == 400
    assert error["param"].startswith(next(iter(fields)))
    assert len(error["message"]) < 1000


def test_the_embedded_model_calls_a_tool_and_hears_its_result(
    start_server: Callable[..., RunningServer],
) -> None:
    config = ServerConfig(served_model_name="tiny")
    server = start_server("smollm2", config, dtype="auto", num_blocks=32, block_size=32)
    city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "weather", "parameters": city}}
    with server.client() as client:
        fields: Any = {"tools": [tool], "max_tokens": 40}
        called = ask(client, **fields, tool_choice="required", parallel_tool_calls=False)
        message = called.choices[0].message
        [call] = message.tool_calls
        assert json.loads(call.function.arguments)["city"] == "Paris"
        result = {"role": "tool", "tool_call_id": call.id, "content": "Rain."}
        final = ask(client, **{**fields, "max_tokens": 4}, messages=[*HELLO, message, result])
        assert final.choices[0].message.content
