"""One file per policy, behind the `Planner` interface."""

from __future__ import annotations

from minserve.errors import ConfigError
from minserve.planner.policies.base import Planner
from minserve.planner.policies.dp import DpPlanner
from minserve.planner.policies.edf import EdfPlanner
from minserve.planner.policies.fcfs import FcfsPlanner
from minserve.planner.policies.sarathi import SarathiPlanner
from minserve.planner.predict.lengths import LengthEstimator
from minserve.planner.predict.perf_model import PerfModel

# Policies that promise SLOs, and need to know the device's speed for it.
PROMISING = ("dp", "edf")


def make_planner(
    name: str,
    *,
    chunked_prefill: bool = True,
    model: PerfModel | None = None,
    lengths: LengthEstimator | None = None,
    best_effort_share: float = 0.05,
) -> Planner:
    """The policy of that name.

    Args:
        model: the device's speed; may be set later (``planner.model``).
        lengths, best_effort_share: for the policies that promise SLOs.

    Raises:
        ConfigError: for an unknown name, or a setting that the policy cannot honour.
    """
    if name != "fcfs" and not chunked_prefill:
        raise ConfigError(f"{name} always chunks prefills; use --policy fcfs without chunking")
    if name == "sarathi":
        return SarathiPlanner(model)
    if name == "fcfs":
        return FcfsPlanner(model, chunked_prefill=chunked_prefill)
    if name in PROMISING:
        kind = DpPlanner if name == "dp" else EdfPlanner
        return kind(model, lengths=lengths, best_effort_share=best_effort_share)
    raise ConfigError(f"unknown policy {name!r}; known: dp, edf, sarathi, fcfs")
