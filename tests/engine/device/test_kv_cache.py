"""How many KV blocks fit a GPU's memory, or what a container leaves of the host's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minserve.config import EngineConfig
from minserve.engine.device.kv_cache import bytes_per_block, choose_num_blocks
from minserve.errors import ConfigError
from minserve.machine import GIB, Machine
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


def num_blocks(
    free_gib: float, monkeypatch: pytest.MonkeyPatch, free_bytes: int | None = None
) -> int:
    free = int(free_gib * GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 80 * GIB))
    config = EngineConfig(block_size=16, max_num_seqs=512)
    return choose_num_blocks(config, [SHAPE], torch.bfloat16, GPU, free_bytes=free_bytes)


def test_a_gpu_gives_most_of_what_graphs_leave_of_what_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    per_block = bytes_per_block(SHAPE, 16, torch.bfloat16)
    assert per_block == 2 * 32 * 16 * 32 * 128 * 2
    plain = num_blocks(40.0, monkeypatch) * per_block / GIB
    with_graphs = num_blocks(40.0, monkeypatch, 30 * GIB) * per_block / GIB
    assert plain == pytest.approx(36.0, abs=0.01)
    assert with_graphs == pytest.approx(27.0, abs=0.01)


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_in_8_bits_nearly_twice_the_blocks_fit(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10 * GIB, 80 * GIB))
    config = EngineConfig(block_size=16, max_num_seqs=512, kv_cache_dtype=form)
    # A head of 128 has 256 bytes in bfloat16; in 8 bits it has 128, and 4 of its scale.
    per_block = 2 * 32 * 16 * 32 * (128 + 4)
    assert bytes_per_block(SHAPE, 16, torch.bfloat16, form) == per_block
    assert choose_num_blocks(config, [SHAPE], torch.bfloat16, GPU) == int(9 * GIB // per_block)


def test_no_more_blocks_than_all_sequences_could_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_blocks(4000.0, monkeypatch) == 512 * 2048 // 16


def test_a_full_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="raise --kv-cache-gib or lower --block-size"):
        num_blocks(0.005, monkeypatch)


# --- CPUs ---

PER_BLOCK = bytes_per_block(SHAPE, 16, torch.bfloat16)


def num_blocks_on_cpu(
    free_gib: float,
    monkeypatch: pytest.MonkeyPatch,
    limit_gib: float | None = None,
    **settings: Any,
) -> int:
    machine = Machine(
        processors=2,
        cores=2,
        cpu_quota=None,
        memory_limit=None if limit_gib is None else int(limit_gib * GIB),
        free_memory=int(free_gib * GIB),
    )
    monkeypatch.setattr(Machine, "look", lambda: machine)
    config = EngineConfig(block_size=16, token_budget=512, **settings)
    return choose_num_blocks(config, [SHAPE], torch.bfloat16, torch.device("cpu"))


def test_a_cpu_gives_a_quarter_of_what_is_free_and_no_more_than_four_gib(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert num_blocks_on_cpu(8.0, monkeypatch) == 2 * GIB // PER_BLOCK
    assert num_blocks_on_cpu(100.0, monkeypatch) == 4 * GIB // PER_BLOCK


@pytest.mark.parametrize("max_num_seqs", [4, 8, 32, 128])
@pytest.mark.parametrize("free_gib", [0.3, 0.4, 0.6, 0.8, 1.5])
def test_where_little_is_free_a_pass_over_all_that_have_a_block_has_room(
    monkeypatch: pytest.MonkeyPatch, free_gib: float, max_num_seqs: int
) -> None:
    settings = {"max_model_len": 64, "max_num_seqs": max_num_seqs}
    blocks = num_blocks_on_cpu(free_gib, monkeypatch, **settings)
    logits, hidden = 16 * 4 * SHAPE.vocab_size, 16 * 4 * SHAPE.hidden_size

    def needed(num: int) -> int:
        return num * PER_BLOCK + min(num, max_num_seqs) * logits + 512 * hidden + 96 * 2**20

    assert needed(blocks) <= free_gib * GIB
    # Not one more: they are all that are of use, a quarter of the memory, or all that fit.
    assert (
        blocks == max_num_seqs * 64 // 16
        or (blocks + 1) * PER_BLOCK > free_gib * GIB / 4
        or needed(blocks + 1) > free_gib * GIB
    )


def test_too_little_for_a_useful_cache_is_refused_with_the_limit_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigError) as error:
        num_blocks_on_cpu(0.3, monkeypatch, limit_gib=14.0)
    said = str(error.value)
    assert "memory limited to 14.00 GiB by a cgroup, 0.30 GiB free" in said
    assert "KV cache of 256 tokens (0.125 GiB)" in said
    assert "allow more, or say with --kv-cache-gib what it may take" in said
    # Who says what the cache may take is believed, as far as it can be.
    assert num_blocks_on_cpu(0.3, monkeypatch, limit_gib=14.0, kv_cache_gib=0.2) == 25


@pytest.mark.parametrize("settings", [{"kv_cache_gib": 1.5}, {"num_blocks": 192}])
def test_a_cache_that_would_not_fit_once_it_is_full_is_refused(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    (flag,) = (f"--{name.replace('_', '-')}" for name in settings)
    assert num_blocks_on_cpu(1.6, monkeypatch, limit_gib=2.0, **settings) == 192
    with pytest.raises(ConfigError, match=rf"^{flag} asks for .* 1\.50 GiB, .* 2\.00 GiB"):
        num_blocks_on_cpu(1.4, monkeypatch, limit_gib=2.0, **settings)
