"""`simulate`: runs a workload through simulated replicas and returns verdicts."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace

from minserve.controller.router import ROUTERS, make_router
from minserve.devices import Device
from minserve.engine.block_pool import BlockPool
from minserve.errors import WorkloadError
from minserve.planner.policies.base import Planner
from minserve.planner.policies.fcfs import FcfsPlanner
from minserve.planner.policies.registry import (
    POLICIES,
    make_planner,
    planner_class,
    promising_policies,
)
from minserve.planner.policies.sarathi import SarathiPlanner
from minserve.planner.predict.lengths import LengthEstimator, OracleLengths, QuantileLengths
from minserve.planner.predict.perf_model import PerfModel
from minserve.request import Sequence
from minserve.simulator.cluster import Cluster
from minserve.simulator.device_time import DeviceTime
from minserve.simulator.distserve import (
    NVLINK_BYTES_S,
    DecodeReplica,
    DistServeCluster,
    PrefillReplica,
)
from minserve.simulator.events import EventLoop
from minserve.simulator.offered_load import OfferedLoad, Progressed, first_longer
from minserve.simulator.simulated_device import SimulatedProposer
from minserve.simulator.simulated_replica import SimulatedReplica
from minserve.workload.conversation import Conversation
from minserve.workload.task_terms import TaskVerdict
from minserve.workload.verdict import Verdict

BLOCK_SIZE = 16
# vLLM's own defaults for an A100: decodes first under a budget of 2048 tokens (8192 for its
# offline use), at most 256 sequences.
MAX_NUM_SEQS = 256
VLLM_BUDGET = 2048
SARATHI_BUDGET = 512
# Baselines that only a simulation has: `sarathi` under the budget of vLLM, and DistServe.
BASELINES = ("vllm", "distserve")
LENGTHS = ("quantile", "told", "oracle")
MOST_REPLICAS = 4096
MOST_SPECULATION = 64
MOST_SPEED_STEP = 100.0
LEAST_STALL_EVERY_S = 0.1


def known_policies() -> tuple[str, ...]:
    """Return the names of all policies that can be simulated."""
    return (*POLICIES, *BASELINES)


def promises(policy: str) -> bool:
    """Return True if a policy promises SLOs."""
    return policy not in BASELINES and planner_class(policy).promises


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """The settings of a simulation.

    Attributes:
        device: the device of one replica.
        policy: the planner's policy: ``dp``, ``edf``, ``sarathi``, ``fcfs`` (prefills first, whole
            prompts), ``vllm`` (decodes first, chunked prefills, a large budget), or ``distserve``.
        token_budget: most tokens of an iteration (with ``distserve``, of a batch of prefills);
            ``None`` is the policy's default.
        kv_tokens: tokens of KV that fit in each replica; ``None`` is the device's own number.
        max_speculation: most tokens drafted for a sequence; 0 drafts nothing. ``dp`` and
            ``edf`` choose lengths up to it, the other policies always draft so many.
        acceptance: chance that a drafted token is accepted if those before it were.
        lengths: ``oracle``: the planner knows output lengths; ``quantile``: it learns them;
            ``told``: it learns them, and each request's ``max_tokens`` is its length, as in a
            load test.
        length_error: with an oracle, the log-standard deviation of the lengths that it gives.
        noise: log-standard deviation of each iteration's time.
        speed_steps: each device's speed changes every 10 to 60 s: factors on its times are
            log-uniform between 1/speed_steps and speed_steps. 1 keeps the speed.
        stall_every_s: mean seconds from the end of a stall to the next stall, in which a device
            stands still for 0.1 to 1 s; ``None`` for no stalls.
        clairvoyant: True if ``dp`` or ``edf`` is told, before it plans an iteration, the factor
            that noise and speed will have on its time. It is not told of stalls and ``slowness``.
        slowness: factor of the device's times over its profile, from which the planner starts.
        overhead_s: seconds of each iteration beside the device: planning and the host's other work.
        request_s: seconds from a request's due time to its arrival at the engine, plus seconds
            from its tokens to the client: the network, HTTP, tokenization. Promises count from the
            arrival at the engine, verdicts from the due time.
        replicas: number of replicas; with ``distserve``, of groups.
        router, hop_limit: how requests are placed on several replicas; ``distserve`` has its own
            dispatch instead.
        ratio: with ``distserve``, the numbers of prefill and decode replicas in a group.
        link_bytes_s: with ``distserve``, bytes per second that each GPU sends to another GPU.

    Raises:
        WorkloadError: for a value out of range.
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
    speed_steps: float = 1.0
    stall_every_s: float | None = None
    clairvoyant: bool = False
    slowness: float = 1.0
    overhead_s: float = 0.0
    request_s: float = 0.0
    best_effort_share: float = 0.05
    replicas: int = 1
    router: str = "slo"
    hop_limit: int = 2
    ratio: tuple[int, int] = (1, 1)
    link_bytes_s: float = NVLINK_BYTES_S
    seed: int = 0

    def __post_init__(self) -> None:
        _check_choice("policy", self.policy, known_policies())
        _check_choice("router", self.router, tuple(ROUTERS))
        _check_choice("estimate of lengths", self.lengths, LENGTHS)
        _check_range("number of replicas", self.replicas, 1, MOST_REPLICAS)
        for count in self.ratio:
            _check_range("number of prefill or decode replicas", count, 1, MOST_REPLICAS)
        _check_range("token budget", self.budget, 1)
        _check_range("number of sequences", self.max_num_seqs, 1)
        _check_range("speculation length", self.max_speculation, 0, MOST_SPECULATION)
        _check_range("acceptance", self.acceptance, 0.0, 1.0)
        _check_range("error of lengths", self.length_error, 0.0)
        _check_range("noise", self.noise, 0.0)
        _check_range("factor of speed steps", self.speed_steps, 1.0, MOST_SPEED_STEP)
        if self.stall_every_s is not None:
            _check_range("mean seconds between stalls", self.stall_every_s, LEAST_STALL_EVERY_S)
        _check_range("slowness", self.slowness, 1e-3, 1e3)
        _check_range("overhead of iterations", self.overhead_s, 0.0)
        _check_range("overhead of requests", self.request_s, 0.0)
        _check_range("share of best effort", self.best_effort_share, 0.0, 0.9)
        _check_range("hop limit", self.hop_limit, 0)
        _check_range("bandwidth of links", self.link_bytes_s, 1.0)
        self._check_abilities()
        _check_range("number of KV tokens", self.pool_tokens, BLOCK_SIZE)

    def _check_abilities(self) -> None:
        """Check that the device and the policy support the other settings."""
        device, apart = self.device, self.policy == "distserve"
        if self.length_error and self.lengths != "oracle":
            raise WorkloadError("an error of lengths needs an oracle that can err")
        if self.clairvoyant and not promises(self.policy):
            raise WorkloadError(
                f"{self.policy} plans nothing by the time of iterations; a clairvoyant planner is "
                f"one of {', '.join(promising_policies())}"
            )
        if self.max_speculation and apart:
            raise WorkloadError("distserve drafts nothing; choose another policy to speculate")
        if self.max_speculation and not device.drafts:
            raise WorkloadError(
                f"the profile of {device.name} does not say what a draft model costs; "
                "speculate with another one"
            )
        if apart and not device.kv_bytes:
            raise WorkloadError(
                f"the profile of {device.name} does not say how large the KV of a token is, "
                "which distserve has to send; choose a published profile"
            )

    @property
    def num_gpus(self) -> int:
        """The number of GPUs of all replicas; capacities are given per GPU."""
        each = sum(self.ratio) if self.policy == "distserve" else 1
        return self.replicas * each * self.device.num_gpus

    @property
    def pool_tokens(self) -> int:
        """The number of tokens of KV that fit in a replica."""
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
    def longest(self) -> int:
        """The largest sum of a request's prompt and output tokens."""
        return min(self.device.max_model_len, self.pool_tokens)

    @property
    def budget(self) -> int:
        """The largest number of tokens of an iteration."""
        if self.token_budget is not None:
            return self.token_budget
        if self.policy in BASELINES:
            return VLLM_BUDGET
        return planner_class(self.policy).token_budget


MakePlanner = Callable[[Setup, LengthEstimator], Planner]


@dataclass(slots=True)
class SimulationResult:
    """The results of a simulation.

    Attributes:
        verdicts: one for each turn.
        task_verdicts: one for each task, where conversations are tasks.
        seconds: virtual time at which the last turn ended.
        busy_share: share of the time in which a replica ran a batch, averaged over replicas.
        num_preemptions: sum over all replicas.
    """

    verdicts: list[Verdict] = field(default_factory=list)
    task_verdicts: list[TaskVerdict] = field(default_factory=list)
    seconds: float = 0.0
    busy_share: float = 0.0
    num_preemptions: int = 0


class ErringLengths(OracleLengths):
    """An oracle whose lengths are wrong by a factor, drawn for each output.

    Args:
        sigma: log-standard deviation of the factor.
    """

    def __init__(self, lengths: dict[str, int], sigma: float, seed: int) -> None:
        super().__init__(lengths)
        self._sigma, self._seed = sigma, seed
        # Guesses are read in every round of admission, and seeding a generator is slow.
        self._guesses: dict[str, int] = {}

    def _total(self, seq: Sequence, done: int) -> int:
        guess = self._guesses.get(seq.seq_id)
        if guess is None:
            rng = random.Random(f"{self._seed} {seq.seq_id}")
            guess = round(super()._total(seq, done) * math.exp(rng.gauss(0.0, self._sigma)))
            self._guesses[seq.seq_id] = guess
        # A sequence that is longer than its guess is as likely as not to double.
        return guess if guess > done else 2 * done


def planner_of(setup: Setup, lengths: LengthEstimator) -> Planner:
    """Return the planner of one replica; ``distserve`` has its own planners."""
    name = "sarathi" if setup.policy == "vllm" else setup.policy
    return make_planner(
        name,
        chunked_prefill=name != "fcfs",
        model=setup.device.perf_model(),
        lengths=lengths,
        best_effort_share=setup.best_effort_share,
    )


def simulate(
    workload: SequenceOf[Conversation],
    setup: Setup,
    progressed: Progressed = lambda _: None,
    into: SimulationResult | None = None,
    make: MakePlanner = planner_of,
) -> SimulationResult:
    """Run a workload to its end and return the results.

    Args:
        progressed: called after each verdict, with the load.
        into: collects the results, so that they are kept if the simulation is interrupted.
        make: makes the planner of each replica; another function tries another planner.
            ``distserve`` does not call it.

    Raises:
        WorkloadError: if a turn is longer than the model or the KV memory allows.
    """
    result = SimulationResult() if into is None else into
    check_fits(workload, setup)
    lengths: dict[str, int] = {}
    loop = EventLoop()
    shares = any(turn.shared_tokens or turn.n > 1 for one in workload for turn in one.turns)
    cluster = _cluster(setup, loop, lengths, make, prefix_caching=shares)
    model = setup.device.perf_model()
    load = OfferedLoad(
        loop,
        workload,
        model,
        setup.longest,
        lengths,
        cluster.arrive,
        progressed,
        request_s=setup.request_s,
        tells_lengths=setup.lengths == "told",
    )
    cluster.load = load
    load.verdicts, load.task_verdicts = result.verdicts, result.task_verdicts
    try:
        loop.run()
    finally:
        result.seconds = loop.now
        if loop.now > 0:
            busy_s = sum(replica.busy_s for replica in cluster.replicas)
            result.busy_share = busy_s / loop.now / len(cluster.replicas)
        result.num_preemptions = sum(one.planner.num_preemptions for one in cluster.replicas)
    return result


def _cluster(
    setup: Setup,
    loop: EventLoop,
    lengths: dict[str, int],
    make: MakePlanner,
    *,
    prefix_caching: bool,
) -> Cluster | DistServeCluster:
    if setup.policy == "distserve":
        return _distserve(setup, loop, prefix_caching=prefix_caching)
    replicas = [
        _replica(
            setup,
            number,
            make(setup, _estimator(setup, lengths)),
            loop,
            prefix_caching=prefix_caching,
        )
        for number in range(setup.replicas)
    ]
    router = make_router(setup.router, setup.replicas, setup.device.perf_model())
    return Cluster(loop, replicas, router, _estimator(setup, lengths), setup.hop_limit)


def check_fits(workload: SequenceOf[Conversation], setup: Setup) -> None:
    """Check that every turn of a workload can be served.

    Raises:
        WorkloadError: if a turn is longer than the model or the KV memory allows.
    """
    turn = first_longer(workload, setup.longest)
    if turn is not None:
        raise WorkloadError(
            f"a request of {turn.prompt_tokens} + {turn.output_tokens} tokens is longer than "
            f"{setup.device.name} can serve ({setup.device.max_model_len} tokens a sequence, "
            f"{setup.pool_tokens} of KV); leave such requests of a trace out (--drop-longer) or "
            "choose another profile"
        )


def _estimator(setup: Setup, lengths: dict[str, int]) -> LengthEstimator:
    if setup.lengths == "oracle":
        if setup.length_error:
            return ErringLengths(lengths, setup.length_error, setup.seed)
        return OracleLengths(lengths)
    return QuantileLengths()


def _replica(
    setup: Setup, number: int, planner: Planner, loop: EventLoop, *, prefix_caching: bool
) -> SimulatedReplica:
    proposer = None
    if setup.max_speculation:
        lags = any(piece.draft_tokens for piece in setup.device.pieces)
        proposer = SimulatedProposer(setup.max_speculation, lags=lags)
    return SimulatedReplica(
        planner,
        _pool(setup, prefix_caching=prefix_caching),
        _truth(setup),
        clock=loop.clock,
        token_budget=setup.budget,
        max_num_seqs=setup.max_num_seqs,
        proposer=proposer,
        acceptance=setup.acceptance,
        device_time=_device_time(setup, number),
        clairvoyant=setup.clairvoyant,
        seed=setup.seed * 1009 + number,
    )


def _distserve(setup: Setup, loop: EventLoop, *, prefix_caching: bool) -> DistServeCluster:
    num_prefills, num_decodes = (setup.replicas * count for count in setup.ratio)
    prefills = [
        PrefillReplica(
            FcfsPlanner(setup.device.perf_model(), chunked_prefill=False),
            _pool(setup, prefix_caching=prefix_caching),
            _truth(setup),
            clock=loop.clock,
            token_budget=setup.budget,
            max_num_seqs=setup.max_num_seqs,
            device_time=_device_time(setup, number),
        )
        for number in range(num_prefills)
    ]
    decodes = [
        DecodeReplica(
            SarathiPlanner(setup.device.perf_model()),
            _pool(setup, prefix_caching=prefix_caching),
            _truth(setup),
            clock=loop.clock,
            token_budget=max(SARATHI_BUDGET, setup.max_num_seqs),
            max_num_seqs=setup.max_num_seqs,
            device_time=_device_time(setup, num_prefills + number),
        )
        for number in range(num_decodes)
    ]
    # Each GPU of a replica sends its own share.
    transfer_s = setup.device.kv_bytes / (setup.link_bytes_s * setup.device.num_gpus)
    return DistServeCluster(loop, prefills, decodes, transfer_s)


def _pool(setup: Setup, *, prefix_caching: bool) -> BlockPool:
    return BlockPool(setup.pool_tokens // BLOCK_SIZE, BLOCK_SIZE, prefix_caching=prefix_caching)


def _truth(setup: Setup) -> PerfModel:
    """Return the usual times of batches, whatever the planner believes."""
    slower = (piece.slowed(setup.slowness) for piece in setup.device.pieces)
    pieces = [replace(one, base=one.base + setup.overhead_s) for one in slower]
    return PerfModel(pieces, mixed=setup.device.mixed)


def _device_time(setup: Setup, number: int) -> DeviceTime:
    """Return the behaviour over time of one replica's device."""
    return DeviceTime(
        noise=setup.noise,
        speed_steps=setup.speed_steps,
        stall_every_s=setup.stall_every_s,
        seed=f"{setup.seed} {number}",
    )


def _check_choice(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise WorkloadError(f"no {what} {value!r}; there are {', '.join(known)}")


def _check_range(what: str, value: float, least: float, most: float = math.inf) -> None:
    if not (least <= value <= most and math.isfinite(value)):
        upper = "" if math.isinf(most) else f" and at most {most:g}"
        raise WorkloadError(f"the {what} must be at least {least:g}{upper}, not {value}")
