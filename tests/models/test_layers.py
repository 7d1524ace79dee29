"""Linears in the forms of `WeightFormat`."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch

# How much more memory a process has allocated after each 512 numbers of rows, in bytes.
ALLOCATED = """
import ctypes
import torch
from minserve.models.layers import OneDnnLinear

NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"

class Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES.split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Mallinfo2
linear = OneDnnLinear(torch.randn(64, 64), None)
for first in (1, 513, 1025):
    for rows in range(first, first + 512):
        linear(torch.zeros(rows, 64))
    print(libc.mallinfo2().uordblks)
"""


@pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(ctypes.CDLL(None), "mallinfo2")),
    reason="torch has no oneDNN here, or the C library (glibc 2.33) cannot tell what is allocated",
)
def test_batches_of_ever_new_sizes_take_no_more_memory() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ALLOCATED], capture_output=True, text=True, check=True
    )
    first, second, third = map(int, done.stdout.split())
    assert first > 2**22  # what the linear keeps for a number of rows can be seen
    assert third - second < first / 20
    assert second - first < first / 20
