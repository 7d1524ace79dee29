"""How kernels write keys and values in 8 bits, and how they read their scales.

The scales of attention are not applied to keys and values, of which there are many, but to what
they are multiplied to: a key's scale to the key's scores, and a value's to the value's weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Weights are multiplied by so much more than by the values' scales, which are small: in float16 they
# would have few digits left. The sums are divided by it at the end.
LIFT = tl.constexpr(128.0)


@triton.jit
def quantized(x, LARGEST: tl.constexpr, INTEGER: tl.constexpr):
    """Return what is stored of heads ``[heads, dims]``, in float32, and their scales ``[heads]``.

    The numbers are those of `minserve.kernels.kv_quantization.quantize`. They are rounded here, to
    whole numbers or to the four digits of e4m3, so that no conversion rounds in its own way: a large
    number is added and taken away, whose last digit is the last one to keep.
    """
    wide = x.to(tl.float32)
    scale = tl.max(tl.abs(wide), 1) * (1.0 / LARGEST)
    divisor = tl.where(scale > 0.0, scale, 1.0)
    stored = tl.math.div_rn(wide, tl.broadcast_to(divisor[:, None], wide.shape))
    stored = tl.minimum(tl.maximum(stored, -LARGEST), LARGEST)
    if INTEGER:
        large = tl.full(stored.shape, 1.5 * 2.0**23, tl.float32)
    else:
        bits = stored.to(tl.int32, bitcast=True) & 0x7F800000
        power = tl.maximum(bits.to(tl.float32, bitcast=True), 2.0**-6)
        large = power * (1.5 * 2.0**20)
    return (stored + large) - large, scale


@triton.jit
def load_scales(ptr, slots, kv_head, mask, NUM_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Return the scales of tokens of a head, 0 where masked.

    Args:
        ptr: float32 ``[num_blocks, num_kv_heads, block_size]``.
        slots: int64: ``block_id * block_size + offset``.
    """
    place = (slots // BLOCK_SIZE * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + slots % BLOCK_SIZE
    return tl.load(ptr + place, mask=mask, other=0.0)
