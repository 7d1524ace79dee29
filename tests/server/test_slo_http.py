"""SLOs over HTTP: who asks, who wins, what is told at the end, how a refusal looks."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from aiohttp import ClientSession, web
from live_server import RunningServer, post
from multidict import CIMultiDict

from minserve.errors import InvalidSLOError, SLOUnattainableError
from minserve.outputs import OutputDelta
from minserve.request import FinishReason
from minserve.server.errors import error_body, error_response, to_http_error
from minserve.server.generation import streamed_response
from minserve.server.protocol import parse_completion
from minserve.server.reply import Reply
from minserve.server.slo_http import read_slo, slo_object
from minserve.server_config import ServerConfig
from minserve.slo.attainment import SLOReport, judge, report
from minserve.slo.objectives import (
    SLO,
    DecodeStage,
    OnUnattainable,
    StageTarget,
    Targets,
    preset_classes,
)

PROMPT = "The quick brown fox"
# So generous that only a hanging machine is late; so tight that nothing can be in time; and
# so tight that it is too late before anybody has looked.
GENEROUS = {"ttft_ms": 60_000, "tpot_ms": 10_000}
IMPOSSIBLE = {"ttft_ms": 60_000, "tpot_ms": 0.001}
TOO_LATE = {"ttft_ms": 0.001}
GREEDY = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 12}

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
        for value in (None, "coding", GENEROUS):
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


# --- over a socket ---


def usage_of(server: RunningServer, headers: Any = None, **fields: Any) -> dict[str, Any]:
    status, _, raw = post(server, "/v1/completions", {**GREEDY, **fields}, headers)
    assert status == 200, raw
    return json.loads(raw)["usage"]


def test_without_an_slo_the_usage_says_nothing_of_it(server: RunningServer) -> None:
    assert "slo" not in usage_of(server)


def test_a_generous_slo_is_attained(client: openai.OpenAI) -> None:
    asked_s = time.monotonic()
    response = client.completions.create(**GREEDY, extra_body={"slo": GENEROUS})
    answered_s = time.monotonic()
    told = response.usage.slo
    assert set(told) == {
        "class",
        "admitted",
        "attained",
        "ttft_ms",
        "mean_tpot_ms",
        "worst_token_lateness_ms",
        "finish_ms",
        "targets",
    }
    assert (told["class"], told["admitted"], told["attained"]) == ("custom", True, True)
    # What lies within what.
    count = response.usage.completion_tokens
    last_ms = told["ttft_ms"] + told["mean_tpot_ms"] * (count - 1)
    assert 0 < told["ttft_ms"] < last_ms < 1e3 * (answered_s - asked_s)
    assert told["finish_ms"] == pytest.approx(last_ms, abs=0.1)
    assert told["worst_token_lateness_ms"] < 0
    assert told["targets"] == GENEROUS


def test_chat_and_every_output_take_the_slo(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    response = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=3, n=2, extra_body={"slo": GENEROUS}
    )
    assert response.usage.slo["attained"]


def test_a_class_by_name_is_told_by_name(server: RunningServer) -> None:
    told = usage_of(server, slo="chatbot")["slo"]
    assert told["class"] == "chatbot"
    assert told["targets"]["tpot_ms"] == 100.0
    assert told["targets"]["ttft_ms"] > 0
    assert usage_of(server, slo={"class": "chatbot", "value": 2})["slo"]["class"] == "chatbot"
    staged = usage_of(server, slo="reasoning")["slo"]["targets"]
    assert (staged["thinking_tpot_ms"], staged["tpot_ms"]) == (50.0, 100.0)


def test_the_final_chunk_alone_carries_the_slo(server: RunningServer) -> None:
    for options in ({}, {"continuous_usage_stats": True}):
        body = {
            **GREEDY,
            "slo": GENEROUS,
            "stream": True,
            "stream_options": {"include_usage": True, **options},
        }
        _, _, raw = post(server, "/v1/completions", body)
        *chunks, last, done = [part[6:] for part in raw.decode().split("\n\n")[:-1]]
        assert done == "[DONE]"
        assert json.loads(last)["usage"]["slo"]["attained"] is True
        assert json.loads(last)["usage"]["slo"]["targets"] == GENEROUS
        assert chunks
        assert all("slo" not in json.loads(chunk).get("usage", {}) for chunk in chunks)


def test_headers_and_body_meet_on_the_wire(server: RunningServer) -> None:
    headers = {"X-SLO-TTFT-MS": "50000", "x-slo-tpot-ms": "7000", "x-llm-d-slo-tpot-ms": "8000"}
    assert usage_of(server, headers)["slo"]["targets"] == {"ttft_ms": 50000, "tpot_ms": 8000}
    both = usage_of(server, headers, slo={"ttft_ms": 40000})
    assert both["slo"]["targets"] == {"ttft_ms": 40000, "tpot_ms": 8000}
    named = usage_of(server, headers, slo="coding")
    assert named["slo"]["class"] == "coding"
    assert named["slo"]["targets"]["tpot_ms"] == 50.0


@pytest.mark.parametrize(
    ("fields", "headers", "param"),
    [
        ({"slo": "talk"}, {}, "slo"),
        ({"slo": {"class": "talk"}}, {}, "slo.class"),
        ({"slo": {"tpot_ms": 0}}, {}, "slo.tpot_ms"),
        ({"slo": {"thinking_tpot_ms": 50}}, {}, "slo.thinking_tpot_ms"),
        ({"slo": {"ttft": 1}}, {}, "slo.ttft"),
        ({}, {"x-slo-ttft-ms": "soon"}, "x-slo-ttft-ms"),
        ({}, {"x-llm-d-slo-tpot-ms": "-5"}, "x-llm-d-slo-tpot-ms"),
        ({}, {"X-SLO-Total-Ms": "100"}, "x-slo-total-ms"),
    ],
)
def test_a_bad_slo_is_a_400_that_names_it(
    server: RunningServer, fields: dict[str, Any], headers: dict[str, str], param: str
) -> None:
    for stream in (False, True):
        body = {**GREEDY, **fields, "stream": stream}
        status, _, raw = post(server, "/v1/completions", body, headers)
        assert status == 400
        error = json.loads(raw)["error"]
        assert (error["type"], error["param"]) == ("invalid_request_error", param)


def test_a_default_class_and_a_models_own_marker(
    tiny_llama_dir: Path, start_server: Callable[..., RunningServer]
) -> None:
    house = SLO(ttft=60.0, tpot=10.0)
    server = start_server(
        tiny_llama_dir,
        ServerConfig(served_model_name="tiny"),
        slo_classes={"house": house},
        default_slo="house",
        thinking_marker="</t>",
    )
    told = usage_of(server)["slo"]
    assert (told["class"], told["attained"]) == ("house", True)
    refined = usage_of(server, {"x-slo-ttft-ms": "50000"})["slo"]
    assert refined["class"] == "custom"
    assert refined["targets"] == {"ttft_ms": 50000, "tpot_ms": 10000}
    thinking = usage_of(server, slo={"thinking_tpot_ms": 9000})["slo"]["targets"]
    assert thinking == {"ttft_ms": None, "tpot_ms": None, "thinking_tpot_ms": 9000}
    assert usage_of(server, slo="coding")["slo"]["class"] == "coding"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    "fields", [{}, {"n": 3}, {"prompt": [PROMPT, "A server"]}], ids=["one", "n", "list"]
)
def test_an_impossible_slo_is_refused_where_that_was_asked_for(
    server: RunningServer, stream: bool, fields: dict[str, Any]
) -> None:
    body = {**GREEDY, "slo": {**IMPOSSIBLE, "on_unattainable": "reject"}, "stream": stream}
    status, headers, raw = post(server, "/v1/completions", {**body, **fields})
    assert status == 429, raw
    assert headers["Content-Type"].startswith("application/json")
    assert headers["x-request-dropped-reason"] == "device"
    assert headers["x-should-retry"] == "false"
    assert not {"Retry-After", "retry-after-ms"} & set(headers)
    error = json.loads(raw)["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "slo_unattainable")
    server.wait_until_free()


def test_a_deadline_of_the_whole_answer_is_promised_judged_and_counted(
    server: RunningServer,
) -> None:
    told = usage_of(server, slo={"finish_ms": 60_000})["slo"]
    assert (told["admitted"], told["attained"]) == (True, True)
    assert told["targets"] == {"ttft_ms": None, "tpot_ms": None, "finish_ms": 60_000}
    assert 0 < told["ttft_ms"] <= told["finish_ms"] < 60_000
    headers = {"X-SLO-Finish-MS": "50000"}
    assert usage_of(server, headers)["slo"]["targets"]["finish_ms"] == 50_000
    beside = usage_of(server, headers, slo={"finish_ms": 40_000, "ttft_ms": 30_000})["slo"]
    assert beside["targets"] == {"ttft_ms": 30_000, "tpot_ms": None, "finish_ms": 40_000}
    late = usage_of(server, slo={"finish_ms": 0.001})["slo"]
    assert (late["admitted"], late["attained"]) == (False, False)
    assert late["finish_ms"] > late["targets"]["finish_ms"] == 0.001
    refused = {**GREEDY, "slo": {"finish_ms": 0.001, "on_unattainable": "reject"}}
    status, headers, raw = post(server, "/v1/completions", refused)
    assert (status, headers["x-request-dropped-reason"]) == (429, "device"), raw
    several = {**GREEDY, "n": 3, "slo": {"finish_ms": 60_000}}
    status, _, raw = post(server, "/v1/completions", several)
    assert (status, json.loads(raw)["usage"]["slo"]["attained"]) == (200, True)


@pytest.mark.parametrize(
    ("slo", "param"),
    [
        ({"finish_ms": 0}, "slo.finish_ms"),
        ({"finish_ms": True}, "slo.finish_ms"),
        ({"finish_ms": "4000"}, "slo.finish_ms"),
        ({"finish_ms": 1e300}, "slo.finish_ms"),
        ({"finish_ms": 10, "ttft_ms": 11}, "slo.finish_ms"),
        ({"finish_slowdown": 3}, "slo.finish_slowdown"),
    ],
)
def test_a_deadline_that_makes_no_sense_is_refused_by_name(
    server: RunningServer, slo: dict[str, Any], param: str
) -> None:
    status, _, raw = post(server, "/v1/completions", {**GREEDY, "slo": slo})
    assert (status, json.loads(raw)["error"]["param"]) == (400, param)


def test_a_request_that_is_too_late_already_is_refused_too(server: RunningServer) -> None:
    slo = {**TOO_LATE, "on_unattainable": "reject"}
    assert post(server, "/v1/completions", {**GREEDY, "slo": slo})[0] == 429


def test_a_refusal_for_good_is_the_clients_rate_limit_and_not_tried_again(
    server: RunningServer,
) -> None:
    slo = {**IMPOSSIBLE, "on_unattainable": "reject"}
    errors = server.engine.stats().finished[FinishReason.ERROR]
    with server.client(max_retries=5) as client, pytest.raises(openai.RateLimitError) as refused:
        client.completions.create(**GREEDY, extra_body={"slo": slo})
    assert refused.value.code == "slo_unattainable"
    assert server.engine.stats().finished[FinishReason.ERROR] == errors + 1


@pytest.mark.parametrize("slo", [IMPOSSIBLE, TOO_LATE], ids=["impossible", "too late"])
def test_the_same_slo_as_best_effort_is_served_late(
    server: RunningServer, slo: dict[str, Any]
) -> None:
    _, _, plain = post(server, "/v1/completions", GREEDY)
    _, _, late = post(server, "/v1/completions", {**GREEDY, "slo": slo})
    assert json.loads(late)["choices"] == json.loads(plain)["choices"]
    told = json.loads(late)["usage"]["slo"]
    assert (told["admitted"], told["attained"]) == (False, False)
    if slo is TOO_LATE:
        assert told["ttft_ms"] > told["targets"]["ttft_ms"] == 0.001
    else:
        assert told["worst_token_lateness_ms"] > 0


def test_refusals_and_promises_change_no_neighbours_output(server: RunningServer) -> None:
    long = {**GREEDY, "max_tokens": 200, "ignore_eos": True}
    _, _, raw = post(server, "/v1/completions", long)
    alone = json.loads(raw)["choices"]
    together: list[Any] = []

    def ask(slo: Any) -> None:
        _, _, raw = post(server, "/v1/completions", {**long, "slo": slo})
        together.append(json.loads(raw)["choices"])

    neighbours = [threading.Thread(target=ask, args=(slo,)) for slo in (None, GENEROUS)]
    for thread in neighbours:
        thread.start()
    server.wait_until_busy()
    reject = {**IMPOSSIBLE, "on_unattainable": "reject"}
    for slo in (IMPOSSIBLE, TOO_LATE, reject, {"ttft_ms": -1}) * 3:
        post(server, "/v1/completions", {**GREEDY, "slo": slo})
    for thread in neighbours:
        thread.join()
    assert together == [alone, alone]
    server.wait_until_free()
