"""The torch backend against attention written out, over scattered and poisoned blocks."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_exact_as
from attention_cases import LLAMA_3_8B, check_attention, expected, make_metadata

from minserve.kernels.torch_backend import TorchBackend

# (query tokens, earlier tokens) of each sequence; decodes first.
BATCHES = {
    "one decode": ([(1, 0)], 1),
    "decodes of like length": ([(1, 40), (1, 33), (1, 47)], 3),
    "decodes of unlike length": ([(1, 3), (1, 400), (1, 30), (1, 390), (1, 7)], 5),
    "verification": ([(3, 20), (1, 25), (3, 90), (5, 11)], 4),
    "fresh prefills": ([(5, 0), (123, 0), (1, 0)], 0),
    "later chunks": ([(16, 5), (123, 64), (1, 31)], 0),
    "chunks of like size": ([(1, 30), (30, 0), (1, 33), (25, 7), (29, 1), (17, 20)], 1),
    "chunks of like size, adjacent": ([(30, 0), (25, 7), (29, 1)], 0),
    "chunks of one size": ([(9, 0), (9, 3), (9, 2)], 0),
    "chunks beside large ones": ([(1, 40), (20, 0), (128, 300), (128, 290), (21, 0)], 1),
    "more queries than a block of them": ([(300, 0), (129, 70)], 0),
    "mixed": ([(1, 77), (1, 12), (40, 0), (17, 100)], 2),
}
HEADS = {"multi-head": (4, 4, 16), "grouped": (6, 2, 16), "one KV head": (4, 1, 80)}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("block_size", [1, 16])
def test_attention_is_right(batch: str, heads: str, dtype: torch.dtype, block_size: int) -> None:
    num_heads, num_kv_heads, head_dim = HEADS[heads]
    backend = TorchBackend(num_heads, num_kv_heads, head_dim, scale=head_dim**-0.5)
    # What a sequence drafted itself lies behind its own tokens, in a block that it entered before.
    check_attention(backend, HEADS[heads], *BATCHES[batch], dtype, block_size, own_tails=1e4)


def test_padding_never_doubles_the_work() -> None:
    backend = TorchBackend(2, 2, 8, scale=1.0)
    decodes = [(1, n) for n in (1, 2, 500, 3, 260, 240, 60, 510)] + [(2, 500), (4, 500), (3, 490)]
    chunks = [(20, 0), (60, 0), (31, 300), (64, 0), (39, 0), (40, 3), (128, 200), (128, 200)]
    metadata, _ = make_metadata([*decodes, *chunks], len(decodes), 4)
    backend.prepare(metadata)
    groups = metadata.state.groups
    for group in groups:
        lengths = group.visible[:, -1].sum(-1).tolist()
        assert min(lengths) >= 0.5 * max(lengths)
        rows = group.tokens
        num_tokens = rows.stop - rows.start if isinstance(rows, slice) else len(rows.unique())
        assert num_tokens > 0.5 * group.visible.shape[0] * group.visible.shape[1]
    assert sum(group.visible.shape[0] for group in groups) + len(metadata.state.singles) == 19
    # Large chunks run alone, whatever they have in common.
    assert {one.tokens.stop - one.tokens.start for one in metadata.state.singles} >= {128}
    assert all(group.visible.shape[1] < 128 for group in groups)


def test_a_cache_costs_no_memory_before_it_is_written() -> None:
    import resource

    backend = TorchBackend(8, 8, 128, scale=1.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kv = backend.allocate(8192, 32, torch.bfloat16, torch.device("cpu"))  # 1 GiB
    assert kv.key.nelement() * 2 * 2 == 2**30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    assert kv.value[8191].count_nonzero() == 0


@pytest.mark.parametrize("lengths", [(1, 300), (1, 1), (7, 90), (200, 64)])
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16])
def test_a_lone_sequence_is_computed_in_its_queries_dtype(
    lengths: tuple[int, int], kv_dtype: torch.dtype
) -> None:
    num_heads, num_kv_heads, head_dim = LLAMA_3_8B
    backend = TorchBackend(num_heads, num_kv_heads, head_dim, scale=head_dim**-0.5)
    metadata, num_blocks = make_metadata([lengths], int(lengths[0] == 1), 16)
    torch.manual_seed(0)
    kv = backend.allocate(num_blocks, 16, kv_dtype, torch.device("cpu"))
    for part in (kv.key, kv.value):
        part.copy_(torch.randn(part.shape))
    query = torch.randn(metadata.num_tokens, num_heads, head_dim)
    backend.prepare(metadata)
    got = backend.forward(query, kv, metadata)
    want = expected(query, kv, metadata)
    assert_as_exact_as(expected(query, kv, metadata, torch.float32), got, want)


def test_blocks_side_by_side_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TorchBackend(4, 2, 16, scale=0.25)
    kv = backend.allocate(9, 4, torch.float32, torch.device("cpu"))
    for part in (kv.key, kv.value):
        part.copy_(torch.randn(part.shape))

    def refuse(*_: object) -> None:
        raise AssertionError("gathered")

    for table in ([3, 4, 5], [5, 3, 4]):
        metadata, _ = make_metadata([(1, 10)], 1, 4)
        metadata.block_tables = torch.tensor([table])
        query = torch.randn(1, 4, 16)
        backend.prepare(metadata)
        with monkeypatch.context() as patch:
            if table == [3, 4, 5]:
                patch.setattr(backend, "_place", refuse)
            got = backend.forward(query, kv, metadata)
        assert (got - expected(query, kv, metadata)).abs().max() < 1e-5
