"""Decides how many tokens to draft for each decode, such that it pays; the length may be 0.

Drafts can pay in two ways. In a batch of decodes alone they pay if they bring more tokens per
second. While prefills wait, they pay if they let each decode come round less often, and so leave
longer batches to the prefills: `minserve.planner.admission.prefill_rates` finds the length per
tier, and a batch drafts as much of it as pays there and then. Either way a token is worth drafting
as long as the chance that it is accepted, which falls with every token before it, is above a
threshold. So sequences whose drafts are accepted more often get longer ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from minserve.planner.plan import SpeculationView
from minserve.planner.predict.acceptance import AcceptanceEstimator, expected_tokens
from minserve.planner.predict.pacing import Paces
from minserve.planner.predict.perf_model import EAGER, BatchShape, PerfModel, Piece
from minserve.request import Sequence

# A gain smaller than this is less than predictions are good for.
WORTH = 1.03
# A sequence of which the draft model lacks more tokens first catches up, over iterations.
MOST_LAG = 32


@dataclass(frozen=True, slots=True)
class DraftCandidate:
    """A decode for which tokens could be drafted.

    Attributes:
        seq: the decoding sequence.
        acceptance: chance that a drafted token is accepted.
        limit: the most tokens that can be drafted.
        lag: number of tokens that the draft model has to run first.
    """

    seq: Sequence
    acceptance: float
    limit: int
    lag: int = 0

    def length(self, threshold: float, longest: int) -> int:
        """Return how many tokens have at least this chance to be accepted.

        Args:
            threshold: the least chance.
            longest: the most tokens to draft.
        """
        most = min(self.limit, longest)
        if threshold <= 0.0:
            return most
        if threshold >= 1.0 or self.acceptance <= 0.0:
            return 0
        return min(most, int(math.log(threshold) / math.log(self.acceptance) + 1e-9))


@dataclass(frozen=True, slots=True)
class Speculation:
    """The speculation lengths of a batch, and their gain.

    Attributes:
        lengths: number of tokens to draft for each candidate.
        gain: expected tokens per second over those without speculation, at least 1.
    """

    lengths: tuple[int, ...]
    gain: float


@dataclass(frozen=True, slots=True)
class DraftsForPrefills:
    """The worth of drafting while prefills wait, by the prefill budget.

    Attributes:
        thresholds: least chance of acceptance at which a token is worth drafting, by TPOT in
            seconds. Decodes of other TPOTs draft nothing.
        needed: True if the decodes would not keep their TPOT without drafts.
    """

    thresholds: Mapping[float, float]
    needed: bool


NO_DRAFTS = DraftsForPrefills({}, needed=False)


@dataclass(slots=True)
class Drafting:
    """The facts about speculation that the construction of a batch needs.

    Attributes:
        view: the proposer as planners see it.
        model: the performance model, which weighs drafts against the time that they take.
        acceptance: estimates how often drafts are accepted.
        remaining: function that returns how many tokens an output is likely still to have.
        for_prefills: the worth of drafting while prefills wait.
        declined: True if tokens could have been drafted for the batch, but did not pay.
    """

    view: SpeculationView
    model: PerfModel
    acceptance: AcceptanceEstimator
    remaining: Callable[[Sequence], int]
    for_prefills: DraftsForPrefills
    declined: bool = False

    def candidate(self, seq: Sequence) -> DraftCandidate:
        """Return a decoding sequence as a candidate; the target alone gives its last token."""
        left = seq.request.max_tokens - seq.num_output_tokens - 1
        limit = self.view.limit(seq)
        self.acceptance.asked(limit > 0)
        limit = max(0, min(limit, left))
        return DraftCandidate(seq, self.acceptance.rate(seq), limit, self.view.lag(seq))

    def candidates_for_prefills(
        self, seqs: Iterable[Sequence], paces: Paces
    ) -> dict[str, DraftCandidate]:
        """Return the decodes that draft while prefills wait, by sequence id.

        The limit of each is the length that leaves most to prefills over time.
        """
        found = {}
        for seq in seqs:
            threshold = self.for_prefills.thresholds.get(paces.tpot_s(seq))
            if threshold is not None:
                one = self.candidate(seq)
                length = one.length(threshold, self.view.max_tokens)
                if length > 0:
                    found[seq.seq_id] = replace(one, limit=length)
        return found


def with_drafts(
    shape: BatchShape, candidates: SequenceOf[DraftCandidate], lengths: SequenceOf[int]
) -> BatchShape:
    """Return the shape of a batch of decodes once so many tokens are drafted for some of them."""
    tokens = context = pairs = draft_tokens = 0
    for one, length in zip(candidates, lengths, strict=True):
        if length:
            tokens += length
            context += length
            pairs += length * one.seq.num_tokens + length * (length + 1) // 2
            draft_tokens += length + one.lag
    return replace(
        shape,
        tokens=shape.tokens + tokens,
        context_tokens=shape.context_tokens + context,
        attention_pairs=shape.attention_pairs + pairs,
        draft_steps=max(shape.draft_steps, *lengths, 0),
        draft_tokens=shape.draft_tokens + draft_tokens,
    )


# What drafted tokens add to a batch: each one, each token that one attends to, and each token
# that the draft model runs.
_DRAFTED = BatchShape(tokens=1, context_tokens=1)
_PAIR, _DRAFT = BatchShape(attention_pairs=1), BatchShape(draft_tokens=1)


class _Tokens:
    """All tokens that could be drafted for some decodes, the most valuable first.

    The chance of a token falls with every token before it, so that the first ones of the list are
    always the first ones of each decode.

    Args:
        candidates: the decodes.
        worth: value of an accepted token, for each candidate.
    """

    def __init__(self, candidates: SequenceOf[DraftCandidate], worth: SequenceOf[float]) -> None:
        limits = [one.limit for one in candidates]
        self._num = len(candidates)
        self._owner = np.repeat(np.arange(self._num), limits)
        self._depth = np.concatenate([np.arange(1, limit + 1) for limit in limits])
        value = np.array([one.acceptance for one in candidates])[self._owner] ** self._depth
        value *= np.array(worth)[self._owner]
        order = np.argsort(-value, kind="stable")
        self._owner, self._depth, self._value = self._owner[order], self._depth[order], value[order]
        context = np.array([one.seq.num_tokens for one in candidates])[self._owner]
        self._pairs = context + self._depth
        lags = np.array([one.lag for one in candidates])[self._owner]
        self._drafted = np.where(self._depth == 1, 1 + lags, 1)

    def prefixes(
        self, pieces: SequenceOf[Piece], shape: BatchShape, steps: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the value and the seconds of the first tokens, for each number of them.

        Args:
            pieces: the pieces of the performance model.
            shape: shape of the batch without drafts.
            steps: the most tokens of one decode.

        Returns:
            their value, and the profiled seconds of the batch with them, ``[K]`` each.
        """
        kept = self._depth <= steps
        drafted, pairs = self._drafted[kept].cumsum(), self._pairs[kept].cumsum()
        num = np.arange(1, len(drafted) + 1)
        seconds = np.zeros(len(num))
        for piece in pieces:
            own = piece.seconds(replace(shape, draft_steps=max(steps, shape.draft_steps)))
            each, pair, draft = (piece.added(part) for part in (_DRAFTED, _PAIR, _DRAFT))
            np.maximum(seconds, own + each * num + pair * pairs + draft * drafted, out=seconds)
        return self._value[kept].cumsum(), seconds

    def lengths(self, steps: int, num: int) -> tuple[int, ...]:
        """Return how many of the first ``num`` tokens belong to each candidate."""
        owners = self._owner[self._depth <= steps][:num]
        return tuple(np.bincount(owners, minlength=self._num).tolist())


def most_tokens_per_second(
    model: PerfModel,
    shape: BatchShape,
    num_decodes: int,
    candidates: SequenceOf[DraftCandidate],
    limit_s: float,
) -> Speculation:
    """Return the lengths that bring most tokens per second of a batch of decodes.

    For each number of draft steps, tokens are taken in order of their chance to be accepted.

    Args:
        shape: shape of the batch without drafts.
        num_decodes: number of decodes in that batch, each worth one token.
        candidates: those of them for which tokens can be drafted.
        limit_s: predicted seconds that the batch may take with drafts.
    """
    none = Speculation((0,) * len(candidates), 1.0)
    plain_s = model.predict(shape)
    if not candidates or plain_s <= 0:
        return none
    plain_rate = num_decodes / plain_s
    best, best_rate = none, plain_rate * WORTH
    # Not even if drafted tokens cost nothing but one step of the draft model?
    hoped = sum(expected_tokens(one.acceptance, one.limit) - 1.0 for one in candidates)
    least = model.predict(replace(shape, draft_steps=1))
    if (num_decodes + hoped) / least <= best_rate:
        return none
    tokens = _Tokens(candidates, [1.0] * len(candidates))
    correction = model.correction(replace(shape, draft_steps=1))
    for steps in range(1, max(one.limit for one in candidates) + 1):
        accepted, seconds = tokens.prefixes(model.pieces, shape, steps)
        seconds *= correction
        rates = np.where(seconds <= limit_s, (num_decodes + accepted) / seconds, 0.0)
        most = int(rates.argmax())
        if rates[most] > best_rate:
            best_rate = float(rates[most])
            best = Speculation(tokens.lengths(steps, most + 1), best_rate / plain_rate)
    return best


def most_left_to_prefills(
    model: PerfModel,
    shape: BatchShape,
    num_decodes: int,
    candidates: SequenceOf[DraftCandidate],
    guard_s: float,
) -> tuple[int, ...]:
    """Return the lengths that leave most time to prefills, counted over this batch and later ones.

    Drafts take time of this batch. For each token that they bring, a decode need not come round
    another time. If they bring one to every decode, a batch less is run, with its constant cost,
    which is that of an eager one. So decodes that draft alone, in batches which the others cut
    short, draft little or not at all.

    Args:
        shape: shape of the batch without drafts.
        num_decodes: number of all decodes, in this batch or not.
        candidates: decodes of the batch, with the longest speculation as their limit.
        guard_s: seconds that are part of every batch's constant cost.
    """
    none = (0,) * len(candidates)
    if not candidates:
        return none
    steep, drift = model.steepest, model.drift
    plain_s = drift * steep.seconds(shape)
    constant_s = (drift * steep.seconds(EAGER) + guard_s) / num_decodes
    worth_s = [
        drift * steep.added(BatchShape.of([(one.seq.num_tokens - 1, 1)])) + constant_s
        for one in candidates
    ]
    tokens = _Tokens(candidates, worth_s)
    correction = model.correction(replace(shape, draft_steps=1))
    best, most_s = none, 0.0
    for steps in range(1, max(one.limit for one in candidates) + 1):
        saved, seconds = tokens.prefixes((steep,), shape, steps)
        left_s = plain_s - correction * seconds + saved
        most = int(left_s.argmax())
        if left_s[most] > most_s:
            best, most_s = tokens.lengths(steps, most + 1), float(left_s[most])
    return best
