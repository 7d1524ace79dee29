"""Draws of every kind, at their largest, before there is a request.

On a GPU this leaves reserved the memory that they take, so that the KV cache is not given it, and it
loads and compiles the kernels for which no request should wait. What is drawn means nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from minserve.engine.sampling.distribution import CHUNK
from minserve.engine.sampling.rows import SamplingRow
from minserve.engine.speculation.proposal import Proposal
from minserve.request import Request, Sequence
from minserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from minserve.engine.sampling.sampler import Sampler
    from minserve.engine.structures.guide import Guide

log = logging.getLogger(__name__)

GREEDY = SamplingParams(temperature=0.0)
DRAWN = SamplingParams()
# All that one row can ask for, and what each part of it asks for alone.
TRUNCATED = SamplingParams(top_p=0.9, top_k=50, min_p=0.01)
ADJUSTED = SamplingParams(
    temperature=0.0, presence_penalty=0.1, frequency_penalty=0.1, repetition_penalty=1.1,
    logit_bias={0: 1.0}, logprobs=20,
)  # fmt: skip
EVERYTHING = SamplingParams(
    top_p=0.9, top_k=50, min_p=0.01, seed=0, presence_penalty=0.1, frequency_penalty=0.1,
    repetition_penalty=1.1, logit_bias={0: 1.0}, allowed_token_ids=(0, 1, 2), logprobs=20,
)  # fmt: skip
KINDS = (GREEDY, DRAWN, TRUNCATED, ADJUSTED, EVERYTHING)


class _AnyToken:
    """A structure that allows every token."""

    vocab_size = None

    def fill(
        self, drafted: SequenceOf[int], mask: NDArray[Any], ends: Iterable[int], may_end: bool
    ) -> None:
        mask[:] = 255


def rehearse(
    sampler: Sampler, logits: Tensor, num_seqs: int, most_drafted: int, *, by_chance: bool
) -> None:
    """Draw for so many sequences, all of one kind and of all kinds; then verify drafts of them.

    Where memory does not suffice, fewer sequences are tried, and it is logged: batches that are too
    large are run in halves later on (`minserve.engine.recovery`).

    Args:
        logits: ``[at least num_seqs * (1 + most_drafted), vocab]``.
        most_drafted: the most tokens drafted for a sequence; 0 if none are.
        by_chance: drafts may come from a draft model, which draws them.
    """
    while True:
        try:
            for params, proposals in _batches(num_seqs, most_drafted, by_chance, logits):
                num_rows = sum(1 if one is None else 1 + len(one.token_ids) for one in proposals)
                seqs = _sequences(params, logits.shape[1])
                sampler.launch(logits[:num_rows], seqs, proposals).results()
            return
        except torch.OutOfMemoryError:
            if num_seqs == 1:
                raise
        log.warning(
            "there is no memory to draw %d tokens at once; batches are halved then", num_seqs
        )
        num_seqs //= 2


def rehearse_drafts(sampler: Sampler, logits: Tensor) -> None:
    """Draw as a draft model does, greedily and by chance.

    Args:
        logits: ``[rows, vocab]`` of the draft model.
    """
    for kinds in ((GREEDY,), (EVERYTHING, TRUNCATED)):
        params = list(islice(cycle(kinds), len(logits)))
        sampler.draft(logits, [SamplingRow(seq) for seq in _sequences(params, logits.shape[1])])


def _batches(
    num_seqs: int, most_drafted: int, by_chance: bool, logits: Tensor
) -> Iterator[tuple[list[SamplingParams], list[Proposal | None]]]:
    """Yield the settings and the proposals of the sequences of each batch."""
    mixed = list(islice(cycle(KINDS), num_seqs))
    for kind in KINDS:
        yield [kind] * num_seqs, [None] * num_seqs
    if num_seqs > 1:
        yield mixed, [None] * num_seqs
    if not most_drafted:
        return
    tokens = (0,) * most_drafted
    known = Proposal(tokens)
    yield [EVERYTHING] * num_seqs, [known] * num_seqs
    yield mixed, [known] * num_seqs
    if by_chance:
        vocab = logits.shape[1]
        size = num_seqs, most_drafted, -(-vocab // CHUNK) * CHUNK
        q = torch.full(size, 1 / vocab, dtype=torch.float32, device=logits.device)
        yield [EVERYTHING] * num_seqs, [Proposal(tokens, tuple(own)) for own in q]


def _sequences(params: SequenceOf[SamplingParams], vocab: int) -> list[Sequence]:
    """Return sequences with these settings; every other one that draws has a structure."""
    found = []
    for i, own in enumerate(params):
        request = Request(
            request_id=f"rehearsal-{i}",
            prompt_token_ids=(0, min(1, vocab - 1)),
            params=own,
            seed=i,
            arrival_s=0.0,
        )
        seq = Sequence(request)
        if own is EVERYTHING and i % 2 == 0:
            seq.guide = cast("Guide", _AnyToken())
        found.append(seq)
    return found
