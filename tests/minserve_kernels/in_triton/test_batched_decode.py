"""Decode attention against attention written out: real head shapes, odd lengths, poisoned blocks."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_exact_as
from attention_cases import (
    LLAMA_3_8B,
    LLAMA_3_70B,
    OPT_2_7B,
    OPT_6_7B,
    OPT_125M,
    expected,
    make_inputs,
    make_metadata,
)
from decode_pieces import pieces_of

from minserve.kernels.attention import LayerKV
from minserve.kernels.triton import decode_plan
from minserve.kernels.triton.batched_decode import batched_decode
from minserve.kernels.triton.decode_plan import DecodePlan, plan_decodes

# (query heads, KV heads, head_dim).
WIDE, PHI, ONE_KV_HEAD, TINY = (4, 2, 256), (6, 2, 96), (8, 1, 64), (4, 2, 16)


def run(
    heads: tuple[int, int, int],
    lengths: list[tuple[int, int]],
    dtype: torch.dtype,
    device: torch.device,
    block_size: int = 16,
    num_programs: int = 16,
    lengths_known: bool = True,
) -> DecodePlan:
    """Check a batch of decodes: everything written, right, and nothing read that is not owned."""
    num_heads, num_kv_heads, head_dim = heads
    query, kv, metadata = make_inputs(
        heads, lengths, dtype, device, block_size=block_size, num_decodes=len(lengths)
    )
    plan = plan_decodes(
        torch.tensor(metadata.query_start_loc, device=device),
        torch.tensor(metadata.seq_lens, device=device),
        metadata.block_tables,
        most_queries=max(queries for queries, _ in lengths),
        longest=max(metadata.seq_lens),
        total=sum(metadata.seq_lens) if lengths_known else None,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        num_programs=num_programs,
    )
    out = torch.full(query.shape, torch.nan, dtype=dtype, device=device)
    batched_decode(query, kv.key, kv.value, out, plan, head_dim**-0.5)
    plain, exact = expected(query, kv, metadata, dtype), expected(query, kv, metadata)
    assert_as_exact_as(plain, out.flatten(1), exact)
    assert not plan.arrived.any()
    return plan


@pytest.mark.parametrize(
    ("heads", "lengths"),
    [
        (OPT_125M, [(1, 0), (1, 4), (1, 122)]),
        (OPT_2_7B, [(1, 4)]),
        (OPT_6_7B, [(1, 122)]),
        (LLAMA_3_8B, [(1, 122), (1, 0), (1, 64)]),
        (LLAMA_3_70B, [(1, 122)]),
        (WIDE, [(1, 122), (1, 4)]),
        (PHI, [(1, 122), (1, 4)]),
        (TINY, [(1, 0), (1, 47), (1, 48)]),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_decodes_are_right_at_real_shapes(
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
    run(PHI, [(1, 200), (1, 127), (1, 128)], dtype, device, block_size)


def test_drafts_under_verification_see_only_what_is_before_them(
    dtype: torch.dtype, device: torch.device
) -> None:
    # Up to nine query tokens, of very unlike number, behind contexts that end anywhere.
    run(PHI, [(9, 0), (1, 70), (3, 62), (2, 126), (9, 123)], dtype, device)


def test_more_rows_than_one_tile_holds(dtype: torch.dtype, device: torch.device) -> None:
    run(ONE_KV_HEAD, [(9, 50), (1, 20), (17, 33)], dtype, device)


@pytest.mark.parametrize("lengths_known", [False, True])
def test_a_long_context_is_split_and_merged(
    lengths_known: bool, dtype: torch.dtype, device: torch.device
) -> None:
    lengths = [(1, 4096), (1, 0), (3, 700), (2, 127)]
    plan = run(ONE_KV_HEAD, lengths, dtype, device, lengths_known=lengths_known)
    pieces = pieces_of(plan)
    assert len(pieces[0]) > 3, "the longest is split"
    assert len(pieces[1]) == len(pieces[3]) == 1, "the shortest are not"


@pytest.mark.parametrize("lengths_known", [False, True])
@pytest.mark.parametrize("heads", [TINY, ONE_KV_HEAD], ids=str)
def test_one_long_sequence_among_many_short_ones(
    heads: tuple[int, int, int], lengths_known: bool, dtype: torch.dtype, device: torch.device
) -> None:
    lengths = [(1 + i % 3, 5 + 7 * i) for i in range(9)] + [(2, 9000)]
    plan = run(heads, lengths, dtype, device, block_size=64, lengths_known=lengths_known)
    assert len(pieces_of(plan)[9]) > 3


def test_a_context_of_128k_tokens(device: torch.device) -> None:
    run((1, 1, 16), [(1, 2**17 - 1)], torch.float16, device, block_size=128)


def test_a_split_may_hold_nothing_that_the_first_drafts_see(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_plan, "LEAST_SPLIT", 64)
    # The last piece begins at one of the last tokens of a sequence.
    lengths = [(5, 8 * 64 + more) for more in (-4, -2, -1)]
    plan = run(TINY, lengths, dtype, device, num_programs=1000)
    assert [pieces[-1][1] - pieces[-1][0] for _, pieces in sorted(pieces_of(plan).items())] == [
        1,
        3,
        4,
    ]


def test_an_empty_batch_writes_nothing(device: torch.device) -> None:
    none = torch.zeros(0, 1, dtype=torch.int64, device=device)
    plan = plan_decodes(
        torch.zeros(1, dtype=torch.int64, device=device), none[:, 0], none,
        most_queries=0, longest=0, total=0, num_heads=4, num_kv_heads=2, head_dim=16,
        dtype=torch.float16, num_programs=16,
    )  # fmt: skip
    key, value = torch.randn(2, 1, 16, 2, 16, device=device).half()
    out = torch.full((1, 4, 16), 7.0, dtype=torch.float16, device=device)
    batched_decode(out[:0], key, value, out, plan, 1.0)
    assert (out == 7.0).all()


def test_sequences_of_padding_cost_nothing_and_write_nothing(
    dtype: torch.dtype, device: torch.device
) -> None:
    """As in a captured graph: rows and sequences for more than there are."""
    heads, dim = 4, 64
    kv = LayerKV(*(torch.randn(8, 16, heads, dim, device=device).to(dtype) for _ in range(2)))
    query = torch.randn(4, heads, dim, device=device).to(dtype)
    on = {"device": device}
    tables = torch.tensor([[3, 1, 5, 0], [0] * 4, [0] * 4, [0] * 4], **on)
    plan = plan_decodes(
        torch.tensor([0, 1, 1, 1, 1], **on), torch.tensor([37, 0, 0, 0], **on), tables,
        most_queries=1, longest=64, total=None, num_heads=heads, num_kv_heads=heads,
        head_dim=dim, dtype=dtype, num_programs=64,
    )  # fmt: skip
    out = torch.full_like(query, 7.0)
    batched_decode(query, kv.key, kv.value, out, plan, dim**-0.5)
    metadata, _ = make_metadata([(1, 36)], 1, 16, device)
    metadata.block_tables = tables[:1, :3]
    assert (out[:1].flatten(1) - expected(query[:1], kv, metadata)).abs().max() < 1e-2
    assert (out[1:] == 7.0).all()


def test_an_index_beyond_32_bits_finds_its_block(device: torch.device) -> None:
    """The cache's far end, in memory that is never touched: 2**31 elements lie before it."""
    block_size, heads, dim = 128, 8, 256
    num_blocks = 2**31 // (block_size * heads * dim) + 2
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    size = (num_blocks, block_size, heads, dim)
    key, value = (torch.empty(size, dtype=torch.float16, device=device) for _ in range(2))
    last = num_blocks - 1
    key[last].normal_()
    value[last].normal_()
    metadata, _ = make_metadata([(1, 99)], 1, block_size, device)
    metadata.block_tables = torch.tensor([[last]], device=device)
    query = torch.randn(1, heads, dim, device=device).half()
    plan = plan_decodes(
        torch.tensor([0, 1], device=device), torch.tensor([100], device=device), metadata.block_tables,
        most_queries=1, longest=100, total=100, num_heads=heads, num_kv_heads=heads,
        head_dim=dim, dtype=torch.float16, num_programs=1,
    )  # fmt: skip
    out = torch.empty_like(query)
    batched_decode(query, key, value, out, plan, dim**-0.5)
    kv = LayerKV(key[last:], value[last:])
    metadata.block_tables = torch.tensor([[0]], device=device)
    assert (out.flatten(1) - expected(query, kv, metadata)).abs().max() < 1e-2
