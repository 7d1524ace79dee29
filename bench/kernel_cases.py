"""What is compiled and timed by `kernel_bench.py`: problems, and those who solve them.

Nothing here or in the files of problems imports Triton before a contestant is built, so
that `kernel_bench.py` can still choose its interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
from synthetic_models import SHAPES
from torch import Tensor

# Inputs of one problem are rotated so that they fill the L2 cache this many times over.
CACHES_FILLED = 4
MOST_SETS = 64

OURS = "minserve"


class Scale(Enum):
    """How much of a sweep: all, what CI or a few minutes allow, or the code without a GPU."""

    FULL = "full"
    QUICK = "quick"
    DRY = "dry"


class Heads(NamedTuple):
    """The part of a model's shape that attention sees."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @classmethod
    def of(cls, model: str) -> Heads:
        """Of one of `SHAPES`."""
        shape = SHAPES[model]
        num_heads = shape["num_attention_heads"]
        num_kv_heads = shape.get("num_key_value_heads", num_heads)
        return cls(num_heads, num_kv_heads, shape["hidden_size"] // num_heads)


class Contestant(NamedTuple):
    """One way to solve a problem, its memory allocated.

    Attributes:
        runs: solves it for each set of inputs.
        result: solves it for the first set; float tensor to compare with what is expected.
    """

    runs: list[Callable[[], Any]]
    result: Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something to compute, with fresh random inputs.

    Attributes:
        kernel: what `--only` calls it.
        case: what tells it from other problems of the kernel, for its row.
        dtype: of the inputs and of what is computed.
        least_bytes: what must be moved: inputs read once, outputs written once.
        flops: of matrix products; 0 where memory alone counts.
        memory: bytes that the inputs and one contestant take on the device.
        expected: the right result in float32, for the first set.
        contestants: by name; each builds a `Contestant`, and raises where it cannot serve.
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
        """The case in a few words."""
        return " ".join(str(v) if k == "model" else f"{k} {v}" for k, v in self.case.items())


class KernelSetting(NamedTuple):
    """Where and in what problems are made.

    Attributes:
        cache_bytes: of the device's L2 cache.
        filled: whether the inputs get values; what is only compiled needs none.
    """

    device: torch.device
    dtype: torch.dtype
    cache_bytes: int
    filled: bool = True

    def num_sets(self, set_bytes: int) -> int:
        """Sets of inputs of so many bytes that no cache can hold together."""
        return max(1, min(MOST_SETS, -(-CACHES_FILLED * self.cache_bytes // set_bytes)))

    def randn(self, *size: int) -> Tensor:
        """Normal values, or memory as it comes."""
        make = torch.randn if self.filled else torch.empty
        return make(size, dtype=self.dtype, device=self.device)


# Makes a problem; a `functools.partial`, so that it can go to another process.
Make = Callable[[KernelSetting], Problem]
