"""The problems that `kernel_bench.py` compiles and times, and the contestants that solve them.

Neither this file nor the files of problems import Triton before a contestant is built, so that
`kernel_bench.py` can choose the interpreter first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shared.synthetic_models import SHAPES

# Inputs of one problem are rotated so that they fill the L2 cache this many times over.
CACHES_FILLED = 4
MOST_SETS = 64

OURS = "minserve"


class Scale(Enum):
    """The size of a sweep: all, a few minutes' worth (as in CI), or only the code without a GPU."""

    FULL = "full"
    QUICK = "quick"
    DRY = "dry"


class Heads(NamedTuple):
    """The part of a model's shape that attention depends on."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @classmethod
    def of(cls, model: str) -> Heads:
        """Return the heads of one of `SHAPES`."""
        shape = SHAPES[model]
        num_heads = shape["num_attention_heads"]
        num_kv_heads = shape.get("num_key_value_heads", num_heads)
        return cls(num_heads, num_kv_heads, shape["hidden_size"] // num_heads)


class Contestant(NamedTuple):
    """A way to solve a problem, with its memory allocated.

    Attributes:
        runs: for each set of inputs, a function that solves it.
        result: solves the first set; returns a float tensor to compare with the expected one.
    """

    runs: list[Callable[[], Any]]
    result: Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something to compute, with new random inputs.

    Attributes:
        kernel: the kernel's name for `--only`.
        case: the values that distinguish it from other problems of the kernel, for its row.
        dtype: dtype of the inputs and of the result.
        least_bytes: bytes that must be moved: inputs read once, outputs written once.
        flops: operations of matrix products; 0 if only memory counts.
        memory: bytes that the inputs and one contestant take on the device.
        expected: returns the right result in float32, for the first set.
        contestants: by name; each builds a `Contestant`, and raises if it cannot serve.
    """

    kernel: str
    case: dict[str, Any]
    dtype: torch.dtype
    least_bytes: int
    flops: int = 0
    memory: int
    expected: Callable[[], Tensor]
    contestants: dict[str, Callable[[], Contestant]]

    @property
    def label(self) -> str:
        """The case as a few words, for tables."""
        return " ".join(str(v) if k == "model" else f"{k} {v}" for k, v in self.case.items())


class KernelSetting(NamedTuple):
    """The device and dtype for which problems are made.

    Attributes:
        cache_bytes: size of the device's L2 cache.
        filled: true if the inputs get values; problems that are only compiled need none.
    """

    device: torch.device
    dtype: torch.dtype
    cache_bytes: int
    filled: bool = True

    def num_sets(self, set_bytes: int) -> int:
        """Return how many sets of inputs of so many bytes no cache can hold together."""
        return max(1, min(MOST_SETS, -(-CACHES_FILLED * self.cache_bytes // set_bytes)))

    def randn(self, *size: int) -> Tensor:
        """Return normal values, or uninitialized memory if the setting is not filled."""
        make = torch.randn if self.filled else torch.empty
        return make(size, dtype=self.dtype, device=self.device)


# Makes a problem of a `KernelSetting`; it can go to another process.
Make = partial[Problem]
