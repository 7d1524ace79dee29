"""What flash-attn is asked for.

Where the library and a GPU are there, it is run; elsewhere a stand-in with the documented
meaning of its two functions shows that lengths, starts and block tables are the right ones.
"""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
from attention_cases import expected, make_metadata, poison

from minserve.config import FLASH_ATTN_PAGE as PAGE
from minserve.errors import BackendUnavailableError
from minserve.kernels.attention import AttentionMetadata, LayerKV
from minserve.kernels.flash_attn import FlashAttnBackend

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HAS_LIBRARY = DEVICE.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
HEADS, KV_HEADS, DIM = 4, 2, 64
BATCHES = {
    "decodes": ([(1, 40), (1, 333)], 2),
    "verification": ([(3, 20), (1, 25), (5, 11)], 3),
    "prefills": ([(5, 0), (123, 264)], 0),
    "mixed": ([(1, 77), (1, 12), (40, 0), (1, 300)], 2),
}


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: list[int],
    lengths: list[int],
    table: torch.Tensor,
) -> torch.Tensor:
    assert table.dtype is torch.int32
    metadata = AttentionMetadata(
        query_start_loc=starts,
        seq_lens=lengths,
        block_tables=table.long(),
        slot_mapping=torch.empty(0),
        block_size=key.shape[1],
        num_decodes=0,
    )
    out = expected(query, LayerKV(key, value), metadata)
    return out.view(query.shape).to(query.dtype)


def with_kvcache(q, k_cache, v_cache, *, cache_seqlens, softmax_scale, causal, block_table):
    assert causal
    assert softmax_scale == pytest.approx(DIM**-0.5)
    assert cache_seqlens.dtype is torch.int32
    batch, queries = q.shape[:2]
    starts = list(range(0, (batch + 1) * queries, queries))
    out = attend(q.flatten(0, 1), k_cache, v_cache, starts, cache_seqlens.tolist(), block_table)
    return out.view(q.shape)


def varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal, block_table):
    assert causal
    assert softmax_scale == pytest.approx(DIM**-0.5)
    assert cu_q.dtype is cu_k.dtype is torch.int32
    lengths = cu_k.diff().tolist()
    assert max_q == cu_q.diff().max()
    assert max_k == max(lengths)
    return attend(q, k, v, cu_q.tolist(), lengths, block_table)


@pytest.fixture(autouse=True)
def _library(monkeypatch: pytest.MonkeyPatch) -> None:
    if not HAS_LIBRARY:
        stand_in = SimpleNamespace(
            flash_attn_with_kvcache=with_kvcache, flash_attn_varlen_func=varlen
        )
        monkeypatch.setitem(sys.modules, "flash_attn", stand_in)


@pytest.mark.parametrize("batch", BATCHES)
def test_attention_is_right(batch: str) -> None:
    lengths, num_decodes = BATCHES[batch]
    metadata, num_blocks = make_metadata(lengths, num_decodes, PAGE, DEVICE)
    backend = FlashAttnBackend(HEADS, KV_HEADS, DIM, DIM**-0.5)
    kv = backend.allocate(num_blocks, PAGE, torch.float16, DEVICE)
    torch.manual_seed(0)
    for part in (kv.key, kv.value):
        part.copy_(torch.randn(part.shape))
    poison(kv, metadata, 1e4)
    qkv = torch.randn(metadata.num_tokens, HEADS + 2 * KV_HEADS, DIM).half().to(DEVICE)
    backend.prepare(metadata)
    backend.write_kv(qkv, kv, metadata)
    got = backend.forward(qkv[:, :HEADS], kv, metadata)
    assert (got - expected(qkv[:, :HEADS], kv, metadata)).abs().max() < 5e-3


def test_a_library_that_does_not_load_is_told_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(BackendUnavailableError, match=r"does not load .*; build it anew"):
        FlashAttnBackend(HEADS, KV_HEADS, DIM, DIM**-0.5)


def test_blocks_and_dtypes_that_it_does_not_know_are_refused() -> None:
    backend = FlashAttnBackend(HEADS, KV_HEADS, DIM, DIM**-0.5)
    with pytest.raises(
        BackendUnavailableError, match="multiple of 256 tokens, not 32; use --block"
    ):
        backend.allocate(4, 32, torch.float16, DEVICE)
    with pytest.raises(BackendUnavailableError, match="not float32; use --attention-backend"):
        backend.allocate(4, PAGE, torch.float32, DEVICE)
