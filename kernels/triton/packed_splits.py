"""How programs share the inputs of a product with a packed weight, so that all of a device works.

Each program of a tile of outputs adds over a part of the inputs. The one that ends last adds their
sums, always in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minserve.kernels.packed_matrix import PackedMatrix

# Chunks of a program, at least: fewer cost more to begin and to add than they save.
LEAST_CHUNKS = 4
MOST_SPLITS = 8


def chunks_of_split(matrix: PackedMatrix, num_programs: int, num_sms: int) -> int:
    """Return how many chunks of a matrix a program takes.

    Args:
        num_programs: programs if each takes all chunks.
        num_sms: the device's multiprocessors.
    """
    splits = min(MOST_SPLITS, triton.cdiv(num_sms, num_programs))
    return max(triton.cdiv(matrix.num_chunks, splits), min(LEAST_CHUNKS, matrix.num_chunks))


def partial_sums(x: torch.Tensor, num_splits: int, num_outputs: int) -> torch.Tensor:
    """Return the memory for the sums of splits, float32; empty for one split."""
    size = (num_splits if num_splits > 1 else 0, len(x), num_outputs)
    return torch.empty(size, dtype=torch.float32, device=x.device)


@triton.jit
def is_last(arrived, SPLITS: tl.constexpr):
    """Tell whether all other programs of a tile have stored their sums; called after storing."""
    # All threads' stores are made before one of them tells the other programs.
    tl.debug_barrier()
    last = tl.atomic_add(arrived, 1, sem="acq_rel") == SPLITS - 1
    if last:
        tl.store(arrived, 0)  # for the next product
    return last


@triton.jit
def sum_of_splits(partial, mask, stride, SPLITS: tl.constexpr):
    """Return the sum of all splits' sums, which lie ``stride`` numbers apart."""
    # What other programs wrote is read past the first-level cache, which may hold older values.
    total = tl.load(partial, mask, other=0.0, cache_modifier=".cg")
    for split in tl.static_range(1, SPLITS):
        total += tl.load(partial + split * stride, mask, other=0.0, cache_modifier=".cg")
    return total
