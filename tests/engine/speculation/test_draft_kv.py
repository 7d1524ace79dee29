"""The draft model's KV beside the target's: rolled back, shared, preempted, and never in the way."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from speculating import (
    GREEDY,
    PROMPTS,
    SEEDED,
    assert_kv_is_fresh,
    essence,
    make_engine,
    outputs_of,
    steps,
    submit,
)

from minserve import Engine, SamplingParams
from minserve.planner.predict.lengths import LengthEstimator
from minserve.request import Sequence

SHARED = "for name in names:\n        self.assertEqual(name, self.name)\n" * 2
CROWD = [SHARED + tail for tail in ("", "    return name", "x", "def f(self):")] + PROMPTS[:3]
LONG = replace(GREEDY, max_tokens=36, ignore_eos=True)


@pytest.fixture(scope="module")
def pair(tiny_llama_pair: Any) -> Any:
    return tiny_llama_pair


@pytest.fixture(scope="module")
def plain(pair: Any) -> Engine:
    return make_engine(pair)


def run_checked(engine: Engine, prompts: list, params: SamplingParams) -> list[list[int]]:
    """Run requests step by step; after each step, every block and both caches are right."""
    core, proposer = engine._core, engine._core.proposer
    sequences = submit(engine, prompts, params)
    num_drafted = 0
    for _ in steps(engine):
        core.check_integrity()
        for seq in core.running:
            size = core.pool.block_size
            assert len(seq.block_table) == -(-seq.num_computed_tokens // size)
            if seq.num_output_tokens % 5 == 0:
                assert_kv_is_fresh(core.runner, seq, seq.num_computed_tokens)
            if seq.is_decoding:
                written = seq.num_tokens - 1 - proposer.lag(seq)
                assert 0 <= written <= seq.num_computed_tokens
                num_drafted += written
                assert_kv_is_fresh(proposer.model, seq, written)
    assert num_drafted > 0
    assert core.pool.num_free_blocks == core.pool.num_blocks
    return [seq.output_token_ids for seq in sequences]


SCARCE = {"num_blocks": 40}  # of the 60 and more that all of the crowd would need


@pytest.mark.parametrize("policy", ["sarathi", "dp"])
@pytest.mark.parametrize("settings", [{}, SCARCE, {"prefix_caching": False}], ids=str)
def test_both_caches_hold_what_the_accepted_tokens_give(
    pair: Any, plain: Engine, policy: str, settings: dict
) -> None:
    engine = make_engine(pair, "draft", policy, **settings)
    params = replace(LONG, max_tokens=30)
    expected = [o.token_ids for o in outputs_of(plain, CROWD, params)]
    assert run_checked(engine, CROWD, params) == expected
    assert engine.speculation_stats.num_accepted_tokens > 0
    # Once more, with whatever the prefix index and the draft cache have kept.
    assert run_checked(engine, CROWD, params) == expected


def test_both_caches_are_right_in_another_family(tiny_opt_pair: Any) -> None:
    params = replace(LONG, max_tokens=20)
    expected = [o.token_ids for o in outputs_of(make_engine(tiny_opt_pair), CROWD, params)]
    engine = make_engine(tiny_opt_pair, "draft", **SCARCE)
    for _ in range(2):
        assert run_checked(engine, CROWD, params) == expected


def test_both_caches_are_right_while_sampling(pair: Any, plain: Engine) -> None:
    engine = make_engine(pair, "draft", seed=1, **SCARCE)
    params = replace(SEEDED, ignore_eos=True)
    expected = [o.token_ids for o in outputs_of(plain, CROWD, params)]
    assert run_checked(engine, CROWD, params) == expected
    run_checked(engine, CROWD, replace(params, seed=None))


# -- preemption --------------------------------------------------------------------------


class AlwaysNearlyDone(LengthEstimator):
    """Makes a planner start more than there is memory for."""

    def _total(self, seq: Sequence, done: int) -> int:
        return seq.num_output_tokens + 1


@pytest.mark.parametrize("policy", ["sarathi", "fcfs", "dp"])
@pytest.mark.parametrize("how", ["draft", "ngram"])
def test_preemption_in_the_middle_of_speculation_loses_nothing(
    pair: Any, plain: Engine, how: str, policy: str
) -> None:
    engine = make_engine(pair, how, policy, num_blocks=30)
    if policy == "dp":
        engine._core.planner.lengths = AlwaysNearlyDone()
    for params in (LONG, replace(SEEDED, max_tokens=36, ignore_eos=True)):
        before = engine._core.planner.num_preemptions
        found = outputs_of(engine, CROWD, params)
        assert essence(found) == essence(outputs_of(plain, CROWD, params))
        assert engine._core.planner.num_preemptions > before
    assert engine.speculation_stats.num_accepted_tokens > 0


# -- prefix cache ------------------------------------------------------------------------


def test_a_cached_prompt_brings_its_draft_kv_and_drafts_as_well(pair: Any) -> None:
    engine = make_engine(pair, "draft")
    proposer = engine._core.proposer
    first, second = (engine.generate([SHARED], LONG)[0] for _ in range(2))
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens >= 32
    ours, theirs = second.outputs[0], first.outputs[0]
    assert essence([ours]) == essence([theirs])
    assert ours.num_accepted_tokens == theirs.num_accepted_tokens > 0
    assert ours.num_draft_tokens == theirs.num_draft_tokens
    # A third one, by hand: the draft model has at least what the target has cached.
    (seq,) = submit(engine, [SHARED], LONG)
    engine._core.step()
    assert seq.is_decoding
    written = seq.num_tokens - 1 - proposer.lag(seq)
    assert written >= seq.num_cached_tokens > 0
    assert_kv_is_fresh(proposer.model, seq, written)
    engine._core.abort(seq.request.request_id)


def test_blocks_that_never_had_draft_kv_are_not_taken_for_cached(pair: Any) -> None:
    engine = make_engine(pair, "draft")
    proposer, core = engine._core.proposer, engine._core
    core.proposer = None
    expected = outputs_of(engine, [SHARED], LONG)
    core.proposer = proposer
    (seq,) = submit(engine, [SHARED], LONG)
    core.step()
    assert seq.num_cached_tokens > 0
    assert proposer.lag(seq) == seq.num_tokens - 1
    core.abort(seq.request.request_id)
    assert run_checked(engine, [SHARED], LONG) == [expected[0].token_ids]


def test_another_salt_shares_neither_cache(pair: Any) -> None:
    engine = make_engine(pair, "draft")
    outputs_of(engine, [SHARED], LONG)
    submission = engine._prepare(SHARED, LONG, cache_salt="other")
    engine._enqueue(submission)
    engine._core.step()
    (seq,) = submission.sequences
    assert seq.num_cached_tokens == 0
    assert engine._core.proposer.lag(seq) == seq.num_tokens - 1
    engine._core.abort(seq.request.request_id)


# -- a draft model that fails ------------------------------------------------------------


@pytest.mark.parametrize("fails_every", [1, 8])
@pytest.mark.parametrize("where", ["propose", "forward", "logits"])
def test_a_draft_model_that_fails_costs_no_request(
    pair: Any,
    plain: Engine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    where: str,
    fails_every: int,
) -> None:
    engine = make_engine(pair, "draft", num_blocks=60)
    proposer, calls = engine._core.proposer, 0
    owner = {"propose": proposer, "forward": proposer.model, "logits": proposer.model.model}[where]
    original = getattr(owner, where)

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % fails_every == 0:
            raise RuntimeError("the draft model is broken")
        return original(*args)

    monkeypatch.setattr(owner, where, failing)
    expected = [o.token_ids for o in outputs_of(plain, CROWD, LONG)]
    with caplog.at_level(logging.ERROR):
        if fails_every == 1:
            assert [o.token_ids for o in outputs_of(engine, CROWD, LONG)] == expected
            assert engine.speculation_stats.num_drafts == 0
        else:
            assert run_checked(engine, CROWD, LONG) == expected
            assert engine.speculation_stats.num_accepted_tokens > 0
    assert "drafting failed" in caplog.text


@pytest.mark.parametrize("damage", [float("nan"), -float("inf")])
@pytest.mark.parametrize("params", [LONG, SEEDED], ids=["greedy", "seeded"])
def test_a_draft_model_without_a_choice_proposes_nothing(
    pair: Any,
    plain: Engine,
    monkeypatch: pytest.MonkeyPatch,
    damage: float,
    params: SamplingParams,
) -> None:
    engine = make_engine(pair, "draft")
    model = engine._core.proposer.model.model
    original, calls = model.logits, 0

    def broken(hidden: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        logits = original(hidden)
        logits[calls % 2 :: 2] = damage
        return logits

    monkeypatch.setattr(model, "logits", broken)
    found = run_checked(engine, CROWD, params)
    assert found == [o.token_ids for o in outputs_of(plain, CROWD, params)]


def test_draft_blocks_of_an_aborted_request_are_given_back(pair: Any) -> None:
    engine = make_engine(pair, "draft")
    core = engine._core
    sequences = submit(engine, CROWD, LONG)
    for _ in range(6):
        core.step()
    for seq in sequences[::2]:
        core.abort(seq.request.request_id)
        core.check_integrity()
    for _ in steps(engine):
        core.check_integrity()
    assert core.pool.num_free_blocks == core.pool.num_blocks
    assert not core.proposer._num_written, "what is kept per sequence ends with it"
