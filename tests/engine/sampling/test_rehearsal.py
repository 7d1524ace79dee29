"""Draws beforehand: of every kind, for as many sequences as can be, on what memory there is."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from minserve.engine.sampling.rehearsal import rehearse, rehearse_drafts
from minserve.engine.sampling.sampler import Sampler
from minserve.engine.speculation.proposal import Proposal
from minserve.engine.speculation.verification import PendingTokens
from minserve.request import Sequence

VOCAB = 300


class Watched(Sampler):
    """Notes the batches, of which those with more rows than fit raise as a full GPU does."""

    def __init__(self, most_rows: int = 10**6) -> None:
        super().__init__()
        self.most_rows = most_rows
        self.batches: list[tuple[Tensor, list[Sequence], list[Proposal | None]]] = []

    def launch(
        self, logits: Tensor, seqs: list[Sequence], proposals: list[Proposal | None]
    ) -> PendingTokens:
        if len(logits) > self.most_rows:
            raise torch.OutOfMemoryError("no memory is left")
        self.batches.append((logits, seqs, proposals))
        return super().launch(logits, seqs, proposals)


def rehearsed(num_seqs: int, most_drafted: int, by_chance: bool, most_rows: int = 10**6) -> Watched:
    sampler = Watched(most_rows)
    logits = torch.zeros(num_seqs * (1 + most_drafted), VOCAB)
    rehearse(sampler, logits, num_seqs, most_drafted, by_chance=by_chance)
    return sampler


def test_every_kind_of_draw_is_tried_for_all_sequences() -> None:
    sampler = rehearsed(7, 3, by_chance=True)
    params = [seq.request.params for _, seqs, _ in sampler.batches for seq in seqs]
    assert any(p.greedy and not p.adjusts_logits for p in params)
    assert any(not p.greedy and p.top_p == 1.0 for p in params)
    for field in ("top_k", "min_p", "seed", "presence_penalty", "frequency_penalty", "logit_bias",
                  "allowed_token_ids", "logprobs"):  # fmt: skip
        assert (
            any(getattr(p, field) not in (None, 0, 0.0, (), {}) for p in params) or field == "seed"
        )
    assert any(p.seed is not None for p in params)
    assert any(p.repetition_penalty != 1.0 for p in params)
    assert any(seq.guide is not None for _, seqs, _ in sampler.batches for seq in seqs)
    kinds = set()
    for logits, seqs, proposals in sampler.batches:
        assert len(seqs) == 7
        drafted = proposals[0]
        assert len(logits) == 7 * (1 if drafted is None else 4)
        kinds.add((drafted is None, drafted is not None and drafted.probabilities is not None))
    assert kinds == {(True, False), (False, False), (False, True)}


def test_what_no_proposer_does_is_not_tried() -> None:
    sampler = rehearsed(2, 0, by_chance=False)
    assert all(one is None for _, _, proposals in sampler.batches for one in proposals)


def test_one_sequence_is_enough() -> None:
    assert all(len(seqs) == 1 for _, seqs, _ in rehearsed(1, 2, by_chance=True).batches)


def test_where_memory_is_short_fewer_are_drawn_at_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        sampler = rehearsed(16, 1, by_chance=False, most_rows=10)
    assert [record.getMessage().split()[6] for record in caplog.records] == ["16", "8"]
    assert len(sampler.batches[-1][1]) == 4
    with pytest.raises(torch.OutOfMemoryError):
        rehearsed(1, 1, by_chance=False, most_rows=1)


def test_a_draft_models_draws_are_tried() -> None:
    rows = []

    class Drafting(Sampler):
        def draft(self, logits, of):
            rows.append([row.params for row in of])
            return super().draft(logits, of)

    rehearse_drafts(Drafting(), torch.zeros(5, VOCAB))
    assert [len(one) for one in rows] == [5, 5]
    assert any(not params.greedy for params in rows[1])
