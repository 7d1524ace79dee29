"""The simulator against a server's engine core, with time as the only thing that is not real, and
against a slow twin of the loop that both share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from heapq import heappop, heappush
from typing import Any

import pytest
from reference_replica import ReferenceDrafter, ReferenceReplica
from toy import PIECE, TOY, chats, singles

from minserve.devices import Device
from minserve.engine.batch import RunResult, Scheduled
from minserve.engine.block_pool import BlockPool
from minserve.engine.core import EngineCore
from minserve.engine.speculation.proposal import SampledToken, Verified
from minserve.planner.policies.base import Planner
from minserve.planner.policies.registry import make_planner, promising_policies
from minserve.planner.predict.lengths import QuantileLengths
from minserve.planner.predict.perf_model import BatchShape
from minserve.request import Request, Sequence
from minserve.sampling_params import SamplingParams
from minserve.simulator.cluster import Cluster
from minserve.simulator.events import EventLoop
from minserve.simulator.offered_load import OfferedLoad
from minserve.simulator.simulated_device import SimulatedProposer
from minserve.simulator.simulated_replica import IDLE_S, SimulatedReplica
from minserve.slo.attainment import Progress
from minserve.slo.objectives import OnUnattainable, preset_classes
from minserve.workload.conversation import Conversation

BLOCK_SIZE = 16
END = -1


class Recorded(Progress):
    """Progress that keeps every token's time."""

    __slots__ = ("times",)

    def __init__(self, progress: Progress) -> None:
        super().__init__(progress.targets, progress.arrival_s)
        self.times: list[float] = []

    def add_token(self, now: float) -> None:
        self.times.append(now)
        super().add_token(now)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class TimedRunner:
    """Takes as long as the performance model says, and samples fillers up to the end."""

    is_lost = False

    def __init__(self, clock: Clock, lengths: Mapping[str, int]) -> None:
        self._clock, self._lengths = clock, lengths
        self._model = TOY.perf_model()

    def launch(self, batch: list[Scheduled]) -> TimedRunner:
        chunks = [(item.seq.num_computed_tokens, item.num_tokens) for item in batch]
        self._clock.now += self._model.profiled(BatchShape.of(chunks))
        self._batch = batch
        return self

    def results(self) -> dict[str, RunResult]:
        return {item.seq.seq_id: RunResult(self._sample(item)) for item in self._batch}

    def _sample(self, item: Scheduled) -> Verified | None:
        if not item.samples:
            return None
        seq = item.seq
        ends = seq.num_output_tokens + 1 == self._lengths[seq.seq_id]
        return Verified((SampledToken(END if ends else seq.request.seed, None),), 0)


def planner_of(policy: str, device: Device = TOY) -> Planner:
    return make_planner(
        policy,
        chunked_prefill=policy != "fcfs",
        model=device.perf_model(),
        **({"lengths": QuantileLengths()} if policy in promising_policies() else {}),
    )


class RealEngine:
    """Sends a workload to an engine core, turn after turn.

    Attributes:
        times: of every turn's tokens, by request id.
    """

    def __init__(self, policy: str, num_blocks: int, budget: int) -> None:
        self.clock, self.lengths = Clock(), {}
        self.times: dict[str, list[float]] = {}
        self.core = EngineCore(
            TimedRunner(self.clock, self.lengths),
            BlockPool(num_blocks, BLOCK_SIZE),
            planner_of(policy),
            token_budget=budget,
            max_num_seqs=16,
            max_model_len=TOY.max_model_len,
            clock=self.clock,
        )
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._live: dict[str, tuple[list[Sequence], Conversation, int]] = {}
        self._num_open: dict[str, int] = {}
        self._num_sent = self._num_due = 0

    def serve(self, workload: list[Conversation]) -> None:
        for one in workload:
            self._later(one.arrival_s, one, 0, None)
        while self._due or self.core.has_work:
            if not self.core.has_work:
                self.clock.now = max(self.clock.now, self._due[0][0])
            while self._due and self._due[0][0] <= self.clock.now:
                heappop(self._due)[2]()
            before = self.clock.now
            self._take(self.core.step())
            if self.clock.now == before and self.core.has_work:
                self.clock.now += IDLE_S
            self.core.check_integrity()

    def _later(
        self, at: float, conversation: Conversation, number: int, before: Sequence | None
    ) -> None:
        self._num_due += 1
        call = lambda: self._send(at, conversation, number, before)  # noqa: E731
        heappush(self._due, (at, self._num_due, call))

    def _send(
        self, at: float, conversation: Conversation, number: int, before: Sequence | None
    ) -> None:
        turn = conversation.turns[number]
        self._num_sent += 1
        said = [] if before is None else before.token_ids[: turn.shared_tokens]
        request = Request(
            request_id=str(self._num_sent),
            prompt_token_ids=(*said, *[self._num_sent] * (turn.prompt_tokens - len(said))),
            params=SamplingParams(n=turn.n, max_tokens=TOY.max_model_len - turn.prompt_tokens),
            seed=self._num_sent,
            arrival_s=at,
            stop_token_ids=frozenset({END}),
            slo=turn.slo,
            targets=turn.slo.resolve(
                TOY.perf_model().zero_load_prefill_s(turn.prompt_tokens),
                TOY.perf_model().zero_load_decode_s(turn.prompt_tokens),
            ),
        )
        self._num_open[request.request_id] = turn.n
        seqs = [Sequence(request, index) for index in range(turn.n)]
        for seq in seqs:
            seq.progress = Recorded(seq.progress)
            self.lengths[seq.seq_id] = turn.output_tokens
            self.times[seq.seq_id] = seq.progress.times
            self.core.add(seq, None)
        self._live[request.request_id] = (seqs, conversation, number)

    def _take(self, deltas: list) -> None:
        for delta in deltas:
            if delta.finish_reason is None:
                continue
            seqs, conversation, number = self._live[delta.request_id]
            seq = seqs[0]
            self._num_open[delta.request_id] -= 1
            if self._num_open[delta.request_id]:
                continue
            if number + 1 < len(conversation.turns):
                at = self.clock.now + conversation.turns[number + 1].delay_s
                self._later(at, conversation, number + 1, seq)


def of_several(workload: list[Conversation]) -> list[Conversation]:
    """Some of the turns ask for two or four outputs."""
    return [
        replace(
            one,
            turns=tuple(
                replace(turn, n=(1, 2, 4)[(i + number) % 3])
                for number, turn in enumerate(one.turns)
            ),
        )
        for i, one in enumerate(workload)
    ]


def simulated(
    workload: list[Conversation],
    policy: str,
    num_blocks: int,
    budget: int,
    make: Callable[..., Any] = SimulatedReplica,
    device: Device = TOY,
    **drafting: Any,
) -> tuple[dict[str, list[float]], Any]:
    """Return the times of all tokens by sequence, and the replica that made them."""
    loop, times = EventLoop(), {}
    replica = make(
        planner_of(policy, device),
        BlockPool(num_blocks, BLOCK_SIZE),
        device.perf_model(),
        clock=loop.clock,
        token_budget=budget,
        max_num_seqs=16,
        **drafting,
    )
    cluster = Cluster(loop, [replica], None, QuantileLengths())

    def arrive(*seqs: Sequence) -> None:
        for seq in seqs:
            seq.progress = Recorded(seq.progress)
            times[seq.seq_id] = seq.progress.times
        cluster.arrive(*seqs)

    cluster.load = OfferedLoad(
        loop, workload, TOY.perf_model(), TOY.max_model_len, {}, arrive
    )  # fmt: skip
    loop.run()
    return times, replica


@pytest.mark.parametrize("policy", ["dp", "edf", "fcfs", "sarathi"])
@pytest.mark.parametrize(
    ("workload", "num_blocks", "budget"),
    [
        (singles(6.0, 60), 400, 512),
        (chats(4.0, 40), 400, 256),
        (chats(14.0, 60, seed=1), 44, 96),
        (of_several(chats(3.0, 40)), 400, 256),
        (of_several(chats(6.0, 40, seed=2)), 48, 96),
    ],
    ids=[
        "singles",
        "turns that share a prefix",
        "too little memory",
        "several outputs",
        "several outputs and too little memory",
    ],
)
def test_the_engine_and_the_simulator_give_every_token_at_the_same_time(
    policy: str, workload: list[Conversation], num_blocks: int, budget: int
) -> None:
    engine = RealEngine(policy, num_blocks, budget)
    engine.serve(workload)
    times, replica = simulated(workload, policy, num_blocks, budget)
    assert times == engine.times
    assert [len(each) for each in times.values()] == list(engine.lengths.values())
    snapshot = engine.core.snapshot()
    assert replica.planner.num_preemptions == snapshot.num_preemptions
    assert replica.pool.prefix_hits_tokens == snapshot.num_prefix_hits
    replica.pool.check_integrity([])
    if num_blocks < 50:
        assert snapshot.num_preemptions > 0
    # What a preempted output finds of its own is no hit, and a small pool keeps nothing else.
    if num_blocks >= 50 and any(len(one.turns) > 1 for one in workload):
        assert snapshot.num_prefix_hits > 0


# A draft model whose forward passes take time, and that may lack tokens.
DRAFTING = replace(TOY, pieces=(replace(PIECE, draft_steps=2**-9, draft_tokens=2**-14),))


def thinking(workload: list[Conversation]) -> list[Conversation]:
    """Half of each output is thinking, at a pace of its own."""
    slo = preset_classes()["reasoning"]
    return [
        replace(
            one,
            turns=tuple(
                replace(turn, slo=slo, thinking_tokens=turn.output_tokens // 2)
                for turn in one.turns
            ),
        )
        for one in workload
    ]


def refusing(workload: list[Conversation]) -> list[Conversation]:
    """Requests that would rather be refused than be late."""
    return [
        replace(
            one,
            turns=tuple(
                replace(turn, slo=replace(turn.slo, on_unattainable=OnUnattainable.REJECT))
                for turn in one.turns
            ),
        )
        for one in workload
    ]


@pytest.mark.parametrize("policy", ["dp", "edf", "fcfs", "sarathi"])
@pytest.mark.parametrize(
    ("workload", "num_blocks", "budget", "acceptance"),
    [
        (singles(8.0, 60), 400, 512, None),
        (singles(8.0, 60), 400, 512, 0.7),
        (chats(6.0, 40, seed=1), 400, 256, 0.9),
        (chats(14.0, 60, seed=2), 56, 96, 0.5),
        (thinking(singles(5.0, 40, seed=3)), 400, 256, 0.8),
        (refusing(chats(16.0, 60, seed=4)), 400, 256, 0.7),
        (of_several(chats(5.0, 40, seed=5)), 400, 256, 0.7),
    ],
    ids=[
        "no drafts",
        "singles",
        "turns that share a prefix",
        "too little memory",
        "stages",
        "refusals",
        "several outputs",
    ],
)
def test_the_loop_and_its_slow_twin_give_every_token_at_the_same_time(
    policy: str,
    workload: list[Conversation],
    num_blocks: int,
    budget: int,
    acceptance: float | None,
) -> None:
    ours, theirs, chances = {}, {}, {}
    if acceptance is not None:
        ours["proposer"] = SimulatedProposer(4, lags=True)
        theirs["drafter"] = ReferenceDrafter(4, lags=True)
        chances = {"acceptance": acceptance, "seed": 3}
    house = (workload, policy, num_blocks, budget)
    times, replica = simulated(*house, SimulatedReplica, DRAFTING, **ours, **chances)
    expected, twin = simulated(*house, ReferenceReplica, DRAFTING, **theirs, **chances)
    assert times == expected
    assert replica.planner.num_plans == twin.planner.num_plans
    assert replica.planner.num_preemptions == twin.planner.num_preemptions
    assert replica.pool.prefix_hits_tokens == twin.pool.prefix_hits_tokens
    assert not replica.has_work
    replica.pool.check_integrity([])
    if num_blocks < 100:
        assert replica.planner.num_preemptions > 0
    if acceptance is not None and policy in ("fcfs", "sarathi"):
        assert replica.core.stats.speculation.num_accepted_tokens > 0
