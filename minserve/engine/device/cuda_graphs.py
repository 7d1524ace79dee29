"""CUDA graphs of passes over decodes: recorded once for each padded size, replayed for any batch.

A pass over decodes is hundreds of small kernels, which a GPU runs faster than the host can
launch them one by one; a graph launches all of them at once. What a graph reads and writes
is fixed when it is recorded, so that batches are padded to a recorded size and their inputs
are copied to where it looks for them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from minserve.blocks import blocks_for
from minserve.engine.device.batch_tensors import BatchLayout, Chunk, fill_in, place
from minserve.engine.device.paged_model import PagedModel
from minserve.progress_bar import progress_bar

# Sizes up to here are so many tokens apart, larger ones an eighth of themselves.
STEP = 8
SMALLEST_SIZES = (1, 2, 4)
# Inputs of up to so many numbers are sent whole, unused block ids included: one copy is queued
# sooner than those of the parts in use.
SENT_WHOLE = 2**16

Replay = Callable[[], Tensor]


class Recorder(ABC):
    """Records work on a device, to be replayed."""

    @abstractmethod
    def record(self, work: Callable[[], Tensor]) -> Replay:
        """Record what ``work`` queues, which must wait for nothing.

        Returns:
            A function that queues the work again, with the same memory read and written, and
            returns the same tensor as ``work`` did. Its values hold until the next replay.
        """


class CudaRecorder(Recorder):
    """Records CUDA graphs. They share one pool of memory, being replayed one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], Tensor]) -> Replay:
        # Kernels are compiled and libraries make their workspaces when they first run,
        # neither of which can be recorded.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            # Kept for good, so that no other graph is given its memory.
            result = work()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


@dataclass(frozen=True, slots=True)
class GraphLimits:
    """The largest batches for which there are graphs.

    Attributes:
        max_num_seqs: most sequences.
        max_num_tokens: most tokens altogether.
        max_seq_len: most tokens of a sequence, those that have KV already included.
        max_queries: the most tokens of each sequence that are run, ascending; there is a family
            of graphs for each. Plain decodes have 1, verifications ``1 + speculation length``.
    """

    max_num_seqs: int
    max_num_tokens: int
    max_seq_len: int
    max_queries: tuple[int, ...] = (1,)


@dataclass(frozen=True, slots=True)
class _Graph:
    layout: BatchLayout
    replay: Replay


class DecodeGraphs:
    """The graphs of a model's passes over decodes.

    Args:
        model: the model. Its weights and KV must stay where they are from now on.
    """

    def __init__(self, model: PagedModel, recorder: Recorder, limits: GraphLimits) -> None:
        self._model = model
        self._limits = limits
        self._width = blocks_for(limits.max_seq_len, model.block_size)
        layouts = {most: self._layouts(most) for most in limits.max_queries}
        largest = max(own[-1].size for own in layouts.values())
        self._buffer = torch.zeros(largest, dtype=torch.int64, device=model.device)
        self._families: dict[int, list[_Graph]] = {most: [] for most in layouts}
        # The largest first: the others find room in the memory that it needed.
        order = [(layout, most) for most, own in layouts.items() for layout in own]
        order.sort(key=lambda one: one[0].num_tokens, reverse=True)
        for layout, most in progress_bar(order, desc="Recording CUDA graphs"):
            self._families[most].insert(0, self._record(recorder, layout, most))

    @torch.inference_mode()
    def forward(self, chunks: SequenceOf[Chunk], newest: Tensor | None = None) -> Tensor | None:
        """Queue a replay for decodes, or verifications.

        Args:
            newest: as in `PagedModel.forward`.

        Returns:
            The final hidden states ``[num_tokens, hidden]``, which hold until the next replay;
            ``None``, with nothing done, where no graph is large enough.
        """
        needed = BatchLayout.of(chunks)
        graph = self._find(chunks, needed)
        if graph is None:
            return None
        self._fill(chunks, graph.layout, needed.num_blocks)
        if newest is not None:
            fill_in(graph.layout.split(self._buffer[: graph.layout.size]).token_ids, newest)
        return graph.replay()[: needed.num_tokens]

    def _layouts(self, most: int) -> list[BatchLayout]:
        """Return the layouts of one family, ascending."""
        limits = self._limits
        largest = min(limits.max_num_tokens, most * limits.max_num_seqs)
        return [
            BatchLayout(size, min(size, limits.max_num_seqs), self._width)
            for size in padded_sizes(largest)
        ]

    def _find(self, chunks: SequenceOf[Chunk], needed: BatchLayout) -> _Graph | None:
        """Return the smallest graph of the first family that fits."""
        if needed.num_seqs > self._limits.max_num_seqs or needed.num_blocks > self._width:
            return None
        num_queries = max(len(chunk.token_ids) for chunk in chunks)
        for most, graphs in self._families.items():
            if num_queries <= most:
                place = bisect_left(graphs, needed.num_tokens, key=lambda g: g.layout.num_tokens)
                return graphs[place] if place < len(graphs) else None
        return None

    def _fill(self, chunks: SequenceOf[Chunk], layout: BatchLayout, num_blocks: int) -> None:
        """Copy a padded batch to where the graph of a layout reads it.

        Args:
            num_blocks: the width of this batch's block tables. Behind it may stand ids of
                earlier batches, which are never read, being beyond every length.
        """
        model, inputs = self._model, self._buffer[: layout.size]
        if layout.size <= SENT_WHOLE:
            host, _ = place(chunks, layout, model.block_size, model.device)
            inputs.copy_(host, non_blocking=True)
            return
        sent = layout._replace(num_blocks=num_blocks)
        host, _ = place(chunks, sent, model.block_size, model.device)
        part = host.to(model.device, non_blocking=True)
        inputs[: layout.heading].copy_(part[: layout.heading])
        layout.split(inputs).block_tables[:, :num_blocks].copy_(sent.split(part).block_tables)

    @torch.inference_mode()
    def _record(self, recorder: Recorder, layout: BatchLayout, most: int) -> _Graph:
        """Record one graph.

        What the backend knows of the batch on the host must hold for every batch that the
        graph will be replayed for, so it is the worst: every sequence as long as can be and
        with the most query tokens. ``query_start_loc`` thereby ends beyond the tokens of
        the batch. What is true of each batch, padding included, stands in ``starts`` and
        ``lengths`` on the device.
        """
        self._fill([], layout, self._width)
        inputs = layout.split(self._buffer[: layout.size])
        query_start_loc = [most * i for i in range(layout.num_seqs + 1)]
        seq_lens = [self._width * self._model.block_size] * layout.num_seqs

        def work() -> Tensor:
            return self._model.forward_tensors(
                inputs,
                query_start_loc,
                seq_lens,
                layout.num_seqs,
                self._model.kv,
                lengths_known=False,
            )

        return _Graph(layout, recorder.record(work))


def padded_sizes(largest: int) -> list[int]:
    """Return the numbers of tokens to record graphs for, ascending; the last one is ``largest``.

    Small ones are a few tokens apart. Large ones are further apart, so that there are not too
    many of them, but padding is at most an eighth of a batch, or some tokens.
    """
    sizes, size = list(SMALLEST_SIZES), STEP
    while size < largest:
        sizes.append(size)
        size += max(STEP, size // 8 // STEP * STEP)
    return [*(size for size in sizes if size < largest), largest]
