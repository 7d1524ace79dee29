"""Where a tile of the context lies in the paged cache.

The blocks of the next tile are looked up while a tile is computed: loads of keys and values that
waited for another load of the same turn of a loop would not be pipelined.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def blocks_at(table_ptr, first, end, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Look up the blocks of the tokens from ``first`` on; 0 for tokens at ``end`` and later.

    Returns:
        int32: one block if every tile lies within a block, else ``[BLOCK_N]``, one of each token.
    """
    ahead = first if BLOCK_SIZE % BLOCK_N == 0 else first + tl.arange(0, BLOCK_N)
    return tl.load(table_ptr + ahead // BLOCK_SIZE, mask=ahead < end, other=0).to(tl.int32)


@triton.jit
def slots_in(blocks, first, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Return the places of the tile's tokens in the cache, int64 ``[BLOCK_N]``.

    Args:
        blocks: the result of `blocks_at` for ``first``, which is a multiple of ``BLOCK_N``.
    """
    if BLOCK_SIZE % BLOCK_N == 0:
        offset = first % BLOCK_SIZE + tl.arange(0, BLOCK_N)
    else:
        offset = (first + tl.arange(0, BLOCK_N)) % BLOCK_SIZE
    return blocks.to(tl.int64) * BLOCK_SIZE + offset
