"""How long iterations are said to take where two of them are on the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from late_device import LateDevice
from late_play import BLOCK, Play, lasting_seed

from minserve.engine.journal import Journal
from minserve.planner.predict.perf_model import BatchShape


class TimedDevice(LateDevice):
    """Each batch takes a second, behind the one before it."""

    def __init__(self, clock: Any) -> None:
        super().__init__(BLOCK)
        self.clock, self.free_at = clock, 0.0
        self.ends: list[float] = []

    def _launch(self, batch: Any, before: Any) -> Any:
        launched = super()._launch(batch, before)
        self.free_at = ends_at = max(self.free_at, self.clock.now) + 1.0
        self.ends.append(ends_at)
        results = launched.results

        def late_results() -> Any:
            self.clock.now = max(self.clock.now, ends_at)
            return results()

        launched.results = late_results
        return launched


def test_iterations_are_timed_from_the_end_of_one_to_the_end_of_the_next() -> None:
    play = Play()
    clock = play.core.clock
    play.device = play.core.runner = TimedDevice(clock)
    journal = Journal.of(play.core)
    observed: list[tuple[BatchShape, float]] = []
    play.core.planner.model.observe = lambda shape, seconds: observed.append((shape, seconds))
    seed = str(lasting_seed(8))
    play.add(seed, [1], max_tokens=8)
    while play.core.has_work:
        play.step()
        clock.now += 0.4  # the host is busy with something else, which the device need not wait for
    play.check_tokens()
    assert [seconds for _, seconds in observed] == pytest.approx([1.0] * 8, abs=0.01)
    assert all(shape.tokens == 1 for shape, _ in observed)
    stats = play.core.stats
    assert stats.iteration_s.total == pytest.approx(8.0, abs=0.1)
    assert sum(stats.iteration_s.counts) == 8
    iterations = journal.since(None).iterations
    ends = [one.began_s + one.seconds for one in iterations]
    assert ends == pytest.approx(play.device.ends, abs=0.01)
    begins = [one.began_s for one in iterations]
    assert begins[1:] == pytest.approx(ends[:-1], abs=0.01)
    assert [one.num_seqs for one in iterations] == [1] * 8
    assert [one.tokens.best_effort_prefill for one in iterations] == [1] + [0] * 7
    assert [one.tokens.best_effort_decode for one in iterations] == [0] + [1] * 7


@pytest.mark.parametrize("pause_s", [5.0, 0.9])
def test_time_in_which_nobody_looked_is_not_the_devices(pause_s: float) -> None:
    play = Play()
    clock = play.core.clock
    play.device = play.core.runner = TimedDevice(clock)
    observed: list[float] = []
    play.core.planner.model.observe = lambda _, seconds: observed.append(seconds)
    play.core.planner.model.drift = 80.0  # known to be a slow device: about a second
    play.add(str(lasting_seed(8)), [1], max_tokens=8)
    while play.core.has_work:
        play.step()
        clock.now += pause_s  # whoever reads the stream does something else
    play.check_tokens()
    assert len(observed) == 8
    assert observed == pytest.approx([1.0] * 8, abs=0.05)
    assert play.core.stats.iteration_s.total == pytest.approx(8.0, abs=0.4)


def test_what_is_left_of_a_plan_made_ahead_is_reckoned_for_the_state_to_come() -> None:
    play = Play(max_num_seqs=1)
    planner, observed = play.core.planner, []
    planner.model.observe = lambda shape, _: observed.append(shape)
    plan = planner.plan
    planner.plan = lambda view, now: replace(plan(view, now), declined=("1",))
    play.add(str(lasting_seed(2)), [1, 1, 1], max_tokens=2)
    play.add("1", [1], max_tokens=2)
    other = play.core.waiting[1].request.request_id
    asked: list[str] = []

    def takes(request_id: str) -> bool:
        """A request that goes elsewhere while the first batch runs."""
        asked.append(request_id)
        return len(asked) == 2

    play.core.begin(takes)
    play.take(play.core.end())
    assert asked == [other, other]
    del play.told[other, 0]
    planner.plan = plan
    play.run()
    assert observed == [BatchShape.of([(0, 3)], eager=1), BatchShape.of([(3, 1)])]
