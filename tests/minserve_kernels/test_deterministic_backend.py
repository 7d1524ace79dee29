"""Deterministic attention is right, and gives each token the same bits however it came to run."""

from __future__ import annotations

import random

import pytest
import torch
from attention_cases import check_attention, make_metadata
from torch import Tensor

from minserve.kernels.attention import LayerKV
from minserve.kernels.deterministic_backend import DeterministicBackend

# (query tokens, earlier tokens) of each sequence; decodes first.
BATCHES = {
    "one decode": ([(1, 0)], 1),
    "decodes": ([(1, 3), (1, 400), (1, 63), (1, 64), (1, 7)], 5),
    "verification": ([(3, 20), (1, 25), (3, 62), (5, 11)], 4),
    "fresh prefills": ([(5, 0), (123, 0), (1, 0), (64, 0)], 0),
    "later chunks": ([(16, 5), (123, 64), (1, 31), (130, 66)], 0),
    "mixed": ([(1, 77), (1, 12), (40, 0), (17, 100)], 2),
}
HEADS = {"multi-head": (4, 4, 16), "grouped": (6, 2, 16), "one KV head": (4, 1, 80)}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("block_size", [1, 24])
def test_attention_is_right(batch: str, heads: str, dtype: torch.dtype, block_size: int) -> None:
    num_heads, num_kv_heads, head_dim = HEADS[heads]
    backend = DeterministicBackend(num_heads, num_kv_heads, head_dim, scale=head_dim**-0.5)
    check_attention(backend, HEADS[heads], *BATCHES[batch], dtype, block_size)


@DTYPES
@pytest.mark.parametrize("heads", HEADS)
def test_chunks_and_neighbours_change_no_bit(heads: str, dtype: torch.dtype) -> None:
    num_heads, num_kv_heads, head_dim = HEADS[heads]
    backend = DeterministicBackend(num_heads, num_kv_heads, head_dim, scale=head_dim**-0.5)
    torch.manual_seed(0)
    lengths = (150, 64, 9)
    tokens = [
        torch.randn(length, num_heads + 2 * num_kv_heads, head_dim).to(dtype) for length in lengths
    ]
    rotations = [
        torch.polar(torch.ones(n, 1, head_dim // 2), torch.randn(n, 1, head_dim // 2))
        for n in lengths
    ]

    def run(rng: random.Random, most: int, together: bool) -> list[Tensor]:
        """Run all tokens in chunks of up to so many, and return what attention gave each."""
        block_size = rng.choice([1, 8, 40])
        _, num_blocks = make_metadata([(n, 0) for n in lengths], 0, block_size)
        kv = backend.allocate(num_blocks, block_size, dtype, torch.device("cpu"))
        done, found = [0] * len(lengths), [[] for _ in lengths]
        while any(a < b for a, b in zip(done, lengths, strict=True)):
            open_ = [i for i, n in enumerate(lengths) if done[i] < n]
            chosen = open_ if together else [rng.choice(open_)]
            chunks = {i: rng.randint(1, min(most, lengths[i] - done[i])) for i in chosen}
            for i, out in _attend(backend, kv, tokens, rotations, done, chunks, block_size).items():
                found[i].append(out)
                done[i] += chunks[i]
        return [torch.cat(parts) for parts in found]

    whole = run(random.Random(0), 1000, False)
    for seed, most in enumerate((1, 5, 17, 70)):
        for one, other in zip(run(random.Random(seed), most, seed % 2 == 0), whole, strict=True):
            assert torch.equal(one, other)


def _attend(
    backend: DeterministicBackend,
    kv: LayerKV,
    tokens: list[Tensor],
    rotations: list[Tensor],
    done: list[int],
    chunks: dict[int, int],
    block_size: int,
) -> dict[int, Tensor]:
    # The blocks of all sequences at their full length; only those in the batch count.
    full, _ = make_metadata([(len(one), 0) for one in tokens], 0, block_size)
    rows = {i: slice(done[i], done[i] + n) for i, n in chunks.items()}
    starts = [0]
    for n in chunks.values():
        starts.append(starts[-1] + n)
    metadata, _ = make_metadata([(n, done[i]) for i, n in chunks.items()], 0, block_size)
    metadata.block_tables = full.block_tables[list(chunks)]
    metadata.slot_mapping = torch.cat(
        [full.slot_mapping[full.query_start_loc[i] :][rows[i]] for i in chunks]
    )
    qkv = torch.cat([tokens[i][rows[i]] for i in chunks]).clone()
    with torch.inference_mode():
        backend.prepare(metadata)
        backend.write_kv(qkv, kv, metadata, torch.cat([rotations[i][rows[i]] for i in chunks]))
        out = backend.forward(qkv[:, : backend.num_heads], kv, metadata)
    return {i: out[starts[k] : starts[k + 1]] for k, i in enumerate(chunks)}
