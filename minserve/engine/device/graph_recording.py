"""Records all graphs of all models, says beforehand what memory they need, and checks them.

Memory is measured on a few graphs, before the KV cache takes what is free: graphs are bound to the
cache that they read, so that those of the few are thrown away. Checked is one replay of each kind,
beside the same pass without a graph.
"""

from __future__ import annotations

import gc
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping

import torch

from minserve.blocks import blocks_for
from minserve.config import EngineConfig
from minserve.engine.device.batch_tensors import Chunk
from minserve.engine.device.cuda_graphs import GraphLimits, Recorder, decode_layouts
from minserve.engine.device.mixed_graphs import ModelGraphs, mixed_limit, mixed_sizes
from minserve.engine.device.paged_model import PagedModel
from minserve.machine import GIB

log = logging.getLogger(__name__)

# Of each kind, how many graphs beside the largest are recorded to learn what one more takes.
MEASURED = 3
# What is computed in another order, in other tiles, differs by rounding: the most, as a share of the
# length of a token's hidden state.
MOST_DIFFERENCE = {torch.float32: 1e-2, torch.float16: 0.05, torch.bfloat16: 0.15}
CHECKED_TOKENS = 24

Limits = Mapping[PagedModel, GraphLimits]


def limits_of(
    config: EngineConfig, models: Mapping[PagedModel, int], max_seq_len: int
) -> dict[PagedModel, GraphLimits]:
    """Return the largest batches of each model for which there are to be graphs.

    Args:
        models: each with the most query tokens of one of its decodes.
        max_seq_len: the most tokens of a sequence.
    """
    found = {}
    for one, max_queries in models.items():
        budget = config.budget_on(one.device.type)
        found[one] = GraphLimits(
            max_num_seqs=config.max_num_seqs,
            max_num_tokens=budget,
            max_seq_len=max_seq_len,
            max_queries=(1, max_queries) if max_queries > 1 else (1,),
            mixed=mixed_limit(one.model.shape.hidden_size, budget, config.max_num_seqs),
        )
    return found


def graph_bytes(limits: Limits, recorder: Recorder, free_bytes: Callable[[], int]) -> int:
    """Return how many bytes of a device all graphs will take.

    The largest graphs need memory for what they compute, in which all others find room; each one
    needs a little for its results and arguments.

    Args:
        free_bytes: returns how many bytes of the device are free, once it has come to rest.
    """
    before = free_bytes()
    largest = [ModelGraphs(*own, slice(-1, None)) for own in _each(limits, recorder)]
    between = free_bytes()
    more = [ModelGraphs(*own, slice(-1 - MEASURED, -1)) for own in _each(limits, recorder)]
    after = free_bytes()
    num_more = sum(graphs.num_recorded for graphs in more)
    num_all = sum(num_graphs(model, own) for model, own in limits.items())
    num_left = num_all - sum(graphs.num_recorded for graphs in largest)
    each = max(0, between - after) / max(1, num_more)
    return max(0, before - between) + math.ceil(each * num_left)


def num_graphs(model: PagedModel, limits: GraphLimits) -> int:
    """Return how many graphs a model will have."""
    decodes = sum(len(decode_layouts(model, limits, most)) for most in limits.max_queries)
    return decodes + (len(mixed_sizes(limits.mixed.max_tokens)) if limits.mixed.max_tokens else 0)


def free_on_gpu(device: torch.device) -> int:
    """Return how many bytes of a GPU are free, once it has come to rest."""
    torch.cuda.synchronize(device)
    return torch.cuda.mem_get_info(device)[0]


def free_beside_graphs(limits: Limits, recorder: Recorder, device: torch.device) -> int:
    """Return how many bytes of a GPU are free now, without what graphs will take.

    Call it after a dry run, whose memory torch keeps until here, so that it does not count as free.
    """
    free = free_on_gpu(device)
    held = graph_bytes(limits, recorder, lambda: free_on_gpu(device))
    gc.collect()
    torch.cuda.empty_cache()
    log.debug("%.3f GiB of a GPU are free, of which graphs need %.3f", free / GIB, held / GIB)
    return free - held


def record_all(limits: Limits, recorder: Recorder) -> None:
    """Record the graphs of all models; those that are found wrong are given up, with a warning.

    The models' KV caches must be those that they keep, and nobody's yet.
    """
    for own in _each(limits, recorder):
        model, graphs = own[0], ModelGraphs(*own)
        if not _are_right(model, graphs, _decodes(model), "decodes"):
            continue
        if graphs.mixed.max_tokens and not _are_right(
            model, graphs, _mixed(model), "batches with prefills"
        ):
            graphs.without_mixed()
        model.graphs = graphs


def _each(limits: Limits, recorder: Recorder) -> Iterator[tuple[PagedModel, Recorder, GraphLimits]]:
    for model, own in limits.items():
        yield model, recorder, own


def _are_right(model: PagedModel, graphs: ModelGraphs, chunks: list[Chunk], words: str) -> bool:
    """Return whether a replay gives what the pass itself gives; log it where it does not."""
    num_decodes = sum(chunk.start > 0 for chunk in chunks)
    got = graphs.forward(chunks, num_decodes)
    if got is None:  # the engine is smaller than this batch
        return True
    expected = model.forward(chunks, num_decodes).float()
    off = float(((got.float() - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
    if off <= MOST_DIFFERENCE[got.dtype]:  # which no NaN is
        return True
    log.warning(
        "CUDA graphs of %s are off by %.2g of what they should give; such batches run without. "
        "Please report this, with your GPU, driver and torch %s",
        words,
        off,
        torch.__version__,
    )
    return False


def _decodes(model: PagedModel) -> list[Chunk]:
    """Return two decodes behind a context, which is written to the first blocks."""
    first, second = _prompts(model)
    model.forward([first, second], 0)
    return [
        Chunk(one.token_ids[-1:], len(one.token_ids) - 1, one.block_table)
        for one in (first, second)
    ]


def _mixed(model: PagedModel) -> list[Chunk]:
    """Return one of these decodes, and a prefill of the other's context."""
    return [_decodes(model)[0], _prompts(model)[1]]


def _prompts(model: PagedModel) -> tuple[Chunk, Chunk]:
    """Return two random prompts, each with half of the first blocks for itself."""
    size, num_blocks = model.block_size, model.kv[0].key.shape[0]
    length = max(2, min(CHECKED_TOKENS, num_blocks // 2 * size, model.model.shape.max_positions))
    width, rng = blocks_for(length, size), random.Random(0)
    words = range(model.model.shape.vocab_size)
    first, second = (
        Chunk(rng.choices(words, k=length), 0, list(range(begin, begin + width)))
        for begin in (0, width)
    )
    return first, second
