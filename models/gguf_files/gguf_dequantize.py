"""`dequantize`: the values of GGUF's quantized blocks, on all cores."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from gguf.constants import GGMLQuantizationType

# Values of one step. The allocator keeps temporary arrays of this size for the next step. Larger
# ones go back to the kernel each time, and their page faults take twice as long as the work.
_STEP = 2**17
# For so few steps, starting threads and passing the interpreter between them costs more than it gains.
_FEW_STEPS = 16


def dequantize(
    raw: np.ndarray, kind: GGMLQuantizationType, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return the values of blocks as the gguf package computes them in float32, ``[values]``.

    No block depends on another, so they are done in steps, in torch's number of threads: NumPy
    lets other threads run while it computes. Beside the result this takes a few MB of memory.

    Args:
        raw: bytes of whole blocks, uint8.
        kind: the ggml type of the blocks.
        dtype: a dtype of at most 32 bits to which values are rounded, while they are in the cache.

    Raises:
        NotImplementedError: if the gguf package does not know how.
    """
    from gguf.constants import GGML_QUANT_SIZES
    from gguf.quants import dequantize as package_dequantize

    block, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = raw.reshape(-1, block_bytes)
    # NumPy's memory comes in huge pages, torch's does not: a quarter of the time of page faults.
    memory = np.empty((len(blocks), block), np.float32 if dtype.itemsize == 4 else np.int16)
    values = torch.from_numpy(memory).view(dtype)
    step = max(1, _STEP // block)

    def fill(start: int) -> None:
        row = blocks[start : start + step].reshape(1, -1)
        found = torch.from_numpy(package_dequantize(row, kind))
        values[start : start + step] = found.view(-1, block)

    starts = range(0, len(blocks), step)
    if len(starts) <= _FEW_STEPS:
        for start in starts:
            fill(start)
    else:
        # A single thread gets a pool too: of the main thread's memory the allocator keeps less.
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(fill, starts))  # raises what a step raises
    return values.view(-1)
