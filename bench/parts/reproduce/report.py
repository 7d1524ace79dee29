"""Figures and tables of `reproduce.py`, computed from the results that there are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from minserve.tables import text_table
from parts.reproduce.capacity_searches import search_of
from parts.reproduce.plan import (
    BASELINES,
    HEADLINE,
    LARGER,
    OTHER_POLICIES,
    PROMISES,
    SMALL,
    WEAK,
    WITH,
    WITHOUT,
    Plan,
)
from parts.reproduce.sections import (
    ABLATED,
    SCALED,
    SENSITIVE,
    SENSITIVE_POLICIES,
    ablation_searches,
    burst_points,
    capacities,
    error_points,
    lengths_searches,
    planning_points,
    routing_searches,
    scaling_searches,
    slo_searches,
)
from shared.simulated.jobs import Measured
from shared.simulated.search import geomean

# The paper's results, for comparison: dp over the best baseline, over greedy admission by deadline,
# and capacities of 4 replicas over that of one.
GOALS = {"over best": 2.2, "over edf": 1.1, "chatbot": 4.6, "tools": 5.4, "coding": 6.2}
ABLATION_GOALS = {"no speculation": 1.66, "no routing": 1.19}
# Capacities by combination, mode and policy.
Capacities = Mapping[tuple[str, str], Mapping[str, Mapping[str, float]]]


def name_of(combination: tuple[str, str]) -> str:
    """Return the scenario's name alone if the headline has it on this device, else both names."""
    scenario, device = combination
    return scenario if combination in HEADLINE else f"{scenario} {device}"


def capacity_table(plan: Plan, found: Measured) -> dict[tuple[str, str], dict[str, dict]]:
    """Return requests per second and GPU by combination, mode and policy, as far as measured.

    ``best`` is the highest of the baselines, once all of them are there. DistServe drafts
    nothing, so its value with speculation is the one without.
    """
    table: dict[tuple[str, str], dict[str, dict]] = {}
    for scenario, device, policy, mode in capacities(plan):
        result = found(search_of(plan, scenario, device, policy, mode))
        if result is not None:
            modes = table.setdefault((scenario, device), {})
            modes.setdefault(mode, {})[policy] = result["capacity"] or 0.0
    for modes in table.values():
        if WITH in modes and "distserve" in modes.get(WITHOUT, {}):
            modes[WITH]["distserve"] = modes[WITHOUT]["distserve"]
        for row in modes.values():
            if all(policy in row for policy in BASELINES):
                row["best"] = max(row[policy] for policy in BASELINES)
    return table


def first_mode(modes: Mapping[str, Any]) -> Mapping[str, float]:
    """Return the values with speculation if there is a draft model, else those without."""
    return modes.get(WITH) or modes.get(WITHOUT, {})


def ratios(
    table: Capacities,
    combinations: Iterable[tuple[str, str]],
    other: str,
    mode: str | None = None,
) -> dict[str, float] | None:
    """Return ratios of `dp` over another column, by combination; ``None`` if one is missing."""
    found = {}
    for combination in combinations:
        modes = table.get(combination, {})
        row = first_mode(modes) if mode is None else modes.get(mode, {})
        if not row.get("dp") or not row.get(other):
            return None
        found[name_of(combination)] = row["dp"] / row[other]
    return found


def geomean_of(found: Mapping[str, float] | None) -> float | None:
    return None if not found else round(geomean(list(found.values())), 3)


def scaling_of(plan: Plan, found: Measured) -> dict[str, dict[str, dict[str, float]]]:
    """Return total capacity over that of one replica, by scenario, policy with router, replicas."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for scenario, device in SCALED:
        if (scenario, device) not in plan.combinations:
            continue
        searches = scaling_searches(plan, found, scenario, device)
        for (policy, router, replicas), search in searches.items():
            result, one = found(search), found(_one(searches, policy))
            if replicas > 1 and result is not None and one and one["capacity"]:
                total = replicas * (result["capacity"] or 0.0) / one["capacity"]
                name = one["best"]["policy"] if policy == "baseline" else policy
                row = table.setdefault(scenario, {}).setdefault(f"{name}, {router}", {"1": 1.0})
                row[str(replicas)] = round(total, 3)
    return table


def _one(searches: Mapping[tuple[str, str, int], Any], policy: str) -> Any:
    router = "slo" if policy == "dp" else "least-loaded"
    return searches[policy, router, 1]


def ablations_of(plan: Plan, found: Measured) -> dict[str, dict[str, float]]:
    """Return by scenario and missing part the capacity with the part over that without."""
    table: dict[str, dict[str, float]] = {}
    for scenario in ABLATED:
        searches = dict(ablation_searches(plan, scenario))
        whole = found(searches.pop("full"))
        pairs = {name: (whole, found(search)) for name, search in searches.items()}
        routing = routing_searches(plan, found, scenario)
        if routing:
            pairs["no routing"] = (found(routing[0]), found(routing[1]))
        for name, (more, less) in pairs.items():
            if more and less and more["capacity"] and less["capacity"]:
                gain = more["capacity"] / less["capacity"]
                table.setdefault(scenario, {})[name] = round(gain, 3)
    return table


def lengths_of(plan: Plan, found: Measured) -> dict[str, dict[str, float]]:
    """Return by scenario and policy the capacity where output lengths are learned."""
    table: dict[str, dict[str, float]] = {}
    for scenario, _, policy, search in lengths_searches(plan):
        result = found(search)
        if result is not None:
            table.setdefault(scenario, {})[policy] = result["capacity"] or 0.0
    return table


def summary(plan: Plan, found: Measured, seconds: float) -> dict[str, Any]:
    """Return the main figures; those that are not measured yet are ``None`` or missing."""
    table = capacity_table(plan, found)
    headline = [one for one in HEADLINE if one in plan.combinations]
    everything = [*headline, *(one for one in LARGER if one in plan.combinations)]
    drafting = [one for one in headline if one[1] == SMALL]
    return {
        "geomean_over_best": geomean_of(ratios(table, headline, "best")),
        "geomean_over_edf": geomean_of(ratios(table, headline, "edf")),
        "geomean_over_best_without_speculation": geomean_of(
            ratios(table, headline, "best", WITHOUT)
        ),
        "geomean_over_best_all_combinations": geomean_of(ratios(table, everything, "best")),
        "geomean_over_best_opt_with_speculation": geomean_of(ratios(table, drafting, "best", WITH)),
        "over_best": _rounded(ratios(table, headline, "best")),
        "capacity": {name_of(one): _rounded(first_mode(table[one])) for one in table},
        "capacity_without_speculation": {
            name_of(one): _rounded(table[one].get(WITHOUT)) for one in table
        },
        "capacity_with_learned_lengths": lengths_of(plan, found),
        "scaling": scaling_of(plan, found),
        "ablations": ablations_of(plan, found),
        "goals": GOALS,
        "seconds": round(seconds, 1),
        "quick": plan.quick,
    }


def details(plan: Plan, found: Measured) -> dict[str, Any]:
    """Return details of the capacities: intervals, variants, and attainment at all rates."""
    rows: dict[str, Any] = {}
    for scenario, device, policy, mode in capacities(plan):
        result = found(search_of(plan, scenario, device, policy, mode))
        if result is not None:
            kept = {name: result[name] for name in result if name != "best"}
            rows.setdefault(f"{scenario} {device}", {}).setdefault(mode, {})[policy] = kept
    return rows


def markdown(plan: Plan, found: Measured) -> str:
    """Return all tables as Markdown."""
    parts = [
        _headline(plan, found),
        _capacities(plan, found, WITH),
        _capacities(plan, found, WITHOUT),
        _lengths(plan, found),
        _ablations(plan, found),
        _scaling(plan, found),
        _bursts(plan, found),
        _slo_changes(plan, found),
        _errors(plan, found),
        _planning(plan, found),
    ]
    return "\n\n".join(part for part in parts if part)


def _headline(plan: Plan, found: Measured) -> str:
    one = summary(plan, found, 0.0)
    rows = [
        ("dp over the best baseline", one["geomean_over_best"], GOALS["over best"]),
        ("the same without speculation", one["geomean_over_best_without_speculation"], ""),
        ("the same over all combinations", one["geomean_over_best_all_combinations"], ""),
        ("dp over edf", one["geomean_over_edf"], GOALS["over edf"]),
    ]
    rows += [
        (f"4 replicas over one, {name}", lines.get("dp, slo", {}).get("4"), GOALS[name])
        for name, lines in one["scaling"].items()
    ]
    return _table("Geometric means of capacities, and goals", ("", "measured", "goal"), rows)


def _capacities(plan: Plan, found: Measured, mode: str) -> str:
    columns = (*PROMISES, *OTHER_POLICIES, *BASELINES, "best", WEAK)
    rows = []
    for combination, modes in capacity_table(plan, found).items():
        row = modes.get(mode)
        if not row:
            continue
        ratio = row["dp"] / row["best"] if row.get("dp") and row.get("best") else None
        rows.append((*combination, *(row.get(name) for name in columns), ratio))
    head = ("scenario", "device", *columns, "dp / best")
    return _table(f"Capacity, requests/s per GPU, {mode} on both sides", head, rows)


def _lengths(plan: Plan, found: Measured) -> str:
    known, rows = capacity_table(plan, found), []
    for combination in HEADLINE:
        learned = lengths_of(plan, found).get(combination[0], {})
        row = first_mode(known.get(combination, {}))
        if learned:
            pairs = [one for p in PROMISES for one in (row.get(p), learned.get(p))]
            rows.append((combination[0], *pairs, row.get("best")))
    head = ("scenario", "dp", "dp, learned", "edf", "edf, learned", "best baseline")
    return _table("Capacity where output lengths are known, and learned", head, rows)


def _ablations(plan: Plan, found: Measured) -> str:
    table = ablations_of(plan, found)
    names = list(dict.fromkeys(name for row in table.values() for name in row))
    rows = [
        (name, *(row.get(name) for row in table.values()), ABLATION_GOALS.get(name, ""))
        for name in names
    ]
    return _table("What each part of dp brings (capacity with over without)",
                  ("without", *table, "paper"), rows)  # fmt: skip


def _scaling(plan: Plan, found: Measured) -> str:
    table = scaling_of(plan, found)
    counts = sorted({int(n) for lines in table.values() for row in lines.values() for n in row})
    rows = [
        (scenario, name, *(row.get(str(n)) for n in counts), GOALS.get(scenario, ""))
        for scenario, lines in table.items()
        for name, row in lines.items()
    ]
    head = ("scenario", "policy, router", *(f"{n} replicas" for n in counts), "goal at 4")
    return _table("Total capacity over that of one replica", head, rows)


def _bursts(plan: Plan, found: Measured) -> str:
    rows = []
    for (load, policy), job in burst_points(plan, found).items():
        result = found(job)
        if result is not None:
            most = max(result["arrivals"]) / result["bin_s"]
            rows.append((load, policy, job.rate, most, _percent(result["attainment"])))
    head = ("load", "policy", "requests/s", "most in 5 s, per s", "attained")
    return _table("The coding window beyond capacity", head, rows)


def _slo_changes(plan: Plan, found: Measured) -> str:
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for scenario in SENSITIVE:
        for (policy, name, value), job in slo_searches(plan, found, scenario).items():
            result = found(job)
            if result is not None:
                what = f"{name} {value:g}" if name else "unchanged"
                rows.setdefault((scenario, what), {})[policy] = result["capacity"] or 0.0
    return _by_policy("Capacity under other promises", "change", rows)


def _errors(plan: Plan, found: Measured) -> str:
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for scenario in SENSITIVE:
        for (policy, name, value), job in error_points(plan, found, scenario).items():
            result = found(job)
            if result is not None:
                what = f"{name} {value}" if name else "none"
                attained = _percent(result["attainment"])
                rows.setdefault((scenario, what), {})[policy] = attained
    return _by_policy("Attainment at 90% of each policy's own capacity, with errors", "error", rows)


def _planning(plan: Plan, found: Measured) -> str:
    rows = []
    for (scenario, policy), job in planning_points(plan, found).items():
        for crowd, times in ((found(job) or {}).get("by_sequences") or {}).items():
            values = (times["plans"], times["p50_ms"], times["p99_ms"], times["max_ms"])
            rows.append((scenario, policy, f"{crowd} or more", *values))
    head = ("scenario", "policy", "sequences", "plans", "p50 ms", "p99 ms", "max ms")
    return _table("Planning time at capacity", head, rows)


def _by_policy(title: str, what: str, rows: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    """Return a table with a column for each of `SENSITIVE_POLICIES`.

    Args:
        what: the heading of what is changed.
        rows: by scenario and change, the values of the policies.
    """
    lines = [(*key, *map(row.get, SENSITIVE_POLICIES)) for key, row in rows.items()]
    return _table(title, ("scenario", what, *SENSITIVE_POLICIES), lines)


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table as Markdown; empty without rows."""
    if not rows:
        return ""
    cells = [[_cell(one) for one in row] for row in rows]
    return f"## {title}\n\n{text_table(head, cells, left=len(head), markdown=True)}"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.3g}"
    return str(value)


def _percent(one: float) -> str:
    return f"{100 * one:.1f}%"


def _rounded(values: Mapping[str, float] | None) -> dict[str, float] | None:
    return None if values is None else {name: round(one, 4) for name, one in values.items()}
