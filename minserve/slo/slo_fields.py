"""SLOs as people write them: JSON or TOML fields, in milliseconds, by class name.

`minserve.slo.objectives` defines what an SLO is; this module defines the names of its fields outside. Errors
name the field as it was written, such as ``slo.ttft_ms``, and do not repeat its value, which may
be of any kind.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from minserve.errors import ConfigError, InvalidSLOError
from minserve.slo.objectives import (
    CUSTOM,
    MAX_SECONDS,
    MAX_SLOWDOWN,
    SLO,
    DecodeStage,
    Task,
    preset_classes,
)

_THINKING = ("thinking_tpot_ms", "thinking_tpot_slowdown")
_OBJECTIVES = (
    "ttft_ms",
    "ttft_slowdown",
    "tpot_ms",
    "tpot_slowdown",
    *_THINKING,
    "finish_ms",
)
# Fields that `SLO` calls by the same name and whose values it checks.
_PLAIN = ("expected_output_tokens", "on_unattainable", "value")
# Fields that stand for a class as well; a task belongs to a request.
_CLASS_FIELDS = ("class", *_OBJECTIVES, *_PLAIN)
_FIELDS = (*_CLASS_FIELDS, "task")
_TASK_FIELDS = ("id", "finish_ms", "calls")
_STAGE_FIELDS = ("tpot_ms", "tpot_slowdown", "until", "tokens")

# Seconds, or a multiple of the zero-load time.
_Pace = tuple[float | None, float | None]
_T = TypeVar("_T")


def parse_slo(
    values: Mapping[str, Any],
    *,
    where: str,
    classes: Mapping[str, SLO],
    thinking_marker: str | None,
    base: SLO | None = None,
) -> SLO:
    """Build an SLO from its fields; ``None`` means "not given".

    A base keeps all that the fields do not replace. ``tpot_*`` replaces the pace of its last
    stage, ``thinking_tpot_*`` that of the stage before. The base also keeps its name unless
    an objective is replaced, because other objectives are no longer those of the class. A task
    changes no objective of the class.

    Args:
        values: ``ttft_ms`` or ``ttft_slowdown``, ``tpot_ms`` or ``tpot_slowdown``,
            ``thinking_tpot_ms`` or ``thinking_tpot_slowdown``, ``finish_ms``,
            ``expected_output_tokens``, ``on_unattainable``, ``value``, ``task`` (an object of
            ``id``, ``finish_ms`` and ``calls``), and ``class``, which names the base.
        where: the object that the fields belong to, for errors.
        classes: the known classes by name.
        thinking_marker: the text that ends this model's thinking; ``None`` if it has none.
        base: the SLO that the fields refine if they name no class.

    Raises:
        InvalidSLOError: if a field is wrong; its ``param`` is the field.
    """
    fields = _known(values, _FIELDS, where)
    if "class" in fields:
        base = find_class(fields["class"], classes, f"{where}.class")
    return _build(fields, where, base, thinking_marker)


def find_class(name: Any, classes: Mapping[str, SLO], param: str) -> SLO:
    """Return a class by its name.

    Raises:
        InvalidSLOError: if there is no such class.
    """
    if not isinstance(name, str) or name not in classes:
        known = ", ".join(sorted(classes)) or "none"
        raise InvalidSLOError(f"{param}: there is no such SLO class; known: {known}", param)
    return classes[name]


def seconds(milliseconds: Any, param: str) -> float:
    """Check a time in milliseconds and return it in seconds.

    Raises:
        InvalidSLOError: for a value that is not a number within the range.
    """
    value = _real(milliseconds) / 1e3
    # The check comes after the division, which turns the smallest floats into 0.
    if not 0 < value <= MAX_SECONDS:
        raise InvalidSLOError(
            f"{param}: must be a number of milliseconds above 0 and at most {MAX_SECONDS * 1e3:g}",
            param,
        )
    return value


def load_classes(path: str | Path) -> dict[str, SLO]:
    """Read classes from a TOML file and add them to the presets; an equal name replaces a preset.

    Each class is a table with the fields of `parse_slo`. Only thinking is written in another way,
    as stages, of which there may be any number. ``class`` may name a preset or an earlier table::

        [support]
        ttft_ms = 800
        stages = [{tpot_ms = 50, until = "</think>"}, {tpot_ms = 100}]

        [support_strict]
        class = "support"
        on_unattainable = "reject"

    Raises:
        ConfigError: naming the file, the class and the field.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        tables = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read SLO classes from {path}: {error.strerror}") from None
    except ValueError as error:  # not UTF-8, not TOML, or numbers of thousands of digits
        raise ConfigError(f"{path} is not TOML: {error}") from None
    classes = dict(preset_classes())
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {name} must be a table: a class with its fields")
        if name in ("", CUSTOM):
            raise ConfigError(f"{path}: a class cannot be called {name!r}")
        try:
            classes[name] = _parse_table(table, name, classes).named(name)
        except InvalidSLOError as error:
            raise ConfigError(f"{path}: {error}") from None
    return classes


def _parse_table(table: Mapping[str, Any], where: str, classes: Mapping[str, SLO]) -> SLO:
    fields = _known(table, (*_CLASS_FIELDS, "stages"), where)
    for name in _THINKING:
        if name in fields:
            raise _error(where, name, "write stages: a classes file is read for any model")
    stages = _parse_stages(fields.pop("stages", None), where)
    for name in ("tpot_ms", "tpot_slowdown"):
        if stages and name in fields:
            raise _error(where, "stages", f"contradicts {name}; give one of them")
    base = find_class(fields["class"], classes, f"{where}.class") if "class" in fields else None
    return _build(fields, where, base, None, stages)


def _parse_stages(value: Any, where: str) -> tuple[DecodeStage, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not value or not all(isinstance(v, dict) for v in value):
        raise _error(where, "stages", "must be a list of tables")
    stages = []
    for i, table in enumerate(value):
        here = f"{where}.stages[{i}]"
        fields = _known(table, _STAGE_FIELDS, here)
        tpot, slowdown = _objective(fields, here, "tpot_ms", "tpot_slowdown") or (None, None)
        ends = {name: fields[name] for name in ("until", "tokens") if name in fields}
        stages.append(_make(DecodeStage, here, tpot=tpot, tpot_slowdown=slowdown, **ends))
    return tuple(stages)


def _parse_task(value: Any, where: str) -> Task:
    if not isinstance(value, dict):
        raise InvalidSLOError(f"{where}: must be an object with {', '.join(_TASK_FIELDS)}", where)
    fields = _known(value, _TASK_FIELDS, where)
    for name in ("id", "finish_ms"):
        if name not in fields:
            raise _error(where, name, "is missing: a task needs it in each of its calls")
    finish = seconds(fields.pop("finish_ms"), f"{where}.finish_ms")
    return _make(Task, where, finish=finish, **fields)


def _build(
    fields: Mapping[str, Any],
    where: str,
    base: SLO | None,
    marker: str | None,
    stages: tuple[DecodeStage, ...] = (),
) -> SLO:
    """Return the base, or an empty SLO, with the given fields and stages in place of its own."""
    changes: dict[str, Any] = {}
    ttft = _objective(fields, where, "ttft_ms", "ttft_slowdown")
    if ttft is not None:
        changes["ttft"], changes["ttft_slowdown"] = ttft
    if "finish_ms" in fields:
        changes["finish"] = seconds(fields["finish_ms"], f"{where}.finish_ms")
    _check_order(changes, where, base)
    stages = stages or _refined_stages(fields, where, base, marker)
    if len(stages) == 1 and not stages[0].has_end:  # the plain form of a single stage
        (one,) = stages
        changes.update(tpot=one.tpot, tpot_slowdown=one.tpot_slowdown, stages=())
    elif stages:
        changes.update(tpot=None, tpot_slowdown=None, stages=stages)
    keeps_name = base is not None and not changes
    changes |= {name: fields[name] for name in _PLAIN if name in fields}
    if "task" in fields:
        changes["task"] = _parse_task(fields["task"], f"{where}.task")
    if base is None:
        return _make(SLO, where, **changes)
    changes["name"] = base.name if keeps_name else CUSTOM
    return _make(replace, where, base, **changes)


def _check_order(changes: Mapping[str, Any], where: str, base: SLO | None) -> None:
    """Raise an error if the last token would be due before the first one."""
    ttft, finish = (
        changes.get(name, None if base is None else getattr(base, name))
        for name in ("ttft", "finish")
    )
    if ttft is not None and finish is not None and finish < ttft:
        name, other = ("finish_ms", "ttft_ms") if "finish" in changes else ("ttft_ms", "finish_ms")
        raise _error(where, name, f"contradicts {other}: finish_ms must be at least ttft_ms")


def _refined_stages(
    fields: Mapping[str, Any], where: str, base: SLO | None, marker: str | None
) -> tuple[DecodeStage, ...]:
    """Return the base's stages with the paces of the fields; empty if the fields give no pace."""
    pace = _objective(fields, where, "tpot_ms", "tpot_slowdown")
    thinking = _objective(fields, where, *_THINKING)
    if pace is None and thinking is None:
        return ()
    *earlier, last = (DecodeStage(),) if base is None else base.decode_stages
    if pace is not None:
        last = _at_pace(last, pace)
    if thinking is not None:
        name = next(name for name in _THINKING if name in fields)
        if len(earlier) > 1:
            raise _error(where, name, "the class has more stages than thinking and answer")
        if not earlier and marker is None:
            raise _error(where, name, "this model marks no end of thinking")
        earlier = [_at_pace(earlier[0] if earlier else DecodeStage(until=marker), thinking)]
    return (*earlier, last)


def _at_pace(stage: DecodeStage, pace: _Pace) -> DecodeStage:
    return replace(stage, tpot=pace[0], tpot_slowdown=pace[1])


def _objective(fields: Mapping[str, Any], where: str, ms: str, slowdown: str) -> _Pace | None:
    """Return one objective in either of its two forms; ``None`` if neither is given."""
    if ms in fields and slowdown in fields:
        raise _error(where, slowdown, f"contradicts {ms}; give one of them")
    if ms in fields:
        return seconds(fields[ms], f"{where}.{ms}"), None
    if slowdown in fields:
        factor = _real(fields[slowdown])
        if not 1 <= factor <= MAX_SLOWDOWN:
            problem = f"must be a number from 1 (an idle device) to {MAX_SLOWDOWN:g}"
            raise _error(where, slowdown, problem)
        return None, factor
    return None


def _known(values: Mapping[str, Any], names: tuple[str, ...], where: str) -> dict[str, Any]:
    """Return the fields that are given, after checking that all names are known."""
    for name in values:
        if name not in names:
            raise _error(where, name[:100], f"is not a field here; known: {', '.join(names)}")
    return {name: value for name, value in values.items() if value is not None}


def _make(build: Callable[..., _T], where: str, *args: Any, **fields: Any) -> _T:
    """Build an `SLO` or `DecodeStage`, and add the place to its error."""
    try:
        return build(*args, **fields)
    except InvalidSLOError as error:
        param = where if error.param is None else f"{where}.{error.param}"
        raise InvalidSLOError(f"{where}: {error}", param) from None


def _real(value: Any) -> float:
    """Return a number as a float; NaN, which lies in no range, for any other value."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _error(where: str, name: str, problem: str) -> InvalidSLOError:
    return InvalidSLOError(f"{where}.{name}: {problem}", f"{where}.{name}")
