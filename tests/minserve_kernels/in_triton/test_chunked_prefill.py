"""Prefill attention against attention written out: real head shapes, odd lengths, poisoned blocks."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_exact_as
from attention_cases import (
    LLAMA_3_8B,
    LLAMA_3_70B,
    OPT_2_7B,
    OPT_125M,
    expected,
    make_inputs,
)

from minserve.kernels.triton.chunked_prefill import (
    CHUNK_SIZES,
    LEAST_SPLIT,
    MOST_SPLITS,
    PrefillPlan,
    PrefillTile,
    chunked_prefill,
    plan_prefills,
    prefill_tile,
)
from minserve.kernels.triton.prefill_tiles import prefill_tiles

# (query heads, KV heads, head_dim).
WIDE, PHI, ONE_HEAD, TINY = (4, 2, 256), (3, 1, 96), (1, 1, 64), (2, 2, 40)
# Llama 3's. The interpreter runs head after head, and takes two groups of them for all.
GROUPED = LLAMA_3_8B if torch.cuda.is_available() else (8, 2, 128)


def run(
    heads: tuple[int, int, int],
    lengths: list[tuple[int, int]],
    dtype: torch.dtype,
    device: torch.device,
    *,
    block_size: int = 16,
    num_decodes: int = 0,
    tile: PrefillTile | None = None,
    num_programs: int = 1,
) -> PrefillPlan:
    """Check a batch's chunks: everything written, right, and nothing read that is not owned."""
    head_dim = heads[2]
    query, kv, metadata = make_inputs(
        heads, lengths, dtype, device, block_size=block_size, num_decodes=num_decodes
    )
    longest = max(queries for queries, _ in lengths[num_decodes:])
    tile = tile or prefill_tile(longest, head_dim, dtype, capability=90)
    plan = plan_prefills(
        metadata.query_start_loc, metadata.seq_lens, num_decodes, tile=tile, num_heads=heads[0],
        head_dim=head_dim, num_programs=num_programs, device=device,
    )  # fmt: skip
    out = torch.full(query.shape, torch.nan, dtype=dtype, device=device)
    chunked_prefill(
        query,
        kv.key,
        kv.value,
        out,
        torch.tensor(metadata.query_start_loc, device=device),
        torch.tensor(metadata.seq_lens, device=device),
        metadata.block_tables,
        plan,
        head_dim**-0.5,
    )
    first = metadata.query_start_loc[num_decodes]
    assert out[:first].isnan().all()
    plain, exact = expected(query, kv, metadata, dtype), expected(query, kv, metadata)
    assert_as_exact_as(plain[first:], out.flatten(1)[first:], exact[first:])
    assert not plan.arrived.any()
    return plan


@pytest.mark.parametrize(
    ("heads", "lengths"),
    [
        (OPT_125M, [(5, 0), (1, 0), (40, 5)]),
        (OPT_2_7B, [(5, 60)]),
        (LLAMA_3_8B, [(5, 60)]),
        (LLAMA_3_70B, [(5, 60)]),
        (WIDE, [(70, 64), (5, 0)]),
        (PHI, [(123, 5), (1, 122)]),
        (TINY, [(123, 123), (64, 64), (65, 63)]),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_chunks_are_right_at_real_shapes(
    heads: tuple[int, int, int],
    lengths: list[tuple[int, int]],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    run(heads, lengths, dtype, device)


@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 48])
def test_any_block_size_holds_the_context(
    block_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    run(PHI, [(70, 200), (5, 127)], dtype, device, block_size=block_size)


def test_a_long_context_is_attended_to_its_beginning(
    dtype: torch.dtype, device: torch.device
) -> None:
    run(ONE_HEAD, [(5, 4092), (1, 4096)], dtype, device)


@pytest.mark.parametrize("heads", [ONE_HEAD, PHI, GROUPED], ids=str)
def test_a_short_chunk_behind_a_long_context_is_split_and_merged(
    heads: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    # Tiles with as many splits as there are, with one, and whose first rows see nothing of the last.
    lengths = [(9, 3 * LEAST_SPLIT - 4), (70, 2 * LEAST_SPLIT - 66), (3, 40)]
    plan = run(heads, lengths, dtype, device, num_programs=1000)
    assert plan.num_splits == 4


def test_as_many_splits_as_fill_the_device(device: torch.device) -> None:
    def num_splits(tokens: int, length: int) -> int:
        plan = plan_prefills(
            [0, tokens], [length], 0, tile=PrefillTile(64, 64, 4, 3), num_heads=32, head_dim=16,
            num_programs=264, device=device,
        )  # fmt: skip
        assert plan.split_len % 64 == 0
        assert plan.num_splits * plan.split_len >= length
        return plan.num_splits

    assert num_splits(64, 8 * LEAST_SPLIT) == 8
    assert num_splits(128, 8 * LEAST_SPLIT) == 4
    assert num_splits(512, 8 * LEAST_SPLIT) == 1
    assert num_splits(64, LEAST_SPLIT) == 1
    assert num_splits(1, 10**6) == MOST_SPLITS


def test_a_prompt_cached_but_for_its_last_token(dtype: torch.dtype, device: torch.device) -> None:
    run(PHI, [(1, 63), (1, 64), (1, 127)], dtype, device)


def test_decodes_before_the_chunks_are_left_alone(dtype: torch.dtype, device: torch.device) -> None:
    run(PHI, [(1, 40), (2, 7), (20, 0), (3, 30)], dtype, device, num_decodes=2)


@pytest.mark.parametrize("block_m", [16, 64, 128])
@pytest.mark.parametrize("block_n", [16, 64, 128])
def test_every_tile_masks_alike(block_m: int, block_n: int, device: torch.device) -> None:
    tile = PrefillTile(block_m, block_n, num_warps=4, num_stages=2)
    run(ONE_HEAD, [(150, 37), (17, 128)], torch.float16, device, tile=tile)


def test_programs_with_most_context_go_first() -> None:
    tiles = prefill_tiles([0, 1, 131, 141], [50, 130, 1010], 1, block_m=64)
    assert tiles == [(2, 0), (1, 128), (1, 64), (1, 0)]


def test_no_chunks_launch_nothing() -> None:
    assert prefill_tiles([0, 1], [5], 1, 64) == []


@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_tiles_change_at_the_sizes_that_are_tried_beforehand(capability: int, head_dim: int):
    def tile(longest: int) -> PrefillTile:
        return prefill_tile(longest, head_dim, torch.bfloat16, capability)

    changes = [n for n in range(2, 10_000) if tile(n) != tile(n - 1)]
    assert set(changes) <= set(CHUNK_SIZES)
