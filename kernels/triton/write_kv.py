"""Write new keys and values into the paged KV cache, with RoPE (Su et al., 2021) on the way.

A cache in 8 bits gets them quantized, each head by a scale of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minserve.kernels.kv_quantization import INT8, KVForm, KVScales
from minserve.kernels.triton.kv_values import quantized

# Elements of a program: eight per thread, one load of 16 bytes in half precision.
TILE, NUM_WARPS = 1024, 4


@triton.jit(do_not_specialize=["slot_mapping"])
def _write_kv_kernel(
    qkv,
    key_cache,
    value_cache,
    slot_mapping,
    rotations,
    key_scales,
    value_scales,
    QKV_STRIDE: tl.constexpr,
    KEY_BLOCK_STRIDE: tl.constexpr,
    VALUE_BLOCK_STRIDE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    FIRST_HEAD: tl.constexpr,
    HEADS: tl.constexpr,
    DIMS: tl.constexpr,
    LARGEST: tl.constexpr,
    INTEGER: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    heads = FIRST_HEAD + tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    dims = tl.arange(0, DIMS)[None, :]
    NUM_ROTATED: tl.constexpr = NUM_HEADS + NUM_KV_HEADS
    mask = (heads < NUM_ROTATED + NUM_KV_HEADS) & (dims < HEAD_DIM)
    source = qkv + token * QKV_STRIDE + heads * HEAD_DIM + dims
    x = tl.load(source, mask, other=0.0)
    if rotations is not None:
        # Heads are loaded and stored whole, and their pairs are split only in registers, so that no
        # thread rotates in place what another thread has yet to read.
        turns = tl.load(rotations + token * HEAD_DIM + dims, dims < HEAD_DIM, other=0.0)
        cos, sin = tl.split(tl.reshape(turns, (1, DIMS // 2, 2)))
        real, imag = tl.split(tl.reshape(x.to(tl.float32), (HEADS, DIMS // 2, 2)))
        turned = tl.join(real * cos - imag * sin, real * sin + imag * cos)
        turned = tl.reshape(turned, (HEADS, DIMS)).to(x.dtype)
        tl.store(source, turned, mask & (heads < NUM_HEADS))
        x = tl.where(heads < NUM_ROTATED, turned, x)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    # The token's offset in its block, measured from the block's first key or first value.
    place = offset * (NUM_KV_HEADS * HEAD_DIM) + dims
    key = key_cache + block * KEY_BLOCK_STRIDE + place + (heads - NUM_HEADS) * HEAD_DIM
    value = value_cache + block * VALUE_BLOCK_STRIDE + place + (heads - NUM_ROTATED) * HEAD_DIM
    is_key, is_value = (heads >= NUM_HEADS) & (heads < NUM_ROTATED), heads >= NUM_ROTATED
    if key_scales is not None:
        x, scale = quantized(x, LARGEST, INTEGER)
        # Their order is [blocks, heads, tokens]: attention reads those of one head.
        place = (block * NUM_KV_HEADS + heads) * BLOCK_SIZE + offset
        is_head = heads < NUM_ROTATED + NUM_KV_HEADS
        scale = scale[:, None]
        tl.store(key_scales + place - NUM_HEADS * BLOCK_SIZE, scale, is_key)
        tl.store(value_scales + place - NUM_ROTATED * BLOCK_SIZE, scale, is_value & is_head)
    tl.store(key, x.to(key.dtype.element_ty), mask & is_key)
    tl.store(value, x.to(value.dtype.element_ty), mask & is_value)


def write_kv(
    qkv: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    block_size: int,
    rotations: torch.Tensor | None = None,
    scales: KVScales | None = None,
    form: KVForm = INT8,
) -> None:
    """Store each token's keys and values in its slot of the cache.

    Args:
        qkv: ``[num_tokens, num_heads + 2 * num_kv_heads, head_dim]``: the heads of queries,
            keys, values; float16, bfloat16 or float32; heads are adjacent, rows need not be.
            ``head_dim`` is even, at most 256.
        key_cache, value_cache: ``[num_blocks, block_size, num_kv_heads, head_dim]``, of the
            dtype of ``qkv``, or of ``form``; blocks need not be adjacent, the contents of one
            block are.
        slot_mapping: int64 ``[num_tokens]``: ``block_id * block_size + offset``. A negative
            slot means a row of padding, of which nothing is written.
        rotations: complex64 ``[num_tokens, 1, head_dim / 2]``, contiguous: queries are rotated
            in place and keys on their way into the cache (those in ``qkv`` stay as they were).
            A head's dimensions ``2 i`` and ``2 i + 1`` are one complex number.
        scales: those of a cache in 8 bits, contiguous; ``None`` for a cache in the dtype of ``qkv``.
        form: the form of a cache that has scales.
    """
    num_tokens, num_rows, head_dim = qkv.shape
    assert num_rows == num_heads + 2 * num_kv_heads
    assert qkv.stride()[1:] == (head_dim, 1)
    for cache in (key_cache, value_cache):
        assert cache.stride()[1:] == (num_kv_heads * head_dim, head_dim, 1)
    if not num_tokens:
        return
    first_head = num_heads if rotations is None else 0
    dims = triton.next_power_of_2(head_dim)
    heads = min(max(1, TILE // dims), triton.next_power_of_2(num_rows - first_head))
    grid = (num_tokens, triton.cdiv(num_rows - first_head, heads))
    _write_kv_kernel[grid](
        qkv,
        key_cache,
        value_cache,
        slot_mapping,
        None if rotations is None else torch.view_as_real(rotations),
        None if scales is None else scales.key,
        None if scales is None else scales.value,
        QKV_STRIDE=qkv.stride(0),
        KEY_BLOCK_STRIDE=key_cache.stride(0),
        VALUE_BLOCK_STRIDE=value_cache.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        FIRST_HEAD=first_head,
        HEADS=heads,
        DIMS=dims,
        LARGEST=form.largest,
        INTEGER=form is INT8,
        num_warps=NUM_WARPS,
    )
