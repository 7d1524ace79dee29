"""SLOs on a running server: kept, missed, refused, told and counted."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from live_server import RunningServer, post
from waiting import wait_until

from minserve.request import FinishReason
from minserve.server_config import ServerConfig
from minserve.slo.objectives import SLO

PROMPT = "The quick brown fox"
# So generous that only a hanging machine is late; so tight that nothing can be in time; and
# so tight that it is too late before anybody has looked.
GENEROUS = {"ttft_ms": 60_000, "tpot_ms": 10_000}
IMPOSSIBLE = {"ttft_ms": 60_000, "tpot_ms": 0.001}
TOO_LATE = {"ttft_ms": 0.001}
GREEDY = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 12}


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
    wait_until(lambda: server.engine.num_unfinished or len(together) == len(neighbours))
    reject = {**IMPOSSIBLE, "on_unattainable": "reject"}
    for slo in (IMPOSSIBLE, TOO_LATE, reject, {"ttft_ms": -1}) * 3:
        post(server, "/v1/completions", {**GREEDY, "slo": slo})
    for thread in neighbours:
        thread.join()
    assert together == [alone, alone]
    server.wait_until_free()
