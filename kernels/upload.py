"""Sends numbers from the host to a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Sequence, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the numbers on the device; the copy is enqueued there, and the host does not wait."""
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)
