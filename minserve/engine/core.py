"""`EngineCore`: the loop's four verbs: plan, run, apply, publish.

Single-threaded and without I/O: engines add and abort requests between two steps and
pass on the deltas that a step returns. Nothing but this file and `LiveOutput`, which appends
tokens for it, changes a `Sequence`.

Where the device runs by itself, an iteration is planned while the one before it runs
(`minserve.engine.lookahead`)::

    host     settle start launch │ plan the next │ wait   apply │ settle start launch │ ...
    device                       └─ batch ───────────────┘      └─ ...                └─ batch
"""

from __future__ import annotations

import logging
from bisect import insort
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

from minserve.engine.block_pool import BlockPool
from minserve.engine.detokenizer import IncrementalDetokenizer
from minserve.engine.live_output import NO_HISTORY, History, LiveOutput
from minserve.engine.lookahead import PlanAhead, confirm, project
from minserve.engine.runner import ModelRunner, RunResult, Scheduled
from minserve.engine.speculator import Proposer, Wanted
from minserve.engine.stats import EngineStats
from minserve.engine.verification import Proposal, SampledToken, Verified
from minserve.errors import (
    DeviceLostError,
    GenerationError,
    MinserveError,
    SLOUnattainableError,
)
from minserve.outputs import OutputDelta
from minserve.planner.plan import IterationPlan, PlannerView, Refusal
from minserve.planner.policies import Planner
from minserve.request import FinishReason, RequestEvent, Sequence, SequenceState, by_rank
from minserve.slo import Standing

log = logging.getLogger(__name__)

# Seconds without work after which the pool's books are checked.
IDLE_S = 0.5


class EngineCore:
    """Runs sequences to their end.

    Args:
        runner: carries out batches; must not change sequences.
        clock: monotonic seconds.
        proposer: drafts tokens where the planner asks for it; ``None`` never does.
        plans_ahead: plan each iteration while the one before it runs. Worth it where the
            device does not need the thread that plans; otherwise a plan made at the last
            moment knows more.

    Attributes:
        stats: what was counted so far; `snapshot` adds what others count.
        declined: ids of the requests that the newest plan promises nothing and that have not
            begun: another engine may have room for them.
        speculation: of these, what was drafted and accepted.
    """

    def __init__(
        self,
        runner: ModelRunner,
        pool: BlockPool,
        planner: Planner,
        *,
        token_budget: int,
        max_num_seqs: int,
        clock: Callable[[], float],
        proposer: Proposer | None = None,
        plans_ahead: bool = False,
    ) -> None:
        self.runner = runner
        self.pool = pool
        self.planner = planner
        self.token_budget = token_budget
        self.max_num_seqs = max_num_seqs
        self.clock = clock
        self.proposer = proposer
        self.plans_ahead = plans_ahead
        self.stats = EngineStats()
        self.speculation = self.stats.speculation
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.declined: list[str] = []
        self._ahead: PlanAhead | None = None
        self._outputs: dict[str, LiveOutput] = {}
        self._by_request: dict[str, list[str]] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._outputs)

    @property
    def num_unfinished(self) -> int:
        """Outputs waiting or running."""
        return len(self._outputs)

    def add(
        self,
        seq: Sequence,
        detokenizer: IncrementalDetokenizer | None,
        marker_ids: Mapping[str, int] | None = None,
        history: History = NO_HISTORY,
    ) -> None:
        """Queue a sequence whose request fits the model and the pool.

        Args:
            marker_ids: of the SLO's stage markers, those that are one token (and may be
                missing from the text, as special tokens are).
            history: what was told of it before, by another engine; it goes on behind that as
                if it had been preempted here.
        """
        seq.events[RequestEvent.QUEUED] = self.clock()
        output = LiveOutput(seq, detokenizer, marker_ids or {})
        self._outputs[seq.seq_id] = output
        if history.token_ids:
            output.recall(history)
        self._by_request.setdefault(seq.request.request_id, []).append(seq.seq_id)
        insort(self.waiting, seq, key=by_rank)

    def abort(self, request_id: str, error: MinserveError | None = None) -> list[OutputDelta]:
        """End all outputs of a request now and free their blocks; unknown ids are ignored.

        Returns:
            a last delta for each, ERROR where an error is given, else ABORT.
        """
        reason = FinishReason.ABORT if error is None else FinishReason.ERROR
        return [
            self._finish(self._outputs[seq_id], reason, error=error)
            for seq_id in list(self._by_request.get(request_id, ()))
        ]

    def abort_all(self, error: MinserveError) -> list[OutputDelta]:
        """`abort` for every request."""
        return [d for request_id in list(self._by_request) for d in self.abort(request_id, error)]

    def withdraw(self, request_id: str) -> bool:
        """Forget a request, unless one of its outputs has begun: then it stays."""
        seqs = [self._outputs[seq_id].seq for seq_id in self._by_request.get(request_id, ())]
        if not seqs or not all(_has_not_begun(seq) for seq in seqs):
            return False
        for seq in seqs:
            self.waiting.remove(seq)
            del self._outputs[seq.seq_id]
        del self._by_request[request_id]
        return True

    def step(self) -> list[OutputDelta]:
        """One iteration. Returns what is to be published."""
        started = self.clock()
        plan = self.plan()
        deltas = self._settle(plan)
        batch = self._start(plan)
        self.planner.started(plan)
        if batch:
            batch = self._draft(batch, plan)
            self.stats.batch(batch)
            ends_at = started + (plan.predicted_s or 0.0)
            results = self.run(batch, lambda: self._plan_ahead(batch, ends_at))
            deltas += self.apply(batch, results)
            seconds = self.clock() - started
            self.planner.observe(plan, seconds)
            model = self.planner.model
            profiled_s = None if model is None else model.profiled(plan.shape)
            self.stats.iteration(plan.predicted_s, profiled_s, seconds)
        return deltas

    def snapshot(self) -> EngineStats:
        """What was counted so far and how things stand, as a copy; between two steps."""
        pool = self.pool
        return self.stats.copy(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            kv_usage=1 - pool.num_free_blocks / pool.num_blocks,
            num_prefix_queries=pool.prefix_queries_tokens,
            num_prefix_hits=pool.prefix_hits_tokens,
            num_preemptions=self.planner.num_preemptions,
        )

    def check_integrity(self) -> None:
        """Check the pool's books against what runs. Takes milliseconds where the pool is large,
        so it is for engines that have been idle for `IDLE_S`.

        Raises:
            PoolCorruptedError: where blocks were lost or given twice, which is a bug.
        """
        self.pool.check_integrity(self.running)

    def plan(self) -> IterationPlan:
        """What runs now: as planned ahead, where that still holds, else as planned now."""
        view, ahead, self._ahead = self.view(), self._ahead, None
        if ahead is not None:
            plan = confirm(ahead, view, self.clock())
            self.stats.plans_ahead["discarded" if plan is None else "held"] += 1
            if plan is not None:
                if plan is not ahead.plan:
                    self.planner.reckon(plan, view)
                return plan
            self.planner.discarded()
        return self._ask_planner(view, self.clock())

    def _plan_ahead(self, batch: SequenceOf[Scheduled], ends_at: float) -> None:
        """Plan the next iteration while a batch runs."""
        if not self.plans_ahead:
            return
        at = max(ends_at, self.clock())
        try:
            view = project(self.view(), batch, at)
            if view.running or view.waiting:
                self._ahead = PlanAhead.of(self._ask_planner(view, at), view)
        except Exception:
            # What the batch brings must not be lost. Without a plan the next step makes one.
            self.planner.discarded()
            log.exception("planning ahead failed; the next iteration is planned when it is due")

    def view(self) -> PlannerView:
        """The state as the planner sees it."""
        return PlannerView(
            waiting=self.waiting,
            running=self.running,
            memory=self.pool,
            token_budget=self.token_budget,
            max_num_seqs=self.max_num_seqs,
            speculation=self.proposer,
        )

    def _ask_planner(self, view: PlannerView, now: float) -> IterationPlan:
        started = self.clock()
        plan = self.planner.plan(view, now)
        self.stats.planning_s.observe(self.clock() - started)
        return plan

    def _settle(self, plan: IterationPlan) -> list[OutputDelta]:
        """Carry out what the planner promises, gives up and refuses."""
        for seq_id in plan.promote:
            self._outputs[seq_id].seq.standing = Standing.ADMITTED
        for seq_id in plan.relegate:
            self._outputs[seq_id].seq.standing = Standing.BEST_EFFORT
        self.declined = self._unpromised(plan)
        deltas = []
        for seq_id, refusal in plan.reject.items():
            if seq_id in self._outputs:  # a sibling's refusal may have ended it already
                deltas += self._refuse(self._outputs[seq_id].seq, refusal)
        return deltas

    def _unpromised(self, plan: IterationPlan) -> list[str]:
        """Ids of requests that a plan promises nothing and that have not begun."""
        seqs = [self._outputs[seq_id].seq for seq_id in (*plan.declined, *plan.relegate)]
        return list(dict.fromkeys(s.request.request_id for s in seqs if _has_not_begun(s)))

    def _refuse(self, seq: Sequence, refusal: Refusal) -> list[OutputDelta]:
        """End the whole request of a sequence that has not begun."""
        error = SLOUnattainableError(
            f"the SLO cannot be kept now (too little {refusal.reason}); "
            f"try again in {refusal.retry_after_s:.1f} s",
            reason=refusal.reason,
            retry_after_s=refusal.retry_after_s,
        )
        return self.abort(seq.request.request_id, error)

    def _start(self, plan: IterationPlan) -> list[Scheduled]:
        """Carry out preemptions and admissions and make room for the scheduled tokens."""
        for seq_id in plan.preempt:
            self._preempt(self._outputs[seq_id].seq)
        # Hits of all admissions are taken before any block is handed out, lest one
        # admission's growth evict another's hit.
        for seq_id in plan.admit:
            self._admit(self._outputs[seq_id].seq)
        batch = []
        for seq_id, num_tokens in plan.num_scheduled_tokens.items():
            seq = self._outputs[seq_id].seq
            self.pool.grow(seq, num_tokens)
            batch.append(Scheduled(seq, num_tokens - plan.speculation.get(seq_id, 0)))
        return batch

    def _draft(self, batch: list[Scheduled], plan: IterationPlan) -> list[Scheduled]:
        """The batch with the proposals that the plan asks for."""
        if self.proposer is None or not (plan.speculation or plan.catch_up):
            return batch
        wanted = [
            Wanted(item.seq, plan.speculation.get(seq_id, 0), plan.catch_up.get(seq_id, 0))
            for item in batch
            if (seq_id := item.seq.seq_id) in plan.speculation or seq_id in plan.catch_up
        ]
        proposals: dict[str, Proposal] = {}
        try:
            proposals = self.proposer.propose(wanted)
        except Exception:
            # Nobody's request depends on a guess.
            log.exception("drafting failed; this iteration goes on without")
            for one in wanted:
                self.proposer.forget(one.seq)
        return [replace(item, proposal=proposals.get(item.seq.seq_id)) for item in batch]

    def run(
        self, batch: SequenceOf[Scheduled], meanwhile: Callable[[], None] = lambda: None
    ) -> dict[str, RunResult | Exception]:
        """Run the batch; where that fails, each sequence alone, to find whose error it is.

        Args:
            meanwhile: called while the device has the batch; must not raise.

        Raises:
            DeviceLostError: where it is nobody's: the device is beyond running anything.
        """
        try:
            flight = self.runner.launch(batch)
            meanwhile()
            return dict(flight.results())
        except Exception as error:
            if self.runner.is_lost:
                raise DeviceLostError(
                    f"{self.runner.device} runs nothing any more; restart the process ({error})"
                ) from error
            if len(batch) == 1:
                log.exception("running %s failed", batch[0].seq)
                return {batch[0].seq.seq_id: error}
            log.warning("a batch failed (%s); running its sequences one by one", error)
            return {k: v for item in batch for k, v in self.run([item]).items()}

    def apply(
        self, batch: SequenceOf[Scheduled], results: dict[str, RunResult | Exception]
    ) -> list[OutputDelta]:
        """Advance every sequence of the batch by its result."""
        deltas = []
        for item in batch:
            output, result = self._outputs[item.seq.seq_id], results[item.seq.seq_id]
            if isinstance(result, Exception):
                deltas.append(self._fail(output, result))
                continue
            seq = item.seq
            if seq.num_computed_tokens == 0:
                output.prompt_logprobs.clear()
            if not output.told_prompt:
                output.prompt_logprobs += result.prompt_logprobs
            seq.num_computed_tokens += item.num_tokens
            self.pool.commit(seq)
            if isinstance(result.sampled, GenerationError):
                deltas.append(self._fail(output, result.sampled))
            elif result.sampled is not None:
                self._count(item, result.sampled)
                deltas.append(self._append(output, result.sampled.tokens))
                self._roll_back(item)
        return deltas

    def _count(self, item: Scheduled, verified: Verified) -> None:
        """Keep count of what became of a proposal."""
        num_drafted, seq = len(item.drafted), item.seq
        if self.proposer is not None:
            self.planner.verified(seq, num_drafted, verified.num_accepted)
        if num_drafted:
            seq.num_draft_tokens += num_drafted
            seq.num_accepted_tokens += verified.num_accepted
            self.speculation.add(num_drafted, verified.num_accepted)

    def _roll_back(self, item: Scheduled) -> None:
        """Leave nothing of the drafts that were not accepted."""
        seq = item.seq
        if self.proposer is not None and seq.state is SequenceState.RUNNING:
            self.pool.trim(seq)
            self.proposer.roll_back(seq)

    def _append(self, output: LiveOutput, tokens: SequenceOf[SampledToken]) -> OutputDelta:
        """Append tokens, each behind the KV of the one before it, as far as the output goes."""
        seq, now = output.seq, self.clock()
        self.stats.delivered(seq, now)
        seq.events.setdefault(RequestEvent.FIRST_TOKEN, now)
        seq.events[RequestEvent.TOKENS] = now
        text, end = output.append(tokens[0].token_id, now)
        num = 1
        while end is None and num < len(tokens):
            seq.num_computed_tokens += 1
            self.pool.commit(seq)
            more_text, end = output.append(tokens[num].token_id, now)
            text, num = text + more_text, num + 1
        self.stats.num_generation_tokens += num
        news = {
            "text": text,
            "token_ids": tuple([token.token_id for token in tokens[:num]]),
            "logprobs": None
            if tokens[0].logprob is None
            else tuple([token.logprob for token in tokens[:num]]),
        }
        if end is None:
            return output.delta(**news)
        return self._finish(output, end.reason, stop_reason=end.stop_reason, **news)

    def _fail(self, output: LiveOutput, error: Exception) -> OutputDelta:
        if not isinstance(error, MinserveError):
            error = GenerationError(f"generation failed: {type(error).__name__}: {error}")
        return self._finish(output, FinishReason.ERROR, error=error)

    def _finish(
        self,
        output: LiveOutput,
        reason: FinishReason,
        *,
        text: str = "",
        stop_reason: str | int | None = None,
        **news: object,
    ) -> OutputDelta:
        """End a sequence, free its blocks and forget it."""
        seq = output.seq
        if output.detokenizer is not None and not isinstance(stop_reason, str):
            text += output.detokenizer.flush()
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self.planner.finished(seq)
        delta = output.delta(
            text=text,
            finish_reason=reason,
            stop_reason=stop_reason,
            slo=output.report(news.get("error")),
            **news,
        )
        (self.running if seq.state is SequenceState.RUNNING else self.waiting).remove(seq)
        self._release(seq)
        seq.state = SequenceState.FINISHED
        seq.finish_reason, seq.stop_reason = reason, stop_reason
        seq.events[RequestEvent.FINISHED] = self.clock()
        self.stats.ended(seq, delta.slo)
        del self._outputs[seq.seq_id]
        siblings = self._by_request[seq.request.request_id]
        siblings.remove(seq.seq_id)
        if not siblings:
            del self._by_request[seq.request.request_id]
        return delta

    def _admit(self, seq: Sequence) -> None:
        seq.num_computed_tokens = self.pool.admit(seq)
        now = self.clock()
        if seq.num_preemptions == 0:
            seq.num_cached_tokens = seq.num_computed_tokens
            self.stats.admitted(seq, now)
        seq.state = SequenceState.RUNNING
        seq.events[RequestEvent.SCHEDULED] = now
        self.waiting.remove(seq)
        insort(self.running, seq, key=by_rank)

    def _release(self, seq: Sequence) -> None:
        self.pool.release(seq)
        if self.proposer is not None:
            self.proposer.forget(seq)

    def _preempt(self, seq: Sequence) -> None:
        """Give up the blocks; the tokens stay and are computed again at the next admission."""
        self._release(seq)
        seq.num_computed_tokens = 0
        seq.num_preemptions += 1
        seq.state = SequenceState.WAITING
        seq.events[RequestEvent.PREEMPTED] = self.clock()
        self.running.remove(seq)
        insort(self.waiting, seq, key=by_rank)


def _has_not_begun(seq: Sequence) -> bool:
    return seq.state is SequenceState.WAITING and seq.num_output_tokens == 0
