"""What a request does to the model's logits before a token is chosen: biases, penalties, bans.

Each step looks at the few tokens alone that a row names; all of them are done at once for a batch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from minserve.engine.sampling.rows import SamplingRow, column, index_of


def adjust(logits: Tensor, rows: SequenceOf[SamplingRow]) -> Tensor:
    """Return float32 logits ``[rows, vocab]`` with each request's biases, penalties and bans.

    Tokens beyond the logits, which a draft model may lack, are passed over.
    """
    return _ban(_penalize(_bias(logits, rows), rows), rows)


def _bias(logits: Tensor, rows: SequenceOf[SamplingRow]) -> Tensor:
    """Add what requests add to the logits of tokens."""
    biases = [
        (i, token, bias)
        for i, row in enumerate(rows)
        for token, bias in row.params.logit_bias.items()
        if token < logits.shape[1]
    ]
    if not biases:
        return logits
    cells, amount = _cells(biases, logits)
    return logits.index_put(cells, logits[cells] + amount)


def _penalize(logits: Tensor, rows: SequenceOf[SamplingRow]) -> Tensor:
    """Apply repetition, then frequency and presence penalties, at the few tokens that have any."""
    repeated = [
        (i, token, row.params.repetition_penalty)
        for i, row in enumerate(rows)
        if row.params.repetition_penalty != 1.0
        for token in set(row.token_ids)
    ]
    if repeated:
        cells, factor = _cells(repeated, logits)
        x = logits[cells]
        logits = logits.index_put(cells, torch.where(x > 0, x / factor, x * factor))
    generated = [
        (i, token, p.frequency_penalty * count + p.presence_penalty)
        for i, row in enumerate(rows)
        if (p := row.params).frequency_penalty != 0.0 or p.presence_penalty != 0.0
        for token, count in Counter(row.output_token_ids).items()
    ]
    if generated:
        cells, amount = _cells(generated, logits)
        logits = logits.index_put(cells, logits[cells] - amount)
    return logits


def _ban(logits: Tensor, rows: SequenceOf[SamplingRow]) -> Tensor:
    """Give a logit of -inf to tokens that must not be chosen."""
    choosy = [i for i, row in enumerate(rows) if row.params.allowed_token_ids]
    if choosy:
        logits = _only_allowed(logits, choosy, rows)
    banned = [
        (i, token, -math.inf)
        for i, row in enumerate(rows)
        for token in _banned_tokens(row)
        if token < logits.shape[1]
    ]
    return logits.index_put(*_cells(banned, logits)) if banned else logits


def _only_allowed(logits: Tensor, choosy: SequenceOf[int], rows: SequenceOf[SamplingRow]) -> Tensor:
    """Ban all tokens but the allowed ones, in those rows that name some."""
    allowed = [
        (i, token, 0.0)
        for i in choosy
        for token in rows[i].params.allowed_token_ids
        if token < logits.shape[1]
    ]
    index = index_of(choosy, logits)
    banned = logits[index]
    # A NaN stays, wherever it is: it tells that the row means nothing.
    only = logits.index_copy(0, index, torch.where(banned.isnan(), banned, -math.inf))
    if not allowed:
        return only
    cells, _ = _cells(allowed, logits)
    return only.index_put(cells, logits[cells])


def _banned_tokens(row: SamplingRow) -> Iterator[int]:
    """Yield the tokens that would end the output too early, or complete a bad word."""
    request = row.seq.request
    if row.must_go_on:
        yield from request.stop_token_ids
    if request.bad_word_ids:
        output = row.output_token_ids
        for *beginning, last in request.bad_word_ids:
            if not beginning or output[-len(beginning) :] == beginning:
                yield last


def _cells(
    entries: list[tuple[int, int, float]], like: Tensor
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return (row, token, value) triples as an index into ``[rows, vocab]`` and its values."""
    rows, tokens, values = zip(*entries, strict=True)
    return (index_of(rows, like), index_of(tokens, like)), column(values, like).squeeze(1)
