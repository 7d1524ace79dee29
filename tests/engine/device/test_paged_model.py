"""The dry run: batches of every kind, and nobody's KV touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from minserve import Engine
from minserve.engine.device import transfers
from minserve.engine.sampling.sampler import Sampler
from minserve.engine.speculation.verification import PendingTokens
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
    monkeypatch.setattr(runner.backend, "chunk_sizes", (1, 9, 30))
    runner.dry_run(num_tokens=45, longest=20, num_seqs=16, max_queries=3)
    assert batches[0] == ([0, 20, 40, 45], [20, 20, 5], 0)
    # Decodes of one to three query tokens behind a long context: one, and as many as can be.
    assert batches[1:7] == [
        ([queries * i for i in range(most + 1)], [20] * most, most)
        for queries in (1, 2, 3)
        for most in (1, min(16, 45 // queries))
    ]
    # Chunks of every kind that fits, first ones and last ones.
    assert batches[7:] == [([0, size], [length], 0) for size in (1, 9) for length in (size, 20)]
    assert not any(kv.key.any() or kv.value.any() for kv in runner.kv)


def test_a_dry_run_launches_what_draws_would_compile(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(
        str(tiny_llama_dir),
        dtype="float32",
        num_blocks=9,
        block_size=16,
        attention_backend="triton",
    )
    sizes: list[int] = []
    monkeypatch.setattr(transfers, "runs_behind", lambda _: True)
    monkeypatch.setattr(
        "minserve.kernels.triton.truncation.truncate",
        lambda weights, _: sizes.append(weights.shape[1]),
    )
    engine._core.runner.dry_run(num_tokens=2, longest=2)
    # What the kernel is compiled for changes with the size of 1 alone, and with multiples of 16.
    assert sizes
    assert all(size > 1 and size % 16 == 0 for size in sizes)


def test_a_dry_run_draws_for_all_sequences_and_their_drafts(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(str(tiny_llama_dir), dtype="float32", threads=1, num_blocks=9, block_size=8)
    runner, drawn = engine._core.runner, []
    launch = Sampler.launch

    def noted(self: Sampler, logits: Tensor, *batch: Any) -> PendingTokens:
        drawn.append(tuple(logits.shape))
        return launch(self, logits, *batch)

    monkeypatch.setattr(Sampler, "launch", noted)
    runner.dry_run(num_tokens=45, longest=20, num_seqs=6, max_queries=3)
    assert not drawn, "a CPU has nothing to load"
    monkeypatch.setattr(transfers, "runs_behind", lambda _: True)
    runner.dry_run(num_tokens=45, longest=20, num_seqs=6, max_queries=3)
    vocab = runner.model.shape.vocab_size
    assert set(drawn) == {(6, vocab), (18, vocab)}
    drawn.clear()
    runner.dry_run(num_tokens=13, longest=20, num_seqs=6, max_queries=3)
    assert max(drawn) == (12, vocab), "no more than fit a batch"
