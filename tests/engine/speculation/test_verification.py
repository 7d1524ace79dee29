"""Verified drafts against the sampler without drafts, exact probabilities, and broken twins."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable

import pytest
import torch
from drafted_batches import (
    PROMPT,
    SAMPLER,
    TABLE,
    batch_of_three,
    mixed_batch,
    one_by_one,
    rows_behind,
    seq_with,
    wrong,
)
from sampling_reference import (
    SETTINGS,
    VOCAB,
    chi_square_limit,
    random_logits,
    reference_distribution,
    reference_token,
)
from torch import Tensor

from minserve.engine.sampling.distribution import INVALID
from minserve.engine.sampling.noise import DRAFT, word
from minserve.engine.sampling.rows import SamplingRow
from minserve.engine.speculation import verification
from minserve.engine.speculation.proposal import Proposal, SampledToken, Verified
from minserve.errors import GenerationError
from minserve.request import Sequence


def verify_one(seq: Sequence, proposal: Proposal | None, logits: Tensor | None = None) -> list[int]:
    drafted = () if proposal is None else proposal.token_ids
    logits = rows_behind(seq, drafted) if logits is None else logits
    (verified,) = SAMPLER.verify(logits, [seq], [proposal])
    assert isinstance(verified, Verified)
    assert verified.num_accepted == len(verified.tokens) - 1
    return [token.token_id for token in verified.tokens]


# -- drafts without chance ---------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_verified_tokens_are_those_chosen_one_by_one(settings: dict) -> None:
    for seed in range(3):
        output = [7, 8, TABLE[PROMPT[-1]].argmax().item(), 7]
        common = {"seed": seed, "stop": [TABLE[7].argmax().item(), 11], **settings}
        truth = one_by_one(6, output, **common)
        seq = seq_with(output, **common)
        for num_right in range(6):
            drafted = [*truth[:num_right], wrong(truth[num_right]), *truth[num_right + 1 : 5]]
            proposal = Proposal(tuple(drafted))
            assert verify_one(seq, proposal) == truth[: num_right + 1]
        assert verify_one(seq, Proposal(tuple(truth[:5]))) == truth
        assert verify_one(seq, None) == truth[:1]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_draft_of_the_same_logits_is_the_targets_own_choice(settings: dict) -> None:
    for seed in range(6):
        common = {"seed": seed, "stop": [TABLE[7].argmax().item(), 11], **settings}
        truth = one_by_one(4, [7, 8], **common)
        seq, drafted = seq_with([7, 8], is_seeded=True, **common), ()
        for token in truth:
            row = SamplingRow(seq, drafted)
            (choice,) = SAMPLER.draft(rows_behind(seq, drafted)[-1:], [row])
            assert choice == (token, None)
            drafted += (token,)


@pytest.mark.parametrize(
    "settings",
    [s for s in SETTINGS if s.get("temperature") != 0.0 and s.get("top_k") != 1],
    ids=str,
)
def test_an_unseeded_draft_is_drawn_from_the_distribution_that_it_names(settings: dict) -> None:
    for seed in range(8):
        common = {"seed": seed, "stop": [TABLE[7].argmax().item(), 11], **settings}
        row = SamplingRow(seq_with([7, 8], **common), (8, 7))
        logits = TABLE[7:8]
        (choice,) = SAMPLER.draft(logits, [row])
        expected = reference_distribution(logits[0].tolist(), seq_with([7, 8, 8, 7], **common))
        assert choice.probabilities[:VOCAB].tolist() == pytest.approx(expected, abs=1e-6)
        assert choice.probabilities.sum().item() == pytest.approx(1.0, abs=1e-5)
        token, margin = reference_token(expected, word(seed, 0, 4, DRAFT))
        assert choice.token_id == token or margin < 1e-5


def test_drafts_of_a_mixed_batch_are_those_of_each_row_alone() -> None:
    rows = [
        SamplingRow(seq_with([7], seed=i, is_seeded=i % 2 == 0, **settings), (8,) * (i % 3))
        for i, settings in enumerate(SETTINGS)
    ]
    logits = random_logits(len(rows), seed=4)
    alone = [SAMPLER.draft(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    for got, expected in zip(SAMPLER.draft(logits, rows), alone, strict=True):
        assert got.token_id == expected.token_id
        assert (got.probabilities is None) == (expected.probabilities is None)
        if got.probabilities is not None:
            assert torch.equal(got.probabilities, expected.probabilities)


def test_a_draft_row_without_a_distribution_is_marked() -> None:
    seqs = [seq_with([1], temperature=t, seed=i) for i, t in enumerate((0.0, 1.0, 0.0, 1.0))]
    logits = random_logits(4, seed=6)
    logits[0, 3] = math.nan
    logits[1] = -math.inf
    choices = SAMPLER.draft(logits, [SamplingRow(seq) for seq in seqs])
    assert [c.token_id == INVALID for c in choices] == [True, True, False, False]


# -- drafts by chance: the distribution --------------------------------------------------

FEW = 12
TARGET = random_logits(FEW, FEW, seed=30, scale=1.5)
NEAR = TARGET + random_logits(FEW, FEW, seed=31, scale=0.7)
FAR = random_logits(FEW, FEW, seed=32, scale=1.5)
HALF = FAR.index_fill(1, torch.arange(0, FEW, 2), -math.inf)
HOLES = TARGET.index_fill(1, torch.arange(4), -math.inf)  # of the target's
PENALTIES = {"repetition_penalty": 1.4, "frequency_penalty": 0.6, "presence_penalty": -0.4}
DRAWS, AT_ONCE = 4500, 1500

Emitted = list[tuple[list[int], int]]  # tokens, of which so many were drafted


def speculate(
    target: Tensor, draft: Tensor, settings: dict, draws: int = DRAWS, drafts: int = 2
) -> Emitted:
    """Draft for many requests that differ in their seed, and verify; what is emitted."""
    emitted: Emitted = []
    for start in range(0, draws, AT_ONCE):
        seqs = [seq_with([2], seed=start + i, **settings) for i in range(AT_ONCE)]
        tokens: list[tuple[int, ...]] = [() for _ in seqs]
        shares: list[tuple[Tensor, ...]] = [() for _ in seqs]
        for _ in range(drafts):
            logits = draft[[(2, *drafted)[-1] for drafted in tokens]]
            rows = [SamplingRow(seq, drafted) for seq, drafted in zip(seqs, tokens, strict=True)]
            for i, choice in enumerate(SAMPLER.draft(logits, rows)):
                tokens[i] += (choice.token_id,)
                shares[i] += (choice.probabilities,)
        proposals = [Proposal(t, q) for t, q in zip(tokens, shares, strict=True)]
        logits = torch.cat([target[[2, *drafted]] for drafted in tokens])
        for verified in SAMPLER.verify(logits, seqs, proposals):
            emitted.append(([t.token_id for t in verified.tokens], verified.num_accepted))
    return emitted


def surprise(
    emitted: Emitted, place: int, exact: Callable[[tuple[int, ...]], list[float]]
) -> float:
    """Chi-square over its limit of the tokens at a place, each given those before it."""
    groups: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for tokens, _ in emitted:
        if len(tokens) > place:
            groups[tuple(tokens[:place])][tokens[place]] += 1
    statistic, degrees = 0.0, 0
    for before, counts in groups.items():
        total, probabilities = counts.total(), exact(before)
        impossible = [t for t in counts if probabilities[t] == 0.0]
        if impossible:
            return math.inf
        common = [t for t, p in enumerate(probabilities) if p * total >= 5]
        cells = [(counts[t], probabilities[t] * total) for t in common]
        rest = total - sum(wanted for _, wanted in cells)
        if rest >= 5:
            cells.append((total - sum(seen for seen, _ in cells), rest))
        if len(cells) > 1:
            statistic += sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
            degrees += len(cells) - 1
    return statistic / chi_square_limit(degrees)


def exact_of(target: Tensor, settings: dict) -> Callable[[tuple[int, ...]], list[float]]:
    def exact(before: tuple[int, ...]) -> list[float]:
        seq = seq_with([2, *before], **settings)
        return reference_distribution(target[seq.token_ids[-1]].tolist(), seq)

    return exact


CASES = {
    "far": (TARGET, FAR, {}),
    "near": (TARGET, NEAR, {"temperature": 0.7}),
    "hot": (TARGET, FAR, {"temperature": 1.6}),
    "top_p": (TARGET, FAR, {"top_p": 0.7}),
    "top_k": (TARGET, NEAR, {"top_k": 4}),
    "min_p": (TARGET, FAR, {"min_p": 0.15}),
    "penalties": (TARGET, NEAR, {**PENALTIES, "temperature": 0.9}),
    "min_tokens": (TARGET, NEAR, {"min_tokens": 3, "stop": [1, 4, 6]}),
    "q without half of p": (TARGET, HALF, {}),
    "p without some of q": (HOLES, NEAR, {}),
    "the same": (TARGET, TARGET, {}),
    "one-hot in disguise": (TARGET, 300 * NEAR, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_emitted_token_follows_the_targets_distribution(case: str) -> None:
    target, draft, settings = CASES[case]
    emitted = speculate(target, draft, settings)
    exact = exact_of(target, settings)
    lengths = Counter(len(tokens) for tokens, _ in emitted)
    assert surprise(emitted, 0, exact) < 1.0
    assert surprise(emitted, 1, exact) < 1.0
    # All drafts accepted: the third token is the target's own.
    assert surprise(emitted, 2, exact) < 1.0
    if case == "the same":
        assert lengths[3] > 0.999 * DRAWS
    else:
        assert min(lengths[1], lengths[2], lengths[3]) > 50, "every way to end was taken"


def test_the_share_of_accepted_drafts_is_what_p_and_q_have_in_common() -> None:
    emitted = speculate(TARGET, FAR, {}, drafts=1)
    p, q = TARGET[2].double().softmax(-1), FAR[2].double().softmax(-1)
    expected = torch.minimum(p, q).sum().item()
    found = sum(accepted for _, accepted in emitted) / len(emitted)
    assert abs(found - expected) < 5 * math.sqrt(expected * (1 - expected) / len(emitted))


def _p_in_place_of_the_residual(patch: pytest.MonkeyPatch) -> None:
    original = verification._nums_accepted

    def broken(p, rows, is_valid, starts, proposals):
        nums = original(p, rows, is_valid, starts, proposals)
        for num, proposal in zip(nums.tolist(), proposals, strict=True):
            if num < len(proposal.token_ids):
                proposal.probabilities[num].zero_()
        return nums

    patch.setattr(verification, "_nums_accepted", broken)


def _q_in_place_of_p_for_the_bonus(patch: pytest.MonkeyPatch) -> None:
    original = verification._nums_accepted

    def broken(p, rows, is_valid, starts, proposals):
        nums = original(p, rows, is_valid, starts, proposals)
        for num, start, proposal in zip(nums.tolist(), starts, proposals, strict=True):
            if num == len(proposal.token_ids):
                p[start + num].copy_(proposal.probabilities[-1])
        return nums

    patch.setattr(verification, "_nums_accepted", broken)


def _every_draft_accepted(patch: pytest.MonkeyPatch) -> None:
    def broken(*arguments):
        return torch.tensor([len(proposal.token_ids) for proposal in arguments[-1]])

    patch.setattr(verification, "_nums_accepted", broken)


def _the_same_noise_for_every_residual(patch: pytest.MonkeyPatch) -> None:
    original = verification.to_keys
    patch.setattr(verification, "to_keys", lambda words, device: original(words * 0, device))


def _one_number_for_every_acceptance(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(verification, "uniforms", lambda words: words * 0.0 + 0.5)


@pytest.mark.parametrize(
    ("break_it", "place"),
    [
        (_p_in_place_of_the_residual, 0),
        (_p_in_place_of_the_residual, 1),
        (_q_in_place_of_p_for_the_bonus, 2),
        (_every_draft_accepted, 0),
        (_the_same_noise_for_every_residual, 0),
        (_one_number_for_every_acceptance, 0),
    ],
    ids=lambda value: str(getattr(value, "__name__", value)),
)
def test_the_check_of_the_distribution_finds_a_broken_verification(
    monkeypatch: pytest.MonkeyPatch, break_it: Callable[[pytest.MonkeyPatch], None], place: int
) -> None:
    break_it(monkeypatch)
    emitted = speculate(TARGET, FAR, {})
    assert surprise(emitted, place, exact_of(TARGET, {})) > 1.2


# -- rows without a distribution ---------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "drawn", "by chance"])
@pytest.mark.parametrize("damage", [math.nan, -math.inf], ids=str)
@pytest.mark.parametrize("place", range(4))
def test_a_row_without_a_distribution_ends_its_own_sequence_there(
    kind: str, damage: float, place: int
) -> None:
    logits, seqs, proposals = batch_of_three(kind)
    whole = SAMPLER.verify(logits, seqs, proposals)
    assert [v.num_accepted for v in whole] == [3, 3, 3]
    hurt = logits.clone()
    hurt[4 + place] = damage
    if math.isnan(damage):
        hurt[4 + place, 1:] = logits[4 + place, 1:]  # one NaN is enough
    first, second, third = SAMPLER.verify(hurt, seqs, proposals)
    assert first == whole[0]
    assert third == whole[2]
    if place == 0:
        assert isinstance(second, GenerationError)
        assert seqs[1].seq_id in str(second)
    else:
        assert second.tokens == whole[1].tokens[:place]
        assert second.num_accepted == place


@pytest.mark.parametrize("kind", ["plain", "drawn", "by chance"])
def test_an_infinite_logit_is_the_token(kind: str) -> None:
    """It has all of the distribution: a draft of it is accepted, and any other replaced by it."""
    logits, seqs, proposals = batch_of_three(kind)
    drafted = proposals[1].token_ids
    infinite = logits.clone()
    infinite[4, drafted[0]] = infinite[5, drafted[1] + 1] = math.inf
    first, second, third = SAMPLER.verify(infinite, seqs, proposals)
    assert [token.token_id for token in second.tokens] == [drafted[0], drafted[1] + 1]
    assert (first, third) == tuple(SAMPLER.verify(logits, seqs, proposals)[::2])


# -- log probabilities -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "drawn", "by chance"])
def test_logprobs_of_verified_tokens_are_of_the_raw_logits(kind: str) -> None:
    logits, seqs, proposals = batch_of_three(kind)
    expected = logits.log_softmax(-1)
    for i, verified in enumerate(SAMPLER.verify(logits, seqs, proposals)):
        for place, token in enumerate(verified.tokens):
            row = expected[4 * i + place]
            assert token.logprob.token_id == token.token_id
            assert token.logprob.logprob == pytest.approx(row[token.token_id].item(), abs=1e-5)
            assert token.logprob.rank == 1 + (row > row[token.token_id]).sum().item()
            best = row.topk(2)
            assert [t for t, _ in token.logprob.top] == best.indices.tolist()
            assert [v for _, v in token.logprob.top] == pytest.approx(best.values.tolist())


# -- mixed batches -----------------------------------------------------------------------


def test_a_mixed_batch_gives_each_sequence_what_it_gets_alone() -> None:
    logits, seqs, proposals = mixed_batch()
    kinds = Counter("none" if p is None else "drawn" if p.probabilities else "one-hot"
                    for p in proposals)  # fmt: skip
    assert min(kinds[kind] for kind in ("none", "drawn", "one-hot")) > 10
    alone = [
        SAMPLER.verify(x, [s], [p])[0] for x, s, p in zip(logits, seqs, proposals, strict=True)
    ]
    assert ids(SAMPLER.verify(torch.cat(logits), seqs, proposals)) == ids(alone)
    order = torch.randperm(len(seqs), generator=torch.Generator().manual_seed(2)).tolist()
    shuffled = SAMPLER.verify(
        torch.cat([logits[i] for i in order]),
        [seqs[i] for i in order],
        [proposals[i] for i in order],
    )
    assert ids(shuffled) == [ids(alone)[i] for i in order]


def ids(results: list[Verified]) -> list[list[tuple[int, bool]]]:
    """Tokens, and whether they came with a log probability."""
    tokens: list[list[SampledToken]] = [list(result.tokens) for result in results]
    return [[(t.token_id, t.logprob is not None) for t in own] for own in tokens]


def test_verification_changes_neither_logits_nor_proposals() -> None:
    logits, seqs, proposals = mixed_batch()
    whole = torch.cat(logits)
    before = whole.clone()
    shares = [p.probabilities for p in proposals if p is not None and p.probabilities]
    copies = [[q.clone() for q in own] for own in shares]
    SAMPLER.verify(whole, seqs, proposals)
    assert torch.equal(whole, before)
    for own, kept in zip(shares, copies, strict=True):
        assert all(torch.equal(q, k) for q, k in zip(own, kept, strict=True))


def test_no_sequences_give_nothing() -> None:
    assert SAMPLER.verify(torch.empty(0, VOCAB), [], []) == []
    assert SAMPLER.draft(torch.empty(0, VOCAB), []) == []
