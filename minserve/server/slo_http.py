"""SLOs over HTTP: read from a body and its headers, and reported at the end of an answer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Protocol

from minserve.errors import InvalidSLOError
from minserve.slo.attainment import SLOReport
from minserve.slo.objectives import SLO, Targets
from minserve.slo.slo_fields import find_class, parse_slo, seconds

_PREFIXES = ("x-slo-", "x-llm-d-slo-")
# If both names are given, the later one in this list wins.
_HEADERS = {
    "x-slo-ttft-ms": "ttft_ms",
    "x-slo-tpot-ms": "tpot_ms",
    "x-slo-finish-ms": "finish_ms",
    "x-llm-d-slo-ttft-ms": "ttft_ms",
    "x-llm-d-slo-tpot-ms": "tpot_ms",
}
_NUMBER = re.compile(r"[0-9]{1,12}(\.[0-9]{1,12})?")


class SLOFacts(Protocol):
    """What there is to know of a server's SLOs."""

    @property
    def slo_classes(self) -> Mapping[str, SLO]: ...

    @property
    def default_slo(self) -> SLO | None: ...

    @property
    def thinking_marker(self) -> str | None: ...


def read_slo(value: Any, headers: Mapping[str, str], facts: SLOFacts) -> SLO | None:
    """Return the SLO that a request asks for.

    A class name in the body is the whole SLO. Objectives in the body replace the headers'
    objectives one by one. Headers without an SLO in the body refine the default class.

    Args:
        value: the body's ``slo``: a class name, an object of `parse_slo`'s fields, or
            ``None``.
        headers: all headers of the request.
        facts: the classes, and the marker of the model's thinking.

    Returns:
        The SLO; without any in the request the engine's default, ``None`` where it has none.

    Raises:
        InvalidSLOError: naming the field or the header.
    """
    asked = _read_headers(headers)
    if isinstance(value, str):
        return find_class(value, facts.slo_classes, "slo")
    if value is None and not asked:
        return facts.default_slo
    if value is not None and not isinstance(value, dict):
        raise InvalidSLOError("slo: must be the name of a class or an object", "slo")
    return parse_slo(
        asked if value is None else {**value, **_left_open(value, asked)},
        where="slo",
        classes=facts.slo_classes,
        thinking_marker=facts.thinking_marker,
        base=facts.default_slo if value is None else None,
    )


def _read_headers(headers: Mapping[str, str]) -> dict[str, float]:
    """Return the objectives in headers, by field. Each is checked, even if the other name wins."""
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
    """Return the headers' objectives for which the body gives no value."""
    if value.get("class") is not None:
        return {}
    return {
        field: one
        for field, one in asked.items()
        if value.get(field) is None and value.get(field.replace("_ms", "_slowdown")) is None
    }


def slo_object(report: SLOReport) -> dict[str, Any]:
    """Return the ``slo`` object of a usage: milliseconds, ``null`` where there is no number."""
    told = {
        "class": report.name,
        "admitted": report.admitted,
        "attained": report.attained,
        "ttft_ms": in_ms(report.ttft_s),
        "mean_tpot_ms": in_ms(report.mean_tpot_s),
        "worst_token_lateness_ms": in_ms(report.worst_token_lateness_s),
        "finish_ms": in_ms(report.finish_s),
        "targets": targets_object(report.targets),
    }
    if (task := report.task) is not None:
        told["task"] = {
            "id": task.id,
            "call": task.call,
            "calls": task.calls,
            "remaining_ms": in_ms(task.remaining_s),
            "given_up": task.given_up,
        }
    return told


def targets_object(targets: Targets) -> dict[str, float | None]:
    """Return what is promised, in milliseconds; ``null`` where nothing is."""
    stages = targets.stages
    promised = {"ttft_ms": in_ms(targets.ttft_s), "tpot_ms": in_ms(stages[-1].tpot_s)}
    if len(stages) == 2:
        promised["thinking_tpot_ms"] = in_ms(stages[0].tpot_s)
    if math.isfinite(targets.finish_s):
        promised["finish_ms"] = in_ms(targets.finish_s)
    return promised


def in_ms(value: float | None) -> float | None:
    """Return seconds as milliseconds, to 3 decimals; ``None`` for infinity, which JSON lacks."""
    return round(value * 1e3, 3) if value is not None and math.isfinite(value) else None
