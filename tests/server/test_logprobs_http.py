"""Log probabilities of outputs and of echoed prompts, through the official client."""

from __future__ import annotations

import json
from pathlib import Path

import openai
import pytest
import torch
from live_server import RunningServer, post, tokenized
from transformers import LlamaForCausalLM

PROMPT = "The quick brown fox"
MESSAGES = [{"role": "user", "content": "The quick brown fox jumps over"}]
GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": 24}


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
    prompts = [
        tokenized(server, prompt=PROMPT)["tokens"],
        tokenized(server, prompt="def add(a, b):\n    return a + b\n")["tokens"],
    ]
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
    prompt = [
        tokenized(server, prompt=context)["tokens"],
        tokenized(server, prompt=continuation)["tokens"],
    ]
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
    _, _, kept = post(
        server, "/detokenize", {"tokens": tokenized(server, prompt=PROMPT)["tokens"][-2:]}
    )
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
    assert completed.choices[0].prompt_token_ids == tokenized(server, prompt=PROMPT)["tokens"]
    for choice in (completed.choices[0], chatted.choices[0]):
        assert len(choice.token_ids) == GREEDY["max_tokens"]


def test_echo_without_output_tokens(client: openai.OpenAI) -> None:
    ask = {"model": "tiny", "prompt": PROMPT, "echo": True, "max_tokens": 0}
    response = client.completions.create(logprobs=0, **ask)
    assert response.choices[0].text == PROMPT
    assert response.choices[0].finish_reason == "length"
    assert response.usage.completion_tokens == 0
    assert len(response.choices[0].logprobs.tokens) == response.usage.prompt_tokens
    streamed = list(client.completions.create(stream=True, **ask))
    assert "".join(c.choices[0].text for c in streamed) == PROMPT


def test_streamed_logprobs_are_the_whole_logprobs(client: openai.OpenAI) -> None:
    ask = {**GREEDY, "prompt": PROMPT, "logprobs": 1, "echo": True}
    whole = client.completions.create(**ask).choices[0].logprobs
    parts = [c.choices[0].logprobs for c in client.completions.create(stream=True, **ask)]
    for name in ("tokens", "text_offset"):
        joined = [item for part in parts if part for item in getattr(part, name)]
        assert joined == getattr(whole, name)
