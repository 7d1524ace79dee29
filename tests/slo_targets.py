"""Targets in short form for the tests of promises and of what was kept."""

from __future__ import annotations

import math
from typing import Any

from minserve.slo.objectives import StageTarget, Targets


def targets(ttft: float = math.inf, *stages: Any) -> Targets:
    """A TTFT, and stages as arguments of `StageTarget`."""
    return Targets(ttft, tuple(StageTarget(*stage) for stage in stages) or (StageTarget(),))
