"""/tokenize writes chats as transformers does, and tells the text of each token where asked to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from live_server import RunningServer, post, tokenized

CHAT = [
    {"role": "user", "content": "The quick brown fox"},
    {"role": "assistant", "content": "jumps over"},
]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_generation_prompt": False},
        {"continue_final_message": True},
        {"chat_template_kwargs": {"unknown": [1, None]}},
    ],
    ids=str,
)
def test_messages_become_the_tokens_that_transformers_makes(
    server: RunningServer, tiny_llama_dir: Path, options: dict[str, Any]
) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tiny_llama_dir)
    settings = {"add_generation_prompt": "continue_final_message" not in options, **options}
    variables = settings.pop("chat_template_kwargs", {})
    expected = theirs.apply_chat_template(CHAT, return_dict=False, **settings, **variables)
    assert tokenized(server, messages=CHAT, **options)["tokens"] == expected


def test_the_text_of_each_token_is_told(server: RunningServer) -> None:
    answer = tokenized(server, prompt="The quick fox", return_token_strs=True)
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert "".join(answer["token_strs"]).endswith("The quick fox")
    assert "token_strs" not in tokenized(server, prompt="The quick fox")


def test_special_tokens_are_added_or_not(server: RunningServer) -> None:
    with_them = tokenized(server, prompt="The fox")["tokens"]
    without = tokenized(server, prompt="The fox", add_special_tokens=False)["tokens"]
    assert with_them[-len(without) :] == without
    assert tokenized(server, prompt="The fox", add_special_tokens=True)["tokens"] == with_them


def test_tokens_there_and_back(server: RunningServer) -> None:
    text = "Grüße, 東京 🙂 and the quick brown fox"
    answer = tokenized(server, prompt=text, model="tiny")
    assert set(answer) == {"tokens", "count", "max_model_len"}
    assert answer["count"] == len(answer["tokens"])
    _, _, raw = post(server, "/detokenize", {"tokens": answer["tokens"]})
    assert json.loads(raw) == {"prompt": text}


def test_a_chat_is_tokenized_as_it_is_served(client: openai.OpenAI, server: RunningServer) -> None:
    response = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=1)
    assert tokenized(server, messages=CHAT)["count"] == response.usage.prompt_tokens
