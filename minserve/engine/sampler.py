"""From logits to tokens: one for each sequence, or as many as verify of those drafted for it.

Knows sequences and logits, nothing of blocks, batches or text. The distributions and draws
are those of `minserve.engine.distribution`.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minserve.engine.distribution import (
    ACCEPTANCE,
    CHOICE,
    DRAFT,
    INVALID,
    RESIDUAL,
    Row,
    adjust,
    argmax,
    column,
    draw,
    index_of,
    inverse_cdf,
    weigh,
)
from minserve.errors import GenerationError
from minserve.outputs import TokenLogprob
from minserve.request import Sequence

_FLOAT_MAX = torch.finfo(torch.float32).max


class SampledToken(NamedTuple):
    """A chosen token, with its log probability where the request asked for it."""

    token_id: int
    logprob: TokenLogprob | None


@dataclass(frozen=True, slots=True)
class Proposal:
    """Tokens drafted for a sequence.

    Attributes:
        token_ids: at least one.
        probabilities: per drafted token, the distribution that it was drawn from, float32
            ``[>= vocab]``, summing to 1. ``None`` where no chance was involved other than
            the target's own draw: greedy drafts, prompt lookup, seeded requests.
    """

    token_ids: tuple[int, ...]
    probabilities: tuple[Tensor, ...] | None = None


@dataclass(frozen=True, slots=True)
class Verified:
    """What came of a proposal.

    Attributes:
        tokens: the accepted ones and, where the target has one, its own choice behind them.
        num_accepted: of the drafted tokens.
    """

    tokens: tuple[SampledToken, ...]
    num_accepted: int


class Drafted(NamedTuple):
    """A draft model's choice for one row: the token, `INVALID` where there is none, and the
    distribution that it was drawn from (as in `Proposal`).
    """

    token_id: int
    probabilities: Tensor | None


class Sampler:
    """Chooses the next tokens of every sequence in a batch. Keeps no state.

    Order per row: raw log probabilities, penalties, ``min_tokens``, then argmax, or
    temperature, ``min_p``, ``top_k``, ``top_p`` and the draw. A row that needs none of
    this costs one argmax, whatever the other rows ask for.
    """

    @torch.inference_mode()
    def sample(self, logits: Tensor, seqs: list[Sequence]) -> list[SampledToken | GenerationError]:
        """Choose one token per row.

        Args:
            logits: ``[len(seqs), vocab]``, any float dtype, any device; not changed.
            seqs: whose next tokens they are; their ``num_output_tokens`` is the position
                of the draw.

        Returns:
            per row, the token, or the error where the row's logits contain NaN or leave
            no token possible. An error never affects the other rows.
        """
        verified = self.verify(logits, seqs, [None] * len(seqs))
        return [v if isinstance(v, GenerationError) else v.tokens[0] for v in verified]

    @torch.inference_mode()
    def verify(
        self, logits: Tensor, seqs: list[Sequence], proposals: SequenceOf[Proposal | None]
    ) -> list[Verified | GenerationError]:
        """Accept drafted tokens such that the output is what the target alone would give.

        A token drafted without chance is accepted where the target's own choice at its
        place is the same token: the output is token for token what it would be without
        speculation, under a seed as well. One that was drawn from a distribution q is
        accepted with probability min(1, p / q), else drawn anew from max(0, p - q), which
        leaves the target's distribution p unchanged (Leviathan et al., "Fast inference from
        transformers via speculative decoding", ICML 2023).

        Args:
            logits: any float dtype, not changed; per sequence one row, and one more for
                each of its drafted tokens.
            proposals: per sequence, what was drafted, if anything was.

        Returns:
            per sequence, its tokens, or the error as in `sample`.
        """
        if not seqs:
            return []
        drafts = [() if proposal is None else proposal.token_ids for proposal in proposals]
        rows = [
            Row(seq, draft[:num])
            for seq, draft in zip(seqs, drafts, strict=True)
            for num in range(len(draft) + 1)
        ]
        firsts = _firsts(drafts)
        by_chance = [i for i, one in enumerate(proposals) if one is not None and one.probabilities]
        tokens: dict[int, list[int]] = {}
        if by_chance:
            tokens |= _reject(logits, rows, firsts, {i: proposals[i] for i in by_chance})
        if len(by_chance) < len(seqs):
            others = [i for i in range(len(seqs)) if i not in tokens]
            tokens |= _compare(logits, rows, firsts, {i: drafts[i] for i in others})
        chosen = {
            firsts[i] + place: token
            for i, own in tokens.items()
            for place, token in enumerate(own)
            if token != INVALID
        }
        logprobs = _logprobs(logits, rows, chosen)
        return [self._verified(seqs[i], firsts[i], tokens[i], logprobs) for i in range(len(seqs))]

    @torch.inference_mode()
    def draft(self, logits: Tensor, rows: SequenceOf[Row]) -> list[Drafted]:
        """A draft model's choices, such that the target is likely to accept them.

        A greedy row takes the most likely token, a seeded one is drawn with the number that
        the target will use; others have draws of their own.

        Args:
            logits: of the draft model, ``[len(rows), vocab]``; not changed.
        """
        if all(row.is_plain for row in rows):
            return [Drafted(token, None) for token in argmax(logits).tolist()]
        logits = adjust(logits.float(), rows)
        ids, probabilities = argmax(logits), {}
        drawn = [i for i, row in enumerate(rows) if not row.params.greedy]
        if drawn:
            own = [rows[i] for i in drawn]
            weights, is_valid = weigh(logits[index_of(drawn, logits)], own)
            draws = [row.uniform(CHOICE if row.is_seeded else DRAFT) for row in own]
            chosen = inverse_cdf(weights, column(draws, weights, torch.float64))
            ids[index_of(drawn, logits)] = torch.where(is_valid, chosen, INVALID)
            shares = _normalized(weights)
            probabilities = {
                i: shares[place] for place, i in enumerate(drawn) if not rows[i].is_seeded
            }
        return [Drafted(token, probabilities.get(i)) for i, token in enumerate(ids.tolist())]

    @torch.inference_mode()
    def prompt_logprobs(
        self, logits: Tensor, token_ids: SequenceOf[int], num_top: int
    ) -> list[TokenLogprob]:
        """Log probabilities of prompt tokens under the raw distribution.

        Args:
            logits: ``[len(token_ids), vocab]``, row ``i`` predicting ``token_ids[i]``.
            num_top: how many of the most likely tokens to report besides.

        Raises:
            GenerationError: where the logits contain NaN.
        """
        if not len(token_ids):
            return []
        if bool(logits.isnan().any()):
            raise GenerationError("the model's logits for the prompt contain NaN")
        return _token_logprobs(logits, list(token_ids), [num_top] * len(token_ids))

    @staticmethod
    def _verified(
        seq: Sequence, first: int, tokens: list[int], logprobs: dict[int, TokenLogprob]
    ) -> Verified | GenerationError:
        # Behind accepted tokens a row without a choice is none of their business: the last
        # of them is run again, and if it is no better then, that is the error.
        num_accepted = len(tokens) - 1
        if tokens[-1] == INVALID:
            tokens = tokens[:-1]
        if not tokens:
            return GenerationError(
                f"the model's logits for {seq.seq_id} at output token {seq.num_output_tokens} "
                "contain NaN or allow no token"
            )
        return Verified(
            tuple(
                SampledToken(token, logprobs.get(first + place))
                for place, token in enumerate(tokens)
            ),
            num_accepted,
        )


def _firsts(drafts: SequenceOf[SequenceOf[int]]) -> list[int]:
    """Per sequence, its first row."""
    firsts, row = [], 0
    for draft in drafts:
        firsts.append(row)
        row += len(draft) + 1
    return firsts


def _select(
    logits: Tensor, rows: SequenceOf[Row], firsts: list[int], sizes: dict[int, int]
) -> tuple[Tensor, list[Row], list[int]]:
    """The rows of some sequences, given with the number of their drafts; each one's first of these."""
    wanted = [firsts[i] + place for i, size in sizes.items() for place in range(size + 1)]
    starts, start = [], 0
    for size in sizes.values():
        starts.append(start)
        start += size + 1
    if len(wanted) < len(rows):
        logits = logits[index_of(wanted, logits)]
    return logits, [rows[row] for row in wanted], starts


def _compare(
    logits: Tensor, rows: SequenceOf[Row], firsts: list[int], drafts: dict[int, tuple[int, ...]]
) -> dict[int, list[int]]:
    """By sequence, the target's choices: as many as agree with the drafts, and one more."""
    sizes = {i: len(draft) for i, draft in drafts.items()}
    logits, rows, starts = _select(logits, rows, firsts, sizes)
    chosen = _choose(logits, rows).tolist()
    tokens = {}
    for (i, draft), start in zip(drafts.items(), starts, strict=True):
        num = 0
        while num < len(draft) and chosen[start + num] == draft[num]:
            num += 1
        tokens[i] = chosen[start : start + num + 1]
    return tokens


def _choose(logits: Tensor, rows: SequenceOf[Row]) -> Tensor:
    """The target's own choice for each row, ``[rows]``."""
    special = [i for i, row in enumerate(rows) if not row.is_plain]
    if not special:
        return argmax(logits)
    if len(special) < len(rows):
        chosen, index = argmax(logits), index_of(special, logits)
        chosen[index] = _choose(logits[index], [rows[i] for i in special])
        return chosen
    logits = adjust(logits.float(), rows)
    drawn = [i for i, row in enumerate(rows) if not row.params.greedy]
    if len(drawn) == len(rows):
        return draw(logits, rows)
    chosen = argmax(logits)
    if drawn:
        index = index_of(drawn, logits)
        chosen[index] = draw(logits[index], [rows[i] for i in drawn])
    return chosen


def _reject(
    logits: Tensor, rows: SequenceOf[Row], firsts: list[int], proposals: dict[int, Proposal]
) -> dict[int, list[int]]:
    """By sequence, the drafted tokens that rejection sampling accepts, and one more."""
    sizes = {i: len(proposal.token_ids) for i, proposal in proposals.items()}
    logits, rows, starts = _select(logits, rows, firsts, sizes)
    weights, is_valid = weigh(adjust(logits.float(), rows), rows)
    valid, p = is_valid.tolist(), _normalized(weights)
    nums = _nums_accepted(p, rows, valid, starts, list(proposals.values()))
    ends = [start + num for start, num in zip(starts, nums, strict=True)]
    finals, draws = p[index_of(ends, p)], []
    for place, (proposal, num) in enumerate(zip(proposals.values(), nums, strict=True)):
        rejected = num < len(proposal.token_ids)
        draws.append(rows[ends[place]].uniform(RESIDUAL if rejected else CHOICE))
        if rejected:
            residual = (finals[place] - proposal.probabilities[num]).clamp_(min=0.0)
            # Where p and q are the same but for rounding, nothing is left.
            finals[place] = torch.where(residual.sum() > 0, residual, finals[place])
    last = inverse_cdf(finals, column(draws, p, torch.float64)).tolist()
    return {
        i: [*proposal.token_ids[:num], token if valid[end] else INVALID]
        for (i, proposal), num, end, token in zip(proposals.items(), nums, ends, last, strict=True)
    }


def _nums_accepted(
    p: Tensor,
    rows: SequenceOf[Row],
    valid: SequenceOf[bool],
    starts: SequenceOf[int],
    proposals: SequenceOf[Proposal],
) -> list[int]:
    """How many of the tokens of each proposal are accepted, in order until the first that is not.

    Args:
        p: the target's distributions ``[rows, vocab]``, of which each proposal has one per
            token from its start on.
    """
    drafted = [
        (start + place, token, proposal.probabilities[place])
        for start, proposal in zip(starts, proposals, strict=True)
        for place, token in enumerate(proposal.token_ids)
    ]
    places, tokens, q = zip(*drafted, strict=True)
    # One copy for all: on a GPU each one waits for the device.
    chances = torch.stack(
        (
            p[index_of(places, p), index_of(tokens, p)],
            torch.stack([own[token] for own, token in zip(q, tokens, strict=True)]),
        )
    ).tolist()
    accepts = iter(
        valid[row] and rows[row].uniform(ACCEPTANCE) * by_draft < by_target
        for row, by_target, by_draft in zip(places, *chances, strict=True)
    )
    nums = []
    for proposal in proposals:
        own = [next(accepts) for _ in proposal.token_ids]
        nums.append(own.index(False) if False in own else len(own))
    return nums


def _normalized(weights: Tensor) -> Tensor:
    """Weights as probabilities, float32."""
    return weights / weights.sum(-1, keepdim=True, dtype=torch.float64).float()


def _logprobs(
    logits: Tensor, rows: SequenceOf[Row], chosen: dict[int, int]
) -> dict[int, TokenLogprob]:
    """By row, the log probability of the chosen token where it was asked for."""
    asked = [row for row in chosen if rows[row].params.logprobs is not None]
    if not asked:
        return {}
    found = _token_logprobs(
        logits[index_of(asked, logits)],
        [chosen[row] for row in asked],
        [rows[row].params.logprobs or 0 for row in asked],
    )
    return dict(zip(asked, found, strict=True))


def _token_logprobs(logits: Tensor, token_ids: list[int], num_top: list[int]) -> list[TokenLogprob]:
    """Log probabilities of given tokens and of the ``num_top[row]`` most likely ones.

    Args:
        logits: raw, ``[len(token_ids), vocab]``, free of NaN.
    """
    logprobs = logits.float().clamp(max=_FLOAT_MAX).log_softmax(-1)
    own = logprobs.gather(-1, index_of(token_ids, logits).unsqueeze(1))
    ranks = (logprobs > own).sum(-1).add_(1).tolist()
    width = min(max(num_top), logits.shape[1])
    best = logprobs.topk(width, dim=-1)
    table = zip(
        token_ids,
        own.squeeze(1).tolist(),
        ranks,
        num_top,
        best.indices.tolist(),
        best.values.tolist(),
        strict=True,
    )
    return [
        TokenLogprob(token, logprob, rank, tuple(zip(ids[:top], values[:top], strict=True)))
        for token, logprob, rank, top, ids, values in table
    ]
