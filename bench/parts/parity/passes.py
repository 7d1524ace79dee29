"""minserve's side of the comparison: mixed batches of prefill chunks and decodes, and the engine."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from minserve.engine.block_pool import BlockPool
from minserve.engine.core import EngineCore
from minserve.engine.device.kv_cache import allocate_kv_cache
from minserve.engine.device.runner import ModelRunner
from minserve.kernels.attention import (
    AttentionBackend,
    AttentionMetadata,
    LayerKV,
    make_attention_backend,
)
from minserve.models.base import CausalLM
from minserve.models.finding.source import find_model, load_config
from minserve.models.layers import WeightPlacement
from minserve.models.ranks import ALONE, Ranks
from minserve.models.registry import build_model
from minserve.models.weights.loader import open_checkpoint
from minserve.planner.policies.registry import make_planner
from minserve.request import Request, Sequence
from minserve.sampling_params import SamplingParams
from parts.parity.rank_threads import DividedModel, RankThreads

BLOCK_SIZE, NUM_BLOCKS = 16, 64


def load(
    path: Path, dtype: str = "float32", longest: int | None = None, ranks: Ranks = ALONE
) -> tuple[CausalLM, WeightPlacement]:
    """Load the saved model in minserve, on the CPU, for sequences of up to ``longest`` tokens."""
    source = find_model(str(path))
    placement = WeightPlacement.choose(torch.device("cpu"), dtype)
    with open_checkpoint(source) as checkpoint:
        config = load_config(source)
        return build_model(checkpoint, config, placement, longest, ranks), placement


def load_divided(
    path: Path, threads: RankThreads, dtype: str = "float32", longest: int | None = None
) -> tuple[CausalLM, WeightPlacement]:
    """Do as `load`, with a part of the model in each of several threads."""
    loaded = threads.on_each(lambda ranks: load(path, dtype, longest, ranks))
    placement = loaded[0][1]
    return join_parts(threads, [model for model, _ in loaded], placement), placement


def join_parts(threads: RankThreads, parts: list[CausalLM], placement: WeightPlacement) -> CausalLM:
    """Return the model whose parts the ranks have."""
    return DividedModel(threads, parts, [_attention(part, placement) for part in parts[1:]])


def make_runner(model: CausalLM, placement: WeightPlacement) -> ModelRunner:
    """Return a runner with the torch backend and a small cache."""
    return ModelRunner(model, *_attention(model, placement), BLOCK_SIZE, placement.device)


def _attention(
    model: CausalLM, placement: WeightPlacement
) -> tuple[AttentionBackend, list[LayerKV]]:
    s = model.shape
    backend = make_attention_backend("torch", s.num_heads, s.num_kv_heads, s.head_dim, s.scale)
    kv = allocate_kv_cache(
        backend, s.num_layers, NUM_BLOCKS, BLOCK_SIZE, placement.dtype, placement.device
    )
    return backend, kv


@torch.inference_mode()
def chunked_logits(
    runner: ModelRunner, token_lists: list[list[int]], chunk: int
) -> list[torch.Tensor]:
    """Return the logits of every position, from mixed batches of chunks over scattered blocks."""
    num_blocks = runner.kv[0].key.shape[0]
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(2)).tolist()
    tables = []
    for tokens in token_lists:
        need = -(-len(tokens) // BLOCK_SIZE)
        tables.append([order.pop() for _ in range(need)])
    done = [0] * len(token_lists)
    rows: list[list[torch.Tensor]] = [[] for _ in token_lists]
    while any(d < len(t) for d, t in zip(done, token_lists, strict=True)):
        live = [i for i, tokens in enumerate(token_lists) if done[i] < len(tokens)]
        ends = {i: min(done[i] + chunk, len(token_lists[i])) for i in live}
        # A chunk of one token is a decode to the backend; decodes come first.
        live.sort(key=lambda i: ends[i] - done[i] > 1)
        logits = _forward(runner, live, ends, done, token_lists, tables)
        start = 0
        for i in live:
            count = ends[i] - done[i]
            rows[i].append(logits[start : start + count])
            start, done[i] = start + count, ends[i]
    return [torch.cat(r) for r in rows]


def _forward(
    runner: ModelRunner,
    live: list[int],
    ends: dict[int, int],
    done: list[int],
    token_lists: list[list[int]],
    tables: list[list[int]],
) -> torch.Tensor:
    spans = [(i, p) for i in live for p in range(done[i], ends[i])]
    starts = [0]
    for i in live:
        starts.append(starts[-1] + ends[i] - done[i])
    widest = max(len(tables[i]) for i in live)
    metadata = AttentionMetadata(
        query_start_loc=starts,
        seq_lens=[ends[i] for i in live],
        block_tables=torch.tensor([tables[i] + [0] * (widest - len(tables[i])) for i in live]),
        slot_mapping=torch.tensor(
            [tables[i][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for i, p in spans]
        ),
        block_size=BLOCK_SIZE,
        num_decodes=sum(ends[i] - done[i] == 1 for i in live),
    )
    runner.backend.prepare(metadata)
    token_ids = torch.tensor([token_lists[i][p] for i, p in spans])
    positions = torch.tensor([p for _, p in spans])
    hidden = runner.model.forward(token_ids, positions, runner.kv, runner.backend, metadata)
    return runner.model.logits(hidden)


def greedy(runner: ModelRunner, token_lists: list[list[int]], num_tokens: int) -> list[list[int]]:
    """Return greedy continuations from the engine core, with all prompts in one batch."""
    pool = BlockPool(runner.kv[0].key.shape[0], BLOCK_SIZE)
    core = EngineCore(runner, pool, make_planner("sarathi"), token_budget=50, max_num_seqs=8,
                      max_model_len=pool.num_blocks * pool.block_size, clock=time.monotonic)  # fmt: skip
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens)
    sequences = [
        Sequence(Request(request_id=str(i), prompt_token_ids=tuple(t), params=params, seed=0, arrival_s=float(i)))
        for i, t in enumerate(token_lists)
    ]  # fmt: skip
    for sequence in sequences:
        core.add(sequence, None)
    while core.has_work:
        core.step()
    return [s.output_token_ids for s in sequences]
