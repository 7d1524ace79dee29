"""PB*: how many prefill tokens per second fit beside n decoding sequences.

After SLOs-Serve (arXiv 2504.08784, section on the prefill budget), auto-regressive case: a
batch is as long as the tightest TPOT present allows, a sequence of tier l takes one token
every TPOT_l, and what is left of the batch is prefill.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf

import numpy as np
from numpy.typing import NDArray

from minserve.planner.outlook import Tier
from minserve.planner.perf_model import PerfModel

INFEASIBLE = -1.0


class PrefillRates:
    """Prefill tokens per second as a function of how many sequences of each tier decode.

    Args:
        model: the device.
        tiers: the L TPOT tiers.
        window_s: length of a batch where nobody decodes.
        guard_s: of every batch, kept free so that its tokens reach the clients in time.
        share: of the device's time that is planned with, in (0, 1]; the rest is for best
            effort and for errors of the model.
    """

    def __init__(
        self,
        model: PerfModel,
        tiers: SequenceOf[Tier],
        *,
        window_s: float,
        guard_s: float = 0.0,
        share: float = 1.0,
    ) -> None:
        self.tiers = tuple(tiers)
        self._tpot = np.array([tier.tpot_s for tier in tiers], dtype=np.float64)
        self._window_s = window_s
        self._share = share
        drift = model.drift
        # Per piece: seconds of the constant (and of a chunk as a sequence of the batch), of
        # one decode of each tier, of a prefill token.
        self._base = np.array([drift * (p.base + p.seqs) + guard_s for p in model.pieces])
        self._decode = drift * np.array(
            [
                [
                    p.tokens
                    + p.seqs
                    + (p.context_tokens + p.attention_pairs) * (tier.context_tokens + 1)
                    for tier in tiers
                ]
                for p in model.pieces
            ]
        ).reshape(len(model.pieces), len(self.tiers))
        self._token = np.array([drift * p.tokens for p in model.pieces])
        self._tpots = self._tpot.tolist()
        self._pieces = list(
            zip(self._base.tolist(), self._token.tolist(), self._decode.tolist(), strict=True)
        )
        # Attention beyond the mean of a token: what makes a long prompt cost more than
        # its tokens, as tokens of the steepest piece.
        steep = max(model.pieces, key=lambda p: p.tokens)
        self._pair_tokens = steep.attention_pairs / steep.tokens

    def work(self, start: int, end: int) -> float:
        """Prefill of tokens ``start .. end`` of one sequence, in budget tokens."""
        num = end - start
        pairs = num * start + num * (num + 1) / 2
        return num + self._pair_tokens * pairs

    def one(self, counts: SequenceOf[int]) -> float:
        """`__call__` for a single count vector, without numpy's overhead."""
        window = self._window_s
        for count, tpot in zip(counts, self._tpots, strict=True):
            if count > 0 and tpot < window:
                window = tpot
        rate = math.inf
        for base, token, decodes in self._pieces:
            left = self._share * window - base
            for count, tpot, decode in zip(counts, self._tpots, decodes, strict=True):
                left -= count * window / tpot * decode
            if left < 0:
                return INFEASIBLE
            if token > 0:
                rate = min(rate, left / token / window)
        return rate

    def __call__(self, counts: NDArray[np.int64]) -> NDArray[np.float64]:
        """Tokens per second at each count vector.

        Args:
            counts: ``[..., L]`` int64.

        Returns:
            ``[...]`` float64; `INFEASIBLE` where the decodes alone do not keep their TPOT.
        """
        counts = np.asarray(counts)
        shape = counts.shape[:-1]
        flat = counts.reshape(math.prod(shape), len(self.tiers))
        return self._rate(*self._needs(flat)).reshape(shape)

    def of_sums(self, counts: NDArray[np.int64], more: NDArray[np.int64]) -> NDArray[np.float64]:
        """As calling with every sum of a row of ``counts`` and a row of ``more``, but faster.

        Args:
            counts: ``[J, L]`` int64.
            more: ``[C, L]`` int64.

        Returns:
            ``[J, C]`` float64.
        """
        pace, load = self._needs(counts)
        more_pace, more_load = self._needs(more)
        return self._rate(
            np.maximum(pace[:, None], more_pace), load[:, :, None] + more_load[:, None]
        )

    def _needs(self, counts: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """What decodes take: batches per second ``[N]``, and per piece share of time ``[P, N]``."""
        pace = np.where(counts > 0, 1.0 / self._tpot, 0.0)
        load = (self._decode / self._tpot) @ counts.T
        return pace.max(axis=1, initial=1.0 / self._window_s), load

    def _rate(self, pace: NDArray[np.float64], load: NDArray[np.float64]) -> NDArray[np.float64]:
        """Tokens per second from what decodes take; overwrites ``load``, since memory is slow."""
        rate = np.full(pace.shape, np.inf)
        for (base, token, _), left in zip(self._pieces, load, strict=True):
            left += base * pace
            np.subtract(self._share, left, out=left)
            if token > 0:
                left /= token
                np.minimum(rate, left, out=rate)
            else:
                rate[left < 0] = INFEASIBLE
        rate[rate < 0] = INFEASIBLE
        return rate
