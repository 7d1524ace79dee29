"""Batches over scattered blocks, and attention written out to judge backends by."""

from __future__ import annotations

import random

import torch
from accuracy import assert_as_exact_as

from minserve.kernels.attention import AttentionBackend, AttentionMetadata, LayerKV

# Heads of real models, as (query heads, KV heads, head_dim).
OPT_125M, OPT_2_7B, OPT_6_7B = (12, 12, 64), (32, 32, 80), (32, 32, 128)
LLAMA_3_8B, LLAMA_3_70B = (32, 8, 128), (64, 8, 128)


def make_metadata(
    lengths: list[tuple[int, int]],
    num_decodes: int,
    block_size: int,
    device: torch.device | str = "cpu",
) -> tuple[AttentionMetadata, int]:
    """Metadata over randomly chosen blocks, and how many blocks the pool needs.

    Args:
        lengths: (query tokens, earlier tokens) of each sequence; decodes first.
    """
    rng = random.Random(0)
    need = [-(-(queries + past) // block_size) for queries, past in lengths]
    num_blocks = sum(need) + 5
    order = rng.sample(range(num_blocks), sum(need))
    tables, slots, starts = [], [], [0]
    for (queries, past), count in zip(lengths, need, strict=True):
        table, order = order[:count], order[count:]
        slots += [
            table[p // block_size] * block_size + p % block_size
            for p in range(past, past + queries)
        ]
        tables.append(table + [0] * (max(need) - count))
        starts.append(starts[-1] + queries)
    metadata = AttentionMetadata(
        query_start_loc=starts,
        seq_lens=[queries + past for queries, past in lengths],
        block_tables=torch.tensor(tables, device=device),
        slot_mapping=torch.tensor(slots, device=device),
        block_size=block_size,
        num_decodes=num_decodes,
    )
    return metadata, num_blocks


def poison(
    kv: LayerKV, metadata: AttentionMetadata, value: float, *, own_tails: float | None = None
) -> None:
    """Make reading what no sequence owns show: unused blocks, and the tails of last blocks.

    Args:
        own_tails: the value of tails in blocks that their sequences entered in earlier batches.
    """
    owned = torch.zeros(kv.key.shape[:2], dtype=torch.bool, device=kv.key.device)
    for table, length in zip(metadata.block_tables, metadata.seq_lens, strict=True):
        place = torch.arange(length, device=owned.device)
        owned[table[place // metadata.block_size], place % metadata.block_size] = True
    for part in (kv.key, kv.value):
        part[~owned] = value
    starts, size = metadata.query_start_loc, metadata.block_size
    for i, length in enumerate(metadata.seq_lens if own_tails is not None else ()):
        place, used = divmod(length, size)
        if used > starts[i + 1] - starts[i]:
            block = metadata.block_tables[i, place]
            kv.key[block, used:] = kv.value[block, used:] = own_tails


def make_inputs(
    heads: tuple[int, int, int],
    lengths: list[tuple[int, int]],
    dtype: torch.dtype,
    device: torch.device,
    *,
    block_size: int,
    num_decodes: int,
) -> tuple[torch.Tensor, LayerKV, AttentionMetadata]:
    """Random queries, a random cache with NaN where nobody owns it, and their metadata.

    The queries lie among keys and values, as a model's matmul leaves them.

    Args:
        heads: query heads, KV heads, head_dim.
    """
    num_heads, num_kv_heads, head_dim = heads
    metadata, num_blocks = make_metadata(lengths, num_decodes, block_size, device)
    torch.manual_seed(0)
    shape = (num_blocks, block_size, num_kv_heads, head_dim)
    kv = LayerKV(*(torch.randn(shape, device=device).to(dtype) for _ in range(2)))
    poison(kv, metadata, torch.nan)
    qkv = torch.randn(metadata.num_tokens, num_heads + 2 * num_kv_heads, head_dim, device=device)
    return qkv.to(dtype)[:, :num_heads], kv, metadata


def expected(
    query: torch.Tensor,
    kv: LayerKV,
    metadata: AttentionMetadata,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Softmax(q k^T / sqrt(head_dim)) v in a dtype, sequence by sequence, written out."""
    num_heads, head_dim = query.shape[1:]
    rows = []
    for i, length in enumerate(metadata.seq_lens):
        begin, end = metadata.query_start_loc[i : i + 2]
        blocks = metadata.block_tables[i]
        key, value = (
            part[blocks]
            .flatten(0, 1)[:length]
            .to(dtype)
            .repeat_interleave(num_heads // part.shape[2], dim=1)
            for part in (kv.key, kv.value)
        )
        q = query[begin:end].to(dtype)
        scores = torch.einsum("qhd,khd->hqk", q, key) * head_dim**-0.5
        position = torch.arange(length, device=query.device)
        seen = position <= position[length - (end - begin) :].unsqueeze(1)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        rows.append(torch.einsum("hqk,khd->qhd", weights, value))
    return torch.cat(rows).flatten(1)


def check_attention(
    backend: AttentionBackend,
    heads: tuple[int, int, int],
    lengths: list[tuple[int, int]],
    num_decodes: int,
    dtype: torch.dtype,
    block_size: int,
    own_tails: float | None = None,
) -> None:
    """Hold a CPU backend against attention written out, on a cache whose unowned slots are NaN.

    Args:
        heads: query heads, KV heads, head_dim.
        lengths: (query tokens, earlier tokens) of each sequence; decodes first.
        own_tails: as in `poison`.
    """
    num_heads, num_kv_heads, head_dim = heads
    metadata, num_blocks = make_metadata(lengths, num_decodes, block_size)
    torch.manual_seed(0)
    kv = backend.allocate(num_blocks, block_size, dtype, torch.device("cpu"))
    assert kv.key.shape == (num_blocks, block_size, num_kv_heads, head_dim)
    kv.key.normal_()
    kv.value.normal_()
    poison(kv, metadata, torch.nan, own_tails=own_tails)
    query = torch.randn(metadata.num_tokens, num_heads, head_dim).to(dtype)
    new = torch.randn(2, metadata.num_tokens, num_kv_heads, head_dim).to(dtype)
    with torch.inference_mode():
        backend.prepare(metadata)
        backend.write_kv(torch.cat((query, *new), dim=1), kv, metadata)
        got = backend.forward(query, kv, metadata)
    flat = kv.key.reshape(-1, num_kv_heads, head_dim)
    assert torch.equal(flat[metadata.slot_mapping], new[0])
    plain, exact = expected(query, kv, metadata, dtype), expected(query, kv, metadata)
    assert_as_exact_as(plain, got, exact)
