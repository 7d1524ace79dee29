"""One file per policy, behind the `Planner` interface."""

from __future__ import annotations

from minserve.errors import ConfigError
from minserve.planner.policies.base import Planner
from minserve.planner.policies.fcfs import FcfsPlanner
from minserve.planner.policies.sarathi import SarathiPlanner


def make_planner(name: str, *, chunked_prefill: bool = True) -> Planner:
    """The policy of that name.

    Raises:
        ConfigError: for an unknown name, or a setting that the policy cannot honour.
    """
    if name == "sarathi":
        if not chunked_prefill:
            raise ConfigError("sarathi always chunks prefills; use --policy fcfs without chunking")
        return SarathiPlanner()
    if name == "fcfs":
        return FcfsPlanner(chunked_prefill=chunked_prefill)
    raise ConfigError(f"unknown policy {name!r}; known: sarathi, fcfs")
