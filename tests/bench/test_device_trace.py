"""What a trace tells of a device: for how much of the time it was busy, and with what."""

from __future__ import annotations

from typing import Any

from parts.engine_gpu.device_trace import device_shares, trace_steps


def event(name: str, start: float, duration: float, kind: str = "kernel") -> dict[str, Any]:
    return {"name": name, "cat": kind, "ts": start, "dur": duration}


def test_work_side_by_side_counts_once_and_gaps_are_idle() -> None:
    found = device_shares(
        [
            event("late", 90.0, 10.0),
            event("a", 0.0, 30.0),
            event("b", 20.0, 20.0),
            event("copy", 50.0, 10.0, "gpu_memcpy"),
            event("within", 51.0, 2.0),
            event("host", 0.0, 1000.0, "cpu_op"),
            {"name": "mark", "ts": 0.0, "cat": "kernel"},
        ]
    )
    assert found["span_ms"] == 0.1
    assert found["busy_share"] == 0.6
    assert found["gaps_ms"] == [0.03, 0.01]
    assert [row["name"] for row in found["top"]] == ["a", "b", "late", "copy", "within"]
    assert found["top"][0] == {"name": "a", "calls": 1, "ms": 0.03, "share": 0.4167}


def test_calls_of_one_kernel_are_one_row() -> None:
    found = device_shares([event("a", 0.0, 2.0), event("b", 2.0, 3.0), event("a", 5.0, 2.0)])
    assert found["busy_share"] == 1.0
    assert [(row["name"], row["calls"]) for row in found["top"]] == [("a", 2), ("b", 1)]


def test_a_device_that_did_nothing_has_no_share() -> None:
    steps = []
    found = trace_steps(lambda: steps.append(1), 3)
    assert len(steps) == 3
    assert found["busy_share"] is None
