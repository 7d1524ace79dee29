"""What a GPU did while an engine stepped: for how much of the time it was busy, and with what."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

# Categories of a trace's events that keep a GPU busy.
BUSY = ("kernel", "gpu_memcpy", "gpu_memset")
NUM_TOP, NAME_LENGTH = 12, 80


def trace_steps(step: Callable[[], Any], num_steps: int) -> dict[str, Any]:
    """Run some steps under torch's profiler and return `device_shares` of what it saw.

    Only the GPU's own events are recorded, so that the host is hardly slowed down.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(num_steps):
            step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return {"steps": num_steps, **device_shares(events)}


def device_shares(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return how busy a device was between its first and its last event, and what took longest.

    Args:
        events: of a trace in Chrome's format; times are microseconds.

    Returns:
        ``busy_share`` and ``span_ms``, ``None`` where the device did nothing; ``gaps_ms``: the
        longest times without any work; ``top``: names, calls, milliseconds, and shares of the busy
        time.
    """
    own = [event for event in events if event.get("cat") in BUSY and "dur" in event]
    if not own:
        return {"busy_share": None, "span_ms": None, "gaps_ms": [], "top": []}
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in own)
    busy, gaps, end = 0.0, [], spans[0][0]
    for start, until in spans:
        if start > end:
            gaps.append(start - end)
        busy += max(0.0, until - max(start, end))
        end = max(end, until)
    calls: dict[str, list[float]] = defaultdict(list)
    for event in own:
        calls[event["name"][:NAME_LENGTH]].append(event["dur"])
    top = sorted(calls.items(), key=lambda item: -sum(item[1]))[:NUM_TOP]
    total = sum(map(sum, calls.values()))
    return {
        "busy_share": round(busy / (end - spans[0][0]), 4) if end > spans[0][0] else 1.0,
        "span_ms": round((end - spans[0][0]) / 1e3, 3),
        "gaps_ms": [round(gap / 1e3, 4) for gap in sorted(gaps, reverse=True)[:NUM_TOP]],
        "top": [
            {
                "name": name,
                "calls": len(times),
                "ms": round(sum(times) / 1e3, 3),
                "share": round(sum(times) / total, 4) if total else 0.0,
            }
            for name, times in top
        ],
    }
