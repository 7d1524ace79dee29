"""What a client of OpenAI's API sees, through the official client and over raw sockets."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from live_server import RunningServer, hanging, post, request_bytes, tokenized
from waiting import PATIENCE_S, wait_until

from minserve.server_config import ServerConfig

PROMPT = "The quick brown fox"
MESSAGES = [{"role": "user", "content": "The quick brown fox jumps over"}]
GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": 24}
LONG = {"prompt": PROMPT, "max_tokens": 480, "ignore_eos": True}


def events(raw: bytes) -> list[str]:
    """The payloads of a stream, of which nothing else may be left."""
    parts = raw.decode().split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") and "\n" not in part for part in parts)
    return [part.removeprefix("data: ") for part in parts]


# --- whole responses ---


def test_completion(client: openai.OpenAI) -> None:
    response = client.completions.create(prompt=PROMPT, **GREEDY)
    assert re.fullmatch(r"cmpl-[0-9a-f]{32}", response.id)
    assert (response.object, response.model) == ("text_completion", "tiny")
    assert response.choices[0].text
    assert response.choices[0].finish_reason in ("length", "stop")
    usage = response.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens >= 0
    assert client.completions.create(prompt=PROMPT, **GREEDY).choices == response.choices


def test_chat(client: openai.OpenAI) -> None:
    response = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", response.id)
    assert response.object == "chat.completion"
    assert response.choices[0].message.role == "assistant"
    assert response.choices[0].message.content
    parts = [{"role": "user", "content": [{"type": "text", "text": MESSAGES[0]["content"]}]}]
    again = client.chat.completions.create(messages=parts, **GREEDY)
    assert again.choices == response.choices


def test_every_form_of_prompt_gives_the_same_text(
    client: openai.OpenAI, server: RunningServer
) -> None:
    ids = tokenized(server, prompt=PROMPT)["tokens"]
    texts = {
        client.completions.create(prompt=prompt, **GREEDY).choices[0].text
        for prompt in (PROMPT, [PROMPT], ids, [ids])
    }
    assert len(texts) == 1


def test_choices_of_several_prompts_are_in_order(client: openai.OpenAI) -> None:
    prompts = [PROMPT, "A server answers", "def add(a, b):"]
    alone = [client.completions.create(prompt=p, **GREEDY) for p in prompts]
    together = client.completions.create(prompt=prompts, n=2, **GREEDY)
    assert [choice.index for choice in together.choices] == list(range(6))
    for i, one in enumerate(alone):
        assert [c.text for c in together.choices[2 * i : 2 * i + 2]] == [one.choices[0].text] * 2
    assert together.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone)
    assert together.usage.completion_tokens == 2 * sum(o.usage.completion_tokens for o in alone)


def test_a_seed_repeats_and_outputs_of_one_request_differ(client: openai.OpenAI) -> None:
    ask = {**GREEDY, "temperature": 1.0, "seed": 7, "n": 3}
    first = [c.text for c in client.completions.create(prompt=PROMPT, **ask).choices]
    again = [c.text for c in client.completions.create(prompt=PROMPT, **ask).choices]
    assert first == again
    assert len(set(first)) == 3


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    whole = client.completions.create(prompt=PROMPT, **GREEDY).choices[0].text
    stop = whole[len(whole) // 2 :][:3]
    response = client.completions.create(prompt=PROMPT, stop=[stop], **GREEDY)
    assert response.choices[0].text == whole[: whole.index(stop)]
    assert response.choices[0].finish_reason == "stop"


def test_max_tokens_is_exact(client: openai.OpenAI) -> None:
    extra = {"ignore_eos": True}
    for n in (1, 5):
        body = {**GREEDY, "max_tokens": n, "extra_body": extra}
        response = client.completions.create(prompt=PROMPT, **body)
        assert response.usage.completion_tokens == n
        assert response.choices[0].finish_reason == "length"
    body = {**GREEDY, "max_completion_tokens": 3, "extra_body": extra}
    assert client.chat.completions.create(messages=MESSAGES, **body).usage.completion_tokens == 3


@pytest.mark.parametrize("chat", [False, True])
def test_the_stop_string_or_token_is_in_the_text_on_request(
    client: openai.OpenAI, chat: bool
) -> None:
    def ask(**more: Any) -> tuple[str, str, Any]:
        if chat:
            answer = client.chat.completions.create(messages=MESSAGES, extra_body=more, **GREEDY)
            (choice,) = answer.choices
            return choice.message.content, choice.finish_reason, choice.stop_reason
        (choice,) = client.completions.create(prompt=PROMPT, extra_body=more, **GREEDY).choices
        return choice.text, choice.finish_reason, choice.stop_reason

    whole = ask()[0]
    stop = whole[5:8]
    end = whole.index(stop)
    assert ask(stop=stop) == (whole[:end], "stop", stop)
    included = {"include_stop_str_in_output": True}
    assert ask(stop=stop, **included) == (whole[: end + len(stop)], "stop", stop)
    more = {"return_token_ids": True}
    if chat:
        ids = client.chat.completions.create(messages=MESSAGES, extra_body=more, **GREEDY)
    else:
        ids = client.completions.create(prompt=PROMPT, extra_body=more, **GREEDY)
    token = ids.choices[0].token_ids[3]
    without = ask(stop_token_ids=[token])
    with_it = ask(stop_token_ids=[token], **included)
    assert without[1:] == with_it[1:] == ("stop", token)
    assert whole.startswith(with_it[0])
    assert len(with_it[0]) > len(without[0])


# --- streams ---


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}, {"n": 2, "seed": 5}])
def test_streamed_text_is_the_whole_text(client: openai.OpenAI, options: dict[str, Any]) -> None:
    ask = {**GREEDY, **options}
    whole = client.chat.completions.create(messages=MESSAGES, **ask)
    n = options.get("n", 1)
    texts, finishes, roles = [""] * n, [None] * n, [0] * n
    stream = client.chat.completions.create(
        messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **ask
    )
    usage = None
    for chunk in stream:
        if not chunk.choices:
            usage = chunk.usage
            continue
        assert usage is None
        assert chunk.usage is None
        (choice,) = chunk.choices
        assert finishes[choice.index] is None
        texts[choice.index] += choice.delta.content or ""
        roles[choice.index] += choice.delta.role is not None
        finishes[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert finishes == [choice.finish_reason for choice in whole.choices]
    assert roles == [1] * n
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens == whole.usage.prompt_tokens


def test_the_bytes_of_a_stream(server: RunningServer) -> None:
    body = {**GREEDY, "messages": MESSAGES, "stream": True}
    status, headers, raw = post(server, "/v1/chat/completions", body)
    assert status == 200
    assert headers["Content-Type"] == "text/event-stream; charset=utf-8"
    *chunks, done = events(raw)
    assert done == "[DONE]"
    parsed = [json.loads(chunk) for chunk in chunks]
    assert len({chunk["id"] for chunk in parsed}) == 1
    assert {chunk["object"] for chunk in parsed} == {"chat.completion.chunk"}
    assert all("usage" not in chunk for chunk in parsed)
    first = parsed[0]["choices"][0]["delta"]
    assert first["role"] == "assistant"
    assert first["content"]
    for chunk in parsed[:-1]:
        assert chunk["choices"][0]["delta"]["content"]
        assert chunk["choices"][0]["finish_reason"] is None
    assert parsed[-1]["choices"][0]["finish_reason"] in ("length", "stop")


def test_continuous_usage_counts_up(server: RunningServer) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {**GREEDY, "prompt": PROMPT, "stream": True, "stream_options": options}
    _, _, raw = post(server, "/v1/completions", body)
    *chunks, done = events(raw)
    assert done == "[DONE]"
    usages = [json.loads(chunk)["usage"]["completion_tokens"] for chunk in chunks]
    assert usages == sorted(usages)
    assert usages[-1] == usages[-2]
    assert json.loads(chunks[-1])["choices"] == []


def test_many_streams_at_once_do_not_mix(server: RunningServer) -> None:
    prompts = [f"{PROMPT} {i}" for i in range(8)]

    async def ask(client: openai.AsyncOpenAI, prompt: str) -> str:
        stream = await client.completions.create(prompt=prompt, stream=True, **GREEDY)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
            return await asyncio.gather(*(ask(client, prompt) for prompt in prompts))

    together = asyncio.run(ask_all())
    with server.client() as client:
        alone = [client.completions.create(prompt=p, **GREEDY).choices[0].text for p in prompts]
    assert together == alone


def test_a_failure_in_mid_stream_is_an_error_and_no_normal_end(
    tiny_llama_dir: Path, start_server: Callable[..., RunningServer]
) -> None:
    server = start_server(tiny_llama_dir, ServerConfig())
    sock = server.connect()
    with hanging(server, after=5) as go_on:
        sock.sendall(request_bytes("/v1/completions", {**LONG, "stream": True}))
        received = sock.recv(1000)
        stopping = asyncio.run_coroutine_threadsafe(server.engine.stop(0.0), server.loop)
        # Told while it hangs, or even before.
        wait_until(lambda: server.engine._inbox or stopping.done())
        go_on.set()
        stopping.result(PATIENCE_S)
    while part := sock.recv(65536):
        received += part
        if received.endswith(b"0\r\n\r\n"):
            break
    assert b"[DONE]" not in received
    last = re.findall(rb"data: (.*)", received)[-1]
    assert json.loads(last)["error"]["type"] == "service_unavailable_error"
    assert post(server, "/health", None, method="GET")[0] == 503
    status, headers, _ = post(server, "/v1/completions", LONG)
    assert status == 503
    assert headers["Retry-After"]


# --- what became of drafts ---


# Whatever was said is said again, so that even a random model is easy to foresee.
REPEATING = {"frequency_penalty": -2, "max_tokens": 48, "temperature": 0, "model": "tiny"}


def test_the_acceptance_is_told_where_it_is_asked_for(
    tiny_llama_dir: Path, start_server: Callable[..., RunningServer]
) -> None:
    server = start_server(
        tiny_llama_dir, ServerConfig(served_model_name="tiny"), policy="sarathi", speculator="ngram"
    )
    asked = {"ignore_eos": True, "include_acceptance": True}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    counts = server.engine.stats
    with server.client() as client:
        for create, prompt in (
            (client.completions.create, {"prompt": ["The rain " * 9, PROMPT], "n": 2}),
            (client.chat.completions.create, {"messages": MESSAGES}),
        ):
            before = counts().speculation
            told = create(**REPEATING, **prompt, extra_body=asked).usage.acceptance
            after = counts().speculation
            drafted = after.num_draft_tokens - before.num_draft_tokens
            accepted = after.num_accepted_tokens - before.num_accepted_tokens
            assert 0 < accepted <= drafted
            assert told == {
                "draft_tokens": drafted,
                "accepted_tokens": accepted,
                "rate": accepted / drafted,
            }
            *chunks, last = create(**REPEATING, **prompt, **options, extra_body=asked)
            assert last.usage.acceptance == told
            assert all(chunk.usage is None for chunk in chunks)
            plain = create(**REPEATING, **prompt, extra_body={"ignore_eos": True})
            assert "acceptance" not in plain.usage.model_extra


def test_without_a_speculator_nothing_was_drafted(client: openai.OpenAI) -> None:
    asked = {"include_acceptance": True}
    usage = client.completions.create(prompt=PROMPT, **GREEDY, extra_body=asked).usage
    assert usage.acceptance == {"draft_tokens": 0, "accepted_tokens": 0, "rate": None}
    plain = client.completions.create(prompt=PROMPT, **GREEDY).usage
    assert "acceptance" not in plain.model_extra


# --- the other endpoints ---


def test_health_fails_while_an_iteration_hangs(
    tiny_llama_dir: Path, start_server: Callable[..., RunningServer]
) -> None:
    server = start_server(tiny_llama_dir, ServerConfig(watchdog_s=0.3))
    with hanging(server):
        sock = server.connect()
        sock.sendall(request_bytes("/v1/completions", {**LONG, "max_tokens": 2}))
        status, _, told = wait_until(
            lambda: (found := post(server, "/health", None, method="GET"))[0] != 200 and found
        )
        assert status == 503
        assert b"no iteration has ended" in told
    assert sock.recv(1000).startswith(b"HTTP/1.1 200")
    wait_until(lambda: post(server, "/health", None, method="GET")[0] == 200)


def test_models_and_health(client: openai.OpenAI, server: RunningServer) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "minserve")
    assert model.created > 0
    assert model.max_model_len == 512
    assert model.root
    assert client.models.retrieve("tiny") == model
    assert post(server, "/health", None, method="GET")[0] == 200
