"""Answers built from scripted deltas: choices, log probabilities, token ids, pieces."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from minserve.engine.text.tokenizer import Tokenizer
from minserve.outputs import OutputDelta, TokenLogprob
from minserve.request import FinishReason
from minserve.server.json_array import PIECE, JsonArray, dump_json, dump_pieces
from minserve.server.logprobs import ChatLogprobs, CompletionLogprobs, LogprobWriter
from minserve.server.pauses import Pauses
from minserve.server.protocol import parse_chat, parse_completion
from minserve.server.reply import Reply

STOP = {"request_id": "r", "finish_reason": FinishReason.STOP}


class ByteTokenizer:
    """Token ``i`` below 256 is that byte; 256 is "é", as are the bytes C3 A9; 257 is a BOS."""

    def token_bytes(self, token_id: int) -> bytes:
        special = {256: "é".encode(), 257: b"<s>"}
        return special.get(token_id) or bytes([token_id])

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        kept = [i for i in ids if not (skip_special_tokens and i == 257)]
        return b"".join(map(self.token_bytes, kept)).decode("utf-8", "replace")

    prompt_offsets = Tokenizer.prompt_offsets
    output_offsets = Tokenizer.output_offsets


class Handle:
    """A handle whose news the test makes up."""

    def __init__(self, prompt: str | None = "ab", ids: Any = tuple(b"ab")) -> None:
        self.prompt, self.prompt_token_ids = prompt, ids


def entry(token_id: int, logprob: float = -1.0, top: Any = (), rank: int = 1) -> TokenLogprob:
    return TokenLogprob(token_id, logprob, rank, top)


def completion(handle: Any = None, **fields: Any) -> Reply:
    call = parse_completion({"prompt": "ab", **fields}, {})
    return Reply(call, [handle or Handle()], "m", ByteTokenizer())


def chat(**fields: Any) -> Reply:
    call = parse_chat({"messages": [{"role": "user", "content": "x"}], **fields}, {})
    return Reply(call, [Handle()], "m", ByteTokenizer())


def whole(reply: Reply, *deltas: OutputDelta) -> dict[str, Any]:
    async def add() -> None:
        for delta in deltas:
            await reply.note(0, delta, Pauses())
            reply.add(0, delta)

    asyncio.run(add())
    return json.loads(b"".join(reply.body()))


def chunks(reply: Reply, *deltas: OutputDelta) -> list[dict[str, Any]]:
    async def make() -> list[dict[str, Any]]:
        made = []
        for delta in deltas:
            await reply.note(0, delta, Pauses())
            made += reply.chunks(0, delta)
        return json.loads(dump_json(made))

    return asyncio.run(make())


def letters(text: str, **more: Any) -> OutputDelta:
    ids = tuple(text.encode())
    return OutputDelta(text=text, token_ids=ids, **{"request_id": "r", **more})


# --- log probabilities ---


def written(token_ids: Any, entries: Any, num_top: int = 5) -> dict[str, Any]:
    form = CompletionLogprobs()
    offsets = list(range(len(token_ids)))
    LogprobWriter(ByteTokenizer()).completion(form, token_ids, entries, offsets, num_top)
    return json.loads(dump_json(form.value()))


def test_impossible_tokens_have_a_finite_logprob() -> None:
    assert written([97], [entry(97, float("-inf"))])["token_logprobs"] == [-9999.0]
    form = ChatLogprobs()
    entries = [entry(97, float("-inf"), ((98, float("-inf")),))]
    LogprobWriter(ByteTokenizer()).chat(form, entries)
    (one,) = json.loads(dump_json(form.value()))["content"]
    assert one["logprob"] == one["top_logprobs"][0]["logprob"] == -9999.0


def test_the_sampled_token_is_always_among_the_alternatives() -> None:
    assert written([99, 97], [entry(99, -3.0, ((97, -0.1),)), entry(97, -0.5)]) == {
        "tokens": ["c", "a"],
        "token_logprobs": [-3.0, -0.5],
        "top_logprobs": [{"a": -0.1, "c": -3.0}, {"a": -0.5}],
        "text_offset": [0, 1],
    }


def test_pieces_of_characters_stay_apart() -> None:
    top = ((0xF0, -0.1), (0x9F, -0.2), (97, -0.3))
    arrays = written([0xF0], [entry(0xF0, -0.1, top)])
    assert arrays["tokens"] == [r"bytes:\xf0"]
    assert arrays["top_logprobs"] == [{r"bytes:\xf0": -0.1, r"bytes:\x9f": -0.2, "a": -0.3}]


@pytest.mark.parametrize("sampled", [256, 300])
def test_tokens_of_one_text_stay_apart_and_the_sampled_one_has_it(
    sampled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens 256 and 300 are both "é"."""
    bytes_of = ByteTokenizer.token_bytes
    monkeypatch.setattr(
        ByteTokenizer, "token_bytes", lambda self, i: bytes_of(self, 256 if i == 300 else i)
    )
    logprobs = {256: -0.1, 300: -0.2}
    arrays = written([sampled], [entry(sampled, logprobs[sampled], tuple(logprobs.items()))])
    other = 556 - sampled
    assert arrays["tokens"] == ["é"]
    assert arrays["top_logprobs"] == [
        {"é": logprobs[sampled], f"token_id:{other}": logprobs[other]}
    ]


def test_prompt_logprobs_have_vllms_form() -> None:
    array, writer = JsonArray(), LogprobWriter(ByteTokenizer())
    top = ((98, -0.1), (97, -0.2), (99, -0.3))
    writer.prompt(array, [None, entry(120, float("-inf"), top, rank=9)], 2)
    writer.prompt(array, [entry(97, -0.2, top, rank=2)], 1)
    b = {"logprob": -0.1, "rank": 1, "decoded_token": "b"}
    a = {"logprob": -0.2, "rank": 2, "decoded_token": "a"}
    x = {"logprob": -9999.0, "rank": 9, "decoded_token": "x"}
    assert json.loads(dump_json(array)) == [
        None,
        {"120": x, "98": b, "97": a},
        {"97": a, "98": b},
    ]


def test_offsets_are_places_in_the_text_that_is_told() -> None:
    """Neither a BOS nor a character of several tokens shifts what comes behind."""
    prompt = "a😀b"
    ids = (257, *prompt.encode())
    told = tuple(None if i == 0 else entry(one) for i, one in enumerate(ids))
    output = letters("é!", logprobs=tuple(map(entry, "é!".encode())), prompt_logprobs=told, **STOP)
    expected = [0, 0, 1, 1, 1, 1, 2]
    reply = completion(Handle(prompt, ids), echo=True, logprobs=0)
    (choice,) = whole(reply, output)["choices"]
    assert choice["text"] == "a😀bé!"
    assert choice["logprobs"]["text_offset"] == [*expected, 3, 3, 4]
    (alone,) = whole(completion(Handle(prompt, ids), logprobs=0), output)["choices"]
    assert alone["logprobs"]["text_offset"] == [0, 0, 1]


# --- choices ---


def test_every_choice_begins_with_the_prompts_logprobs_whoever_comes_first() -> None:
    early = letters("d", index=1, logprobs=(entry(100),), **STOP)
    first = letters("c", logprobs=(entry(99),), prompt_logprobs=(None, entry(98)), **STOP)
    fields = {"echo": True, "logprobs": 0, "n": 2, "max_tokens": 1}
    reply = completion(**fields)
    assert chunks(reply, early) == []
    choices = [chunk["choices"][0] for chunk in chunks(reply, first)]
    assert [choice["index"] for choice in choices] == [1, 0]
    assert [choice["text"] for choice in choices] == ["abd", "abc"]
    assert choices[0]["logprobs"]["tokens"] == ["a", "b", "d"]
    assert choices[0]["logprobs"]["token_logprobs"] == [None, -1.0, -1.0]
    assert choices[0]["logprobs"]["text_offset"] == [0, 1, 2]
    assert whole(completion(**fields), early, first)["choices"] == choices[::-1]


def test_held_back_deltas_make_no_chunk_and_the_role_comes_once() -> None:
    reply = chat(stream=True, stream_options={"include_usage": True})
    assert chunks(reply, OutputDelta(request_id="r", token_ids=(0,))) == []
    (one,) = chunks(reply, OutputDelta(request_id="r", text="ab", token_ids=(1,)))
    assert one["choices"][0]["delta"] == {"role": "assistant", "content": "ab"}
    (last,) = chunks(reply, OutputDelta(token_ids=(2,), **STOP))
    assert last["choices"][0]["delta"] == {}
    assert last["choices"][0]["finish_reason"] == "stop"
    assert [one["usage"]["completion_tokens"] for one in reply.last_chunks()] == [3]
    assert chat().last_chunks() == []


def test_dropped_output_leaves_the_prompt_alone() -> None:
    body = whole(completion(echo=True, max_tokens=0), letters("z", **STOP))
    assert body["choices"][0]["text"] == "ab"
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 0


# --- token ids and prompt logprobs, as vLLM tells them ---

PROMPT_TOLD = (None, entry(98, -0.5, rank=3))
PROMPT_JSON = [None, {"98": {"logprob": -0.5, "rank": 3, "decoded_token": "b"}}]
ASKED = {"return_token_ids": True, "prompt_logprobs": 0}
DELTAS = (
    letters("c", prompt_logprobs=PROMPT_TOLD),
    OutputDelta(request_id="r", token_ids=(100,)),
    letters("e", **STOP),
)


def test_a_completion_tells_them_in_each_choice() -> None:
    (choice,) = whole(completion(**ASKED), *DELTAS)["choices"]
    assert choice["token_ids"] == [99, 100, 101]
    assert choice["prompt_token_ids"] == [97, 98]
    assert choice["prompt_logprobs"] == PROMPT_JSON
    parts = [chunk["choices"][0] for chunk in chunks(completion(stream=True, **ASKED), *DELTAS)]
    assert [part["token_ids"] for part in parts] == [[99], [100], [101]]
    assert parts[0]["prompt_token_ids"] == [97, 98]
    assert parts[0]["prompt_logprobs"] == PROMPT_JSON
    assert not {"prompt_token_ids", "prompt_logprobs"} & {*parts[1], *parts[2]}


def test_a_chat_tells_those_of_the_prompt_once() -> None:
    body = whole(chat(**ASKED), *DELTAS)
    assert body["choices"][0]["token_ids"] == [99, 100, 101]
    assert body["prompt_token_ids"] == [97, 98]
    assert body["prompt_logprobs"] == PROMPT_JSON
    parts = chunks(chat(stream=True, **ASKED), *DELTAS)
    assert [part["choices"][0]["token_ids"] for part in parts] == [[99], [100], [101]]
    assert parts[0]["prompt_token_ids"] == [97, 98]
    assert parts[0]["prompt_logprobs"] == PROMPT_JSON
    assert not {"prompt_token_ids", "prompt_logprobs"} & {*parts[1], *parts[2]}


def test_unasked_nothing_of_them_is_told() -> None:
    for reply in (completion(), chat()):
        text = json.dumps(whole(reply, letters("c", **STOP)))
        assert "token_ids" not in text
        assert "prompt_logprobs" not in text


def test_echoed_and_told_prompts_each_have_as_many_alternatives_as_were_asked_for() -> None:
    top = ((98, -0.1), (97, -0.2), (99, -0.3))
    told = (None, entry(98, -0.1, top))
    reply = completion(echo=True, logprobs=1, prompt_logprobs=3)
    (choice,) = whole(reply, letters("c", prompt_logprobs=told, **STOP))["choices"]
    assert choice["logprobs"]["top_logprobs"] == [None, {"b": -0.1}]
    assert list(choice["prompt_logprobs"][1]) == ["98", "97", "99"]


# --- arrays ---


def test_arrays_share_what_was_joined_and_come_in_pieces() -> None:
    first, second = JsonArray(), JsonArray()
    assert json.loads(dump_json({"a": first})) == {"a": []}
    first.extend([1, "é"])
    second.join(first)
    second.extend([None])
    first.extend([{"b": 2}])
    second.join(JsonArray())
    second.join(first)
    many = JsonArray()
    for start in range(0, 100_000, 10):
        many.extend(list(range(start, start + 10)))
    value = {"x": [{"f": first, "s": second}], "n": None, "many": many, "e": {}, "l": []}
    pieces = list(dump_pieces(value))
    assert b"".join(pieces) == dump_json(value)
    assert all(PIECE <= len(piece) < 2 * PIECE for piece in pieces[:-1])
    told = json.loads(dump_json(value))
    assert told["x"] == [{"f": [1, "é", {"b": 2}], "s": [1, "é", None, 1, "é", {"b": 2}]}]
    assert told["many"] == list(range(100_000))
