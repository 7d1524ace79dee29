"""`Outlook`: the time and memory that the sequences which already run will take from now on.

It is piecewise constant over time: it says how many sequences of each TPOT tier need their token in
every TPOT, and how many KV blocks are free. Tiers shrink and blocks are freed where outputs are
predicted to end; a sequence ahead of its schedule needs nothing until it is due again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_SEGMENTS = 8
MAX_TIERS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """The sequences of one TPOT.

    Attributes:
        tpot_s: seconds per token.
        context_tokens: mean number of context tokens of such a sequence, for the cost of its
            attention.
    """

    tpot_s: float
    context_tokens: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """J segments of time from now on; the last one never ends.

    Attributes:
        starts: ``[J]`` float64, seconds at which each segment begins; ``starts[0]`` is now.
        counts: ``[J, L]`` int64, number of decoding sequences of each of the L tiers.
        free_blocks: ``[J]`` int64, number of blocks that admitted sequences do not need.
        free_seqs: number of sequences that may run beside those that run already.
    """

    starts: NDArray[np.float64]
    counts: NDArray[np.int64]
    free_blocks: NDArray[np.int64]
    free_seqs: int

    @property
    def free_from(self) -> list[int]:
        """Number of blocks that are free for good from the start of each segment on."""
        return np.minimum.accumulate(self.free_blocks[::-1])[::-1].tolist()


class Demand(NamedTuple):
    """A sequence of one tier needs its tokens from ``start_s`` to ``end_s``."""

    tier: int
    start_s: float
    end_s: float


class Holding(NamedTuple):
    """A sequence holds blocks, and ever more of them, until ``end_s`` (inf: for good).

    Attributes:
        blocks_now: number of blocks that it holds now.
        blocks_end: number of blocks that it will hold at its end; in between it grows evenly.
        end_s: time in seconds at which it releases them.
    """

    blocks_now: int
    blocks_end: int
    end_s: float


def group_tiers(
    paces: Iterable[tuple[float, int]], max_tiers: int = MAX_TIERS
) -> tuple[list[Tier], dict[float, int]]:
    """Sort TPOTs into few tiers; a TPOT between two joins the tighter one.

    The tiers are those that add least to what is demanded, in tokens per second.

    Args:
        paces: ``(tpot_s, context tokens)`` of each sequence; infinite TPOTs have no tier.

    Returns:
        the tiers, tightest first, and each TPOT's index among them.
    """
    contexts: dict[float, list[int]] = {}
    for tpot, context in paces:
        if math.isfinite(tpot):
            contexts.setdefault(tpot, []).append(context)
    distinct = sorted(contexts)
    cuts = _cheapest_cuts([(tpot, len(contexts[tpot])) for tpot in distinct], max_tiers)
    tiers: list[Tier] = []
    index: dict[float, int] = {}
    members: list[int] = []
    for i, tpot in enumerate(distinct):
        if i == 0 or i in cuts:
            members = []
            tiers.append(Tier(tpot_s=tpot))
        members += contexts[tpot]
        tiers[-1] = Tier(tpot_s=tiers[-1].tpot_s, context_tokens=sum(members) / len(members))
        index[tpot] = len(tiers) - 1
    return tiers, index


def _cheapest_cuts(paces: SequenceOf[tuple[float, int]], max_tiers: int) -> set[int]:
    """Return where tiers begin, beside the first, so that least is demanded.

    Args:
        paces: TPOTs, ascending, and the number of sequences of each.
    """
    num = len(paces)
    if num <= max_tiers:
        return set(range(1, num))
    rates = [1.0 / tpot for tpot, _ in paces]
    behind = list(accumulate(count for _, count in reversed(paces)))[::-1]
    # For each i: what is saved against one tier for all if the last tier begins at i, and the cuts
    # by which most is saved.
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    best += [(-math.inf, ())] * (num - 1)
    for _ in range(max_tiers - 1):
        best = [
            max(
                (
                    (saved + behind[i] * (rates[j] - rates[i]), (*cuts, i))
                    for j, (saved, cuts) in enumerate(best[:i])
                ),
                default=(-math.inf, ()),
            )
            for i in range(num)
        ]
    return set(max(best)[1])


def build_outlook(
    now: float,
    horizon_s: float,
    demands: SequenceOf[Demand],
    holdings: SequenceOf[Holding],
    *,
    num_tiers: int,
    num_blocks: int,
    free_seqs: int,
) -> Outlook:
    """Lay demands and holdings on a time axis of at most `MAX_SEGMENTS` segments, and one more.

    Times are rounded to the cautious side. A demand that begins within a segment counts from its
    start, one that ends within a segment counts to its end, and one that ends after the horizon
    counts for good. Demands that begin after the horizon count in one more segment, which begins
    there.

    Args:
        now: time in seconds at which the outlook begins.
        horizon_s: time at which the last promise that is to be decided falls due.
        num_tiers: number of tiers.
        num_blocks: number of blocks of the pool.
        free_seqs: number of sequences that may run beside those that run already.
    """
    begin = np.array([d.start_s for d in demands], dtype=np.float64)
    end = np.array([d.end_s for d in demands], dtype=np.float64)
    release = np.array([h.end_s for h in holdings], dtype=np.float64)
    tier = np.array([d.tier for d in demands], dtype=np.int64)
    starts = _segments(now, horizon_s, np.concatenate([begin, end, release]))
    if now < horizon_s < begin.max(initial=now):
        # What begins after the horizon takes no time from what must be done before it.
        starts = np.append(starts, horizon_s)
    num = len(starts)
    counts = np.zeros((num + 1, num_tiers), dtype=np.int64)
    np.add.at(counts, (np.maximum(np.searchsorted(starts, begin, side="right") - 1, 0), tier), 1)
    np.add.at(counts, (np.searchsorted(starts, end), tier), -1)
    return Outlook(
        starts=starts,
        counts=counts.cumsum(axis=0)[:num],
        free_blocks=num_blocks - _most_held_from(starts, holdings),
        free_seqs=free_seqs,
    )


def _most_held_from(
    starts: NDArray[np.float64], holdings: SequenceOf[Holding]
) -> NDArray[np.int64]:
    """Return the most blocks that will be held at any time from each start on.

    Holdings grow until they end, so that most is held right before an end, or at the start. Outputs
    that end in turn never hold all their blocks at once: the "past-future" estimate of LightLLM
    (Gong et al., ASPLOS 2025).
    """
    now = starts[0]
    first = np.array([h.blocks_now for h in holdings], dtype=np.float64)
    last = np.array([h.blocks_end for h in holdings], dtype=np.float64)
    end = np.array([h.end_s for h in holdings], dtype=np.float64)
    for_good = np.isinf(end)
    times = np.unique(np.concatenate([starts, end[~for_good & (end > now)]]))
    passed = (times - now)[:, None] / np.where(for_good, 1.0, np.maximum(end - now, 1e-9))
    sizes = first + (last - first) * np.minimum(np.where(for_good, 1.0, passed), 1.0)
    before = np.where(times[:, None] <= end, sizes, 0.0).sum(axis=1)
    after = np.where(times[:, None] < end, sizes, 0.0).sum(axis=1)
    later = np.append(np.maximum.accumulate(before[:0:-1])[::-1], 0.0)
    at = np.searchsorted(times, starts)
    return np.ceil(np.maximum(after[at], later[at])).astype(np.int64)


def _segments(now: float, horizon_s: float, edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return now and the later edges before the horizon, thinned out evenly to `MAX_SEGMENTS`."""
    inner = np.unique(edges[(edges > now) & (edges < horizon_s)])
    if len(inner) > MAX_SEGMENTS - 1:
        picked = np.linspace(0, len(inner) - 1, MAX_SEGMENTS - 1).round().astype(np.int64)
        inner = inner[picked]
    return np.concatenate([[now], inner])
