"""`profile_core` measures batches on an idle core and fits the device's performance model.

Measurements add up: a `Survey` continues from the runs of a kept profile, whether in one go
(here) or a batch now and then (`minserve.engine.profile.refinement`).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from datetime import UTC, datetime

import numpy as np
import torch
from tqdm import tqdm

from minserve.engine.core import EngineCore
from minserve.engine.profile.profile_cache import Prediction, Profile, profile_key
from minserve.engine.profile.profile_design import DRAFT_CONTEXT, CoreLimits, ProfileBatch, design
from minserve.engine.profile.workbench import Workbench
from minserve.engine.speculation.draft_model_proposer import DraftModelProposer
from minserve.errors import ProfileError
from minserve.planner.predict.perf_fit import (
    SAMPLES_PER_PIECE,
    ProfileSample,
    agree,
    evaluate,
    fit,
    undisturbed,
)
from minserve.planner.predict.perf_model import (
    MARGIN_QUANTILE,
    BatchShape,
    PerfModel,
    residual_quantile,
)
from minserve.progress_bar import progress_bar

NUM_BATCHES = 96
# These are measured however long they take: fewer cannot be fitted and checked.
LEAST_BATCHES = 10
REPEATS = 3
# Where repeats disagree, more of them are made, up to this many.
MOST_REPEATS = 6
# So many new batches are measured between two rounds of repeats.
BLOCK = 10
# The last share of the time has repeats alone.
RESERVE = 0.3
# A batch that should take more than this share of the time is left out.
BATCH_SHARE = 0.04
HELD_OUT_SHARE = 0.25
# A quarter of fewer samples than that says little of what a fit misses.
FEW = 2 * SAMPLES_PER_PIECE
# Sizes at which the draft model is measured. The last has more sequences than catch up in one CUDA
# graph (`minserve.engine.device.mixed_graphs`).
DRAFT_SEQS = (1, 4, 16, 32)
DRAFT_STEPS = (1, 4)

Times = dict[BatchShape, list[float]]


def profile_core(
    core: EngineCore,
    model_name: str,
    *,
    seconds: float = 50.0,
    progress: bool = False,
    seed: int = 0,
    kept: Profile | None = None,
) -> Profile:
    """Measure batches on an idle core and fit its performance model.

    It ends early where everything is measured well enough. Blocks of cached prefixes may be
    evicted; nothing else of the core changes.

    Args:
        model_name: the name for the profile's key.
        seconds: the time to measure for; two are enough for a rough profile of a small model.
        progress: show a bar on stderr.
        seed: decides the choice of batches.
        kept: the profile to continue from.

    Raises:
        ProfileError: where the core is at work, or can run too few different batches.
    """
    if core.has_work:
        raise ProfileError("only an idle engine can be profiled; wait until its requests ended")
    survey = Survey(core, model_name, seed=seed, kept=kept)
    with progress_bar(
        total=seconds,
        desc="Profiling",
        bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} s",
        disable=not progress,
    ) as bar:
        _measure(survey, seconds, random.Random(seed), bar)
    core.check_integrity()
    allowed_s = seconds if kept is None else max(seconds, kept.allowed_s)
    return survey.profile(allowed_s)


class Survey:
    """The batches of a core's design, and how long they took.

    Args:
        seed: decides the choice of batches.
        kept: an older profile; its runs count as if they had been measured here.

    Attributes:
        batches: the batches of the design, the simplest first.
        times: the seconds of every run, by shape, shapes measured by other settings included.
    """

    def __init__(
        self, core: EngineCore, model_name: str, *, seed: int = 0, kept: Profile | None = None
    ) -> None:
        limits = CoreLimits.of(core)
        self.batches = design(limits, NUM_BATCHES, seed)
        self._mixed = limits.mixed
        self.times: Times = {}
        self.bench = Workbench(core, seed)
        self._key = profile_key(core, model_name)
        self._seed, self._seconds = seed, 0.0
        if kept is not None:
            self.take(kept)

    def take(self, kept: Profile) -> None:
        """Continue from this profile alone."""
        self.times, self._seconds = {}, 0.0
        self.add(kept.runs, kept.seconds)

    def add(self, runs: Mapping[BatchShape, SequenceOf[float]], seconds: float) -> None:
        """Add runs that were measured elsewhere.

        Args:
            seconds: the time that measuring them took.
        """
        for shape, more in runs.items():
            self.times.setdefault(shape, []).extend(more)
        self._seconds += seconds

    def measure(self, batch: ProfileBatch) -> float:
        """Run a batch once more and return its seconds."""
        started = time.perf_counter()
        found = self.bench.time(batch)
        self.add({batch.shape: [found]}, time.perf_counter() - started)
        return found

    @property
    def num_steady(self) -> int:
        """The number of shapes of which two repeats took about as long."""
        return sum(map(agree, self.times.values()))

    def runs(self, batch: ProfileBatch) -> list[float]:
        """Return the seconds of the batch's runs so far."""
        return self.times.get(batch.shape, [])

    def wants(self, batch: ProfileBatch, least: int) -> bool:
        """Return whether a batch has fewer runs than that, or runs that disagree."""
        runs = self.runs(batch)
        return len(runs) < least or (not agree(runs) and len(runs) < MOST_REPEATS)

    def guess(self, batch: ProfileBatch) -> float:
        """Return the seconds of a batch as guessed from those measured so far."""
        return fit(self._samples(), max_pieces=1).profiled(batch.shape)

    def profile(
        self,
        allowed_s: float,
        poll: Callable[[], None] = lambda: None,
        *,
        only_steady: bool = False,
    ) -> Profile:
        """Return a profile fitted to the runs so far. It takes up to a second or two.

        Args:
            allowed_s: the time that measuring was allowed to take.
            poll: called every few milliseconds; an error that it raises ends the fit.
            only_steady: leave out shapes without two repeats of about the same time.

        Raises:
            ProfileError: where the runs are too few.
        """
        samples = self._samples(only_steady)
        unseen, seen = _split(samples, random.Random(self._seed))
        judged, model = fit(seen, poll=poll), fit(samples, poll=poll)
        held_out = tuple(Prediction(s.shape, s.seconds, judged.profiled(s.shape)) for s in unseen)
        # Single iterations scatter more than the samples do; and a fit to few samples, or to
        # disturbed ones, is further off where it was not fitted.
        ratios = [t / model.profiled(s.shape) for s in samples for t in self.times[s.shape]]
        missed = [one.measured_s / one.predicted_s for one in held_out]
        if len(samples) < FEW:
            missed = _missed(samples)
        margin = max(1.0, *(residual_quantile(each, MARGIN_QUANTILE) for each in (ratios, missed)))
        return Profile(
            key=self._key,
            torch=torch.__version__,
            model=PerfModel(model.pieces, margin=margin, mixed=self._mixed),
            quality=evaluate(judged, unseen),
            held_out=held_out,
            runs={shape: tuple(runs) for shape, runs in self.times.items()},
            measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=self._seconds,
            allowed_s=allowed_s,
        )

    def _samples(self, only_steady: bool = False) -> list[ProfileSample]:
        return [
            ProfileSample(shape, undisturbed(runs))
            for shape, runs in self.times.items()
            if agree(runs) or not only_steady
        ]


def _missed(samples: list[ProfileSample]) -> list[float]:
    """Return, for each sample, measured over predicted seconds by a fit to all others."""
    others = [[*samples[:i], *samples[i + 1 :]] for i in range(len(samples))]
    return [
        one.seconds / fit(rest, max_pieces=1).profiled(one.shape)
        for one, rest in zip(samples, others, strict=True)
    ]


def _split(
    samples: list[ProfileSample], rng: random.Random
) -> tuple[list[ProfileSample], list[ProfileSample]]:
    """Return a random quarter, and the others."""
    shuffled = rng.sample(samples, len(samples))
    num_unseen = round(HELD_OUT_SHARE * len(samples))
    return shuffled[:num_unseen], shuffled[num_unseen:]


def _measure(survey: Survey, seconds: float, rng: random.Random, bar: tqdm) -> None:
    """Measure as many batches as there is time for.

    New batches take turns with repeats of old ones, so that a disturbance of some seconds
    hits many batches once and none always. Slow drift of the machine needs no more than that.
    """
    started = time.perf_counter()

    def left() -> float:
        return seconds - (time.perf_counter() - started)

    def measure(batch: ProfileBatch) -> None:
        survey.measure(batch)
        bar.update(seconds - max(0.0, left()) - bar.n)

    def repeat(least: int) -> None:
        again = [b for b in survey.batches if survey.runs(b) and survey.wants(b, least)]
        rng.shuffle(again)
        for batch in sorted(again, key=lambda b: agree(survey.runs(b))):
            if min(survey.runs(batch)) < left():
                measure(batch)

    survey.bench.time(survey.batches[0])  # the first batch of a process is slow
    for first in range(0, len(survey.batches), BLOCK):
        for batch in survey.batches[first : first + BLOCK]:
            if not survey.runs(batch) and (
                len(survey.times) < LEAST_BATCHES
                or (left() > RESERVE * seconds and survey.guess(batch) <= BATCH_SHARE * seconds)
            ):
                measure(batch)
        if left() <= RESERVE * seconds:
            break
        repeat(least=2)
    for _ in range(MOST_REPEATS):
        repeat(REPEATS)


def measure_drafting(core: EngineCore) -> tuple[float, float, float]:
    """Return the seconds of each forward pass of the draft model, of each token in it, and of what
    is no CUDA graph where others are.

    All are 0 where no draft model is used. It takes a second or so for a small model.

    Raises:
        ProfileError: where the core is at work.
    """
    proposer = core.proposer
    if not isinstance(proposer, DraftModelProposer):
        return 0.0, 0.0, 0.0
    if core.has_work:
        raise ProfileError("only an idle engine can be profiled; wait until its requests ended")
    bench, rows, times = Workbench(core, seed=0), [], []
    for num_seqs in DRAFT_SEQS:
        if not CoreLimits.of(core).allow(ProfileBatch(decodes=(DRAFT_CONTEXT,) * num_seqs)):
            continue
        for num_steps in DRAFT_STEPS:
            runs = bench.time_drafts(num_seqs, min(num_steps, proposer.max_tokens))
            for row, seconds in runs.items():
                rows.append(row)
                times.append(undisturbed(seconds))
    step_s, token_s, eager_s = draft_costs(rows, times)
    return step_s, token_s, eager_s


def draft_costs(
    rows: SequenceOf[tuple[int, int, int]], seconds: SequenceOf[float]
) -> tuple[float, float, float]:
    """Return the seconds of each forward pass of a draft model, of each token and of eager passes.

    Args:
        rows: of each measured draft: its passes, the tokens that they ran, and how many were eager.
    """
    # Every row is divided by its time, so that residuals are relative.
    weighted = np.array(rows, dtype=np.float64) / np.array(seconds)[:, None]
    costs, *_ = np.linalg.lstsq(weighted, np.ones(len(rows)), rcond=None)
    step_s, token_s, eager_s = (max(0.0, float(cost)) for cost in costs)
    return step_s, token_s, eager_s
