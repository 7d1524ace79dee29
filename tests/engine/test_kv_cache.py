"""How many KV blocks fit a GPU's memory."""

from __future__ import annotations

import pytest
import torch

from minserve.config import EngineConfig
from minserve.engine.kv_cache import GIB, bytes_per_block, choose_num_blocks
from minserve.errors import ConfigError
from minserve.models.base import ModelShape

SHAPE = ModelShape(
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    hidden_size=4096,
    vocab_size=50272,
    max_positions=2048,
    scale=128**-0.5,
)
GPU = torch.device("cuda")


def num_blocks(free_gib: float, monkeypatch: pytest.MonkeyPatch, **graphs: bool) -> int:
    free = int(free_gib * GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 80 * GIB))
    config = EngineConfig(block_size=16, max_num_seqs=512)
    return choose_num_blocks(config, [SHAPE], torch.bfloat16, GPU, **graphs)


def test_a_gpu_gives_most_of_what_is_free_and_graphs_have_their_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    per_block = bytes_per_block(SHAPE, 16, torch.bfloat16)
    assert per_block == 2 * 32 * 16 * 32 * 128 * 2
    plain = num_blocks(40.0, monkeypatch) * per_block / GIB
    with_graphs = num_blocks(40.0, monkeypatch, with_graphs=True) * per_block / GIB
    assert plain == pytest.approx(36.0, abs=0.01)
    assert with_graphs == pytest.approx(34.0, abs=0.01)


def test_no_more_blocks_than_all_sequences_could_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_blocks(4000.0, monkeypatch) == 512 * 2048 // 16


def test_a_full_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="raise --kv-cache-gib or lower --block-size"):
        num_blocks(0.005, monkeypatch)
