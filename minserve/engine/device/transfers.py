"""Copies numbers between host and device so that the host waits only where it asks to.

A GPU runs behind the host: work is queued, and a copy from ordinary memory, or a look at a
tensor's values, stops the host until the queue is empty. Copies from and to pinned
memory are queued like everything else.
"""

from __future__ import annotations

import torch
from torch import Tensor


def runs_behind(device: torch.device) -> bool:
    """Return whether a look at a tensor's values makes the host wait for the device."""
    return device.type != "cpu"


def is_lost(device: torch.device) -> bool:
    """Return whether a device runs nothing any more, as a GPU after a wrong memory access."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def empty_on_host(size: int, device: torch.device) -> Tensor:
    """Return int64 ``[size]`` in host memory, to or from which a device copies without a wait.

    torch keeps pinned memory for the next caller, and hands it out again only when the
    copies that were queued meanwhile have ended.
    """
    return torch.empty(size, dtype=torch.int64, pin_memory=device.type == "cuda")


class Milestone:
    """A point in a device's queue, behind all that was queued before this is made."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> None:
        """Wait until the device has come so far."""
        if self._event is not None:
            self._event.synchronize()


class HostCopy:
    """Tensors on their way to the host: one copy for all, queued when this is made.

    Args:
        tensors: at least one, int64 or float64, all on one device.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = tensors
        self._host: Tensor | None = None
        device = tensors[0].device
        if not runs_behind(device):
            return
        packed = torch.cat([tensor.reshape(-1).view(torch.int64) for tensor in tensors])
        self._host = empty_on_host(len(packed), device).copy_(packed, non_blocking=True)
        self._done = Milestone(device)

    def wait(self) -> list[Tensor]:
        """Wait for the tensors and return them, on the host."""
        if self._host is None:
            return list(self._tensors)
        self._done.wait()
        parts = self._host.split([tensor.numel() for tensor in self._tensors])
        return [
            part.view(tensor.dtype).view(tensor.shape)
            for part, tensor in zip(parts, self._tensors, strict=True)
        ]
