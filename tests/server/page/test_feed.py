"""`GET /page/feed` over a socket: what it tells beside /metrics, whom, and that it is bounded."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from live_server import RunningServer, post
from prometheus_client.parser import text_string_to_metric_families
from waiting import PATIENCE_S, wait_until

from minserve.server.page.feed import MAX_FEEDS
from minserve.server.page.frames import FRAME_SCHEMA
from minserve.server_config import ServerConfig

PROMPT = "The quick brown fox jumps over the lazy dog"
EASY = {"ttft_ms": 900_000, "tpot_ms": 900_000}
KEY = {"Authorization": "Bearer secret"}
VALIDATOR = Draft202012Validator(FRAME_SCHEMA)


@contextmanager
def feed(server: RunningServer, **headers: str) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)
    connection.request("GET", "/page/feed", headers=headers)
    try:
        yield connection.getresponse()
    finally:
        connection.close()


def frames(answer: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in answer:
        if line.startswith(b"data: "):
            frame = json.loads(line[6:])
            assert not list(VALIDATOR.iter_errors(frame))
            yield frame


def one_frame(server: RunningServer) -> dict[str, Any]:
    status, headers, raw = post(server, "/page/feed?frames=1", None, method="GET")
    assert status == 200
    assert headers["Content-Type"].startswith("text/event-stream")
    frame = json.loads(raw.removeprefix(b"data: "))
    assert not list(VALIDATOR.iter_errors(frame))
    return frame


def counts(server: RunningServer) -> dict[tuple[str, tuple[str, ...]], float]:
    text = post(server, "/metrics", None, method="GET")[2].decode()
    return {
        (sample.name.removeprefix("minserve:"), tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def ask(server: RunningServer, **more: Any) -> dict[str, Any]:
    body = {"prompt": PROMPT, "max_tokens": 6, "ignore_eos": True, **more}
    status, _, raw = post(server, "/v1/completions", body)
    assert status == 200, raw
    return json.loads(raw)


def test_a_frame_says_what_the_metrics_say(
    start_server: Callable[..., RunningServer], tiny_llama_dir: Path
) -> None:
    server = start_server(tiny_llama_dir, ServerConfig())
    for slo in (EASY, None, EASY, {**EASY, "ttft_ms": 0.001}):
        ask(server, slo=slo)
    answers = ask(server, n=2, slo=EASY)
    server.wait_until_free()
    # The newest counts may still be on their way.
    wait_until(lambda: server.engine.stats().num_generation_tokens == 36)
    frame, told = one_frame(server), counts(server)
    (replica,) = frame["replicas"]
    totals, activity = replica["totals"], replica["activity"]
    assert (replica["replica"], replica["state"], frame["unfinished"]) == ("0", "up", 0)
    for field, metric in (
        ("generation_tokens", "generation_tokens_total"),
        ("prompt_tokens", "prompt_tokens_total"),
        ("prefix_queries", "prefix_cache_queries_total"),
        ("prefix_hits", "prefix_cache_hits_total"),
        ("preemptions", "num_preemptions_total"),
    ):
        assert totals[field] == told[metric, ()], field
    assert totals["kv_usage"] == pytest.approx(told["kv_cache_usage_perc", ()], abs=1e-4)
    iterations = activity["iterations"]
    assert len(iterations) == told["iteration_seconds_count", ()]
    for kind in ("prefill", "decode", "draft"):
        tokens = sum(one[kind] + one[f"best_effort_{kind}"] for one in iterations)
        assert tokens == told["batch_tokens_sum", (kind,)], kind
    assert sum(one["took_ms"] for one in iterations) == pytest.approx(
        1e3 * told["iteration_seconds_sum", ()], abs=len(iterations)
    )
    (own,) = totals["classes"]
    assert (own["name"], own["ended"]) == ("custom", 5)
    assert own["attained"] == told["slo_requests_total", ("custom", "attained")] == 4
    for field in ("ended", "attained"):
        assert sum(one[field] for one in activity["ends"]) == own[field]
    lanes = activity["lanes"]
    assert len(lanes) == 6
    assert [lane["state"] for lane in lanes] == ["finished"] * 6
    assert sum(lane["output_tokens"] for lane in lanes) == told["generation_tokens_total", ()]
    assert [lane["class"] for lane in lanes].count(None) == 1
    assert {lane["prompt_tokens"] for lane in lanes} == {answers["usage"]["prompt_tokens"]}
    late = [lane for lane in lanes if lane["outcome"] not in ("attained", None)]
    assert len(late) == 1
    assert any(mark[4] is not None and mark[4] < 0 for mark in late[0]["marks"])
    # No text of anybody is in it.
    assert not [word for word in PROMPT.split() if word in json.dumps(frame).replace("_", " ")]


def test_frames_go_on_where_the_one_before_ended(server: RunningServer) -> None:
    with feed(server) as answer:
        told = frames(answer)
        first = next(told)
        assert first["about"]["model"] == "tiny"
        assert first["about"]["chat"] is True
        assert first["replicas"][0]["activity"]["is_whole"]
        before = server.engine.stats().iteration_s
        num_before = sum(before.counts)
        ask(server, max_tokens=40)
        server.wait_until_free()
        num, lanes = 0, []
        # A look may fall between an output's end and the note of its last iteration.
        while num < 40 or not any(lane["ended_ms"] is not None for lane in lanes):
            frame = next(told)
            assert "about" not in frame
            activity = frame["replicas"][0]["activity"]
            assert not activity["is_whole"]
            num += len(activity["iterations"])
            lanes += activity["lanes"]
        assert num == sum(server.engine.stats().iteration_s.counts) - num_before == 40
        # An idle feed still shows that it lives.
        assert next(told)["replicas"][0]["activity"]["iterations"] == []


def test_it_needs_the_key_and_the_page_does_not(
    start_server: Callable[..., RunningServer], tiny_llama_dir: Path
) -> None:
    server = start_server(tiny_llama_dir, ServerConfig(api_key=("secret",)))
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        assert post(server, "/page/feed", None, headers, method="GET")[0] == 401
    page = post(server, "/", None, method="GET")
    assert page[0] == 200
    for link in re.findall(r'(?:src|href)="(page/[^"]+)"', page[2].decode()):
        assert post(server, f"/{link}", None, method="GET")[0] == 200
    status, _, raw = post(server, "/page/feed?frames=1", None, KEY, method="GET")
    assert (status, b'"about"' in raw) == (200, True)


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}],
    ids=["origin", "site"],
)
def test_a_page_of_another_origin_takes_no_place(
    server: RunningServer, headers: dict[str, str]
) -> None:
    status, _, raw = post(server, "/page/feed", None, headers, method="GET")
    assert (status, json.loads(raw)["error"]["code"]) == (403, "origin_not_allowed")


def test_there_are_only_so_many_feeds(server: RunningServer) -> None:
    with ExitStack() as stack:
        opened = [stack.enter_context(feed(server)) for _ in range(MAX_FEEDS)]
        for answer in opened:
            assert next(frames(answer))["about"]
        status, _, raw = post(server, "/page/feed", None, method="GET")
        assert (status, json.loads(raw)["error"]["code"]) == (429, "too_many_feeds")
        # All others are served meanwhile.
        assert ask(server)["usage"]["completion_tokens"] == 6
    # Whoever leaves makes room.
    wait_until(lambda: post(server, "/page/feed?frames=1", None, method="GET")[0] == 200)


@pytest.mark.parametrize("query", ["frames=0", "frames=-1", "frames=x", "frames=10000000", "a=1",
                                   "frames=1&frames=2"])  # fmt: skip
def test_wrong_parameters_are_named(server: RunningServer, query: str) -> None:
    status, _, raw = post(server, f"/page/feed?{query}", None, method="GET")
    assert (status, json.loads(raw)["error"]["param"]) == (400, query.partition("=")[0])


def test_a_head_is_refused_by_its_method(server: RunningServer) -> None:
    status, headers, _ = post(server, "/page/feed", None, method="HEAD")
    assert (status, headers["Allow"]) == (405, "GET")


def test_deadlines_of_whole_answers_are_told(server: RunningServer) -> None:
    one_frame(server)  # from now on single tokens are noted
    body = {"prompt": PROMPT, "max_tokens": 3, "ignore_eos": True, "slo": {"finish_ms": 900_000}}
    usage = json.loads(post(server, "/v1/completions", body)[2])["usage"]
    frame = one_frame(server)
    assert {one["name"]: one["finish_ms"] for one in frame["about"]["classes"]}["batch"] == 60_000
    lane = frame["replicas"][0]["activity"]["lanes"][-1]
    assert lane["finish_due_ms"] == pytest.approx(lane["arrival_ms"] + 900_000, abs=1)
    slacks = [slack for kind, *_, slack in lane["marks"] if kind == "output"]
    assert slacks[-1] == pytest.approx(900_000 - usage["slo"]["finish_ms"], abs=5)
    assert lane["outcome"] == "attained"


def test_only_its_own_files_are_served(server: RunningServer) -> None:
    for path in ("/page/index.html", "/page/none.js", "/page/..%2Ffeed.py", "/page/"):
        assert post(server, path, None, method="GET")[0] == 404


def test_open_feeds_do_not_hold_up_the_end(
    start_server: Callable[..., RunningServer], tiny_llama_dir: Path
) -> None:
    server = start_server(tiny_llama_dir, ServerConfig())
    with feed(server) as answer:
        told = frames(answer)
        next(told)
        server.loop.call_soon_threadsafe(
            lambda: server.loop.create_task(server.runner.shutdown()),
        )
        assert list(told) is not None  # which ends
        assert answer.read() == b""
