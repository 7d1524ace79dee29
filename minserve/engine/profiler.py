"""`profile_core`: measures batches on an idle core and fits the device's performance model.

Sequences are synthetic, but their blocks are the pool's and the KV that they read was
written, so that memory costs what it does in service.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import count

import numpy as np
import torch
from tqdm import tqdm

from minserve.engine.core import EngineCore
from minserve.engine.draft_model import DraftModelProposer
from minserve.engine.profile_cache import Prediction, Profile, profile_key
from minserve.engine.profile_design import Batch, Limits, design
from minserve.engine.runner import Scheduled
from minserve.engine.speculator import Wanted
from minserve.errors import ProfileError
from minserve.planner.perf_fit import Sample, evaluate, fit
from minserve.planner.perf_model import MARGIN_QUANTILE, PerfModel, residual_quantile
from minserve.request import Request, Sequence
from minserve.sampling_params import SamplingParams

NUM_BATCHES = 96
# These are measured however long they take: fewer cannot be fitted and checked.
LEAST_BATCHES = 10
REPEATS = 3
# Where repeats disagree, more of them are made, up to this many.
MOST_REPEATS = 6
# Repeats this much slower than the fastest count as undisturbed.
AGREEMENT = 1.15
# So many new batches are measured between two rounds of repeats.
BLOCK = 10
# The last share of the time has repeats alone.
RESERVE = 0.3
# A batch that should take more than this share of the time is left out.
BATCH_SHARE = 0.04
HELD_OUT_SHARE = 0.25
# Sizes at which the draft model is measured.
DRAFT_SEQS = (1, 4, 16)
DRAFT_STEPS = (1, 4)
DRAFT_CONTEXT = 48

Times = dict[Batch, list[float]]


def profile_core(
    core: EngineCore,
    model_name: str,
    *,
    seconds: float = 50.0,
    progress: bool = False,
    seed: int = 0,
) -> Profile:
    """Measure batches on an idle core and fit its performance model.

    Ends early where everything is measured well enough. Blocks of cached prefixes may be
    evicted; nothing else of the core changes.

    Args:
        model_name: for the profile's key.
        seconds: to measure for; two are enough for a rough model of a small one.
        progress: show a bar on stderr.
        seed: of the choice of batches.

    Raises:
        ProfileError: where the core is at work, or can run too few different batches.
    """
    if core.has_work:
        raise ProfileError("only an idle engine can be profiled; wait until its requests ended")
    started = time.perf_counter()
    batches = design(Limits.of(core), NUM_BATCHES, seed)
    with tqdm(
        total=seconds,
        desc="Profiling",
        bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} s",
        disable=not progress,
    ) as bar:
        times = _measure(Workbench(core, seed), batches, seconds, random.Random(seed), bar)
    core.check_integrity()
    samples = [Sample(batch.shape, undisturbed(runs)) for batch, runs in times.items()]
    unseen, seen = _split(samples, random.Random(seed))
    judged, model = fit(seen), fit(samples)
    # Single iterations scatter more than the samples do.
    ratios = [t / model.profiled(batch.shape) for batch, runs in times.items() for t in runs]
    margin = max(1.0, residual_quantile(ratios, MARGIN_QUANTILE))
    return Profile(
        key=profile_key(core, model_name),
        torch=torch.__version__,
        model=PerfModel(model.pieces, margin=margin),
        quality=evaluate(judged, unseen),
        held_out=tuple(Prediction(s.shape, s.seconds, judged.profiled(s.shape)) for s in unseen),
        samples=tuple(samples),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=time.perf_counter() - started,
        allowed_s=seconds,
    )


def undisturbed(runs: SequenceOf[float]) -> float:
    """The mean of those repeats that are about as fast as the fastest.

    Whatever else the machine does only ever adds time, and often to most of a few repeats
    of a batch, so that their median would hold it.
    """
    fastest = min(runs)
    return statistics.mean(run for run in runs if run <= AGREEMENT * fastest)


def _split(samples: list[Sample], rng: random.Random) -> tuple[list[Sample], list[Sample]]:
    """A random quarter, and the others."""
    shuffled = rng.sample(samples, len(samples))
    num_unseen = round(HELD_OUT_SHARE * len(samples))
    return shuffled[:num_unseen], shuffled[num_unseen:]


def _measure(
    bench: Workbench, batches: SequenceOf[Batch], seconds: float, rng: random.Random, bar: tqdm
) -> Times:
    """Seconds of every repeat of the batches that there was time for.

    New batches take turns with repeats of old ones, so that a disturbance of some seconds
    hits many batches once and none always. Slow drift of the machine needs no more than that.
    """
    started = time.perf_counter()
    times: Times = {}

    def left() -> float:
        return seconds - (time.perf_counter() - started)

    def measure(batch: Batch) -> None:
        times.setdefault(batch, []).append(bench.time(batch))
        bar.update(seconds - max(0.0, left()) - bar.n)

    def repeat(least: int) -> None:
        again = [
            batch
            for batch, runs in times.items()
            if len(runs) < least or (not _agree(runs) and len(runs) < MOST_REPEATS)
        ]
        rng.shuffle(again)
        for batch in sorted(again, key=lambda b: _agree(times[b])):
            if min(times[batch]) < left():
                measure(batch)

    bench.time(batches[0])  # the first batch of a process is slow
    for first in range(0, len(batches), BLOCK):
        for batch in batches[first : first + BLOCK]:
            if len(times) < LEAST_BATCHES or (
                left() > RESERVE * seconds and _guess(times, batch) <= BATCH_SHARE * seconds
            ):
                measure(batch)
        if left() <= RESERVE * seconds:
            break
        repeat(least=2)
    for _ in range(MOST_REPEATS):
        repeat(REPEATS)
    return times


def _guess(times: Times, batch: Batch) -> float:
    """Seconds of a batch by those measured so far."""
    samples = [Sample(other.shape, undisturbed(runs)) for other, runs in times.items()]
    return fit(samples, max_pieces=1).profiled(batch.shape)


def _agree(runs: SequenceOf[float]) -> bool:
    """True where the two fastest repeats took about as long."""
    return len(runs) > 1 and sorted(runs)[1] <= AGREEMENT * min(runs)


def measure_drafting(core: EngineCore) -> tuple[float, float]:
    """Seconds of each forward pass of the draft model, and of each token in it.

    Both 0 where nothing is drafted, or by lookup. Takes a second or so for a small model.

    Raises:
        ProfileError: where the core is at work.
    """
    proposer = core.proposer
    if not isinstance(proposer, DraftModelProposer):
        return 0.0, 0.0
    if core.has_work:
        raise ProfileError("only an idle engine can be profiled; wait until its requests ended")
    bench, rows, times = Workbench(core, seed=0), [], []
    for num_seqs in DRAFT_SEQS:
        if not Limits.of(core).allow(Batch(decodes=(DRAFT_CONTEXT,) * num_seqs)):
            continue
        for num_steps in DRAFT_STEPS:
            runs = bench.time_drafts(num_seqs, min(num_steps, proposer.max_tokens))
            for (steps, tokens), seconds in runs.items():
                rows.append((steps, tokens))
                times.append(undisturbed(seconds))
    # Every row is divided by its time, so that residuals are relative.
    weighted = np.array(rows, dtype=np.float64) / np.array(times)[:, None]
    (step_s, token_s), *_ = np.linalg.lstsq(weighted, np.ones(len(rows)), rcond=None)
    return max(0.0, float(step_s)), max(0.0, float(token_s))


class Workbench:
    """Runs batches of synthetic sequences on a core and leaves nothing behind.

    Args:
        params: of the sequences. The default draws from the whole vocabulary.
    """

    def __init__(self, core: EngineCore, seed: int, params: SamplingParams | None = None) -> None:
        self._core = core
        self._params = params or SamplingParams()
        self._rng = random.Random(seed)
        self._vocab = range(core.runner.model.shape.vocab_size)
        self._ids = count()
        self._written: set[int] = set()

    def time(self, batch: Batch) -> float:
        """Seconds that the runner takes for the batch."""
        with self._scheduled(batch) as scheduled:
            self._write_kv(scheduled)
            self._synchronize()
            started = time.perf_counter()
            self._core.runner.run(scheduled)
            self._synchronize()
            return time.perf_counter() - started

    def time_drafts(self, num_seqs: int, num_steps: int) -> dict[tuple[int, int], list[float]]:
        """Seconds of drafting, by forward passes and tokens run: behind contexts whose draft KV
        is missing, and then behind the same with it.
        """
        proposer, times = self._core.proposer, {}
        for _ in range(REPEATS + 1):  # the first of a process is slow
            with self._scheduled(Batch(decodes=(DRAFT_CONTEXT,) * num_seqs)) as scheduled:
                wanted = [Wanted(item.seq, num_steps) for item in scheduled]
                for one in wanted:
                    self._core.pool.grow(one.seq, 1 + num_steps)
                for _ in range(2):
                    tokens = sum(proposer.lag(one.seq) + num_steps for one in wanted)
                    self._synchronize()
                    started = time.perf_counter()
                    proposer.propose(wanted)
                    self._synchronize()
                    seconds = time.perf_counter() - started
                    times.setdefault((num_steps, tokens), []).append(seconds)
                    for one in wanted:
                        proposer.roll_back(one.seq)
                for one in wanted:
                    proposer.forget(one.seq)
        return times

    @contextmanager
    def _scheduled(self, batch: Batch) -> Iterator[list[Scheduled]]:
        """The batch's sequences, holding blocks for as long as the context lasts.

        Nothing is committed, so that the prefix index never hears of them.
        """
        scheduled: list[Scheduled] = []
        try:
            for start in batch.decodes:
                seq = self._sequence(start, start)
                seq.token_ids.append(self._rng.choice(self._vocab))
                scheduled.append(Scheduled(seq, 1))
            for start, num_tokens in batch.chunks:
                seq = self._sequence(start + num_tokens, start)
                scheduled.append(Scheduled(seq, num_tokens))
            for item in scheduled:
                self._core.pool.grow(item.seq, item.num_tokens)
            yield scheduled
        finally:
            for item in scheduled:
                self._core.pool.release(item.seq)

    def _sequence(self, num_prompt_tokens: int, num_computed_tokens: int) -> Sequence:
        request = Request(
            request_id=f"profile-{next(self._ids)}",
            prompt_token_ids=tuple(self._rng.choices(self._vocab, k=num_prompt_tokens)),
            params=self._params,
            seed=0,
            arrival_s=0.0,
        )
        seq = Sequence(request)
        seq.num_computed_tokens = num_computed_tokens
        return seq

    def _write_kv(self, scheduled: SequenceOf[Scheduled]) -> None:
        """Fill blocks seen for the first time: memory never written reads faster."""
        blocks = {block for item in scheduled for block in item.seq.block_table} - self._written
        if not blocks:
            return
        self._written |= blocks
        for kv in self._core.runner.kv:
            for part in (kv.key, kv.value):
                part[sorted(blocks)] = torch.randn(part.shape[1:], device=part.device).to(
                    part.dtype
                )

    def _synchronize(self) -> None:
        device = self._core.runner.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
