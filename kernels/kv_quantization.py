"""The KV cache in 8 bits: its forms, and how keys and values get into them.

Each head of each token has a scale of its own, its largest magnitude over the largest number of the
form. So a token is written without knowing others, and what it is read as does not depend on them.
Scales are in float32: they take 4 bytes beside a head's 64 or 128, and GPUs load 4 bytes, but not 2,
ahead of their use.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from minserve.errors import ConfigError

# Compute capability from which on a GPU converts e4m3 itself.
CONVERTS_FP8 = (8, 9)


class KVForm(NamedTuple):
    """A form of 8 bits.

    Attributes:
        dtype: the dtype of the stored numbers.
        largest: the largest of them.
    """

    dtype: torch.dtype
    largest: float


class KVScales(NamedTuple):
    """The scales of a layer's keys and values.

    Attributes:
        key, value: float32 ``[num_blocks, num_kv_heads, block_size]``.
        dtype: the dtype in which attention computes.
    """

    key: Tensor
    value: Tensor
    dtype: torch.dtype


INT8 = KVForm(torch.int8, 127.0)
FP8 = KVForm(torch.float8_e4m3fn, 448.0)
# By the names of `EngineConfig.kv_cache_dtype`.
KV_FORMS: dict[str, KVForm | None] = {"auto": None, "int8": INT8, "fp8": FP8}


def quantize(x: Tensor, form: KVForm) -> tuple[Tensor, Tensor]:
    """Return the stored numbers of heads ``[..., head_dim]``, and their scales ``[...]``, float32.

    A number times its head's scale is the value as it is read.
    """
    wide = x.float()
    scale = wide.abs().amax(-1) * (1.0 / form.largest)
    divisor = torch.where(scale > 0.0, scale, 1.0)
    stored = (wide / divisor.unsqueeze(-1)).clamp_(-form.largest, form.largest)
    if form is INT8:
        stored.round_()
    return stored.to(form.dtype), scale


def raw(x: Tensor) -> Tensor:
    """Return stored numbers as torch can copy and gather them: it does neither with e4m3."""
    return x.view(torch.int8) if x.dtype is torch.float8_e4m3fn else x


def head_bytes(head_dim: int, dtype: torch.dtype, kv_cache_dtype: str) -> int:
    """Return the bytes of one token's key, or value, of one head."""
    form = KV_FORMS[kv_cache_dtype]
    if form is None:
        return head_dim * dtype.itemsize
    return head_dim * form.dtype.itemsize + torch.float32.itemsize


def check_kv_cache_dtype(kv_cache_dtype: str, attention: str, device: torch.device) -> None:
    """Refuse a form that a device cannot convert.

    Args:
        attention: the name of the attention backend.

    Raises:
        ConfigError: for e4m3 in Triton's kernels on a GPU without instructions for it.
    """
    if kv_cache_dtype != "fp8" or attention != "triton" or device.type != "cuda":
        return
    if torch.cuda.get_device_capability(device) < CONVERTS_FP8:
        raise ConfigError(
            "kv_cache_dtype fp8 needs a GPU of compute capability 8.9 or newer; use "
            "--kv-cache-dtype int8, which takes as much memory and is more exact"
        )
