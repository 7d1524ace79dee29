"""CUDA graphs of mixed batches: prefill chunks, and decodes or verifications before them.

They pay for models, and sizes of batches, whose kernels a GPU runs faster than the host launches
them (`mixed_limit`). A graph has places for so many decodes and for so many chunks, since the two go
to different kernels; places that a batch does not need hold sequences without tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from itertools import accumulate

import torch
from torch import Tensor

from minserve.engine.device.batch_tensors import BatchLayout, Chunk
from minserve.engine.device.cuda_graphs import (
    DecodeGraphs,
    GraphLimits,
    PaddedPasses,
    Recorded,
    Recorder,
    smallest,
    width_of,
)
from minserve.engine.device.paged_model import PagedModel
from minserve.planner.predict.eager import NO_MIXED, MixedLimit
from minserve.progress_bar import progress_bar

# Of a fast GPU and its host: half-precision operations and bytes of memory per second, and the
# seconds in which the host launches a kernel, Python between two of them included.
FLOPS, BANDWIDTH, LAUNCH_S = 5e14, 3e12, 2e-5
KERNELS_PER_LAYER = 14
# Of a layer, in squares of its width: attention has 4, and what follows it has 8.
PARAMETERS = 12
# More tokens, or chunks, are seldom worth the memory and the time to record them.
MOST_TOKENS, MOST_CHUNKS = 2048, 16
# Not one size for fewer tokens.
LEAST_TOKENS = 32
# Sizes are so many tokens apart, or a quarter of themselves.
STEP = 16

_NOBODY = Chunk([], 0, [])


def mixed_limit(hidden_size: int, token_budget: int, max_num_seqs: int) -> MixedLimit:
    """Return up to which size batches with prefills are recorded for a model.

    It is where a fast GPU computes a layer for as long as the host launches its kernels: from there
    on the host is ahead in an eager pass, which then takes no longer than a graph. A model whose
    weights take longer to read than that has no such graphs. The rule knows nothing but the size of
    the model, so that kept profiles stay valid.

    Args:
        hidden_size: width of the model's layers.
        token_budget, max_num_seqs: the most tokens and sequences of a batch.
    """
    launching_s, parameters = LAUNCH_S * KERNELS_PER_LAYER, PARAMETERS * hidden_size**2
    if 2 * parameters / BANDWIDTH > launching_s:
        return NO_MIXED
    most = int(launching_s * FLOPS / (2 * parameters))
    most = min(most // STEP * STEP, MOST_TOKENS, token_budget)
    return MixedLimit(most, min(MOST_CHUNKS, max_num_seqs)) if most >= LEAST_TOKENS else NO_MIXED


def mixed_sizes(largest: int) -> list[int]:
    """Return the numbers of tokens to record graphs for, ascending; the last one is ``largest``.

    Padding is at most a quarter of a batch, or some tokens. It costs little, because these passes
    leave the device waiting for the host, or for memory, otherwise.
    """
    sizes, size = [], STEP
    while size < largest:
        sizes.append(size)
        size += max(STEP, size // 4 // STEP * STEP)
    return [*sizes, largest]


def mixed_layout(model: PagedModel, limits: GraphLimits, size: int) -> BatchLayout:
    """Return the layout for so many tokens: places for decodes, then those for chunks."""
    num_seqs = _decode_places(limits, size) + min(limits.mixed.max_chunks, size)
    return BatchLayout(size, num_seqs, width_of(model, limits))


def _decode_places(limits: GraphLimits, size: int) -> int:
    return min(size, limits.max_num_seqs)


class MixedGraphs(PaddedPasses):
    """The graphs of a model's passes over batches with prefills.

    Args:
        limits: with a `MixedLimit` above 0.
        only: which sizes are recorded, in ascending order; all by default.
    """

    def __init__(
        self,
        model: PagedModel,
        recorder: Recorder,
        limits: GraphLimits,
        only: slice = slice(None),
    ) -> None:
        sizes = mixed_sizes(limits.mixed.max_tokens)[only]
        layouts = [mixed_layout(model, limits, size) for size in sizes]
        super().__init__(model, limits, layouts)
        self._graphs: list[Recorded] = []
        for layout in progress_bar(layouts[::-1], desc="Recording CUDA graphs of prefills"):
            num_decodes = _decode_places(limits, layout.num_tokens)
            most = [max(limits.max_queries)] * num_decodes
            most += [layout.num_tokens] * (layout.num_seqs - num_decodes)
            starts = list(accumulate(most, initial=0))
            self._graphs.insert(0, self._record(recorder, layout, starts, num_decodes))

    @torch.inference_mode()
    def forward(
        self, chunks: SequenceOf[Chunk], num_decodes: int, newest: Tensor | None = None
    ) -> Tensor | None:
        """Queue a replay for a batch with prefills; otherwise as `DecodeGraphs.forward`."""
        needed, limits = BatchLayout.of(chunks), self._limits
        graph = smallest(self._graphs, needed.num_tokens)
        if (
            graph is None
            or len(chunks) - num_decodes > limits.mixed.max_chunks
            or num_decodes > limits.max_num_seqs
            or needed.num_blocks > self._width
            or any(len(c.token_ids) > max(limits.max_queries) for c in chunks[:num_decodes])
        ):
            return None
        places = _decode_places(limits, graph.layout.num_tokens)
        nobody = [_NOBODY] * (places - num_decodes)
        apart = [*chunks[:num_decodes], *nobody, *chunks[num_decodes:]]
        return self._queue(apart, graph, needed, newest)


class ModelGraphs:
    """All recorded passes of a model.

    Args:
        only: which sizes of each kind are recorded, in ascending order; all by default.

    Attributes:
        mixed: the largest batches with a prefill that are recorded.
    """

    def __init__(
        self,
        model: PagedModel,
        recorder: Recorder,
        limits: GraphLimits,
        only: slice = slice(None),
    ) -> None:
        self.mixed = limits.mixed
        self._mixed = None
        if self.mixed.max_tokens:  # the largest first: see `DecodeGraphs`
            self._mixed = MixedGraphs(model, recorder, limits, only)
        self._num_mixed = 0 if self._mixed is None else self._mixed.num_recorded
        self._of_decodes = DecodeGraphs(model, recorder, limits, only, self._num_mixed)

    @property
    def num_recorded(self) -> int:
        """The number of graphs."""
        return self._num_mixed + self._of_decodes.num_recorded

    def forward(
        self, chunks: SequenceOf[Chunk], num_decodes: int, newest: Tensor | None = None
    ) -> Tensor | None:
        """Do the work of `DecodeGraphs.forward` or `MixedGraphs.forward`."""
        if num_decodes == len(chunks):
            return self._of_decodes.forward(chunks, num_decodes, newest)
        if self._mixed is None:
            return None
        return self._mixed.forward(chunks, num_decodes, newest)

    def replay(self, number: int, fill: Callable[[Tensor], None]) -> None:
        """Replay the graph of that number, once ``fill`` has put its inputs in place."""
        if number >= self._num_mixed:
            self._of_decodes.replay(number, fill)
        else:
            assert self._mixed is not None, "rank 0 has given up the same graphs"
            self._mixed.replay(number, fill)

    def without_mixed(self) -> None:
        """Give up the graphs of batches with prefills."""
        self.mixed, self._mixed = NO_MIXED, None
