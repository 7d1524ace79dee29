"""`EngineCore`: the loop's four verbs: plan, run, apply, publish.

Single-threaded and without I/O: engines add and abort requests between two steps and
pass on the deltas that a step returns. What an iteration has brought is told even if the rest
of it fails; what goes wrong with one request ends it alone. Nothing but this file, the
`SequenceTable` that it keeps and the `Output`, which appends tokens for it, changes a `Sequence`.

An iteration has two halves. `begin` ends when the device has the batch, and `end` waits for its
results: `step` is both. On a virtual clock each half is an event of its own. Where the device
runs by itself, an iteration is planned while the one before it runs (`minserve.engine.lookahead`)::

    half     begin ............................. end ......... begin ...
    host     settle start launch │ plan the next │ wait   apply │ settle start launch │ ...
    device                       └─ batch ───────────────┘      └─ ...                └─ batch
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

from minserve.engine.batch import BatchRunner, RunResult, Scheduled
from minserve.engine.block_pool import BlockPool, HoldWish
from minserve.engine.guarded_planning import GuardedPlanning
from minserve.engine.journal import NoJournal
from minserve.engine.launch import Launch, Results
from minserve.engine.live_output import NO_HISTORY, End, History, LiveOutput, Output
from minserve.engine.lookahead import PlanAhead, confirm, project
from minserve.engine.recovery import last_words
from minserve.engine.sequence_table import SequenceTable
from minserve.engine.speculation.drafted_batch import with_proposals
from minserve.engine.speculation.proposal import Verified
from minserve.engine.speculation.proposer import Proposer
from minserve.engine.stats import EngineStats
from minserve.engine.structures.unready import Unready
from minserve.engine.text.detokenizer import IncrementalDetokenizer
from minserve.errors import (
    GenerationError,
    InvalidPlanError,
    MinserveError,
    OutOfBlocksError,
)
from minserve.outputs import OutputDelta
from minserve.planner.plan import IterationPlan, PlannerView
from minserve.planner.plan_check import faults_of
from minserve.planner.policies.base import Planner
from minserve.request import FinishReason, RequestEvent, Sequence, SequenceState
from minserve.slo.objectives import Standing

log = logging.getLogger(__name__)

# Seconds without work after which the pool's books are checked.
IDLE_S = 0.5


class _InFlight(NamedTuple):
    """An iteration between its two halves.

    Attributes:
        began_s: when it began, planning included.
    """

    plan: IterationPlan
    batch: list[Scheduled]
    began_s: float
    launch: Launch


class EngineCore:
    """Runs sequences to their end.

    Args:
        runner: carries out batches; must not change sequences.
        max_model_len: most tokens of a sequence; the caller of `add` sees to it.
        clock: monotonic seconds.
        proposer: drafts tokens where the planner asks for it; ``None`` never does.
        safe_planner: plans in the planner's place where that fails; ``None`` raises its errors.
        plans_ahead: plan each iteration while the one before it runs. Worth it where the
            device does not need the thread that plans; otherwise a plan made at the last
            moment knows more.
        stats: counts what happens; ``None`` makes new ones.

    Attributes:
        stats: all that was counted so far; `snapshot` adds what others count.
        journal: told of each batch and end, where somebody may look at what the engine does.
        declined: ids of the requests that the newest plan promises nothing and that have not
            begun: another engine may have room for them.
        speculation: of the stats, what was drafted and accepted.
        table: the outputs under way.
    """

    def __init__(
        self,
        runner: BatchRunner,
        pool: BlockPool,
        planner: Planner,
        *,
        token_budget: int,
        max_num_seqs: int,
        max_model_len: int,
        clock: Callable[[], float],
        proposer: Proposer | None = None,
        safe_planner: Planner | None = None,
        plans_ahead: bool = False,
        stats: EngineStats | None = None,
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
        self.stats = EngineStats() if stats is None else stats
        self.planning = GuardedPlanning(planner, safe_planner, self.stats.planner_fallbacks)
        self.speculation = self.stats.speculation
        self.journal = NoJournal()
        self.table = SequenceTable()
        self.waiting, self.running = self.table.waiting, self.table.running
        self.declined: list[str] = []
        self._unready = Unready()
        self._ahead: PlanAhead | None = None
        self._in_flight: _InFlight | None = None
        self._untold: list[OutputDelta] = []

    @property
    def has_work(self) -> bool:
        return bool(self.table.outputs)

    @property
    def num_unfinished(self) -> int:
        """The number of outputs that wait or run."""
        return len(self.table.outputs)

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
            history: the part of it that was told before, by another engine; it goes on behind
                that as if it had been preempted here.
        """
        output = LiveOutput(seq, detokenizer, marker_ids or {})
        if history.token_ids:
            output.recall(history)
        self.enqueue(output)

    def enqueue(self, output: Output) -> None:
        """Queue an output, whose request fits the model and the pool."""
        output.seq.events[RequestEvent.QUEUED] = self.clock()
        self.table.add(output)
        self._unready.add(output)

    def abort(self, request_id: str, error: MinserveError | None = None) -> list[OutputDelta]:
        """End all outputs of a request now and free their blocks; unknown ids are ignored.

        Not allowed between the halves of an iteration: the device may still write to the blocks.

        Returns:
            a last delta for each, ERROR where an error is given, else ABORT.
        """
        assert self._in_flight is None, "blocks of a running batch cannot be freed"
        end = End(FinishReason.ABORT if error is None else FinishReason.ERROR)
        return [self._finish(one, end, error) for one in self.table.of_request(request_id)]

    def complete(self, request_id: str) -> list[OutputDelta]:
        """End all outputs of a request now, as if each had come to its end; as `abort` otherwise."""
        assert self._in_flight is None, "blocks of a running batch cannot be freed"
        end = End(FinishReason.STOP)
        return [self._finish(one, end) for one in self.table.of_request(request_id)]

    def abort_all(self, error: MinserveError) -> list[OutputDelta]:
        """`abort` for every request."""
        return [delta for one in self.table.request_ids for delta in self.abort(one, error)]

    def withdraw(self, request_id: str) -> bool:
        """Forget a request, unless one of its outputs has begun: then it stays."""
        outputs = self.table.of_request(request_id)
        if not outputs or self.table.has_begun(request_id):
            return False
        for output in outputs:
            self.table.remove(output.seq)
        return True

    def step(self) -> list[OutputDelta]:
        """Run one iteration.

        Returns:
            all deltas that are to be published; `take_untold` does where it fails.
        """
        try:
            self.begin()
            return self.end()
        finally:
            # Ctrl-C may have come between the two.
            self._in_flight = None

    def begin(self, takes: Callable[[str], bool] | None = None) -> bool:
        """Plan an iteration and hand its batch to the device.

        Args:
            takes: called with the id of each request that the plan promises nothing and that has
                not begun; returns True if the caller takes it away, so that it is withdrawn.

        Returns:
            True if the device has a batch now.
        """
        assert self._in_flight is None, "the iteration before has not ended"
        began_s = self.clock()
        self._release_ready()
        self.pool.end_holds(began_s)
        self.declined = []
        plan = self._checked(self.plan())
        self._settle(plan)
        if takes is not None and self.declined:
            plan = self._give_away(plan, takes)
        batch = self._start(plan)
        self.planning.started(plan)
        if not batch:
            if self._unready:
                self._unready.pause()
            return False
        batch = with_proposals(batch, plan, self.proposer)
        self.journal.batch(batch, self.stats.batch(batch))
        launch = Launch(self.runner, batch)
        self._in_flight = _InFlight(plan, batch, began_s, launch)
        if self.plans_ahead and not launch.failed:
            self._plan_ahead(batch, began_s + (plan.predicted_s or 0.0))
        return True

    def end(self, took_s: float | None = None) -> list[OutputDelta]:
        """Wait for the batch on the device, if there is one, and apply its results.

        Args:
            took_s: seconds of the iteration. By default the clock tells; a difference of its
                times has lost digits that a simulation knows.

        Returns:
            all deltas that are to be published; `take_untold` does where it fails.

        Raises:
            DeviceLostError: if the device is beyond running anything.
        """
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is not None:
            self._apply(in_flight.batch, in_flight.launch.results())
            seconds = self.clock() - in_flight.began_s if took_s is None else took_s
            self.journal.iteration(in_flight.plan, in_flight.began_s, seconds)
            if in_flight.launch.failure is None:
                self.planning.observe(in_flight.plan, seconds)
                self.stats.iteration(in_flight.plan, self.planner.model, seconds)
            else:
                self.stats.failed_batches[in_flight.launch.failure] += 1
        return self.take_untold()

    def take_untold(self) -> list[OutputDelta]:
        """Return the deltas that no step has returned, since it failed; each is told once."""
        deltas, self._untold = self._untold, []
        return deltas

    def snapshot(self) -> EngineStats:
        """Return a copy of what was counted so far and how things stand, between two steps."""
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

    def view(self) -> PlannerView:
        """Return the state as the planner sees it."""
        return PlannerView(
            waiting=self._unready.without(self.waiting),
            running=self.running,
            memory=self.pool,
            token_budget=self.token_budget,
            max_num_seqs=self.max_num_seqs,
            speculation=self.proposer,
        )

    def plan(self) -> IterationPlan:
        """Return the plan for now: the one made ahead, where that still holds, else a new one."""
        view, ahead, self._ahead = self.view(), self._ahead, None
        if ahead is not None:
            plan = confirm(ahead, view, self.clock())
            self.stats.plans_ahead["discarded" if plan is None else "held"] += 1
            if plan is not None:
                if plan is not ahead.plan:
                    self.planning.reckon(plan, view)
                return plan
            self.planning.discarded()
        return self._ask_planner(view, self.clock())

    def _plan_ahead(self, batch: SequenceOf[Scheduled], ends_at: float) -> None:
        """Plan the next iteration while a batch runs."""
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
            self.planning.discarded()
            log.exception("planning ahead failed; the next iteration is planned when it is due")

    def _ask_planner(self, view: PlannerView, now: float) -> IterationPlan:
        started = self.clock()
        plan = self.planning.plan(view, now)
        self.stats.planning_s.observe(self.clock() - started)
        return plan

    def _checked(self, plan: IterationPlan) -> IterationPlan:
        """Return the plan, or another one where it contradicts itself or the state.

        Where that is no better, the requests concerned end here.
        """
        view = self.view()
        faults = faults_of(plan, view)
        if not faults:
            return plan
        other = self.planning.replace(view, self.clock(), f"its plan is wrong: {faults}")
        if other is not None:
            plan, faults = other, faults_of(other, view)
        outputs = self.table.outputs
        for seq_id, fault in faults.items():
            if seq_id in outputs:
                self._end_request(outputs[seq_id].seq, f"{seq_id} {fault}")
            else:
                log.error("a plan of %s names %s, which %s", self.planner.name, seq_id, fault)
        return self._rest_of(plan)

    def _rest_of(self, plan: IterationPlan) -> IterationPlan:
        """Return a plan without the sequences that are gone."""
        plan = plan.only(self.table.outputs)
        self.planning.reckon(plan, self.view())
        return plan

    def _end_request(self, seq: Sequence, why: str) -> None:
        """End a request that a plan cannot be carried out for."""
        log.error("a plan of %s cannot be carried out: %s", self.planner.name, why)
        error = InvalidPlanError(f"the plan for this request cannot be carried out: {why}")
        self._untold += self.abort(seq.request.request_id, error)

    def _release_ready(self) -> None:
        """Let outputs be planned whose structures are compiled by now."""
        if self._unready:
            for output, error in self._unready.release(self.table.outputs):
                if error is not None:
                    self._untold.append(self._fail(output, error))

    def _settle(self, plan: IterationPlan) -> None:
        """Carry out what the planner promises, gives up and refuses."""
        outputs = self.table.outputs
        for seq_id in plan.admit:
            outputs[seq_id].seq.standing = Standing.ADMITTED
        for seq_id in plan.relegate:
            outputs[seq_id].seq.standing = Standing.BEST_EFFORT
        unpromised = [outputs[seq_id].seq for seq_id in (*plan.relegate, *plan.declined)]
        ids = dict.fromkeys(seq.request.request_id for seq in unpromised)
        self.declined = [one for one in ids if not self.table.has_begun(one)]
        for seq_id, refusal in plan.reject.items():
            if seq_id in outputs:  # a sibling's refusal may have ended it already
                request_id = outputs[seq_id].seq.request.request_id
                self._untold += self.abort(request_id, refusal.error())

    def _give_away(self, plan: IterationPlan, takes: Callable[[str], bool]) -> IterationPlan:
        """Offer the declined requests, and return the plan for those that stay."""
        taken = [one for one in self.declined if takes(one)]
        for request_id in taken:
            self.withdraw(request_id)
            self.declined.remove(request_id)
        return self._rest_of(plan) if taken else plan

    def _start(self, plan: IterationPlan) -> list[Scheduled]:
        """Carry out preemptions and starts, and make room for the scheduled tokens."""
        outputs, pool = self.table.outputs, self.pool
        for seq_id in plan.preempt:
            self._preempt(outputs[seq_id].seq)
        # All prefix hits are attached before any block is handed out, lest the growth of one
        # sequence evict another's hit.
        for seq_id in plan.start:
            self._start_one(outputs[seq_id].seq)
        batch, num_outputs, speculation = [], len(outputs), plan.speculation
        for seq_id, num_tokens in plan.num_scheduled_tokens.items():
            output = outputs.get(seq_id)
            if output is None:
                continue  # a sibling has ended it
            seq = output.seq
            # Asked here already, since most decodes have their block.
            if seq.num_computed_tokens + num_tokens > pool.block_size * len(seq.block_table):
                try:
                    pool.grow(seq, num_tokens)
                except OutOfBlocksError as error:
                    if self.planning.blame(str(error), self.clock()):
                        self._preempt(seq)
                    else:
                        self._end_request(seq, str(error))
                    continue
            if speculation:
                num_tokens -= speculation.get(seq_id, 0)
            batch.append(Scheduled(seq, num_tokens, None))
        if len(outputs) < num_outputs:
            batch = [item for item in batch if item.seq.state is SequenceState.RUNNING]
        return batch

    def _apply(self, batch: SequenceOf[Scheduled], results: Results) -> None:
        """Advance every sequence of the batch by its result. All tokens come now, at one time."""
        outputs, now = self.table.outputs, self.clock()
        for item in batch:
            seq_id = item.seq.seq_id
            output = outputs[seq_id]
            try:
                self._advance(item, output, results[seq_id], now)
            except Exception as error:
                log.exception("taking up the tokens of %s failed", item.seq)
                if seq_id not in outputs:
                    raise  # it has ended, so that this is not its own error
                self._untold.append(self._fail(output, error))

    def _advance(
        self, item: Scheduled, output: Output, result: RunResult | Exception, now: float
    ) -> None:
        """Count the tokens that have run, and append those that were sampled."""
        if isinstance(result, Exception):
            self._untold.append(self._fail(output, result))
            return
        seq, num_tokens, _ = item
        sampled = result.sampled
        if result.prompt_logprobs:
            output.add_prompt_logprobs(result.prompt_logprobs)
        if isinstance(sampled, Verified):
            if self.proposer is not None and seq.is_decoding:
                self._count(item, sampled)
            self._append(item, output, sampled, now)
            return
        seq.num_computed_tokens += num_tokens
        self.pool.commit(seq)
        if sampled is not None:
            self._untold.append(self._fail(output, sampled))

    def _count(self, item: Scheduled, verified: Verified) -> None:
        """Keep count of what became of a decode's proposal."""
        num_drafted, seq = len(item.drafted), item.seq
        self.planning.verified(seq, num_drafted, verified.num_accepted)
        if num_drafted:
            seq.num_draft_tokens += num_drafted
            seq.num_accepted_tokens += verified.num_accepted
            self.speculation.add(num_drafted, verified.num_accepted)

    def _append(self, item: Scheduled, output: Output, verified: Verified, now: float) -> None:
        """Append tokens as far as the output goes, and leave nothing of the drafts beyond."""
        seq = item.seq
        events = seq.events
        last = events.get(RequestEvent.TOKENS)
        if last is None:
            events[RequestEvent.FIRST_TOKEN] = now
        events[RequestEvent.TOKENS] = now
        num, end = output.append(verified.tokens, now)
        self.stats.delivered(seq, num, last, now)
        # Each token but the last has its KV already.
        seq.num_computed_tokens += item.num_tokens + num - 1
        self.pool.commit(seq)
        if end is not None:
            self._untold.append(self._finish(output, end))
            return
        news = output.news()
        if news is not None:
            self._untold.append(news)
        if self.proposer is not None:
            self.pool.trim(seq)
            self.proposer.roll_back(seq)

    def _fail(self, output: Output, error: Exception) -> OutputDelta:
        if not isinstance(error, MinserveError):
            error = GenerationError(f"generation failed: {type(error).__name__}: {error}")
        return self._finish(output, End(FinishReason.ERROR), error)

    def _finish(self, output: Output, end: End, error: Exception | None = None) -> OutputDelta:
        """End a sequence, free its blocks and forget it."""
        seq, now, wish = output.seq, self.clock(), None
        delta, end = last_words(output, end, error)
        if end.reason.is_own_end:
            self.planning.finished(seq)
            task = seq.request.task
            if task is not None:
                wish = HoldWish(task.key, task.held_until(seq.request.arrival_s, now))
        self.table.remove(seq)
        if end.reason is FinishReason.ERROR:
            self.pool.forget(seq)
        self._release(seq, wish)
        seq.state = SequenceState.FINISHED
        seq.finish_reason, seq.stop_reason = end
        seq.events[RequestEvent.FINISHED] = now
        self.journal.ended(seq, self.stats.ended(seq, delta.slo))
        return delta

    def _start_one(self, seq: Sequence) -> None:
        seq.num_computed_tokens = self.pool.attach(seq)
        now = self.clock()
        if seq.num_preemptions == 0:
            seq.num_cached_tokens = seq.num_computed_tokens
            seq.events[RequestEvent.FIRST_START] = now
            self.stats.started(seq, now)
        seq.events[RequestEvent.SCHEDULED] = now
        self.table.run(seq)

    def _release(self, seq: Sequence, wish: HoldWish | None = None) -> None:
        self.pool.release(seq, wish)
        if self.proposer is not None:
            self.proposer.forget(seq)

    def _preempt(self, seq: Sequence) -> None:
        """Give up the blocks; the tokens stay and are computed again at its next start."""
        self._release(seq)
        seq.num_computed_tokens = 0
        seq.num_preemptions += 1
        seq.events[RequestEvent.PREEMPTED] = self.clock()
        self.table.wait(seq)
