"""Plans made, and batches launched, while the iteration before runs: the same outputs, and off the
critical path.
"""

from __future__ import annotations

import random
import time
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from speculating import DEVICE, PROMPTS, essence, make_engine
from torch import Tensor

from minserve import SLO, Engine, SamplingParams
from minserve.engine.batch import RunResult, Scheduled
from minserve.engine.device.runner import InFlightBatch
from minserve.errors import GenerationError, SLOUnattainableError
from minserve.outputs import CompletionOutput
from minserve.planner.plan import IterationPlan, PlannerView
from minserve.planner.predict.perf_model import PerfModel
from minserve.structure import Structure

SETTINGS = {"dtype": "float32", "threads": 1, "token_budget": 64, "max_num_seqs": 8, "num_blocks": 200,
            "block_size": 8}  # fmt: skip
SCARCE = {"num_blocks": 14, "token_budget": 16}
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.9, top_p=0.95, max_tokens=24, seed=7)
POLICIES = ["fcfs", "sarathi", "edf", "dp"]
GENEROUS = SLO(ttft=1000.0, tpot=100.0)


def engine_of(
    folder: Path,
    policy: str = "sarathi",
    *,
    ahead: bool = True,
    launches: bool = False,
    **settings: Any,
) -> Engine:
    engine = Engine(str(folder), **SETTINGS | settings, policy=policy)
    if policy in ("dp", "edf"):
        engine._core.planner.model = PerfModel(DEVICE)
    engine._core.plans_ahead, engine._core.launches_ahead = ahead, launches
    return engine


def prompts(count: int = 6, seed: int = 3) -> list[list[int]]:
    rng = random.Random(seed)
    return [
        [rng.randrange(5, 500) for _ in range(rng.choice([1, 5, 9, 40, 77]))] for _ in range(count)
    ]


def outputs_of(engine: Engine, params: Any, slo: SLO | None = None) -> list[CompletionOutput]:
    found = [o for r in engine.generate(prompts(), params, slo=slo) for o in r.outputs]
    assert engine._core.pool.num_free_blocks == engine.config.num_blocks
    engine._core.check_integrity()
    return found


def ahead_counts(engine: Engine) -> tuple[int, int]:
    counts = engine._core.stats.plans_ahead
    return counts["launched"] + counts["held"], counts["discarded"]


# -- the same outputs --------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tiny_llama_dir: Path) -> Engine:
    return engine_of(tiny_llama_dir, ahead=False)


@pytest.fixture(scope="module")
def picky_params(plain: Engine) -> list[SamplingParams]:
    """Settings by which a token depends on the ones before it, and which tell more than tokens."""
    word = outputs_of(plain, GREEDY)[0].text[:3]
    return [
        replace(GREEDY, repetition_penalty=1.3, frequency_penalty=0.4, logprobs=2),
        replace(SEEDED, presence_penalty=0.9, min_tokens=5, stop_token_ids=tuple(range(60, 120))),
        replace(GREEDY, bad_words=(word,), logit_bias={7: 1.5}),
        replace(SEEDED, structure=Structure("regex", "[a-z]{3,30}"), ignore_eos=False),
        replace(GREEDY, prompt_logprobs=1, logprobs=0),
        replace(SEEDED, n=3, allowed_token_ids=tuple(range(20, 300)), min_p=0.02),
    ]


@pytest.fixture(scope="module")
def mixed_params(plain: Engine) -> list[SamplingParams]:
    """Greedy and seeded, and all the ways in which an output may end."""
    free = outputs_of(plain, GREEDY)
    return [
        GREEDY,
        replace(GREEDY, stop=(free[1].text[6:9],)),
        replace(GREEDY, stop_token_ids=(free[2].token_ids[9],)),
        replace(GREEDY, max_tokens=1),
        replace(SEEDED, n=2),
        replace(SEEDED, max_tokens=7),
    ]


@pytest.mark.parametrize("launches", [False, True], ids=["plans", "launches"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("settings", [{}, SCARCE, {"max_num_seqs": 2}], ids=str)
def test_outputs_do_not_depend_on_when_they_are_planned(
    plain: Engine,
    tiny_llama_dir: Path,
    mixed_params: list[SamplingParams],
    policy: str,
    settings: dict,
    launches: bool,
) -> None:
    expected = essence(outputs_of(plain, mixed_params))
    engine = engine_of(tiny_llama_dir, policy, launches=launches, **settings)
    slo = GENEROUS if policy in ("dp", "edf") else None
    # The second time with cached prefixes.
    for _ in range(2):
        assert essence(outputs_of(engine, mixed_params, slo)) == expected
    held, discarded = ahead_counts(engine)
    assert held > discarded
    if settings is SCARCE:
        assert engine._core.planner.num_preemptions > 0
    stats = engine._core.stats
    if launches and not settings:
        assert stats.plans_ahead["launched"] > stats.plans_ahead["held"]
        assert stats.num_surplus_tokens > 0
    if not launches:
        assert stats.plans_ahead["launched"] == stats.num_surplus_tokens == 0


@pytest.mark.parametrize("settings", [{}, {"num_blocks": 26, "token_budget": 16}], ids=str)
def test_tokens_that_depend_on_those_before_are_chosen_when_these_are_known(
    plain: Engine, tiny_llama_dir: Path, picky_params: list[SamplingParams], settings: dict
) -> None:
    def told(engine: Engine) -> list[tuple]:
        results = engine.generate(prompts(), picky_params)
        assert engine._core.pool.num_free_blocks == engine.config.num_blocks
        engine._core.check_integrity()
        outputs = [o for r in results for o in r.outputs]
        ranks = [[one.rank for one in o.logprobs] if o.logprobs else None for o in outputs]
        prompt_ids = [[one and one.token_id for one in r.prompt_logprobs or ()] for r in results]
        return [essence(outputs), ranks, prompt_ids]

    engine = engine_of(tiny_llama_dir, launches=True, **settings)
    assert told(engine) == told(plain)
    assert engine._core.stats.plans_ahead["launched"] > 10


def test_outputs_do_not_depend_on_whether_prefills_are_chunked(
    plain: Engine, tiny_llama_dir: Path, mixed_params: list[SamplingParams]
) -> None:
    engine = engine_of(tiny_llama_dir, "fcfs", chunked_prefill=False)
    for _ in range(2):
        assert essence(outputs_of(engine, mixed_params)) == essence(outputs_of(plain, mixed_params))


@pytest.mark.parametrize("launches", [False, True], ids=["plans", "launches"])
@pytest.mark.parametrize("policy", ["sarathi", "dp"])
@pytest.mark.parametrize("how", ["draft", "ngram"])
@pytest.mark.parametrize("settings", [{}, {"num_blocks": 30}], ids=str)
def test_outputs_do_not_depend_on_drafts_for_plans_made_ahead(
    tiny_llama_pair: Any, policy: str, how: str, settings: dict, launches: bool
) -> None:
    expected, found = [], []
    for ahead, results in ((False, expected), (True, found)):
        engine = make_engine(tiny_llama_pair, how, policy, **settings)
        engine._core.plans_ahead, engine._core.launches_ahead = ahead, ahead and launches
        for params in (GREEDY, SEEDED, replace(GREEDY, max_tokens=40, repetition_penalty=1.2)):
            outputs = [o for r in engine.generate(PROMPTS, params) for o in r.outputs]
            results += essence(outputs)
            assert engine._core.pool.num_free_blocks == engine.config.num_blocks
            engine._core.check_integrity()
        assert engine.speculation_stats.num_accepted_tokens > 0
    assert found == expected
    assert ahead_counts(engine)[0] > 20


Script = dict[int, list[tuple[str, Any]]]


def random_script(seed: int) -> Script:
    """What happens before which step: requests arrive, and some are aborted later."""
    rng, script = random.Random(seed), {}
    for number in range(14):
        at = rng.randrange(40)
        prompt = [rng.randrange(5, 9) for _ in range(rng.choice([1, 4, 17, 40]))]
        params = SamplingParams(
            temperature=rng.choice([0.0, 0.8]), seed=number, max_tokens=rng.randint(1, 20)
        )
        script.setdefault(at, []).append(("add", (number, prompt, params)))
        if rng.random() < 0.3:
            script.setdefault(at + rng.randint(1, 15), []).append(("abort", number))
    return script


def play(engine: Engine, script: Script) -> tuple[dict[int, list[int]], set[int]]:
    """Tokens by request number, and who was aborted before it ended."""
    core, ids, tokens, aborted, step = engine._core, {}, {}, set(), 0
    while core.has_work or step <= max(script):
        deltas = []
        for verb, what in script.get(step, ()):
            if verb == "add":
                submission = engine._prepare(what[1], what[2])
                ids[submission.request.request_id] = what[0]
                tokens[what[0]] = []
                engine._enqueue(submission)
            else:
                gone = core.abort(next(k for k, number in ids.items() if number == what))
                aborted |= {what} if gone else set()
        if core.has_work:
            deltas += core.step()
        for delta in deltas:
            tokens[ids[delta.request_id]] += delta.token_ids
        core.check_integrity()
        step += 1
    assert core.pool.num_free_blocks == core.pool.num_blocks
    return tokens, aborted


@pytest.mark.parametrize("launches", [False, True], ids=["plans", "launches"])
@pytest.mark.parametrize("policy", ["fcfs", "sarathi"])
def test_arrivals_and_aborts_between_steps_change_nobodys_tokens(
    tiny_llama_dir: Path, policy: str, launches: bool
) -> None:
    engines = [
        engine_of(tiny_llama_dir, policy, ahead=ahead, launches=ahead and launches, **SCARCE)
        for ahead in (False, True)
    ]
    for seed in range(8):
        (now, left_now), (ahead, left_ahead) = (play(e, random_script(seed)) for e in engines)
        for number in now.keys() - left_now - left_ahead:
            assert ahead[number] == now[number]
        for number in left_now | left_ahead:
            pairs = zip(now[number], ahead[number], strict=False)
            assert all(mine == theirs for mine, theirs in pairs)
    held, discarded = ahead_counts(engines[1])
    assert held > 0 < discarded
    core = engines[1]._core
    assert core.planner.num_preemptions == core.snapshot().num_preemptions > 0


# -- off the critical path ---------------------------------------------------------------


def recorded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """From now on, what is asked of planner and device, in order."""
    events: list[str] = []
    core = engine._core
    launch, plan = core.runner.launch, core.planner.plan

    def launching(batch: list[Scheduled]) -> InFlightBatch:
        events.append("launch")
        flight = launch(batch)
        results = flight.results

        def landing() -> dict[str, RunResult]:
            events.append("results")
            return results()

        monkeypatch.setattr(flight, "results", landing)
        return flight

    def planning(view: PlannerView, now: float) -> IterationPlan:
        events.append("plan")
        return plan(view, now)

    monkeypatch.setattr(core.runner, "launch", launching)
    monkeypatch.setattr(core.planner, "plan", planning)
    return events


@pytest.mark.parametrize("policy", POLICIES)
def test_decodes_are_planned_while_the_iteration_before_runs(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    engine = engine_of(tiny_llama_dir, policy)
    events = recorded(engine, monkeypatch)
    # A clock that goes on by a second whenever it is read.
    reads = count(time.monotonic())
    monkeypatch.setattr(engine._core, "clock", lambda: next(reads))
    engine.generate([5, 6, 7], replace(GREEDY, max_tokens=6))
    # The last token's iteration is known to be the last: nothing is left to plan for.
    assert events == ["plan", *["launch", "plan", "results"] * 5, "launch", "results"]
    assert ahead_counts(engine) == (5, 0)
    stats = engine._core.snapshot()
    assert sum(stats.planning_s.counts) == sum(stats.iteration_s.counts) == 6
    # Planning lies within the iterations.
    assert stats.planning_s.total == pytest.approx(6.0)
    assert stats.planning_s.total < stats.iteration_s.total


def test_without_planning_ahead_each_iteration_is_planned_first(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(tiny_llama_dir, ahead=False)
    events = recorded(engine, monkeypatch)
    engine.generate([5, 6, 7], replace(GREEDY, max_tokens=6))
    assert events == ["plan", "launch", "results"] * 6
    assert ahead_counts(engine) == (0, 0)


def test_an_arrival_is_planned_for_at_once(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(tiny_llama_dir)
    first = engine.stream([5, 6, 7], GREEDY)
    next(first)
    events = recorded(engine, monkeypatch)
    second = engine.stream([8, 9], GREEDY)
    next(second)
    assert events == ["plan", "launch", "plan", "results"]
    assert ahead_counts(engine) == (0, 1)
    assert len(list(first)) == len(list(second)) == 23
    assert ahead_counts(engine)[1] == 1


def test_a_request_refused_while_another_runs_is_refused_once(tiny_llama_dir: Path) -> None:
    engine = engine_of(tiny_llama_dir, "dp")
    running = engine.stream([5, 6, 7], GREEDY, slo=GENEROUS)
    next(running)
    impossible = SLO(ttft=1e-6, tpot=1e-6, on_unattainable="reject")
    with pytest.raises(SLOUnattainableError):
        list(engine.stream([8, 9], GREEDY, slo=impossible))
    assert len(list(running)) == 23


# -- what goes wrong ---------------------------------------------------------------------


def test_a_failing_plan_loses_nothing_of_the_iteration_that_runs(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(tiny_llama_dir)
    expected = engine.generate([5, 6, 7], GREEDY)[0].outputs[0].token_ids
    engine._core.planning._safe = None
    stream, plan = engine.stream([5, 6, 7], GREEDY), engine._core.planner.plan
    got = list(next(stream).token_ids)

    def broken(*_: object) -> None:
        raise RuntimeError("planner bug")

    # The plan for the second token is there already, and fails for the third.
    monkeypatch.setattr(engine._core.planner, "plan", broken)
    got += next(stream).token_ids
    assert got == expected[:2]
    with pytest.raises(RuntimeError, match="planner bug"):
        engine._core.step()
    monkeypatch.setattr(engine._core.planner, "plan", plan)
    got += [token for delta in stream for token in delta.token_ids]
    assert got == expected


def test_an_output_whose_logits_are_no_numbers_ends_alone_while_the_next_batch_runs(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(tiny_llama_dir, launches=True)
    expected = [engine.generate([p], GREEDY)[0].outputs[0].token_ids for p in prompts(3)]
    core, calls = engine._core, count()
    logits = core.runner.model.logits

    def poisoned(hidden: Tensor) -> Tensor:
        found = logits(hidden)
        if next(calls) == 6:
            found[1] = torch.nan
        return found

    monkeypatch.setattr(core.runner.model, "logits", poisoned)
    launched = core.stats.plans_ahead["launched"]
    ids, told, failed = [], {}, []
    for prompt in prompts(3):
        submission = engine._prepare(prompt, GREEDY)
        engine._enqueue(submission)
        ids.append(submission.request.request_id)
        told[ids[-1]] = []
    while core.has_work:
        for delta in core.step():
            told[delta.request_id] += delta.token_ids
            failed += [delta] * (delta.error is not None)
        core.check_integrity()
    (bad,) = failed
    assert "NaN" in str(bad.error)
    assert core.stats.plans_ahead["launched"] > launched + 10
    for request_id, tokens in zip(ids, expected, strict=True):
        whole = request_id != bad.request_id
        assert told[request_id] == (tokens if whole else tokens[: len(told[request_id])])


@pytest.mark.parametrize("fails_at", ["launch", "results"])
def test_a_request_that_fails_on_the_device_fails_alone(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str
) -> None:
    engine = engine_of(tiny_llama_dir)
    poison = 3
    expected = [engine.generate([p], GREEDY)[0].outputs[0].token_ids for p in prompts(3)]
    launch = engine._core.runner.launch

    def fall_over() -> dict[str, RunResult]:
        raise RuntimeError("device fell over")

    def failing(batch: list[Scheduled]) -> InFlightBatch:
        is_poisoned = any(poison in item.seq.token_ids for item in batch)
        if is_poisoned and fails_at == "launch":
            fall_over()
        flight = launch(batch)
        if is_poisoned:
            monkeypatch.setattr(flight, "results", fall_over)
        return flight

    monkeypatch.setattr(engine._core.runner, "launch", failing)
    bad = engine.stream([poison, 8, 9], GREEDY)
    good = [engine.stream(p, GREEDY) for p in prompts(3)]
    firsts = [next(g) for g in good]
    with pytest.raises(GenerationError, match="device fell over"):
        next(bad)
    got = [
        [*first.token_ids, *(t for d in g for t in d.token_ids)]
        for first, g in zip(firsts, good, strict=True)
    ]
    assert got == expected
    engine._core.check_integrity()
