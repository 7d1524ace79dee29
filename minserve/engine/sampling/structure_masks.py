"""Keeps the tokens of outputs to their structures: masks of the logits.

What a structure allows is worked out on the host; on a GPU that happens while the forward pass runs,
which is queued already, and the masks are sent after it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from torch import Tensor

from minserve.engine.sampling.rows import SamplingRow, index_of
from minserve.engine.structures.guide import Guide, mask_bytes


def keep_to_structures(logits: Tensor, rows: SequenceOf[SamplingRow]) -> Tensor:
    """Return logits ``[rows, vocab]`` with -inf for tokens that would break a row's structure."""
    guided = [(i, guide) for i, row in enumerate(rows) if (guide := row.seq.guide) is not None]
    if not guided:
        return logits
    allowed = _allowed(guided, rows, logits)
    if len(guided) == len(rows):
        return _only(logits, allowed)
    index = index_of([i for i, _ in guided], logits)
    return logits.index_copy(0, index, _only(logits[index], allowed))


def _only(logits: Tensor, allowed: Tensor) -> Tensor:
    # A row with a NaN, which is its largest number then, means nothing, and must tell so.
    banned = torch.where(logits.amax(-1, keepdim=True).isnan(), math.nan, -math.inf)
    return torch.where(allowed, logits, banned.to(logits.dtype))


def _allowed(
    guided: SequenceOf[tuple[int, Guide]], rows: SequenceOf[SamplingRow], like: Tensor
) -> Tensor:
    """Return which tokens the guided rows may have, bool ``[guided, vocab]`` on the logits' device."""
    vocab, is_gpu = like.shape[1], like.device.type == "cuda"
    width = max(mask_bytes(guide.vocab_size or vocab) for _, guide in guided)
    packed = torch.zeros(
        len(guided), max(width, mask_bytes(vocab)), dtype=torch.uint8, pin_memory=is_gpu
    )
    masks = packed.numpy()
    for mask, (i, guide) in zip(masks, guided, strict=True):
        row = rows[i]
        guide.fill(row.drafted, mask, row.seq.request.stop_token_ids, not row.must_go_on)
    if not is_gpu:
        bits = np.unpackbits(masks, axis=1, count=vocab, bitorder="little")
        return torch.from_numpy(bits).view(torch.bool)
    return unpacked(packed.to(like.device, non_blocking=True), vocab)


def unpacked(packed: Tensor, vocab: int) -> Tensor:
    """Return bits as bools ``[rows, vocab]``; what is on a CPU numpy does faster.

    Args:
        packed: uint8 ``[rows, >= vocab / 8]``, the lowest bit first.
    """
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(-1) >> places) & 1
    return bits.flatten(1)[:, :vocab].bool()
