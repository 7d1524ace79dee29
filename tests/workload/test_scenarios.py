"""The scenarios: as long as the paper's, at the rate that was asked for, the same per seed."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from minserve.errors import WorkloadError
from minserve.slo.objectives import preset_classes
from minserve.workload import recordings
from minserve.workload.conversation import Conversation, Turn, num_turns
from minserve.workload.scenarios import SCENARIOS, find_scenario

SINGLE = ("chatbot", "coding", "summarization", "mixed", "reasoning")


def turns_of(workload: list[Conversation]) -> list[Turn]:
    return [turn for conversation in workload for turn in conversation.turns]


def dispersion(workload: list[Conversation], width_s: float) -> float:
    """Variance of the arrivals per time, relative to the mean: 1 for Poisson."""
    span = workload[-1].arrival_s
    bins = Counter(int(one.arrival_s / width_s) for one in workload)
    counts = [bins[i] for i in range(int(span / width_s) + 1)]
    return statistics.pvariance(counts) / statistics.fmean(counts)


# The paper's table: mean, p99, sd; none where ours are others (minserve/workload/data/README.md).
@pytest.mark.parametrize(
    ("name", "count", "prompt", "output"),
    [
        ("chatbot", 1391, (763, 1591, 424), (266, 619, 160)),
        ("coding", 559, (847, 2010, 617), (26, 232, 47)),
        ("summarization", 5145, (1333, 1946, 444), (202, None, 234)),
        ("tools", 720, (690, None, None), (116, 363, None)),
        ("reasoning", 1000, (127, 421, 83), (4693 + 803, None, None)),
    ],
)
def test_lengths_are_those_of_the_paper(
    name: str, count: int, prompt: tuple[int | None, ...], output: tuple[int | None, ...]
) -> None:
    turns = turns_of(find_scenario(name).draw(1.0, seed=0, num_requests=count))
    assert len(turns) == count
    measures: tuple[Callable[[list[int]], float], ...] = (
        statistics.fmean,
        lambda values: float(np.percentile(values, 99)),
        statistics.pstdev,
    )
    for wanted, lengths in (
        (prompt, [turn.prompt_tokens for turn in turns]),
        (output, [turn.output_tokens for turn in turns]),
    ):
        for value, measure in zip(wanted, measures, strict=True):
            if value is not None:
                # The paper's are cut to whole numbers: a mean of 26 may be almost 27.
                assert measure(lengths) == pytest.approx(value, rel=0.01, abs=1.5)


def test_means_are_known_without_drawing() -> None:
    tools, mixed = find_scenario("tools"), find_scenario("mixed")
    assert tools.mean_prompt_tokens == pytest.approx(690, rel=0.001)
    assert tools.mean_output_tokens == pytest.approx(116, rel=0.001)
    drawn = turns_of(mixed.draw(5.0, seed=0, num_requests=9000))
    mean = statistics.fmean(turn.prompt_tokens for turn in drawn)
    assert mixed.mean_prompt_tokens == pytest.approx(mean, rel=0.02)


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "reasoning"])
def test_requests_fit_the_models_of_the_paper(name: str) -> None:
    scenario = find_scenario(name)
    assert all(
        turn.prompt_tokens + turn.output_tokens <= 2048
        for turn in turns_of(scenario.draw(1.0, seed=3))
    )


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_rate_counts_requests(name: str) -> None:
    scenario = find_scenario(name)
    workload = scenario.draw(0.7, seed=1)
    assert num_turns(workload) == pytest.approx(scenario.num_requests, abs=3)
    arrivals = [one.arrival_s for one in workload]
    assert arrivals == sorted(arrivals)
    assert arrivals[0] >= 0
    assert arrivals[-1] < num_turns(workload) / 0.7
    # Not all in the beginning of that time.
    assert arrivals[-1] > 0.8 * num_turns(workload) / 0.7


@pytest.mark.parametrize("name", SCENARIOS)
def test_all_arrive_within_the_seconds_asked_for(name: str) -> None:
    for seed in range(5):
        workload = find_scenario(name).draw(2.0, seed=seed, seconds=30.0)
        assert num_turns(workload) == pytest.approx(60, abs=0 if name in SINGLE else 3)
        assert all(0 <= one.arrival_s < 30.0 for one in workload)


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_seed_draws_the_same_and_another_one_does_not(name: str) -> None:
    scenario = find_scenario(name)
    first, again, other = (scenario.draw(1.0, seed=s, num_requests=40) for s in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(("name", "expected"), [("chatbot", 1.45), ("coding", 27.0)])
def test_a_recorded_window_is_as_bursty_at_another_rate(name: str, expected: float) -> None:
    scenario = find_scenario(name)
    for rate in (scenario.num_requests / 300, 40.0):
        # What was 10 s is stretched as the rate is. Where its bounds fall, the seed says.
        width_s = 10.0 * scenario.num_requests / 300 / rate
        found = [dispersion(scenario.draw(rate, seed=seed), width_s) for seed in range(12)]
        assert statistics.fmean(found) == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("count", [100, 559, 1200])
def test_a_recording_is_drawn_as_a_stretch_and_lengths_stay_with_their_arrivals(
    count: int,
) -> None:
    recorded = recordings.coding()
    rows = [(chain[0].new_tokens, chain[0].output_tokens) for chain in recorded.chains]
    workload = find_scenario("coding").draw(3.0, seed=5, num_requests=count)
    drawn = [(turn.prompt_tokens, turn.output_tokens) for turn in turns_of(workload)]
    ring = rows * (2 + count // len(rows))
    starts = [i for i in range(len(rows)) if ring[i : i + count] == drawn]
    assert starts
    # All gaps are the recorded ones times one factor.
    turn_s = recorded.period_s
    times = [time + i * turn_s for i in range(2 + count // len(rows)) for time in recorded.times]
    recorded_gaps = np.diff(times[starts[0] : starts[0] + count])
    gaps = np.diff([one.arrival_s for one in workload])
    assert gaps == pytest.approx(recorded_gaps * gaps.sum() / recorded_gaps.sum(), abs=1e-6)


def test_other_arrivals_may_replace_the_recorded_ones() -> None:
    even = find_scenario("coding").with_arrivals(1.0)
    # 559 requests in 30 parts: the dispersion of Poisson's is 1.
    assert dispersion(even.draw(1.0, seed=0), 559 / 30) < 2
    bursty = find_scenario("reasoning").with_arrivals(0.05)
    assert dispersion(bursty.draw(1.0, seed=0), 33.0) > 5
    with pytest.raises(WorkloadError, match="burstiness"):
        even.with_arrivals(0.0)


def test_a_mix_holds_a_third_of_each() -> None:
    turns = turns_of(find_scenario("mixed").draw(5.0, seed=0, num_requests=301))
    counts = Counter(turn.slo.name for turn in turns)
    assert counts == {"chatbot": 101, "coding": 100, "summarization": 100}
    assert num_turns(find_scenario("mixed").draw(5.0, seed=0, num_requests=1)) == 1


def test_classes_are_the_presets() -> None:
    presets = {**preset_classes(), **recordings.DEADLINES}
    for scenario in SCENARIOS.values():
        assert scenario.classes == {name: presets[name] for name in scenario.classes}
    used = {name for one in SCENARIOS.values() for name in one.classes}
    assert used == set(presets) - {"interactive", "batch"}


def test_each_call_of_a_chain_goes_on_where_the_last_one_ended() -> None:
    workload = find_scenario("tools").draw(2.0, seed=0)
    for conversation in workload:
        first, *later = conversation.turns
        assert (first.shared_tokens, first.delay_s) == (0, 0.0)
        for before, turn in pairwise(conversation.turns):
            assert turn.shared_tokens == before.prompt_tokens + before.output_tokens
            assert turn.prompt_tokens > turn.shared_tokens
        assert all(turn.delay_s > 0 for turn in later)
        names = [turn.slo.name for turn in conversation.turns]
        assert names == ["tool_loop"] * len(later) + ["tool_final"]
    delays = [turn.delay_s for turn in turns_of(workload) if turn.shared_tokens]
    assert statistics.fmean(delays) == pytest.approx(1.0, rel=0.15)
    assert {len(conversation.turns) for conversation in workload} == {2, 3, 4, 5, 6}


def test_the_time_of_tools_can_be_set() -> None:
    def mean_delay(tool_time: float) -> float:
        scenario = find_scenario("tools").scaled(tool_time=tool_time)
        return statistics.fmean(t.delay_s for t in turns_of(scenario.draw(1.0, seed=0)))

    assert mean_delay(0.0) == 0.0
    assert mean_delay(4.0) == pytest.approx(2 * mean_delay(2.0))


def test_thinking_is_part_of_the_output() -> None:
    turns = turns_of(find_scenario("reasoning").draw(1.0, seed=0))
    assert statistics.fmean(turn.thinking_tokens for turn in turns) == pytest.approx(4693, rel=0.01)
    answers = [turn.output_tokens - turn.thinking_tokens for turn in turns]
    assert min(answers) >= 1
    assert statistics.fmean(answers) == pytest.approx(803, rel=0.01)
    assert turns[0].slo.stages[0].until == "</think>"


@pytest.mark.parametrize("name", SCENARIOS)
def test_scaled_lengths_are_a_share_of_the_others_and_no_other_requests(name: str) -> None:
    scenario = find_scenario(name)
    whole = scenario.draw(1.0, seed=0, num_requests=200)
    small = scenario.scaled(0.1).draw(1.0, seed=0, num_requests=200)
    assert [one.arrival_s for one in small] == [one.arrival_s for one in whole]
    for large_turn, turn in zip(turns_of(whole), turns_of(small), strict=True):
        new = large_turn.prompt_tokens - large_turn.shared_tokens
        assert turn.prompt_tokens - turn.shared_tokens == max(1, round(0.1 * new))
        assert turn.output_tokens == pytest.approx(0.1 * large_turn.output_tokens, abs=1.01)
    least = turns_of(scenario.scaled(1e-6).draw(1.0, seed=0, num_requests=20))
    assert all(1 <= turn.output_tokens <= 2 for turn in least)
    assert all(turn.prompt_tokens > turn.shared_tokens for turn in least)


def test_paces_become_slowdowns() -> None:
    def paces(name: str, **slowdowns: float) -> dict[str, list[tuple[float | None, float | None]]]:
        classes = find_scenario(name).scaled(**slowdowns).classes
        return {
            one: [(stage.tpot, stage.tpot_slowdown) for stage in slo.decode_stages]
            for one, slo in classes.items()
        }

    assert paces("tools", tight=1.5, loose=3.0) == {
        "tool_loop": [(None, 1.5)],
        "tool_final": [(None, 3.0)],
    }
    assert paces("reasoning", tight=1.5, loose=3.0) == {"reasoning": [(None, 1.5), (None, 3.0)]}
    assert paces("mixed", loose=3.0) == {
        "chatbot": [(None, 3.0)],
        "coding": [(0.05, None)],
        "summarization": [(None, 3.0)],
    }
    scenario = find_scenario("coding").scaled(tight=2.0)
    turn = turns_of(scenario.draw(1.0, seed=0, num_requests=1))[0]
    assert turn.slo == scenario.classes["coding"]


def test_what_cannot_be_drawn_is_refused() -> None:
    chatbot = find_scenario("chatbot")
    with pytest.raises(WorkloadError, match=r"no scenario 'chat'; there are chatbot, coding"):
        find_scenario("chat")
    for rate in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(WorkloadError, match="rate"):
            chatbot.draw(rate, seed=0)
    with pytest.raises(WorkloadError, match="not both"):
        chatbot.draw(1.0, seed=0, num_requests=1, seconds=1.0)
    with pytest.raises(WorkloadError, match="at least 1"):
        chatbot.draw(1.0, seed=0, num_requests=0)
    with pytest.raises(WorkloadError, match="seconds"):
        chatbot.draw(1.0, seed=0, seconds=0.0)
    with pytest.raises(WorkloadError, match="lengths"):
        chatbot.scaled(0.0)
    with pytest.raises(WorkloadError, match="tight pace"):
        chatbot.scaled(tight=0.5)
    with pytest.raises(WorkloadError, match="tools"):
        chatbot.scaled(tool_time=-1.0)


def test_texts_come_with_the_draw_where_wanted() -> None:
    scenario = find_scenario("mixed")
    assert turns_of(scenario.draw(1.0, seed=0, num_requests=3))[0].text is None
    assert all(turn.text for turn in turns_of(scenario.draw(1.0, seed=0, seconds=9, texts=True)))


# --- deadlines of whole answers ---


def test_deadlines_are_the_same_requests_whatever_the_server_is_told() -> None:
    told, fixed = (find_scenario(name) for name in ("deadlines", "deadlines_fixed"))
    plain, paced = (
        one.draw(4.0, seed=3, num_requests=200) for one in (told, fixed)
    )  # fmt: skip
    assert plain == told.draw(4.0, seed=3, num_requests=200)
    assert plain != told.draw(4.0, seed=4, num_requests=200)
    assert plain == [
        Conversation(one.arrival_s, tuple(replace(turn, asked=None) for turn in one.turns))
        for one in paced
    ]
    turns = turns_of(plain)
    assert Counter(turn.slo.finish for turn in turns).keys() == {None, 5.0, 15.0, 60.0}
    assert sum(turn.slo.finish is None for turn in turns) == 100
    assert all(turn.asked is None for turn in turns)
    usual: dict[str, list[int]] = {}
    for chain in recordings.deadlines().chains:
        usual.setdefault(chain[0].slo.name, []).append(chain[0].output_tokens)
    for turn in turns_of(paced):
        if turn.slo.finish is None:
            assert turn.asked is None
            continue
        asked = turn.asked_slo
        assert (asked.finish, asked.name) == (None, turn.slo.name)
        assert asked.ttft is not None
        assert asked.tpot is not None
        # Nine of ten outputs of the class end in time at that pace.
        ends = [asked.ttft + tokens * asked.tpot for tokens in usual[asked.name]]
        in_time = sum(end <= turn.slo.finish + 1e-9 for end in ends) / len(ends)
        assert 0.9 <= in_time < 0.92
        assert 0 < asked.ttft < turn.slo.finish
