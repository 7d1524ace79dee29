"""For the tests of padded batches: attention written out, true to what the device knows, and
recordings on devices without graphs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minserve.engine.device.cuda_graphs import Recorder, Replay
from minserve.kernels.attention import AttentionMetadata, LayerKV
from minserve.kernels.torch_backend import TorchBackend


class PaddedBackend(TorchBackend):
    """Reads where queries start and how long sequences are from the device's tensors alone,
    and holds the lists on the host, which are bounds in a graph, against them.
    """

    supports_graphs = True

    def prepare(self, metadata: AttentionMetadata) -> None:
        starts, lengths = metadata.starts.tolist(), metadata.lengths.tolist()
        bounds = metadata.query_start_loc
        for i, length in enumerate(lengths):
            assert starts[i + 1] - starts[i] <= bounds[i + 1] - bounds[i]
            assert length <= metadata.seq_lens[i]
        metadata.state = [
            (slice(starts[i], starts[i + 1]), length) for i, length in enumerate(lengths)
        ]

    def write_kv(
        self,
        qkv: Tensor,
        kv: LayerKV,
        metadata: AttentionMetadata,
        rotations: Tensor | None = None,
    ) -> None:
        heads, kv_heads = self.num_heads, self.num_kv_heads
        if rotations is not None:
            turned = torch.view_as_complex(qkv[:, : heads + kv_heads].unflatten(-1, (-1, 2)))
            turned.mul_(rotations)
        for row, slot in enumerate(metadata.slot_mapping.tolist()):
            if slot >= 0:
                block, offset = divmod(slot, metadata.block_size)
                kv.key[block, offset] = qkv[row, heads : heads + kv_heads]
                kv.value[block, offset] = qkv[row, heads + kv_heads :]

    def forward(self, query: Tensor, kv: LayerKV, metadata: AttentionMetadata) -> Tensor:
        out = torch.zeros(query.shape)
        group = self.num_heads // self.num_kv_heads
        for i, (tokens, length) in enumerate(metadata.state):
            num_queries = tokens.stop - tokens.start
            if not num_queries:
                continue
            blocks = metadata.block_tables[i, : -(-length // metadata.block_size)]
            key, value = (
                x[blocks].flatten(0, 1)[:length].repeat_interleave(group, 1)
                for x in (kv.key, kv.value)
            )
            scores = torch.einsum("qhd,khd->hqk", query[tokens], key) * self.scale
            later = torch.ones(num_queries, length, dtype=torch.bool).triu(length - num_queries + 1)
            weights = scores.masked_fill(later, -torch.inf).softmax(-1)
            out[tokens] = torch.einsum("hqk,khd->qhd", weights, value)
        return out.flatten(1)


class Rerun(Recorder):
    """For devices without graphs: a replay does the work again."""

    def record(self, work: Callable[[], Tensor]) -> Replay:
        work()
        return work
