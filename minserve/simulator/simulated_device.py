"""`SimulatedDevice`: takes batches as a device does, and says how long they take.

A performance model gives the usual time of a batch, and `DeviceTime` what becomes of it. Nothing is
computed: one token is sampled, and drafted tokens are accepted with a given chance.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import cast

from minserve.engine.batch import RunResult, Scheduled, shape_of
from minserve.engine.speculation.proposal import Proposal, SampledToken, Verified
from minserve.engine.speculation.proposer import DraftRequest, Proposer
from minserve.planner.predict.perf_model import PerfModel
from minserve.request import Sequence
from minserve.simulator.device_time import DeviceTime
from minserve.simulator.simulated_sequence import SimulatedSequence

_NOTHING = RunResult()


class SimulatedProposer(Proposer):
    """A draft model without tokens, with a record of those that it would have computed.

    Args:
        max_tokens: most tokens drafted for a sequence.
        lags: False if by the profile the draft model's own prefills cost nothing, so that
            it never lacks tokens.

    Attributes:
        num_steps, num_tokens: forward passes of the draft model since the last batch, and the
            tokens that these ran.
    """

    name = "simulated"

    def __init__(self, max_tokens: int, *, lags: bool) -> None:
        super().__init__(max_tokens)
        self._lags = lags
        self._num_computed: dict[str, int] = {}
        self.num_steps = self.num_tokens = 0

    def limit(self, seq: Sequence) -> int:
        return self.max_tokens

    def lag(self, seq: Sequence) -> int:
        if not self._lags:
            return 0
        return max(0, seq.num_tokens - 1 - self._num_computed.get(seq.seq_id, 0))

    def propose(self, wanted: SequenceOf[DraftRequest]) -> dict[str, Proposal]:
        proposals = {}
        self.num_steps = 1
        for one in wanted:
            seq, num_tokens = one.seq, one.num_tokens
            num_lacking = self.lag(seq) if num_tokens else one.num_catch_up
            self._ran(seq, num_lacking + num_tokens)
            self.num_tokens += num_lacking + num_tokens
            self.num_steps = max(self.num_steps, num_tokens)
            if num_tokens:
                proposals[seq.seq_id] = Proposal((seq.request.seed,) * num_tokens)
        return proposals

    def roll_back(self, seq: Sequence) -> None:
        num_computed = self._num_computed.get(seq.seq_id)
        if num_computed is not None:
            # The newest accepted token was drafted, and never run by the draft model.
            self._num_computed[seq.seq_id] = min(num_computed, seq.num_computed_tokens - 1)

    def forget(self, seq: Sequence) -> None:
        self._num_computed.pop(seq.seq_id, None)

    def take_work(self) -> tuple[int, int]:
        """Return `num_steps` and `num_tokens`, and count from 0 again."""
        work = self.num_steps, self.num_tokens
        self.num_steps = self.num_tokens = 0
        return work

    def _ran(self, seq: Sequence, num_tokens: int) -> None:
        """Record that the draft model has computed so many more tokens of a sequence."""
        if self._lags:
            self._num_computed[seq.seq_id] = self._num_computed.get(seq.seq_id, 0) + num_tokens


class SimulatedDevice:
    """The runner of a simulated replica.

    Args:
        model: the usual times of batches.
        times: how true times differ from the usual ones.
        acceptance: chance that a drafted token is accepted if those before it were.

    Attributes:
        took_s: seconds of the newest batch.
    """

    device = "a simulated device"
    is_lost = False

    def __init__(
        self,
        model: PerfModel,
        times: DeviceTime,
        clock: Callable[[], float],
        *,
        proposer: SimulatedProposer | None = None,
        acceptance: float = 0.0,
        seed: int = 0,
    ) -> None:
        self._model, self._times, self._clock = model, times, clock
        self._proposer, self._acceptance = proposer, acceptance
        self._rng = random.Random(seed)
        self._batch: SequenceOf[Scheduled] = ()
        self.took_s = 0.0

    def launch(self, batch: SequenceOf[Scheduled]) -> SimulatedDevice:
        """Take a batch, which is over after `took_s` seconds."""
        self._batch = batch
        shape = shape_of(batch, self._model.mixed)
        if self._proposer is not None:
            num_steps, num_tokens = self._proposer.take_work()
            if num_steps:
                shape = replace(shape, draft_steps=num_steps, draft_tokens=num_tokens)
        self.took_s = self._times.seconds(self._model.profiled(shape), self._clock())
        return self

    def results(self) -> dict[str, RunResult]:
        """Return the results of the newest batch."""
        results = {}
        for seq, num_tokens, proposal in self._batch:
            if len(seq.token_ids) != seq.num_computed_tokens + num_tokens:
                result = _NOTHING
            elif proposal is None:
                result = cast(SimulatedSequence, seq).next_token
            else:
                result = self._verify(seq, len(proposal.token_ids))
            results[seq.seq_id] = result
        return results

    def _verify(self, seq: Sequence, num_drafted: int) -> RunResult:
        num = 0
        while num < num_drafted and self._rng.random() < self._acceptance:
            num += 1
        token = SampledToken(seq.request.seed, None)
        return RunResult(Verified((token,) * (num + 1), num))
