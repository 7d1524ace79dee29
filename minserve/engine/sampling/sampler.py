"""`Sampler` turns logits into tokens: one for each sequence, or those verified of its drafts.

It knows sequences and logits, but nothing of blocks, batches or text. The distributions and draws
are those of `minserve.engine.sampling.distribution`, drafts are verified by
`minserve.engine.speculation.verification`.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import torch
from torch import Tensor

from minserve.engine.sampling.adjustments import adjust
from minserve.engine.sampling.distribution import (
    INVALID,
    argmax,
    choose,
    draw,
    weigh,
)
from minserve.engine.sampling.logprobs import logprob_tensors, token_logprobs
from minserve.engine.sampling.noise import CHOICE, DRAFT, to_keys, words
from minserve.engine.sampling.rows import SamplingRow, index_of
from minserve.engine.speculation.proposal import Proposal, SampledToken, Verified
from minserve.engine.speculation.verification import PendingTokens, Span, normalized, reject
from minserve.errors import GenerationError, MinserveError
from minserve.outputs import TokenLogprob
from minserve.request import Sequence


class Drafted(NamedTuple):
    """A draft model's choice for one row.

    It is the token, `INVALID` where there is none, and the distribution that it was drawn from
    (as in `Proposal`).
    """

    token_id: int
    probabilities: Tensor | None


class Sampler:
    """Chooses the next tokens of every sequence in a batch. Keeps no state.

    Order per row: raw log probabilities, biases, penalties, bans, then argmax, or temperature,
    ``min_p``, ``top_k``, ``top_p`` and the draw. A row that needs none of
    this costs one argmax, whatever the other rows ask for.

    Args:
        fused: whether Triton's kernels run on the device of the logits; the tokens are the same.
        one_by_one: whether each row is drawn by itself, so that the batch's shape does not
            change its rounding.
    """

    def __init__(self, *, fused: bool = False, one_by_one: bool = False) -> None:
        self._fused = fused
        self._one_by_one = one_by_one

    @torch.inference_mode()
    def sample(self, logits: Tensor, seqs: list[Sequence]) -> list[SampledToken | MinserveError]:
        """Choose one token per row.

        Args:
            logits: ``[len(seqs), vocab]``, any float dtype, any device; not changed.
            seqs: the sequences whose next tokens they are; their ``num_output_tokens`` is the
                position of the draw.

        Returns:
            Per row, the token, or the error where the row's logits contain NaN or leave
            no token possible. An error never affects the other rows.
        """
        verified = self.verify(logits, seqs, [None] * len(seqs))
        return [v.tokens[0] if isinstance(v, Verified) else v for v in verified]

    @torch.inference_mode()
    def verify(
        self, logits: Tensor, seqs: list[Sequence], proposals: SequenceOf[Proposal | None]
    ) -> list[Verified | MinserveError]:
        """Launch a verification and wait for its results."""
        return self.launch(logits, seqs, proposals).results()

    @torch.inference_mode()
    def launch(
        self, logits: Tensor, seqs: list[Sequence], proposals: SequenceOf[Proposal | None]
    ) -> PendingTokens:
        """Accept drafted tokens such that the output is what the target alone would give.

        A token drafted without chance is accepted where the target's own choice at its
        place is the same token: the output is token for token what it would be without
        speculation, under a seed as well. One that was drawn from a distribution q is
        accepted with probability min(1, p / q), else drawn anew from max(0, p - q), which
        leaves the target's distribution p unchanged (Leviathan et al., "Fast inference from
        transformers via speculative decoding", ICML 2023).

        It waits for no device: all work on the logits is queued behind them.

        Args:
            logits: any float dtype, not changed; per sequence one row, and one more for
                each of its drafted tokens.
            proposals: per sequence, what was drafted, if anything was.

        Returns:
            The tokens of each sequence, or the error as in `sample`, on their way to the host.
        """
        by_chance = [one is not None and one.probabilities is not None for one in proposals]
        # These come last, so that either kind has adjacent rows.
        order = sorted(range(len(seqs)), key=by_chance.__getitem__)
        drawn = [one for i in order if by_chance[i] and (one := proposals[i]) is not None]
        rows: list[SamplingRow] = []
        spans = []
        for i in order:
            proposal = proposals[i]
            drafted = () if proposal is None else proposal.token_ids
            spans.append(Span(i, seqs[i], drafted, len(rows)))
            rows += [SamplingRow(seqs[i], drafted[:num]) for num in range(len(drafted) + 1)]
        if order != sorted(order):
            logits = logits[index_of(_rows_before(spans), logits)]
        split = spans[-len(drawn)].first if drawn else len(rows)
        ids, nums_accepted = self._choose(logits[:split], rows[:split]), None
        if drawn:
            others, nums_accepted = reject(logits[split:], rows[split:], drawn, fused=self._fused)
            ids = torch.cat((ids, others))
        return PendingTokens(logits, spans, ids, nums_accepted)

    @torch.inference_mode()
    def draft(self, logits: Tensor, rows: SequenceOf[SamplingRow]) -> list[Drafted]:
        """Return a draft model's choices, such that the target is likely to accept them.

        A greedy row takes the most likely token, a seeded one is drawn with the noise that
        the target will use; others have noise of their own.

        Args:
            logits: those of the draft model, ``[len(rows), vocab]``; not changed.
        """
        if all(row.is_plain for row in rows):
            return [Drafted(token, None) for token in argmax(logits).tolist()]
        logits = adjust(logits.float(), rows)
        ids, probabilities = argmax(logits), {}
        drawn = [i for i, row in enumerate(rows) if not row.params.greedy]
        if drawn:
            own = [rows[i] for i in drawn]
            weights, is_valid = weigh(logits[index_of(drawn, logits)], own, fused=self._fused)
            noise = words(own, [CHOICE if row.is_seeded else DRAFT for row in own])
            chosen = choose(weights, to_keys(noise, weights.device))
            ids[index_of(drawn, logits)] = torch.where(is_valid, chosen, INVALID)
            shares = normalized(weights)
            probabilities = {
                i: shares[place] for place, i in enumerate(drawn) if not rows[i].is_seeded
            }
        return [Drafted(token, probabilities.get(i)) for i, token in enumerate(ids.tolist())]

    @torch.inference_mode()
    def prompt_logprobs(
        self, logits: Tensor, token_ids: SequenceOf[int], num_top: int
    ) -> list[TokenLogprob]:
        """Return log probabilities of prompt tokens under the raw distribution.

        Args:
            logits: ``[len(token_ids), vocab]``, row ``i`` predicting ``token_ids[i]``.
            num_top: the number of most likely tokens to report besides.

        Raises:
            GenerationError: where the logits contain NaN.
        """
        if not len(token_ids):
            return []
        if bool(logits.isnan().any()):
            raise GenerationError("the model's logits for the prompt contain NaN")
        tops = [num_top] * len(token_ids)
        ids = index_of(token_ids, logits)
        return token_logprobs(token_ids, tops, logprob_tensors(logits, ids, tops))

    def _choose(self, logits: Tensor, rows: SequenceOf[SamplingRow]) -> Tensor:
        """Return the target's own choice for each row, ``[rows]``."""
        special = [i for i, row in enumerate(rows) if not row.is_plain]
        if not special:
            return argmax(logits)
        if len(special) < len(rows):
            chosen, index = argmax(logits), index_of(special, logits)
            chosen[index] = self._choose(logits[index], [rows[i] for i in special])
            return chosen
        logits = adjust(logits.float(), rows)
        drawn = [i for i, row in enumerate(rows) if not row.params.greedy]
        if len(drawn) == len(rows):
            return self._draw(logits, rows)
        chosen = argmax(logits)
        if drawn:
            index = index_of(drawn, logits)
            chosen[index] = self._draw(logits[index], [rows[i] for i in drawn])
        return chosen

    def _draw(self, logits: Tensor, rows: SequenceOf[SamplingRow]) -> Tensor:
        if not self._one_by_one or len(rows) == 1:
            return draw(logits, rows, fused=self._fused)
        return torch.cat(
            [draw(logits[i : i + 1], [row], fused=self._fused) for i, row in enumerate(rows)]
        )


def _rows_before(spans: SequenceOf[Span]) -> list[int]:
    """Return, for each row, which one it was before the spans were put in order."""
    firsts, row = {}, 0
    for span in sorted(spans, key=lambda span: span.place):
        firsts[span.place] = row
        row += len(span.rows)
    return [firsts[span.place] + num for span in spans for num in range(len(span.rows))]
