"""`PerfModel`: the inverse is exact, the online correction follows the device."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minserve.planner.predict.eager import NO_MIXED, MixedLimit, is_eager
from minserve.planner.predict.perf_model import (
    BatchShape,
    PerfModel,
    Piece,
    residual_quantile,
)

SHAPE = BatchShape.of([(100, 1), (300, 1), (0, 64)])
MODEL = (Piece(2e-3, 1e-3, 1e-5, 8e-7, base=0.03), Piece(1e-4, base=0.05))

coefficient = st.one_of(st.just(0.0), st.floats(1e-9, 1e-2))
pieces = st.lists(
    st.builds(
        Piece,
        tokens=st.floats(1e-6, 1e-2),
        seqs=coefficient,
        context_tokens=coefficient,
        attention_pairs=st.one_of(st.just(0.0), st.floats(1e-9, 1e-5)),
        draft_steps=coefficient,
        eager=coefficient,
        base=st.floats(0, 0.1),
    ),
    min_size=1,
    max_size=3,
)
# Decodes are graphs, and any chunk more makes a batch an eager one.
batches = st.lists(st.tuples(st.integers(0, 500), st.integers(1, 50)), max_size=5)


def test_the_shape_of_a_batch_counts_every_pair_of_tokens() -> None:
    chunks = [(0, 5), (7, 3), (100, 1)]
    pairs = sum(start + i + 1 for start, n in chunks for i in range(n))
    assert BatchShape.of(chunks) == BatchShape(9, 3, 5 + 10 + 101, pairs)


@settings(max_examples=150)
@given(
    pieces,
    batches,
    st.booleans(),
    st.integers(0, 2000),
    st.floats(0, 2),
    st.floats(0.3, 3),
    st.sampled_from([NO_MIXED, MixedLimit(40, 2), MixedLimit(400, 2), MixedLimit(400, 1)]),
)
def test_the_longest_chunk_that_fits_is_found_exactly(
    some: list[Piece],
    chunks: list[tuple[int, int]],
    eager: bool,
    start: int,
    seconds: float,
    drift: float,
    mixed: MixedLimit,
) -> None:
    """An eager batch has a chunk already."""
    model = PerfModel(some, mixed=mixed)
    model.drift = drift

    def taken(n: int) -> float:
        return model.predict(BatchShape.of([*chunks, (start, n)], eager=is_so(n)))

    def is_so(n: int) -> bool:
        num_decodes = len(chunks) - len(chunks[:eager])
        num_tokens = n + sum(num for _, num in chunks)
        return is_eager(len(chunks) + (n > 0), num_decodes, num_tokens, mixed)

    found = model.max_tokens_within(
        seconds, BatchShape.of(chunks, eager=is_so(0)), start, len(chunks[:eager])
    )
    # Doubling, then halving: the largest n that fits, by prediction alone.
    low, high = 0, 1
    while taken(high) <= seconds:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if taken(middle) <= seconds else (low, middle)
    if found != low:  # sums of floats may fall on either side of a tie, no further
        tie = max(found, low)
        assert abs(found - low) == 1
        assert taken(tie) == pytest.approx(seconds, rel=1e-9)


def test_every_short_time_against_brute_force() -> None:
    model = PerfModel(MODEL)
    beside = BatchShape.of([(50, 1)] * 4)
    for seconds in (0.0, 0.03, 0.0351, 0.05, 0.0612, 0.1, 0.25):
        fitting = [
            n
            for n in range(1, 300)
            if model.predict(BatchShape.of([*[(50, 1)] * 4, (20, n)])) <= seconds
        ]
        assert model.max_tokens_within(seconds, beside, start=20) == max(fitting, default=0)


def test_what_an_eager_batch_costs_more_leaves_fewer_tokens_or_none() -> None:
    graphs = PerfModel([Piece(1e-3, eager=0.02, base=0.01)])
    decodes = BatchShape.of([(50, 1)] * 4)
    beside_a_chunk = replace(decodes, tokens=14, eager=1)
    assert graphs.profiled(decodes) == pytest.approx(0.014)
    assert graphs.max_tokens_within(0.0339, decodes) == 0
    assert graphs.max_tokens_within(0.0361, decodes) == 2
    # It is paid once, whatever the number of chunks.
    assert graphs.max_tokens_within(0.0461, beside_a_chunk) == 2
    assert graphs.zero_load_prefill_s(10) == pytest.approx(0.04)
    assert graphs.zero_load_decode_s(500) == pytest.approx(0.011)


def test_the_drift_follows_a_device_that_slows_down() -> None:
    model, rng = PerfModel(MODEL), random.Random(0)
    promised = model.zero_load_prefill_s(512)
    for _ in range(200):
        model.observe(SHAPE, 1.3 * model.profiled(SHAPE) * rng.uniform(0.95, 1.05))
    assert model.drift == pytest.approx(1.3, rel=0.03)
    assert model.predict(SHAPE) == model.drift * model.profiled(SHAPE)
    assert model.zero_load_prefill_s(512) == promised
    before = model.max_tokens_within(0.5, SHAPE)
    for _ in range(200):
        model.observe(SHAPE, 0.8 * model.profiled(SHAPE))
    assert model.drift == pytest.approx(0.8, rel=0.03)
    assert model.max_tokens_within(0.5, SHAPE) > before


def test_a_wrong_profile_is_left_within_few_iterations() -> None:
    model = PerfModel(MODEL)
    for _ in range(15):
        model.observe(SHAPE, 4 * model.profiled(SHAPE))
    assert model.drift > 2.5


def test_the_bound_is_the_profiles_own_at_first_and_soon_what_is_seen() -> None:
    model = PerfModel(MODEL, margin=1.55)
    # Nine of ten iterations kept the margin when the profile was made.
    assert model.bound(1, 0.1) == pytest.approx(1.55, rel=0.1)
    for _ in range(60):
        model.observe(SHAPE, 1.02 * model.profiled(SHAPE))
    assert 1.0 <= model.bound(1, 0.1) < 1.2


def test_times_that_are_not_above_zero_teach_nothing() -> None:
    model = PerfModel(MODEL)
    for seconds in (0.0, -1.0, float("nan")):
        model.observe(SHAPE, seconds)
    model.observe(BatchShape(), 0.0)
    assert (model.drift, model.bound(1, 0.01)) == (1.0, PerfModel(MODEL).bound(1, 0.01))


def test_a_model_survives_json_without_its_online_correction() -> None:
    model = PerfModel(MODEL, margin=1.2)
    model.observe(SHAPE, 1.0)
    copy = PerfModel.from_dict(json.loads(json.dumps(model.to_dict())))
    assert copy.pieces == model.pieces
    assert (copy.margin, copy.drift) == (1.2, 1.0)


def test_a_model_from_before_there_were_graphs_costs_no_eager_batch_more() -> None:
    kept = {"tokens": 2e-3, "seqs": 1e-3, "context_tokens": 1e-5, "attention_pairs": 8e-7,
            "draft_steps": 0.0, "draft_tokens": 0.0, "base": 0.03}  # fmt: skip
    model = PerfModel.from_dict({"pieces": [kept], "margin": 1.2})
    assert model.pieces == MODEL[:1]
    assert model.profiled(replace(SHAPE, eager=1)) == model.profiled(SHAPE)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"pieces": []},
        {"pieces": [{"tokens": 1.0}]},
        {"pieces": [{"tokens": 1.0, "colour": 2.0}], "margin": 1.1},
        {"pieces": [{"tokens": -1.0}], "margin": 1.1},
        {"pieces": [{"tokens": "fast"}], "margin": 1.1},
        {"pieces": 3, "margin": 1.1},
    ],
)
def test_what_is_no_model_is_refused(values: dict) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)):
        PerfModel.from_dict(values)


@pytest.mark.parametrize(
    "bad",
    [
        (),
        (Piece(0.0, base=0.1),),
        (Piece(-1e-3),),
        (Piece(1e-3), Piece(1e-3, seqs=-1e-9)),
        (Piece(float("nan")),),
        (Piece(1e-3, base=float("nan")),),
        (Piece(1e-3, context_tokens=float("inf")),),
    ],
)
def test_pieces_that_cannot_be_are_refused(bad: tuple[Piece, ...]) -> None:
    with pytest.raises(ValueError, match=r"piece|coefficients"):
        PerfModel(bad)


def test_the_residual_quantile_is_a_value_that_occurred() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [residual_quantile(values, q) for q in (0.2, 0.5, 0.8, 0.81, 1.0)] == [1, 3, 4, 5, 5]


def test_batches_with_drafts_that_are_slower_than_profiled_are_learned_apart() -> None:
    model = PerfModel(MODEL).with_draft_costs(0.002, 0.0001)
    plain, drafted = BatchShape.of([(100, 1)]), BatchShape.of([(100, 5)])
    drafted = replace(drafted, draft_steps=4, draft_tokens=4)
    for _ in range(300):
        model.observe(plain, model.profiled(plain))
        model.observe(drafted, 2.0 * model.profiled(drafted))
    assert model.predict(plain) == pytest.approx(model.profiled(plain), rel=0.1)
    assert model.predict(drafted) == pytest.approx(2.0 * model.profiled(drafted), rel=0.1)
    for _ in range(3000):
        model.observe(plain, model.profiled(plain))
    assert model.speculation_drift < 1.1  # worth another try


def test_a_refined_profile_expects_of_the_newest_batch_what_was_expected() -> None:
    """The old profile is wrong by half for long contexts, and the device slower by a fifth."""
    rough = PerfModel([Piece(1e-3, base=0.02)]).with_draft_costs(2e-3, 1e-5, 3e-3)
    better = PerfModel([Piece(1e-3, context_tokens=5e-5, base=0.02)], margin=1.3)
    rng = random.Random(0)
    for _ in range(300):
        rough.observe(SHAPE, 1.2 * better.profiled(SHAPE) * rng.uniform(0.95, 1.05))
    refined = rough.refined(better)
    assert refined.predict(SHAPE) == pytest.approx(rough.predict(SHAPE))
    assert refined.drift == pytest.approx(1.2, rel=0.03)
    assert refined.bound(1, 0.1) == pytest.approx(rough.bound(1, 0.1))
    other = BatchShape.of([(3000, 1)] * 4)
    assert refined.profiled(other) == better.profiled(other)
    drafted = replace(SHAPE, draft_steps=3, draft_tokens=40)
    assert refined.profiled(drafted) - refined.profiled(SHAPE) == pytest.approx(6e-3 + 4e-4)


def test_a_refined_profile_of_an_engine_that_never_ran_stands_for_itself() -> None:
    better = PerfModel(MODEL, margin=1.3)
    refined = PerfModel([Piece(1e-3)]).refined(better)
    assert (refined.drift, refined.bound(1, 0.1)) == (1.0, better.bound(1, 0.1))
    assert refined.to_dict() == better.to_dict()
