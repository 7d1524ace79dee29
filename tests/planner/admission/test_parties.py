"""Requests of several outputs: what is counted once, and that promises go to all of them."""

from __future__ import annotations

import pytest
from loads import device
from replay import Replay

from minserve.engine.block_pool import BlockPool
from minserve.planner.admission.parties import partition, spared_blocks, starts_of
from minserve.planner.plan import PlannerView
from minserve.planner.policies.registry import make_planner
from minserve.request import Request, Sequence, SequenceState
from minserve.sampling_params import SamplingParams
from minserve.slo.objectives import SLO, Standing

GENEROUS = SLO(ttft=20.0, tpot=2.0)
STRICT = SLO(ttft=20.0, tpot=2.0, on_unattainable="reject")


def outputs(
    name: str,
    n: int,
    prompt: int = 40,
    slo: SLO | None = GENEROUS,
    arrival: float = 0.0,
    length: int = 20,
    **params: object,
) -> list[Sequence]:
    """All outputs of one request; each is as long as ``length`` says."""
    request = Request(
        request_id=name,
        prompt_token_ids=tuple(hash((name, i)) % 1000 for i in range(prompt)),
        params=SamplingParams(n=n, max_tokens=length, **params),
        seed=length,
        arrival_s=arrival,
        slo=slo,
        targets=None if slo is None else slo.resolve(0.0, 0.0),
    )
    return [Sequence(request, index) for index in range(n)]


def replay_of(
    policy: str = "dp", *, blocks: int = 400, max_num_seqs: int = 64, caching: bool = True
) -> Replay:
    return Replay(
        make_planner(policy, model=device()),
        BlockPool(blocks, 16, prefix_caching=caching),
        512,
        max_num_seqs,
        device=device(),
    )


def view_of(pool: BlockPool, *seqs: Sequence) -> PlannerView:
    return PlannerView(
        waiting=[s for s in seqs if s.state is SequenceState.WAITING],
        running=[s for s in seqs if s.state is SequenceState.RUNNING],
        memory=pool,
        token_budget=64,
        max_num_seqs=8,
    )


def run(pool: BlockPool, seq: Sequence, num_tokens: int, *sampled: int) -> None:
    if seq.state is SequenceState.WAITING:
        seq.num_computed_tokens, seq.state = pool.attach(seq), SequenceState.RUNNING
    pool.grow(seq, num_tokens)
    seq.num_computed_tokens += num_tokens
    seq.token_ids += sampled
    pool.commit(seq)


# -- what is counted once ----------------------------------------------------------------


def starts(pool: BlockPool, *seqs: Sequence) -> list[int]:
    _, (party,) = partition(view_of(pool, *seqs), frozenset())
    return starts_of(party, pool, lambda seq: pool.cached_prefix(seq).num_tokens)


def test_the_prompt_is_computed_once_where_its_blocks_are_shared() -> None:
    pool = BlockPool(40, 16)
    # Two full blocks, and one that each output fills by itself.
    assert starts(pool, *outputs("a", 3)) == [0, 32, 32]
    assert starts(pool, *outputs("a", 3, prompt=16)) == [0, 0, 0]
    assert starts(pool, *outputs("a", 3, prompt=17)) == [0, 16, 16]
    assert starts(pool, *outputs("a", 3, prompt_logprobs=1)) == [0, 0, 0]
    without = BlockPool(40, 16, prefix_caching=False)
    assert starts(without, *outputs("a", 3)) == [0, 0, 0]


def test_what_is_computed_already_is_not_counted_again() -> None:
    pool = BlockPool(40, 16)
    first, *others = outputs("a", 3)
    run(pool, first, 20)
    assert starts(pool, first, *others) == [20, 32, 32]
    first.standing = Standing.ADMITTED
    run(pool, first, 20, 7)
    assert first.is_decoding
    assert starts(pool, first, *others) == [32, 32]
    pool.release(first)
    assert starts(pool, *others) == [32, 32], "still cached"


def test_an_output_that_gave_up_its_blocks_counts_from_what_is_cached_of_it() -> None:
    pool = BlockPool(40, 16)
    first, second = outputs("a", 2)
    run(pool, first, 40, *range(30))
    run(pool, first, 29)
    pool.release(first)
    first.num_computed_tokens, first.state = 0, SequenceState.WAITING
    assert starts(pool, first, second) == [64, 32]


def spared(pool: BlockPool, *seqs: Sequence) -> dict[str, int]:
    remaining = {seq.seq_id: seq.index + 1 for seq in seqs}
    return spared_blocks(partition(view_of(pool, *seqs), frozenset())[1], pool, remaining)


def test_shared_blocks_are_held_once_by_whoever_goes_on_for_longest() -> None:
    pool = BlockPool(40, 16)
    first, second, third = seqs = outputs("a", 3)
    assert spared(pool, *seqs) == {"a/1": 2, "a/2": 2}
    assert spared(pool, *outputs("a", 1)) == {}
    assert spared(BlockPool(40, 16, prefix_caching=False), *seqs) == {}
    run(pool, first, 40, 7)
    run(pool, second, 8, 7)
    first.standing = second.standing = third.standing = Standing.ADMITTED
    assert first.block_table[:2] == second.block_table[:2]
    assert spared(pool, *seqs) == {"a/0": 2, "a/2": 2}


def test_a_prompt_that_was_computed_twice_is_held_twice() -> None:
    pool = BlockPool(40, 16)
    first, second = outputs("a", 2)
    for seq in (first, second):
        seq.state = SequenceState.RUNNING
    for seq in (first, second):
        run(pool, seq, 40, 7)
    assert first.block_table[0] != second.block_table[0]
    assert spared(pool, first, second) == {}


# -- who begins when ---------------------------------------------------------------------


def prompt_tokens_run(replay: Replay, load: list[Sequence]) -> int:
    """Serve a load; returns how many tokens of prompts were run."""
    total = 0
    launched = replay.launched

    def counting(plan, by_id):
        nonlocal total
        for seq_id, num in plan.num_scheduled_tokens.items():
            total += 0 if by_id[seq_id].is_decoding else num
        launched(plan, by_id)

    replay.launched = counting
    replay.run(load)
    return total


@pytest.mark.parametrize("policy", ["dp", "edf", "sarathi", "fcfs"])
def test_outputs_begin_when_one_of_them_has_computed_the_prompt(policy: str) -> None:
    load = [*outputs("a", 4, prompt=100), *outputs("b", 2, prompt=50, slo=None)]
    # 96 of 100 and 48 of 50 tokens lie in full blocks.
    assert prompt_tokens_run(replay_of(policy), load) == 100 + 3 * 4 + 50 + 2
    load = [*outputs("a", 4, prompt=100), *outputs("b", 2, prompt=50, slo=None)]
    replay = replay_of(policy, caching=False)
    assert prompt_tokens_run(replay, load) == 4 * 100 + 2 * 50


# -- all or none -------------------------------------------------------------------------


def test_all_outputs_are_promised_when_the_first_one_begins() -> None:
    replay, seqs = replay_of(), outputs("a", 5)
    replay.waiting = list(seqs)
    plan = replay.step()
    assert plan.start == ["a/0"]
    assert sorted(plan.admit) == [f"a/{i}" for i in range(5)]
    replay.run([])
    assert all(seq.progress.attained for seq in seqs)


@pytest.mark.parametrize(
    ("settings", "reason"), [({"max_num_seqs": 7}, "device"), ({"blocks": 20}, "device")]
)
def test_what_never_has_room_for_all_outputs_is_refused(settings: dict, reason: str) -> None:
    replay = replay_of(**settings)
    seqs = outputs("a", 8, slo=STRICT, length=64)
    replay.waiting = list(seqs)
    plan = replay.step()
    assert set(plan.reject) == {seq.seq_id for seq in seqs}
    assert {refusal.reason for refusal in plan.reject.values()} == {reason}
    assert not plan.num_scheduled_tokens


def test_a_request_with_too_many_outputs_for_a_promise_is_served_as_best_effort() -> None:
    replay = replay_of(max_num_seqs=7)
    seqs = outputs("a", 8)
    replay.waiting = list(seqs)
    plan = replay.step()
    assert set(plan.relegate) == {seq.seq_id for seq in seqs}
    replay.run([])
    assert len(replay.finished) == 8


def test_outputs_that_fit_one_by_one_are_refused_together_where_not_all_fit() -> None:
    # A token takes 3 ms beside others, 20 ms a batch: some 20 decodes fit into 100 ms.
    slo = SLO(ttft=5.0, tpot=0.1, on_unattainable="reject")
    for n, fits in ((10, True), (40, False)):
        replay = replay_of()
        running = outputs("run", 3, slo=None, length=60)
        late = outputs("many", n, slo=slo, arrival=0.3)
        replay.run([*running, *late])
        assert len(replay.rejected) == (0 if fits else n)
        assert all(seq.progress.attained == fits for seq in late)
        assert len(replay.finished) == 3 + (n if fits else 0)


def test_one_broken_output_takes_the_promise_from_its_siblings() -> None:
    replay = replay_of()
    seqs = outputs("a", 4, slo=SLO(ttft=20.0, tpot=0.2))
    replay.waiting = list(seqs)
    while not all(seq.num_output_tokens > 2 for seq in seqs):
        replay.step()
    assert {seq.standing for seq in seqs} == {Standing.ADMITTED}
    seqs[2].progress.add_token(seqs[2].progress.next_deadline_s + 0.5)
    replay.step()
    assert {seq.standing for seq in seqs} == {Standing.BEST_EFFORT}
    replay.run([])
    assert {seq.standing for seq in seqs} == {Standing.BEST_EFFORT}


def test_a_request_that_has_begun_is_not_refused() -> None:
    pool = BlockPool(40, 16)
    first, second = outputs("a", 2, slo=STRICT)
    _, (party,) = partition(view_of(pool, first, second), frozenset())
    assert party.awaits_answer
    _, (left,) = partition(view_of(pool, second), frozenset())
    assert not left.awaits_answer, "the first one has ended"
    run(pool, first, 20)
    _, (party,) = partition(view_of(pool, first, second), frozenset())
    assert not party.awaits_answer
    assert party.is_broken({second.seq_id})
    assert not party.is_broken({"another"})
