"""`TensorPart`: which rows or columns of a stored tensor are wanted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TensorPart:
    """Some rows (``dim`` 0) or columns (``dim`` 1) of a stored tensor, as a rank keeps them.

    Attributes:
        runs: start and length of each run of neighbours, in order; a run may be there twice.
    """

    dim: int
    runs: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, dim: int, runs: Iterable[tuple[int, int]]) -> TensorPart:
        """Return a part, with runs that follow each other as one."""
        joined: list[tuple[int, int]] = []
        for start, length in runs:
            if joined and sum(joined[-1]) == start:
                start, length = joined[-1][0], joined.pop()[1] + length
            joined.append((start, length))
        return cls(dim, tuple(joined))

    @classmethod
    def of_fused(cls, parts: Sequence[TensorPart], sizes: Sequence[int]) -> TensorPart:
        """Return the part that consists of parts of tensors which are stored as one.

        Args:
            sizes: rows of the tensors.
        """
        starts = accumulate(sizes, initial=0)
        return cls.of(
            parts[0].dim,
            (
                (start + first, length)
                for start, part in zip(starts, parts, strict=False)
                for first, length in part.runs
            ),
        )

    @property
    def length(self) -> int:
        """The number of rows or columns."""
        return sum(length for _, length in self.runs)

    def is_whole(self, shape: Sequence[int]) -> bool:
        """Return whether nothing is left out of a tensor of this shape."""
        return self.runs == ((0, shape[self.dim]),)

    def cut(self, tensor: Tensor) -> Tensor:
        """Return the part of a tensor, a view of it where it is one run."""
        runs = self._cut_runs(tensor)
        return runs[0] if len(runs) == 1 else torch.cat(runs, self.dim)

    def copy(self, tensor: Tensor) -> Tensor:
        """Return the part of a tensor in memory of its own, so that the whole can be dropped."""
        return torch.cat(self._cut_runs(tensor), self.dim)

    def _cut_runs(self, tensor: Tensor) -> list[Tensor]:
        runs = [slice(start, start + length) for start, length in self.runs]
        return [tensor[run] if self.dim == 0 else tensor[:, run] for run in runs]
