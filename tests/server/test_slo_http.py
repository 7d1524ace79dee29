"""SLOs in HTTP's words: who asks, who wins, what is told at the end, how a refusal looks."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import ClientSession, web
from multidict import CIMultiDict

from minserve.errors import InvalidSLOError, SLOUnattainableError
from minserve.outputs import OutputDelta
from minserve.request import FinishReason
from minserve.server.errors import error_body, error_response, to_http_error
from minserve.server.generation import streamed_response
from minserve.server.protocol import parse_completion
from minserve.server.reply import Reply
from minserve.server.slo_http import read_slo, slo_object
from minserve.slo.attainment import SLOReport, judge, report
from minserve.slo.objectives import (
    SLO,
    DecodeStage,
    OnUnattainable,
    StageTarget,
    Targets,
    preset_classes,
)

HOUSE = SLO(ttft=9.0, tpot=0.9, name="house")


def engine_with(default: SLO | None = None, marker: str | None = None) -> Any:
    return SimpleNamespace(
        slo_classes=preset_classes(), default_slo=default, thinking_marker=marker
    )


def read(value: Any, default: SLO | None = None, marker: str | None = None, **headers: str) -> Any:
    """What is read from a body's value and headers, written ``x_slo_ttft_ms``."""
    named = CIMultiDict((name.replace("_", "-").title(), text) for name, text in headers.items())
    return read_slo(value, named, engine_with(default, marker))


# --- who asks for what ---


def test_a_request_that_asks_for_nothing_takes_the_default() -> None:
    assert read(None) is None
    assert read(None, HOUSE) is HOUSE
    assert read(None, HOUSE, Content_Type="application/json", X_Slow="1") is HOUSE


def test_a_body_names_a_class_or_lists_objectives() -> None:
    assert read("coding", HOUSE) is preset_classes()["coding"]
    assert read({"ttft_ms": 100}, HOUSE) == SLO(ttft=0.1)
    strict = read({"class": "coding", "on_unattainable": "reject"})
    assert strict.named("x") == SLO(
        ttft_slowdown=5, tpot=0.05, on_unattainable=OnUnattainable.REJECT, name="x"
    )
    thinking = DecodeStage(tpot=0.05, until="<end>")
    assert read({"thinking_tpot_ms": 50}, marker="<end>").stages == (thinking, DecodeStage())


def test_headers_ask_as_a_body_does() -> None:
    assert read(None, x_slo_ttft_ms="100") == SLO(ttft=0.1)
    assert read(None, x_slo_tpot_ms="62.5") == SLO(tpot=0.0625)
    both = {"x_llm_d_slo_ttft_ms": "100", "x_llm_d_slo_tpot_ms": "50"}
    assert read(None, **both) == SLO(ttft=0.1, tpot=0.05)
    assert read(None, **both, x_slo_ttft_ms="1", x_slo_tpot_ms="2") == SLO(ttft=0.1, tpot=0.05)
    mixed = read(None, x_slo_ttft_ms="1", x_slo_tpot_ms="2", x_llm_d_slo_tpot_ms="50")
    assert mixed == SLO(ttft=0.001, tpot=0.05)


def test_headers_refine_the_default_class() -> None:
    assert read(None, HOUSE, x_slo_ttft_ms="100") == SLO(ttft=0.1, tpot=0.9)
    slowdowns = SLO(ttft_slowdown=3, tpot_slowdown=2, name="house")
    assert read(None, slowdowns, x_slo_tpot_ms="50") == SLO(ttft_slowdown=3, tpot=0.05)
    reasoning = preset_classes()["reasoning"]
    refined = read(None, reasoning, x_slo_tpot_ms="70")
    assert refined.stages == (reasoning.stages[0], DecodeStage(tpot=0.07))


def test_the_body_wins_over_headers_field_by_field() -> None:
    headers = {"x_slo_ttft_ms": "100", "x_slo_tpot_ms": "50"}
    assert read({"ttft_ms": 5}, HOUSE, **headers) == SLO(ttft=0.005, tpot=0.05)
    assert read({"tpot_ms": 5}, **headers) == SLO(ttft=0.1, tpot=0.005)
    assert read({"ttft_slowdown": 5}, **headers) == SLO(ttft_slowdown=5, tpot=0.05)
    assert read({"ttft_ms": None, "tpot_slowdown": 2}, **headers) == SLO(ttft=0.1, tpot_slowdown=2)
    reject = read({"on_unattainable": "reject"}, **headers)
    assert reject == SLO(ttft=0.1, tpot=0.05, on_unattainable=OnUnattainable.REJECT)
    assert read("coding", **headers) is preset_classes()["coding"]
    assert read({"class": "coding"}, **headers) == preset_classes()["coding"]


@pytest.mark.parametrize(
    "text",
    [
        *("", "0", "0.0", "-1", "+1", "nan", "inf", "1e3", "1_0", "0x10", "ten", "1,5", "1 2"),
        *("\u0661", "9" * 400, "0." + "0" * 12 + "1", "1000000001"),
    ],
)
def test_a_bad_header_is_named_even_where_it_loses(text: str) -> None:
    for name in (
        "x-slo-ttft-ms",
        "x-slo-tpot-ms",
        "x-slo-finish-ms",
        "x-llm-d-slo-ttft-ms",
        "x-llm-d-slo-tpot-ms",
    ):
        for value in (None, "coding", {"ttft_ms": 60_000, "tpot_ms": 10_000}):
            headers = CIMultiDict({name.upper(): text, "x-llm-d-slo-other": "1"})
            with pytest.raises(InvalidSLOError) as caught:
                read_slo(value, headers, engine_with())
            assert caught.value.param == name


def test_headers_that_mean_nothing_here_are_refused_by_name() -> None:
    for name in ("x-slo-e2e-ms", "X-SLO-TTFT", "x-llm-d-slo-class", "x-slo-"):
        with pytest.raises(InvalidSLOError) as caught:
            read_slo("coding", {name: "100"}, engine_with())
        assert caught.value.param == name.lower()
    twice = CIMultiDict([("x-slo-ttft-ms", "1"), ("X-SLO-TTFT-MS", "2")])
    with pytest.raises(InvalidSLOError, match="twice"):
        read_slo(None, twice, engine_with())


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ("talk", "slo"),
        ("", "slo"),
        (5, "slo"),
        (True, "slo"),
        ([], "slo"),
        ({}, "slo"),
        ({"class": "talk"}, "slo.class"),
        ({"ttft_ms": 0}, "slo.ttft_ms"),
        ({"thinking_tpot_ms": 5}, "slo.thinking_tpot_ms"),
        ({"ttft": 5}, "slo.ttft"),
    ],
)
def test_a_bad_body_is_named(value: Any, param: str) -> None:
    with pytest.raises(InvalidSLOError) as caught:
        read(value, HOUSE)
    assert caught.value.param == param


# --- what is told at the end ---


def reported(*times: float, stages: tuple[StageTarget, ...] = (StageTarget(0.5),)) -> SLOReport:
    return report("house", judge(Targets(1.0, stages), 0.0, times), admitted=True)


def test_a_report_is_told_in_milliseconds() -> None:
    assert slo_object(reported(0.25, 0.8)) == {
        "class": "house",
        "admitted": True,
        "attained": False,
        "ttft_ms": 250.0,
        "mean_tpot_ms": 550.0,
        "worst_token_lateness_ms": 50.0,
        "finish_ms": 800.0,
        "targets": {"ttft_ms": 1000.0, "tpot_ms": 500.0},
    }


def test_a_report_rounds_to_microseconds_and_knows_no_infinity() -> None:
    told = slo_object(reported(0.1234567891, stages=(StageTarget(0.1, "x"), StageTarget())))
    assert told["ttft_ms"] == 123.457
    assert (told["mean_tpot_ms"], told["worst_token_lateness_ms"]) == (None, None)
    assert told["targets"] == {"ttft_ms": 1000.0, "tpot_ms": None, "thinking_tpot_ms": 100.0}
    three = (StageTarget(0.1, tokens=1), StageTarget(0.2, tokens=1), StageTarget(0.3))
    assert slo_object(reported(0.1, stages=three))["targets"] == {
        "ttft_ms": 1000.0,
        "tpot_ms": 300.0,
    }
    unpromised = slo_object(report("x", judge(Targets(), 0.0, []), admitted=False))
    assert unpromised["targets"] == {"ttft_ms": None, "tpot_ms": None}
    json.dumps([told, unpromised], allow_nan=False)


# --- refusals ---


@pytest.mark.parametrize(
    ("wait_s", "seconds", "milliseconds"),
    [
        (0.0, "1", "1"),
        (-5.0, "1", "1"),
        (0.25, "1", "250"),
        (1.0001, "2", "1001"),
        (59.0, "59", "59000"),
        (61.0, "60", "60000"),
        (1e6, "60", "60000"),
        (math.nan, "1", "1"),
    ],
)
def test_a_refusal_says_when_to_come_back(wait_s: float, seconds: str, milliseconds: str) -> None:
    refusal = SLOUnattainableError("too busy", reason="compute", retry_after_s=wait_s)
    error = to_http_error(refusal)
    assert error.status == 429
    assert error_body(error)["error"] == {
        "message": "too busy",
        "type": "rate_limit_error",
        "param": None,
        "code": "slo_unattainable",
    }
    headers = error_response(error).headers
    assert headers["Retry-After"] == seconds
    assert headers["retry-after-ms"] == milliseconds
    assert headers["x-request-dropped-reason"] == "compute"
    assert "x-should-retry" not in headers


def test_a_refusal_for_good_says_that_no_wait_helps() -> None:
    refusal = SLOUnattainableError("too fast", reason="device", retry_after_s=math.inf)
    headers = error_response(to_http_error(refusal)).headers
    assert headers["x-should-retry"] == "false"
    assert headers["x-request-dropped-reason"] == "device"
    assert not {"Retry-After", "retry-after-ms"} & set(headers)


class ScriptedHandle:
    """A handle whose deltas are known beforehand."""

    prompt = "ab"
    prompt_token_ids = (0, 1)

    def __init__(self, *deltas: OutputDelta) -> None:
        self._deltas = deltas

    async def __aiter__(self) -> AsyncIterator[OutputDelta]:
        for delta in self._deltas:
            await asyncio.sleep(0)
            yield delta

    def waiting(self, most: int) -> list[OutputDelta]:
        return []


def stream(handles: list[Any], *, refusable: bool, **fields: Any) -> tuple[int, str]:
    """Status and body of a streamed response over a real socket."""
    call = parse_completion({"prompt": [[1]] * len(handles), **fields}, {})

    async def answer(request: web.Request) -> web.StreamResponse:
        reply = Reply(call, handles, "m", None)
        try:
            return await streamed_response(request, call, reply, handles, refusable=refusable)
        except SLOUnattainableError as error:
            return error_response(to_http_error(error))

    async def ask() -> tuple[int, str]:
        app = web.Application()
        app.router.add_get("/", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
            async with ClientSession() as session, session.get(url) as response:
                return response.status, await response.text()
        finally:
            await runner.cleanup()

    return asyncio.run(ask())


def news(text: str, index: int = 0, finish: FinishReason | None = None) -> OutputDelta:
    return OutputDelta(request_id="r", index=index, text=text, token_ids=(1,), finish_reason=finish)


def refusal(index: int = 0) -> OutputDelta:
    error = SLOUnattainableError("too busy", reason="memory", retry_after_s=2.0)
    return OutputDelta(request_id="r", index=index, finish_reason=FinishReason.ERROR, error=error)


def test_a_sibling_that_is_refused_late_still_gets_a_status() -> None:
    of_one_prompt = [ScriptedHandle(news("a"), news("b"), refusal(index=1))]
    of_two_prompts = [ScriptedHandle(news("a"), news("b"), news("c")), ScriptedHandle(refusal())]
    for handles, fields in ((of_one_prompt, {"n": 2}), (of_two_prompts, {})):
        status, body = stream(handles, refusable=True, **fields)
        assert status == 429
        assert json.loads(body)["error"]["code"] == "slo_unattainable"
    status, body = stream(of_one_prompt, refusable=False, n=2)
    assert status == 200
    assert "slo_unattainable" in body.split("data: ")[-1]


def test_what_is_held_back_until_all_have_begun_is_not_lost() -> None:
    stop = FinishReason.STOP
    first = ScriptedHandle(news("a"), news("b"), news("c", finish=stop))
    second = ScriptedHandle(news("x", finish=stop))
    bodies = []
    for refusable in (True, False):
        status, body = stream([first, second], refusable=refusable)
        assert status == 200
        assert body.endswith("data: [DONE]\n\n")
        texts = ["", ""]
        for event in body.split("\n\n")[:-2]:
            choice = json.loads(event.removeprefix("data: "))["choices"][0]
            texts[choice["index"]] += choice["text"]
        bodies.append(texts)
    assert bodies == [["abc", "x"]] * 2
