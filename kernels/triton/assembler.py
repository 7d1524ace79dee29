"""Which of Triton's two assemblers makes machine code for Hopper."""

from __future__ import annotations

import os

import torch
from triton import knobs

try:
    from triton.backends.nvidia import compiler
except ImportError:  # a Triton for other GPUs
    compiler = None

HOPPER = 90


def use_newer_assembler() -> None:
    """Let Triton assemble for Hopper with the ptxas that it brings for Blackwell.

    Triton 3.6 and 3.7 bring ptxas 12.8.93 for Hopper, with which a kernel that has two layouts of one
    piece of shared memory may read a matrix descriptor from registers that nothing has written:
    attention on heads of 96 dimensions over a KV cache in 8 bits ended with an illegal memory
    access on an H100. `bench/kernel_bench.py --compile-only` looks for such reads in all kernels.
    From 3.9 on Triton itself chooses so.

    A driver loads machine code of its own major version of CUDA, so the newer one is not taken
    where torch is of an older one. Who has set ``TRITON_PTXAS_PATH`` has chosen. A Triton that lacks
    one of the two is left as it is.
    """
    if compiler is None or "TRITON_PTXAS_PATH" in os.environ:
        return
    try:
        chosen_by_arch, newer = compiler.get_ptxas, knobs.nvidia.ptxas_blackwell
        forget_version = compiler.get_ptxas_version.cache_clear
        own = _numbers(chosen_by_arch(HOPPER).version)
        version = _numbers(newer.version)
        driver = _numbers(torch.version.cuda or newer.version)
    except (AttributeError, OSError, RuntimeError, TypeError, ValueError):
        return  # a program or setting is not there, or cannot be run
    if version <= own or version[0] > driver[0]:
        return

    def get_ptxas(arch: int) -> knobs.NvidiaTool:
        return newer if arch >= HOPPER else chosen_by_arch(arch)

    compiler.get_ptxas = get_ptxas
    # The version is a part of what Triton's cache is asked for; it is kept from the first kernel on.
    forget_version()


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
