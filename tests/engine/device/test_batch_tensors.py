"""A batch's inputs against the same written out token by token."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from minserve.engine.device.batch_tensors import (
    BatchLayout,
    Chunk,
    fill_in,
    place,
    unknown_token,
)

CPU = torch.device("cpu")
BLOCK = 8


def random_chunks(counts: list[int], seed: int = 0) -> list[Chunk]:
    rng = random.Random(seed)
    chunks = []
    for count in counts:
        start = rng.randrange(3 * BLOCK)
        num_blocks = -(-(start + count) // BLOCK) + rng.randrange(2)
        tokens = [rng.randrange(1, 500) for _ in range(count)]
        chunks.append(Chunk(tokens, start, rng.sample(range(1, 200), num_blocks)))
    return chunks


BATCHES = {
    "one decode": [1],
    "decodes": [1] * 7,
    "verifications": [3, 1, 5],
    "a prefill": [41],
    "mixed": [1, 1, 2, 30, 17],
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("padding", [(0, 0, 0), (5, 3, 4)], ids=["exact", "padded"])
def test_every_input_is_in_its_place(batch: str, padding: tuple[int, int, int]) -> None:
    chunks = random_chunks(BATCHES[batch])
    exact = BatchLayout.of(chunks)
    layout = BatchLayout(*np.add(exact, padding).tolist())
    buffer, host = place(chunks, layout, BLOCK, CPU)
    assert buffer.dtype == torch.int64
    assert buffer.shape == (layout.size,)
    parts = layout.split(buffer)
    more_tokens, more_seqs, more_blocks = padding
    spans = [(chunk, p) for chunk in chunks for p in range(chunk.start, chunk.end)]
    total = len(spans)
    assert parts.token_ids.tolist() == [
        *(chunk.token_ids[p - chunk.start] for chunk, p in spans),
        *[0] * more_tokens,
    ]
    assert parts.positions.tolist() == [p for _, p in spans] + [0] * more_tokens
    slots = [chunk.block_table[p // BLOCK] * BLOCK + p % BLOCK for chunk, p in spans]
    assert parts.slot_mapping.tolist() == slots + [-1] * more_tokens
    ends = np.cumsum([len(chunk.token_ids) for chunk in chunks]).tolist()
    assert parts.starts.tolist() == [0, *ends, *[total] * more_seqs]
    assert parts.lengths.tolist() == [chunk.end for chunk in chunks] + [0] * more_seqs
    width = exact.num_blocks + more_blocks
    tables = [c.block_table + [0] * (width - len(c.block_table)) for c in chunks]
    assert parts.block_tables.tolist() == tables + [[0] * width] * more_seqs
    assert host.starts.tolist() == parts.starts.tolist()
    assert host.lengths.tolist() == parts.lengths.tolist()


def test_on_the_cpu_nothing_is_copied() -> None:
    chunks = random_chunks([1, 9])
    layout = BatchLayout.of(chunks)
    buffer, host = place(chunks, layout, BLOCK, CPU)
    parts = layout.split(buffer)
    assert parts.token_ids.data_ptr() == host.token_ids.ctypes.data
    parts.block_tables[0, 0] = 77
    assert host.block_tables[0, 0] == 77


def test_tokens_that_the_device_alone_knows_are_filled_in_there() -> None:
    newest = torch.tensor([70, 71, 72, 73])
    chunks = [
        Chunk([unknown_token(2)], 9, [3, 4]),
        Chunk([unknown_token(0)], 5, [5]),
        Chunk([8, 0, 9], 0, [6]),
        Chunk([unknown_token(2)], 1, [7]),
    ]
    layout = BatchLayout.of(chunks)._replace(num_tokens=8)
    buffer, _ = place(chunks, layout, BLOCK, CPU)
    others = buffer[layout.num_tokens :].clone()
    fill_in(layout.split(buffer).token_ids, newest)
    assert layout.split(buffer).token_ids.tolist() == [72, 70, 8, 0, 9, 72, 0, 0]
    assert torch.equal(buffer[layout.num_tokens :], others)
