"""Results of made-up turns."""

from __future__ import annotations

from typing import Any

from shared.paired.turns import Cell, Result

CELL = Cell(scenario="mixed", rate=2.0, tight=2.0, loose=4.0)


def result(system: str, pair: int, attainment: float, *, cell: Cell = CELL, **other: Any) -> Result:
    """A quiet turn on a machine of even speed."""
    rest: dict[str, Any] = {
        "attainment_mean": attainment, "lone_before_s": 0.03, "lone_after_s": 0.03,
        "cores_server": 1.9, "cores_client": 0.1, "cores_idle": 0.0, "cores_elsewhere": 0.0,
        "send_lag_p99_s": 0.001, "report": {"offered": 40},
    }  # fmt: skip
    return Result(cell=cell.name, pair=pair, system=system, attainment=attainment, **rest | other)
