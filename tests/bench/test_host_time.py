"""The stand-in for a device: what it waits for in either order."""

from __future__ import annotations

from pathlib import Path

import host_time
import pytest

from minserve.engine.relay import RelayEngine


def test_a_device_waits_for_the_host_only_where_nothing_is_queued(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_time, "ITERATIONS", 10)
    monkeypatch.setattr(host_time, "WARM_UP", 2)
    engine = RelayEngine(
        str(tiny_llama_dir), executor="simulated", profile="opt-6.7b-a100", num_blocks=400,
        max_num_seqs=4,
    )  # fmt: skip
    for kind, params in host_time.PARAMS.items():
        # A batch that takes a minute hides whatever the host does.
        behind, after = (
            host_time.measure(engine, 4, params, 60_000.0, order) for order in (True, False)
        )
        assert [waits for waits, _ in behind] == [0.0] * 10, kind
        assert min(waits for waits, _ in after) > 0.0
        assert min(work for _, work in behind) > 0.0
        # A batch that takes no time hides nothing.
        instant = host_time.measure(engine, 4, params, 0.0, True)
        assert min(waits for waits, _ in instant) > 0.0
    assert not engine.has_work
    assert engine._core.pool.num_free_blocks == 400
