"""The report of `kernel_bench.py` on a sweep: the table, the goals, the picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minserve.tables import text_table
from parts.kernel_bench.attention import GOAL_CHUNK, GOAL_DECODE, GOAL_LONE
from shared.kernel_cases import OURS
from shared.kernel_timing import Ceilings

Row = dict[str, Any]

DECODE_GOAL, LONE_GOAL = 0.9, 0.6  # of the copy bandwidth: for many decodes, and for a lone decode
PREFILL_GOAL, CUDNN_GOAL = 1.0, 0.75  # of the speed of torch's flash attention, and of cuDNN's
# The fields of a row that do not describe its case.
RESULTS = (
    "kernel", "dtype", "bytes", "flops", "ms", "error", "failed", "launched", "dry", "gb_s",
    "tflop_s", "bound", "share",
)  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Return a line per case; milliseconds are medians; x is a competitor's time over minserve's."""
    names = list(dict.fromkeys(n for row in rows for n in (*row["ms"], *row["failed"])))
    others = [name for name in names if name != OURS]
    headings = ("kernel", "case", "ms", "GB/s", "TFLOP/s", "share", *others)
    cells = [
        (
            row["kernel"],
            _case(row),
            f"{row['ms'][OURS][1]:.4f}" if OURS in row["ms"] else "failed",
            _cell(row, "gb_s", ".0f"),
            _cell(row, "tflop_s", ".1f"),
            _cell(row, "share", ".2f"),
            *(_ratio(row, name) for name in others),
        )
        for row in rows
    ]
    return text_table(headings, cells, left=2)


def _case(row: Row) -> str:
    case = {k: v for k, v in row.items() if k not in RESULTS}
    return " ".join(str(v) if k == "model" else f"{k} {v}" for k, v in case.items())


def _cell(row: Row, name: str, form: str) -> str | None:
    return format(row[name], form) if row.get(name) else None


def _ratio(row: Row, name: str) -> str | None:
    if row.get("dry") or name not in row["ms"] or OURS not in row["ms"]:
        return None
    return f"{row['ms'][name][1] / row['ms'][OURS][1]:.2f}x"


def failures(rows: Sequence[Row]) -> list[str]:
    """Return the cases in which minserve's own kernels failed or were wrong, with the reason."""
    return [
        f"{row['kernel']} {_case(row)}: {row['failed'][OURS]}"
        for row in rows
        if OURS in row["failed"]
    ]


def absent(rows: Sequence[Row]) -> dict[str, str]:
    """Return the competitors that failed in some case, each with the first reason."""
    found: dict[str, str] = {}
    for row in rows:
        for name, reason in row["failed"].items():
            if name != OURS:
                found.setdefault(name, f"{row['kernel']} {_case(row)}: {reason}")
    return found


def summary(rows: Sequence[Row], ceilings: Ceilings | None) -> dict[str, Any]:
    """Return the last line: ceilings, goals, failures. Figures that were not measured are null."""
    goals: dict[str, Any] = {
        "decode_share_b64_c2048": None,
        "decode_share_b1_c2048": None,
        "prefill_vs_sdpa_min": None,
        "prefill_vs_sdpa_median": None,
        "prefill_vs_cudnn_min": None,
    }
    timed = [] if ceilings is None else [row for row in rows if OURS in row["ms"]]
    many, lone = (
        min((row["share"] for row in timed if _is_decode(row, *size)), default=None)
        for size in (GOAL_DECODE, GOAL_LONE)
    )
    goals["decode_share_b64_c2048"], goals["decode_share_b1_c2048"] = many, lone
    ratios, beside_cudnn = (
        [
            row["ms"][other][1] / row["ms"][OURS][1]
            for row in timed
            if row["kernel"] == "prefill"
            and row["chunk"] >= GOAL_CHUNK
            and other in row["ms"]
            and "kv" not in row
        ]
        for other in ("sdpa", "cudnn")
    )
    if beside_cudnn:
        goals["prefill_vs_cudnn_min"] = round(min(beside_cudnn), 3)
    if ratios:
        goals["prefill_vs_sdpa_min"] = round(min(ratios), 3)
        goals["prefill_vs_sdpa_median"] = round(statistics.median(ratios), 3)
    return {
        "ceilings": None if ceilings is None else ceilings._asdict(),
        "cases": len(rows),
        **goals,
        "goals_met": None
        if many is None or lone is None or not ratios
        else many >= DECODE_GOAL
        and lone >= LONE_GOAL
        and min(ratios) >= PREFILL_GOAL
        and min(beside_cudnn, default=CUDNN_GOAL) >= CUDNN_GOAL,
        "failures": failures(rows),
        "absent": absent(rows),
    }


def _is_decode(row: Row, batch: int, context: int) -> bool:
    """Return whether a row is of plain decodes of that size."""
    size = (row.get("batch"), row.get("context"))
    plain = "queries" not in row and "kv" not in row
    return row["kernel"] == "decode" and size == (batch, context) and plain


def plot(rows: Sequence[Row], file: Path, title: str) -> None:
    """Draw the shares of the ceilings, with a panel per kernel and a line per model."""
    from minserve.workload.plots import grid_of, save

    rows = [row for row in rows if "share" in row]
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    figure, axes = grid_of(1, max(1, len(kernels)), panel_inches=(4.0, 3.6), sharey=True)
    for axis, kernel in zip(axes[0], kernels, strict=False):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if row["kernel"] == kernel:
                lines.setdefault(row["model"], []).append((row["bytes"] / 1e6, row["share"]))
        for model, points in lines.items():
            axis.plot(*zip(*sorted(points), strict=True), marker=".", label=model)
        axis.set(title=kernel, xlabel="MB moved at least", xscale="log", ylim=(0, 1.1))
    axes[0][0].set_ylabel("share of the machine's ceiling")
    figure.suptitle(title)
    save(figure, file)
