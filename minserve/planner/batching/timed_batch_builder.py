"""`TimedBatchBuilder`: one iteration under construction, and the time that it will take."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import replace

from minserve.planner.batching.batch_builder import BatchBuilder
from minserve.planner.batching.draft_lengths import DraftCandidate, with_drafts
from minserve.planner.predict.eager import NO_MIXED, DraftPasses, is_eager
from minserve.planner.predict.perf_model import (
    CONTEXT_TOKEN,
    DECODE,
    EAGER,
    BatchShape,
    PerfModel,
)
from minserve.request import Sequence, SequenceState


def decodes_alone(seqs: SequenceOf[Sequence]) -> BatchShape:
    """Return the shape of a batch of these decodes and nothing else."""
    return BatchShape.of_decodes(len(seqs), sum(len(seq.token_ids) for seq in seqs))


class TimedBatchBuilder:
    """A `BatchBuilder` that also knows how long the batch will take.

    Args:
        builder: the plain batch builder.
        model: the performance model; ``None`` times nothing.

    Attributes:
        num_prefills: number of prefill chunks scheduled so far.
    """

    def __init__(self, builder: BatchBuilder, model: PerfModel | None) -> None:
        self.builder = builder
        self.model = model
        self.num_prefills = 0
        self._tokens = self._seqs = self._context = self._pairs = 0
        self._draft_steps = self._draft_tokens = 0
        # The tokens of each sequence in the first pass of the draft model.
        self._draft_lengths: list[int] = []
        drafter = builder.view.speculation
        self._draft_passes = DraftPasses() if drafter is None else drafter.passes
        self._num_decodes = 0
        pace = 1.0 if model is None else model.pace
        pieces = () if model is None else model.pieces
        # Per piece: seconds of one decode, and of each token of its context.
        self._per_decode = [(pace * p.added(DECODE), pace * p.added(CONTEXT_TOKEN)) for p in pieces]
        self._sums = [pace * p.base for p in pieces]
        self._mixed = NO_MIXED if model is None else model.mixed
        self._extra_if_eager = [pace * p.added(EAGER) for p in pieces]

    @property
    def seconds(self) -> float:
        """Predicted seconds of what is scheduled so far."""
        return max(self._sums, default=0.0) if self._seqs else 0.0

    def is_full(self, limit: float) -> bool:
        """Return True if not one more token fits within the limit in seconds."""
        if not self._seqs:
            return False
        least = (total + one for total, (one, _) in zip(self._sums, self._per_decode, strict=True))
        return self.builder.budget <= 0 or max(least, default=0.0) > limit

    def seconds_of_decodes(self, seqs: SequenceOf[Sequence]) -> float:
        """Return the predicted seconds of a batch of these decodes alone."""
        return self._predict(decodes_alone(seqs)) if seqs else 0.0

    def seconds_of_rest(self, seq: Sequence) -> float:
        """Return the predicted seconds of all that is left of a prefill, in a batch of its own."""
        start, num_tokens = seq.num_computed_tokens, seq.num_uncomputed_tokens
        return (
            0.0
            if self.model is None
            else self._predict(self.model.prefill_alone(start, num_tokens))
        )

    def _predict(self, shape: BatchShape) -> float:
        """Return the predicted seconds of a batch; 0 without a model, which times nothing."""
        return 0.0 if self.model is None else self.model.predict(shape)

    def decode(self, seq: Sequence, limit: float) -> bool:
        """Run one token of a decode if the batch then still ends within the limit in seconds.

        Returns:
            True if the token is scheduled.
        """
        context = len(seq.token_ids)
        sums = [
            total + one + each * context
            for total, (one, each) in zip(self._sums, self._per_decode, strict=True)
        ]
        if self._seqs > self._num_decodes and self._is_eager(1) and not self._is_eager():
            sums = [total + one for total, one in zip(sums, self._extra_if_eager, strict=True)]
        # The first one runs however late it is: an empty batch helps no request.
        if self._seqs and sums and max(sums) > limit:
            return False
        if self.builder.is_preempted(seq) or not self.builder.schedule(seq, 1):
            return False
        self._sums = sums
        self._tokens += 1
        self._seqs += 1
        self._num_decodes += 1
        self._context += context
        self._pairs += context
        return True

    def decodes(self, seqs: SequenceOf[Sequence], limit: float) -> list[Sequence]:
        """`decode` for each of these, in this order.

        Returns:
            those whose token is scheduled.
        """
        if self.decode_all(seqs, limit):
            return list(seqs)
        return [seq for seq in seqs if self.decode(seq, limit)]

    def decode_all(self, seqs: SequenceOf[Sequence], limit: float) -> bool:
        """Run one token of each of these decodes, where all of them fit and no prefill runs yet.

        The plan is the one that `decode` would make of them one by one, to the last digit of its
        seconds, and takes a fraction of the time.

        Returns:
            True if all are scheduled; otherwise none is, and some may still run.
        """
        if self._seqs > self._num_decodes:
            return False  # one decode more may make it an eager batch
        contexts, sums = [len(seq.token_ids) for seq in seqs], []
        for total, (one, each) in zip(self._sums, self._per_decode, strict=True):
            for context in contexts:
                total = total + one + each * context
            if total > limit:  # no coefficient is negative: if the last sum fits, all do
                return False
            sums.append(total)
        if not self.builder.schedule_all(seqs):
            return False
        self._sums = sums
        self._tokens += len(contexts)
        self._seqs += len(contexts)
        self._num_decodes += len(contexts)
        self._context += sum(contexts)
        self._pairs += sum(contexts)
        return True

    def prefill(
        self,
        seq: Sequence,
        limit: float,
        *,
        whole: bool = False,
        evict: bool = False,
    ) -> int:
        """Run a chunk as long as the limit in seconds allows, of a running or a waiting sequence.

        Args:
            whole: True to run all that is left, or nothing.
            evict: True to preempt best effort in order to start it.

        Returns:
            the number of tokens scheduled.
        """
        if (
            self.builder.budget <= 0
            or self.builder.is_preempted(seq)
            or self.builder.awaits_sibling(seq)
        ):
            return 0
        hit = (
            self.builder.view.memory.cached_prefix(seq)
            if seq.state is SequenceState.WAITING
            else None
        )
        start = seq.num_computed_tokens if hit is None else hit.num_tokens
        most = wanted = seq.num_tokens - start
        if self.model is not None:
            fitting = self.model.max_tokens_within(
                limit, self.shape, start, self._seqs - self._num_decodes
            )
            most = min(most, fitting if self._seqs else max(fitting, 1))
        if most <= 0 or (whole and most < wanted):
            return 0
        if hit is not None:
            num_tokens = self.builder.start(seq, most=most, whole=whole, evict=evict, hit=hit)
        else:
            num_tokens = self.builder.schedule(seq, most, whole=whole)
        if num_tokens:
            self._num_decodes += seq.is_decoding_behind(start)
            self._add_chunk(start, num_tokens)
        return num_tokens

    @property
    def shape(self) -> BatchShape:
        """The shape of what is scheduled so far."""
        return BatchShape(
            self._tokens,
            self._seqs,
            self._context,
            self._pairs,
            self._draft_steps,
            self._draft_tokens,
            int(self._is_eager()),
            self._drafts_eagerly(),
        )

    def _drafts_eagerly(self, *more: int) -> int:
        """Return 1 if the draft model's first pass is an eager one, with so many tokens more."""
        return int(self._draft_passes.is_eager([*self._draft_lengths, *more]))

    def _is_eager(self, more: int = 0) -> bool:
        """Return True if the batch is an eager one, once it has so many decodes more."""
        return is_eager(
            self._seqs + more, self._num_decodes + more, self._tokens + more, self._mixed
        )

    def _drafting(
        self,
        shape: BatchShape,
        candidates: SequenceOf[DraftCandidate],
        lengths: SequenceOf[int],
    ) -> BatchShape:
        """Return the shape of this batch once so many more tokens are drafted for its decodes."""
        shape = with_drafts(shape, candidates, lengths)
        eager = int(is_eager(shape.seqs, self._num_decodes, shape.tokens, self._mixed))
        return shape if shape.eager == eager else replace(shape, eager=eager)

    def speculate(
        self, candidates: SequenceOf[DraftCandidate], lengths: SequenceOf[int], limit: float
    ) -> None:
        """Draft tokens for scheduled decodes, as far as blocks, budget and the limit in seconds
        allow.

        Args:
            lengths: the most tokens for each candidate.
        """
        if self._predict(self._drafting(self.shape, candidates, lengths)) > limit:
            lengths = self._fitting(candidates, lengths, limit)
        granted = [
            self.builder.speculate(one.seq, length) if length else 0
            for one, length in zip(candidates, lengths, strict=True)
        ]
        if any(granted):
            drafted = zip(candidates, granted, strict=True)
            self._draft_lengths += [one.lag + 1 for one, length in drafted if length]
            self._grow(self._drafting(self.shape, candidates, granted))

    def _fitting(
        self, candidates: SequenceOf[DraftCandidate], lengths: SequenceOf[int], limit: float
    ) -> list[int]:
        """Return as much of these lengths as fits within the limit, first come, first served."""
        shape, fitting = self.shape, []
        for one, length in zip(candidates, lengths, strict=True):
            while length and self._predict(self._drafting(shape, [one], [length])) > limit:
                length -= 1
            shape = self._drafting(shape, [one], [length])
            fitting.append(length)
        return fitting

    def catch_up(self, one: DraftCandidate, limit: float) -> None:
        """Let the draft model run what it lacks of a sequence, as far as the limit allows."""
        shape = replace(self.shape, draft_steps=max(self._draft_steps, 1))
        num_tokens = self._caught_up(one.lag, shape, limit)
        if num_tokens > 0 and self._drafts_eagerly(num_tokens) and not shape.draft_eager:
            # Either it pays for that, or it takes no more tokens than a graph holds.
            paying = self._caught_up(one.lag, replace(shape, draft_eager=1), limit)
            most = self._draft_passes.mixed or NO_MIXED
            num_tokens = max(paying, min(num_tokens, most.max_tokens - sum(self._draft_lengths)))
        eager = self._drafts_eagerly(num_tokens) if num_tokens > 0 else 0
        if num_tokens <= 0 or (eager and self._predict(replace(shape, draft_eager=1)) > limit):
            return
        self._draft_lengths.append(num_tokens)
        self.builder.plan.catch_up[one.seq.seq_id] = num_tokens
        drafted = self._draft_tokens + num_tokens
        self._grow(replace(shape, draft_tokens=drafted, draft_eager=eager))

    def _caught_up(self, lag: int, shape: BatchShape, limit: float) -> int:
        """Return how many tokens the draft model can run beside a batch within a limit in seconds."""
        model, left = self.model, limit - self._predict(shape)
        if left <= 0:
            return 0
        token_s = 0.0
        if model is not None:
            token_s = model.drift * max(piece.draft_tokens for piece in model.pieces)
        return lag if token_s == 0 else min(lag, int(left / token_s))

    def _add_chunk(self, start: int, num_tokens: int) -> None:
        chunk, shape = BatchShape.of([(start, num_tokens)]), self.shape
        self.num_prefills += 1
        self._grow(
            replace(
                shape,
                tokens=shape.tokens + num_tokens,
                seqs=shape.seqs + 1,
                context_tokens=shape.context_tokens + chunk.context_tokens,
                attention_pairs=shape.attention_pairs + chunk.attention_pairs,
                eager=int(
                    is_eager(
                        shape.seqs + 1, self._num_decodes, shape.tokens + num_tokens, self._mixed
                    )
                ),
            )
        )

    def _grow(self, shape: BatchShape) -> None:
        """Set the shape of the batch, and the predicted seconds of each piece."""
        self._tokens, self._seqs, self._context, self._pairs = (
            shape.tokens,
            shape.seqs,
            shape.context_tokens,
            shape.attention_pairs,
        )
        self._draft_steps, self._draft_tokens = shape.draft_steps, shape.draft_tokens
        if self.model is not None:
            drift = self.model.correction(shape)
            self._sums = [drift * piece.seconds(shape) for piece in self.model.pieces]
