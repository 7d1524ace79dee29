"""/v1/responses of a real server on a tiny model, asked by OpenAI's own client and by raw bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from live_server import ENGINE_SETTINGS, RunningServer, hanging, post, request_bytes, run_server
from openai.types.responses import Response
from pydantic import BaseModel

from minserve import AsyncEngine
from minserve.request import FinishReason
from minserve.server.reading.body_reader import SHORT
from minserve.server_config import ServerConfig

GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_output_tokens": 12}
LOGPROBS: Any = ["message.output_text.logprobs"]
ADD: Any = {
    "type": "function",
    "name": "add",
    "description": "Adds.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"a": {"enum": [1, 22]}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
}


# The templates of real models spend hundreds of tokens on tools.
TEMPLATE = """{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}
{% for message in messages %}{{ message.role }}: {{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}
{% endfor %}assistant: """


@pytest.fixture(scope="module")
def tool_client(
    tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[openai.OpenAI]:
    """A client of a model whose template knows tools and whose answers may think."""
    template = tmp_path_factory.mktemp("templates") / "tools.jinja"
    template.write_text(TEMPLATE)
    settings = {"chat_template": str(template), "reasoning_format": "think"}
    engine = AsyncEngine(str(tiny_llama_dir), **{**ENGINE_SETTINGS, **settings})
    servers = run_server(engine, ServerConfig(served_model_name="tiny"))
    with next(servers).client() as client:
        yield client
    servers.close()


class Verdict(BaseModel):
    """What a test lets the model say."""

    colour: Literal["red", "green"]
    sure: bool


# --- the same answers as a chat's ---


def test_a_response_is_the_answer_of_the_chat_that_it_stands_for(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "hi"},
            {"role": "user", "content": "well"},
        ],
        temperature=0,
        max_tokens=12,
        logprobs=True,
        top_logprobs=2,
    )
    items: Any = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "hi"}]},
        {"role": "user", "content": [{"type": "input_text", "text": "well"}]},
    ]
    response = client.responses.create(
        input=items, instructions="Be brief.", include=LOGPROBS, top_logprobs=2, **GREEDY
    )
    choice, usage = chat.choices[0], chat.usage
    assert response.output_text == choice.message.content
    assert response.usage is not None
    assert usage is not None
    assert response.usage.input_tokens == usage.prompt_tokens
    assert response.usage.output_tokens == usage.completion_tokens == 12
    assert (response.status, choice.finish_reason) == ("incomplete", "length")
    (part,) = response.output[0].content  # type: ignore[union-attr, misc]
    told = [one.model_dump() for one in part.logprobs or ()]  # type: ignore[union-attr]
    assert choice.logprobs is not None
    assert told == [one.model_dump() for one in choice.logprobs.content or ()]


@pytest.mark.parametrize("stop", [None, "e"], ids=["cut", "stopped"])
def test_a_stream_tells_the_same_as_a_whole_response(
    client: openai.OpenAI, stop: str | None
) -> None:
    body: Any = {"input": "hello", "extra_body": {"stop": stop, "seed": 7}, **GREEDY}
    body |= {"max_output_tokens": 100, "temperature": 1.0}
    whole = client.responses.create(**body)
    names, text = [], ""
    with client.responses.create(stream=True, **body) as stream:
        for event in stream:
            names.append(event.type)
            text += event.delta if event.type == "response.output_text.delta" else ""
    assert text == whole.output_text
    assert names[:2] == ["response.created", "response.in_progress"]
    assert names[-1] == f"response.{whole.status}"
    assert event.type in ("response.completed", "response.incomplete")
    assert event.response.output_text == whole.output_text
    assert event.response.usage is not None
    assert whole.usage is not None
    assert event.response.usage.output_tokens == whole.usage.output_tokens


# --- forms and tools ---


def test_the_clients_helpers_parse_a_form(client: openai.OpenAI) -> None:
    body: Any = {**GREEDY, "input": "hello", "max_output_tokens": 100}
    parsed = client.responses.parse(text_format=Verdict, **body)
    assert isinstance(parsed.output_parsed, Verdict)
    assert parsed.text is not None
    with client.responses.stream(text_format=Verdict, **body) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()
    assert final.output_parsed == parsed.output_parsed
    any_object = client.responses.create(
        text={"format": {"type": "json_object"}}, **{**body, "temperature": 0}
    )
    assert any_object.output_text.lstrip().startswith("{")


def test_a_tool_is_called_and_hears_of_its_result(tool_client: openai.OpenAI) -> None:
    client = tool_client
    # This model would go on with calls.
    body: Any = {**GREEDY, "tools": [ADD], "max_output_tokens": 100, "parallel_tool_calls": False}
    asked: Any = [{"role": "user", "content": "What is 1 + 1?"}]
    response = client.responses.create(input=asked, tool_choice="required", **body)
    assert response.status == "completed"
    calls = [one for one in response.output if one.type == "function_call"]
    assert calls
    for call in calls:
        assert call.name == "add"
        assert json.loads(call.arguments).keys() == {"a", "b"}
    with client.responses.stream(input=asked, tool_choice="required", **body) as stream:
        deltas = [
            one.delta for one in stream if one.type == "response.function_call_arguments.delta"
        ]
        final = stream.get_final_response()
    assert "".join(deltas) == "".join(one.arguments for one in calls)
    assert [one.type for one in final.output] == [one.type for one in response.output]
    results: Any = [
        {"type": "function_call_output", "call_id": one.call_id, "output": "2"} for one in calls
    ]
    turn = client.responses.create(input=[*asked, *response.output, *results], **body)
    assert turn.usage is not None
    assert response.usage is not None
    assert turn.usage.input_tokens > response.usage.input_tokens
    chosen = client.responses.create(
        input=asked, tool_choice={"type": "function", "name": "add"}, **body
    )
    assert [one.type for one in chosen.output] == ["function_call"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_thinking_is_an_item_and_is_counted(tool_client: openai.OpenAI, stream: bool) -> None:
    said: Any = {"structured_outputs": {"choice": ["<think>hm</think>yes"]}}
    body: Any = {**GREEDY, "input": "Sure?", "extra_body": said, "max_output_tokens": 40}
    if stream:
        with tool_client.responses.stream(**body) as events:
            thoughts = [one.delta for one in events if one.type == "response.reasoning_text.delta"]
            response: Response = events.get_final_response()
        assert "".join(thoughts) == "hm"
    else:
        response = tool_client.responses.create(**body)
    reasoning, message = response.output
    assert reasoning.type == "reasoning"
    assert [one.text for one in reasoning.content or ()] == ["hm"]
    assert (message.type, response.output_text) == ("message", "yes")
    assert response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens in (1, 2)
    # It comes back in the next turn.
    asked: Any = [{"role": "user", "content": "Sure?"}, *response.output]
    again = tool_client.responses.create(input=asked, **GREEDY)
    assert again.usage is not None
    assert again.usage.input_tokens > response.usage.input_tokens


# --- what is refused ---


@pytest.mark.parametrize(
    ("fields", "param", "advice"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "send the whole conversation"),
        ({"conversation": {"id": "conv_1"}}, "conversation", "send the whole conversation"),
        ({"background": True}, "background", "use `stream`"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "write the text into `input`"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "runs no tools"),
        ({"tools": [{"type": "mcp", "server_url": "http://x"}]}, "tools[0].type", "runs no tools"),
        ({"tools": [ADD, ADD]}, "tools[1].name", "comes twice"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name", "letters"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "is required"),
        ({"tools": {"type": "function"}}, "tools", "must be a list"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice.type", "runs no tools"),
        (
            {"tools": [ADD], "tool_choice": {"type": "function", "name": "sub"}},
            "tool_choice",
            "tool_choice.name",
        ),
        ({"input": []}, "input", "length >= 1"),
        ({"input": 5}, "input", "must be"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
         "input[0].content[0].type", "text only"),
        ({"input": "word " * 9000}, "input", "maximum context length"),
        ({"max_output_tokens": 10**6}, "max_output_tokens", "maximum context length"),
        ({"max_output_tokens": 0}, "max_output_tokens", ">= 1"),
        ({"max_tokens": 5}, "max_tokens", "use `max_output_tokens`"),
        ({"messages": []}, "messages", "use `input`"),
        ({"n": 2}, "n", "one output"),
        ({"top_logprobs": 1}, "top_logprobs", "needs include"),
        ({"include": ["everything"]}, "include", "is not supported"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "required"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type", "is not supported"),
        ({"reasoning": {"effort": 3}}, "reasoning.effort", "must be a string"),
        ({"metadata": {"a": 1}}, "metadata", "must be a string"),
        ({"stream_options": {"include_usage": True}}, "stream_options.include_usage", "not supported"),
        ({"slo": "no such class"}, "slo", "no such SLO class"),
        ({"surprise": 1}, "surprise", "is not supported"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused_by_name_with_advice(
    server: RunningServer, fields: dict[str, Any], param: str, advice: str
) -> None:
    for stream in (False, True):
        body = {"input": "hello", "stream": stream, **fields}
        status, _, answer = post(server, "/v1/responses", body)
        assert status == 400
        error = json.loads(answer)["error"]
        assert error["param"] == param
        assert advice in error["message"]


def test_nothing_is_found_where_nothing_is_stored(client: openai.OpenAI) -> None:
    for ask in (
        lambda: client.responses.retrieve("resp_1"),
        lambda: client.responses.delete("resp_1"),
        lambda: client.responses.cancel("resp_1"),
        lambda: client.responses.input_items.list("resp_1"),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            ask()
        assert caught.value.code == "response_not_found"
        assert "are not stored" in caught.value.message


def test_hints_are_named_and_the_answer_says_that_it_is_not_stored(server: RunningServer) -> None:
    body = {
        "input": [{"role": "user", "content": "hello", "phase": "commentary"}],
        "max_output_tokens": 1,
        "store": True,
        "truncation": "auto",
        "include": ["reasoning.encrypted_content"],
        "reasoning": {"effort": "low", "summary": "auto"},
        "text": {"verbosity": "low"},
    }
    status, headers, answer = post(server, "/v1/responses", body)
    assert status == 200
    assert set(headers["x-minserve-ignored"].split(", ")) == {
        "store",
        "truncation",
        "input.phase",
        "include.reasoning.encrypted_content",
        "reasoning.effort",
        "reasoning.summary",
        "text.verbosity",
    }
    assert json.loads(answer)["store"] is False
    status, headers, answer = post(
        server, "/v1/responses", {"input": "hello", "max_output_tokens": 1}
    )
    assert "x-minserve-ignored" not in headers
    assert Response.model_validate_json(answer).status == "incomplete"


def test_a_body_that_is_read_by_another_process_is_told_back_as_well(server: RunningServer) -> None:
    labels = {f"label {i}": "x" * 512 for i in range(16)}
    body = {"input": "hello", "max_output_tokens": 1, "metadata": labels, "instructions": "ü"}
    assert len(json.dumps(body)) > SHORT
    status, _, answer = post(server, "/v1/responses", body)
    assert status == 200
    told = json.loads(answer)
    assert (told["metadata"], told["instructions"]) == (labels, "ü")


# --- promises, and clients that leave ---


def test_promises_work_as_in_chats(server: RunningServer, client: openai.OpenAI) -> None:
    asked: Any = {"slo": {"ttft_ms": 60_000}, "priority": 1, "cache_salt": "a"}
    response = client.responses.create(input="hello", extra_body=asked, **GREEDY)
    assert response.usage is not None
    assert response.usage.to_dict()["slo"]["targets"]["ttft_ms"] == 60_000.0  # type: ignore[index]
    body = {"input": "hello", "max_output_tokens": 2}
    _, _, answer = post(server, "/v1/responses", body, {"x-slo-ttft-ms": "50000"})
    assert json.loads(answer)["usage"]["slo"]["targets"]["ttft_ms"] == 50_000.0
    refusing = {"slo": {"ttft_ms": 0.001, "on_unattainable": "reject"}}
    for stream in (False, True):
        status, headers, _ = post(server, "/v1/responses", {**body, **refusing, "stream": stream})
        assert status == 429
        assert "x-request-dropped-reason" in headers


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_a_response_frees_it(server: RunningServer, stream: bool) -> None:
    body = {"input": "hello", "max_output_tokens": 400, "ignore_eos": True, "stream": stream}
    before = server.engine.stats().finished[FinishReason.ABORT]
    with hanging(server, after=5):
        with server.connect() as sock:
            sock.sendall(request_bytes("/v1/responses", body))
            server.wait_until_busy()
            if stream:
                assert sock.recv(100).startswith(b"HTTP/1.1 200")
        server.wait_until_left()
    server.wait_until_free()
    assert server.engine.stats().finished[FinishReason.ABORT] == before + 1
