"""Drafted tokens, their rejection sampling, and the tokens that result.

The module knows sequences and logits, but nothing of blocks, batches or text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import torch
from torch import Tensor

from minserve.engine.device import transfers
from minserve.engine.sampling.adjustments import adjust
from minserve.engine.sampling.distribution import (
    INVALID,
    choose,
    weigh,
)
from minserve.engine.sampling.logprobs import logprob_tensors, token_logprobs
from minserve.engine.sampling.noise import (
    ACCEPTANCE,
    CHOICE,
    RESIDUAL,
    to_keys,
    uniforms,
    words,
)
from minserve.engine.sampling.rows import SamplingRow, column, index_of
from minserve.engine.speculation.proposal import Proposal, SampledToken, Verified
from minserve.engine.structures.guide import unheld
from minserve.errors import GenerationError, InvalidRequestError, MinserveError
from minserve.outputs import TokenLogprob
from minserve.request import Sequence


class Span(NamedTuple):
    """A sequence's rows of the logits.

    Attributes:
        place: the sequence's place in the batch.
        drafted: the drafted tokens; behind each of them is a row.
        first: the row behind the newest token.
    """

    place: int
    seq: Sequence
    drafted: tuple[int, ...]
    first: int

    @property
    def rows(self) -> range:
        return range(self.first, self.first + len(self.drafted) + 1)


class PendingTokens:
    """The tokens of a batch, on their way to the host in one copy.

    Attributes:
        ids: int64 ``[rows]``, on the device: see ``Args``.

    Args:
        logits: raw, ``[rows, vocab]``.
        spans: the sequences, in order of their rows.
        ids: int64 ``[rows]``: the target's choices, with which drafts are compared. The last
            sequences, drafted by chance, have their drafts there, and in place of the first
            draft that was not accepted, or behind the last one, the target's choice.
        nums_accepted: int64, for each of these last sequences; ``None`` for none.
    """

    def __init__(
        self,
        logits: Tensor,
        spans: list[Span],
        ids: Tensor,
        nums_accepted: Tensor | None = None,
    ) -> None:
        self._logits, self._spans, self.ids = logits, spans, ids
        tensors = [ids] if nums_accepted is None else [ids, nums_accepted]
        self._num_chosen = len(tensors)
        self._num_top = {
            row: span.seq.request.params.logprobs
            for span in spans
            if span.seq.request.params.logprobs is not None
            for row in span.rows
        }
        if self._num_top and not transfers.runs_behind(ids.device):
            # Which rows give a token can be seen already; the others need no log probability.
            given = zip(spans, self._tokens(*tensors), strict=True)
            rows = [row for span, tokens in given for row in span.rows[: len(tokens)]]
            self._num_top = {row: self._num_top[row] for row in rows if row in self._num_top}
        if self._num_top:
            index = index_of(list(self._num_top), ids)
            # INVALID is no index; what such a row gives is not looked at.
            own, num_top = ids[index].clamp_(min=0), list(self._num_top.values())
            tensors += logprob_tensors(logits[index], own, num_top)
        self._copy = transfers.HostCopy(*tensors)

    def results(self) -> list[Verified | MinserveError]:
        """Wait for the tokens of each sequence, in the order of the batch.

        In place of tokens comes an error where the sequence's first row contains NaN or
        leaves no token possible. It never affects the other sequences.
        """
        host = self._copy.wait()
        tokens = self._tokens(*host[: self._num_chosen])
        logprobs: dict[int, TokenLogprob] = {}
        if self._num_top:
            by_row = {
                row: token
                for span, own in zip(self._spans, tokens, strict=True)
                for row, token in zip(span.rows, own, strict=False)
            }
            found = token_logprobs(
                [by_row.get(row, INVALID) for row in self._num_top],
                list(self._num_top.values()),
                host[self._num_chosen :],
            )
            logprobs = dict(zip(self._num_top, found, strict=True))
        by_place = {
            span.place: _verified(span, own, logprobs) or self._no_token(span)
            for span, own in zip(self._spans, tokens, strict=True)
        }
        return [by_place[place] for place in range(len(tokens))]

    def _no_token(self, span: Span) -> MinserveError:
        """Return the error of an output that no token may follow."""
        row = self._logits[span.first]
        # Seldom so, hence only here, though it waits for the device.
        is_sound = bool((row > -math.inf).any()) and not bool(row.isnan().any())
        return _why_no_token(span.seq, is_sound)

    def _tokens(self, ids: Tensor, nums_accepted: Tensor | None = None) -> list[list[int]]:
        """Return, for each span, the accepted drafts and the target's choice behind them."""
        chosen = ids.tolist()
        by_chance = [] if nums_accepted is None else nums_accepted.tolist()
        nums: list[int | None] = [None] * (len(self._spans) - len(by_chance)) + by_chance
        tokens = []
        for span, num in zip(self._spans, nums, strict=True):
            own = chosen[span.first : span.first + len(span.drafted) + 1]
            if span.drafted:
                if num is None:
                    num = _num_agreeing(own, span.drafted)
                own = own[: num + 1]
            tokens.append(own)
        return tokens


def _num_agreeing(chosen: SequenceOf[int], drafted: SequenceOf[int]) -> int:
    num = 0
    while num < len(drafted) and chosen[num] == drafted[num]:
        num += 1
    return num


def _verified(span: Span, tokens: list[int], logprobs: dict[int, TokenLogprob]) -> Verified | None:
    """Return the tokens of a sequence; ``None`` where there is not even one."""
    # Behind accepted tokens a row without a choice is none of their business: the last
    # of them is run again, and if it is no better then, that is the error.
    num_accepted = len(tokens) - 1
    if tokens[-1] == INVALID:
        tokens = tokens[:-1]
    if not tokens:
        return None
    rows = range(span.first, span.first + len(tokens))
    return Verified(
        tuple(
            SampledToken(token, logprobs.get(row)) for row, token in zip(rows, tokens, strict=True)
        ),
        num_accepted,
    )


def _why_no_token(seq: Sequence, is_sound: bool) -> MinserveError:
    """Return the error of an output that no token may follow.

    Args:
        is_sound: the model's own logits allow tokens, so that the request's settings do not.
    """
    params, place = seq.request.params, f"at output token {seq.num_output_tokens}"
    if (error := unheld(seq)) is not None:
        return error
    for name in ("allowed_token_ids", "bad_words"):
        if is_sound and getattr(params, name):
            others = "its other settings" if params.structure is None else "its structure"
            return InvalidRequestError(
                f"{place} {name} of the request, together with {others}, leave no token", name
            )
    return GenerationError(
        f"the model's logits for {seq.seq_id} {place} contain NaN or allow no token"
    )


def reject(
    logits: Tensor,
    rows: SequenceOf[SamplingRow],
    proposals: SequenceOf[Proposal],
    *,
    fused: bool = False,
) -> tuple[Tensor, Tensor]:
    """Do rejection sampling of drafts that were drawn from distributions.

    Args:
        logits: ``[rows, vocab]``, not changed; for each proposal a row per token, and one.
        fused: as in `weigh`.

    Returns:
        int64 ``[rows]``: the drafts, and behind the accepted ones of each proposal the target's
        token, `INVALID` where it has none; and int64 ``[proposals]``: how many are accepted.
    """
    weights, is_valid = weigh(adjust(logits.float(), rows), rows, fused=fused)
    p = normalized(weights)
    starts, start = [], 0
    for proposal in proposals:
        starts.append(start)
        start += len(proposal.token_ids) + 1
    nums = _nums_accepted(p, rows, is_valid, starts, proposals)
    ends = index_of(starts, p) + nums
    finals, keys = _at_ends(ends, p, rows, proposals)
    last = torch.where(is_valid[ends], choose(finals, keys), INVALID)
    drafted = [token for one in proposals for token in (*one.token_ids, INVALID)]
    return index_of(drafted, p).index_copy_(0, ends, last), nums


def _nums_accepted(
    p: Tensor,
    rows: SequenceOf[SamplingRow],
    is_valid: Tensor,
    starts: SequenceOf[int],
    proposals: SequenceOf[Proposal],
) -> Tensor:
    """Return how many tokens of each proposal are accepted, in order until the first that is not.

    Args:
        p: the target's distributions ``[rows, vocab]``, of which each proposal has one per
            token from its start on, and one more.
    """
    drafted = [
        (start + place, token, probabilities[token])
        for start, proposal in zip(starts, proposals, strict=True)
        for place, (token, probabilities) in enumerate(
            zip(proposal.token_ids, proposal.drawn_from, strict=True)
        )
    ]
    places, tokens, by_draft = zip(*drafted, strict=True)
    index = index_of(places, p)
    by_target = p[index, index_of(tokens, p)].double()
    numbers = uniforms(words([rows[row] for row in places], [ACCEPTANCE] * len(places)))
    draws = column(numbers.tolist(), p, torch.float64).squeeze(1)
    accepts = is_valid[index] & (draws * torch.stack(by_draft).double() < by_target)
    # The row behind the last draft accepts nothing, which ends the count there.
    by_row = torch.zeros_like(is_valid).index_copy_(0, index, accepts)
    most = max(len(proposal.token_ids) for proposal in proposals)
    by_proposal = [
        [start + min(place, len(proposal.token_ids)) for place in range(most)]
        for start, proposal in zip(starts, proposals, strict=True)
    ]
    return by_row[index_of(by_proposal, p)].long().cumprod(-1).sum(-1)


def _at_ends(
    ends: Tensor, p: Tensor, rows: SequenceOf[SamplingRow], proposals: SequenceOf[Proposal]
) -> tuple[Tensor, Tensor]:
    """Return what chooses the target's token at the row where each proposal ends.

    Returns:
        The distribution, float32 ``[proposals, >= vocab]``: p without the distribution of the
        draft that was rejected there, or p where none was; and the keys of the noise to draw
        with, ``[proposals, 1]``.
    """
    streams = [s for one in proposals for s in (*[RESIDUAL] * len(one.token_ids), CHOICE)]
    if transfers.runs_behind(p.device):
        nothing = p.new_zeros(p.shape[1])  # is drafted behind the last token
        q = [own for one in proposals for own in (*one.drawn_from, nothing)]
        finals = _residual(p[ends], torch.stack(q)[ends])
        return finals, to_keys(words(rows, streams), p.device)[ends]
    finals, at = p[ends], ends.tolist()
    start = 0
    for place, (proposal, end) in enumerate(zip(proposals, at, strict=True)):
        if end < start + len(proposal.token_ids):
            finals[place] = _residual(finals[place], proposal.drawn_from[end - start])
        start += len(proposal.token_ids) + 1
    return finals, to_keys(words([rows[row] for row in at], [streams[row] for row in at]), p.device)


def _residual(p: Tensor, q: Tensor) -> Tensor:
    """Return what is left of distributions p ``[..., >= vocab]`` without q, not normalized."""
    residual = (p - q).clamp_(min=0.0)
    # Where p and q are the same but for rounding, nothing is left.
    return torch.where(residual.sum(-1, keepdim=True) > 0, residual, p)


def normalized(weights: Tensor) -> Tensor:
    """Return weights as probabilities, float32."""
    return weights / weights.sum(-1, keepdim=True, dtype=torch.float64).float()
