"""The dry run: batches of every kind, and nobody's KV touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from minserve import Engine
from minserve.kernels.attention import AttentionMetadata


def test_a_dry_run_is_as_large_as_the_largest_batch_and_leaves_no_trace(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(str(tiny_llama_dir), dtype="float32", threads=1, num_blocks=9, block_size=8)
    runner, batches = engine._core.runner, []
    prepare = runner.backend.prepare

    def recorded(metadata: AttentionMetadata) -> None:
        batches.append((metadata.query_start_loc, metadata.seq_lens, metadata.num_decodes))
        prepare(metadata)

    monkeypatch.setattr(runner.backend, "prepare", recorded)
    runner.dry_run(num_tokens=45, longest=20, num_seqs=4, max_queries=3)
    assert batches == [
        ([0, 20, 40, 45], [20, 20, 5], 0),
        # Decodes of one to three query tokens behind a long context, each beside a short chunk.
        ([0, 1, 2], [20, 20], 1),
        ([0, 2, 4], [20, 20], 1),
        ([0, 3, 6], [20, 20], 1),
    ]
    assert not any(kv.key.any() or kv.value.any() for kv in runner.kv)
