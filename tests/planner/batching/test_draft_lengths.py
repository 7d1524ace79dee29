"""How many tokens to draft for the decodes of a batch, against every vector of lengths."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from itertools import product

import pytest
from replay import make_sequence

from minserve.planner.batching.draft_lengths import (
    WORTH,
    DraftCandidate,
    Speculation,
    most_left_to_prefills,
    most_tokens_per_second,
    with_drafts,
)
from minserve.planner.predict.perf_model import BatchShape, PerfModel, Piece

LONGEST = 5


def candidate(
    acceptance: float, limit: int = LONGEST, lag: int = 0, context: int = 50
) -> DraftCandidate:
    seq = make_sequence("s", [1] * context, 100)
    return DraftCandidate(seq, acceptance, limit, lag)


def decodes(num: int, context: int = 50) -> BatchShape:
    return BatchShape.of([(context - 1, 1)] * num)


def shape_by_hand(
    ones: SequenceOf[DraftCandidate], lengths: SequenceOf[int], others: int
) -> BatchShape:
    """The batch with drafts, from its chunks."""
    chunks = [(one.seq.num_tokens - 1, 1 + n) for one, n in zip(ones, lengths, strict=True)]
    plain = BatchShape.of(chunks + [(49, 1)] * others)
    return BatchShape(
        plain.tokens, plain.seqs, plain.context_tokens, plain.attention_pairs,
        draft_steps=max(lengths, default=0),
        draft_tokens=sum(n + one.lag for one, n in zip(ones, lengths, strict=True) if n),
    )  # fmt: skip


def tokens_by_hand(
    ones: SequenceOf[DraftCandidate], lengths: SequenceOf[int], others: int
) -> float:
    rows = zip(ones, lengths, strict=True)
    return others + sum(sum(one.acceptance**j for j in range(n + 1)) for one, n in rows)


def rate_by_hand(
    model: PerfModel, ones: SequenceOf[DraftCandidate], lengths: SequenceOf[int], others: int
) -> float:
    seconds = model.predict(shape_by_hand(ones, lengths, others))
    return tokens_by_hand(ones, lengths, others) / seconds


def random_device(rng: random.Random) -> PerfModel:
    """A flat piece, a steep one, and a draft model; none, one or all of them matter."""
    draft = {"draft_steps": rng.choice([0.0, 3e-4, 2e-3]), "draft_tokens": rng.choice([0.0, 5e-5])}
    flat = Piece(rng.choice([0.0, 1e-5]), rng.choice([0.0, 2e-4]), 1e-8, base=0.02, **draft)
    eager = rng.choice([0.0, 0.005])
    steep = Piece(rng.uniform(1e-5, 4e-3), 1e-5, 1e-8, 1e-9, eager=eager, base=0.003, **draft)
    model = PerfModel([flat, steep])
    model.drift = rng.uniform(0.8, 1.3)
    return model


def choose(
    model: PerfModel, ones: SequenceOf[DraftCandidate], others: int, limit_s: float = math.inf
) -> Speculation:
    plain = shape_by_hand(ones, [0] * len(ones), others)
    return most_tokens_per_second(model, plain, len(ones) + others, ones, limit_s)


def test_the_shape_with_drafts_is_that_of_the_longer_chunks() -> None:
    rng = random.Random(0)
    for _ in range(200):
        ones = [
            candidate(0.5, lag=rng.choice([0, 3]), context=rng.randint(1, 90)) for _ in range(3)
        ]
        lengths = [rng.randint(0, 5) for _ in ones]
        plain = shape_by_hand(ones, [0, 0, 0], 2)
        assert with_drafts(plain, ones, lengths) == shape_by_hand(ones, lengths, 2)


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.7, 0.98])
def test_a_token_is_drafted_if_its_chance_is_at_least_the_threshold(acceptance: float) -> None:
    one = candidate(acceptance, limit=LONGEST)
    for threshold in (-1.0, 0.0, 1e-9, 0.05, 0.29, 0.31, 0.5, 0.7, 0.97, 1.0, 2.0):
        for longest in (0, 2, 9):
            chances = [acceptance ** (n + 1) for n in range(min(LONGEST, longest))]
            expected = sum(chance >= threshold and threshold < 1.0 for chance in chances)
            assert one.length(threshold, longest) == expected


def one_piece(rng: random.Random) -> PerfModel:
    """A device on which every token costs the same."""
    piece = Piece(
        rng.uniform(1e-5, 2e-3), 2e-4, 1e-8, 1e-9, rng.choice([0.0, 3e-4]), 5e-5, base=0.02
    )
    return PerfModel([piece])


@pytest.mark.parametrize("num", [1, 2, 3])
@pytest.mark.parametrize(
    ("device", "share"), [(one_piece, 1 / (WORTH * 1.01)), (random_device, 0.75)]
)
def test_the_lengths_bring_nearly_as_much_as_the_best_of_all(
    device: Callable[[random.Random], PerfModel], share: float, num: int
) -> None:
    speculated, shares = 0, []
    for seed in range(60):
        rng = random.Random(1000 * num + seed)
        model, others = device(rng), rng.choice([0, 0, 3, 20])
        ones = [candidate(rng.uniform(0.02, 0.98), rng.randint(1, LONGEST)) for _ in range(num)]
        found = choose(model, ones, others)
        plain = rate_by_hand(model, ones, [0] * num, others)
        best = max(
            rate_by_hand(model, ones, lengths, others)
            for lengths in product(*(range(one.limit + 1) for one in ones))
        )
        assert all(0 <= n <= one.limit for n, one in zip(found.lengths, ones, strict=True))
        got = rate_by_hand(model, ones, found.lengths, others)
        assert found.gain == pytest.approx(got / plain)
        assert not any(found.lengths) or got > plain * WORTH
        shares.append(got / best)
        speculated += any(found.lengths)
    assert min(shares) >= share
    assert sum(shares) / len(shares) > 0.95
    assert 10 < speculated < 60, "it pays for some and not for others"


def test_sequences_whose_drafts_are_accepted_more_often_get_longer_ones() -> None:
    model = PerfModel([Piece(tokens=5e-4, draft_steps=2e-4, base=0.01)])
    ones = [candidate(a, limit=12) for a in (0.2, 0.6, 0.9)]
    lengths = choose(model, ones, 0).lengths
    assert lengths[0] < lengths[1] < lengths[2]


def test_nothing_is_drafted_where_a_token_costs_more_than_it_brings() -> None:
    memory_bound = PerfModel([Piece(tokens=1e-6, base=0.02), Piece(tokens=5e-4, base=0.001)])
    good = [candidate(0.8) for _ in range(3)]
    assert all(choose(memory_bound, good, 0).lengths)
    crowd = [candidate(0.6) for _ in range(100)]
    assert not any(choose(memory_bound, crowd, 0).lengths), "the device computes at its limit"
    costly = PerfModel([Piece(tokens=1e-6, draft_steps=0.02, base=0.02)])
    assert choose(costly, good, 0) == Speculation((0, 0, 0), 1.0)
    hopeless = [candidate(0.02) for _ in range(3)]
    assert not any(choose(memory_bound, hopeless, 0).lengths)
    assert not any(choose(memory_bound, [candidate(0.9, limit=0)], 5).lengths)
    assert choose(memory_bound, [], 5) == Speculation((), 1.0)


def test_a_lag_counts_among_the_costs() -> None:
    model = PerfModel([Piece(tokens=1e-4, draft_tokens=1e-3, base=0.01)])
    assert any(choose(model, [candidate(0.9)], 0).lengths)
    assert not any(choose(model, [candidate(0.9, lag=300)], 0).lengths)


def test_a_batch_with_drafts_ends_within_its_limit() -> None:
    shortened = 0
    for seed in range(150):
        rng = random.Random(seed)
        model, others = random_device(rng), rng.choice([0, 5])
        ones = [candidate(rng.uniform(0.3, 0.98), rng.randint(1, LONGEST)) for _ in range(3)]
        plain_s = model.predict(shape_by_hand(ones, [0, 0, 0], others))
        limit_s = plain_s * rng.uniform(0.9, 1.3)
        found = choose(model, ones, others, limit_s)
        if any(found.lengths):
            assert model.predict(shape_by_hand(ones, found.lengths, others)) <= limit_s
        shortened += found != choose(model, ones, others)
    assert shortened > 10


# -- while prefills wait -----------------------------------------------------------------


def left_by_hand(
    model: PerfModel,
    ones: SequenceOf[DraftCandidate],
    lengths: SequenceOf[int],
    others: int,
    decodes: int,
    guard_s: float,
) -> float:
    """Seconds saved later, less those that drafts take now, on the steepest piece alone."""
    steep = PerfModel([max(model.pieces, key=lambda piece: piece.tokens)])
    steep.drift = model.drift
    empty_s = steep.predict(BatchShape())
    batch_s = steep.predict(BatchShape(eager=1))  # with prefills, which wait
    now_s = steep.predict(shape_by_hand(ones, lengths, others))
    left_s = steep.predict(shape_by_hand(ones, [0] * len(ones), others)) - now_s
    for one, length in zip(ones, lengths, strict=True):
        extra = tokens_by_hand([one], [length], 0) - 1
        again_s = steep.predict(BatchShape.of([(one.seq.num_tokens - 1, 1)])) - empty_s
        left_s += extra * (again_s + (batch_s + guard_s) / decodes)
    return left_s


@pytest.mark.parametrize("seed", range(40))
def test_while_prefills_wait_no_cap_on_the_lengths_leaves_more(seed: int) -> None:
    rng = random.Random(seed)
    model = random_device(rng)
    ones = [candidate(rng.random(), rng.randint(1, LONGEST)) for _ in range(rng.randint(1, 5))]
    others, skipping, guard_s = rng.randint(0, 3), rng.randint(0, 4), rng.choice([0.0, 0.003])
    total = len(ones) + others + skipping
    plain = shape_by_hand(ones, [0] * len(ones), others)
    chosen = most_left_to_prefills(model, plain, total, ones, guard_s)
    found = left_by_hand(model, ones, chosen, others, total, guard_s)
    assert found >= 0.0, "drafts that cost more than they bring"
    for longest in range(LONGEST + 1):
        lengths = [min(one.limit, longest) for one in ones]
        other = left_by_hand(model, ones, lengths, others, total, guard_s)
        assert other <= found + 1e-12


def test_a_decode_that_would_draft_alone_among_many_does_not() -> None:
    model = PerfModel([Piece(tokens=3e-4, draft_steps=0.001, draft_tokens=1e-6, base=0.005)])
    everybody = [candidate(0.9) for _ in range(10)]
    together = most_left_to_prefills(model, decodes(10), 10, everybody, 0.003)
    alone = most_left_to_prefills(model, decodes(1), 10, everybody[:1], 0.003)
    assert min(together) >= 3
    assert alone == (0,)
    assert most_left_to_prefills(model, decodes(1), 10, [], 0.003) == ()
