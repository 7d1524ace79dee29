"""What a client of OpenAI's API sees, through the official client and over raw sockets."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from live_server import RunningServer, hanging, post, request_bytes
from transformers import LlamaForCausalLM
from waiting import PATIENCE_S, wait_until

from minserve.request import FinishReason
from minserve.server_config import ServerConfig

PROMPT = "The quick brown fox"
MESSAGES = [{"role": "user", "content": "The quick brown fox jumps over"}]
GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": 24}
LONG = {"model": "tiny", "max_tokens": 480, "extra_body": {"ignore_eos": True}}


def events(raw: bytes) -> list[str]:
    """The payloads of a stream, of which nothing else may be left."""
    parts = raw.decode().split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") and "\n" not in part for part in parts)
    return [part.removeprefix("data: ") for part in parts]


def ids_of(server: RunningServer, text: str) -> list[int]:
    status, _, body = post(server, "/tokenize", {"prompt": text})
    assert status == 200
    return json.loads(body)["tokens"]


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
    ids = ids_of(server, PROMPT)
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


# --- log probabilities ---


def test_completion_logprobs(client: openai.OpenAI) -> None:
    response = client.completions.create(prompt=PROMPT, logprobs=3, **GREEDY)
    logprobs = response.choices[0].logprobs
    count = response.usage.completion_tokens
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == count
    assert len(logprobs.top_logprobs) == len(logprobs.text_offset) == count
    for token, logprob, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert top[token] == logprob == max(top.values()) <= 0


def test_chat_logprobs(client: openai.OpenAI) -> None:
    response = client.chat.completions.create(
        messages=MESSAGES, logprobs=True, top_logprobs=2, **GREEDY
    )
    content = response.choices[0].logprobs.content
    assert len(content) == response.usage.completion_tokens
    for entry in content:
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].logprob == entry.logprob
        for one in (entry, *entry.top_logprobs):
            try:
                assert bytes(one.bytes).decode() == one.token
            except UnicodeDecodeError:
                assert one.token == "bytes:" + "".join(f"\\x{byte:02x}" for byte in one.bytes)


def test_echo_gives_the_prompts_logprobs_as_lm_eval_asks(
    client: openai.OpenAI, server: RunningServer, tiny_llama_dir: Path
) -> None:
    """They are those that transformers computes."""
    prompts = [ids_of(server, PROMPT), ids_of(server, "def add(a, b):\n    return a + b\n")]
    ask = {"model": "tiny", "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1}
    response = client.completions.create(prompt=prompts, echo=True, **ask)
    model = LlamaForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    for ids, choice in zip(prompts, response.choices, strict=True):
        logprobs = choice.logprobs
        assert len(logprobs.tokens) == len(ids) + 1
        assert (logprobs.token_logprobs[0], logprobs.top_logprobs[0]) == (None, None)
        assert logprobs.text_offset[0] == 0
        with torch.inference_mode():
            expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        given = expected[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
        assert logprobs.token_logprobs[1:] == pytest.approx(
            [*given, expected[-1].max().item()], abs=1e-3
        )
        best = [max(top.values()) for top in logprobs.top_logprobs[1:]]
        assert best == pytest.approx(expected.max(-1).values.tolist(), abs=1e-3)
    assert response.choices[0].text.startswith(PROMPT)


def test_echoed_tokens_are_found_by_their_place_in_the_text(
    client: openai.OpenAI, server: RunningServer
) -> None:
    """As lm-eval finds a continuation: from the first token at the end of the context."""
    context, continuation = "naïve 😀 東京:", " return 世"
    prompt = [ids_of(server, context), ids_of(server, continuation)]
    (choice,) = client.completions.create(
        prompt=prompt[0] + prompt[1], echo=True, logprobs=1, **{**GREEDY, "max_tokens": 8}
    ).choices
    offsets, text = choice.logprobs.text_offset, choice.text
    start = next(i for i, at in enumerate(offsets) if at >= len(context))
    assert start == len(prompt[0])
    assert text[offsets[start] :].startswith(continuation)
    assert offsets[len(prompt[0]) + len(prompt[1])] == len(context + continuation)
    assert offsets == sorted(offsets)
    # Tokens of whole characters stand in the text where their offset says.
    for token, at in zip(choice.logprobs.tokens, offsets, strict=True):
        assert token.startswith(("bytes:", "<")) or text.startswith(token, at)


def test_what_was_cut_off_a_prompt_is_not_echoed(
    client: openai.OpenAI, server: RunningServer
) -> None:
    cut = {"truncate_prompt_tokens": 2}
    (choice,) = client.completions.create(
        prompt=PROMPT, echo=True, logprobs=0, extra_body=cut, **{**GREEDY, "max_tokens": 0}
    ).choices
    _, _, kept = post(server, "/detokenize", {"tokens": ids_of(server, PROMPT)[-2:]})
    assert choice.text == json.loads(kept)["prompt"]
    assert choice.logprobs.text_offset == [0, len(choice.logprobs.tokens[0])]


def test_prompt_logprobs_are_those_of_transformers(
    client: openai.OpenAI, server: RunningServer, tiny_llama_dir: Path
) -> None:
    more = {"prompt_logprobs": 3, "return_token_ids": True}
    model = LlamaForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    completed = client.completions.create(prompt=PROMPT, extra_body=more, **GREEDY)
    chatted = client.chat.completions.create(messages=MESSAGES, extra_body=more, **GREEDY)
    for told in (completed.choices[0], chatted):
        ids = told.prompt_token_ids
        with torch.inference_mode():
            expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert told.prompt_logprobs[0] is None
        assert len(told.prompt_logprobs) == len(ids)
        for place, entries in enumerate(told.prompt_logprobs[1:], 1):
            assert str(ids[place]) in entries
            assert 3 <= len(entries) <= 4
            for token_id, one in entries.items():
                logprobs = expected[place - 1]
                assert one["logprob"] == pytest.approx(logprobs[int(token_id)].item(), abs=1e-3)
                assert one["rank"] == 1 + (logprobs > logprobs[int(token_id)]).sum()
    assert completed.choices[0].prompt_token_ids == ids_of(server, PROMPT)
    for choice in (completed.choices[0], chatted.choices[0]):
        assert len(choice.token_ids) == GREEDY["max_tokens"]


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


def test_echo_without_output_tokens(client: openai.OpenAI) -> None:
    ask = {"model": "tiny", "prompt": PROMPT, "echo": True, "max_tokens": 0}
    response = client.completions.create(logprobs=0, **ask)
    assert response.choices[0].text == PROMPT
    assert response.choices[0].finish_reason == "length"
    assert response.usage.completion_tokens == 0
    assert len(response.choices[0].logprobs.tokens) == response.usage.prompt_tokens
    streamed = list(client.completions.create(stream=True, **ask))
    assert "".join(c.choices[0].text for c in streamed) == PROMPT


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


def test_streamed_logprobs_are_the_whole_logprobs(client: openai.OpenAI) -> None:
    ask = {**GREEDY, "prompt": PROMPT, "logprobs": 1, "echo": True}
    whole = client.completions.create(**ask).choices[0].logprobs
    parts = [c.choices[0].logprobs for c in client.completions.create(stream=True, **ask)]
    for name in ("tokens", "text_offset"):
        joined = [item for part in parts if part for item in getattr(part, name)]
        assert joined == getattr(whole, name)


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


# --- clients that leave or lag ---


LONG_BODY = {"model": "tiny", "prompt": PROMPT, "max_tokens": 480, "ignore_eos": True}


@pytest.mark.parametrize("reset", [False, True], ids=["close", "reset"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_frees_its_request(
    server: RunningServer, stream: bool, reset: bool
) -> None:
    sock = server.connect()
    body = {**LONG_BODY, "stream": stream, "n": 8, "prompt": [PROMPT, "A server"]}
    sock.sendall(request_bytes("/v1/completions", body))
    server.wait_until_busy()
    before = server.engine.stats().finished
    if stream:
        assert sock.recv(100).startswith(b"HTTP/1.1 200")
    if reset:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
    server.wait_until_free()
    after = server.engine.stats().finished
    ended = {
        reason: after[reason] - before[reason] for reason in after if after[reason] > before[reason]
    }
    assert ended == {FinishReason.ABORT: 16}


def test_two_hundred_requests_opened_and_dropped(server: RunningServer) -> None:
    before = server.engine.stats().num_generation_tokens
    socks = [server.connect() for _ in range(200)]
    for sock in socks:
        sock.sendall(request_bytes("/v1/completions", LONG_BODY))
    for sock in socks:
        sock.close()
    # The queue may be full until the server has seen them all go: clients try again then.
    with server.client(max_retries=5) as client:
        assert client.completions.create(prompt=PROMPT, **GREEDY).choices[0].text
    server.wait_until_free()
    made = server.engine.stats().num_generation_tokens - before
    assert made < 200 * LONG_BODY["max_tokens"] / 2


def test_a_slow_reader_blocks_nobody(server: RunningServer) -> None:
    slow = server.connect()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    body = {**LONG_BODY, "stream": True, "n": 8, "logprobs": 20}
    slow.sendall(request_bytes("/v1/completions", body))
    server.wait_until_busy()
    with server.client() as client:
        assert client.completions.create(prompt=PROMPT, **GREEDY).choices[0].text
    slow.close()
    server.wait_until_free()


def test_a_failure_in_mid_stream_is_an_error_and_no_normal_end(
    tiny_llama_dir: Path, start_server: Callable[..., RunningServer]
) -> None:
    server = start_server(tiny_llama_dir, ServerConfig())
    sock = server.connect()
    body = {key: value for key, value in LONG_BODY.items() if key != "model"}
    sock.sendall(request_bytes("/v1/completions", {**body, "stream": True}))
    received = sock.recv(1000)
    asyncio.run_coroutine_threadsafe(server.engine.stop(0.0), server.loop).result(PATIENCE_S)
    while part := sock.recv(65536):
        received += part
        if received.endswith(b"0\r\n\r\n"):
            break
    assert b"[DONE]" not in received
    last = re.findall(rb"data: (.*)", received)[-1]
    assert json.loads(last)["error"]["type"] == "service_unavailable_error"
    assert post(server, "/health", None, method="GET")[0] == 503
    status, headers, _ = post(server, "/v1/completions", body)
    assert status == 503
    assert headers["Retry-After"]


def test_health_fails_while_an_iteration_hangs(
    tiny_llama_dir: Path, start_server: Callable[..., RunningServer]
) -> None:
    server = start_server(tiny_llama_dir, ServerConfig(watchdog_s=0.3))
    body = {key: value for key, value in LONG_BODY.items() if key != "model"}
    with hanging(server):
        sock = server.connect()
        sock.sendall(request_bytes("/v1/completions", {**body, "max_tokens": 2}))
        while (status := post(server, "/health", None, method="GET"))[0] == 200:
            time.sleep(0.01)
        assert status[0] == 503
        assert "no iteration has ended" in str(status[2])
    assert sock.recv(1000).startswith(b"HTTP/1.1 200")
    wait_until(lambda: post(server, "/health", None, method="GET")[0] == 200)


# --- the other endpoints ---


def test_models_and_health(client: openai.OpenAI, server: RunningServer) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "minserve")
    assert model.created > 0
    assert model.max_model_len == 512
    assert model.root
    assert client.models.retrieve("tiny") == model
    assert post(server, "/health", None, method="GET")[0] == 200


def test_tokens_there_and_back(server: RunningServer) -> None:
    text = "Grüße, 東京 🙂 and the quick brown fox"
    _, _, raw = post(server, "/tokenize", {"prompt": text, "model": "tiny"})
    answer = json.loads(raw)
    assert set(answer) == {"tokens", "count", "max_model_len"}
    assert answer["count"] == len(answer["tokens"])
    _, _, raw = post(server, "/detokenize", {"tokens": answer["tokens"]})
    assert json.loads(raw) == {"prompt": text}


def test_a_chat_is_tokenized_as_it_is_served(client: openai.OpenAI, server: RunningServer) -> None:
    _, _, raw = post(server, "/tokenize", {"messages": MESSAGES})
    response = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    assert json.loads(raw)["count"] == response.usage.prompt_tokens
