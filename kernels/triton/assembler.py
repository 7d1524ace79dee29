"""Which of Triton's two assemblers makes machine code for GPUs before Blackwell."""

from __future__ import annotations

import os

import torch
from triton import knobs

VARIABLE = "TRITON_PTXAS_PATH"


def use_newer_assembler() -> None:
    """Let Triton assemble for older GPUs too with the ptxas that it brings for Blackwell.

    Triton 3.6 and 3.7 bring ptxas 12.8.93 for older GPUs, with which a kernel that has two layouts of
    one piece of shared memory reads a descriptor from registers that nothing has written: attention
    on heads of 96 dimensions over a KV cache in 8 bits then ends with an illegal memory access on
    an H100. `bench/kernel_bench.py --compile-only` looks for such reads in all kernels. From 3.9 on
    Triton itself chooses so for Hopper.

    A driver loads machine code of its own major version of CUDA, so the newer one is not taken
    where torch is of an older one. Who has set ``TRITON_PTXAS_PATH`` has chosen.
    """
    if VARIABLE in os.environ or knobs.runtime.interpret:
        return
    own, newer = knobs.nvidia.ptxas, knobs.nvidia.ptxas_blackwell
    loaded = _numbers(torch.version.cuda or newer.version)
    if _numbers(own.version) < _numbers(newer.version) and _numbers(newer.version)[0] <= loaded[0]:
        os.environ[VARIABLE] = newer.path


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
