"""How answers are sent: comments while a stream waits, errors at any time, large bodies."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import openai
import pytest
from aiohttp import ClientSession, web
from test_reply import ByteTokenizer, entry, letters
from waiting import PATIENCE_S

from minserve.errors import GenerationError, SLOUnattainableError
from minserve.outputs import OutputDelta
from minserve.request import FinishReason
from minserve.server.errors import error_body, error_response, to_http_error
from minserve.server.generation import (
    LARGE_BODY,
    MOST_DELTAS,
    ReplyFace,
    streamed_response,
    whole_response,
)
from minserve.server.protocol import GenerationCall, parse_completion
from minserve.server.reply import Reply

END = {"finish_reason": FinishReason.STOP}
BROKEN = GenerationError("broken in the middle")
REFUSED = SLOUnattainableError("too busy", reason="memory", retry_after_s=2.0)
NEVER_S = 10_000.0
SOON_S = 0.005


class ScriptedHandle:
    """A handle whose deltas are known beforehand; it waits at each event among them.

    Args:
        behind: the reader is so slow that all deltas up to the next event are there at once.
    """

    request_id, prompt = "r", "ab"

    def __init__(
        self, *script: Any, prompt_token_ids: Any = tuple(b"ab"), behind: bool = False
    ) -> None:
        self._script, self.prompt_token_ids = deque(script), prompt_token_ids
        self._behind = behind

    async def __aiter__(self) -> AsyncIterator[OutputDelta]:
        while self._script:
            one = self._script.popleft()
            if isinstance(one, asyncio.Event):
                await asyncio.wait_for(one.wait(), PATIENCE_S)
            else:
                yield one

    def waiting(self, most: int) -> list[OutputDelta]:
        found: list[OutputDelta] = []
        while self._behind and self._script and len(found) < most:
            if isinstance(self._script[0], asyncio.Event):
                break
            found.append(self._script.popleft())
        return found

    def abort(self) -> None:
        pass

    complete = abort


def failure(error: Exception, index: int = 0) -> OutputDelta:
    return OutputDelta(request_id="r", index=index, finish_reason=FinishReason.ERROR, error=error)


def completions_of(handles: list[Any], fields: dict[str, Any]) -> tuple[GenerationCall, ReplyFace]:
    """A call of so many completions, and its reply."""
    call = parse_completion({"prompt": ["ab"] * len(handles), **fields}, {})
    return call, Reply(call, handles, "m", ByteTokenizer())


def serve(
    handles: list[Any], use: Callable[[str], Awaitable[Any]], *, refusable: bool = False,
    first_byte_s: float = NEVER_S, make: Any = completions_of, **fields: Any,
) -> Any:  # fmt: skip
    """Answer with scripted handles over a real socket, and return what a client makes of it.

    Args:
        make: makes the call and the reply of the handles and a body's fields.
    """

    async def answer(request: web.Request) -> web.StreamResponse:
        call, reply = make(handles, fields)
        try:
            if not call.stream:
                return await whole_response(request, reply, handles)
            return await streamed_response(
                request, call, reply, handles, refusable=refusable, first_byte_s=first_byte_s
            )
        except (GenerationError, SLOUnattainableError) as error:
            return error_response(to_http_error(error))

    async def run() -> Any:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            return await use(f"http://127.0.0.1:{runner.addresses[0][1]}")
        finally:
            await runner.cleanup()

    return asyncio.run(run())


async def read(url: str) -> tuple[int, str, str]:
    """Return the status, the type and the text of an answer."""
    async with ClientSession() as session, session.get(url) as response:
        return response.status, response.headers["Content-Type"], await response.text("utf-8")


def reader_of_comments(num: int, then: asyncio.Event) -> Callable[[str], Awaitable[Any]]:
    """Read so many comments of a stream, let it go on then, and read the rest."""

    async def use(url: str) -> tuple[int, str, str]:
        async with ClientSession() as session, session.get(url) as response:
            text = ""
            while text.count(": waiting\n\n") < num:
                text += (await response.content.readany()).decode()
            then.set()
            rest = (await response.content.read()).decode()
            return response.status, text, rest

    return use


# --- before the first byte ---


def test_a_stream_that_waits_gets_its_status_and_comments_until_its_first_event() -> None:
    go = asyncio.Event()
    handle = ScriptedHandle(go, letters("a"), letters("b", **END))
    use = reader_of_comments(3, go)
    status, before, rest = serve([handle], use, first_byte_s=SOON_S, stream=True)
    assert status == 200
    assert before.replace(": waiting\n\n", "") == ""
    events = [one for one in rest.split("\n\n") if one and one != ": waiting"]
    assert events[-1] == "data: [DONE]"
    texts = [json.loads(one.removeprefix("data: "))["choices"][0]["text"] for one in events[:-1]]
    assert texts == ["a", "b"]
    assert ": waiting" not in rest[rest.index("data: ") :]


def test_outputs_that_are_held_for_their_siblings_wait_with_comments_too() -> None:
    go = asyncio.Event()
    handle = ScriptedHandle(letters("a"), go, failure(REFUSED, index=1))
    use = reader_of_comments(2, go)
    settings = {"refusable": True, "first_byte_s": SOON_S, "stream": True, "n": 2}
    status, _, rest = serve([handle], use, **settings)
    assert status == 200
    event = rest.split("\n\n")[-2]
    assert json.loads(event.removeprefix("data: ")) == error_body(to_http_error(REFUSED))


def test_until_the_first_byte_an_error_has_its_status() -> None:
    for first_byte_s in (0.0, NEVER_S):
        handle = ScriptedHandle(failure(REFUSED))
        status, kind, text = serve([handle], read, first_byte_s=first_byte_s, stream=True)
        assert status == 429
        assert kind.startswith("application/json")
        assert json.loads(text) == error_body(to_http_error(REFUSED))


def test_clients_of_openai_pass_over_comments() -> None:
    go = asyncio.Event()
    handle = ScriptedHandle(go, letters("a"), letters("b", **END))

    async def use(url: str) -> list[str]:
        async with openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0) as client:
            stream = await client.completions.create(model="m", prompt="ab", stream=True)
            go.set()  # The status was there before any event.
            return [chunk.choices[0].text async for chunk in stream]

    assert serve([handle], use, first_byte_s=SOON_S, stream=True) == ["a", "b"]


# --- after it ---


def test_a_failure_in_mid_stream_is_an_event_in_the_form_of_an_answer() -> None:
    handle = ScriptedHandle(letters("a"), failure(BROKEN))
    status, kind, text = serve([handle], read, stream=True)
    assert (status, kind) == (200, "text/event-stream; charset=utf-8")
    *_, last = text.removesuffix("\n\n").split("\n\n")
    _, _, answered = serve([ScriptedHandle(failure(BROKEN))], read)
    assert json.loads(last.removeprefix("data: ")) == json.loads(answered)
    assert "[DONE]" not in text
    assert '"finish_reason":"' not in text


def test_a_failure_in_mid_stream_is_an_error_to_clients_of_openai() -> None:
    handle = ScriptedHandle(letters("a"), failure(BROKEN))

    async def use(url: str) -> tuple[list[str], str]:
        async with openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0) as client:
            texts = []
            try:
                async for chunk in await client.completions.create(
                    model="m", prompt="ab", stream=True
                ):
                    texts.append(chunk.choices[0].text)
            except openai.APIError as error:
                return texts, error.code or ""
            return texts, "no error"

    assert serve([handle], use, stream=True) == (["a"], "generation_failed")


# --- a reader that is behind ---


def pieces_of(text: str) -> list[OutputDelta]:
    return [*(letters(one) for one in text), letters("", **END)]


@pytest.mark.parametrize("behind", [False, True])
def test_what_is_there_at_once_is_written_at_once(
    behind: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[bytes] = []
    write = web.StreamResponse.write

    async def note(response: web.StreamResponse, data: bytes) -> None:
        written.append(data)
        await write(response, data)

    monkeypatch.setattr(web.StreamResponse, "write", note)
    text = "a long enough text"
    handle = ScriptedHandle(*pieces_of(text), behind=behind)
    status, _, got = serve([handle], read, stream=True)
    assert status == 200
    # The end of the stream is a write of its own, and so is each delta's event otherwise.
    assert len(written) == (2 if behind else len(text) + 2)
    events = got.removesuffix("\n\n").split("\n\n")
    assert events[-1] == "data: [DONE]"
    chunks = [json.loads(one.removeprefix("data: ")) for one in events[:-1]]
    assert [one["choices"][0]["text"] for one in chunks] == [*text, ""]
    assert [one["choices"][0]["finish_reason"] for one in chunks] == [*([None] * len(text)), "stop"]


def test_so_much_is_not_taken_at_once_that_others_wait() -> None:
    taken: list[int] = []

    class Counted(ScriptedHandle):
        def waiting(self, most: int) -> list[OutputDelta]:
            found = super().waiting(most)
            taken.append(1 + len(found))
            return found

    text = "x" * 1000
    _, _, got = serve([Counted(*pieces_of(text), behind=True)], read, stream=True)
    assert got.count('"text":"x"') == len(text)
    assert max(taken) == MOST_DELTAS
    assert sum(taken) == len(text) + 1


def test_behind_too_all_that_came_before_a_failure_is_told() -> None:
    handle = ScriptedHandle(letters("a"), letters("b"), failure(BROKEN), letters("c"), behind=True)
    status, _, text = serve([handle], read, stream=True)
    *events, last = text.removesuffix("\n\n").split("\n\n")
    texts = [json.loads(one.removeprefix("data: "))["choices"][0]["text"] for one in events]
    assert (status, texts) == (200, ["a", "b"])
    assert json.loads(last.removeprefix("data: ")) == error_body(to_http_error(BROKEN))


def test_a_refusal_among_what_is_there_at_once_has_its_status() -> None:
    handle = ScriptedHandle(letters("a"), failure(REFUSED, index=1), behind=True)
    status, _, text = serve([handle], read, stream=True, refusable=True, n=2)
    assert status == 429
    assert json.loads(text) == error_body(to_http_error(REFUSED))


@pytest.mark.parametrize("stream", [False, True])
def test_choices_and_prompts_do_not_mix_behind(stream: bool) -> None:
    def handle() -> ScriptedHandle:
        script = [letters(one, index=i) for one in "xyz" for i in range(2)]
        return ScriptedHandle(
            *script, *(letters("", index=i, **END) for i in range(2)), behind=True
        )

    _, _, text = serve([handle(), handle()], read, stream=stream, n=2)
    texts = [""] * 4
    if stream:
        for event in text.removesuffix("\n\n").split("\n\n")[:-1]:
            for choice in json.loads(event.removeprefix("data: "))["choices"]:
                texts[choice["index"]] += choice["text"]
    else:
        answer = json.loads(text)
        texts = [choice["text"] for choice in answer["choices"]]
        assert answer["usage"]["completion_tokens"] == 12
    assert texts == ["xyz"] * 4


# --- large answers ---


def ticking(counts: list[int]) -> Callable[[str], Awaitable[Any]]:
    """Read an answer, and count how often the loop does something else meanwhile."""

    async def use(url: str) -> tuple[int, str, str]:
        async def tick() -> None:
            while True:
                await asyncio.sleep(0)
                counts.append(1)

        ticks = asyncio.create_task(tick())
        try:
            return await read(url)
        finally:
            ticks.cancel()

    return use


def test_a_large_answer_is_sent_in_pieces_and_is_the_same() -> None:
    ids = tuple(i % 26 + 97 for i in range(9000))
    top = tuple((i, -1.0) for i in range(97, 117))
    text = bytes(ids).decode()
    logprobs = tuple(entry(one, -1.0, top) for one in ids)
    deltas = [OutputDelta("r", index, text, ids, logprobs, FinishReason.STOP) for index in range(2)]
    status, kind, got = serve([ScriptedHandle(*deltas)], read, n=2, logprobs=20)
    assert (status, kind) == (200, "application/json")
    assert len(got) > 3 * LARGE_BODY
    answer = json.loads(got)
    for choice in answer["choices"]:
        assert choice["text"] == text
        assert choice["logprobs"]["tokens"] == list(text)
        assert all(len(one) >= 20 for one in choice["logprobs"]["top_logprobs"])
    assert answer["usage"]["completion_tokens"] == 2 * len(ids)


def test_the_loop_goes_on_while_much_is_written() -> None:
    """4000 prompt tokens of 20 alternatives, told twice, and 400 deltas that are there at once."""
    ids = tuple(i % 26 + 97 for i in range(4000))
    top = tuple((i, -1.0) for i in range(97, 117))
    told = (None, *(entry(one, -1.0, top) for one in ids[1:]))
    first = letters("c", logprobs=(entry(99, -1.0, top),), prompt_logprobs=told)
    more = [letters("c", logprobs=(entry(99, -1.0, top),)) for _ in range(400)]
    fields = {"echo": True, "logprobs": 20, "prompt_logprobs": 20}
    for stream in (False, True):
        handle = ScriptedHandle(first, *more, letters("", **END), prompt_token_ids=ids)
        counts: list[int] = []
        status, _, _ = serve([handle], ticking(counts), stream=stream, **fields)
        assert status == 200
        # At least once for each thousand log probabilities.
        assert len(counts) > (2 * 20 * 4000 + 20 * 400) / 1000
