"""What rank 0 tells of a pass is all that another rank needs to run it."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from padded_backend import PaddedBackend, Rerun

from minserve.engine.device.batch_tensors import Chunk
from minserve.engine.device.cuda_graphs import DecodeGraphs, GraphLimits
from minserve.engine.device.kv_cache import allocate_kv_cache
from minserve.engine.device.runner import ModelRunner
from minserve.engine.ranks.following import follow
from minserve.engine.ranks.leading import Leader
from minserve.engine.ranks.line import Line, LineEnd, Verb
from minserve.models.finding.source import find_model, load_config
from minserve.models.layers import WeightPlacement
from minserve.models.registry import build_model
from minserve.models.weights.loader import open_checkpoint

CPU = torch.device("cpu")
BLOCK, NUM_BLOCKS = 16, 40
LIMITS = GraphLimits(max_num_seqs=6, max_num_tokens=12, max_seq_len=96, max_queries=(1, 3))


@pytest.fixture
def runners(tiny_llama_dir: Path) -> tuple[ModelRunner, ModelRunner]:
    """Two of the same model, whose passes over decodes are recorded."""
    source, placement = find_model(str(tiny_llama_dir)), WeightPlacement.choose(CPU, "float32")
    with open_checkpoint(source) as checkpoint:
        model = build_model(checkpoint, load_config(source), placement)
    return _runner(model), _runner(model)


def _runner(model: Any) -> ModelRunner:
    shape = model.shape
    backend = PaddedBackend(shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.scale)
    kv = allocate_kv_cache(backend, shape.num_layers, NUM_BLOCKS, BLOCK, torch.float32, CPU)
    runner = ModelRunner(model, backend, kv, BLOCK, CPU)
    runner.graphs = DecodeGraphs(runner, Rerun(), LIMITS)
    return runner


def test_another_rank_runs_and_replays_the_same_passes(
    runners: tuple[ModelRunner, ModelRunner],
) -> None:
    first, other = runners
    keeper: Any = SimpleNamespace(check=lambda: None, lost=None)
    # Logits take their hidden states from a broadcast, which is not part of this test.
    group: Any = SimpleNamespace(ranks=None, size=2)
    end, begin = os.pipe()
    first.company = Leader(group, Line([begin]), keeper)
    following = threading.Thread(target=follow, args=(other, group, LineEnd(end)))
    following.start()
    rng = random.Random(0)
    tables = [list(range(6 * i, 6 * i + 6)) for i in range(6)]
    first.forward([Chunk(rng.choices(range(500), k=40), 0, table) for table in tables], 0)
    for count in (1, 3, 1, 2):
        first.forward(
            [
                Chunk(rng.choices(range(500), k=count), 40 + i, table)
                for i, table in enumerate(tables[: 12 // count])
            ],
            min(6, 12 // count),
        )
    first.company = None  # which closes the line
    following.join()
    for mine, theirs in zip(first.kv, other.kv, strict=True):
        assert mine.key.any()
        assert torch.equal(mine.key, theirs.key)
        assert torch.equal(mine.value, theirs.value)


def test_an_order_of_any_length_arrives_whole_and_the_end_of_the_line_is_told() -> None:
    end, begin = os.pipe()
    line, found = Line([begin]), []
    receiving = threading.Thread(target=lambda: found.extend(_all(LineEnd(end))))
    receiving.start()
    payloads = [None, torch.arange(5), torch.arange(300_000)]
    for payload in payloads:
        line.send(Verb.FORWARD, (7, 2), payload)
    del line
    receiving.join()
    assert len(found) == len(payloads)
    for order, payload in zip(found, payloads, strict=True):
        assert (order.verb, order.numbers[:3]) == (Verb.FORWARD, (7, 2, 0))
        assert order.payload.tolist() == ([] if payload is None else payload.tolist())


def _all(line: LineEnd) -> list[Any]:
    orders = []
    while True:
        try:
            orders.append(line.receive())
        except EOFError:
            return orders
