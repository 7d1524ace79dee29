"""The torch backend against attention written out, over scattered and poisoned blocks."""

from __future__ import annotations

import random

import pytest
import torch

from minserve.kernels.attention import AttentionMetadata, LayerKV
from minserve.kernels.torch_backend import TorchBackend

# (query tokens, earlier tokens) of each sequence; decodes first.
BATCHES = {
    "one decode": ([(1, 0)], 1),
    "decodes of like length": ([(1, 40), (1, 33), (1, 47)], 3),
    "decodes of unlike length": ([(1, 3), (1, 400), (1, 30), (1, 390), (1, 7)], 5),
    "verification": ([(3, 20), (1, 25), (3, 90), (5, 11)], 4),
    "fresh prefills": ([(5, 0), (123, 0), (1, 0)], 0),
    "later chunks": ([(16, 5), (123, 64), (1, 31)], 0),
    "mixed": ([(1, 77), (1, 12), (40, 0), (17, 100)], 2),
}
HEADS = {"multi-head": (4, 4, 16), "grouped": (6, 2, 16), "one KV head": (4, 1, 80)}


def build(
    lengths: list[tuple[int, int]], num_decodes: int, block_size: int
) -> tuple[AttentionMetadata, int]:
    """Metadata over randomly chosen blocks, and how many blocks the pool needs."""
    rng = random.Random(0)
    need = [-(-(q + past) // block_size) for q, past in lengths]
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
        seq_lens=[q + past for q, past in lengths],
        block_tables=torch.tensor(tables),
        slot_mapping=torch.tensor(slots),
        block_size=block_size,
        num_decodes=num_decodes,
    )
    return metadata, num_blocks


def expected(
    query: torch.Tensor,
    kv: LayerKV,
    metadata: AttentionMetadata,
    lengths: list[tuple[int, int]],
    scale: float,
) -> torch.Tensor:
    """Softmax(q k^T) v in float64, one query head of one token at a time."""
    rows = []
    for i, (queries, past) in enumerate(lengths):
        blocks = metadata.block_tables[i]
        key = kv.key[blocks].flatten(0, 1).double()
        value = kv.value[blocks].flatten(0, 1).double()
        group = query.shape[1] // key.shape[1]
        for j in range(queries):
            q = query[metadata.query_start_loc[i] + j].double()
            for head in range(query.shape[1]):
                seen = slice(0, past + j + 1)
                weights = (key[seen, head // group] @ q[head] * scale).softmax(-1)
                rows.append(weights @ value[seen, head // group])
    return torch.stack(rows).view(query.shape[0], -1)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("block_size", [1, 16])
def test_attention_is_right(batch: str, heads: str, dtype: torch.dtype, block_size: int) -> None:
    lengths, num_decodes = BATCHES[batch]
    num_heads, num_kv_heads, head_dim = HEADS[heads]
    backend = TorchBackend(num_heads, num_kv_heads, head_dim, scale=head_dim**-0.5)
    metadata, num_blocks = build(lengths, num_decodes, block_size)
    torch.manual_seed(0)
    kv = backend.allocate(num_blocks, block_size, dtype, torch.device("cpu"))
    assert kv.key.shape == (num_blocks, block_size, num_kv_heads, head_dim)
    kv.key.normal_()
    kv.value.normal_()
    used = set(metadata.block_tables.flatten().tolist())
    for block in set(range(num_blocks)) - used:  # touching these would show
        kv.key[block] = 1e4
        kv.value[block] = 1e4
    query = torch.randn(metadata.num_tokens, num_heads, head_dim).to(dtype)
    new = torch.randn(2, metadata.num_tokens, num_kv_heads, head_dim).to(dtype)
    with torch.inference_mode():
        backend.prepare(metadata)
        backend.write_kv(torch.cat((query, *new), dim=1), kv, metadata)
        got = backend.forward(query, kv, metadata)
    flat = kv.key.reshape(-1, num_kv_heads, head_dim)
    assert torch.equal(flat[metadata.slot_mapping], new[0])
    want = expected(query, kv, metadata, lengths, head_dim**-0.5)
    assert got.dtype is dtype
    assert (got - want).abs().max() < (1e-5 if dtype is torch.float32 else 2e-2)


def test_padding_never_more_than_doubles_the_work() -> None:
    backend = TorchBackend(2, 2, 8, scale=1.0)
    metadata, _ = build([(1, n) for n in (1, 2, 500, 3, 260, 240, 60, 510)], 8, 4)
    backend.prepare(metadata)
    for decodes in metadata.state.decodes:
        lengths = decodes.visible.sum(-1).flatten().tolist()
        assert min(lengths) >= 0.5 * max(lengths)
    assert sum(d.visible.shape[0] for d in metadata.state.decodes) == 8


def test_a_cache_costs_no_memory_before_it_is_written() -> None:
    import resource

    backend = TorchBackend(8, 8, 128, scale=1.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kv = backend.allocate(8192, 32, torch.bfloat16, torch.device("cpu"))  # 1 GiB
    assert kv.key.nelement() * 2 * 2 == 2**30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    assert kv.value[8191].count_nonzero() == 0
