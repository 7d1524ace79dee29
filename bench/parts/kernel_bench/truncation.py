"""Problems of `kernel_bench.py`: nucleus sampling's truncation, for which others sort."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from minserve.kernels.truncation import TruncationLimits, truncate
from shared.kernel_cases import OURS, Contestant, KernelSetting, Problem, Scale
from shared.synthetic_models import SHAPES

KERNEL = "truncation"
MODELS = {
    Scale.FULL: ("opt-6.7b", "llama-3.1-8b"),
    Scale.QUICK: ("llama-3.1-8b",),
    Scale.DRY: ("tiny-llama",),
}
ROWS = {Scale.FULL: (1, 8, 64, 256), Scale.QUICK: (1, 64), Scale.DRY: (3,)}
TOP_P = 0.95
# Standard deviation of the logits: the nucleus is a third of the vocabulary, or a few tokens.
SPREADS = {"wide": 2.0, "narrow": 8.0}


def truncation_problems(scale: Scale) -> list[partial[Problem]]:
    """Return problems with the vocabularies of models."""
    return [
        partial(truncation_problem, model, rows, nucleus)
        for model in MODELS[scale]
        for rows in ROWS[scale]
        for nucleus in SPREADS
    ]


def truncation_problem(model: str, rows: int, nucleus: str, setting: KernelSetting) -> Problem:
    """Return the truncation of rows to ``top_p``.

    The time includes a copy of the weights, because they are truncated in place.
    """
    setting = setting._replace(dtype=torch.float32)
    vocab = SHAPES[model]["vocab_size"]
    least_bytes = 2 * rows * vocab * setting.dtype.itemsize
    sets = [
        _weights(SPREADS[nucleus] * setting.randn(rows, vocab))
        for _ in range(setting.num_sets(least_bytes))
    ]
    limits = TruncationLimits([0.0] * rows, [0] * rows, [TOP_P] * rows)

    def ours(weights: Tensor) -> Tensor:
        from minserve.kernels.triton.truncation import truncate as kernel

        return kernel(weights, limits)

    def build(form: Callable[[Tensor], Tensor]) -> Contestant:
        runs = [lambda one=one: form(one.clone()) for one in sets]
        return Contestant(runs, runs[0])

    forms = {OURS: ours, "torch": partial(truncate, limits=limits, may_look=False), "sort": by_sort}
    return Problem(
        kernel=KERNEL,
        case={"model": model, "rows": rows, "nucleus": nucleus},
        dtype=setting.dtype,
        least_bytes=least_bytes,
        # A sort takes the weights, their order and a copy of both; sums take eight bytes each.
        memory=len(sets) * least_bytes + 8 * least_bytes,
        expected=lambda: by_sort(sets[0].clone()),
        contestants={name: partial(build, form) for name, form in forms.items()},
    )


def _weights(logits: Tensor) -> Tensor:
    return (logits - logits.amax(-1, keepdim=True)).exp_()


def by_sort(weights: Tensor) -> Tensor:
    """Truncate by a sort, and keep all weights that are tied at the border; changes ``weights``."""
    best = weights.sort(dim=-1, descending=True).values
    sums = best.cumsum(-1, dtype=torch.float64)
    last = (sums < TOP_P * sums[:, -1:]).sum(-1, keepdim=True)
    return weights.masked_fill_(weights < best.gather(-1, last), 0.0)
