"""Speculation end to end on trained tiny pairs: it changes how fast, never what comes out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from speculating import (
    GREEDY,
    PROMPTS,
    SEEDED,
    SETTINGS,
    essence,
    make_engine,
    outputs_of,
    with_oracle,
)

from minserve import Engine, SamplingParams
from minserve.outputs import CompletionOutput

KINDS = {
    "greedy": GREEDY,
    "seeded": SEEDED,
    "nucleus": replace(SEEDED, temperature=1.0, top_p=0.7),
    "cold": replace(SEEDED, temperature=0.3, top_k=20, min_p=0.05),
    "penalties": replace(SEEDED, repetition_penalty=1.2, frequency_penalty=0.4, presence_penalty=0.2),
    "named tokens": replace(SEEDED, logit_bias={i: 0.05 * i - 3.0 for i in range(100)}, bad_words=("self", "\n", "i", "e")),
    "greedy without words": replace(GREEDY, bad_words=("self", "e", " ", "in", "import"), allowed_token_ids=tuple(range(40, 120))),
    "greedy penalties": replace(GREEDY, repetition_penalty=1.15, presence_penalty=0.3),
}  # fmt: skip


@pytest.fixture(scope="module", params=["llama", "opt"])
def pair(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(f"tiny_{request.param}_pair")


@pytest.fixture(scope="module")
def plain(pair: Any) -> Engine:
    return make_engine(pair)


@pytest.fixture(scope="module")
def expected(plain: Engine) -> dict[str, list[tuple]]:
    """What comes out without speculation, each prompt alone."""
    return {
        kind: [one for prompt in PROMPTS for one in essence(outputs_of(plain, [prompt], params))]
        for kind, params in KINDS.items()
    }


@pytest.fixture(scope="module", params=["draft", "ngram"])
def speculating(request: pytest.FixtureRequest, pair: Any) -> Engine:
    return make_engine(pair, request.param)


# -- equal outputs -----------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["sarathi", "dp"])
@pytest.mark.parametrize("how", ["draft", "ngram"])
def test_outputs_are_token_for_token_those_without_speculation(
    pair: Any, expected: dict[str, list[tuple]], how: str, policy: str
) -> None:
    engine = make_engine(pair, how, policy)
    for kind, params in KINDS.items():
        assert essence(outputs_of(engine, PROMPTS, params)) == expected[kind], kind
    assert engine.speculation_stats.num_accepted_tokens > 0


def test_kinds_and_lengths_mix_in_one_batch(
    speculating: Engine, expected: dict[str, list[tuple]]
) -> None:
    cases = [(i, kind) for i in range(len(PROMPTS)) for kind in KINDS]
    prompts = [PROMPTS[i] for i, _ in cases]
    found = essence(outputs_of(speculating, prompts, [KINDS[kind] for _, kind in cases]))
    assert found == [expected[kind][i] for i, kind in cases]


@pytest.mark.parametrize("settings", [
    {"max_speculation": 1}, {"max_speculation": 8, "block_size": 4}, {"block_size": 1, "num_blocks": 900},
    {"token_budget": 16, "max_num_seqs": 4}, {"prefix_caching": False},
], ids=str)  # fmt: skip
def test_outputs_do_not_depend_on_lengths_blocks_or_budgets(
    pair: Any, expected: dict[str, list[tuple]], settings: dict
) -> None:
    engine = make_engine(pair, "draft", **settings)
    assert essence(outputs_of(engine, PROMPTS, KINDS["penalties"])) == expected["penalties"]


@pytest.mark.parametrize("kind", ["greedy", "seeded"])
def test_some_drafts_are_accepted_and_some_are_not(pair: Any, kind: str) -> None:
    engine = make_engine(pair, "draft")
    outputs = outputs_of(engine, PROMPTS, KINDS[kind])
    stats = engine.speculation_stats
    assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens
    assert stats.num_draft_tokens == sum(o.num_draft_tokens for o in outputs)
    assert stats.num_accepted_tokens == sum(o.num_accepted_tokens for o in outputs)
    places = stats.num_accepted_per_pos
    assert sum(places) == stats.num_accepted_tokens
    assert len(places) == SETTINGS["max_speculation"]
    assert places == sorted(places, reverse=True)
    assert stats.num_drafts < sum(len(o.token_ids) for o in outputs)


def test_a_seed_for_each_of_several_outputs(plain: Engine, speculating: Engine) -> None:
    params = replace(SEEDED, n=3, max_tokens=24)
    found = outputs_of(speculating, PROMPTS[:3], params)
    assert essence(found) == essence(outputs_of(plain, PROMPTS[:3], params))
    assert len({tuple(o.token_ids) for o in found}) == 9


# -- ends --------------------------------------------------------------------------------


def prompt_ids(engine: Engine, prompt: str) -> list[int]:
    return list(engine._prepare(prompt, GREEDY).request.prompt_token_ids)


def oracle_engine(pair: Any, plain: Engine, known: list[CompletionOutput], **more: Any) -> Engine:
    """An engine whose drafts are always right, unless they must err."""
    prompts = [prompt_ids(plain, prompt) for prompt in PROMPTS]
    return with_oracle(make_engine(pair, "ngram"), prompts, known, **more)


LONG = replace(GREEDY, max_tokens=32, repetition_penalty=1.3, ignore_eos=True)


@pytest.fixture(scope="module")
def known(plain: Engine) -> list[CompletionOutput]:
    """The target's long outputs."""
    return outputs_of(plain, PROMPTS, LONG)


@pytest.mark.parametrize("errs_every", [0, 2, 3])
def test_an_oracle_is_believed_exactly_where_it_is_right(
    pair: Any, plain: Engine, known: list[CompletionOutput], errs_every: int
) -> None:
    engine = oracle_engine(pair, plain, known, errs_every=errs_every)
    assert essence(outputs_of(engine, PROMPTS, LONG)) == essence(known)
    stats = engine.speculation_stats
    if errs_every == 0:
        assert stats.num_accepted_tokens == stats.num_draft_tokens
    else:
        assert max(stats.num_accepted_per_pos[: errs_every - 1]) > 0
        assert sum(stats.num_accepted_per_pos[errs_every - 1 :]) == 0


@pytest.mark.parametrize("place", [1, 8, 9])
def test_a_stop_string_within_an_accepted_run_ends_the_output_there(
    pair: Any, plain: Engine, known: list[CompletionOutput], place: int
) -> None:
    engine = oracle_engine(pair, plain, known)
    for prompt, output in zip(PROMPTS, known, strict=True):
        stop = output.text[3 * place : 3 * place + 3]
        params = replace(LONG, stop=(stop,))
        (expected,) = outputs_of(plain, [prompt], params)
        deltas = list(engine.stream(prompt, params))
        assert expected.finish_reason == "stop"
        assert "".join(d.text for d in deltas) == expected.text
        assert [t for d in deltas for t in d.token_ids] == expected.token_ids
        assert stop not in expected.text
        assert deltas[-1].stop_reason == stop
    assert engine._core.pool.num_free_blocks == engine.config.num_blocks
    engine._core.check_integrity()


@pytest.mark.parametrize("place", [1, 7, 8, 19])
def test_a_stop_token_within_an_accepted_run_ends_the_output_there(
    pair: Any, plain: Engine, known: list[CompletionOutput], place: int
) -> None:
    engine = oracle_engine(pair, plain, known)
    for prompt, output in zip(PROMPTS, known, strict=True):
        params = replace(LONG, stop_token_ids=(output.token_ids[place],), logprobs=1)
        (expected,), (found,) = (outputs_of(e, [prompt], params) for e in (plain, engine))
        assert essence([found]) == essence([expected])
        assert found.finish_reason == "stop"
        assert found.token_ids[-1] == output.token_ids[place]
        assert len(found.logprobs) == len(found.token_ids)


@pytest.mark.parametrize("place", [1, 4, 11])
def test_the_end_of_text_within_an_accepted_run_ends_the_output(
    pair: Any,
    plain: Engine,
    known: list[CompletionOutput],
    monkeypatch: pytest.MonkeyPatch,
    place: int,
) -> None:
    engine = oracle_engine(pair, plain, known)
    for one in (engine, plain):
        eos = frozenset({known[1].token_ids[place]})
        monkeypatch.setattr(one.tokenizer, "eos_token_ids", eos)
    params = replace(LONG, ignore_eos=False)
    expected, found = (outputs_of(one, PROMPTS, params) for one in (plain, engine))
    assert essence(found) == essence(expected)
    assert found[1].finish_reason == "stop"
    assert len(found[1].token_ids) <= place + 1


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 7])
@pytest.mark.parametrize("how", ["draft", "ngram", "oracle"])
def test_max_tokens_is_exact(
    pair: Any, plain: Engine, known: list[CompletionOutput], how: str, max_tokens: int
) -> None:
    engine = oracle_engine(pair, plain, known) if how == "oracle" else make_engine(pair, how)
    found = outputs_of(engine, PROMPTS, replace(LONG, max_tokens=max_tokens))
    assert [o.token_ids for o in found] == [o.token_ids[:max_tokens] for o in known]
    assert {o.finish_reason for o in found} == {"length"}
    # The first token is the prefill's, and the last of all is never drafted.
    assert engine.speculation_stats.num_draft_tokens <= len(PROMPTS) * max(0, max_tokens - 2) * 3
    assert all(o.num_draft_tokens == 0 for o in found) or max_tokens > 2


def test_an_output_may_fill_the_models_positions(pair: Any, plain: Engine) -> None:
    engine = make_engine(pair, "draft")
    room = engine.max_model_len - len(prompt_ids(plain, PROMPTS[0]))
    params = replace(GREEDY, max_tokens=room, ignore_eos=True)
    found = outputs_of(engine, PROMPTS[:1], params)
    assert essence(found) == essence(outputs_of(plain, PROMPTS[:1], params))
    assert len(found[0].token_ids) == room


@pytest.mark.parametrize("kind", ["greedy", "seeded"])
def test_min_tokens_hold_within_an_accepted_run(
    plain: Engine, speculating: Engine, kind: str
) -> None:
    known = outputs_of(plain, PROMPTS, replace(KINDS[kind], ignore_eos=True))
    frequent = tuple({o.token_ids[i] for o in known for i in (2, 6)})
    params = replace(KINDS[kind], stop_token_ids=frequent, min_tokens=12)
    found = outputs_of(speculating, PROMPTS, params)
    assert essence(found) == essence(outputs_of(plain, PROMPTS, params))
    assert min(len(o.token_ids) for o in found) >= 12


# -- what else comes with the tokens -----------------------------------------------------


@pytest.mark.parametrize("kind", ["greedy", "seeded"])
def test_log_probabilities_are_those_without_speculation(
    plain: Engine, speculating: Engine, kind: str
) -> None:
    params = replace(KINDS[kind], logprobs=3, prompt_logprobs=2)
    for mine, theirs in zip(
        speculating.generate(PROMPTS, params), plain.generate(PROMPTS, params), strict=True
    ):
        rows = [*mine.prompt_logprobs[1:], *mine.outputs[0].logprobs]
        others = [*theirs.prompt_logprobs[1:], *theirs.outputs[0].logprobs]
        assert [row.token_id for row in rows] == [row.token_id for row in others]
        for row, other in zip(rows, others, strict=True):
            assert row.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [v for _, v in row.top] == pytest.approx([v for _, v in other.top], abs=1e-4)


def test_a_stream_brings_several_tokens_at_once_and_the_same_text(
    plain: Engine, speculating: Engine
) -> None:
    longest = 0
    for prompt in PROMPTS:
        (expected,) = outputs_of(plain, [prompt])
        deltas = list(speculating.stream(prompt, GREEDY))
        assert "".join(d.text for d in deltas) == expected.text
        assert [t for d in deltas for t in d.token_ids] == expected.token_ids
        sizes = [len(d.token_ids) for d in deltas]
        assert max(sizes) <= SETTINGS["max_speculation"] + 1
        longest = max(longest, *sizes)
    assert longest > 1


def test_unseeded_requests_with_a_draft_are_complete(pair: Any) -> None:
    engine = make_engine(pair, "draft", seed=5)
    params = SamplingParams(temperature=0.9, top_p=0.9, max_tokens=30, ignore_eos=True, n=2)
    found = outputs_of(engine, PROMPTS, params)
    assert {len(o.token_ids) for o in found} == {30}
    assert engine.speculation_stats.num_accepted_tokens > 0
