"""Chunks that are written by a frame are those that are built one by one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec import Raw
from test_reply import STOP, ByteTokenizer, Handle, chunks, entry, letters

from minserve.outputs import OutputDelta
from minserve.server.chunk_frame import PLACEHOLDER, ChunkFrame
from minserve.server.protocol import parse_chat, parse_completion
from minserve.server.reply import Reply

CHAT = {"messages": [{"role": "user", "content": "x"}]}
# Nothing of this may end a string, an event or a line.
TEXTS = ["a", 'b"', "\n\n", "data: ", "é世😀", "\\", "\u2028", PLACEHOLDER, "</s>", "\x00"]


def reply(*, is_chat: bool, model: str = "m", **fields: Any) -> Reply:
    call = parse_chat({**CHAT, **fields}, {}) if is_chat else parse_completion(
        {"prompt": "ab", **fields}, {}
    )  # fmt: skip
    return Reply(call, [Handle()], model, ByteTokenizer())


@pytest.mark.parametrize("is_chat", [True, False])
@pytest.mark.parametrize("model", ["m", PLACEHOLDER, f'"{PLACEHOLDER}"'])
@pytest.mark.parametrize("n", [1, 2])
def test_framed_chunks_have_all_that_others_have(is_chat: bool, model: str, n: int) -> None:
    framed = reply(is_chat=is_chat, model=model, n=n)
    built = reply(is_chat=is_chat, model=model, n=n)
    built._is_plain = False
    script = [letters(text, index=i) for text in TEXTS for i in range(n)]
    script += [letters("", index=i, **STOP) for i in range(n)]
    found, expected = chunks(framed, *script), chunks(built, *script)
    for one in (*found, *expected):
        assert one.pop("id").startswith("chatcmpl-" if is_chat else "cmpl-")
        del one["created"]
    assert found == expected
    place = (lambda c: c["delta"].get("content")) if is_chat else (lambda c: c["text"])
    assert [place(one["choices"][0]) for one in found[: len(TEXTS) * n : n]] == TEXTS


def test_only_the_chunks_behind_the_first_are_framed_and_one_without_text_is_none() -> None:
    own = reply(is_chat=True)
    kinds = [
        [type(one) for one in own.chunks(0, letters(text))] for text in ("", "a", "b", "", "c")
    ]
    # As before the first text: nothing to say.
    assert kinds == [[], [dict], [Raw], [], [Raw]]


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": True},
        {"return_token_ids": True},
        {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ],
)
def test_chunks_with_more_than_text_are_built_one_by_one(fields: dict[str, Any]) -> None:
    own = reply(is_chat=True, **fields)
    logprobs = (entry(97),) if "logprobs" in fields else None
    deltas = [letters("a", logprobs=logprobs) for _ in range(3)]
    assert all(isinstance(one, dict) for delta in deltas for one in own.chunks(0, delta))


def test_the_end_is_told_behind_framed_chunks() -> None:
    made = chunks(reply(is_chat=False), letters("a"), letters("b"), letters("c", **STOP))
    assert [one["choices"][0]["finish_reason"] for one in made] == [None, None, "stop"]
    assert [one["choices"][0]["text"] for one in made] == ["a", "b", "c"]


def test_a_frame_takes_any_text() -> None:
    frame = ChunkFrame({"model": PLACEHOLDER, "choices": [{"text": PLACEHOLDER, "end": None}]})
    for text in TEXTS:
        told = json.loads(bytes(frame.around(text)))
        assert told == {"model": PLACEHOLDER, "choices": [{"text": text, "end": None}]}


def test_deltas_of_drafts_bring_one_chunk_of_several_tokens() -> None:
    made = chunks(reply(is_chat=False), letters("a"), OutputDelta("r", 0, "bcd", (1, 2, 3)))
    assert [one["choices"][0]["text"] for one in made] == ["a", "bcd"]
