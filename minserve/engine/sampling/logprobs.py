"""Log probabilities of tokens under the raw distribution, and of the most likely ones beside them."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from minserve.outputs import TokenLogprob

_FLOAT_MAX = torch.finfo(torch.float32).max


def logprob_tensors(logits: Tensor, ids: Tensor, num_top: SequenceOf[int]) -> tuple[Tensor, ...]:
    """What `token_logprobs` needs, computed where the logits are.

    Args:
        logits: raw, ``[rows, vocab]``. A row with NaN gives nonsense.
        ids: int64 ``[rows]``, of the tokens in question.
        num_top: how many of the most likely tokens each row wants.

    Returns:
        of the tokens: log probabilities, float64 ``[rows]``, and ranks from 1 on, int64;
        the most likely ones, int64 ``[rows, max(num_top)]``, and their log probabilities.
    """
    logprobs = logits.float().clamp(max=_FLOAT_MAX).log_softmax(-1)
    own = logprobs.gather(-1, ids.unsqueeze(1))
    ranks = (logprobs > own).sum(-1).add_(1)
    best = logprobs.topk(min(max(num_top), logits.shape[1]), dim=-1)
    return own.squeeze(1).double(), ranks, best.indices, best.values.double()


def token_logprobs(
    token_ids: SequenceOf[int], num_top: SequenceOf[int], tensors: SequenceOf[Tensor]
) -> list[TokenLogprob]:
    """One for each row of what `logprob_tensors` gave, now on the host."""
    table = zip(token_ids, num_top, *(tensor.tolist() for tensor in tensors), strict=True)
    return [
        TokenLogprob(token, logprob, rank, tuple(zip(ids[:top], values[:top], strict=True)))
        for token, top, logprob, rank, ids, values in table
    ]
