"""The sampler against slow reference code, exact probabilities and torch's log_softmax."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from sampling_reference import (
    SAMPLER,
    SETTINGS,
    VOCAB,
    chi_square,
    chi_square_limit,
    make_seq,
    random_logits,
    reference_distribution,
    reference_token,
    token_ids,
)

from minserve.engine.sampling.distribution import INVALID, argmax
from minserve.engine.sampling.noise import word
from minserve.errors import GenerationError, InvalidRequestError
from minserve.request import Sequence

# -- every parameter against the reference -----------------------------------------------


def varied_seqs(settings: dict, best: list[int]) -> list[Sequence]:
    """Sequences whose likeliest tokens were seen before, are stop tokens or end a bad word."""
    return [
        make_seq(
            prompt=[top, 5, 5, 9],
            output=[top, top, 7, 8],
            seed=row,
            stop=[top, 11],
            bad=[(7, 8, top), (12,), (9, 13)] if "bad_words" in settings else (),
            **settings,
        )
        for row, top in enumerate(best)
    ]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_each_parameter_samples_as_the_reference_does(settings):
    logits = random_logits(16)
    seqs = varied_seqs(settings, logits.argmax(-1).tolist())
    chosen = token_ids(SAMPLER.sample(logits, seqs))
    for row, seq in enumerate(seqs):
        distribution = reference_distribution(logits[row].tolist(), seq)
        token, margin = reference_token(distribution, word(seq.request.seed, 0, 4))
        assert chosen[row] == token or margin < 1e-5
        assert distribution[chosen[row]] > 0.0


def test_a_batch_of_all_settings_gives_each_row_what_it_gets_alone():
    logits = random_logits(len(SETTINGS))
    best = logits.argmax(-1).tolist()
    seqs = [varied_seqs(settings, best)[row] for row, settings in enumerate(SETTINGS)]
    alone = [token_ids(SAMPLER.sample(logits[i : i + 1], [s]))[0] for i, s in enumerate(seqs)]
    assert token_ids(SAMPLER.sample(logits, seqs)) == alone
    order = torch.randperm(len(seqs), generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = token_ids(SAMPLER.sample(logits[order], [seqs[i] for i in order]))
    assert shuffled == [alone[i] for i in order]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.6, "top_p": 0.8},
        {"top_k": 7},
        {"min_p": 0.2},
        {"frequency_penalty": 1.0, "temperature": 1.5},
    ],
    ids=str,
)
def test_frequencies_match_exact_probabilities(settings):
    vocab, draws = 300, 20_000
    row = random_logits(1, vocab, seed=3, scale=1.5)
    seqs = [make_seq(output=[7], seed=seed, **settings) for seed in range(draws)]
    expected = reference_distribution(row[0].tolist(), seqs[0])
    counts: Counter[int] = Counter()
    for i in range(0, draws, 1000):
        counts.update(token_ids(SAMPLER.sample(row.expand(1000, -1), seqs[i : i + 1000])))
    assert all(expected[token] > 0 for token in counts)
    common = [t for t in range(vocab) if expected[t] * draws >= 5]
    observed = [counts[t] for t in common]
    wanted = [expected[t] * draws for t in common]
    rest = draws - sum(wanted)
    if rest > 5:
        observed.append(draws - sum(observed))
        wanted.append(rest)
    assert chi_square(observed, wanted) < chi_square_limit(len(wanted) - 1)


@pytest.mark.parametrize(
    "change", [{"index": 1}, {"seed": 10**6}, {"output": [7]}], ids=lambda one: next(iter(one))
)
def test_choices_of_different_streams_are_independent(change):
    vocab, draws = 512, 6000
    row = torch.full((1, vocab), -math.inf)
    row[0, [3, 250, 256, 260, 511]] = torch.tensor([0.3, 0.0, 0.5, -0.4, 0.1])
    logits, pairs = row.expand(draws, -1), []
    for more in ({}, change):
        seqs = [make_seq(**{**more, "seed": i + more.get("seed", 0)}) for i in range(draws)]
        pairs.append(token_ids(SAMPLER.sample(logits, seqs)))
    counts = Counter(zip(*pairs, strict=True))
    p = {t: v for t, v in enumerate(row[0].double().softmax(-1).tolist()) if v}
    cells = [(a, b) for a in p for b in p]
    observed = [counts[cell] for cell in cells]
    assert chi_square(observed, [p[a] * p[b] * draws for a, b in cells]) < chi_square_limit(24)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5}], ids=str)
def test_rounding_moves_a_choice_only_between_two_in_a_near_tie(settings):
    noise, rows = 0.02, 400
    logits = random_logits(rows, scale=2.0)
    generator = torch.Generator().manual_seed(1)
    near = logits + noise * (2 * torch.rand(logits.shape, generator=generator) - 1)
    seqs = [make_seq(seed=seed, **settings) for seed in range(rows)]
    before, after = (token_ids(SAMPLER.sample(x, seqs)) for x in (logits, near))
    most = 2 * noise / settings.get("temperature", 1.0)
    moved = 0
    for row, seq in enumerate(seqs):
        if before[row] != after[row]:
            moved += 1
            distribution = reference_distribution(logits[row].tolist(), seq)
            assert reference_token(distribution, word(row, 0, 0))[1] < most
    assert moved < rows / 20


# -- what a draw depends on --------------------------------------------------------------


def test_draw_depends_on_seed_index_and_position_alone():
    logits = torch.zeros(1, VOCAB)

    def draw(**kwargs):
        return token_ids(SAMPLER.sample(logits, [make_seq(**kwargs)]))[0]

    token = draw(seed=5, output=[1, 2])
    assert draw(seed=5, output=[8, 9], prompt=range(50)) == token
    assert token == reference_token([1 / VOCAB] * VOCAB, word(5, 0, 2))[0]
    others = {draw(seed=6, output=[1, 2]), draw(seed=5, output=[1]), draw(seed=5, index=1)}
    assert token not in others


def test_logits_are_not_changed():
    logits = random_logits(len(SETTINGS))
    before = logits.clone()
    best = logits.argmax(-1).tolist()
    SAMPLER.sample(logits, [varied_seqs(s, best)[i] for i, s in enumerate(SETTINGS)])
    for settings in SETTINGS:
        SAMPLER.sample(logits, varied_seqs(settings, best))
    assert torch.equal(logits, before)


def test_empty_batch_gives_nothing():
    assert SAMPLER.sample(torch.empty(0, VOCAB), []) == []
    assert SAMPLER.prompt_logprobs(torch.empty(0, VOCAB), [], 3) == []


# -- edges of the truncations ------------------------------------------------------------


def possible_tokens(logits, draws=400, **settings) -> set[int]:
    seqs = [make_seq(seed=seed, **settings) for seed in range(draws)]
    return set(token_ids(SAMPLER.sample(torch.tensor([logits]).expand(draws, -1), seqs)))


def log(*probabilities):
    return [math.log(p) if p else -math.inf for p in probabilities]


def test_top_p_keeps_the_token_that_crosses_the_border():
    logits = log(0.1, 0.5, 0.15, 0.25)
    assert possible_tokens(logits, top_p=0.49) == {1}
    assert possible_tokens(logits, top_p=0.51) == {1, 3}
    assert possible_tokens(logits, top_p=0.76) == {1, 2, 3}
    assert possible_tokens(logits, top_p=0.95) == {0, 1, 2, 3}


def test_top_p_breaks_ties_at_the_border_by_token_id():
    assert possible_tokens([0.0] * 8, top_p=0.5) == {0, 1, 2, 3}
    assert possible_tokens([0.0, 0.0, 3.0, 0.0, 0.0], top_p=0.87) == {0, 2}


def test_top_p_finds_a_nucleus_wider_than_the_first_look():
    vocab = 5000
    seqs = [make_seq(seed=seed, top_p=0.7) for seed in range(500)]
    chosen = token_ids(SAMPLER.sample(torch.zeros(1, vocab).expand(500, -1), seqs))
    assert 3400 < max(chosen) < 3500


def test_top_p_is_applied_to_what_top_k_left():
    logits = log(0.4, 0.3, 0.2, 0.1)
    # Of all, 0.6 needs two tokens; of the two that top_k keeps, 0.4 / 0.7 = 0.57 needs one.
    assert possible_tokens(logits, top_p=0.55) == {0, 1}
    assert possible_tokens(logits, top_p=0.55, top_k=2) == {0}


def test_top_k_keeps_ties_and_differs_by_row():
    assert possible_tokens([2.0, 1.0, 1.0, 0.0], top_k=2) == {0, 1, 2}
    logits = torch.zeros(200, 50) - torch.arange(50) * 0.01
    seqs = [make_seq(seed=i, top_k=[2, 30, 0][i % 3]) for i in range(200)]
    chosen = token_ids(SAMPLER.sample(logits, seqs))
    assert max(chosen[0::3]) == 1
    assert 20 < max(chosen[1::3]) < 30
    assert max(chosen[2::3]) > 35


def test_min_p_is_relative_to_the_best_after_temperature():
    logits = log(0.5, 0.3, 0.15, 0.05)
    assert possible_tokens(logits, min_p=0.29) == {0, 1, 2}
    assert possible_tokens(logits, min_p=0.31) == {0, 1}
    assert possible_tokens(logits, min_p=0.31, temperature=2.0) == {0, 1, 2, 3}
    assert possible_tokens(logits, min_p=1.0) == {0}


def test_stop_tokens_return_when_min_tokens_are_reached_and_unknown_ids_do_no_harm():
    logits = torch.zeros(1, VOCAB)
    logits[0, 42] = 50.0
    for num_output, allowed in ((0, False), (2, False), (3, True)):
        for temperature in (0.0, 1.0):
            seq = make_seq(
                output=[9] * num_output, min_tokens=3, stop=[42, 10**6], temperature=temperature
            )
            (token,) = token_ids(SAMPLER.sample(logits, [seq]))
            assert (token == 42) is allowed


# -- tokens that a request names ------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_allowed_tokens_are_chosen_and_a_bias_of_100_decides(temperature):
    logits = [0.0] * 600
    allowed = (3, 250, 599)
    assert possible_tokens(logits, temperature=temperature, allowed_token_ids=allowed) == (
        {3} if temperature == 0.0 else set(allowed)
    )
    assert possible_tokens(logits, temperature=temperature, logit_bias={17: 100.0}) == {17}
    banned = dict.fromkeys(range(1, 600), -100.0)
    assert possible_tokens(logits, temperature=temperature, logit_bias=banned) == {0}


def test_a_bad_word_is_never_completed_within_the_output():
    bad = [(4,), (5, 6), (1, 2, 3), (6, 6, 6)]

    def allowed(output, prompt=(5, 1, 2)):
        seqs = [
            make_seq(prompt, output, seed=seed, bad=bad, bad_words=("x",)) for seed in range(300)
        ]
        return set(token_ids(SAMPLER.sample(torch.zeros(1, 8).expand(300, -1), seqs)))

    everything = set(range(8)) - {4}
    assert allowed([]) == everything  # what the prompt ends with counts for nothing
    assert allowed([5]) == everything - {6}
    assert allowed([2]) == everything
    assert allowed([1, 2]) == everything - {3}
    assert allowed([0, 6, 6]) == everything - {6}


def test_named_tokens_beyond_the_logits_are_passed_over():
    # A draft model's head may be narrower than the vocabulary.
    seq = make_seq(
        bad=[(900,)], bad_words=("x",), logit_bias={900: 5.0}, allowed_token_ids=(7, 900)
    )
    assert token_ids(SAMPLER.sample(torch.zeros(1, 8), [seq])) == [7]


def test_a_request_that_allows_no_token_gets_an_error_of_its_own():
    seqs = [make_seq(bad=[(7,)], bad_words=("x",), allowed_token_ids=(7,)), make_seq()]
    first, second = SAMPLER.sample(torch.zeros(2, 8), seqs)
    assert isinstance(first, InvalidRequestError)
    assert first.param == "allowed_token_ids"
    assert second.token_id in range(8)


# -- hard numbers ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {}, {"top_p": 0.9, "min_p": 0.01}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_sample_as_their_float32_values(dtype, settings):
    logits = random_logits(16).to(dtype)
    seqs = [make_seq(seed=seed, **settings) for seed in range(16)]
    assert token_ids(SAMPLER.sample(logits, seqs)) == token_ids(
        SAMPLER.sample(logits.float(), seqs)
    )


HARD_ROWS = {
    "huge": [3e38, -3e38, 2.9e38, 0.0],
    "infinite": [math.inf, 0.0, -math.inf, 1.0],
    "one left": [-math.inf, -math.inf, -5.0, -math.inf],
    "all low": [-3e38, -3.1e38, -3.4e38, -3.3e38],
}


@pytest.mark.parametrize("name", HARD_ROWS)
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 1e-300},
        {"temperature": 100.0, "top_k": 3, "top_p": 0.99, "min_p": 1e-30},
        {"temperature": 1.0, "repetition_penalty": 0.01, "frequency_penalty": 2.0},
    ],
    ids=str,
)
def test_extreme_logits_give_a_possible_token(name, settings):
    row = HARD_ROWS[name]
    seqs = [make_seq(prompt=[3], output=[3], seed=seed, **settings) for seed in range(50)]
    for token in token_ids(SAMPLER.sample(torch.tensor([row]).expand(50, -1), seqs)):
        assert row[token] > -math.inf
        if "frequency_penalty" not in settings and name != "one left":
            assert row[token] == max(row)


@pytest.mark.parametrize("noise", [2.0**-53, 36.7, 1.0])
def test_zero_probability_tokens_are_never_taken_at_the_ends(monkeypatch, noise):
    monkeypatch.setattr(
        "minserve.engine.sampling.distribution.exponentials",
        lambda keys, num: torch.full((len(keys), num), noise, dtype=torch.float64),
    )
    logits = torch.full((3, VOCAB), -math.inf)
    logits[0, 300:310] = torch.arange(10.0)
    logits[1, 255:257] = 0.1
    logits[2, 699] = -1e30
    chosen = token_ids(SAMPLER.sample(logits, [make_seq(seed=i) for i in range(3)]))
    assert chosen == [309, 255, 699]


@pytest.mark.parametrize("broken", [math.nan, -math.inf])
def test_a_broken_row_is_an_error_of_its_own(broken):
    logits = random_logits(len(SETTINGS) * 2)
    best = logits.argmax(-1).tolist()
    seqs = [varied_seqs({**SETTINGS[i // 2], "logprobs": 2}, best)[i] for i in range(len(best))]
    whole = SAMPLER.sample(logits, seqs)
    for row in range(0, len(seqs), 2):
        if math.isnan(broken):
            logits[row, 17] = broken
        else:
            logits[row] = broken
    for row, result in enumerate(SAMPLER.sample(logits, seqs)):
        if row % 2:
            assert result == whole[row]
        else:
            assert isinstance(result, GenerationError)
            assert seqs[row].seq_id in str(result)


def test_a_nan_row_is_found_in_the_plain_greedy_batch():
    logits = random_logits(3).bfloat16()
    logits[1, -1] = math.nan
    results = SAMPLER.sample(logits, [make_seq(temperature=0.0)] * 3)
    assert [isinstance(result, GenerationError) for result in results] == [False, True, False]


# -- log probabilities -------------------------------------------------------------------


def test_logprobs_are_of_the_raw_distribution():
    logits = random_logits(30)
    best = logits.argmax(-1).tolist()
    seqs = varied_seqs({"temperature": 1.9, "repetition_penalty": 3.0, "logprobs": 4}, best)
    exact = torch.log_softmax(logits.double(), -1)
    for row, (token, logprob) in enumerate(SAMPLER.sample(logits, seqs)):
        assert logprob.token_id == token
        assert logprob.logprob == pytest.approx(exact[row, token].item(), abs=1e-4)
        assert logprob.rank == 1 + sum(v > exact[row, token] for v in exact[row]).item()
        values, ids = exact[row].topk(4)
        assert [t for t, _ in logprob.top] == ids.tolist()
        assert [v for _, v in logprob.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_only_rows_that_ask_get_logprobs_and_as_many_as_they_asked():
    seqs = [make_seq(logprobs=n, temperature=0.0) for n in (None, 0, 3, 100)]
    results = SAMPLER.sample(random_logits(4, vocab=50), seqs)
    assert results[0].logprob is None
    assert [len(r.logprob.top) for r in results[1:]] == [0, 3, 50]
    assert [r.logprob.rank for r in results[1:]] == [1, 1, 1]


def test_prompt_logprobs_match_log_softmax():
    logits = random_logits(20).bfloat16()
    tokens = list(range(0, 200, 10))
    exact = torch.log_softmax(logits.double(), -1)
    for row, entry in enumerate(SAMPLER.prompt_logprobs(logits, tokens, 2)):
        own = exact[row, tokens[row]]
        assert entry.token_id == tokens[row]
        assert entry.logprob == pytest.approx(own.item(), abs=1e-4)
        assert entry.rank == 1 + int((logits[row] > logits[row, tokens[row]]).sum())
        assert [v for _, v in entry.top] == pytest.approx(
            exact[row].topk(2).values.tolist(), abs=1e-4
        )


def test_prompt_logprobs_of_nan_are_an_error():
    logits = random_logits(2)
    logits[1, 3] = math.nan
    with pytest.raises(GenerationError, match="prompt"):
        SAMPLER.prompt_logprobs(logits, [1, 2], 0)


@pytest.mark.parametrize("vocab", [1, 255, 256, 257, 300, 511, 512, 1000])
def test_argmax_is_the_first_of_the_most_likely_tokens(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    for num_levels in (2, 50, 10_000):  # few levels make ties
        logits = torch.randint(num_levels, (64, vocab), generator=generator).float()
        want = [row.index(max(row)) for row in logits.tolist()]
        assert argmax(logits).tolist() == want
        assert argmax(logits[:, : vocab // 2 + 1]).tolist() == [
            row.index(max(row)) for row in logits[:, : vocab // 2 + 1].tolist()
        ]


@pytest.mark.parametrize("column", [0, 255, 256, 599])
def test_argmax_finds_no_token_beside_a_nan(column: int) -> None:
    logits = torch.randn(2, 600, generator=torch.Generator().manual_seed(0))
    logits[0, column] = math.nan
    assert argmax(logits).tolist() == [INVALID, logits[1].argmax().item()]
