"""What a request does to the model's logits before a token is chosen: biases, penalties, bans, structures.

Each step looks at the few tokens alone that a row names; all of them are done at once for a batch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from functools import lru_cache

import torch
from torch import Tensor

from minserve.engine.sampling.rows import SamplingRow, column, index_of
from minserve.engine.sampling.structure_masks import keep_to_structures
from minserve.prompts import BadWordIds


class _LogitCells:
    """Cells of logits ``[rows, vocab]``, each with a number.

    A batch may name a hundred thousand of them in each iteration, so they are kept in flat lists.
    """

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._tokens: list[int] = []
        self._values: list[float] = []

    def __bool__(self) -> bool:
        return bool(self._tokens)

    def add(self, row: int, tokens: Iterable[int], values: float | Iterable[float]) -> None:
        """Add cells of a row, each with its number, or all with the same one."""
        self._tokens += tokens
        num = len(self._tokens) - len(self._rows)
        self._rows += [row] * num
        self._values += [values] * num if isinstance(values, float) else values

    def within(self, vocab: int) -> _LogitCells:
        """Return those whose tokens the logits have."""
        if not self._tokens or max(self._tokens) < vocab:
            return self
        inside = _LogitCells()
        for row, token, value in zip(self._rows, self._tokens, self._values, strict=True):
            if token < vocab:
                inside.add(row, (token,), value)
        return inside

    def on(self, logits: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Return the cells as an index, and their numbers."""
        index = index_of(self._rows, logits), index_of(self._tokens, logits)
        return index, column(self._values, logits).squeeze(1)


def adjust(logits: Tensor, rows: SequenceOf[SamplingRow]) -> Tensor:
    """Return float32 logits ``[rows, vocab]`` with each request's biases, penalties and bans.

    Tokens beyond the logits, which a draft model may lack, are passed over.
    """
    return _ban(_penalize(_bias(logits, rows), rows), rows)


def _bias(logits: Tensor, rows: SequenceOf[SamplingRow]) -> Tensor:
    """Add what requests add to the logits of tokens."""
    biases = _LogitCells()
    for i, row in enumerate(rows):
        if bias := row.params.logit_bias:
            biases.add(i, bias.keys(), bias.values())
    biases = biases.within(logits.shape[1])
    if not biases:
        return logits
    cells, amount = biases.on(logits)
    return logits.index_put(cells, logits[cells] + amount)


def _penalize(logits: Tensor, rows: SequenceOf[SamplingRow]) -> Tensor:
    """Apply repetition, then frequency and presence penalties, at the few tokens that have any."""
    repeated, generated = _LogitCells(), _LogitCells()
    for i, row in enumerate(rows):
        params = row.params
        if params.repetition_penalty != 1.0:
            repeated.add(i, set(row.token_ids), float(params.repetition_penalty))
        frequency, presence = params.frequency_penalty, params.presence_penalty
        if frequency != 0.0 or presence != 0.0:
            counts = Counter(row.output_token_ids)
            generated.add(i, counts, [frequency * num + presence for num in counts.values()])
    if repeated:
        cells, factor = repeated.on(logits)
        x = logits[cells]
        logits = logits.index_put(cells, torch.where(x > 0, x / factor, x * factor))
    if generated:
        cells, amount = generated.on(logits)
        logits = logits.index_put(cells, logits[cells] - amount)
    return logits


def _ban(logits: Tensor, rows: SequenceOf[SamplingRow]) -> Tensor:
    """Give a logit of -inf to tokens that must not be chosen."""
    logits = keep_to_structures(logits, rows)
    choosy = [i for i, row in enumerate(rows) if row.params.allowed_token_ids]
    if choosy:
        logits = _only_allowed(logits, choosy, rows)
    banned = _LogitCells()
    for i, row in enumerate(rows):
        banned.add(i, _banned_tokens(row), -math.inf)
    banned = banned.within(logits.shape[1])
    return logits.index_put(*banned.on(logits)) if banned else logits


def _only_allowed(logits: Tensor, choosy: SequenceOf[int], rows: SequenceOf[SamplingRow]) -> Tensor:
    """Ban all tokens but the allowed ones, in those rows that name some."""
    allowed = _LogitCells()
    for i in choosy:
        allowed.add(i, rows[i].params.allowed_token_ids, 0.0)
    allowed = allowed.within(logits.shape[1])
    index = index_of(choosy, logits)
    banned = logits[index]
    # A NaN stays, wherever it is: it tells that the row means nothing.
    only = logits.index_copy(0, index, torch.where(banned.isnan(), banned, -math.inf))
    if not allowed:
        return only
    cells, _ = allowed.on(logits)
    return only.index_put(cells, logits[cells])


def _banned_tokens(row: SamplingRow) -> Iterator[int]:
    """Yield the tokens that would end the output too early, or complete a bad word."""
    request = row.seq.request
    if row.must_go_on and row.seq.guide is None:  # a structure has a word in when it ends
        yield from request.stop_token_ids
    if request.bad_word_ids:
        bad_words = _by_newest_token(request.bad_word_ids)
        yield from bad_words.get(None, {}).get((), ())
        if row.position:
            newest = row.drafted[-1] if row.drafted else row.seq.token_ids[-1]
            for beginning, last in bad_words.get(newest, {}).items():
                if row.position >= len(beginning) and row.newest(len(beginning)) == beginning:
                    yield from last


@lru_cache(maxsize=512)
def _by_newest_token(
    bad_word_ids: BadWordIds,
) -> dict[int | None, dict[tuple[int, ...], tuple[int, ...]]]:
    """Return the tokens that complete bad words, by the beginnings of these, and those by the
    token that ends them; ``None`` for words of one token.
    """
    found: dict[int | None, dict[tuple[int, ...], tuple[int, ...]]] = {}
    for *beginning, last in bad_word_ids:
        own = found.setdefault(beginning[-1] if beginning else None, {})
        own[tuple(beginning)] = (*own.get(tuple(beginning), ()), last)
    return found
