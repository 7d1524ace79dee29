"""Computes log probabilities under the raw distribution: of tokens, and of the likeliest ones."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from minserve.outputs import TokenLogprob

_FLOAT_MAX = torch.finfo(torch.float32).max


def logprob_tensors(logits: Tensor, ids: Tensor, num_top: SequenceOf[int]) -> tuple[Tensor, ...]:
    """Compute what `token_logprobs` needs, on the device of the logits.

    Args:
        logits: raw, ``[rows, vocab]``. A row with NaN gives nonsense.
        ids: int64 ``[rows]``, the tokens in question.
        num_top: the number of most likely tokens that each row wants.

    Returns:
        The tokens' log probabilities, float64 ``[rows]``, and ranks from 1 on, int64; the most
        likely tokens, int64 ``[rows, max(num_top)]``, and their log probabilities.
    """
    logprobs = logits.float().clamp(max=_FLOAT_MAX).log_softmax(-1)
    own = logprobs.gather(-1, ids.unsqueeze(1))
    ranks = (logprobs > own).sum(-1).add_(1)
    best = logprobs.topk(min(max(num_top), logits.shape[1]), dim=-1)
    return own.squeeze(1).double(), ranks, best.indices, best.values.double()


def token_logprobs(
    token_ids: SequenceOf[int], num_top: SequenceOf[int], tensors: SequenceOf[Tensor]
) -> list[TokenLogprob]:
    """Return one `TokenLogprob` per row of what `logprob_tensors` returned, now on the host."""
    table = zip(token_ids, num_top, *(tensor.tolist() for tensor in tensors), strict=True)
    return [
        TokenLogprob(token, logprob, rank, tuple(zip(ids[:top], values[:top], strict=True)))
        for token, top, logprob, rank, ids, values in table
    ]
