"""Prompt lookup against a search through the whole text, and the counts of what was accepted."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minserve.engine.speculation.proposer import DraftRequest, NgramProposer, SpeculationStats
from minserve.request import Request, Sequence
from minserve.sampling_params import SamplingParams

MOST = 6

small_texts = st.integers(1, 4).flatmap(
    lambda alphabet: st.lists(st.integers(0, alphabet - 1), min_size=1, max_size=60)
)


def make_sequence(prompt: list[int], name: str = "r") -> Sequence:
    params = SamplingParams(max_tokens=1000)
    request = Request(
        request_id=name, prompt_token_ids=tuple(prompt), params=params, seed=0, arrival_s=0.0
    )
    return Sequence(request)


def search(tokens: list[int], num: int) -> tuple[int, ...] | None:
    """What followed the latest earlier occurrence of the longest end of 4 to 2 tokens."""
    for size in (4, 3, 2):
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == tokens[len(tokens) - size :]:
                round_and_round = list(tokens)
                while len(round_and_round) < end + num:
                    round_and_round += tokens[end:]
                return tuple(round_and_round[end : end + num])
    return None


def propose(proposer: NgramProposer, seq: Sequence, num: int) -> tuple[int, ...] | None:
    proposal = proposer.propose([DraftRequest(seq, num)]).get(seq.seq_id)
    assert proposal is None or proposal.probabilities is None
    return None if proposal is None else proposal.token_ids


@settings(max_examples=400)
@given(tokens=small_texts, num=st.integers(1, MOST))
def test_a_proposal_is_what_a_search_through_the_text_finds(tokens: list[int], num: int) -> None:
    proposer, seq = NgramProposer(MOST), make_sequence(tokens)
    expected = search(tokens, num)
    assert propose(proposer, seq, num) == expected
    assert proposer.limit(seq) == (0 if expected is None else MOST)
    assert proposer.lag(seq) == 0


@settings(max_examples=200)
@given(tokens=small_texts, cuts=st.sets(st.integers(1, 60)), num=st.integers(1, MOST))
def test_reading_a_text_in_pieces_changes_nothing(
    tokens: list[int], cuts: set[int], num: int
) -> None:
    in_pieces, token_by_token = NgramProposer(MOST), NgramProposer(MOST)
    jumping, walking = make_sequence(tokens[:1]), make_sequence(tokens[:1])
    for end in range(1, len(tokens) + 1):
        walking.token_ids = tokens[:end]
        assert propose(token_by_token, walking, num) == search(tokens[:end], num)
        if end in cuts:
            jumping.token_ids = tokens[:end]
            assert propose(in_pieces, jumping, num) == search(tokens[:end], num)


@settings(max_examples=100)
@given(tokens=small_texts, other=small_texts, num=st.integers(1, MOST))
def test_a_forgotten_sequence_is_read_anew(tokens: list[int], other: list[int], num: int) -> None:
    proposer, seq = NgramProposer(MOST), make_sequence(tokens)
    propose(proposer, seq, num)
    proposer.forget(seq)
    proposer.forget(seq)  # nothing is left to forget
    newcomer = make_sequence(other)  # of the same id
    assert propose(proposer, newcomer, num) == search(other, num)


@settings(max_examples=100)
@given(texts=st.lists(small_texts, min_size=2, max_size=5), num=st.integers(1, MOST))
def test_sequences_of_one_batch_do_not_see_each_other(texts: list[list[int]], num: int) -> None:
    proposer = NgramProposer(MOST)
    seqs = [make_sequence(text, f"r{i}") for i, text in enumerate(texts)]
    found = proposer.propose([DraftRequest(seq, num) for seq in seqs])
    for seq, text in zip(seqs, texts, strict=True):
        proposal = found.get(seq.seq_id)
        assert (None if proposal is None else proposal.token_ids) == search(text, num)


def test_the_latest_of_the_longest_matches_decides() -> None:
    #        a known end of two tokens  | of three         | once more | the end itself
    tokens = [2, 3, 50, 1, 2, 3, 60, 1, 2, 3, 70, 9, 2, 3, 80, 1, 2, 3]
    assert propose(NgramProposer(MOST), make_sequence(tokens), 1) == (70,)


def test_a_text_that_repeats_itself_goes_on_repeating() -> None:
    assert propose(NgramProposer(MOST), make_sequence([1, 2, 3, 1, 2]), 6) == (3, 1, 2, 3, 1, 2)
    assert propose(NgramProposer(MOST), make_sequence([7, 7, 7]), 4) == (7, 7, 7, 7)


def test_without_a_known_end_nothing_is_proposed() -> None:
    proposer = NgramProposer(MOST)
    for tokens in ([1], [1, 1], [1, 2, 3, 1, 3], list(range(50))):
        seq = make_sequence(tokens)
        assert propose(proposer, seq, 3) is None
        assert proposer.limit(seq) == 0
        proposer.forget(seq)


def test_nothing_is_proposed_to_who_wants_nothing() -> None:
    proposer, seq = NgramProposer(MOST), make_sequence([1, 2, 1, 2])
    assert proposer.propose([DraftRequest(seq, 0, num_catch_up=3)]) == {}
    assert proposer.propose([]) == {}


@pytest.mark.parametrize("num_tokens", [1, 2, 5])
def test_a_proposal_is_as_long_as_was_asked_for(num_tokens: int) -> None:
    seq = make_sequence([1, 2, 3, 4, 5, 6, 7, 8, 1, 2])
    assert propose(NgramProposer(MOST), seq, num_tokens) == (3, 4, 5, 6, 7)[:num_tokens]


def test_stats_count_proposals_tokens_and_places() -> None:
    stats = SpeculationStats()
    for num_drafted, num_accepted in ((3, 2), (1, 0), (5, 5), (2, 1)):
        stats.add(num_drafted, num_accepted)
    assert (stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens) == (4, 11, 8)
    assert stats.num_accepted_per_pos == [3, 2, 1, 1, 1]
