"""`Refinement` makes a rough profile a full one while the engine has nothing to do.

It measures one batch at a time and rests in between, so that a new request waits for a part of
one batch at most, and seldom. The longer no request came, the less likely one comes just now,
so the length of a batch is limited by how long the engine has been idle. Cached prefixes are left
alone: only blocks that hold none are used.

Now and then the measurements are kept in the profile cache, together with those of other
processes for the same key; a later start continues from there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress

from minserve.engine.core import EngineCore
from minserve.engine.profile import profile_cache
from minserve.engine.profile.profile_cache import Profile
from minserve.engine.profile.profile_design import CoreLimits, ProfileBatch
from minserve.engine.profile.profiler import LEAST_BATCHES, MOST_REPEATS, REPEATS, Survey, Times
from minserve.planner.predict.perf_fit import agree

log = logging.getLogger(__name__)

# Before that the next request of a conversation or a benchmark may be on its way.
FIRST_IDLE_S = 2.0
# A batch may take this share of the time for which the engine has been idle, or a decode step.
IDLE_SHARE = 1 / 200
# No more than this, or than so many decode steps of a slow device, for which all requests wait
# anyhow: longer ones are left to `profile_core`.
LONGEST_S = 0.5
LONGEST_STEPS = 4.0
# So many times what a batch took, nothing is measured: one arrival in ten meets a batch.
REST = 9.0
# KV blocks that are written at once, which takes tens of milliseconds.
BLOCKS_AT_ONCE = 64
# Seconds for which the device is left to another process that measures for the same key.
TURN_S = 0.5
# Seconds of measuring after which the profile is fitted anew and kept.
SAVE_S = 8.0
# The highest completeness of a profile until nothing is left to do.
ALMOST = 0.99


class _WorkArrived(Exception):
    """Raised when a request wants the engine."""


class Refinement:
    """Measures in idle moments what a profile still lacks.

    Args:
        profile: the profile to refine.
        publish: called with each refined profile, in the thread that calls `step` or `save`.
    """

    def __init__(
        self,
        core: EngineCore,
        model_name: str,
        profile: Profile,
        publish: Callable[[Profile], None],
    ) -> None:
        self._core, self._publish = core, publish
        self._limits = CoreLimits.of(core)
        self._survey = Survey(core, model_name, kept=profile)
        self._profile = profile
        self._fresh: Times = {}
        self._unwritable = False
        self._fresh_s = 0.0
        # Newest run over expected time: the profile may come from a much busier hour.
        self._pace = 1.0

    @property
    def profile(self) -> Profile:
        """The profile as it was last fitted."""
        return self._profile

    @property
    def completeness(self) -> float:
        """The share of a full profile's runs that were made, 0 to 1; 1 once it is fitted to all."""
        unfinished = self._unfinished()
        if not unfinished and not self._fresh:
            return 1.0
        missing = sum(max(0, self._least - len(self._survey.runs(one))) for one in unfinished)
        share = 1.0 - missing / (self._least * len(self._batches_in_reach()))
        return min(share, ALMOST)

    def step(self, idle_s: float, is_wanted: Callable[[], bool]) -> float | None:
        """Measure at most one batch; call it on an idle core.

        Args:
            idle_s: for how long the core has been idle.
            is_wanted: tells whether a request wants the core; asked between any two runs.

        Returns:
            Seconds after which to call again, if the core is still idle; ``None`` where there is
            nothing to measure until it has worked again.
        """
        if idle_s < FIRST_IDLE_S:
            return FIRST_IDLE_S - idle_s
        num_blank = self._core.pool.num_blank_blocks
        batches = [batch for batch in self._unfinished() if self._finds_room(batch, num_blank)]
        if self._fresh_s >= SAVE_S or (self._fresh and not batches):
            self.save(is_wanted)
            return 0.0
        if not batches:
            return None
        usual_s = {batch: self._usual_s(batch) for batch in batches}
        longest_s = max(IDLE_SHARE * idle_s, self._usual_s(self._survey.batches[0]))
        allowed = [batch for batch in batches if usual_s[batch] <= longest_s]
        if not allowed:
            return min(usual_s.values()) / IDLE_SHARE - idle_s
        with profile_cache.alone_with(self._profile.key, 0.0) as alone:
            if not alone:
                return TURN_S
            started = time.perf_counter()
            self._measure(min(allowed, key=lambda one: len(self._survey.runs(one))), is_wanted)
            return REST * (time.perf_counter() - started)

    def save(self, is_wanted: Callable[[], bool] = lambda: False) -> None:
        """Fit the profile anew and keep it, if anything was measured since the last time.

        Args:
            is_wanted: tells whether a request wants the core; then it waits for another time.
        """

        def poll() -> None:
            if is_wanted():
                raise _WorkArrived

        if not self._fresh:
            return
        with suppress(_WorkArrived), profile_cache.alone_with(self._profile.key, TURN_S):
            # After a failed write, only this process's profile has the newest runs.
            kept = self._profile
            if not self._unwritable:
                kept = profile_cache.load(self._profile.key) or kept
            self._survey.take(kept)
            self._survey.add(self._fresh, self._fresh_s)
            profile = self._survey.profile(kept.allowed_s, poll)
            if profile.is_poor and self._survey.num_steady >= LEAST_BATCHES:
                # Long batches that were measured in a busy hour will not be repeated here.
                profile = self._survey.profile(kept.allowed_s, poll, only_steady=True)
            self._profile = profile
            self._fresh, self._fresh_s, self._pace = {}, 0.0, 1.0
            try:
                profile_cache.save(self._profile)
            except OSError as error:
                if not self._unwritable:
                    log.warning("the refined profile could not be kept: %s", error)
                self._unwritable = True
            self._publish(self._profile)

    @property
    def _least(self) -> int:
        """The number of runs that every batch needs: more where the machine was busy meanwhile."""
        return MOST_REPEATS if self._profile.is_poor else REPEATS

    def _batches_in_reach(self) -> list[ProfileBatch]:
        model = self._profile.model
        longest_s = max(LONGEST_S, LONGEST_STEPS * model.zero_load_decode_s(1))
        return [one for one in self._survey.batches if model.profiled(one.shape) <= longest_s]

    def _unfinished(self) -> list[ProfileBatch]:
        return [one for one in self._batches_in_reach() if self._survey.wants(one, self._least)]

    def _usual_s(self, batch: ProfileBatch) -> float:
        """Return the seconds that a batch should take now."""
        # The planner's model is corrected while it serves.
        model = self._core.planner.model or self._profile.model
        return self._pace * model.predict(batch.shape)

    def _finds_room(self, batch: ProfileBatch, num_blank: int) -> bool:
        """Return whether a batch fits into so many blank blocks, so that cached prefixes stay."""
        needed = sum(self._limits.blocks(start + num_tokens) for start, num_tokens in batch.runs)
        return needed <= num_blank

    def _measure(self, batch: ProfileBatch, is_wanted: Callable[[], bool]) -> None:
        """Run a batch twice, as batches in service follow each other.

        The first run, on a device that rested, counts only where it was no slower. Where some
        of the KV that the batch reads was never written, a part of it is written instead.
        """
        bench = self._survey.bench
        if not bench.prepare(batch, BLOCKS_AT_ONCE) or is_wanted():
            return
        first_s = bench.time(batch)
        if is_wanted():
            return
        second_s = bench.time(batch)
        runs = [first_s, second_s] if agree([first_s, second_s]) else [second_s]
        self._survey.add({batch.shape: runs}, first_s + second_s)
        self._fresh.setdefault(batch.shape, []).extend(runs)
        self._fresh_s += first_s + second_s
        self._pace *= second_s / self._usual_s(batch)
