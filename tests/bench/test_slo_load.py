"""Arrivals, traces, the stream's token times, and the report's arithmetic."""

from __future__ import annotations

import asyncio
import json
import math
import random
import statistics
from collections import Counter
from itertools import pairwise

import pytest
from aiohttp import web
from slo_load import (
    CLASSES,
    Answer,
    Offered,
    Prompt,
    arrival_times,
    drive,
    make_trace,
    read_event,
    slo_fields,
    write_classes,
)
from slo_report import (
    Cell,
    Run,
    Verdict,
    capacity,
    curves,
    disagreements,
    percentile,
    summary,
    verdict_on,
)

from minserve.planner.perf_model import PerfModel, Piece
from minserve.slo import StageTarget, Targets
from minserve.slo_fields import load_classes, parse_slo
from minserve.workload.data_files import read_prompts

MODEL = PerfModel([Piece(tokens=0.002, base=0.02)])
SLOS = {work.name: work.slo(2.5, 5.0) for work in CLASSES}
PROMPTS = {work.name: [Prompt(f"{work.name} {i}", 10 + i) for i in range(40)] for work in CLASSES}
TARGETS = Targets(ttft_s=1.0, stages=(StageTarget(tpot_s=0.1),))


def trace(process: str = "poisson", rate: float = 2.0, seed: int = 0, **kw) -> list[Offered]:
    return make_trace(process, rate, 30.0, seed, prompts=PROMPTS, slos=SLOS, model=MODEL, **kw)


def answer(times: list[float], tokens: int | None = None, ended: str = "done") -> Answer:
    """An answer that was due at 100 s, its token times relative to that."""
    num_tokens = len(times) if tokens is None else tokens
    offered = Offered(0.0, "chat", Prompt("x", 1), num_tokens, TARGETS)
    return Answer(offered, 100.0, 100.002, [100.0 + t for t in times], ended)


def run(
    policy: str, rate: float, attained: int, offered: int, variant: str = "", repeat: int = 0
) -> Run:
    verdicts = [
        Verdict(
            name="chat",
            cause=None if i < attained else "late token",
            attained_mean=True,
            ttft_s=0.1,
            tpot_s=0.05,
            send_lag_s=0.0,
        )
        for i in range(offered)
    ]  # fmt: skip
    return Run(
        process="poisson",
        rate=rate,
        repeat=repeat,
        policy=policy,
        variant=variant or policy,
        seconds=10.0,
        cores_elsewhere=0.0,
        slowness=1.0,
        disturbed=False,
        verdicts=verdicts,
    )


# --- arrivals and traces ---


@pytest.mark.parametrize("process", ["poisson", "bursty"])
def test_arrivals_fill_the_window_in_order_at_exactly_the_rate(process):
    times = arrival_times(process, 2.5, 40.0, random.Random(3))
    assert len(times) == 100
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] < 40.0


@pytest.mark.parametrize(("process", "expected"), [("poisson", 1.0), ("bursty", 3.0)])
def test_gaps_between_arrivals_have_the_variation_of_their_process(process, expected):
    times = arrival_times(process, 10.0, 5000.0, random.Random(1))
    gaps = [b - a for a, b in pairwise(times)]
    assert statistics.pstdev(gaps) / statistics.mean(gaps) == pytest.approx(expected, rel=0.05)


def test_a_trace_depends_on_its_arguments_alone():
    assert trace() == trace()
    assert trace(seed=1) != trace()
    assert [o.at_s for o in trace("bursty")] != [o.at_s for o in trace()]


def test_no_prompt_comes_twice_before_all_of_its_class_came():
    offered = trace(rate=3.0, weights=(1, 0, 0))
    counts = Counter(one.prompt.text for one in offered)
    assert len(offered) == 90
    assert len(counts) == 40
    assert max(counts.values()) - min(counts.values()) == 1


def test_classes_come_by_their_weights():
    counts = Counter(one.name for one in trace(rate=100.0, weights=(2, 1, 1)))
    assert counts["coding"] == pytest.approx(1500, rel=0.05)
    assert counts["chat"] == pytest.approx(750, rel=0.1)


def test_slowdowns_become_seconds_by_the_devices_speed():
    for one in trace():
        slo, n = SLOS[one.name], one.prompt.num_tokens
        assert one.targets.ttft_s == pytest.approx(slo.ttft_slowdown * (0.02 + 0.002 * n))
        assert one.targets.stages[0].tpot_s == pytest.approx(slo.tpot_slowdown * 0.022)


def test_coding_is_promised_the_tight_pace_and_summarization_the_short_wait():
    assert SLOS["coding"].tpot_slowdown == 2.5
    assert SLOS["chat"].tpot_slowdown == SLOS["summarization"].tpot_slowdown == 5.0
    assert SLOS["summarization"].ttft_slowdown < SLOS["chat"].ttft_slowdown


def test_the_server_reads_the_same_slos_from_names_and_from_objects(tmp_path):
    write_classes(SLOS, tmp_path / "classes.toml")
    classes = load_classes(tmp_path / "classes.toml")
    for name, slo in SLOS.items():
        assert classes[slo_fields(SLOS, "class")[name]] == slo
        fields = slo_fields(SLOS, "object")[name]
        read = parse_slo(fields, where="slo", classes={}, thinking_marker=None)
        assert read.named(name) == slo


@pytest.mark.parametrize(("name", "mean"), [("coding", 16), ("chat", 48), ("summarization", 32)])
def test_output_lengths_have_the_stated_means_and_stay_within_bounds(name, mean):
    work = next(work for work in CLASSES if work.name == name)
    rng = random.Random(0)
    lengths = [work.draw_length(rng) for _ in range(20_000)]
    assert statistics.mean(lengths) == pytest.approx(mean, rel=0.1)
    assert min(lengths) >= 1
    assert max(lengths) == work.longest


def test_every_class_has_real_prompts_enough_for_a_run():
    for work in CLASSES:
        texts = read_prompts(work.prompts_file)
        assert len(set(texts)) > 150
        assert all(text.strip() for text in texts)


# --- the client ---


def event(tokens: int, **more) -> bytes:
    return json.dumps(
        {"choices": [{"text": "a"}], "usage": {"completion_tokens": tokens}, **more}
    ).encode()


def test_a_chunk_stands_for_as_many_tokens_as_its_usage_grew_by():
    one = answer([], tokens=4, ended="cut")
    for now, tokens in ((1.0, 1), (2.0, 3), (3.0, 3), (4.0, 4)):
        read_event(one, event(tokens), now)
    read_event(
        one, b'{"choices": [], "usage": {"completion_tokens": 4, "slo": {"class": "chat"}}}', 5.0
    )
    read_event(one, b"[DONE]", 5.0)
    assert one.token_times == [1.0, 2.0, 2.0, 4.0]
    assert one.ended == "done"
    assert one.reported == {"class": "chat"}


def test_an_error_in_mid_stream_is_a_failure():
    one = answer([], tokens=2, ended="cut")
    read_event(one, event(1), 1.0)
    read_event(one, b'{"error": {"message": "out of luck"}}', 2.0)
    assert (one.ended, one.token_times) == ("failed", [1.0])
    assert "out of luck" in one.error


@pytest.mark.parametrize(
    ("times", "now", "hopeless"),
    [
        ([], 0.9, False),  # the first token may still be in time
        ([], 1.1, True),
        ([1.1], 1.2, True),  # it was late
        ([0.5], 0.8, False),  # the second is late, but the mean may recover
        ([0.5], 0.91, True),  # all five were due at 0.9
    ],
)
def test_a_request_is_hopeless_once_no_form_of_attainment_is_left(times, now, hopeless):
    assert answer(times, tokens=5).is_hopeless(100.0 + now) is hopeless


async def _serve_and_drive(handler, offered: list[Offered]) -> tuple[list[Answer], float]:
    app = web.Application()
    app.add_routes([web.post("/v1/completions", handler)])
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0]
        return await drive(f"http://{host}:{port}", offered, {"chat": "chat"})
    finally:
        await runner.cleanup()


def test_the_client_tells_answered_refused_broken_and_hanging_requests_apart():
    bodies = []

    async def handler(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if not body.get("stream"):
            return web.json_response({})
        bodies.append(body)
        if body["prompt"] == "refused":
            return web.json_response({"error": {}}, status=429)
        if body["prompt"] == "hangs":
            await asyncio.sleep(30)
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"data: " + event(1) + b"\n\n")
        if body["prompt"] == "good":
            await response.write(b"data: " + event(2) + b"\n\ndata: [DONE]\n\n")
        return response

    targets = Targets(ttft_s=5.0, stages=(StageTarget(tpot_s=5.0),))
    impatient = Targets(ttft_s=0.3, stages=(StageTarget(tpot_s=0.1),))
    offered = [
        Offered(0.0, "chat", Prompt("hangs", 1), 2, impatient),
        *(Offered(0.01, "chat", Prompt(t, 1), 2, targets) for t in ("good", "refused", "breaks")),
    ]
    answers, lone_tpot_s = asyncio.run(_serve_and_drive(handler, offered))
    assert 0 < lone_tpot_s < 1
    assert [one.ended for one in answers] == ["cut", "done", "rejected", "failed"]
    causes = [verdict_on(one).cause for one in answers]
    assert causes == ["unanswered", None, "rejected", "failed"]
    assert len(answers[1].token_times) == 2
    assert all(body["slo"] == "chat" and body["max_tokens"] == 2 for body in bodies)


# --- the report ---


@pytest.mark.parametrize(
    ("one", "cause", "attained_mean"),
    [
        (answer([1.0, 1.1, 1.2]), None, True),
        (answer([1.01, 1.1, 1.2]), "late first token", False),
        (answer([0.5, 0.65, 0.7]), "late token", True),
        (answer([0.5, 0.65, 0.75]), "late token", False),
        (answer([0.5, 0.55], tokens=9, ended="cut"), "late token", False),
        (answer([], tokens=9, ended="cut"), "unanswered", False),
        (answer([], tokens=9, ended="rejected"), "rejected", False),
        (answer([0.5, 0.55], tokens=9, ended="failed"), "failed", False),
    ],
)
def test_misses_are_told_apart_by_cause(one, cause, attained_mean):
    verdict = verdict_on(one)
    assert (verdict.cause, verdict.attained_mean) == (cause, attained_mean)


def test_latencies_count_from_the_time_a_request_was_due():
    verdict = verdict_on(answer([0.5, 0.7, 0.8]))
    assert verdict.ttft_s == pytest.approx(0.5)
    assert verdict.tpot_s == pytest.approx(0.15)
    assert verdict.send_lag_s == pytest.approx(0.002)


def test_promises_that_differ_from_the_clients_are_counted():
    same, other, silent = answer([0.1]), answer([0.1]), answer([0.1])
    same.reported = {"targets": {"ttft_ms": 1000.001, "tpot_ms": 100.0}}
    other.reported = {"targets": {"ttft_ms": 1000.0, "tpot_ms": 101.0}}
    assert disagreements([same, other, silent]) == 1


def test_percentiles_are_values_that_occurred():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert percentile(values, 0.5) == 3.0
    assert percentile(values, 0.99) == 5.0
    assert percentile([*values, math.inf], 0.99) == math.inf
    assert math.isnan(percentile([], 0.5))


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ({1.0: 1.0, 2.0: 0.8}, 1.5),
        ({2.0: 0.5, 1.0: 0.95, 0.5: 1.0}, 1.0 + 0.05 / 0.45),
        ({1.0: 1.0, 2.0: 0.9}, 2.0),  # the whole sweep
        ({1.0: 0.89, 2.0: 0.5}, None),
        ({1.0: 0.8, 2.0: 0.9, 3.0: 0.8}, 2.0),  # the largest rate, though a smaller one fails
    ],
)
def test_capacity_is_the_largest_rate_that_keeps_ninety_percent(curve, expected):
    assert capacity(curve) == (None if expected is None else pytest.approx(expected))


def test_repeats_are_pooled_and_their_spread_is_kept():
    cell = Cell([run("dp", 1.0, 10, 10), run("dp", 1.0, 5, 10, repeat=1)])
    assert cell.attainment == 0.75
    assert cell.spread == (0.5, 1.0)
    assert cell.goodput == 0.75


def test_the_best_variant_at_each_rate_counts_as_the_policy():
    runs = [
        run("sarathi", 1.0, 10, 10, "sarathi 64"),
        run("sarathi", 2.0, 2, 10, "sarathi 64"),
        run("sarathi", 1.0, 8, 10, "sarathi 128"),
        run("sarathi", 2.0, 8, 10, "sarathi 128"),
    ]
    curve = curves(runs, "poisson")["sarathi"]
    assert {rate: cell.attainment for rate, cell in curve.items()} == {1.0: 1.0, 2.0: 0.8}
    assert summary(runs)["capacity"] == {"poisson": {"sarathi": 1.5}}


def test_a_capacity_beyond_the_sweep_is_marked_as_a_lower_bound():
    runs = [run("dp", 1.0, 10, 10), run("fcfs", 1.0, 5, 10)]
    result = json.loads(json.dumps(summary(runs)))
    assert result["at_least"] == {"poisson": ["dp"]}
    assert result["capacity"] == {"poisson": {"dp": 1.0, "fcfs": None}}
    assert result["attainment"]["poisson"]["fcfs"] == {"1": 0.5}
