"""`simulate`: a workload through simulated replicas, to verdicts."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from minserve.controller.router import make_router
from minserve.engine.block_pool import BlockPool
from minserve.errors import WorkloadError
from minserve.planner.lengths import LengthEstimator, OracleLengths, QuantileLengths
from minserve.planner.perf_model import PerfModel, Piece
from minserve.planner.policies import PROMISING, make_planner
from minserve.simulator.cluster import Cluster
from minserve.simulator.events import EventLoop
from minserve.simulator.load import OfferedLoad, Progressed, check_lengths
from minserve.simulator.profiles import Device
from minserve.simulator.replica import Drafter, SimulatedReplica
from minserve.workload.conversation import Conversation
from minserve.workload.verdict import Verdict

BLOCK_SIZE = 16
# vLLM's own defaults for an A100: decodes first under a budget of 2048 tokens (8192 for its
# offline use), at most 256 sequences.
MAX_NUM_SEQS = 256
VLLM_BUDGET = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is simulated.

    Attributes:
        device: of one replica.
        policy: of the planner: ``dp``, ``edf``, ``sarathi``, ``fcfs`` (prefills first, whole
            prompts), or ``vllm`` (decodes first, chunked prefills, a large budget).
        token_budget: most tokens of an iteration; ``None`` is the policy's default.
        kv_tokens: of each replica; ``None`` is the device's own.
        max_speculation: most tokens drafted for a sequence; 0 drafts nothing. ``dp`` and
            ``edf`` choose lengths up to it, the others always draft as many.
        acceptance: chance that a drafted token is accepted if those before it were.
        lengths: ``oracle``, where the planner knows output lengths, or ``quantile``, where it
            learns them.
        length_error: with an oracle, the log-standard deviation of what it says.
        noise: log-standard deviation of each iteration's time.
        slowness: of the device over its profile, which the planner starts from.
        replicas, router, hop_limit: several replicas.
    """

    device: Device
    policy: str = "dp"
    token_budget: int | None = None
    max_num_seqs: int = MAX_NUM_SEQS
    kv_tokens: int | None = None
    max_speculation: int = 0
    acceptance: float = 0.7
    lengths: str = "quantile"
    length_error: float = 0.0
    noise: float = 0.0
    slowness: float = 1.0
    best_effort_share: float = 0.05
    replicas: int = 1
    router: str = "slo"
    hop_limit: int = 2
    seed: int = 0

    @property
    def pool_tokens(self) -> int:
        """KV tokens of a replica."""
        if self.kv_tokens is not None:
            return self.kv_tokens
        device = self.device
        found = device.kv_tokens_drafting if self.max_speculation else device.kv_tokens
        if found is None:
            raise WorkloadError(
                f"the profile of {device.name} does not say how much KV fits in memory; "
                "give --kv-tokens (`minserve serve` prints it when it starts)"
            )
        return found

    @property
    def budget(self) -> int:
        """Most tokens of an iteration."""
        if self.token_budget is not None:
            return self.token_budget
        return {"sarathi": 512, "vllm": VLLM_BUDGET, "fcfs": VLLM_BUDGET}.get(self.policy, 8192)


@dataclass(slots=True)
class Outcome:
    """What a simulation brought.

    Attributes:
        verdicts: one for each turn.
        seconds: until the last one ended.
        busy_share: of the time, in which a replica ran a batch, on average.
        num_preemptions: over all replicas.
    """

    verdicts: list[Verdict] = field(default_factory=list)
    seconds: float = 0.0
    busy_share: float = 0.0
    num_preemptions: int = 0


class ErringLengths(OracleLengths):
    """An oracle that errs by a factor, another one for each request.

    Args:
        sigma: log-standard deviation of the factor.
    """

    def __init__(self, lengths: dict[str, int], sigma: float, seed: int) -> None:
        super().__init__(lengths)
        self._sigma, self._seed = sigma, seed

    def _total(self, seq) -> int:
        rng = random.Random(f"{self._seed} {seq.seq_id}")
        guess = round(super()._total(seq) * math.exp(rng.gauss(0.0, self._sigma)))
        # Whoever outlives the guess is as likely as not to double.
        return guess if guess > seq.num_output_tokens else 2 * seq.num_output_tokens


def simulate(
    workload: Sequence[Conversation],
    setup: Setup,
    progressed: Progressed = lambda _: None,
    into: Outcome | None = None,
) -> Outcome:
    """Run a workload to its end.

    Args:
        progressed: called after each verdict, with the load.
        into: where verdicts are kept, for whoever wants them if this is interrupted.

    Raises:
        WorkloadError: where a turn is longer than the model or the KV memory.
    """
    outcome = Outcome() if into is None else into
    _check(workload, setup)
    lengths: dict[str, int] = {}
    loop = EventLoop()
    shares = any(turn.shared_tokens for one in workload for turn in one.turns)
    replicas = [
        _replica(setup, number, _estimator(setup, lengths), prefix_caching=shares)
        for number in range(setup.replicas)
    ]
    model = setup.device.perf_model()
    router = make_router(setup.router, setup.replicas, model)
    cluster = Cluster(loop, replicas, router, _estimator(setup, lengths), setup.hop_limit)
    longest = min(setup.device.max_model_len, setup.pool_tokens)
    load = OfferedLoad(loop, workload, model, longest, lengths, cluster.arrive, progressed)
    cluster.load = load
    load.verdicts = outcome.verdicts
    loop.run()
    outcome.seconds = loop.now
    if loop.now > 0:
        busy_s = sum(replica.busy_s for replica in replicas)
        outcome.busy_share = busy_s / loop.now / len(replicas)
    outcome.num_preemptions = sum(replica.planner.num_preemptions for replica in replicas)
    return outcome


def _check(workload: Sequence[Conversation], setup: Setup) -> None:
    turn = check_lengths(workload, setup.device.max_model_len, setup.pool_tokens)
    if turn is not None:
        raise WorkloadError(
            f"a request of {turn.prompt_tokens} + {turn.output_tokens} tokens is longer than "
            f"{setup.device.name} can serve ({setup.device.max_model_len} tokens a sequence, "
            f"{setup.pool_tokens} of KV); drop it from the trace or choose another profile"
        )


def _estimator(setup: Setup, lengths: dict[str, int]) -> LengthEstimator:
    if setup.lengths == "oracle":
        if setup.length_error:
            return ErringLengths(lengths, setup.length_error, setup.seed)
        return OracleLengths(lengths)
    return QuantileLengths()


def _replica(
    setup: Setup, number: int, lengths: LengthEstimator, *, prefix_caching: bool
) -> SimulatedReplica:
    device = setup.device.perf_model()
    name = "sarathi" if setup.policy == "vllm" else setup.policy
    promises = {"lengths": lengths, "best_effort_share": setup.best_effort_share}
    planner = make_planner(
        name,
        chunked_prefill=name != "fcfs",
        model=setup.device.perf_model(),
        **(promises if name in PROMISING else {}),
    )
    truth = PerfModel([_slower(piece, setup.slowness) for piece in device.pieces])
    drafter = None
    if setup.max_speculation:
        lags = any(piece.draft_tokens for piece in device.pieces)
        drafter = Drafter(setup.max_speculation, lags=lags)
    pool = BlockPool(setup.pool_tokens // BLOCK_SIZE, BLOCK_SIZE, prefix_caching=prefix_caching)
    return SimulatedReplica(
        planner,
        pool,
        truth,
        token_budget=setup.budget,
        max_num_seqs=setup.max_num_seqs,
        drafter=drafter,
        acceptance=setup.acceptance,
        noise=_noise(setup, number),
        seed=setup.seed * 1009 + number,
    )


def _slower(piece: Piece, factor: float) -> Piece:
    return replace(
        piece,
        **{name: factor * getattr(piece, name) for name in Piece.__slots__},
    )


def _noise(setup: Setup, number: int) -> Callable[[], float] | None:
    if not setup.noise:
        return None
    rng = random.Random(f"noise {setup.seed} {number}")
    return lambda: math.exp(rng.gauss(0.0, setup.noise))
