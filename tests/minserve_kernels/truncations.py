"""Distributions of all kinds, limits of all kinds, and what these keep, by a sort in whole numbers."""

from __future__ import annotations

import math
import random
from itertools import product

import numpy as np
import torch
from torch import Tensor

from minserve.kernels.truncation import UNITS, TruncationLimits

# Vocabularies of SmolLM2, OPT, Llama 3, Qwen 2, and a tiny one.
VOCABS = [49152, 50272, 128256, 151936, 7]
KINDS = (
    "normal", "cold", "hot", "peaked", "ties", "flat", "one-hot", "one left", "few left", "faint",
)  # fmt: skip
MIN_P = (0.0, -0.0, 1e-30, 0.01, 1.0)
TOP_P = (1.0, 1 - 2**-53, 0.95, 0.5, 1e-9)


def logits_of(kind: str, size: int) -> Tensor:
    """One row, at temperature 1."""
    x = 2 * torch.randn(size)
    if kind == "cold":
        x /= 1e-3
    elif kind == "hot":
        x /= 100.0
    elif kind == "peaked":
        x[torch.randperm(size)[:3]] += 20.0
    elif kind == "ties":
        x = x.round()
    elif kind == "flat":
        x.zero_()
    elif kind == "one-hot":
        x[size // 2] = 1e4
    elif kind == "one left":
        x[torch.arange(size) != size - 1] = -math.inf
    elif kind == "few left":
        x[torch.randperm(size)[size // 3 :]] = -math.inf
    elif kind == "faint":  # one token, and others at the least that counts, and at much less
        x = (torch.tensor([27.0, 28.0, 60.0, 100.0])[torch.randint(4, (size,))]).neg_()
        x[0] = 0.0
    return x


def weights_of(kinds: list[str], size: int) -> Tensor:
    """float32 ``[len(kinds), size]``, over the largest of each row."""
    x = torch.stack([logits_of(kind, size) for kind in kinds])
    return (x - x.amax(-1, keepdim=True)).exp()


def every_limit(size: int) -> list[tuple[float, int, float]]:
    """All combinations of values of min_p, top_k and top_p, in random order."""
    top_k = (0, 1, max(1, size // 3), size - 1, size, size + 1)
    limits = list(product(MIN_P, top_k, TOP_P))
    random.Random(size).shuffle(limits)
    return limits


def limits_of(per_row: list[tuple[float, int, float]]) -> TruncationLimits:
    return TruncationLimits(*(list(values) for values in zip(*per_row, strict=True)))


def by_sort(weights: Tensor, limits: TruncationLimits) -> Tensor:
    """What is left of the weights; sums are exact, of numbers rounded as the rule says."""
    rows = [
        _row_by_sort(row, *limit)
        for row, *limit in zip(weights.cpu().numpy(), *limits, strict=True)
    ]
    return torch.from_numpy(np.stack(rows)).to(weights.device)


def _row_by_sort(weights: np.ndarray, min_p: float, top_k: int, top_p: float) -> np.ndarray:
    left = np.where(weights < np.float32(min_p), np.float32(0.0), weights)
    order = np.argsort(-left, kind="stable")  # of equal ones the lower id first
    if 0 < top_k < len(left):
        left[left < left[order[top_k - 1]]] = 0.0
    if top_p < 1.0:
        masses = (left[order].astype(np.float64) * UNITS).astype(np.int64)
        total = int(masses.sum())
        wanted = min(math.ceil(float(total) * top_p), total)
        left[order[np.searchsorted(masses.cumsum(), wanted) + 1 :]] = 0.0
    return left
