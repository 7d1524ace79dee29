"""`Applier`: applies what a batch brought to its sequences: tokens, computed KV, counts, ends."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from typing import Protocol

from minserve.engine.batch import RunResult, Scheduled
from minserve.engine.block_pool import BlockPool
from minserve.engine.guarded_planning import GuardedPlanning
from minserve.engine.launch import Results
from minserve.engine.live_output import End, Output
from minserve.engine.recovery import failure_of
from minserve.engine.speculation.proposal import Verified
from minserve.engine.speculation.proposer import Proposer
from minserve.engine.stats import EngineStats
from minserve.outputs import OutputDelta
from minserve.request import FinishReason, RequestEvent

log = logging.getLogger(__name__)


class Finish(Protocol):
    """Ends an output, and returns its last delta."""

    def __call__(self, output: Output, end: End, error: Exception | None = None) -> OutputDelta: ...


class Applier:
    """Changes the sequences of a batch by its results. The engine core is its only caller.

    Args:
        outputs: all outputs under way, by sequence id.
        planning: told what became of drafts.
        stats: counts tokens and drafts.
        finish: called for outputs that end.
        tell: called with each delta as soon as it is there, in case that the rest fails.
    """

    def __init__(
        self,
        outputs: Mapping[str, Output],
        pool: BlockPool,
        planning: GuardedPlanning,
        stats: EngineStats,
        *,
        finish: Finish,
        tell: Callable[[OutputDelta], None],
    ) -> None:
        self._outputs, self._pool, self._planning = outputs, pool, planning
        self._stats, self._finish, self._tell = stats, finish, tell

    def apply(
        self,
        batch: SequenceOf[Scheduled],
        results: Results,
        now: float,
        proposer: Proposer | None,
        *,
        followed: bool = False,
    ) -> None:
        """Advance every sequence of a batch by its result. All tokens come now, at one time.

        Args:
            batch: the part of it whose sequences have not ended.
            proposer: who may have drafted for the batch.
            followed: the next batch runs already, so that nothing was drafted for this one.
        """
        for item in batch:
            seq_id = item.seq.seq_id
            output = self._outputs[seq_id]
            try:
                self._advance(item, output, results[seq_id], now, proposer)
                if proposer is not None and not followed:
                    self._roll_back(item, proposer)
            except Exception as error:
                log.exception("taking up the tokens of %s failed", item.seq)
                if seq_id not in self._outputs:
                    raise  # it has ended, so that this is not its own error
                self._fail(output, error)

    def _advance(
        self,
        item: Scheduled,
        output: Output,
        result: RunResult | Exception,
        now: float,
        proposer: Proposer | None,
    ) -> None:
        """Count the tokens that have run, and append those that were sampled."""
        if isinstance(result, Exception):
            self._fail(output, result)
            return
        seq, num_tokens, _ = item
        sampled = result.sampled
        if result.prompt_logprobs:
            output.add_prompt_logprobs(result.prompt_logprobs)
        if isinstance(sampled, Verified):
            if proposer is not None and seq.is_decoding:
                self._count(item, sampled)
            self._append(item, output, sampled, now)
            return
        seq.num_computed_tokens += num_tokens
        self._pool.commit(seq)
        if sampled is not None:
            self._fail(output, sampled)

    def _count(self, item: Scheduled, verified: Verified) -> None:
        """Keep count of what became of a decode's proposal."""
        num_drafted, seq = len(item.drafted), item.seq
        self._planning.verified(seq, num_drafted, verified.num_accepted)
        if num_drafted:
            seq.num_draft_tokens += num_drafted
            seq.num_accepted_tokens += verified.num_accepted
            self._stats.speculation.add(num_drafted, verified.num_accepted)

    def _append(self, item: Scheduled, output: Output, verified: Verified, now: float) -> None:
        """Append tokens as far as the output goes, and tell of them."""
        seq = item.seq
        events = seq.events
        last = events.get(RequestEvent.TOKENS)
        if last is None:
            events[RequestEvent.FIRST_TOKEN] = now
        events[RequestEvent.TOKENS] = now
        num, end = output.append(verified.tokens, now)
        self._stats.delivered(seq, num, last, now)
        # Each token but the last has its KV already.
        seq.num_computed_tokens += item.num_tokens + num - 1
        self._pool.commit(seq)
        if end is not None:
            self._tell(self._finish(output, end))
            return
        news = output.news()
        if news is not None:
            self._tell(news)

    def _roll_back(self, item: Scheduled, proposer: Proposer) -> None:
        """Leave nothing of drafts that were not accepted."""
        seq = item.seq
        if seq.seq_id in self._outputs and seq.is_decoding:
            self._pool.trim(seq)
            proposer.roll_back(seq)

    def _fail(self, output: Output, error: Exception) -> None:
        self._tell(self._finish(output, End(FinishReason.ERROR), failure_of(error)))
