"""PB*: how many prefill tokens per second fit beside n decoding sequences.

The rate is that of SLOs-Serve (arXiv 2504.08784, section on the prefill budget). A batch is as long
as the tightest TPOT present allows, a sequence of tier l takes one token every TPOT_l, and what is
left of the batch is prefill. With speculation a sequence takes several tokens at once and comes
round less often, so batches may be longer: of the lengths per tier, those are taken that leave
most. Where small batches with prefills are CUDA graphs and larger ones cost a constant more, the better
of the two is taken: long batches, or graphs as large as there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minserve.planner.admission.outlook import Tier
from minserve.planner.predict.acceptance import cautious_tokens
from minserve.planner.predict.perf_model import EAGER, TOKEN, BatchShape, PerfModel, Piece

INFEASIBLE = -1.0
# Lengths per tier that are kept: those that are best somewhere near the present counts.
MOST_CHOICES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TierSpeculation:
    """The facts about drafts for the decodes of each tier.

    Attributes:
        acceptance: chance that a drafted token is accepted, for each tier.
        max_tokens: the longest speculation in tokens.
        near: count vectors around which the rates are wanted, at least one.
    """

    acceptance: tuple[float, ...]
    max_tokens: int
    near: tuple[tuple[int, ...], ...]


class PrefillRates:
    """Prefill tokens per second as a function of how many sequences of each tier decode.

    Args:
        model: the performance model of the device.
        tiers: the L TPOT tiers.
        window_s: seconds that a batch lasts if no sequence decodes.
        guard_s: seconds of every batch that are kept free so that its tokens reach the clients in
            time.
        share: share of the device's time that is planned with, in (0, 1]; the rest is for best
            effort and for errors of the model.
        speculation: facts about drafts; ``None`` if nothing is drafted.
    """

    def __init__(
        self,
        model: PerfModel,
        tiers: SequenceOf[Tier],
        *,
        window_s: float,
        guard_s: float = 0.0,
        share: float = 1.0,
        speculation: TierSpeculation | None = None,
    ) -> None:
        self.tiers = tuple(tiers)
        self._acceptance = () if speculation is None else speculation.acceptance
        self._choices = [
            _FixedLengths(model, self.tiers, lengths, tpots, window_s, guard_s, share)
            for lengths, tpots in _candidates(self.tiers, speculation)
        ]
        if speculation is not None and len(self._choices) > 1:
            self._choices = _best_near(self._choices, speculation.near)
        # Attention beyond the mean of a token: what makes a long prompt cost more than
        # its tokens, as tokens of the steepest piece.
        steep = model.steepest
        self._pair_tokens = steep.attention_pairs / steep.tokens

    def work(self, start: int, end: int) -> float:
        """Return the work to prefill tokens ``start .. end`` of one sequence, in budget tokens."""
        num = end - start
        pairs = num * start + num * (num + 1) / 2
        return num + self._pair_tokens * pairs

    def one(self, counts: SequenceOf[int]) -> float:
        """Return the rate at one count vector, like `__call__` but without numpy's overhead."""
        return max(choice.one(counts) for choice in self._choices)

    def lengths(self, counts: SequenceOf[int]) -> tuple[int, ...]:
        """Return the speculation length of each tier that leaves most to prefills."""
        return max(self._choices, key=lambda choice: choice.one(counts)).lengths

    def thresholds(self, counts: SequenceOf[int]) -> dict[int, float]:
        """Return the chance of acceptance of the last token worth drafting, by tier that
        speculates.
        """
        return {
            tier: self._acceptance[tier] ** length
            for tier, length in enumerate(self.lengths(counts))
            if length > 0
        }

    def need_drafts(self, counts: SequenceOf[int]) -> bool:
        """Return True if the decodes would not keep their TPOT without speculation."""
        return self._choices[0].one(counts) < 0

    def __call__(self, counts: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the prefill tokens per second at each count vector.

        Args:
            counts: ``[..., L]`` int64.

        Returns:
            ``[...]`` float64; `INFEASIBLE` where the decodes alone do not keep their TPOT.
        """
        counts = np.asarray(counts)
        shape = counts.shape[:-1]
        flat = counts.reshape(math.prod(shape), len(self.tiers))
        best = self._choices[0].many(flat)
        for choice in self._choices[1:]:
            np.maximum(best, choice.many(flat), out=best)
        return best.reshape(shape)

    def of_sums(self, counts: NDArray[np.int64], more: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the rates at every sum of a row of ``counts`` and a row of ``more``.

        It is faster than a call with all these sums.

        Args:
            counts: ``[J, L]`` int64.
            more: ``[C, L]`` int64.

        Returns:
            ``[J, C]`` float64.
        """
        best = self._choices[0].of_sums(counts, more)
        for choice in self._choices[1:]:
            np.maximum(best, choice.of_sums(counts, more), out=best)
        return best


class _FixedLengths:
    """The rates if the decodes of each tier speculate at a given length.

    Args:
        lengths: number of tokens drafted for each tier; 0 is plain decoding.
        tpots: seconds that one verification may be apart from the next, for each tier.
    """

    def __init__(
        self,
        model: PerfModel,
        tiers: tuple[Tier, ...],
        lengths: tuple[int, ...],
        tpots: tuple[float, ...],
        window_s: float,
        guard_s: float,
        share: float,
    ) -> None:
        self.lengths = lengths
        self._tpot = np.array(tpots, dtype=np.float64)
        self._tpots = tpots
        self._window_s = window_s
        self._share = share
        drift, steps = model.drift, max(lengths, default=0)
        # Per piece: seconds of the constant (and of a chunk as a sequence of the batch), of
        # what prefills make it take beyond that, of one decode of each tier, of a prefill token.
        constant = BatchShape(seqs=1, draft_steps=steps)
        bases = [drift * p.seconds(constant) + guard_s for p in model.pieces]
        self._decode = drift * np.array(
            [
                [_decode_s(p, tier, length) for tier, length in zip(tiers, lengths, strict=True)]
                for p in model.pieces
            ]
        ).reshape(len(model.pieces), len(tiers))
        self._pieces = [
            (base, drift * p.added(EAGER), drift * p.added(TOKEN), decodes)
            for base, p, decodes in zip(bases, model.pieces, self._decode.tolist(), strict=True)
        ]
        # The most tokens of a batch with prefills that costs no more for being eager.
        is_eager_more = any(eager > 0 for _, eager, _, _ in self._pieces)
        self._graph_tokens = model.mixed.max_tokens if is_eager_more else 0
        # Tokens of one decode stand behind the seconds that it takes.
        self._tokens = [1.0 + length for length in lengths]
        self._decode = np.vstack([self._decode, np.array(self._tokens).reshape(1, len(tiers))])

    def one(self, counts: SequenceOf[int]) -> float:
        window = self._window_s
        for count, tpot in zip(counts, self._tpots, strict=True):
            if count > 0 and tpot < window:
                window = tpot
        rate = graphed = math.inf
        decoded = sum(
            count * num / tpot
            for count, num, tpot in zip(counts, self._tokens, self._tpots, strict=True)
        )
        for base, eager, token, decodes in self._pieces:
            left = self._share * window - base
            for count, tpot, decode in zip(counts, self._tpots, decodes, strict=True):
                left -= count * window / tpot * decode
            if left < 0:
                return INFEASIBLE
            if self._graph_tokens:
                own = self._graphed(left / window, base, token, 1 / window, decoded)
                graphed = min(graphed, own)
            left -= eager
            if left < 0:
                rate = 0.0
            elif token > 0:
                rate = min(rate, left / token / window)
        return max(rate, graphed) if self._graph_tokens else rate

    def _graphed(self, left: Any, base: float, token: float, pace: Any, decoded: Any) -> Any:
        """Return the prefill tokens per second that one piece allows in batches that are graphs.

        A longer batch has more of them for its constant, until it has as many tokens as there are
        graphs for. That is its best length, unless it is too long for the decodes.

        Args:
            left: share of the time that decodes and constants leave at this pace.
            pace: batches per second, at least.
            decoded: tokens per second of the decodes.
        """
        most = self._graph_tokens
        if base + token * most <= 0:
            return math.inf
        best = most * (left + base * pace + token * decoded) / (base + token * most) - decoded
        return np.minimum(best, left / token) if token > 0 else best

    def many(self, counts: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the rates ``[N]`` at count vectors ``[N, L]``."""
        return self._rate(*self._needs(counts))

    def of_sums(self, counts: NDArray[np.int64], more: NDArray[np.int64]) -> NDArray[np.float64]:
        pace, load = self._needs(counts)
        more_pace, more_load = self._needs(more)
        return self._rate(
            np.maximum(pace[:, None], more_pace), load[:, :, None] + more_load[:, None]
        )

    def _needs(self, counts: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the batches per second ``[N]`` that decodes ask for, and ``[P + 1, N]``: the share of
        time that they take by each piece, then their tokens per second.
        """
        pace = np.where(counts > 0, 1.0 / self._tpot, 0.0)
        load = (self._decode / self._tpot) @ counts.T
        return pace.max(axis=1, initial=1.0 / self._window_s), load

    def _rate(self, pace: NDArray[np.float64], load: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the prefill tokens per second, from the result of `_needs`.

        It overwrites ``load``, because memory is slow.
        """
        rate = np.full(pace.shape, np.inf)
        graphed = rate.copy() if self._graph_tokens else None
        for (base, eager, token, _), left in zip(self._pieces, load[:-1], strict=True):
            left += base * pace
            np.subtract(self._share, left, out=left)
            if graphed is not None:
                own = self._graphed(left, base, token, pace, load[-1])
                np.minimum(graphed, own, out=graphed)
            if eager > 0:
                rate[left < 0] = INFEASIBLE
                left -= eager * pace
                # Decodes keep their TPOT by themselves, and leave nothing.
                np.minimum(rate, 0.0, out=rate, where=left < 0)
                np.maximum(left, 0.0, out=left)
            if token > 0:
                left /= token
                np.minimum(rate, left, out=rate)
            else:
                rate[left < 0] = INFEASIBLE
        rate[rate < 0] = INFEASIBLE
        if graphed is not None:
            np.maximum(rate, graphed, out=rate, where=rate >= 0)
        return rate


def _decode_s(piece: Piece, tier: Tier, length: int) -> float:
    """Return the profiled seconds that a decode of a tier with so many drafts adds to a batch."""
    own = replace(BatchShape.of([(0, 1 + length)]), draft_tokens=length)
    context_token = BatchShape(context_tokens=1, attention_pairs=1 + length)
    return piece.added(own) + tier.context_tokens * piece.added(context_token)


def _candidates(
    tiers: tuple[Tier, ...], speculation: TierSpeculation | None
) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """Return the lengths per tier worth comparing, plain decoding first, with the TPOTs that they
    stretch.

    One tier's length bounds the batch; the others take the shortest length that does not.
    """
    plain = (tuple(0 for _ in tiers), tuple(tier.tpot_s for tier in tiers))
    if speculation is None or not tiers:
        return [plain]
    stretched = [
        [
            tier.tpot_s * cautious_tokens(acceptance, length)
            for length in range(speculation.max_tokens + 1)
        ]
        for tier, acceptance in zip(tiers, speculation.acceptance, strict=True)
    ]
    found = dict([plain])
    for bottleneck in stretched:
        for window in bottleneck:
            lengths = tuple(
                next((s for s, tpot in enumerate(own) if tpot >= window), own.index(max(own)))
                for own in stretched
            )
            found[lengths] = tuple(
                own[length] for own, length in zip(stretched, lengths, strict=True)
            )
    return list(found.items())


def _best_near(
    choices: list[_FixedLengths], near: SequenceOf[SequenceOf[int]]
) -> list[_FixedLengths]:
    """Return plain decoding, and the others that leave most at one of the count vectors."""
    counts = np.array(near, dtype=np.int64)
    rates = np.stack([choice.many(counts) for choice in choices])
    best = list(dict.fromkeys(rates.argmax(axis=0).tolist()))
    kept = [i for i in best if i != 0][: MOST_CHOICES - 1]
    return [choices[0], *(choices[i] for i in kept)]
