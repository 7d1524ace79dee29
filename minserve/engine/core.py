"""`EngineCore`: the loop's four verbs: plan, run, apply, publish.

Single-threaded and without I/O: engines add and abort requests between two steps and
pass on the deltas that a step returns. What an iteration has brought is told even if the rest
of it fails; what goes wrong with one request ends it alone. Nothing but this file and
`LiveOutput`, which appends tokens for it, changes a `Sequence`.

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
from minserve.engine.device.runner import Runner, RunResult, Scheduled
from minserve.engine.live_output import NO_HISTORY, History, LiveOutput
from minserve.engine.lookahead import PlanAhead, confirm, project
from minserve.engine.speculation.proposer import DraftRequest, Proposer
from minserve.engine.speculation.verification import Proposal, SampledToken, Verified
from minserve.engine.stats import EngineStats
from minserve.engine.text.detokenizer import IncrementalDetokenizer
from minserve.errors import (
    DeviceLostError,
    GenerationError,
    InvalidPlanError,
    MinserveError,
    OutOfBlocksError,
)
from minserve.outputs import OutputDelta
from minserve.planner.plan import IterationPlan, PlannerView
from minserve.planner.plan_check import faults_of
from minserve.planner.policies.base import Planner
from minserve.request import FinishReason, RequestEvent, Sequence, SequenceState, by_rank
from minserve.slo.objectives import Standing

log = logging.getLogger(__name__)

# Seconds without work after which the pool's books are checked.
IDLE_S = 0.5


class EngineCore:
    """Runs sequences to their end.

    Args:
        runner: carries out batches; must not change sequences.
        max_model_len: most tokens of a sequence; whoever adds one sees to it.
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
        runner: Runner,
        pool: BlockPool,
        planner: Planner,
        *,
        token_budget: int,
        max_num_seqs: int,
        max_model_len: int,
        clock: Callable[[], float],
        proposer: Proposer | None = None,
        plans_ahead: bool = False,
    ) -> None:
        self.runner = runner
        self.pool = pool
        self.planner = planner
        self.token_budget = token_budget
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
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
        self._untold: list[OutputDelta] = []

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
        if request_id not in self._by_request or not self._request_has_not_begun(request_id):
            return False
        for seq_id in self._by_request.pop(request_id):
            self.waiting.remove(self._outputs.pop(seq_id).seq)
        return True

    def step(self) -> list[OutputDelta]:
        """One iteration. Returns what is to be published; `take_untold` does where it fails."""
        started = self.clock()
        self.declined = []
        plan = self._checked(self.plan())
        self._settle(plan)
        batch = self._start(plan)
        self.planner.started(plan)
        if batch:
            batch = self._draft(batch, plan)
            self.stats.batch(batch)
            ends_at = started + (plan.predicted_s or 0.0)
            results = self.run(batch, lambda: self._plan_ahead(batch, ends_at))
            self._apply(batch, results)
            seconds = self.clock() - started
            self.planner.observe(plan, seconds)
            model = self.planner.model
            profiled_s = None if model is None else model.profiled(plan.shape)
            self.stats.iteration(plan.predicted_s, profiled_s, seconds)
        return self.take_untold()

    def take_untold(self) -> list[OutputDelta]:
        """What no step has returned, since it failed; each delta is told once."""
        deltas, self._untold = self._untold, []
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
        """Check the pool's books; takes milliseconds, so only after `IDLE_S` without work.

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
                plan = self._ask_planner(view, at)
                if faults := faults_of(plan, view):
                    raise InvalidPlanError(f"the plan contradicts itself or the state: {faults}")
                self._ahead = PlanAhead.of(plan, view)
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

    def _checked(self, plan: IterationPlan) -> IterationPlan:
        """What of a plan can be carried out; whom it contradicts itself about ends here."""
        view = self.view()
        faults = faults_of(plan, view)
        if not faults:
            return plan
        for seq_id, fault in faults.items():
            if seq_id in self._outputs:
                self._end_request(self._outputs[seq_id].seq, f"{seq_id} {fault}")
            else:
                log.error("a plan of %s names %s, which %s", self.planner.name, seq_id, fault)
        plan = plan.only(self._outputs)
        self.planner.reckon(plan, view)
        return plan

    def _end_request(self, seq: Sequence, why: str) -> None:
        """End a request that a plan cannot be carried out for."""
        log.error("a plan of %s cannot be carried out: %s", self.planner.name, why)
        error = InvalidPlanError(f"the plan for this request cannot be carried out: {why}")
        self._untold += self.abort(seq.request.request_id, error)

    def _settle(self, plan: IterationPlan) -> None:
        """Carry out what the planner promises, gives up and refuses."""
        for seq_id in plan.admit:
            self._outputs[seq_id].seq.standing = Standing.ADMITTED
        for seq_id in plan.relegate:
            self._outputs[seq_id].seq.standing = Standing.BEST_EFFORT
        self.declined = self._unpromised(plan)
        for seq_id, refusal in plan.reject.items():
            if seq_id in self._outputs:  # a sibling's refusal may have ended it already
                request_id = self._outputs[seq_id].seq.request.request_id
                self._untold += self.abort(request_id, refusal.error())

    def _unpromised(self, plan: IterationPlan) -> list[str]:
        """Ids of requests that a plan promises nothing and that have not begun."""
        seqs = [self._outputs[seq_id].seq for seq_id in (*plan.declined, *plan.relegate)]
        ids = dict.fromkeys(seq.request.request_id for seq in seqs)
        return [one for one in ids if self._request_has_not_begun(one)]

    def _request_has_not_begun(self, request_id: str) -> bool:
        outputs = (self._outputs[seq_id] for seq_id in self._by_request[request_id])
        return not any(output.seq.has_begun for output in outputs)

    def _start(self, plan: IterationPlan) -> list[Scheduled]:
        """Carry out preemptions and starts, and make room for the scheduled tokens."""
        for seq_id in plan.preempt:
            self._preempt(self._outputs[seq_id].seq)
        # All prefix hits are attached before any block is handed out, lest the growth of one
        # sequence evict another's hit.
        for seq_id in plan.start:
            self._start_one(self._outputs[seq_id].seq)
        batch = []
        for seq_id, num_tokens in plan.num_scheduled_tokens.items():
            if seq_id not in self._outputs:
                continue  # a sibling has ended it
            seq = self._outputs[seq_id].seq
            try:
                self.pool.grow(seq, num_tokens)
            except OutOfBlocksError as error:
                self._end_request(seq, str(error))
            else:
                batch.append(Scheduled(seq, num_tokens - plan.speculation.get(seq_id, 0)))
        return [item for item in batch if item.seq.state is SequenceState.RUNNING]

    def _draft(self, batch: list[Scheduled], plan: IterationPlan) -> list[Scheduled]:
        """The batch with the proposals that the plan asks for."""
        if self.proposer is None or not (plan.speculation or plan.catch_up):
            return batch
        wanted = [
            DraftRequest(item.seq, plan.speculation.get(seq_id, 0), plan.catch_up.get(seq_id, 0))
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
            launched = self.runner.launch(batch)
            meanwhile()
            return dict(launched.results())
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

    def _apply(
        self, batch: SequenceOf[Scheduled], results: Mapping[str, RunResult | Exception]
    ) -> None:
        """Advance every sequence of the batch by its result."""
        for item in batch:
            output = self._outputs[item.seq.seq_id]
            try:
                self._advance(item, output, results[item.seq.seq_id])
            except Exception as error:
                log.exception("taking up the tokens of %s failed", item.seq)
                if item.seq.seq_id not in self._outputs:
                    raise  # it has ended, so that this is not its own error
                self._untold.append(self._fail(output, error))

    def _advance(self, item: Scheduled, output: LiveOutput, result: RunResult | Exception) -> None:
        if isinstance(result, Exception):
            self._untold.append(self._fail(output, result))
            return
        seq = item.seq
        if seq.num_computed_tokens == 0:
            output.prompt_logprobs.clear()
        if not output.told_prompt:
            output.prompt_logprobs += result.prompt_logprobs
        seq.num_computed_tokens += item.num_tokens
        self.pool.commit(seq)
        if isinstance(result.sampled, GenerationError):
            self._untold.append(self._fail(output, result.sampled))
        elif result.sampled is not None:
            self._count(item, result.sampled)
            self._untold.append(self._append(output, result.sampled.tokens))
            self._roll_back(item)

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
        wants_text = output.detokenizer is not None and reason is not FinishReason.ERROR
        if wants_text and not isinstance(stop_reason, str):
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

    def _start_one(self, seq: Sequence) -> None:
        seq.num_computed_tokens = self.pool.attach(seq)
        now = self.clock()
        if seq.num_preemptions == 0:
            seq.num_cached_tokens = seq.num_computed_tokens
            self.stats.started(seq, now)
        seq.state = SequenceState.RUNNING
        seq.events[RequestEvent.SCHEDULED] = now
        self.waiting.remove(seq)
        insort(self.running, seq, key=by_rank)

    def _release(self, seq: Sequence) -> None:
        self.pool.release(seq)
        if self.proposer is not None:
            self.proposer.forget(seq)

    def _preempt(self, seq: Sequence) -> None:
        """Give up the blocks; the tokens stay and are computed again at its next start."""
        self._release(seq)
        seq.num_computed_tokens = 0
        seq.num_preemptions += 1
        seq.state = SequenceState.WAITING
        seq.events[RequestEvent.PREEMPTED] = self.clock()
        self.running.remove(seq)
        insort(self.waiting, seq, key=by_rank)
