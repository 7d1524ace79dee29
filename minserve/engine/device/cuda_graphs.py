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
from minserve.planner.predict.eager import NO_MIXED, MixedLimit
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
        mixed: the largest batches with prefills (`minserve.engine.device.mixed_graphs`).
    """

    max_num_seqs: int
    max_num_tokens: int
    max_seq_len: int
    max_queries: tuple[int, ...] = (1,)
    mixed: MixedLimit = NO_MIXED


@dataclass(frozen=True, slots=True)
class Recorded:
    """A recorded pass, and the layout of the batches that it is replayed for.

    Attributes:
        number: how many graphs of the model were recorded before it.
    """

    number: int
    layout: BatchLayout
    replay: Replay


class PaddedPasses:
    """What graphs of every kind share: where they read their inputs, and how one is recorded.

    Args:
        model: the model. Its weights and KV must stay where they are from now on.
        layouts: those that are recorded.
        first_number: how many graphs of the model were recorded before these.
    """

    def __init__(
        self,
        model: PagedModel,
        limits: GraphLimits,
        layouts: list[BatchLayout],
        first_number: int = 0,
    ) -> None:
        self._model = model
        self._limits = limits
        self._first_number = first_number
        self._recorded: list[Recorded] = []
        largest = max((layout.size for layout in layouts), default=0)
        self._buffer = torch.zeros(largest, dtype=torch.int64, device=model.device)

    @property
    def num_recorded(self) -> int:
        """The number of graphs."""
        return len(self._recorded)

    @property
    def _width(self) -> int:
        """The width of the block tables."""
        return width_of(self._model, self._limits)

    def _queue(
        self,
        chunks: SequenceOf[Chunk],
        graph: Recorded,
        needed: BatchLayout,
        newest: Tensor | None,
    ) -> Tensor:
        """Queue a replay for chunks, which need so much of the graph's layout.

        Args:
            newest: as in `PagedModel.forward`.
        """
        self._fill(chunks, graph.layout, needed.num_blocks)
        inputs = self._buffer[: graph.layout.size]
        if newest is not None:
            fill_in(graph.layout.split(inputs).token_ids, newest)
        if self._model.company is not None:
            self._model.company.replay(graph.number, inputs)
        return graph.replay()[: needed.num_tokens]

    @torch.inference_mode()
    def replay(self, number: int, fill: Callable[[Tensor], None]) -> None:
        """Replay the graph of that number, once ``fill`` has put its inputs in place."""
        graph = self._recorded[number - self._first_number]
        fill(self._buffer[: graph.layout.size])
        graph.replay()

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
    def _record(
        self,
        recorder: Recorder,
        layout: BatchLayout,
        query_start_loc: list[int],
        num_decodes: int,
    ) -> Recorded:
        """Record one graph.

        What the backend knows of the batch on the host must hold for every batch that the
        graph will be replayed for, so it is the worst: every sequence as long as can be and
        with the most query tokens. ``query_start_loc`` thereby ends beyond the tokens of
        the batch. What is true of each batch, padding included, stands in ``starts`` and
        ``lengths`` on the device.
        """
        self._fill([], layout, self._width)
        inputs = layout.split(self._buffer[: layout.size])
        seq_lens = [self._width * self._model.block_size] * layout.num_seqs

        def work() -> Tensor:
            return self._model.forward_tensors(
                inputs,
                query_start_loc,
                seq_lens,
                num_decodes,
                self._model.kv,
                lengths_known=False,
            )

        number = self._first_number + len(self._recorded)
        self._recorded.append(Recorded(number, layout, recorder.record(work)))
        return self._recorded[-1]


class DecodeGraphs(PaddedPasses):
    """The graphs of a model's passes over decodes.

    Args:
        only: which sizes of each family are recorded, in ascending order; all by default.
    """

    mixed = NO_MIXED

    def __init__(
        self,
        model: PagedModel,
        recorder: Recorder,
        limits: GraphLimits,
        only: slice = slice(None),
        first_number: int = 0,
    ) -> None:
        layouts = {most: decode_layouts(model, limits, most)[only] for most in limits.max_queries}
        every = [layout for own in layouts.values() for layout in own]
        super().__init__(model, limits, every, first_number)
        self._families: dict[int, list[Recorded]] = {most: [] for most in layouts}
        # The largest first: the others find room in the memory that it needed.
        order = [(layout, most) for most, own in layouts.items() for layout in own]
        order.sort(key=lambda one: one[0].num_tokens, reverse=True)
        for layout, most in progress_bar(order, desc="Recording CUDA graphs"):
            starts = [most * i for i in range(layout.num_seqs + 1)]
            recorded = self._record(recorder, layout, starts, layout.num_seqs)
            self._families[most].insert(0, recorded)

    @torch.inference_mode()
    def forward(
        self, chunks: SequenceOf[Chunk], num_decodes: int, newest: Tensor | None = None
    ) -> Tensor | None:
        """Queue a replay for decodes, or verifications.

        Args:
            newest: as in `PagedModel.forward`.

        Returns:
            The final hidden states ``[num_tokens, hidden]``, which hold until the next replay;
            ``None``, with nothing done, where no graph is large enough.
        """
        needed = BatchLayout.of(chunks)
        graph = self._find(chunks, needed) if num_decodes == len(chunks) else None
        if graph is None:
            return None
        return self._queue(chunks, graph, needed, newest)

    def _find(self, chunks: SequenceOf[Chunk], needed: BatchLayout) -> Recorded | None:
        """Return the smallest graph of the first family that fits."""
        if needed.num_seqs > self._limits.max_num_seqs or needed.num_blocks > self._width:
            return None
        num_queries = max(len(chunk.token_ids) for chunk in chunks)
        for most, graphs in self._families.items():
            if num_queries <= most:
                return smallest(graphs, needed.num_tokens)
        return None


def smallest(graphs: SequenceOf[Recorded], num_tokens: int) -> Recorded | None:
    """Return the first of these graphs, ascending, that holds so many tokens."""
    found = bisect_left(graphs, num_tokens, key=lambda graph: graph.layout.num_tokens)
    return graphs[found] if found < len(graphs) else None


def width_of(model: PagedModel, limits: GraphLimits) -> int:
    """Return the width of the block tables of all graphs of a model."""
    return blocks_for(limits.max_seq_len, model.block_size)


def decode_layouts(model: PagedModel, limits: GraphLimits, most: int) -> list[BatchLayout]:
    """Return the layouts of decodes with at most so many tokens each, ascending."""
    largest = min(limits.max_num_tokens, most * limits.max_num_seqs)
    width = width_of(model, limits)
    return [
        BatchLayout(size, min(size, limits.max_num_seqs), width) for size in padded_sizes(largest)
    ]


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
