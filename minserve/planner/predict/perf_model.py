"""`PerfModel`: how many seconds a batch takes, and how many tokens fit in a time.

The form is that of SLOs-Serve (arXiv 2504.08784), with the terms that it lacks: the maximum
of linear pieces over (tokens, sequences, context tokens, attention pairs, draft steps, draft
tokens, eager, 1), all coefficients at least 0. A GPU has a flat piece (weights are read whatever
the batch) and a steep one (arithmetic); a CPU often needs one piece only. ``eager`` is 1 for
batches that are no CUDA graphs where decodes are (`minserve.planner.predict.eager`), which cost a
constant more; on a device without graphs its coefficient is 0.

The profile gives the coefficients once (`minserve.planner.predict.perf_fit`). Online, `observe`
follows the device's drifting speed and its scatter (`minserve.planner.predict.scatter`): `predict` is
what is expected, `bound` what it may take.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, astuple, dataclass, replace
from typing import Any

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
    """What of a batch decides its time.

    Attributes:
        tokens: tokens run, prefill and decode alike.
        seqs: sequences in the batch.
        context_tokens: over all sequences, tokens with KV after the iteration.
        attention_pairs: over all tokens run, the tokens that each attends to.
        draft_steps: forward passes of the draft model.
        draft_tokens: tokens that these run.
        eager: 1 for a batch that `minserve.planner.predict.eager.is_eager`, else 0; also 0 throughout
            the profile of a device without graphs, where it makes no difference.
    """

    tokens: int = 0
    seqs: int = 0
    context_tokens: int = 0
    attention_pairs: int = 0
    draft_steps: int = 0
    draft_tokens: int = 0
    eager: int = 0

    @classmethod
    def of(cls, chunks: Iterable[tuple[int, int]], *, eager: bool = False) -> BatchShape:
        """The shape of a batch of ``(tokens already computed, tokens to run)``, one per sequence."""
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
    """One linear piece: seconds per unit of each feature, and the constant."""

    tokens: float
    seqs: float = 0.0
    context_tokens: float = 0.0
    attention_pairs: float = 0.0
    draft_steps: float = 0.0
    draft_tokens: float = 0.0
    eager: float = 0.0
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
        )

    def slowed(self, factor: float) -> Piece:
        """The same of a device that takes so many times as long for everything."""
        return Piece(*(factor * each for each in astuple(self)))


class PerfModel:
    """Seconds of a batch as the maximum of linear pieces, corrected online.

    Args:
        pieces: at least one; together they must grow with the tokens.
        margin: factor on profiled seconds that `MARGIN_QUANTILE` of the iterations stayed within
            when the profile was made; what is seen soon counts instead.

    Attributes:
        speculation_drift: measured over profiled speed of batches with drafts, over that of all
            others: what the profile has wrong about them.
        next_factor: what the next iteration will take over its profiled time, where somebody
            knows: a simulator that asks how much knowing it would be worth.
    """

    def __init__(self, pieces: Iterable[Piece], *, margin: float = 1.1) -> None:
        self.pieces = tuple(pieces)
        if not self.pieces or not any(piece.tokens > 0 for piece in self.pieces):
            raise ValueError("a performance model needs a piece that grows with the tokens")
        if any(not c >= 0 or math.isinf(c) for piece in self.pieces for c in astuple(piece)):
            raise ValueError("coefficients must be finite and at least 0")
        if not 0 < margin < math.inf:
            raise ValueError("a margin must be finite and above 0")
        self.margin = margin
        self.speculation_drift = 1.0
        self.next_factor: float | None = None
        self._scatter = Scatter(margin, 1.0 - MARGIN_QUANTILE)
        self._newest: BatchShape | None = None

    @property
    def drift(self) -> float:
        """Measured over profiled speed, now; 1.1 is a device 10% slower than profiled."""
        return self._scatter.drift

    @drift.setter
    def drift(self, value: float) -> None:
        self._scatter.drift = value

    def bound(self, iterations: float, risk: float) -> float:
        """Factor on predicted seconds, at least 1: the sum of so many iterations in a row stays
        within it in all but ``risk`` of cases.
        """
        if self.next_factor is not None and iterations <= 1:
            return 1.0
        return self._scatter.bound(iterations, risk)

    @property
    def steepest(self) -> Piece:
        """The piece that decides where a batch is filled with prefills."""
        return max(self.pieces, key=lambda piece: piece.tokens)

    def profiled(self, shape: BatchShape) -> float:
        """Seconds by the profile alone: what promises are made from, stable over time."""
        return max(piece.seconds(shape) for piece in self.pieces)

    def risk(self, factor: float) -> float:
        """Chance that an iteration takes more than so many times its predicted seconds."""
        if self.next_factor is not None:
            return float(factor < 1.0)
        return self._scatter.risk(factor)

    def predict(self, shape: BatchShape) -> float:
        """Seconds that the batch is expected to take now: the mean of what it may take."""
        return self.correction(shape) * self.profiled(shape)

    @property
    def pace(self) -> float:
        """Of the next iteration, over the profiled speed."""
        return self.drift if self.next_factor is None else self.next_factor

    def correction(self, shape: BatchShape) -> float:
        """The next iteration's seconds over the profiled ones, for such a batch."""
        return self.pace * self.speculation_drift if shape.draft_steps else self.pace

    def zero_load_prefill_s(self, num_tokens: int) -> float:
        """T(prompt) of the idle device, for ``ttft_slowdown``."""
        return self.profiled(BatchShape.of([(0, num_tokens)], eager=True))

    def zero_load_decode_s(self, context_tokens: int) -> float:
        """Seconds per token of a lone request, for ``tpot_slowdown``."""
        return self.profiled(BatchShape.of([(context_tokens, 1)]))

    def max_tokens_within(self, seconds: float, shape: BatchShape, start: int = 0) -> int:
        """The longest prefill chunk that fits beside a batch.

        Args:
            seconds: for the whole batch, by `predict`.
            shape: the batch without the chunk, which makes it an eager one.
            start: tokens of the chunk's sequence that are computed already.

        Returns:
            0 where not one token fits.
        """
        limit, shape = seconds / self.pace, replace(shape, eager=1)
        return max(0, min(_longest_chunk(piece, limit, shape, start) for piece in self.pieces))

    def observe(self, shape: BatchShape, seconds: float) -> None:
        """Learn from an iteration that took so long."""
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

    def with_draft_costs(self, step_s: float, token_s: float) -> PerfModel:
        """The same device with a draft model, which runs before the target.

        Args:
            step_s, token_s: seconds of each forward pass, and of each token in it.
        """
        pieces = [replace(p, draft_steps=step_s, draft_tokens=token_s) for p in self.pieces]
        return PerfModel(pieces, margin=self.margin)

    def refined(self, profiled: PerfModel) -> PerfModel:
        """A better profile of the same device, made while this model followed it.

        How the times scatter is known as before, and so are the costs of drafts. What was learned
        of the speed is relative to a profile: a batch like the newest one is expected to take
        what it was, until the next iterations show what of that was the old profile's error.
        """
        step_s, token_s = self.pieces[0].draft_steps, self.pieces[0].draft_tokens
        model = profiled.with_draft_costs(step_s, token_s)
        if self._newest is None:
            return model
        model._newest, model.speculation_drift = self._newest, self.speculation_drift
        factor = self.profiled(self._newest) / model.profiled(self._newest)
        model._scatter = self._scatter.rescaled(factor)
        return model

    def to_dict(self) -> dict[str, Any]:
        """The profile, ready for JSON; the online correction is left out."""
        return {"pieces": [asdict(piece) for piece in self.pieces], "margin": self.margin}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PerfModel:
        """A model as `to_dict` wrote it.

        Raises:
            ValueError, TypeError, KeyError: where it is not one.
        """
        pieces = [Piece(**piece) for piece in values["pieces"]]
        return cls(pieces, margin=float(values["margin"]))


def residual_quantile(values: Iterable[float], quantile: float) -> float:
    """The smallest value that at least that share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(quantile * len(ordered)) - 1)]


def _longest_chunk(piece: Piece, limit: float, shape: BatchShape, start: int) -> int:
    """Largest n with piece(shape + a chunk of n tokens after ``start``) <= limit.

    The chunk adds n tokens, a sequence, start + n context and n x start + n (n + 1) / 2
    pairs: a quadratic in n.
    """
    left = limit - piece.seconds(shape) - piece.seqs - piece.context_tokens * start
    if left < 0:
        return 0
    square = piece.attention_pairs / 2
    linear = piece.tokens + piece.context_tokens + piece.attention_pairs * (start + 0.5)
    if square == 0:
        return sys.maxsize if linear == 0 else math.floor(left / linear)
    return math.floor((math.sqrt(linear**2 + 4 * square * left) - linear) / (2 * square))
