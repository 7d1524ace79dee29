"""The tensors behind the blocks: how many fit, and their allocation."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch

from minserve.config import EngineConfig
from minserve.errors import ConfigError
from minserve.kernels.attention import AttentionBackend, LayerKV
from minserve.models.base import ModelShape

GIB = 2**30
CPU_SHARE_OF_FREE = 0.25
CPU_MOST_GIB = 4.0
# The rest is for sampling, and for what memory is lost to fragments.
GPU_SHARE_OF_FREE = 0.9
# Of what is free on a GPU, for CUDA graphs: their inputs, results and the kernels' arguments.
CUDA_GRAPHS_SHARE_OF_FREE = 0.05


def bytes_per_block(shape: ModelShape, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, keys and values."""
    width = shape.num_kv_heads * shape.head_dim * dtype.itemsize
    return 2 * shape.num_layers * block_size * width


def choose_num_blocks(
    config: EngineConfig,
    shapes: Sequence[ModelShape],
    dtype: torch.dtype,
    device: torch.device,
    *,
    with_graphs: bool = False,
) -> int:
    """Blocks that the settings ask for, or that fit into the memory that is free now.

    On a GPU call it after a dry run at the largest batch, so that activations are
    counted. Never more than `max_num_seqs` sequences of full length could use.

    Args:
        shapes: of the model, and of the draft model where there is one: a block holds the
            KV of both.
        with_graphs: leave room for CUDA graphs.

    Raises:
        ConfigError: where not a single block fits.
    """
    if config.num_blocks is not None:
        return config.num_blocks
    per_block = sum(bytes_per_block(shape, config.block_size, dtype) for shape in shapes)
    if config.kv_cache_gib is not None:
        budget = config.kv_cache_gib * GIB
    elif device.type == "cuda":
        share = GPU_SHARE_OF_FREE - (CUDA_GRAPHS_SHARE_OF_FREE if with_graphs else 0.0)
        budget = torch.cuda.mem_get_info(device)[0] * share
    else:
        budget = min(psutil.virtual_memory().available * CPU_SHARE_OF_FREE, CPU_MOST_GIB * GIB)
    longest = config.max_model_len or shapes[0].max_positions
    useful = config.max_num_seqs * -(-longest // config.block_size)
    num_blocks = min(int(budget // per_block), useful)
    if num_blocks < 1:
        raise ConfigError(
            f"the KV cache needs {per_block / GIB:.3f} GiB per block of {config.block_size} tokens, "
            f"but only {budget / GIB:.3f} GiB are available; raise --kv-cache-gib or lower --block-size"
        )
    return num_blocks


def allocate_kv_cache(
    backend: AttentionBackend,
    num_layers: int,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[LayerKV]:
    """One zeroed cache per layer."""
    return [backend.allocate(num_blocks, block_size, dtype, device) for _ in range(num_layers)]
