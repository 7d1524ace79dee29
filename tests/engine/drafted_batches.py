"""Batches of sequences with drafted tokens to verify."""

from __future__ import annotations

from dataclasses import replace

import torch
from sampling_reference import (
    SETTINGS,
    VOCAB,
    make_seq,
    random_logits,
)
from torch import Tensor

from minserve.engine.sampling.rows import SamplingRow
from minserve.engine.sampling.sampler import Sampler
from minserve.engine.speculation.proposal import Proposal
from minserve.request import Sequence

SAMPLER = Sampler()


PROMPT = [5, 9, 3]


# A model that looks at one token only: row t holds the logits of what follows token t.
TABLE = random_logits(VOCAB, seed=20)


def seq_with(output: list[int], *, seed: int = 0, is_seeded: bool = False, **params) -> Sequence:
    """A sequence whose request chose its seed, or was given one."""
    seq = make_seq(PROMPT, output, seed=seed, **params)
    if is_seeded:
        seq.request = replace(seq.request, params=replace(seq.request.params, seed=seed))
    return seq


def rows_behind(seq: Sequence, drafted: tuple[int, ...] = (), table: Tensor = TABLE) -> Tensor:
    """Logits behind the newest token and behind each drafted one."""
    return table[[seq.token_ids[-1], *drafted]]


def one_by_one(num: int, output: list[int], **settings) -> list[int]:
    """What the sampler chooses without drafts, one token at a time."""
    chosen: list[int] = []
    for _ in range(num):
        seq = seq_with(output + chosen, **settings)
        (result,) = SAMPLER.sample(rows_behind(seq), [seq])
        chosen.append(result.token_id)
    return chosen


def wrong(token: int) -> int:
    return (token + 1) % VOCAB


def batch_of_three(kind: str) -> tuple[Tensor, list[Sequence], list[Proposal]]:
    """Three sequences with three drafts each, all of which are accepted."""
    settings = {"plain": {"temperature": 0.0}, "drawn": {}, "by chance": {}}[kind]
    seqs, proposals, logits = [], [], []
    for seed in range(3):
        seq = seq_with([7, 8], seed=seed, logprobs=2, **settings)
        drafted = tuple(one_by_one(3, [7, 8], seed=seed, **settings))
        rows = rows_behind(seq, drafted)
        shares = None
        if kind == "by chance":
            # A third of what the target gives each drafted token: always accepted.
            p = rows[:-1].softmax(-1)
            shares = tuple(torch.zeros(768).index_fill(0, torch.tensor(t), s / 3)
                           for t, s in zip(drafted, p[range(3), drafted].tolist(), strict=True))  # fmt: skip
        seqs.append(seq)
        proposals.append(Proposal(drafted, shares))
        logits.append(rows)
    return torch.cat(logits), seqs, proposals


def mixed_batch() -> tuple[list[Tensor], list[Sequence], list[Proposal | None]]:
    """Every kind of row beside every other: with no proposal, one-hot ones, drawn ones."""
    logits, seqs, proposals = [], [], []
    for i, settings in enumerate([*SETTINGS, *SETTINGS, *SETTINGS]):
        seq = seq_with([7, 8], seed=i, logprobs=(None, 0, 3)[i % 3], stop=[7, 11], **settings)
        drafted = tuple(one_by_one(4, [7, 8], seed=i, stop=[7, 11], **settings))[: i % 4 + 1]
        if i % 5 == 0:
            drafted = (*drafted[:-1], wrong(drafted[-1]))
        proposal = (None, Proposal(drafted), None)[i % 3]
        if i % 3 == 2 and not seq.request.params.greedy:
            choices = [
                SAMPLER.draft(
                    rows_behind(seq, drafted[:num])[-1:] * 0.8, [SamplingRow(seq, drafted[:num])]
                )
                for num in range(len(drafted))
            ]
            proposal = Proposal(drafted, tuple(choice.probabilities for (choice,) in choices))
        seqs.append(seq)
        proposals.append(proposal)
        logits.append(rows_behind(seq, () if proposal is None else drafted))
    return logits, seqs, proposals
