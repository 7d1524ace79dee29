"""Writing into a paged cache of scattered slots, with RoPE on the way or without."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from accuracy import assert_as_exact_as

from minserve.kernels.triton.write_kv import write_kv

# Query heads, KV heads, head_dim, block_size, whether RoPE is due.
CASES = {
    "OPT-125M": (12, 12, 64, 16, False),
    "OPT-2.7B": (32, 32, 80, 32, False),
    "Llama-3-8B": (32, 8, 128, 128, True),
    "SmolLM2": (9, 3, 64, 16, True),
    "heads of 80, rotated": (6, 2, 80, 16, True),
    "heads of 96, rotated": (4, 1, 96, 32, True),
    "heads of 96": (3, 3, 96, 16, False),
    "heads of 256, rotated": (4, 2, 256, 16, True),
    "heads of 256": (2, 2, 256, 128, False),
    "tiny": (2, 1, 10, 1, True),
}
NUM_BLOCKS = 7
PADDING = -1


@dataclass
class Batch:
    """Arguments of a call. ``rows`` says which tokens are not padding."""

    qkv: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    slots: torch.Tensor
    rotations: torch.Tensor | None
    rows: torch.Tensor

    def write(self, num_heads: int, num_kv_heads: int) -> None:
        block_size = self.key.shape[1]
        write_kv(
            self.qkv,
            self.key,
            self.value,
            self.slots,
            num_heads,
            num_kv_heads,
            block_size,
            self.rotations,
        )


def make_batch(
    case: str, num_tokens: int, dtype: torch.dtype, device: torch.device, padded: bool = True
) -> Batch:
    """Random tokens for random slots of a cache that is full of other values."""
    num_heads, num_kv_heads, head_dim, block_size, rotated = CASES[case]
    torch.manual_seed(0)
    cache = (NUM_BLOCKS, block_size, num_kv_heads, head_dim)
    slots = torch.randperm(NUM_BLOCKS * block_size)[:num_tokens]
    if padded:
        slots[1::3] = PADDING
    angles = torch.rand(num_tokens, 1, head_dim // 2) * 100
    rotations = torch.polar(torch.ones_like(angles), angles).to(device)
    return Batch(
        qkv=torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim).to(device, dtype),
        key=torch.randn(cache).to(device, dtype),
        value=torch.randn(cache).to(device, dtype),
        slots=slots.to(device),
        rotations=rotations if rotated else None,
        rows=(slots != PADDING).nonzero().flatten().to(device),
    )


def rotate(heads: torch.Tensor, rotations: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """The rotation written out, computed in a dtype: float32 as models do, float64 exactly."""
    real, imag = heads[..., 0::2].to(wide), heads[..., 1::2].to(wide)
    cos, sin = rotations.real.to(wide), rotations.imag.to(wide)
    pairs = torch.stack((real * cos - imag * sin, real * sin + imag * cos), dim=-1)
    return pairs.flatten(-2)


def check(batch: Batch, num_heads: int, num_kv_heads: int) -> None:
    """Write, and compare everything that may change and everything that may not."""
    queries, keys, values = batch.qkv.clone().split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    before = {"key": batch.key.clone(), "value": batch.value.clone()}
    batch.write(num_heads, num_kv_heads)
    rows, slots = batch.rows, batch.slots[batch.rows]
    written = {name: getattr(batch, name).flatten(0, 1)[slots] for name in before}
    assert torch.equal(written["value"], values[rows])
    new_queries, *rest = batch.qkv.split((num_heads, 2 * num_kv_heads), dim=1)
    assert torch.equal(rest[0], torch.cat((keys, values), dim=1))
    if batch.rotations is None:
        assert torch.equal(written["key"], keys[rows])
        assert torch.equal(new_queries, queries)
    else:
        turns = batch.rotations[rows]
        for old, new in ((keys[rows], written["key"]), (queries[rows], new_queries[rows])):
            plain = rotate(old, turns, torch.float32).to(old.dtype)
            assert_as_exact_as(plain, new, rotate(old, turns, torch.float64))
        queries[rows] = new_queries[rows]
        assert torch.equal(new_queries, queries)  # padding stays as it was
    for name, cache in before.items():
        cache.view(-1, *cache.shape[2:])[slots] = written[name]
        assert torch.equal(getattr(batch, name), cache)  # nothing but the slots changed


@pytest.mark.parametrize("case", CASES)
def test_keys_and_values_reach_their_slots_and_nothing_else_changes(
    case: str, dtype: torch.dtype, device: torch.device
) -> None:
    num_tokens = 7 if CASES[case][3] > 1 else 5
    check(make_batch(case, num_tokens, dtype, device), *CASES[case][:2])


@pytest.mark.parametrize("num_tokens", [0, 1])
@pytest.mark.parametrize("case", ["OPT-125M", "SmolLM2"])
def test_batches_of_one_token_and_of_none(case: str, num_tokens: int, device: torch.device) -> None:
    batch = make_batch(case, num_tokens, torch.float32, device, padded=False)
    check(batch, *CASES[case][:2])


@pytest.mark.parametrize("case", ["OPT-125M", "SmolLM2"])
def test_a_batch_of_padding_alone_writes_nothing(case: str, device: torch.device) -> None:
    batch = make_batch(case, 3, torch.float32, device)
    batch.slots.fill_(PADDING)
    batch.rows = batch.rows[:0]
    check(batch, *CASES[case][:2])


@pytest.mark.parametrize("case", ["OPT-125M", "SmolLM2"])
def test_rows_and_blocks_may_lie_apart(case: str, device: torch.device) -> None:
    batch = make_batch(case, 5, torch.float32, device)
    num_tokens, num_rows, head_dim = batch.qkv.shape
    wide = torch.zeros(num_tokens, num_rows + 3, head_dim, device=device)
    wide[:, :num_rows] = batch.qkv
    batch.qkv = wide[:, :num_rows]
    batch.key, batch.value = torch.stack((batch.key, batch.value), dim=1).unbind(1)
    check(batch, *CASES[case][:2])
    assert not wide[:, num_rows:].any()


def test_a_slot_beyond_two_to_the_31_elements_is_reached(device: torch.device) -> None:
    num_kv_heads, head_dim, block_size = 2, 64, 16
    per_block = 2 * block_size * num_kv_heads * head_dim
    num_blocks = 2**31 // per_block + 3
    # Untouched pages of it cost no memory on a CPU.
    memory = torch.empty(
        num_blocks, 2, block_size, num_kv_heads, head_dim, dtype=torch.float16, device=device
    )
    qkv = torch.randn(1, 3 * num_kv_heads, head_dim, device=device).half()
    slot = torch.tensor([num_blocks * block_size - 1], device=device)
    write_kv(qkv, memory[:, 0], memory[:, 1], slot, num_kv_heads, num_kv_heads, block_size)
    keys, values = qkv[0, num_kv_heads:].split(num_kv_heads)
    assert torch.equal(memory[-1, 0, -1], keys)
    assert torch.equal(memory[-1, 1, -1], values)
