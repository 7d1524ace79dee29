"""What the engine counts, and that nobody who reads it sees it change."""

from __future__ import annotations

import pytest

from minserve.engine.stats import ITERATION_SECONDS, NUM_TOKENS, EngineStats, Histogram
from minserve.planner.plan import IterationPlan
from minserve.planner.predict.perf_model import PerfModel, Piece
from minserve.request import FinishReason, Request, RequestEvent, Sequence
from minserve.sampling_params import SamplingParams
from minserve.slo.attainment import Outcome, report
from minserve.slo.objectives import CUSTOM, SLO


def sequence(name: str, *, ttft_s: float = 1.0, num_prompt_tokens: int = 3) -> Sequence:
    """One that arrived at 10 s and asks for its first token within ``ttft_s``."""
    slo = SLO(ttft=ttft_s, name=name)
    request = Request(
        request_id="r",
        prompt_token_ids=(5,) * num_prompt_tokens,
        params=SamplingParams(),
        seed=0,
        arrival_s=10.0,
        slo=slo,
        targets=slo.resolve(0.0, 0.0),
    )
    return Sequence(request)


def deliver(stats: EngineStats, seq: Sequence, now: float) -> None:
    stats.delivered(seq, 1, seq.events.get(RequestEvent.TOKENS), now)
    seq.events[RequestEvent.TOKENS] = now
    seq.progress.add_token(now)


def end(stats: EngineStats, seq: Sequence, reason: FinishReason, now: float) -> None:
    seq.finish_reason, seq.events[RequestEvent.FINISHED] = reason, now
    stats.ended(seq, report(seq.request.slo.name, seq.progress, admitted=True))


def outcomes(stats: EngineStats) -> dict[tuple[str, str], int]:
    return {(name, o.value): num for (name, o), num in stats.slo_requests.items() if num}


@pytest.mark.parametrize("bounds", [ITERATION_SECONDS, NUM_TOKENS])
def test_a_number_falls_into_the_first_bucket_that_holds_it(bounds: tuple[float, ...]) -> None:
    assert list(bounds) == sorted(set(bounds))
    histogram = Histogram(bounds)
    values = [*bounds, *(bound * 1.001 for bound in bounds), 1e9]
    for value in values:
        histogram.observe(value)
    for i, bound in enumerate(bounds):
        assert sum(histogram.counts[: i + 1]) == sum(value <= bound for value in values)
    assert sum(histogram.counts) == len(values)
    assert histogram.total == pytest.approx(sum(values))


def test_times_of_a_request() -> None:
    stats, seq = EngineStats(), sequence("house")
    stats.started(seq, 10.25)
    for now in (10.5, 10.6, 10.8):
        deliver(stats, seq, now)
    end(stats, seq, FinishReason.LENGTH, 10.8)
    assert stats.queue_s.total == pytest.approx(0.25)
    assert stats.ttft_s.total == pytest.approx(0.5)
    assert (stats.inter_token_s.total, sum(stats.inter_token_s.counts)) == (pytest.approx(0.3), 2)
    assert stats.e2e_s.total == pytest.approx(0.8)
    assert stats.num_prompt_tokens == 3


def test_classes_that_nobody_configured_count_as_custom() -> None:
    stats = EngineStats()
    stats.add_classes(["house"])
    for name in ("house", CUSTOM, "made up"):
        seq = sequence(name)
        deliver(stats, seq, 10.5)
        end(stats, seq, FinishReason.STOP, 10.5)
    assert outcomes(stats) == {("house", "attained"): 1, (CUSTOM, "attained"): 2}
    assert {name for name, _ in stats.slo_requests} == {"house", CUSTOM}


@pytest.mark.parametrize(
    ("first_token_s", "left_s", "counted"),
    [(None, 10.5, 0), (None, 12.0, 1), (10.5, 12.0, 0), (11.5, 12.0, 1)],
    ids=["early", "overdue", "in time", "late"],
)
def test_whoever_leaves_counts_only_where_it_was_late(
    first_token_s: float | None, left_s: float, counted: int
) -> None:
    stats, seq = EngineStats(), sequence(CUSTOM)
    if first_token_s is not None:
        deliver(stats, seq, first_token_s)
    end(stats, seq, FinishReason.ABORT, left_s)
    assert outcomes(stats) == ({(CUSTOM, "late_ttft"): 1} if counted else {})
    assert stats.finished[FinishReason.ABORT] == 1
    assert not any(stats.e2e_s.counts)


def test_a_copy_stays_as_it_is() -> None:
    stats = EngineStats()
    copied = stats.copy(num_running=3, kv_usage=0.5)
    assert (copied.num_running, copied.kv_usage) == (3, 0.5)
    stats.iteration(IterationPlan(predicted_s=0.1), PerfModel([Piece(tokens=1e-3, base=0.1)]), 0.2)
    stats.batch([])
    stats.speculation.add(4, 2)
    seq = sequence(CUSTOM)
    deliver(stats, seq, 10.5)
    end(stats, seq, FinishReason.STOP, 10.5)
    assert stats.slo_requests[CUSTOM, Outcome.ATTAINED] == 1
    untouched = EngineStats()
    for name in EngineStats.__dataclass_fields__:
        value, expected = getattr(copied, name), getattr(untouched, name)
        if isinstance(value, Histogram):
            assert value.counts == expected.counts, name
            assert value.total == 0
        elif name not in ("num_running", "kv_usage"):
            assert value == expected, name
