"""Every scheduling policy by name. A new policy is a file with a `Planner`, and a line here.

`minserve serve`, `minserve simulate` and the programs in bench/ take the policies from here. A
policy's module is imported when the policy is asked for, so that the names alone cost nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from minserve.errors import ConfigError

if TYPE_CHECKING:
    from minserve.planner.policies.base import Planner
    from minserve.planner.predict.lengths import LengthEstimator
    from minserve.planner.predict.perf_model import PerfModel

# By name, the module and the class of the planner.
POLICIES = {
    "dp": "minserve.planner.policies.dp:DpPlanner",
    "edf": "minserve.planner.policies.edf:EdfPlanner",
    "sarathi": "minserve.planner.policies.sarathi:SarathiPlanner",
    "fcfs": "minserve.planner.policies.fcfs:FcfsPlanner",
}


def planner_class(name: str) -> type[Planner]:
    """Return the planner's class of a policy.

    Raises:
        ConfigError: for an unknown name.
    """
    if name not in POLICIES:
        raise ConfigError(f"unknown policy {name!r}; known: {', '.join(POLICIES)}")
    module, _, class_name = POLICIES[name].partition(":")
    found: type[Planner] = getattr(import_module(module), class_name)
    return found


def promising_policies() -> list[str]:
    """Return the names of the policies that promise SLOs."""
    return [name for name in POLICIES if planner_class(name).promises]


def make_safe_planner(*, chunked_prefill: bool = True) -> Planner:
    """Return a planner to fall back to where another one fails: simple, without memory, and
    without promises.
    """
    return make_planner("sarathi" if chunked_prefill else "fcfs", chunked_prefill=chunked_prefill)


def make_planner(
    name: str,
    *,
    chunked_prefill: bool = True,
    model: PerfModel | None = None,
    lengths: LengthEstimator | None = None,
    best_effort_share: float = 0.05,
) -> Planner:
    """Return a planner of the policy of that name, with these `PlannerSettings`.

    Raises:
        ConfigError: for an unknown name, or a setting that the policy cannot honour.
    """
    from minserve.planner.policies.base import PlannerSettings

    settings = PlannerSettings(
        model=model,
        chunked_prefill=chunked_prefill,
        lengths=lengths,
        best_effort_share=best_effort_share,
    )
    return planner_class(name).create(settings)
