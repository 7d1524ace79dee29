"""Workloads of the serving benchmark, and the arithmetic of its report."""

from __future__ import annotations

import json
import random
import statistics
from collections import Counter
from itertools import pairwise

import pytest
from scripted_server import scripted_server

from minserve.planner.predict.perf_model import PerfModel, Piece
from minserve.slo.fields import load_classes, parse_slo
from minserve.slo.objectives import StageTarget, Targets
from minserve.workload.answer import Answer
from minserve.workload.conversation import Conversation, Turn
from minserve.workload.data_files import read_prompts
from minserve.workload.verdict import Cause, Verdict
from parts.slo_serving.report import PolicyRun, PooledRuns, curves, disagreements, summary
from shared.slo_load import (
    CLASSES,
    Prompt,
    make_workload,
    measure,
    slo_fields,
    write_classes,
)

MODEL = PerfModel([Piece(tokens=0.002, base=0.02)])
SLOS = {work.name: work.slo(2.5, 5.0) for work in CLASSES}
PROMPTS = {work.name: [Prompt(f"{work.name} {i}", 10 + i) for i in range(40)] for work in CLASSES}
TARGETS = Targets(ttft_s=1.0, stages=(StageTarget(tpot_s=0.1),))


def workload(
    process: str = "poisson", rate: float = 2.0, seed: int = 0, **kw
) -> list[Conversation]:
    return make_workload(process, rate, 30.0, seed, prompts=PROMPTS, slos=SLOS, **kw)


def turns(found: list[Conversation]) -> list[Turn]:
    return [turn for conversation in found for turn in conversation.turns]


def run(
    policy: str, rate: float, attained: int, offered: int, variant: str = "", repeat: int = 0
) -> PolicyRun:
    verdicts = [
        Verdict(
            name="chat",
            arrival_s=0.0,
            cause=None if i < attained else Cause.LATE_TPOT,
            attained_mean=True,
            ttft_s=0.1,
            tpot_s=0.05,
            send_lag_s=0.0,
        )
        for i in range(offered)
    ]  # fmt: skip
    return PolicyRun(
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


# --- workloads ---


@pytest.mark.parametrize(("process", "expected"), [("poisson", 1.0), ("bursty", 3.0)])
def test_arrivals_fill_the_window_with_the_variation_of_their_process(process, expected):
    found = make_workload(process, 10.0, 5000.0, 1, prompts=PROMPTS, slos=SLOS)
    times = [conversation.arrival_s for conversation in found]
    gaps = [b - a for a, b in pairwise(times)]
    assert len(times) == 50_000
    assert min(gaps) >= 0
    assert times[-1] < 5000.0
    assert statistics.pstdev(gaps) / statistics.mean(gaps) == pytest.approx(expected, rel=0.05)


def test_a_workload_depends_on_its_arguments_alone():
    assert workload() == workload()
    assert workload(seed=1) != workload()
    arrivals = [[one.arrival_s for one in workload(process)] for process in ("bursty", "poisson")]
    assert arrivals[0] != arrivals[1]


def test_no_prompt_comes_twice_before_all_of_its_class_came():
    found = turns(workload(rate=3.0, weights=(1, 0, 0)))
    counts = Counter(turn.text for turn in found)
    assert len(found) == 90
    assert len(counts) == 40
    assert max(counts.values()) - min(counts.values()) == 1


def test_classes_come_by_their_weights():
    counts = Counter(turn.slo.name for turn in turns(workload(rate=100.0, weights=(2, 1, 1))))
    assert counts["coding"] == pytest.approx(1500, rel=0.05)
    assert counts["chat"] == pytest.approx(750, rel=0.1)


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


def test_a_workload_goes_to_a_server_with_a_lone_request_before_and_after():
    sent = [Conversation(0.0, (one,)) for one in turns(workload(rate=0.2))]
    with scripted_server(owner="minserve") as server:
        load, lone_tpot_s = measure(server.url, sent, MODEL, slo_fields(SLOS, "class"))
        slos = [body.get("slo") for body in server.bodies]
    assert lone_tpot_s > 0
    assert slos[0] is slos[-1] is None
    assert sorted(slos[1:-1]) == sorted(turn.slo.name for turn in turns(sent))
    assert all(len(one.token_times) == one.turn.output_tokens for one in load.answers)


# --- the report ---


def test_promises_that_differ_from_the_clients_are_counted():
    turn = Turn(slo=SLOS["chat"], prompt_tokens=1, output_tokens=1)
    same, other, silent = (Answer(turn, TARGETS, 100.0) for _ in range(3))
    same.reported = {"targets": {"ttft_ms": 1000.001, "tpot_ms": 100.0}}
    other.reported = {"targets": {"ttft_ms": 1000.0, "tpot_ms": 101.0}}
    assert disagreements([same, other, silent]) == 1


def test_repeats_are_pooled_and_their_spread_is_kept():
    cell = PooledRuns([run("dp", 1.0, 10, 10), run("dp", 1.0, 5, 10, repeat=1)])
    assert cell.attainment == 0.75
    assert cell.each == [1.0, 0.5]
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
