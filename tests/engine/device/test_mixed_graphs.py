"""Graphs of batches with prefills: what they give, which are recorded, and what fits none of them.

As in `test_cuda_graphs.py`, a replay does its work again with what stands at fixed places.
"""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from padded_backend import PaddedBackend, Rerun
from test_cuda_graphs import BLOCK, CPU, NUM_BLOCKS, Counting, load, paged

from minserve.engine.device.batch_tensors import Chunk
from minserve.engine.device.cuda_graphs import GraphLimits
from minserve.engine.device.mixed_graphs import (
    MOST_TOKENS,
    MixedGraphs,
    ModelGraphs,
    mixed_limit,
    mixed_sizes,
)
from minserve.engine.device.paged_model import PagedModel
from minserve.kernels.attention import make_attention_backend
from minserve.kernels.torch_backend import TorchBackend
from minserve.planner.predict.eager import NO_MIXED, MixedLimit, is_eager

LIMITS = GraphLimits(
    max_num_seqs=6,
    max_num_tokens=200,
    max_seq_len=160,
    max_queries=(1, 4),
    mixed=MixedLimit(max_tokens=100, max_chunks=3),
)


def random_mixed_batch(
    rng: random.Random, most: int, limits: GraphLimits
) -> tuple[list[Chunk], int]:
    """Decodes (verifications, where ``most`` is above 1), then chunks, over blocks of their own."""
    free = rng.sample(range(NUM_BLOCKS), NUM_BLOCKS)

    def chunk(count: int, start: int) -> Chunk:
        table = [free.pop() for _ in range(-(-(start + count) // BLOCK))]
        return Chunk([rng.randrange(500) for _ in range(count)], start, table)

    num_decodes = rng.randint(0, limits.max_num_seqs - 1)
    starts = (1, BLOCK - 1, BLOCK, 40, 77)
    decodes = [chunk(rng.randint(1, most), rng.choice(starts)) for _ in range(num_decodes)]
    num_chunks = rng.randint(1, min(limits.mixed.max_chunks, limits.max_num_seqs - num_decodes))
    left = limits.mixed.max_tokens - sum(len(one.token_ids) for one in decodes)
    chunks = []
    for _ in range(num_chunks):
        size = min(left, rng.choice((1, 3, BLOCK, 30, 65)))
        if size > 0:
            chunks.append(chunk(size, rng.choice((0, 5, BLOCK, 70))))
            left -= size
    return [*decodes, *chunks], num_decodes


def assert_same_pass(
    replayed: PagedModel, plain: PagedModel, chunks: list[Chunk], num_decodes: int
) -> None:
    """The same hidden states, and the same keys and values of the batch's tokens."""
    got, expected = (x.forward(chunks, num_decodes) for x in (replayed, plain))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(replayed.kv, plain.kv, strict=True):
        for one, other in ((mine.key, theirs.key), (mine.value, theirs.value)):
            # Torch's backend clears slots of blocks that nobody has written yet.
            torch.testing.assert_close(
                torch.where(other == 0.0, other, one), other, rtol=1e-4, atol=1e-4
            )
            one.copy_(other)


@pytest.mark.parametrize("most", [1, 4], ids=["decodes", "verifications"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_replay_gives_what_the_mixed_pass_itself_gives(
    family: str, most: int, request: pytest.FixtureRequest
) -> None:
    model = load(request.getfixturevalue(f"tiny_{family}_dir"))
    replayed, plain = paged(model, PaddedBackend), paged(model, TorchBackend)
    counting, rng = Counting(), random.Random(most)
    replayed.graphs = ModelGraphs(replayed, counting, LIMITS)
    for _ in range(8):
        assert_same_pass(replayed, plain, *random_mixed_batch(rng, most, LIMITS))
    assert counting.num_replays == 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs Triton's interpreter on the CPU")
def test_a_replay_of_triton_kernels_gives_what_the_mixed_pass_itself_gives(
    tiny_llama_dir: Path,
) -> None:
    limits = GraphLimits(3, 100, 160, (3,), MixedLimit(80, 2))
    replayed = paged(
        load(tiny_llama_dir, fused=True), lambda *shape: make_attention_backend("triton", *shape)
    )
    counting, rng = Counting(), random.Random(1)
    replayed.graphs = MixedGraphs(replayed, counting, limits, slice(-1, None))
    replayed.graphs.mixed = limits.mixed
    plain = paged(load(tiny_llama_dir), TorchBackend)
    for _ in range(2):
        assert_same_pass(replayed, plain, *random_mixed_batch(rng, 3, limits))
    assert counting.num_replays == 2


def test_the_rule_says_of_every_batch_whether_a_graph_fits(tiny_opt_dir: Path) -> None:
    model, counting = paged(load(tiny_opt_dir), PaddedBackend), Counting()
    model.graphs = graphs = ModelGraphs(model, counting, LIMITS)
    decode = Chunk([7], 20, [3, 4])
    cases = [
        ([decode, Chunk([7] * 99, 0, list(range(5, 12)))], 1),
        ([decode, Chunk([7] * 100, 0, list(range(5, 12)))], 1),  # tokens
        ([Chunk([7], 0, [i]) for i in range(3)], 0),
        ([Chunk([7], 0, [i]) for i in range(4)], 0),  # chunks
        ([decode] * 6, 6),
    ]
    for chunks, num_decodes in cases:
        num_tokens = sum(len(chunk.token_ids) for chunk in chunks)
        eager = is_eager(len(chunks), num_decodes, num_tokens, graphs.mixed)
        assert (graphs.forward(chunks, num_decodes) is None) == eager
        before = counting.num_replays
        assert len(model.forward(chunks, num_decodes)) == num_tokens
        assert counting.num_replays == before + (not eager)
    graphs.without_mixed()
    assert graphs.mixed == NO_MIXED
    assert graphs.forward(*cases[0]) is None


def test_few_sizes_are_recorded_and_padding_is_bounded() -> None:
    assert mixed_sizes(100) == [16, 32, 48, 64, 80, 96, 100]
    for largest in (32, 336, 1390, MOST_TOKENS):
        sizes = mixed_sizes(largest)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == largest
        assert len(sizes) < 32
        for size, larger in pairwise(sizes):
            assert larger - size <= max(16, size / 4)


@pytest.mark.parametrize(
    ("hidden_size", "budget", "max_tokens"),
    [
        (576, 8192, MOST_TOKENS),  # SmolLM2
        (576, 512, 512),
        (2048, 8192, 1376),  # Llama 1B
        (4096, 8192, 336),  # Llama 8B
        (8192, 8192, 0),  # Llama 70B, whose weights take longer to read than kernels to launch
        (2048, 8, 0),
    ],
)
def test_the_rule_by_the_size_of_models(hidden_size: int, budget: int, max_tokens: int) -> None:
    limit = mixed_limit(hidden_size, budget, max_num_seqs=64)
    assert limit == (MixedLimit(max_tokens, 16) if max_tokens else NO_MIXED)


def test_recording_mixed_batches_leaves_the_cache_as_it_was(tiny_llama_dir: Path) -> None:
    model = load(tiny_llama_dir)
    recorded, untouched = paged(model, PaddedBackend), paged(model, PaddedBackend)
    MixedGraphs(recorded, Rerun(), LIMITS)
    for mine, theirs in zip(recorded.kv, untouched.kv, strict=True):
        assert torch.equal(mine.key, theirs.key)
        assert torch.equal(mine.value, theirs.value)
    assert recorded.device == CPU
