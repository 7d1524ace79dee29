"""Attention by this project's Triton kernels: prefill chunks in one launch, decodes in another."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minserve.errors import BackendUnavailableError
from minserve.kernels.attention import AttentionBackend, AttentionMetadata, LayerKV
from minserve.kernels.kv_quantization import INT8, KVScales
from minserve.kernels.triton.batched_decode import batched_decode
from minserve.kernels.triton.chunked_prefill import (
    CHUNK_SIZES,
    PrefillPlan,
    chunked_prefill,
    plan_prefills,
    prefill_tile,
)
from minserve.kernels.triton.decode_plan import DecodePlan, plan_decodes
from minserve.kernels.triton.prefill_tiles import prefill_tiles_on_device
from minserve.kernels.triton.write_kv import write_kv

# Programs that run on a multiprocessor at a time: for decodes; for prefills in small tiles with
# heads of more than 64 dimensions; for prefills with smaller heads.
DECODES_PER_MULTIPROCESSOR = 4
# Values in 8 bits are converted in registers, and fewer programs with wide heads have room.
DECODES_IN_8_BITS = 3
PREFILLS_PER_MULTIPROCESSOR = 2, 3
MOST_HEAD_DIM = 256


class DeviceProperties(NamedTuple):
    """The traits of a device on which tiles and splits depend.

    Attributes:
        multiprocessors: number of multiprocessors.
        capability: its compute capability, times ten.
    """

    multiprocessors: int
    capability: int


# Triton's interpreter needs no filling; a few splits do as well as many.
INTERPRETED = DeviceProperties(multiprocessors=4, capability=90)


@dataclass(slots=True)
class _TritonBatchState:
    """The plan that `prepare` makes for all layers.

    Attributes:
        starts, lengths: of the whole batch, on the device, as in `AttentionMetadata`.
    """

    starts: Tensor
    lengths: Tensor
    decodes: DecodePlan | None = None
    prefills: PrefillPlan | None = None


class TritonBackend(AttentionBackend):
    """The Triton kernels, for CUDA devices (and Triton's interpreter).

    Raises:
        BackendUnavailableError: for head sizes that the kernels do not support.
    """

    name = "triton"
    supports_graphs = True
    in_triton = True
    chunk_sizes = CHUNK_SIZES
    # The dtype of arithmetic, as the cache was allocated for it; the tiles depend on it.
    _dtype = torch.float16

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, scale: float) -> None:
        super().__init__(num_heads, num_kv_heads, head_dim, scale)
        if not 16 <= head_dim <= MOST_HEAD_DIM or head_dim % 8:
            raise BackendUnavailableError(
                f"the {self.name} attention backend needs heads of 16 to {MOST_HEAD_DIM} dimensions "
                f"in steps of 8, not {head_dim}; use --attention-backend torch"
            )

    def allocate(
        self, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> LayerKV:
        self._dtype = dtype
        size = (num_blocks, block_size, self.num_kv_heads, self.head_dim)
        scales = None
        if self.kv_form is not None:
            factors = torch.zeros(
                (2, num_blocks, self.num_kv_heads, block_size), dtype=torch.float32, device=device
            )
            key_scales, value_scales = factors.unbind(0)
            scales, dtype = KVScales(key_scales, value_scales, dtype), self.kv_form.dtype
        key, value = (torch.zeros(size, dtype=dtype, device=device) for _ in range(2))
        return LayerKV(key, value, scales=scales)

    def prepare(self, metadata: AttentionMetadata) -> None:
        state = metadata.state = _TritonBatchState(*metadata.on_device())
        if metadata.num_decodes:
            state.decodes = self._plan_decodes(metadata, state)
        if metadata.num_decodes < metadata.num_seqs:
            state.prefills = self._plan_prefills(metadata, state.starts)

    def write_kv(
        self,
        qkv: Tensor,
        kv: LayerKV,
        metadata: AttentionMetadata,
        rotations: Tensor | None = None,
    ) -> None:
        write_kv(
            qkv,
            kv.key,
            kv.value,
            metadata.slot_mapping,
            self.num_heads,
            self.num_kv_heads,
            metadata.block_size,
            rotations,
            kv.scales,
            self.kv_form or INT8,
        )

    def forward(self, query: Tensor, kv: LayerKV, metadata: AttentionMetadata) -> Tensor:
        state = metadata.state
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if state.decodes is not None:
            batched_decode(query, kv.key, kv.value, out, state.decodes, self.scale, kv.scales)
        if state.prefills is not None:
            chunked_prefill(
                query,
                kv.key,
                kv.value,
                out,
                state.starts,
                state.lengths,
                metadata.block_tables,
                state.prefills,
                self.scale,
                kv.scales,
            )
        return out.flatten(1)

    def _plan_decodes(self, metadata: AttentionMetadata, state: _TritonBatchState) -> DecodePlan:
        num, starts = metadata.num_decodes, metadata.query_start_loc
        few = self.kv_form is not None and self.head_dim > 64
        at_a_time = DECODES_IN_8_BITS if few else DECODES_PER_MULTIPROCESSOR
        return plan_decodes(
            state.starts[: num + 1],
            state.lengths[:num],
            metadata.block_tables[:num],
            most_queries=max(starts[i + 1] - starts[i] for i in range(num)),
            longest=max(metadata.seq_lens[:num]),
            total=sum(metadata.seq_lens[:num]) if metadata.lengths_known else None,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=self._dtype,
            num_programs=at_a_time * describe(metadata.slot_mapping.device).multiprocessors,
            in_8_bits=self.kv_form is not None,
        )

    def _plan_prefills(self, metadata: AttentionMetadata, device_starts: Tensor) -> PrefillPlan:
        starts, first = metadata.query_start_loc, metadata.num_decodes
        num_tokens = metadata.slot_mapping.shape[0]
        longest = max(starts[i + 1] - starts[i] for i in range(first, metadata.num_seqs))
        longest = min(longest, num_tokens)
        device = describe(metadata.slot_mapping.device)
        in_8_bits = self.kv_form is not None
        tile = prefill_tile(longest, self.head_dim, self._dtype, device.capability, in_8_bits)
        tiles = None
        if not metadata.lengths_known:
            tiles = prefill_tiles_on_device(device_starts, first, num_tokens, tile.block_m)
        return plan_prefills(
            starts,
            metadata.seq_lens,
            first,
            tile=tile,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            num_programs=device.multiprocessors * PREFILLS_PER_MULTIPROCESSOR[self.head_dim <= 64],
            device=metadata.slot_mapping.device,
            tiles=tiles,
        )


@functools.cache
def describe(device: torch.device) -> DeviceProperties:
    """Return the traits of a device on which the kernels' tiles and splits depend."""
    if device.type != "cuda":
        return INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    return DeviceProperties(
        properties.multi_processor_count, 10 * properties.major + properties.minor
    )
