"""SLOs over HTTP: what a body and its headers ask for, and what is told of it at the end."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from minserve.attainment import SLOReport
from minserve.errors import InvalidSLOError
from minserve.server.engine_face import EngineFace
from minserve.slo import SLO
from minserve.slo_fields import find_class, parse_slo, seconds

_PREFIXES = ("x-slo-", "x-llm-d-slo-")
# The later of two names wins.
_HEADERS = {
    "x-slo-ttft-ms": "ttft_ms",
    "x-slo-tpot-ms": "tpot_ms",
    "x-llm-d-slo-ttft-ms": "ttft_ms",
    "x-llm-d-slo-tpot-ms": "tpot_ms",
}
_NUMBER = re.compile(r"[0-9]{1,12}(\.[0-9]{1,12})?")


def read_slo(value: Any, headers: Mapping[str, str], engine: EngineFace) -> SLO | None:
    """What a request asks for.

    A class name in the body says everything. Other objectives in the body win over the
    headers' one by one. Headers alone refine the default class.

    Args:
        value: the body's ``slo``: a class name, an object of `parse_slo`'s fields, or
            ``None``.
        headers: all of the request's.
        engine: has the classes, and knows the marker of its model's thinking.

    Returns:
        the engine's default class where nothing is asked for; ``None`` where it has none.

    Raises:
        InvalidSLOError: naming the field or the header.
    """
    asked = _read_headers(headers)
    if isinstance(value, str):
        return find_class(value, engine.slo_classes, "slo")
    if value is None and not asked:
        return engine.default_slo
    if value is not None and not isinstance(value, dict):
        raise InvalidSLOError("slo: must be the name of a class or an object", "slo")
    return parse_slo(
        asked if value is None else {**value, **_left_open(value, asked)},
        where="slo",
        classes=engine.slo_classes,
        thinking_marker=engine.thinking_marker,
        base=engine.default_slo if value is None else None,
    )


def _read_headers(headers: Mapping[str, str]) -> dict[str, float]:
    """The objectives in headers, as fields. Every one is checked, even where it loses."""
    given: dict[str, float] = {}
    for header, text in headers.items():
        name = header.lower()
        if not name.startswith(_PREFIXES):
            continue
        if name not in _HEADERS:
            raise InvalidSLOError(f"the header {name} is not supported", name)
        if name in given:
            raise InvalidSLOError(f"the header {name} is given twice", name)
        given[name] = float(text) if _NUMBER.fullmatch(text) else math.nan
        seconds(given[name], name)
    return {field: given[name] for name, field in _HEADERS.items() if name in given}


def _left_open(value: Mapping[str, Any], asked: Mapping[str, float]) -> dict[str, float]:
    """The headers' objectives of which the body says nothing."""
    if value.get("class") is not None:
        return {}
    return {
        field: one
        for field, one in asked.items()
        if value.get(field) is None and value.get(field.replace("_ms", "_slowdown")) is None
    }


def slo_object(report: SLOReport) -> dict[str, Any]:
    """The ``slo`` object of a usage: milliseconds, ``null`` where there is no number."""
    stages = report.targets.stages
    promised = {"ttft_ms": _ms(report.targets.ttft_s), "tpot_ms": _ms(stages[-1].tpot_s)}
    if len(stages) == 2:
        promised["thinking_tpot_ms"] = _ms(stages[0].tpot_s)
    return {
        "class": report.name,
        "admitted": report.admitted,
        "attained": report.attained,
        "ttft_ms": _ms(report.ttft_s),
        "mean_tpot_ms": _ms(report.mean_tpot_s),
        "worst_token_lateness_ms": _ms(report.worst_token_lateness_s),
        "targets": promised,
    }


def _ms(value: float | None) -> float | None:
    """Seconds as milliseconds, rounded to microseconds; JSON knows no infinity."""
    return round(value * 1e3, 3) if value is not None and math.isfinite(value) else None
