"""Truncation of a distribution by min_p, then top_k, then top_p, before a token is drawn.

Each truncation works on the tokens that the previous one left, as in vLLM and transformers:

- min_p keeps the weights of at least that value, where the largest of a row is 1;
- top_k keeps the weights that are at least the k-th largest weight, ties with it included;
- top_p, nucleus sampling of Holtzman et al. (2020), keeps the smallest set of largest weights with
  at least that share of their sum. Of equal weights at its border, those with lower ids are kept.

Sums are sums of weights in whole units of ``1 / UNITS``, rounded down. Whole numbers have the same
sum in any order, so that every implementation, on any device, keeps the same set of tokens.

This file has the implementation in plain torch, without a sort of the vocabulary: the border of
top_p lies among the few likely tokens, or is found digit by digit (a radix select) by sums over the
tokens of each digit. `minserve.kernels.triton.truncation` has the implementation for GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from minserve.kernels.upload import to_device

# Units in a weight of 1. Rounding over 2**18 tokens loses at most 2**-22 of it, and their sum is
# far from overflowing 64 bits.
UNITS = 2.0**40
# The bits of non-negative floats, read as whole numbers, have the order of the floats; this is 1.
KEY_OF_ONE = 0x3F800000
# The 30 bits of a key are examined as three digits.
_DIGIT_BITS = 10
_DIGITS = 1 << _DIGIT_BITS
_SHIFTS = (20, 10, 0)
# On a CPU the border is first looked for among tokens that are at least this likely, if these are
# few: it is mostly there, and sorting them takes half the time of the sums by digits.
_LIKELY = 1e-3
_FEW = 1024


class TruncationLimits(NamedTuple):
    """The truncations of each row.

    Attributes:
        min_p: from 0 (keeps all) to 1.
        top_k: 0 keeps all.
        top_p: above 0; 1 keeps all.
    """

    min_p: list[float]
    top_k: list[int]
    top_p: list[float]

    @property
    def keep_all(self) -> bool:
        """True if no row asks for a truncation."""
        return not any(self.min_p) and not any(self.top_k) and min(self.top_p, default=1.0) >= 1.0


class _Border(NamedTuple):
    """The place where the sum over the largest weights reaches the wanted sum; each ``[rows, 1]``.

    Attributes:
        weight: float32: the last weight that is needed.
        above: int64: the sum over all larger weights.
    """

    weight: Tensor
    above: Tensor


def truncate(weights: Tensor, limits: TruncationLimits, *, may_look: bool) -> Tensor:
    """Set to 0 the weights that the limits leave out.

    top_k and top_p are computed only for the rows that ask for them.

    Args:
        weights: float32 ``[rows, size]``, contiguous, from 0 to 1; the largest of each row is 1.
            A row that is NaN throughout stays so. Changed in place.
        may_look: true if values of tensors can be read without waiting for a device.

    Returns:
        ``weights``.
    """
    if any(limits.min_p):
        weights.masked_fill_(weights < _column(limits.min_p, torch.float32, weights), 0.0)
    rows = [row for row, k in enumerate(limits.top_k) if k]
    _replace_rows(weights, rows, _keep_top_k, [limits.top_k[row] for row in rows])
    rows = [row for row, p in enumerate(limits.top_p) if p < 1.0]

    def keep_top_p(some: Tensor, top_p: list[float]) -> Tensor:
        return _keep_top_p(some, top_p, may_look)

    _replace_rows(weights, rows, keep_top_p, [limits.top_p[row] for row in rows])
    return weights


def _column(values: list, dtype: torch.dtype, like: Tensor) -> Tensor:
    """Return one number per row as a tensor, ``[rows, 1]``."""
    return to_device(values, dtype, like.device).unsqueeze(1)


def _replace_rows(
    x: Tensor, rows: list[int], keep: Callable[[Tensor, list], Tensor], values: list
) -> None:
    """Do ``x[rows] = keep(x[rows], values)``; ``keep`` may change its argument."""
    if rows and len(rows) == len(x):
        keep(x, values)
    elif rows:
        index = to_device(rows, torch.long, x.device)
        x.index_copy_(0, index, keep(x[index], values))


def _keep_top_k(weights: Tensor, top_k: list[int]) -> Tensor:
    """Keep the weights that are at least the k-th largest; changes ``weights``."""
    best = weights.topk(min(max(top_k), weights.shape[1]), dim=-1).values
    place = _column(top_k, torch.long, weights).clamp_(max=best.shape[1]) - 1
    return weights.masked_fill_(weights < best.gather(-1, place), 0.0)


def _keep_top_p(weights: Tensor, top_p: list[float], may_look: bool) -> Tensor:
    """Keep the smallest set of largest weights with a share of their sum; changes ``weights``."""
    # Row by row, so that on a CPU the temporary tensors stay in a core's own cache.
    parts = weights.split(1) if may_look else [weights]
    total = torch.cat([_in_units(part).sum(-1, keepdim=True) for part in parts])
    wanted = (total.double() * _column(top_p, torch.float64, weights)).ceil_().long()
    wanted = wanted.minimum(total)  # which float64 may have rounded up
    border = (_look_for_border if may_look else _border_by_digits)(weights, wanted)
    tied = weights == border.weight
    # At least 1, because rows of NaN would give 0.
    unit = _in_units(border.weight).clamp_(min=1)
    num_kept = (wanted - border.above + unit - 1) // unit
    # There are seldom more ties. If that can be seen at no cost, the scan for them is skipped.
    if not may_look or bool((tied.sum(-1, keepdim=True) > num_kept).any()):
        weights.masked_fill_(tied & (tied.cumsum(-1) > num_kept), 0.0)
    return weights.masked_fill_(weights < border.weight, 0.0)


def _in_units(weights: Tensor) -> Tensor:
    """Return weights as int64 units."""
    return weights.mul(UNITS).long()


def _look_for_border(weights: Tensor, wanted: Tensor) -> _Border:
    """Return the border, found among the likely tokens.

    Rows whose border is not there, or whose likely tokens are many, are searched by digits.
    """
    is_likely = weights >= _LIKELY
    is_likely &= is_likely.sum(-1, keepdim=True) <= _FEW
    best = _sorted(weights, is_likely)
    masses = _in_units(best)
    sums = masses.cumsum(-1)
    last = (sums < wanted).sum(-1, keepdim=True)
    is_elsewhere = (last == best.shape[1]).flatten()
    weight = best.gather(-1, last.clamp_(max=best.shape[1] - 1))
    first = (best > weight).sum(-1, keepdim=True)  # the first of equal weights
    above = (sums - masses).gather(-1, first)
    for row in is_elsewhere.nonzero().flatten().tolist():
        weight[row], above[row] = map(
            Tensor.squeeze, _border_by_digits(weights[row : row + 1], wanted[row : row + 1])
        )
    return _Border(weight, above)


def _sorted(weights: Tensor, chosen: Tensor) -> Tensor:
    """Return each row's chosen weights in descending order, filled up with zeros."""
    rows, columns = chosen.nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=len(weights))
    firsts = counts.cumsum(0) - counts
    packed = weights.new_zeros(len(weights), max(1, int(counts.max())))
    places = torch.arange(len(rows), device=rows.device) - firsts[rows]
    packed[rows, places] = weights[rows, columns]
    return packed.sort(dim=-1, descending=True).values


def _border_by_digits(weights: Tensor, wanted: Tensor) -> _Border:
    """Return the largest weight for which the weights at least as large reach the wanted sum."""
    # A NaN, which may have any sign, must not become an index out of range.
    keys = weights.view(torch.int32).clamp(0, KEY_OF_ONE)
    masses = _in_units(weights)
    above = torch.zeros_like(wanted)
    found = torch.zeros_like(wanted, dtype=torch.int32)
    for shift in _SHIFTS:
        digits = keys >> shift
        if shift != _SHIFTS[0]:
            masses = torch.where(digits >> _DIGIT_BITS == found, masses, 0)
            digits &= _DIGITS - 1
        sums = masses.new_zeros(len(weights), _DIGITS).scatter_add_(1, digits.long(), masses)
        sums = sums.flip(-1)  # the largest digit first
        reached = sums.cumsum(-1).add_(above)
        place = (reached < wanted).sum(-1, keepdim=True).clamp_(max=_DIGITS - 1)
        above = (reached - sums).gather(1, place)
        found = found * _DIGITS + (_DIGITS - 1 - place).int()
    return _Border(found.view(torch.float32), above)
