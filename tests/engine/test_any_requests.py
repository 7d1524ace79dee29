"""Whatever is asked of an engine core: each output ends once, and promises go to whole requests.

Everything is real but time and the device: a batch takes what a performance model says on a
clock of the test's own, and tokens are drawn from a seed.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from minserve.engine.batch import RunResult, Scheduled
from minserve.engine.block_pool import BlockPool
from minserve.engine.core import EngineCore
from minserve.engine.speculation.proposal import SampledToken, Verified
from minserve.engine.speculation.proposer import NgramProposer
from minserve.errors import SLOUnattainableError
from minserve.outputs import OutputDelta
from minserve.planner.policies.registry import make_planner, promising_policies
from minserve.planner.predict.perf_model import BatchShape, PerfModel, Piece
from minserve.request import FinishReason, Request, Sequence
from minserve.sampling_params import SamplingParams
from minserve.slo.objectives import SLO, DecodeStage, Standing

# 10 ms a batch, 2 ms a token: some twenty decodes fit into 50 ms.
DEVICE = (Piece(tokens=0.002, seqs=0.0005, context_tokens=1e-6, base=0.01, draft_tokens=1e-5),)
BLOCK_SIZE = 4
LONGEST_PROMPT, MOST_TOKENS = 30, 16
# Blocks that the longest request needs.
LEAST_BLOCKS = -(-(LONGEST_PROMPT + MOST_TOKENS) // BLOCK_SIZE)
END = -1
# Far more than any of the workloads takes.
MOST_STEPS = 5000


@dataclass(frozen=True)
class Asked:
    """A request, before which step it comes, and after how many more it is aborted, if ever."""

    step: int
    n: int
    prompt: int
    max_tokens: int
    slo: SLO | None
    aborted_after: int | None


@dataclass(frozen=True)
class House:
    """An engine core's settings."""

    policy: str
    num_blocks: int
    max_num_seqs: int
    token_budget: int
    prefix_caching: bool
    plans_ahead: bool
    max_speculation: int


SLOS = st.none() | st.builds(
    lambda ttft, tpot, then, refuses, value: SLO(
        ttft=ttft,
        stages=(DecodeStage(tpot=tpot, tokens=3), DecodeStage(tpot=then))
        if then
        else (DecodeStage(tpot=tpot),),
        on_unattainable="reject" if refuses else "best_effort",
        value=value,
    ),
    ttft=st.sampled_from([0.001, 0.05, 0.2, 1.0, 5.0]),
    tpot=st.sampled_from([0.005, 0.02, 0.04, 0.1, 0.3]),
    then=st.sampled_from([None, None, 0.05, 0.2]),
    refuses=st.booleans(),
    value=st.sampled_from([1.0, 1.0, 3.0]),
)
ASKED = st.builds(
    Asked,
    step=st.integers(0, 25),
    n=st.sampled_from([1, 1, 2, 3, 8]),
    prompt=st.integers(1, LONGEST_PROMPT),
    max_tokens=st.integers(1, MOST_TOKENS),
    slo=SLOS,
    aborted_after=st.none() | st.integers(0, 20),
)
HOUSES = st.builds(
    House,
    policy=st.sampled_from(["dp", "dp", "edf", "sarathi", "fcfs"]),
    num_blocks=st.sampled_from([LEAST_BLOCKS, LEAST_BLOCKS + 8, 60, 400]),
    max_num_seqs=st.sampled_from([1, 3, 8, 64]),
    token_budget=st.sampled_from([8, 32, 128]),
    prefix_caching=st.booleans(),
    plans_ahead=st.booleans(),
    max_speculation=st.sampled_from([0, 0, 3]),
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeRunner:
    """A batch takes its predicted time, and gives tokens that depend on their place alone."""

    is_lost = False

    def __init__(self, clock: Clock) -> None:
        self._clock, self._model = clock, PerfModel(DEVICE)

    def launch(self, batch: list[Scheduled]) -> FakeRunner:
        chunks = [(item.start, item.num_tokens + len(item.drafted)) for item in batch]
        self._clock.now += self._model.profiled(BatchShape.of(chunks))
        self._batch = batch
        return self

    def results(self) -> dict[str, RunResult]:
        return {item.seq.seq_id: RunResult(self._sample(item)) for item in self._batch}

    def _sample(self, item: Scheduled) -> Verified | None:
        if not item.samples:
            return None
        seq = item.seq
        rng = random.Random(f"{seq.seq_id} {seq.num_tokens}")
        num_accepted = rng.randint(0, len(item.drafted))
        tokens = [*item.drafted[:num_accepted], END if rng.random() < 0.05 else rng.randrange(3)]
        return Verified(tuple(SampledToken(token, None) for token in tokens), num_accepted)


class Play:
    """Sends requests to a core and keeps account of what is told of them."""

    def __init__(self, house: House, script: list[Asked]) -> None:
        self.clock, self.script = Clock(), script
        planner = make_planner(house.policy, model=PerfModel(DEVICE))
        self.core = EngineCore(
            FakeRunner(self.clock),
            BlockPool(house.num_blocks, BLOCK_SIZE, prefix_caching=house.prefix_caching),
            planner,
            token_budget=house.token_budget,
            max_num_seqs=house.max_num_seqs,
            max_model_len=house.num_blocks * BLOCK_SIZE,
            clock=self.clock,
            proposer=NgramProposer(house.max_speculation) if house.max_speculation else None,
            plans_ahead=house.plans_ahead,
        )
        self.sequences: dict[str, list[Sequence]] = {}
        self.ends: dict[tuple[str, int], FinishReason] = {}
        self.errors: dict[str, list[Exception]] = {}

    def run(self) -> None:
        core, step = self.core, 0
        last = max((one.step + (one.aborted_after or 0) for one in self.script), default=0)
        while core.has_work or step <= last:
            assert step < MOST_STEPS, f"{core.num_unfinished} outputs never end"
            for number, one in enumerate(self.script):
                if one.step == step:
                    self._send(str(number), one)
                if one.aborted_after is not None and one.step + one.aborted_after == step:
                    self._take(core.abort(str(number)))
            if core.has_work:
                before = self.clock.now
                self._take(core.step())
                if self.clock.now == before:
                    self.clock.now += 0.001
                self._check_promises()
                core.check_integrity()
            step += 1

    def _send(self, name: str, one: Asked) -> None:
        rng = random.Random(name)
        request = Request(
            request_id=name,
            prompt_token_ids=tuple(rng.randrange(3) for _ in range(one.prompt)),
            params=SamplingParams(n=one.n, max_tokens=one.max_tokens),
            seed=0,
            arrival_s=self.clock.now,
            stop_token_ids=frozenset({END}),
            slo=one.slo,
            targets=None if one.slo is None else one.slo.resolve(0.0, 0.0),
        )
        self.sequences[name] = [Sequence(request, index) for index in range(one.n)]
        for seq in self.sequences[name]:
            self.core.add(seq, None)

    def _take(self, deltas: list[OutputDelta]) -> None:
        for delta in deltas:
            key = (delta.request_id, delta.index)
            assert key not in self.ends, f"something is told of {key} behind its end"
            if delta.error is not None:
                self.errors.setdefault(delta.request_id, []).append(delta.error)
            if delta.finish_reason is not None:
                self.ends[key] = delta.finish_reason

    def _check_promises(self) -> None:
        for name, seqs in self.sequences.items():
            live = [seq for seq in seqs if (name, seq.index) not in self.ends]
            assert len({seq.standing for seq in live}) <= 1, [seq.standing for seq in live]


@settings(max_examples=400, derandomize=True, database=None)
@given(house=HOUSES, script=st.lists(ASKED, min_size=1, max_size=10))
def test_every_output_ends_once_and_promises_are_to_whole_requests(
    house: House, script: list[Asked]
) -> None:
    play = Play(house, script)
    play.run()
    expected = {(str(i), index) for i, one in enumerate(script) for index in range(one.n)}
    assert play.ends.keys() == expected
    for name, errors in play.errors.items():
        asked = script[int(name)]
        assert all(isinstance(error, SLOUnattainableError) for error in errors), errors
        assert asked.slo.refuses_delay
        assert house.policy in promising_policies()
        assert len(errors) == asked.n
    if house.policy not in promising_policies():
        standings = {seq.standing for seqs in play.sequences.values() for seq in seqs}
        assert Standing.ADMITTED not in standings
    core = play.core
    assert core.take_untold() == []
    assert core.pool.num_free_blocks == core.pool.num_blocks
    core.check_integrity()
