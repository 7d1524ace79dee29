"""The results of `policies.py`: statistics of paired turns, and their table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from minserve.tables import text_table
from shared.paired.curves import (
    Capacities,
    Difference,
    by_group,
    curve_of,
    in_percent,
    left_out_words,
    mean,
    percent,
    rounded,
)
from shared.paired.turns import RULE, Cell, Pairs

OURS = "dp"


def summary(pairs: Pairs, cells: Sequence[Cell], policies: Sequence[str]) -> dict[str, Any]:
    """Return the results as JSON values.

    Args:
        policies: all policies, dp among them.
    """
    simple = [policy for policy in policies if policy != OURS]
    found = {cell.name: _cell(pairs, cell, policies, simple) for cell in cells}
    leads = {cell.name: _best(pairs, cell, simple)[1] for cell in cells}
    return {
        "rule": RULE,
        "below": [name for name, lead in leads.items() if lead.is_below],
        "above": [name for name, lead in leads.items() if lead.is_above],
        "mean_difference": mean([one.mean for one in leads.values() if one.num_pairs]),
        "cells": found,
        "capacity": {
            group: {policy: _capacity(pairs, own, policy) for policy in simple}
            for group, own in by_group(cells).items()
        },
    }


def _cell(
    pairs: Pairs, cell: Cell, policies: Sequence[str], simple: Sequence[str]
) -> dict[str, Any]:
    best, lead = _best(pairs, cell, simple)
    return {
        "scenario": cell.scenario,
        "rate": cell.rate,
        "tight": cell.tight,
        "loose": cell.loose,
        "busy": cell.busy,
        "policies": {policy: _policy(pairs, cell, policy) for policy in policies},
        "best_simple": best,
        "difference": lead.to_dict(),
        "differences": {policy: _lead(pairs, cell, policy).to_dict() for policy in simple},
        "left_out": {policy: dict(pairs.left_out(cell, OURS, policy)) for policy in simple},
    }


def _policy(pairs: Pairs, cell: Cell, policy: str) -> dict[str, Any]:
    """Return the results of all turns of a policy, also of turns whose pair is left out."""
    turns = pairs.of(cell, policy)
    each = [one.attainment for one in turns]
    return {
        "attainment": mean(each),
        "spread": rounded(statistics.stdev(each)) if len(each) > 1 else None,
        "mean_form": mean([one.attainment_mean for one in turns]),
        "turns": len(each),
    }


def _best(pairs: Pairs, cell: Cell, simple: Sequence[str]) -> tuple[str | None, Difference]:
    """Return the simple policy over which dp has the smallest lead, and the lead."""
    leads = {policy: _lead(pairs, cell, policy) for policy in simple}
    known = {policy: lead for policy, lead in leads.items() if lead.num_pairs}
    if not known:
        return None, Difference(math.nan, math.nan, math.nan, 0)
    best = min(known, key=lambda policy: known[policy].mean)
    return best, known[best]


def _lead(pairs: Pairs, cell: Cell, policy: str) -> Difference:
    kept = pairs.kept(cell, OURS, policy)
    return Difference.of([(ours.attainment, theirs.attainment) for ours, theirs in kept])


def _capacity(pairs: Pairs, cells: Sequence[Cell], policy: str) -> dict[str, Any] | None:
    found = Capacities.of(curve_of(pairs, cells, OURS, policy))
    return None if found is None else found.to_dict()


def table(result: Mapping[str, Any]) -> str:
    """Return lines for the terminal: a row per cell."""
    cells = result["cells"]
    policies = list(next(iter(cells.values()))["policies"])
    headings = ("cell", *policies, "best", "difference (95%)", "pairs", "left out")
    rows = []
    for name, cell in cells.items():
        best = cell["best_simple"]
        rows.append(
            (
                name,
                *(percent(cell["policies"][one]["attainment"]) for one in policies),
                best,
                in_percent(cell["difference"]),
                cell["difference"]["pairs"],
                sum(cell["left_out"][best].values()) if best else 0,
            )
        )
    lines = [
        f"% of offered requests that kept their SLO; {OURS} less the best simple policy",
        text_table(headings, rows),
    ]
    lines += [
        f"{OURS} is {word} beyond the spread in {len(result[word])} of {len(cells)} cells"
        + "".join(f"\n  {name}" for name in result[word])
        for word in ("below", "above")
    ]
    left_out = [one for cell in cells.values() for one in cell["left_out"].values()]
    return "\n".join([*lines, left_out_words(left_out)])
