"""Padding, buffers and the choice of graphs, with replays that run the work again.

Whatever a graph would find at fixed places these replays find there too: nothing of a batch
reaches them in another way.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from padded_backend import PaddedBackend, Rerun
from torch import Tensor

from minserve import Engine, SamplingParams
from minserve.engine.device import cuda_graphs
from minserve.engine.device.batch_tensors import Chunk, unknown_token
from minserve.engine.device.cuda_graphs import DecodeGraphs, GraphLimits, Recorder, padded_sizes
from minserve.engine.device.kv_cache import allocate_kv_cache
from minserve.engine.device.paged_model import PagedModel
from minserve.kernels.attention import AttentionBackend, make_attention_backend
from minserve.kernels.torch_backend import TorchBackend
from minserve.models.base import CausalLM
from minserve.models.finding.source import find_model, load_config
from minserve.models.layers import WeightPlacement
from minserve.models.registry import build_model
from minserve.models.weights.loader import open_checkpoint

CPU = torch.device("cpu")
BLOCK, NUM_BLOCKS = 16, 60
LIMITS = GraphLimits(max_num_seqs=10, max_num_tokens=24, max_seq_len=160, max_queries=(1, 4))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Work this small is slowed down by threads that wait for each other."""
    num = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num)


@pytest.fixture(scope="module", params=["llama", "opt"])
def model(request: pytest.FixtureRequest) -> CausalLM:
    return load(request.getfixturevalue(f"tiny_{request.param}_dir"))


def load(folder: Path, fused: bool = False) -> CausalLM:
    source, placement = find_model(str(folder)), WeightPlacement.choose(CPU, "float32", fused)
    with open_checkpoint(source) as checkpoint:
        return build_model(checkpoint, load_config(source), placement)


def paged(model: CausalLM, make: Callable[..., AttentionBackend]) -> PagedModel:
    """With random KV in every block, so that a look or a write at a wrong place shows."""
    shape = model.shape
    backend = make(shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.scale)
    kv = allocate_kv_cache(backend, shape.num_layers, NUM_BLOCKS, BLOCK, torch.float32, CPU)
    generator = torch.Generator().manual_seed(0)
    for layer in kv:
        for x in (layer.key, layer.value):
            x.copy_(torch.randn(x.shape, generator=generator))
    return PagedModel(model, backend, kv, BLOCK, CPU)


def random_batches(num: int, most: int, seed: int) -> list[list[Chunk]]:
    """Decodes (verifications, where ``most`` is above 1) over blocks that no two of them share."""
    rng = random.Random(seed)
    batches = []
    for _ in range(num):
        free = rng.sample(range(NUM_BLOCKS), NUM_BLOCKS)
        batch: list[Chunk] = []
        for _ in range(rng.randint(1, LIMITS.max_num_seqs)):
            count = rng.randint(1, most)
            start = rng.choice((1, BLOCK - 1, BLOCK, rng.randrange(1, 5 * BLOCK)))
            table = [free.pop() for _ in range(-(-(start + count) // BLOCK))]
            batch.append(Chunk([rng.randrange(500) for _ in range(count)], start, table))
        while sum(len(chunk.token_ids) for chunk in batch) > LIMITS.max_num_tokens:
            batch.pop()
        batches.append(batch)
    return batches


class Counting(Recorder):
    """Counts replays."""

    def __init__(self) -> None:
        self.num_records = self.num_replays = 0

    def record(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        again = Rerun().record(work)
        self.num_records += 1

        def replay() -> Tensor:
            self.num_replays += 1
            return again()

        return replay


def assert_same_pass(one: PagedModel, other: PagedModel, chunks: list[Chunk]) -> None:
    """The same hidden states and, in the whole cache, the same keys and values.

    But torch's backend clears slots of blocks that nobody has written yet, and a replay does not.
    """
    got, expected = (x.forward(chunks, len(chunks)) for x in (one, other))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(one.kv, other.kv, strict=True):
        for got, expected in ((mine.key, theirs.key), (mine.value, theirs.value)):
            torch.testing.assert_close(
                torch.where(expected == 0.0, expected, got), expected, rtol=1e-4, atol=1e-4
            )
            got.copy_(expected)  # what the next batch takes for its context


@pytest.mark.parametrize("most", [1, 4], ids=["decodes", "verifications"])
@pytest.mark.parametrize("sent", ["whole", "in parts"])
def test_a_replay_gives_what_the_pass_itself_gives(
    model: CausalLM, most: int, sent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "SENT_WHOLE", 10**6 if sent == "whole" else 0)
    replayed, plain = paged(model, PaddedBackend), paged(model, TorchBackend)
    counting = Counting()
    replayed.graphs = DecodeGraphs(replayed, counting, LIMITS)
    batches = random_batches(6, most, seed=most)
    for chunks in batches:
        assert_same_pass(replayed, plain, chunks)
    assert counting.num_replays == len(batches)


@pytest.mark.parametrize("sent", ["whole", "in parts"])
@pytest.mark.parametrize("with_graphs", [True, False], ids=["graphs", "passes"])
def test_tokens_may_come_from_the_device_itself(
    model: CausalLM, sent: str, with_graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "SENT_WHOLE", 10**6 if sent == "whole" else 0)
    one, plain = paged(model, PaddedBackend), paged(model, TorchBackend)
    if with_graphs:
        one.graphs = DecodeGraphs(one, Rerun(), LIMITS)
    rng = random.Random(0)
    for chunks in random_batches(4, 1, seed=9):
        newest = torch.tensor([rng.randrange(500) for _ in range(12)])
        rows = [rng.choice([None, rng.randrange(12)]) for _ in chunks]
        unread, known = (
            [
                chunk if row is None else chunk._replace(token_ids=[token(row)])
                for chunk, row in zip(chunks, rows, strict=True)
            ]
            for token in (unknown_token, newest.tolist().__getitem__)
        )
        got = one.forward(unread, len(chunks), newest)
        expected = plain.forward(known, len(chunks))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        for mine, theirs in zip(one.kv, plain.kv, strict=True):
            mine.key.copy_(theirs.key)
            mine.value.copy_(theirs.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs Triton's interpreter on the CPU")
@pytest.mark.parametrize("most", [1, 4], ids=["decodes", "verifications"])
def test_a_replay_of_triton_kernels_gives_what_the_pass_itself_gives(
    tiny_llama_dir: Path, most: int
) -> None:
    replayed = paged(
        load(tiny_llama_dir, fused=True), lambda *shape: make_attention_backend("triton", *shape)
    )
    assert replayed.backend.supports_graphs
    limits = GraphLimits(max_num_seqs=4, max_num_tokens=8, max_seq_len=160, max_queries=(most,))
    replayed.graphs = DecodeGraphs(replayed, Rerun(), limits)
    plain = paged(load(tiny_llama_dir), TorchBackend)
    for chunks in random_batches(2, most, seed=most):
        assert_same_pass(replayed, plain, chunks[:2])


def test_recording_leaves_the_cache_as_it_was(model: CausalLM) -> None:
    paged_model, untouched = paged(model, PaddedBackend), paged(model, PaddedBackend)
    DecodeGraphs(paged_model, Rerun(), LIMITS)
    for mine, theirs in zip(paged_model.kv, untouched.kv, strict=True):
        assert torch.equal(mine.key, theirs.key)
        assert torch.equal(mine.value, theirs.value)


def test_one_graph_is_recorded_for_each_size_of_each_family(tiny_opt_dir: Path) -> None:
    counting, model = Counting(), paged(load(tiny_opt_dir), PaddedBackend)
    DecodeGraphs(model, counting, LIMITS)
    assert padded_sizes(10) == [1, 2, 4, 8, 10]
    assert padded_sizes(24) == [1, 2, 4, 8, 16, 24]
    assert counting.num_records == 5 + 6


def test_what_fits_no_graph_runs_without(tiny_opt_dir: Path) -> None:
    model = paged(load(tiny_opt_dir), PaddedBackend)
    counting = Counting()
    model.graphs = DecodeGraphs(model, counting, LIMITS)
    decode = Chunk([7], 20, [3, 4])
    for chunks in (
        [decode] * 11,  # sequences
        [Chunk([7] * 4, 20, [3, 4])] * 7,  # tokens
        [Chunk([7] * 5, 20, [3, 4])],  # query tokens of one sequence
        [decode, Chunk([7], 20, list(range(11)))],  # blocks
    ):
        assert model.graphs.forward(chunks, len(chunks)) is None
        assert model.forward(chunks, len(chunks)).shape[0] == sum(len(c.token_ids) for c in chunks)
    assert model.forward([decode, Chunk([7, 8], 0, [9])], 1).shape[0] == 3  # a prefill
    assert counting.num_replays == 0
    model.forward([decode], 1)
    assert counting.num_replays == 1


@pytest.mark.parametrize("largest", [1, 2, 3, 7, 8, 9, 100, 128, 513, 4096])
def test_padding_is_small(largest: int) -> None:
    sizes = padded_sizes(largest)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == largest
    for size, larger in pairwise(sizes):
        assert larger - size <= max(8, size / 8)
    assert len(sizes) < 60


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("speculator", ["off", "ngram"])
def test_an_engine_with_cuda_graphs_says_what_it_says_without(
    tiny_llama_dir: Path, speculator: str
) -> None:
    prompts = ["The quick brown fox", "def add(a, b):", "x", "one two one two one two"]
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    outputs = []
    for with_graphs in (True, False):
        engine = Engine(str(tiny_llama_dir), dtype="float32", device="cuda", num_blocks=200,
                        token_budget=64, max_num_seqs=16, policy="sarathi", max_speculation=3,
                        speculator=speculator, cuda_graphs=with_graphs)  # fmt: skip
        assert (engine._core.runner.graphs is not None) == with_graphs
        results = engine.generate(prompts, params)
        outputs.append([result.outputs[0].token_ids for result in results])
    assert outputs[0] == outputs[1]
