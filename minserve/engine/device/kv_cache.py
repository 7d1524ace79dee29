"""Chooses the number of KV blocks, and allocates the tensors behind them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from minserve.blocks import blocks_for
from minserve.config import EngineConfig
from minserve.errors import ConfigError
from minserve.kernels.attention import AttentionBackend, LayerKV
from minserve.kernels.kv_quantization import head_bytes
from minserve.machine import GIB, Machine
from minserve.models.base import ModelShape

CPU_SHARE_OF_FREE = 0.25
CPU_MOST_GIB = 4.0
# A pass needs these besides, at its peak: float32 copies of the logits while tokens are chosen
# (raw, adjusted, sorted, summed; with top_p 15 were measured), and of the hidden state while a
# layer runs.
LOGITS_COPIES = 16
HIDDEN_COPIES = 16
# Bytes that the allocator loses to fragments, and that libraries take when first used.
OTHER_BYTES = 96 * 2**20
# For a cache on a CPU whose size no setting gives: less would hold no request worth serving.
LEAST_TOKENS = 256
# Of what is free once the largest batch has its memory, and graphs have theirs. The rest is for
# what is lost to fragments.
GPU_SHARE_OF_FREE = 0.9


def bytes_per_block(
    shape: ModelShape, block_size: int, dtype: torch.dtype, kv_cache_dtype: str = "auto"
) -> int:
    """Return the bytes of one block over all layers, keys and values."""
    per_head = head_bytes(shape.head_dim, dtype, kv_cache_dtype)
    return 2 * shape.num_layers * block_size * shape.num_kv_heads * per_head


def choose_num_blocks(
    config: EngineConfig,
    shapes: Sequence[ModelShape],
    dtype: torch.dtype,
    device: torch.device,
    *,
    free_bytes: int | None = None,
) -> int:
    """Return the number of blocks that the settings ask for, or that fit into free memory.

    On a GPU call it after a dry run at the largest batch, so that activations are
    counted. Never more than `max_num_seqs` sequences of full length could use.

    Args:
        shapes: those of the model and, where there is one, of the draft model: a block holds
            the KV of both.
        free_bytes: bytes of a GPU that are free beside its CUDA graphs; ``None`` where there are no
            graphs, so that all that is free counts.

    Raises:
        ConfigError: where not a single block fits, or on a CPU no useful number of them, or
            less than the settings ask for.
    """
    size, form = config.block_size, config.kv_cache_dtype
    per_block = sum(bytes_per_block(shape, size, dtype, form) for shape in shapes)
    longest = config.max_model_len or shapes[0].max_positions
    useful = config.max_num_seqs * blocks_for(longest, config.block_size)
    if device.type == "cpu":
        return _choose_on_cpu(config, shapes[0], per_block, longest, useful)
    if config.num_blocks is not None:
        return config.num_blocks
    if config.kv_cache_gib is not None:
        budget = config.kv_cache_gib * GIB
    else:
        free = torch.cuda.mem_get_info(device)[0] if free_bytes is None else free_bytes
        budget = free * GPU_SHARE_OF_FREE
    return _blocks_of(budget, per_block, useful, config)


def _blocks_of(budget: float, per_block: int, useful: int, config: EngineConfig) -> int:
    num_blocks = min(int(budget // per_block), useful)
    if num_blocks < 1:
        raise ConfigError(
            f"the KV cache needs {per_block / GIB:.3f} GiB per block of {config.block_size} tokens, "
            f"but only {budget / GIB:.3f} GiB are available; raise --kv-cache-gib or lower --block-size"
        )
    return num_blocks


def _choose_on_cpu(
    config: EngineConfig, shape: ModelShape, per_block: int, longest: int, useful: int
) -> int:
    """Do the work of `choose_num_blocks` on a CPU.

    A CPU's pages are taken only as they are written to: too many would end the process much
    later, so all must fit now.
    """
    machine = Machine.look().shared_by(config.tensor_parallel)
    if config.num_blocks is not None:
        option, num_blocks = "--num-blocks", config.num_blocks
    elif config.kv_cache_gib is not None:
        option = "--kv-cache-gib"
        num_blocks = _blocks_of(config.kv_cache_gib * GIB, per_block, useful, config)
    else:
        return _fitting_on_cpu(machine, config, shape, per_block, longest, useful)
    if num_blocks * per_block > machine.free_memory:
        raise ConfigError(
            f"{option} asks for a KV cache of {num_blocks} blocks, "
            f"{num_blocks * per_block / GIB:.2f} GiB, more than there is: "
            f"{machine.memory_words}; lower it, or allow more"
        )
    return num_blocks


def _fitting_on_cpu(
    machine: Machine,
    config: EngineConfig,
    shape: ModelShape,
    per_block: int,
    longest: int,
    useful: int,
) -> int:
    """Return the number of blocks that a CPU's free memory allows, where no setting says it."""
    most = CPU_MOST_GIB * GIB / config.tensor_parallel
    share = min(machine.free_memory * CPU_SHARE_OF_FREE, most)
    fitting = _blocks_beside_a_pass(machine.free_memory, config, shape, per_block)
    num_blocks = min(int(share // per_block), fitting, useful)
    least = min(useful, blocks_for(min(longest, LEAST_TOKENS), config.block_size))
    if num_blocks < least:
        raise ConfigError(
            f"there is too little memory for a KV cache of {least * config.block_size} tokens "
            f"({least * per_block / GIB:.3f} GiB) and for using it: {machine.memory_words}, of "
            f"which the cache may take a quarter; allow more, or say with --kv-cache-gib what "
            "it may take"
        )
    return num_blocks


def _blocks_beside_a_pass(
    num_bytes: int, config: EngineConfig, shape: ModelShape, per_block: int
) -> int:
    """Return the number of blocks that fit into memory beside a pass over the largest batch.

    The largest batch is the one that the blocks allow: each sequence has a block of its own.
    """
    num_tokens = config.budget_on("cpu")
    if not config.chunked_prefill:
        num_tokens = max(num_tokens, config.max_model_len or shape.max_positions)
    per_seq = LOGITS_COPIES * 4 * shape.vocab_size
    num_bytes -= HIDDEN_COPIES * 4 * num_tokens * shape.hidden_size + OTHER_BYTES
    num_blocks = num_bytes // (per_block + per_seq)
    if num_blocks > config.max_num_seqs:
        num_blocks = (num_bytes - config.max_num_seqs * per_seq) // per_block
    return num_blocks


def allocate_kv_cache(
    backend: AttentionBackend,
    num_layers: int,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[LayerKV]:
    """Return one zeroed cache per layer."""
    return [backend.allocate(num_blocks, block_size, dtype, device) for _ in range(num_layers)]
