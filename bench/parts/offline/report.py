"""Medians, ratios, table and picture of `offline.py`, computed from its measurements."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minserve.tables import text_table
from minserve.workload.plots import BLUES, GREYS, grid_of, save

Values = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Metric:
    """A quantity that is measured.

    Attributes:
        title: title of its panel in a picture.
        more_is_better: False for times and memory.
    """

    unit: str
    title: str
    more_is_better: bool = True


ROWS: Mapping[str, Metric] = {
    "decode_b1": Metric("tok/s", "decode, batch 1"),
    "decode_b8": Metric("tok/s", "decode, batch 8"),
    "decode_b32": Metric("tok/s", "decode, batch 32"),
    "prefill_1024": Metric("tok/s", "prefill of 1024 tokens"),
    "mixed_step": Metric("steps/s", "16 decodes + 64 of a prompt"),
    "server_b32": Metric("tok/s", "server, 32 streams"),
    "server_b32_share": Metric("of decode_b32", "server, share of its engine"),
    "server_mixed": Metric("tok/s", "server, random load"),
    "server_mixed_ttft_p50": Metric("ms", "random load, TTFT p50", more_is_better=False),
    "server_mixed_ttft_mean": Metric("ms", "random load, TTFT mean", more_is_better=False),
    "server_mixed_tpot_p50": Metric("ms", "random load, TPOT p50", more_is_better=False),
    "server_mixed_tpot_mean": Metric("ms", "random load, TPOT mean", more_is_better=False),
    "cold_first_token_s": Metric("s", "cold start to first token", more_is_better=False),
    "peak_memory_gib": Metric("GiB", "peak memory", more_is_better=False),
}
PANELS_PER_LINE = 5


def medians(turns: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the values of one engine.

    Args:
        turns: each with ``rates``, by row a value for each repeat, and, where its engine ran,
            ``cold_first_token_s`` and ``peak_memory_gib``.

    Returns:
        by row, the median over the repeats of all turns; for the cold start the best value, which
        has the files in memory; for memory the highest. Rows that were not measured are missing.
    """
    pooled: dict[str, list[float]] = {}
    for turn in turns:
        for row, values in turn["rates"].items():
            pooled.setdefault(row, []).extend(values)
    out = {row: statistics.median(values) for row, values in pooled.items()}
    if "server_b32" in out and "decode_b32" in out:
        out["server_b32_share"] = out["server_b32"] / out["decode_b32"]
    for row, choose in (("cold_first_token_s", min), ("peak_memory_gib", max)):
        if found := [turn[row] for turn in turns if row in turn]:
            out[row] = choose(found)
    return {row: _rounded(out[row]) for row in ROWS if row in out}


def best_of(variants: Sequence[Values]) -> dict[str, float]:
    """Return for each row the best value among several variants of an engine."""
    out = {}
    for row, kind in ROWS.items():
        if found := [values[row] for values in variants if row in values]:
            out[row] = max(found) if kind.more_is_better else min(found)
    return out


def ratios(ours: Values, theirs: Values) -> dict[str, float]:
    """Return for each row how many times better the first engine is; below 1 it is worse.

    The rows are those that both engines have and that are not zero.
    """
    out = {}
    for row, kind in ROWS.items():
        if ours.get(row) and theirs.get(row):
            ratio = ours[row] / theirs[row]
            out[row] = round(ratio if kind.more_is_better else 1 / ratio, 2)
    return out


def table(columns: Mapping[str, Values], *, units: bool = True) -> str:
    """Return engines side by side; a dash stands for a value that was not measured.

    Args:
        units: False for ratios, which have none.
    """
    rows = [
        (row, kind.unit if units else "", *(values.get(row) for values in columns.values()))
        for row, kind in ROWS.items()
        if any(row in values for values in columns.values())
    ]
    return text_table(("", "", *columns), rows, left=2)


def share_table(limits: Mapping[str, Any], shares: Values) -> str:
    """Return rows with their limits, and the share of the limit that was reached.

    Args:
        limits: as returned by `MeasuredLimits.to_dict`.
    """
    rows = []
    for row, share in shares.items():
        one = limits["rows"][row]
        rows.append((row, one["limit"], f"{share:.0%}", one["linears_ms"], one["streaming_ms"]))
    return text_table(("", "limit", "reached", "linears ms", "streaming ms"), rows)


def plot(columns: Mapping[str, Values], file: str) -> None:
    """Save a bar chart with a panel for each row that was measured.

    Args:
        columns: values by engine; the bars of minserve are blue.
    """
    rows = [row for row in ROWS if any(row in values for values in columns.values())]
    num_lines = -(-len(rows) // PANELS_PER_LINE)
    num_columns = min(len(rows), PANELS_PER_LINE)
    figure, panels = grid_of(num_lines, num_columns, panel_inches=(3.4, 3.2))
    for panel in panels.flat[len(rows) :]:
        panel.remove()
    ours, greys = iter(BLUES * len(columns)), iter(GREYS * len(columns))
    colours = {
        name: next(ours if name.startswith("minserve") else greys) for name in columns
    }  # fmt: skip
    for panel, row in zip(panels.flat, rows, strict=False):
        shown = {name: values[row] for name, values in columns.items() if row in values}
        bars = panel.bar(range(len(shown)), shown.values(), color=[colours[n] for n in shown])
        panel.bar_label(
            bars, fmt=lambda value: f"{value:.0f}" if value >= 100 else f"{value:.3g}", padding=2
        )
        panel.set_title(ROWS[row].title, fontsize=10)
        panel.set_ylabel(ROWS[row].unit)
        names = [name.replace(", ", "\n").replace(" ", "\n") for name in shown]
        panel.set_xticks(range(len(shown)), names, fontsize=7)
        panel.margins(y=0.15)
    save(figure, file)


def _rounded(value: float) -> float:
    """Return a value with as many digits as are useful: 1 decimal from 10 on, else 3."""
    return round(value, 1 if value >= 10 else 3)
