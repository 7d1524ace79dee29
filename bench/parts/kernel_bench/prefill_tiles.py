"""The tiles of prefill chunks, made on the device as in CUDA graphs: compiled, and never timed alone."""

from __future__ import annotations

import torch

from shared.kernel_cases import OURS, Contestant, KernelSetting, Problem

KERNEL = "prefill_tiles"
DECODES, BLOCK_M = 64, 64


def tiles_problem(num_tokens: int, num_chunks: int, setting: KernelSetting) -> Problem:
    """Return the tiles of some chunks behind decodes: pairs of a sequence and a token of it."""
    counts = torch.full((num_chunks,), num_tokens // num_chunks, device=setting.device)
    decodes = torch.arange(DECODES + 1, device=setting.device)
    starts = torch.cat((decodes, DECODES + counts.cumsum(0)))

    def run() -> torch.Tensor:
        from minserve.kernels.triton.prefill_tiles import prefill_tiles_on_device

        return prefill_tiles_on_device(starts, DECODES, num_tokens, BLOCK_M)

    return Problem(
        kernel=KERNEL,
        case={"tokens": num_tokens, "chunks": num_chunks},
        dtype=torch.int64,
        least_bytes=starts.nbytes,
        memory=starts.nbytes,
        expected=lambda: run().float(),
        contestants={OURS: lambda: Contestant([run], run)},
    )
