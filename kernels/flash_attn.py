"""Attention by the flash-attn library (Dao, 2023), over the same paged KV cache.

It is an optional extra: ``pip install --no-build-isolation 'minserve[flash-attn]'``, whose build
needs the installed torch. The cache, and how it is written, are those of `TritonBackend`; only
attention itself is the library's.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from minserve.config import FLASH_ATTN_PAGE
from minserve.errors import BackendUnavailableError
from minserve.kernels.attention import AttentionMetadata, LayerKV
from minserve.kernels.triton_backend import TritonBackend


@dataclass(slots=True)
class _BatchPart:
    """The decodes, or the prefill chunks, of one iteration.

    Attributes:
        tokens: the batch's rows that belong to the part.
        starts: int32, on the device: first query token of each sequence, counted from 0, then the
            end.
        lengths: int32, on the device: tokens of each sequence that have KV.
        kv_starts: int32: the running sum of the lengths, from 0 on.
        tables: int32 ``[num_seqs, max_blocks]``.
        most_queries, longest: most query tokens and largest length of a sequence.
        num_queries: query tokens of each sequence, if all have equally many, else ``None``.
    """

    tokens: slice
    starts: Tensor
    lengths: Tensor
    kv_starts: Tensor
    tables: Tensor
    most_queries: int
    longest: int
    num_queries: int | None


class FlashAttnBackend(TritonBackend):
    """flash-attn over block tables. `choose_attention_backend` checks whether it is installed.

    Raises:
        BackendUnavailableError: if it does not load, such as a build for another torch.
    """

    name = "flash-attn"
    supports_graphs = False  # its grids depend on the batch

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, scale: float) -> None:
        super().__init__(num_heads, num_kv_heads, head_dim, scale)
        try:
            self._library = importlib.import_module("flash_attn")
        except ImportError as error:
            raise BackendUnavailableError(
                f"flash-attn is there but does not load ({error}); build it anew for this torch: "
                "pip install --no-build-isolation --force-reinstall --no-deps flash-attn"
            ) from error

    def allocate(
        self, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> LayerKV:
        """Allocate a cache as `TritonBackend.allocate` does.

        Raises:
            BackendUnavailableError: for block sizes or dtypes that flash-attn does not support.
        """
        if block_size % FLASH_ATTN_PAGE:
            raise BackendUnavailableError(
                f"flash-attn needs KV blocks of a multiple of {FLASH_ATTN_PAGE} tokens, not {block_size}; use "
                f"--block-size {FLASH_ATTN_PAGE}"
            )
        if dtype not in (torch.float16, torch.bfloat16):
            raise BackendUnavailableError(
                f"flash-attn computes in float16 or bfloat16, not {str(dtype).removeprefix('torch.')}; "
                "use --attention-backend torch"
            )
        return super().allocate(num_blocks, block_size, dtype, device)

    def prepare(self, metadata: AttentionMetadata) -> None:
        num, end = metadata.num_decodes, metadata.num_seqs
        metadata.state = [
            _part(metadata, first, last) for first, last in ((0, num), (num, end)) if first < last
        ]

    def forward(self, query: Tensor, kv: LayerKV, metadata: AttentionMetadata) -> Tensor:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for part in metadata.state:
            out[part.tokens] = self._attend(query[part.tokens], kv, part)
        return out.flatten(1)

    def _attend(self, query: Tensor, kv: LayerKV, part: _BatchPart) -> Tensor:
        shared = {"softmax_scale": self.scale, "causal": True, "block_table": part.tables}
        if part.num_queries is not None:
            by_sequence = query.unflatten(0, (-1, part.num_queries))
            return self._library.flash_attn_with_kvcache(
                by_sequence, kv.key, kv.value, cache_seqlens=part.lengths, **shared
            ).flatten(0, 1)
        return self._library.flash_attn_varlen_func(
            query,
            kv.key,
            kv.value,
            part.starts,
            part.kv_starts,
            part.most_queries,
            part.longest,
            **shared,
        )


def _part(metadata: AttentionMetadata, first: int, last: int) -> _BatchPart:
    """Return the part with the sequences from ``first`` on, before ``last``."""
    starts = metadata.query_start_loc[first : last + 1]
    counts = {end - start for start, end in pairwise(starts)}
    all_starts, all_lengths = metadata.on_device()
    lengths = all_lengths[first:last]
    is_decode = first < metadata.num_decodes
    return _BatchPart(
        tokens=slice(starts[0], starts[-1]),
        starts=(all_starts[first : last + 1] - starts[0]).int(),
        lengths=lengths.int(),
        kv_starts=F.pad(lengths.cumsum(0), (1, 0)).int(),
        tables=metadata.block_tables[first:last].int(),
        most_queries=max(counts),
        longest=max(metadata.seq_lens[first:last]),
        num_queries=counts.pop() if is_decode and len(counts) == 1 else None,
    )
