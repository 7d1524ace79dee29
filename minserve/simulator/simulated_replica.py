"""`SimulatedReplica`: one engine without a device. It plans and manages blocks as the real one.

The planner and the block pool are those of the engine. A batch does not run on a device; only its
effect on the state is applied: tokens are computed, one token is sampled, and drafted tokens are
accepted with a given chance. A performance model gives its time.
"""

from __future__ import annotations

import random
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from minserve.engine.block_pool import BlockPool
from minserve.errors import SimulationError
from minserve.planner.plan import IterationPlan, PlannerView
from minserve.planner.policies.base import Planner
from minserve.planner.predict.eager import is_eager
from minserve.planner.predict.perf_model import BatchShape, PerfModel
from minserve.request import Sequence, SequenceState, by_rank
from minserve.simulator.device_time import DeviceTime
from minserve.slo.objectives import Standing
from minserve.workload.conversation import Turn

# After an iteration that runs nothing, the next one begins so many seconds later.
IDLE_S = 0.001
# So many idle iterations in a row, while sequences wait, are a deadlock.
MOST_IDLE = 20_000


@dataclass(eq=False, slots=True)
class SimulatedSequence(Sequence):
    """A sequence whose output's length is known to the simulator, not to the planner.

    Attributes:
        turn: the turn of which it is an output.
        conversation: number of the turn's conversation.
        siblings: all outputs of the turn, this one among them; set by the code that makes them.
        hops: number of times that it was moved on to another replica.
        num_left: output tokens that are still to come.
        num_thinking_left: of these, tokens until the thinking ends.
    """

    turn: Turn = field(kw_only=True)
    conversation: int = 0
    siblings: list[SimulatedSequence] = field(default_factory=list)
    hops: int = 0
    num_left: int = 0
    num_thinking_left: int = 0

    def __post_init__(self) -> None:
        # With ``slots=True`` the decorator makes a new class, which a plain `super` does not find.
        Sequence.__post_init__(self)
        self.siblings = self.siblings or [self]
        self.num_left = self.turn.output_tokens
        self.num_thinking_left = self.turn.thinking_tokens


class SimulatedProposer:
    """The draft model as planners see it, with a record of the tokens that it has computed.

    Args:
        max_tokens: most tokens drafted for a sequence.
        lags: False if by the profile the draft model's own prefills cost nothing, so that
            it never lacks tokens.
    """

    def __init__(self, max_tokens: int, *, lags: bool) -> None:
        self.max_tokens = max_tokens
        self._lags = lags
        self._computed: dict[str, int] = {}

    def limit(self, seq: Sequence) -> int:
        return self.max_tokens

    def lag(self, seq: Sequence) -> int:
        if not self._lags:
            return 0
        return max(0, seq.num_tokens - 1 - self._computed.get(seq.seq_id, 0))

    def ran(self, seq: Sequence, num_tokens: int) -> None:
        """Record that the draft model has computed so many of the tokens that it lacked."""
        if self._lags:
            self._computed[seq.seq_id] = self._computed.get(seq.seq_id, 0) + num_tokens

    def forget(self, seq: Sequence) -> None:
        self._computed.pop(seq.seq_id, None)


class SimulatedReplica:
    """Runs sequences to their end on a clock that its caller moves.

    Args:
        device: the usual times of batches; the planner has its own model.
        device_time: how true times differ from the usual ones; ``None`` for not at all.
        clairvoyant: True if the planner's model is told, in its attribute ``next_factor``, the
            factor that the next batch will have on its usual time.
        acceptance: chance that a drafted token is accepted if those before it were.

    Attributes:
        busy: True while a batch runs.
        busy_s: seconds in which batches ran.
    """

    def __init__(
        self,
        planner: Planner,
        pool: BlockPool,
        device: PerfModel,
        *,
        token_budget: int,
        max_num_seqs: int,
        proposer: SimulatedProposer | None = None,
        acceptance: float = 0.0,
        device_time: DeviceTime | None = None,
        clairvoyant: bool = False,
        seed: int = 0,
    ) -> None:
        self.planner, self.pool, self.device = planner, pool, device
        self.token_budget, self.max_num_seqs = token_budget, max_num_seqs
        self.proposer, self.acceptance = proposer, acceptance
        self.device_time, self.clairvoyant = device_time or DeviceTime(), clairvoyant
        self.waiting: list[SimulatedSequence] = []
        self.running: list[SimulatedSequence] = []
        self.busy = False
        self.busy_s = 0.0
        self.num_iterations = 0
        self._by_id: dict[str, SimulatedSequence] = {}
        self._rng = random.Random(seed)
        self._plan: IterationPlan | None = None
        self._seconds = 0.0
        self._num_idle = 0

    @property
    def has_work(self) -> bool:
        return bool(self._by_id)

    def submit(self, seq: SimulatedSequence) -> None:
        """Add a sequence to the queue."""
        self._by_id[seq.seq_id] = seq
        insort(self.waiting, seq, key=by_rank)

    def withdraw(self, seq: SimulatedSequence) -> None:
        """Remove a waiting sequence, which goes to another replica or was refused."""
        del self._by_id[seq.seq_id]
        self.waiting.remove(seq)

    def view(self) -> PlannerView:
        """Return the planner's view of the replica."""
        return PlannerView(
            waiting=self.waiting,
            running=self.running,
            memory=self.pool,
            token_budget=self.token_budget,
            max_num_seqs=self.max_num_seqs,
            speculation=self.proposer,
        )

    def begin(
        self, now: float, gives_away: Callable[[SimulatedSequence], bool] = lambda _: False
    ) -> tuple[float, list[SimulatedSequence]]:
        """Plan an iteration and start it.

        Args:
            gives_away: called with the first output of each request that has no promise and has not
                begun; returns True if the request goes to another replica instead of waiting here.

        Returns:
            the seconds until the iteration ends, and the first output of each refused request.

        Raises:
            SimulationError: if the policy runs nothing for too long although there is work.
        """
        if self.clairvoyant:
            self.planner.model.next_factor = self.device_time.factor(now)
        plan = self._plan = self.planner.plan(self.view(), now)
        unpromised, refused = self._settle(plan)
        away = [one for seq in unpromised if gives_away(seq) for one in seq.siblings]
        if away:
            self._take_out(plan, away)
        self._start(plan)
        self.planner.started(plan)
        self.busy = True
        if not plan.num_scheduled_tokens:
            self._num_idle = 0 if refused or away else self._num_idle + 1
            return self._idle(), refused
        self._num_idle = 0
        self._seconds = self.device_time.seconds(self._usual_s(plan), now)
        self.busy_s += self._seconds
        self.num_iterations += 1
        return self._seconds, refused

    def end(self, now: float) -> list[SimulatedSequence]:
        """End the iteration: apply its results, and return the sequences that have ended."""
        plan, ended = self._plan, []
        self.busy = False
        advance = self._advance if self.proposer is None else self._advance_drafting
        commit = self.pool.commit if self.pool.prefix_caching else None
        by_id = self._by_id
        for seq_id, num_tokens in plan.num_scheduled_tokens.items():
            seq = by_id[seq_id]
            advance(seq, num_tokens, now)
            if seq.num_left == 0:
                ended.append(seq)
            if commit is not None:
                commit(seq)
        for seq in ended:
            self._finish(seq)
        if plan.num_scheduled_tokens:
            self.planner.observe(plan, self._seconds)
        return ended

    def _advance(self, seq: SimulatedSequence, num_tokens: int, now: float) -> None:
        """Count computed tokens of a sequence; after its last known token, sample the next one."""
        seq.num_computed_tokens += num_tokens
        if len(seq.token_ids) == seq.num_computed_tokens:
            self._append(seq, now)

    def _advance_drafting(self, seq: SimulatedSequence, num_tokens: int, now: float) -> None:
        """Do as `_advance`, with drafted tokens; those after the first refused one are dropped."""
        num_drafted, decodes = self._plan.speculation.get(seq.seq_id, 0), seq.is_decoding
        seq.num_computed_tokens += num_tokens - num_drafted
        if len(seq.token_ids) != seq.num_computed_tokens:
            return
        num_accepted = self._accepted(num_drafted)
        if decodes:
            self.planner.verified(seq, num_drafted, num_accepted)
            self.proposer.ran(seq, num_accepted)
        self._append(seq, now)
        for _ in range(min(num_accepted, seq.num_left)):
            # Each accepted token has its KV already.
            seq.num_computed_tokens += 1
            self._append(seq, now)
        self.pool.trim(seq)

    def _idle(self) -> float:
        """Count an iteration that runs nothing, and return the seconds until the next one.

        Raises:
            SimulationError: if there were too many such iterations in a row.
        """
        if self._num_idle > MOST_IDLE:
            raise SimulationError(
                f"{self.planner.name} runs nothing although {len(self._by_id)} sequences wait"
            )
        self._seconds = 0.0
        return IDLE_S

    def _settle(
        self, plan: IterationPlan
    ) -> tuple[list[SimulatedSequence], list[SimulatedSequence]]:
        """Carry out the promises, relegations and refusals of a plan.

        Returns:
            the first outputs of requests that have no promise and have not begun, and those of
            refused requests.
        """
        for seq_id in plan.admit:
            self._by_id[seq_id].standing = Standing.ADMITTED
        unpromised, refused = [], []
        for seq_id in plan.relegate:
            self._by_id[seq_id].standing = Standing.BEST_EFFORT
            unpromised.append(self._by_id[seq_id])
        unpromised += [self._by_id[seq_id] for seq_id in plan.declined]
        for seq_id in plan.reject:
            seq = self._by_id[seq_id]
            self.withdraw(seq)
            seq.state = SequenceState.FINISHED
            refused.append(seq)
        # A relegated sequence may be among the declined ones too.
        unbegun = [
            seq
            for seq in dict.fromkeys(unpromised)
            if not any(one.has_begun for one in seq.siblings)
        ]
        return _firsts(unbegun), _firsts(refused)

    def _take_out(self, plan: IterationPlan, away: list[SimulatedSequence]) -> None:
        """Take sequences out of a plan that would have started them without a promise."""
        for seq in away:
            self.withdraw(seq)
            if plan.num_scheduled_tokens.pop(seq.seq_id, None) is not None:
                plan.start.remove(seq.seq_id)
        plan.shape = BatchShape()
        self.planner.reckon(plan, self.view())

    def _start(self, plan: IterationPlan) -> None:
        for seq_id in plan.preempt:
            seq = self._by_id[seq_id]
            self._release(seq)
            seq.num_computed_tokens, seq.state = 0, SequenceState.WAITING
            seq.num_preemptions += 1
            self.running.remove(seq)
            insort(self.waiting, seq, key=by_rank)
        for seq_id in plan.start:
            seq = self._by_id[seq_id]
            seq.num_computed_tokens = self.pool.attach(seq)
            if seq.num_preemptions == 0:
                seq.num_cached_tokens = seq.num_computed_tokens
            self.waiting.remove(seq)
            self._run(seq)
        pool, by_id, size = self.pool, self._by_id, self.pool.block_size
        for seq_id, num_tokens in plan.num_scheduled_tokens.items():
            seq = by_id[seq_id]
            if seq.num_computed_tokens + num_tokens > size * len(seq.block_table):
                pool.grow(seq, num_tokens)

    def _usual_s(self, plan: IterationPlan) -> float:
        """Return the device's usual seconds for the batch, draft model included."""
        by_id, speculation, proposer = self._by_id, plan.speculation, self.proposer
        seqs = [by_id[seq_id] for seq_id in plan.num_scheduled_tokens]
        starts = (seq.num_computed_tokens for seq in seqs)
        shape = BatchShape.of(
            zip(starts, plan.num_scheduled_tokens.values(), strict=True),
            eager=is_eager(len(seqs), sum(seq.is_decoding for seq in seqs)),
        )
        if speculation or plan.catch_up:
            lags = 0
            for seq_id in speculation:
                lag = proposer.lag(by_id[seq_id])
                proposer.ran(by_id[seq_id], lag)
                lags += lag
            for seq_id, num_tokens in plan.catch_up.items():
                proposer.ran(by_id[seq_id], num_tokens)
            shape = replace(
                shape,
                draft_steps=max(speculation.values(), default=1),
                draft_tokens=sum(speculation.values()) + lags + sum(plan.catch_up.values()),
            )
        return self.device.profiled(shape)

    def _accepted(self, num_drafted: int) -> int:
        num = 0
        while num < num_drafted and self._rng.random() < self.acceptance:
            num += 1
        return num

    def _append(self, seq: SimulatedSequence, now: float) -> None:
        """Append a sampled token to a sequence."""
        seq.token_ids.append(seq.request.seed)
        seq.progress.add_token(now)
        seq.num_left -= 1
        if seq.num_thinking_left:
            seq.num_thinking_left -= 1
            if not seq.num_thinking_left:
                seq.progress.end_stage()

    def _run(self, seq: SimulatedSequence) -> None:
        seq.state = SequenceState.RUNNING
        insort(self.running, seq, key=by_rank)

    def _finish(self, seq: SimulatedSequence) -> None:
        self.planner.finished(seq)
        self._release(seq)
        seq.state = SequenceState.FINISHED
        self.running.remove(seq)
        del self._by_id[seq.seq_id]

    def _release(self, seq: SimulatedSequence) -> None:
        self.pool.release(seq)
        if self.proposer is not None:
            self.proposer.forget(seq)


def _firsts(seqs: list[SimulatedSequence]) -> list[SimulatedSequence]:
    """Return the first output of each request; the list holds all outputs of a request or none."""
    return [seq for seq in seqs if seq is seq.siblings[0]]
