"""`PerfModel`: how many seconds a batch takes, and how many tokens fit in a time.

The form is that of SLOs-Serve (arXiv 2504.08784), with the terms that it lacks: the maximum
of linear pieces over (tokens, sequences, context tokens, attention pairs, draft steps, draft
tokens, eager, draft eager, 1), all coefficients at least 0. A GPU has a flat piece (weights are read whatever
the batch) and a steep one (arithmetic); a CPU often needs one piece only. ``eager`` is 1 for
batches that are no CUDA graphs where others are (`minserve.planner.predict.eager`), which cost a
constant more; on a device without graphs its coefficient is 0. Graphs of batches with prefills are
recorded up to where a device computes for as long as the host launches, so that eager batches
beyond them cost hardly more: what takes every batch with a prefill for an eager one is about right
then as well.

The profile gives the coefficients once (`minserve.planner.predict.perf_fit`). Online, `observe`
follows the drift of the device and its scatter (`minserve.planner.predict.scatter`): `predict` is
what is expected, `bound` what it may take.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, astuple, dataclass, replace
from typing import Any

from minserve.planner.predict.eager import NO_MIXED, MixedLimit, is_eager
from minserve.planner.predict.scatter import Scatter

# Of what is learned about batches with drafts: how fast, since each of them may be a loss; the
# bounds; and how it is forgotten, by half in 200 batches without.
SPECULATION_RATE = 0.1
MAX_SPECULATION = 4.0
SPECULATION_FADE = 0.9965
MAX_SURPRISE = 0.7
MARGIN_QUANTILE = 0.9


@dataclass(frozen=True, slots=True)
class BatchShape:
    """The numbers of a batch that decide its time.

    Attributes:
        tokens: tokens run, prefill and decode alike.
        seqs: sequences in the batch.
        context_tokens: tokens with KV after the iteration, over all sequences.
        attention_pairs: tokens that a token run attends to, over all tokens run.
        draft_steps: forward passes of the draft model.
        draft_tokens: tokens that these passes run.
        eager: 1 for a batch that runs eagerly (`minserve.planner.predict.eager.is_eager`), else 0.
            It is 0 throughout the profile of a device without graphs, where it makes no difference.
        draft_eager: 1 if the draft model's first pass runs eagerly, because much is caught up in it
            (`minserve.planner.predict.eager.DraftPasses`), else 0.
    """

    tokens: int = 0
    seqs: int = 0
    context_tokens: int = 0
    attention_pairs: int = 0
    draft_steps: int = 0
    draft_tokens: int = 0
    eager: int = 0
    draft_eager: int = 0

    @classmethod
    def of(cls, chunks: Iterable[tuple[int, int]], *, eager: bool = False) -> BatchShape:
        """Return the shape of a batch.

        Args:
            chunks: ``(tokens already computed, tokens to run)`` of each sequence.
            eager: True for a batch that runs eagerly.
        """
        tokens = seqs = context = pairs = 0
        for start, num_tokens in chunks:
            tokens += num_tokens
            seqs += 1
            context += start + num_tokens
            pairs += num_tokens * start + num_tokens * (num_tokens + 1) // 2
        return cls(tokens, seqs, context, pairs, eager=int(eager))

    @classmethod
    def of_decodes(cls, num: int, context_tokens: int) -> BatchShape:
        """Return the shape of so many plain decodes with so many tokens of context together."""
        return cls(num, num, context_tokens, context_tokens)


# The parts of a plain decode: its token and its place, and each token that it attends to.
DECODE = BatchShape(tokens=1, seqs=1)
CONTEXT_TOKEN = BatchShape(context_tokens=1, attention_pairs=1)
TOKEN, EAGER = BatchShape(tokens=1), BatchShape(eager=1)


@dataclass(frozen=True, slots=True)
class Piece:
    """One linear piece: seconds per unit of each feature, and the constant in seconds."""

    tokens: float
    seqs: float = 0.0
    context_tokens: float = 0.0
    attention_pairs: float = 0.0
    draft_steps: float = 0.0
    draft_tokens: float = 0.0
    eager: float = 0.0
    draft_eager: float = 0.0
    base: float = 0.0

    def seconds(self, shape: BatchShape) -> float:
        """Return the seconds of a batch of this shape."""
        return self.added(shape) + self.base

    def added(self, shape: BatchShape) -> float:
        """Return the seconds that a part of this shape adds to a batch.

        This is the one place that turns features into seconds; what must be quick adds up the
        seconds of its parts.
        """
        return (
            self.tokens * shape.tokens
            + self.seqs * shape.seqs
            + self.context_tokens * shape.context_tokens
            + self.attention_pairs * shape.attention_pairs
            + self.draft_steps * shape.draft_steps
            + self.draft_tokens * shape.draft_tokens
            + self.eager * shape.eager
            + self.draft_eager * shape.draft_eager
        )

    def slowed(self, factor: float) -> Piece:
        """Return the piece of a device that takes ``factor`` times as long for everything."""
        return Piece(*(factor * each for each in astuple(self)))


class PerfModel:
    """Seconds of a batch as the maximum of linear pieces, corrected online.

    Args:
        pieces: at least one piece; together they must grow with the tokens.
        margin: factor on profiled seconds that `MARGIN_QUANTILE` of the iterations stayed within
            when the profile was made. Observed iterations soon count instead.
        mixed: the largest batches with a prefill that the device has CUDA graphs for.

    Attributes:
        speculation_drift: ratio of measured to profiled seconds of batches with drafts, over that
            ratio of all others. It is the error of the profile about drafts.
        next_factor: ratio of the next iteration's seconds to its profiled seconds; ``None`` if it
            is not known. A simulator sets it to find how much it is worth to know it.
    """

    def __init__(
        self, pieces: Iterable[Piece], *, margin: float = 1.1, mixed: MixedLimit = NO_MIXED
    ) -> None:
        self.pieces = tuple(pieces)
        if not self.pieces or not any(piece.tokens > 0 for piece in self.pieces):
            raise ValueError("a performance model needs a piece that grows with the tokens")
        if any(not c >= 0 or math.isinf(c) for piece in self.pieces for c in astuple(piece)):
            raise ValueError("coefficients must be finite and at least 0")
        if not 0 < margin < math.inf:
            raise ValueError("a margin must be finite and above 0")
        self.margin = margin
        self.mixed = mixed
        self.speculation_drift = 1.0
        self.next_factor: float | None = None
        self._scatter = Scatter(margin, 1.0 - MARGIN_QUANTILE)
        self._newest: BatchShape | None = None

    @property
    def drift(self) -> float:
        """Ratio of measured to profiled seconds now; 1.1 is a device 10% slower than profiled."""
        return self._scatter.drift

    @drift.setter
    def drift(self, value: float) -> None:
        self._scatter.drift = value

    def bound(self, iterations: float, risk: float) -> float:
        """Return a factor on predicted seconds, at least 1, which bounds iterations in a row.

        Args:
            iterations: number of iterations in a row.
            risk: chance that the sum of their seconds exceeds the factor times its prediction.
        """
        if self.next_factor is not None and iterations <= 1:
            return 1.0
        return self._scatter.bound(iterations, risk)

    @property
    def steepest(self) -> Piece:
        """The piece that decides where a batch is filled with prefills."""
        return max(self.pieces, key=lambda piece: piece.tokens)

    def profiled(self, shape: BatchShape) -> float:
        """Return the seconds of a batch by the profile alone. Promises are made from them, because
        they are stable over time.
        """
        return max(piece.seconds(shape) for piece in self.pieces)

    def risk(self, factor: float) -> float:
        """Return the chance that an iteration takes more than ``factor`` times its predicted
        seconds.
        """
        if self.next_factor is not None:
            return float(factor < 1.0)
        return self._scatter.risk(factor)

    def predict(self, shape: BatchShape) -> float:
        """Return the seconds that a batch is expected to take now: the mean of what it may take."""
        return self.correction(shape) * self.profiled(shape)

    @property
    def pace(self) -> float:
        """Ratio of the next iteration's expected seconds to the profiled ones, without drafts."""
        return self.drift if self.next_factor is None else self.next_factor

    def correction(self, shape: BatchShape) -> float:
        """Return the ratio of the next iteration's expected seconds to the profiled ones for such a
        batch.
        """
        return self.pace * self.speculation_drift if shape.draft_steps else self.pace

    def zero_load_prefill_s(self, num_tokens: int) -> float:
        """Return T(prompt) of the idle device in seconds, for ``ttft_slowdown``."""
        return self.profiled(self.prefill_alone(0, num_tokens))

    def prefill_alone(self, start: int, num_tokens: int) -> BatchShape:
        """Return the shape of a batch of one prefill chunk, behind ``start`` computed tokens."""
        eager = is_eager(1, 0, num_tokens, self.mixed)
        return BatchShape.of([(start, num_tokens)], eager=eager)

    def zero_load_decode_s(self, context_tokens: int) -> float:
        """Return the seconds per token of a lone request, for ``tpot_slowdown``."""
        return self.profiled(BatchShape.of([(context_tokens, 1)]))

    def max_tokens_within(
        self, seconds: float, shape: BatchShape, start: int = 0, num_chunks: int = 0
    ) -> int:
        """Return the length in tokens of the longest prefill chunk that fits beside a batch.

        Args:
            seconds: seconds that the whole batch may take, by `predict`.
            shape: shape of the batch without the chunk, which may make it an eager one.
            start: number of tokens of the chunk's sequence that are computed already.
            num_chunks: number of prefill chunks in the batch without it.

        Returns:
            the length; 0 if not one token fits.
        """
        room = self.mixed.max_tokens - shape.tokens if num_chunks < self.mixed.max_chunks else 0
        longest = self._longest_chunk(seconds, replace(shape, eager=1), start)
        if longest < room:  # such a batch is a graph
            longest = min(room, self._longest_chunk(seconds, replace(shape, eager=0), start))
        return longest

    def _longest_chunk(self, seconds: float, shape: BatchShape, start: int) -> int:
        limit = seconds / self.pace
        return max(0, min(_longest_chunk(piece, limit, shape, start) for piece in self.pieces))

    def observe(self, shape: BatchShape, seconds: float) -> None:
        """Learn from the seconds that an iteration took."""
        profiled = self.profiled(shape)
        if not (seconds > 0 and profiled > 0):
            return
        self._newest = shape
        ratio = seconds / (self.drift * profiled)
        if shape.draft_steps:
            ratio /= self.speculation_drift
        if not shape.draft_steps:
            self._scatter.observe(ratio)
            # Forgotten slowly: were it believed for good, no batch would ever show otherwise.
            self.speculation_drift **= SPECULATION_FADE
        else:
            # Whether the device or the drafts are slower cannot be told from one batch.
            self._scatter.observe(ratio, 0.5)
            clipped = max(-MAX_SURPRISE, min(MAX_SURPRISE, math.log(ratio)))
            drift = self.speculation_drift * math.exp(SPECULATION_RATE * clipped)
            self.speculation_drift = min(max(drift, 1 / MAX_SPECULATION), MAX_SPECULATION)

    def with_draft_costs(self, step_s: float, token_s: float, eager_s: float = 0.0) -> PerfModel:
        """Return a model of the same device with a draft model, which runs before the target.

        Args:
            step_s: seconds of each forward pass of the draft model.
            token_s: seconds of each token in it.
            eager_s: seconds that a pass takes longer where it is no CUDA graph, but others are.
        """
        costs = {"draft_steps": step_s, "draft_tokens": token_s, "draft_eager": eager_s}
        pieces = [replace(piece, **costs) for piece in self.pieces]
        return PerfModel(pieces, margin=self.margin, mixed=self.mixed)

    def refined(self, profiled: PerfModel) -> PerfModel:
        """Return a model with a better profile of the same device, made while this model followed
        it.

        It keeps what is known of the scatter and of the costs of drafts. What was learned of the
        speed is relative to a profile: a batch like the newest one is expected to take as long as
        before, until the next iterations show how much of that was the old profile's error.
        """
        one = self.pieces[0]
        model = profiled.with_draft_costs(one.draft_steps, one.draft_tokens, one.draft_eager)
        if self._newest is None:
            return model
        model._newest, model.speculation_drift = self._newest, self.speculation_drift
        factor = self.profiled(self._newest) / model.profiled(self._newest)
        model._scatter = self._scatter.rescaled(factor)
        return model

    def to_dict(self) -> dict[str, Any]:
        """Return the profile, ready for JSON; the online correction is left out."""
        return {
            "pieces": [asdict(piece) for piece in self.pieces],
            "margin": self.margin,
            "mixed": list(self.mixed),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PerfModel:
        """Return a model from what `to_dict` wrote.

        Raises:
            ValueError, TypeError, KeyError: if the values are not a model's.
        """
        pieces = [Piece(**piece) for piece in values["pieces"]]
        mixed = MixedLimit(*values.get("mixed", NO_MIXED))
        return cls(pieces, margin=float(values["margin"]), mixed=mixed)


def residual_quantile(values: Iterable[float], quantile: float) -> float:
    """Return the smallest value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(quantile * len(ordered)) - 1)]


def _longest_chunk(piece: Piece, limit: float, shape: BatchShape, start: int) -> int:
    """Return the largest n with piece(shape + a chunk of n tokens after ``start``) <= limit.

    The chunk adds n tokens, a sequence, start + n context and n x start + n (n + 1) / 2 pairs: a
    quadratic in n.
    """
    left = limit - piece.seconds(shape) - piece.seqs - piece.context_tokens * start
    if left < 0:
        return 0
    square = piece.attention_pairs / 2
    linear = piece.tokens + piece.context_tokens + piece.attention_pairs * (start + 0.5)
    if square == 0:
        return sys.maxsize if linear == 0 else math.floor(left / linear)
    return math.floor((math.sqrt(linear**2 + 4 * square * left) - linear) / (2 * square))
