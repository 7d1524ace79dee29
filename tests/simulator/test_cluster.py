"""Several replicas behind a router: nothing is lost, and requests move on where they must."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from toy import TIGHT, TOY, chats, run, single, singles

from minserve.controller.router import make_router
from minserve.engine.block_pool import BlockPool
from minserve.planner.policies.registry import make_planner
from minserve.planner.predict.lengths import QuantileLengths
from minserve.planner.predict.perf_model import PerfModel
from minserve.planner.replica_load import load_of
from minserve.simulator.cluster import Cluster
from minserve.simulator.events import EventLoop
from minserve.simulator.offered_load import OfferedLoad
from minserve.simulator.simulated_replica import SimulatedReplica
from minserve.simulator.simulated_sequence import SimulatedSequence
from minserve.workload.conversation import Conversation, num_turns


class Watched:
    """A cluster whose sequences are kept.

    Args:
        num_slow: replicas, the first ones, that are too slow for any promise.
    """

    def __init__(
        self,
        number: int,
        *,
        router: str = "slo",
        policy: str = "dp",
        hop_limit: int = 2,
        num_slow: int = 0,
    ) -> None:
        self.loop, lengths = EventLoop(), QuantileLengths()
        self.replicas = [
            SimulatedReplica(
                make_planner(policy, model=device(slowness=16 if i < num_slow else 1)),
                BlockPool(128, 16),
                device(slowness=16 if i < num_slow else 1),
                clock=self.loop.clock,
                token_budget=512,
                max_num_seqs=64,
            )
            for i in range(number)
        ]
        self.cluster = Cluster(
            self.loop,
            self.replicas,
            make_router(router, number, TOY.perf_model()),
            lengths,
            hop_limit,
        )
        self.sequences: list[SimulatedSequence] = []

    def serve(self, workload: list[Conversation]) -> OfferedLoad:
        load = OfferedLoad(
            self.loop, workload, TOY.perf_model(), TOY.max_model_len, {}, self.arrive
        )
        self.cluster.load = load
        self.loop.run()
        for replica in self.replicas:
            replica.pool.check_integrity([])
            assert not replica.has_work
        return load

    def arrive(self, *seqs: SimulatedSequence) -> None:
        self.sequences += seqs
        self.cluster.arrive(*seqs)


def device(slowness: float) -> PerfModel:
    (piece,) = TOY.pieces
    return PerfModel([replace(piece, tokens=slowness * piece.tokens, base=slowness * piece.base)])


@pytest.mark.parametrize("router", ["slo", "least-loaded", "round-robin"])
@pytest.mark.parametrize("policy", ["dp", "sarathi"])
def test_every_turn_gets_one_verdict(router: str, policy: str) -> None:
    workload = chats(60.0, 60)
    watched = Watched(3, router=router, policy=policy)
    load = watched.serve(workload)
    assert len(load.verdicts) == num_turns(workload) == len(watched.sequences)
    lengths = Counter(turn.output_tokens for one in workload for turn in one.turns)
    assert Counter(verdict.output_tokens for verdict in load.verdicts) == lengths
    assert all(replica.num_iterations for replica in watched.replicas)


@pytest.mark.parametrize("n", [1, 3], ids="{} outputs".format)
def test_requests_move_on_as_often_as_the_limit_allows_and_keep_their_arrival(n: int) -> None:
    turn = replace(single(0.0, 300, 2, TIGHT).turns[0], n=n)
    workload = [Conversation(2.0 * i, (turn,)) for i in range(60)]
    kept = []
    for limit in (0, 1, 2):
        watched = Watched(4, hop_limit=limit, num_slow=2)
        load = watched.serve(workload)
        assert max(seq.hops for seq in watched.sequences) == limit
        arrivals = sorted(seq.progress.arrival_s for seq in watched.sequences)
        assert arrivals == [one.arrival_s for one in workload for _ in range(n)]
        assert all(len({one.hops for one in seq.siblings}) == 1 for seq in watched.sequences)
        assert len(load.verdicts) == 60
        kept.append(sum(verdict.attained for verdict in load.verdicts))
    assert kept == [0, 0, 60], "the first two replicas are too slow"


def test_a_request_never_comes_back_to_a_replica_that_gave_it_up() -> None:
    watched = Watched(4, hop_limit=9, num_slow=4)
    placed: dict[str, list[int]] = {}
    for number, replica in enumerate(watched.replicas):

        def submit(seq: SimulatedSequence, number: int = number, real=replica.submit) -> None:
            placed.setdefault(seq.seq_id, []).append(number)
            real(seq)

        replica.submit = submit
    watched.serve([single(i / 4, 300, 5, TIGHT) for i in range(60)])
    assert max(map(len, placed.values())) > 1
    assert all(len(set(visits)) == len(visits) for visits in placed.values())


def test_a_turn_follows_its_prefix() -> None:
    workload = chats(3.0, 40)
    watched = Watched(4)
    watched.serve(workload)
    reusable = sum(turn.shared_tokens for one in workload for turn in one.turns)
    hits = sum(replica.pool.prefix_hits_tokens for replica in watched.replicas)
    assert hits > 0.8 * reusable


def test_more_replicas_serve_more() -> None:
    workload = singles(60.0, 120)
    few, more, many = (
        sum(v.attained for v in run(workload, replicas=n).verdicts) for n in (1, 2, 8)
    )
    assert few < more < many
    assert many > 105


def test_a_thousand_replicas_work() -> None:
    workload = [single(i / 4096, 100, 2) for i in range(1500)]
    watched = Watched(1000)
    load = watched.serve(workload)
    assert len(load.verdicts) == 1500
    assert all(verdict.attained for verdict in load.verdicts)
    assert sum(replica.num_iterations > 0 for replica in watched.replicas) > 150


def test_what_a_replica_reports() -> None:
    watched = Watched(1)
    replica = watched.replicas[0]
    before = load_of(replica.planner, replica.view())
    assert (before.prefill_tokens, before.num_sequences) == (0, 0)
    assert before.free_tokens == 128 * 16
    watched.loop.at(0.001, lambda: states.append(load_of(replica.planner, replica.view())))
    states = []
    watched.serve([single(0.0, 100, 50, TIGHT)])
    (during,) = states
    assert (during.prefill_tokens, during.num_sequences) == (100, 1)
    assert during.tightest_tpot_s == 1 / during.decode_rate
    assert during.free_tokens < before.free_tokens - 100
    assert load_of(replica.planner, replica.view()) == before
