"""`EngineCore`: the loop's four verbs: plan, run, apply, publish.

Single-threaded and without I/O: engines add and abort requests between two steps and
pass on the deltas that a step returns. What an iteration has brought is told even if the rest
of it fails; what goes wrong with one request ends it alone. Nothing but this file, the `Applier`,
the `SequenceTable` that it keeps and the `Output`, which appends tokens, changes a `Sequence`.

An iteration has two halves. `begin` ends when the device has the batch, and `end` waits for its
results: `step` is both. On a virtual clock each half is an event of its own. Where the device
runs by itself, an iteration is planned while the one before it runs (`minserve.engine.lookahead`),
and where nothing speaks against it, launched behind that one too (`minserve.engine.overlap`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf

from minserve.engine.applier import Applier
from minserve.engine.batch import BatchRunner, Scheduled
from minserve.engine.block_pool import BlockPool, HoldWish
from minserve.engine.guarded_planning import GuardedPlanning
from minserve.engine.journal import NoJournal
from minserve.engine.launch import Launch
from minserve.engine.live_output import NO_HISTORY, End, History, LiveOutput, Output
from minserve.engine.overlap import Iteration, Overlap, can_follow
from minserve.engine.plan_maker import PlanMaker
from minserve.engine.recovery import failure_of, last_words
from minserve.engine.sequence_table import SequenceTable
from minserve.engine.speculation.drafted_batch import with_proposals
from minserve.engine.speculation.proposer import Proposer
from minserve.engine.stats import EngineStats
from minserve.engine.structures.unready import Unready
from minserve.engine.text.detokenizer import IncrementalDetokenizer
from minserve.errors import InvalidPlanError, MinserveError, OutOfBlocksError
from minserve.outputs import OutputDelta
from minserve.planner.plan import IterationPlan, PlannerView
from minserve.planner.policies.base import Planner
from minserve.request import FinishReason, RequestEvent, Sequence, SequenceState
from minserve.slo.objectives import Standing

log = logging.getLogger(__name__)

# Seconds without work after which the pool's books are checked.
IDLE_S = 0.5


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
        launches_ahead: with that, launch it too before the one before has ended, where it can be;
            for runners that are a `FollowingRunner`.
        stats: counts what happens; ``None`` makes new ones.

    Attributes:
        stats: all that was counted so far; `snapshot` adds what others count.
        journal: told of each batch and end, where somebody may look at what the engine does.
        declined: ids of the requests that the newest plan promises nothing and that have not
            begun: another engine may have room for them.
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
        launches_ahead: bool = False,
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
        self.plans_ahead, self.launches_ahead = plans_ahead, launches_ahead
        self.stats = EngineStats() if stats is None else stats
        self.planning = GuardedPlanning(planner, safe_planner, self.stats.planner_fallbacks)
        self.journal = NoJournal()
        self.table = SequenceTable()
        self.waiting, self.running = self.table.waiting, self.table.running
        self.declined: list[str] = []
        self._unready = Unready()
        self._plans = PlanMaker(self.planning, self.stats, lambda: self.clock())
        self._overlap = Overlap(self._release)
        self._applier = Applier(
            self.table.outputs,
            pool,
            self.planning,
            self.stats,
            finish=self._finish,
            tell=lambda delta: self._untold.append(delta),
        )
        self._untold: list[OutputDelta] = []

    @property
    def has_work(self) -> bool:
        """True while there are outputs under way, or the device has a batch."""
        return bool(self.table.outputs or self._overlap)

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
        """End all outputs of a request now; unknown ids are ignored.

        Their blocks are freed now, or when the batch is over that the device has of them.

        Returns:
            a last delta for each, ERROR where an error is given, else ABORT.
        """
        end = End(FinishReason.ABORT if error is None else FinishReason.ERROR)
        return [self._finish(one, end, error) for one in self.table.of_request(request_id)]

    def complete(self, request_id: str) -> list[OutputDelta]:
        """End all outputs of a request now, as if each had come to its end; as `abort` otherwise."""
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
        except BaseException:
            # Whatever it was, Ctrl-C included: what the device has is not asked for any more.
            self._overlap.drop()
            raise

    def begin(self, takes: Callable[[str], bool] | None = None) -> bool:
        """Plan an iteration and hand its batch to the device.

        Args:
            takes: called with the id of each request that the plan promises nothing and that has
                not begun; returns True if the caller takes it away, so that it is withdrawn.

        Returns:
            True if the device has a batch now.
        """
        most_before = 1 if self.launches_ahead else 0
        assert len(self._overlap) <= most_before, "the iteration before has not ended"
        now = self.clock()
        self._overlap.enter(now)
        self._release_ready()
        self.pool.end_holds(now)
        self.declined = []
        if not self._overlap:
            self._launch(now, takes)
        if self.plans_ahead:
            self._look_ahead(takes)
        if not self._overlap and self._unready:
            self._unready.pause()
        return bool(self._overlap)

    def end(self, took_s: float | None = None) -> list[OutputDelta]:
        """Wait for the first batch on the device, if there is one, and apply its results.

        Args:
            took_s: seconds of the iteration. By default the clock tells; a difference of its
                times has lost digits that a simulation knows.

        Returns:
            all deltas that are to be published; `take_untold` does where it fails.

        Raises:
            DeviceLostError: if the device is beyond running anything.
        """
        if self._overlap:
            self._end_iteration(took_s)
        return self.take_untold()

    def drain(self) -> None:
        """Without outputs under way, wait for the batch that the device may still have.

        Raises:
            PoolCorruptedError: as `check_integrity` does.
        """
        if not self.table.outputs:
            while self._overlap:
                self._end_iteration()
            self.check_integrity()

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
        self.pool.check_integrity([*self.running, *self._overlap.leaving])

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

    def _launch(self, began_s: float, takes: Callable[[str], bool] | None) -> None:
        """Plan an iteration for now and launch it."""
        plan = self._checked(self._plans.now(self.view()))
        plan = self._settle(plan, takes)
        batch = self._start(plan)
        self.planning.started(plan)
        if batch:
            batch = with_proposals(batch, plan, self.proposer)
            self._overlap.add(Iteration(plan, batch, Launch(self.runner, batch), began_s))
            self._count_batch(batch)

    def _look_ahead(self, takes: Callable[[str], bool] | None) -> None:
        """Plan the next iteration while one runs, and launch it behind that if it may be."""
        before = self._overlap.first
        if before is None or before.launch.failed:
            return
        ends_at = before.began_s + (before.plan.predicted_s or 0.0)
        view = self._plans.look_ahead(self.view(), before.batch, ends_at)
        if view is None or not self.launches_ahead:
            return
        plan = self._plans.take(view, lambda plan: can_follow(plan, before))
        if plan is None:
            return
        plan = self._settle(plan, takes, view)
        batch = self._start(plan, {seq.seq_id: seq for seq in view.running})
        self.planning.started(plan)
        if batch:
            launch = Launch(self.runner, batch, behind=before.launch)
            outputs = self.table.outputs
            own = [item._replace(seq=outputs[item.seq.seq_id].seq) for item in batch]
            self._overlap.add(Iteration(plan, own, launch, math.inf))

    def _end_iteration(self, took_s: float | None = None) -> None:
        """Read the first batch on the device and apply it; then the one behind it can sample."""
        first = self._overlap.first
        assert first is not None, "asked only where there is one"
        asked_s = self.clock()
        results = first.launch.results()
        came_s = self.clock()
        self._overlap.pop()
        follower = self._overlap.first
        self._applier.apply(
            first.live, results, came_s, self.proposer, followed=follower is not None
        )
        if follower is not None:
            self.stats.num_surplus_tokens += follower.go_on(self.runner, first, came_s)
        # Where the next batch runs already, the device has not waited for the results' applying.
        ended_s = self.clock() if follower is None else came_s
        seconds = first.took_s(ended_s, came_s - asked_s) if took_s is None else took_s
        self.journal.iteration(first.plan, first.began_s, seconds)
        if first.launch.failure is None:
            self.planning.observe(first.plan, seconds)
            self.stats.iteration(first.plan, self.planner.model, seconds)
        else:
            self.stats.failed_batches[first.launch.failure] += 1
        if follower is not None:
            self._count_batch(follower.batch)
            self._overlap.leave(self.clock())

    def _count_batch(self, batch: SequenceOf[Scheduled]) -> None:
        self.journal.batch(batch, self.stats.batch(batch))

    def _checked(self, plan: IterationPlan) -> IterationPlan:
        """Return the plan, or another one where it contradicts itself or the state.

        Where that is no better, the requests concerned end here.
        """
        plan, faults = self._plans.checked(plan, self.view())
        if not faults:
            return plan
        outputs = self.table.outputs
        for seq_id, fault in faults.items():
            if seq_id in outputs:
                self._end_request(outputs[seq_id].seq, f"{seq_id} {fault}")
            else:
                log.error("a plan of %s names %s, which %s", self.planner.name, seq_id, fault)
        return self._rest_of(plan)

    def _rest_of(self, plan: IterationPlan, view: PlannerView | None = None) -> IterationPlan:
        """Return a plan without the sequences that are gone, for `_settle`'s view."""
        plan = plan.only(self.table.outputs)
        self.planning.reckon(plan, self.view() if view is None else view)
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
                    end = End(FinishReason.ERROR)
                    self._untold.append(self._finish(output, end, failure_of(error)))

    def _settle(
        self,
        plan: IterationPlan,
        takes: Callable[[str], bool] | None,
        view: PlannerView | None = None,
    ) -> IterationPlan:
        """Carry out what the planner promises, gives up and refuses.

        Args:
            view: the state that the plan was made for; ``None`` is the present one.

        Returns:
            the plan without what ``takes`` has taken away.
        """
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
        if takes is None or not self.declined:
            return plan
        taken = [one for one in self.declined if takes(one)]
        for request_id in taken:
            self.withdraw(request_id)
            self.declined.remove(request_id)
        return self._rest_of(plan, view) if taken else plan

    def _start(
        self, plan: IterationPlan, ahead: Mapping[str, Sequence] | None = None
    ) -> list[Scheduled]:
        """Carry out preemptions and starts, and make room for the scheduled tokens.

        Args:
            ahead: while an iteration runs, the running sequences as they will be after it.
        """
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
            seq = output.seq if ahead is None else ahead.get(seq_id, output.seq)
            # Asked here already, since most decodes have their block.
            if seq.num_computed_tokens + num_tokens > pool.block_size * len(seq.block_table):
                try:
                    pool.grow(seq, num_tokens)
                except OutOfBlocksError as error:
                    if not self.planning.blame(str(error), self.clock()):
                        self._end_request(seq, str(error))
                    elif ahead is None:
                        self._preempt(seq)
                    continue
            if speculation:
                num_tokens -= speculation.get(seq_id, 0)
            batch.append(Scheduled(seq, num_tokens, None))
        if len(outputs) < num_outputs:
            batch = [item for item in batch if item.seq.seq_id in outputs]
        return batch

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
        self._overlap.release(seq, wish)
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
