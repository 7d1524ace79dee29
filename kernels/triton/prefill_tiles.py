"""Which queries each program of `chunked_prefill` computes: tiles of the chunks of a batch.

The host makes them where it knows the batch. In a CUDA graph it does not: then the device makes as
many as any batch of that size can have, and those that this one has not are marked as `NO_TILE`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

NO_TILE = -1  # in place of a sequence: the program has nothing to do
_BLOCK_TILES = 32


def prefill_tiles(
    query_start_loc: Sequence[int], seq_lens: Sequence[int], first_seq: int, block_m: int
) -> list[tuple[int, int]]:
    """Return the tiles, as pairs (sequence, its first query token of the tile).

    Tiles with the most context come first, so that no long tile is left over at the end.

    Args:
        query_start_loc, seq_lens: as in `AttentionMetadata`.
        first_seq: index of the first sequence that is a prefill chunk.
        block_m: query tokens of a tile.
    """
    tiles = []
    for seq in range(first_seq, len(seq_lens)):
        num_queries = query_start_loc[seq + 1] - query_start_loc[seq]
        earlier = seq_lens[seq] - num_queries
        tiles += [(earlier + first, seq, first) for first in range(0, num_queries, block_m)]
    tiles.sort(reverse=True)
    return [(seq, first) for _, seq, first in tiles]


def most_tiles(num_tokens: int, num_seqs: int, block_m: int) -> int:
    """Return the most tiles of so many chunks with so many query tokens together.

    All chunks but one could have a single token each beyond whole tiles.
    """
    num_seqs = min(num_seqs, num_tokens)
    return num_seqs + (num_tokens - num_seqs) // block_m


def prefill_tiles_on_device(
    starts: Tensor, first_seq: int, num_tokens: int, block_m: int
) -> Tensor:
    """Return int64 ``[most_tiles(...), 2]``: the tiles as `prefill_tiles` gives them, then `NO_TILE`.

    It enqueues work and does not wait for the device. The last tiles of the last chunk come first,
    since the lengths of contexts are not compared here.

    Args:
        starts: int64 ``[num_seqs + 1]``: first query token of each sequence of the batch, then the
            end. Sequences without query tokens have no tiles.
        first_seq: as in `prefill_tiles`.
        num_tokens: query tokens of the batch, at most.
    """
    num_seqs = starts.shape[0] - 1 - first_seq
    num_tiles = most_tiles(num_tokens, num_seqs, block_m)
    tiles = torch.empty((num_tiles, 2), dtype=torch.int64, device=starts.device)
    _tiles_kernel[(triton.cdiv(num_tiles, _BLOCK_TILES),)](
        starts,
        tiles,
        first_seq,
        num_seqs,
        num_tiles,
        BLOCK_M=block_m,
        SEQS=triton.next_power_of_2(num_seqs),
        TILES=_BLOCK_TILES,
        NONE=NO_TILE,
        num_warps=1,
    )
    return tiles


@triton.jit(do_not_specialize=["starts_ptr", "first_seq", "num_seqs", "num_tiles"])
def _tiles_kernel(
    starts_ptr,
    tiles_ptr,
    first_seq,
    num_seqs,
    num_tiles,
    BLOCK_M: tl.constexpr,
    SEQS: tl.constexpr,
    TILES: tl.constexpr,
    NONE: tl.constexpr,
):
    """Store some tiles: the sequence of each is the first whose tiles end behind it."""
    seqs = tl.arange(0, SEQS)
    is_seq = seqs < num_seqs
    start = tl.load(starts_ptr + first_seq + seqs, mask=is_seq, other=0)
    end = tl.load(starts_ptr + first_seq + seqs + 1, mask=is_seq, other=0)
    own = tl.cdiv(end - start, BLOCK_M)
    ends = tl.cumsum(own, 0)
    places = tl.program_id(0) * TILES + tl.arange(0, TILES)
    tile = tl.sum(own, 0) - 1 - places  # the last ones first
    is_before = ends[None, :] <= tile[:, None]
    seq = first_seq + tl.sum((is_before & is_seq[None, :]).to(tl.int64), 1)
    before = tl.sum(tl.where(is_before, own[None, :], 0), 1)
    out_ptrs = tiles_ptr + 2 * places
    is_place = places < num_tiles
    tl.store(out_ptrs, tl.where(tile >= 0, seq, NONE), mask=is_place)
    tl.store(out_ptrs + 1, tl.where(tile >= 0, (tile - before) * BLOCK_M, 0), mask=is_place)
