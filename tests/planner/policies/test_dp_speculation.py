"""Policies with somebody who drafts: when it pays, what it may take, and what stays promised."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from drafting_replay import DraftingReplay, ReplayProposer
from replay import make_sequence

from minserve.engine.block_pool import BlockPool
from minserve.planner.batching.draft_lengths import MOST_LAG, Drafting, DraftsForPrefills
from minserve.planner.batching.formation import BatchLimits, Work, form_batch
from minserve.planner.plan import IterationPlan, PlannerView
from minserve.planner.policies.promising import GUARD_S
from minserve.planner.policies.registry import make_planner
from minserve.planner.predict.acceptance import AcceptanceEstimator
from minserve.planner.predict.perf_model import BatchShape, PerfModel, Piece
from minserve.request import Sequence, SequenceState
from minserve.slo.objectives import SLO, Standing

# Bound by memory up to some 60 tokens, then by arithmetic; a draft step takes 1 ms.
GPU = (
    Piece(tokens=1e-6, draft_steps=0.001, draft_tokens=1e-6, base=0.02),
    Piece(tokens=3e-4, draft_steps=0.001, draft_tokens=1e-6, base=0.002),
)
# Every token costs, drafted or not.
CPU = (Piece(tokens=0.003, draft_steps=1e-4, draft_tokens=1e-4, base=0.002),)
TIGHT = SLO(ttft=1.0, tpot=0.05, name="tight")
LOOSE = SLO(ttft=1.5, tpot=0.1, name="loose")


def replay_of(
    policy: str = "dp",
    device: tuple[Piece, ...] = GPU,
    *,
    blocks: int = 1000,
    budget: int = 512,
    max_num_seqs: int = 64,
    proposer: ReplayProposer | None = None,
    **settings: object,
) -> DraftingReplay:
    planner = make_planner(policy, model=PerfModel(device, margin=1.02))
    return DraftingReplay(
        planner, BlockPool(blocks, 16, prefix_caching=False), budget, max_num_seqs,
        device=PerfModel(device), proposer=proposer, **settings,
    )  # fmt: skip


def decodes(num: int, output: int = 60, prompt: int = 20) -> list[Sequence]:
    return [make_sequence(f"d{i}", [1] * prompt, output, slo=None) for i in range(num)]


def seconds_with(
    device: tuple[Piece, ...], num: int, acceptance: float
) -> tuple[float, float, float]:
    """Seconds without and with speculation, and the share of iterations with drafts."""
    plain = replay_of(device=device)
    plain.run(decodes(num))
    drafting = replay_of(device=device, proposer=ReplayProposer(6), acceptance=acceptance)
    drafting.run(decodes(num))
    return plain.now, drafting.now, drafting.num_speculating / drafting.planner.num_plans


# -- when it pays ------------------------------------------------------------------------


def test_a_lone_decode_with_a_good_draft_is_sped_up() -> None:
    plain_s, drafting_s, share = seconds_with(GPU, 1, acceptance=0.9)
    assert drafting_s < plain_s / 2
    assert share > 0.8


def test_a_lone_decode_with_a_bad_draft_is_not_slowed_down() -> None:
    plain_s, drafting_s, share = seconds_with(GPU, 1, acceptance=0.0)
    assert drafting_s < 1.15 * plain_s
    assert share < 0.3


@pytest.mark.parametrize("acceptance", [0.1, 0.6])
def test_a_batch_that_computes_at_its_limit_is_left_alone(acceptance: float) -> None:
    plain_s, drafting_s, share = seconds_with(CPU, 40, acceptance)
    assert share < 0.15, "but for the last few decodes"
    assert drafting_s < 1.05 * plain_s


def test_of_two_decodes_the_one_with_good_drafts_gets_the_longer_ones() -> None:
    drafted = {"d0": [], "d1": []}

    def note(_: PlannerView, plan: IterationPlan) -> None:
        if len(plan.num_scheduled_tokens) == 2:
            for seq_id, lengths in drafted.items():
                lengths.append(plan.speculation.get(seq_id, 0))

    acceptance = {"d0": 0.95, "d1": 0.05}
    device = (Piece(tokens=0.002, draft_steps=1e-4, base=0.02),)
    replay = replay_of(device=device, proposer=ReplayProposer(6), acceptance=acceptance, check=note)
    replay.run(decodes(2, output=150))
    good, bad = (sum(lengths[15:]) / len(lengths[15:]) for lengths in drafted.values())
    assert good > 2.5
    assert bad < 1.0


def test_without_a_performance_model_nothing_is_drafted_by_promises() -> None:
    replay = DraftingReplay(
        make_planner("dp"), BlockPool(100, 16), 64, 8, proposer=ReplayProposer(6)
    )
    replay.run(decodes(3))
    assert replay.num_speculating == 0
    assert len(replay.finished) == 3


# -- catching up -------------------------------------------------------------------------


def test_a_draft_model_far_behind_first_catches_up() -> None:
    lags, plans = [], []

    def note(view: PlannerView, plan: IterationPlan) -> None:
        if view.running and view.running[0].is_decoding:
            lags.append(view.speculation.lag(view.running[0]))
            plans.append(plan)

    device = (Piece(tokens=1e-4, draft_steps=0.001, draft_tokens=1e-4, base=0.02),)
    replay = replay_of(device=device, proposer=ReplayProposer(6), acceptance=0.9, check=note)
    replay.run(decodes(1, output=200, prompt=900))
    speculating = [i for i, plan in enumerate(plans) if plan.speculation]
    catching_up = [i for i, plan in enumerate(plans) if plan.catch_up]
    assert lags[0] > 800
    assert len(catching_up) > 1, "over several iterations"
    assert max(catching_up) < min(speculating)
    for lag, plan in zip(lags, plans, strict=True):
        assert not (plan.speculation and lag > MOST_LAG)
        if plan.catch_up:
            plain = replay.device.profiled(replace(plan.shape, draft_steps=0, draft_tokens=0))
            assert plan.predicted_s <= 2.1 * plain * replay.planner.model.drift


def test_nobody_catches_up_for_the_last_few_tokens() -> None:
    device = (Piece(tokens=1e-4, draft_steps=0.001, draft_tokens=1e-3, base=0.02),)
    replay = replay_of(device=device, proposer=ReplayProposer(6), acceptance=0.9)
    plans = []
    replay.check = lambda _, plan: plans.append(plan)
    replay.run(decodes(1, output=5, prompt=900))
    assert not any(plan.catch_up or plan.speculation for plan in plans)


# -- what drafts may take ----------------------------------------------------------------


def crowd(rng: random.Random, capacity: int) -> list[Sequence]:
    """Requests with and without SLOs, each of which fits the pool alone."""
    device, load = PerfModel(GPU), []
    for i in range(30):
        prompt = rng.randint(1, capacity // 3)
        output = rng.randint(1, min(40, capacity - prompt - 1))
        slo = rng.choice([TIGHT, LOOSE, None])
        arrival = rng.random() * 0.5
        load.append(make_sequence(f"r{i}", [1] * prompt, output, arrival, slo=slo, model=device))
    return load


@pytest.mark.parametrize("policy", ["sarathi", "fcfs", "dp", "edf"])
@pytest.mark.parametrize("seed", range(8))
def test_drafts_fit_budget_and_blocks_and_every_request_finishes(policy: str, seed: int) -> None:
    rng = random.Random(seed)
    blocks, max_num_seqs = rng.randint(14, 60), rng.randint(1, 12)
    replay = replay_of(
        policy, blocks=blocks, budget=max_num_seqs + rng.choice([0, 3, 200]),
        max_num_seqs=max_num_seqs, proposer=ReplayProposer(rng.randint(1, 8), lags=rng.random() < 0.5),
        acceptance=rng.choice([0.3, 0.9]),
    )  # fmt: skip
    replay.run(crowd(rng, blocks * 16), until=300.0)
    assert len(replay.finished) == 30
    assert replay.pool.num_free_blocks == blocks


@pytest.mark.parametrize("policy", ["sarathi", "fcfs"])
@pytest.mark.parametrize("seed", range(8))
def test_drafts_cost_nobody_its_blocks_and_no_decode_its_turn(policy: str, seed: int) -> None:
    rng = random.Random(seed)
    blocks, max_num_seqs = rng.randint(14, 60), rng.randint(4, 12)
    twin, compared = make_planner(policy), 0

    def compare(view: PlannerView, plan: IterationPlan) -> None:
        nonlocal compared
        plain = twin.plan(replace(view, speculation=None), 0.0)
        assert set(plan.preempt) <= set(plain.preempt), "nobody is preempted for a guess"
        running = [seq.seq_id for seq in view.running if seq.is_decoding]
        for seq_id in running:
            if seq_id in plain.num_scheduled_tokens:
                assert seq_id in plan.num_scheduled_tokens, "a decode gave way to a guess"
        compared += bool(plan.speculation)

    replay = replay_of(
        policy, blocks=blocks, budget=max_num_seqs + rng.choice([0, 8, 200]),
        max_num_seqs=max_num_seqs, proposer=ReplayProposer(8, lags=False), check=compare,
    )  # fmt: skip
    replay.run(crowd(rng, blocks * 16))
    assert compared > 20


def running_decode(pool: BlockPool, name: str) -> Sequence:
    """A decode under a promise, whose next token is due in a while."""
    seq = make_sequence(name, [1] * 20, 40, slo=TIGHT, model=PerfModel(GPU))
    pool.grow(seq, 20)
    seq.state, seq.standing, seq.num_computed_tokens = SequenceState.RUNNING, Standing.ADMITTED, 20
    seq.token_ids.append(1)
    seq.progress.add_token(0.0)
    return seq


@pytest.mark.parametrize("lag", [0, 20, 300])
def test_nobody_is_drafted_for_twice_where_a_prefill_that_waits_finds_no_room(lag: int) -> None:
    pool = BlockPool(12, 16, prefix_caching=False)
    decode = running_decode(pool, "d")
    waiting = make_sequence("p", [1] * 400, 5, slo=LOOSE, model=PerfModel(GPU))
    proposer = ReplayProposer(6)
    proposer.computed["d"] = decode.num_tokens - 1 - lag
    view = PlannerView(
        waiting=[waiting], running=[decode], memory=pool, token_budget=512, max_num_seqs=8,
        speculation=proposer,
    )  # fmt: skip
    work = Work(decodes=[(0.05, decode)], prefills=[(1.0, waiting)])
    wanted = DraftsForPrefills({decode.progress.tpot_s: 0.3}, needed=True)
    model = PerfModel(GPU)
    drafting = Drafting(proposer, model, AcceptanceEstimator(), lambda _: 30, wanted)
    limits = BatchLimits(longest_s=0.1, guard_s=GUARD_S)
    plan = form_batch(view, work, model, limits, 0.001, drafting)
    assert waiting.seq_id not in plan.num_scheduled_tokens
    num_drafted = plan.speculation.get("d", 0)
    assert plan.num_scheduled_tokens["d"] == 1 + num_drafted
    assert plan.shape.tokens == 1 + num_drafted
    assert not ("d" in plan.catch_up and num_drafted)
    assert plan.shape.draft_tokens <= num_drafted + lag


# -- promises ----------------------------------------------------------------------------


def mixed_load(
    rng: random.Random, rate: float, seconds: float, pace_s: float = 0.05
) -> list[Sequence]:
    now, load, device = 0.0, [], PerfModel(GPU)
    slos = [replace(TIGHT, tpot=pace_s), replace(LOOSE, tpot=2 * pace_s)]
    while (now := now + rng.expovariate(rate)) < seconds:
        slo = rng.choice(slos)
        prompt, output = [1] * rng.randint(20, 300), rng.randint(5, 60)
        load.append(
            make_sequence(
                f"r{len(load)}", prompt, output, now, slo=slo, model=device, max_tokens=80
            )
        )
    return load


@pytest.mark.parametrize("acceptance", [0.2, 0.85])
@pytest.mark.parametrize("seed", range(2))
def test_promises_are_kept_while_tokens_are_drafted(seed: int, acceptance: float) -> None:
    load = mixed_load(random.Random(seed), 6.0, 10.0)
    promised: set[str] = set()

    def within_slack(view: PlannerView, plan: IterationPlan) -> None:
        promised.update(plan.admit)
        model = replay.planner.model
        if not plan.speculation:
            return
        for seq in view.running:
            if seq.standing is not Standing.ADMITTED or not seq.is_decoding:
                continue
            slack = seq.progress.next_deadline_s - GUARD_S - replay.now
            alone = model.predict(BatchShape.of([(seq.num_tokens - 1, 1)]))
            if slack >= alone and not seq.progress.is_broken(replay.now):
                assert plan.predicted_s <= slack + 1e-9

    replay = replay_of(proposer=ReplayProposer(6), acceptance=acceptance, check=within_slack)
    replay.run(load)
    kept = [seq.progress.attained for seq in load if seq.seq_id in promised]
    assert len(kept) > 20
    assert sum(kept) >= 0.97 * len(kept)
    assert replay.num_speculating > 50


def share_attained(pace_s: float, rate: float, proposer: ReplayProposer | None) -> float:
    """Of requests at a TPOT, and as many at twice that, whose drafts are mostly accepted."""
    attained = total = 0
    for seed in range(2):
        load = mixed_load(random.Random(seed), rate, 8.0, pace_s)
        replay_of(proposer=proposer, acceptance=0.9).run(load)
        attained += sum(seq.progress.attained for seq in load)
        total += len(load)
    return attained / total


@pytest.mark.parametrize(("rate", "tolerance"), [(12.0, 0.0), (23.0, 0.01), (25.0, 0.01)])
def test_where_batches_are_bound_by_arithmetic_drafts_cost_no_promises(
    rate: float, tolerance: float
) -> None:
    with_, without = (
        share_attained(0.05, rate, one) for one in (ReplayProposer(6, lags=False), None)
    )
    assert with_ >= without - tolerance


def test_where_short_batches_waste_their_constant_cost_drafts_keep_more_promises() -> None:
    with_, without = (
        share_attained(0.0235, 20.0, one) for one in (ReplayProposer(6, lags=False), None)
    )
    assert with_ >= without + 0.03


def test_the_limits_of_a_batch_hold_for_its_drafts() -> None:
    limits = BatchLimits(longest_s=0.0205, guard_s=GUARD_S)
    replay = replay_of(proposer=ReplayProposer(6), acceptance=0.9)
    replay.planner.limits = lambda *_: limits
    plans = []
    replay.check = lambda _, plan: plans.append(plan)
    replay.run(decodes(1))
    assert not any(plan.speculation for plan in plans), "a draft step alone takes 1 ms"


def test_decodes_draft_beside_prefills_that_leave_them_time() -> None:
    """Whoever is done sooner frees its blocks sooner."""
    replay = replay_of(proposer=ReplayProposer(4), acceptance=0.9)
    early = [make_sequence(f"e{i}", [1] * 20, 60, slo=LOOSE) for i in range(4)]
    replay.waiting = list(early)
    while not all(seq.num_output_tokens > 8 for seq in early):
        replay.step()
    late = make_sequence("late", [2] * 40, 20, replay.now, slo=LOOSE)
    replay.waiting.append(late)
    plan = replay.step()
    assert plan.num_scheduled_tokens["late"] == 40
    assert set(plan.speculation) == {seq.seq_id for seq in early}
