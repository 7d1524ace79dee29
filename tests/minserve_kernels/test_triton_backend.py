"""The Triton backend over mixed batches: what the torch backend gives, token by token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import expected, make_metadata, poison

from minserve.kernels.torch_backend import TorchBackend
from minserve.kernels.triton_backend import TritonBackend

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS, KV_HEADS, DIM, BLOCK = 4, 2, 16, 16
BATCHES = {
    "decodes": ([(1, 40), (1, 333)], 2),
    "verification": ([(3, 20), (1, 25), (5, 11)], 3),
    "prefills": ([(5, 0), (123, 64)], 0),
    "mixed": ([(1, 77), (4, 12), (40, 0), (1, 100)], 2),
}


def rotations(num_tokens: int) -> torch.Tensor:
    angles = torch.rand(num_tokens, 1, DIM // 2) * 6
    return torch.polar(torch.ones_like(angles), angles).to(DEVICE)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("rope", [False, True], ids=["plain", "rotated"])
@pytest.mark.parametrize("twins", [False, True], ids=["host lists", "device twins"])
def test_a_layer_is_that_of_the_torch_backend(batch: str, rope: bool, twins: bool) -> None:
    lengths, num_decodes = BATCHES[batch]
    metadata, num_blocks = make_metadata(lengths, num_decodes, BLOCK, DEVICE)
    if twins:
        starts, lens = metadata.query_start_loc, metadata.seq_lens
        metadata.starts = torch.tensor(starts, device=DEVICE)
        metadata.lengths = torch.tensor(lens, device=DEVICE)
    torch.manual_seed(0)
    qkv = torch.randn(metadata.num_tokens, HEADS + 2 * KV_HEADS, DIM, device=DEVICE)
    earlier = torch.randn(2, num_blocks, BLOCK, KV_HEADS, DIM, device=DEVICE)
    turns = rotations(metadata.num_tokens) if rope else None
    outputs, caches = [], []
    for kind in (TorchBackend, TritonBackend):
        backend = kind(HEADS, KV_HEADS, DIM, DIM**-0.5)
        kv = backend.allocate(num_blocks, BLOCK, torch.float32, DEVICE)
        kv.key.copy_(earlier[0])
        kv.value.copy_(earlier[1])
        own, mine = qkv.clone(), replace(metadata)
        with torch.inference_mode():
            backend.prepare(mine)
            backend.write_kv(own, kv, mine, turns)
            outputs.append(backend.forward(own[:, :HEADS], kv, mine))
        poison(kv, mine, 0.0)  # what no sequence owns may differ
        caches.append(torch.stack((kv.key, kv.value)))
    assert (caches[0] - caches[1]).abs().max() < 2e-6
    assert (outputs[0] - outputs[1]).abs().max() < 1e-5


def test_nothing_is_read_that_no_sequence_owns() -> None:
    metadata, num_blocks = make_metadata([(1, 77), (1, 15), (40, 3)], 2, BLOCK, DEVICE)
    backend = TritonBackend(HEADS, KV_HEADS, DIM, DIM**-0.5)
    kv = backend.allocate(num_blocks, BLOCK, torch.float32, DEVICE)
    kv.key.normal_()
    kv.value.normal_()
    poison(kv, metadata, torch.nan)
    query = torch.randn(metadata.num_tokens, HEADS, DIM, device=DEVICE)
    backend.prepare(metadata)
    got = backend.forward(query, kv, metadata)
    assert (got - expected(query, kv, metadata)).abs().max() < 1e-5
