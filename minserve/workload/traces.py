"""A user's own trace: arrival times and lengths of requests, from a CSV file.

The column ``class`` may be left out. Other columns are ignored::

    arrival_s,prompt_tokens,output_tokens,class
    0.0,374,44,chatbot
    4.31,396,109,coding
"""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from minserve.errors import WorkloadError
from minserve.slo.objectives import SLO
from minserve.workload.conversation import Conversation, Turn
from minserve.workload.data_files import data_path, names

NEEDED = ("arrival_s", "prompt_tokens", "output_tokens")
CLASS = "class"
MAX_TOKENS = 2**31 - 1
MAX_SECONDS = 1e9
# Largest number of characters of a file's own text in an error.
MOST_SHOWN = 60


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """A request of a trace.

    Attributes:
        name: name of its class; empty if the trace gives none.
        line: line in its file; the header is line 1.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    name: str = ""
    line: int = 0


def read_trace(path: str | Path) -> list[TraceRequest]:
    """Return the rows of a CSV file, also of a compressed one (``.gz``), in order of time.

    Args:
        path: path of the file, or the name of a trace that ships with the package.

    Raises:
        WorkloadError: naming the file, the line and the value at fault.
    """
    shipped = names("arrivals")
    file = data_path("arrivals", str(path)) if str(path) in shipped else Path(path)
    try:
        opened = gzip.open if file.suffix == ".gz" else open
        with opened(file, "rt", encoding="utf-8-sig", newline="") as lines:
            rows = _read(file, csv.reader(lines))
    except FileNotFoundError:
        known = ", ".join(shipped)
        raise WorkloadError(f"no trace {path}: give a CSV file, or one of {known}") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise WorkloadError(f"trace {file} cannot be read: {error}") from None
    return rows


def to_workload(
    rows: Sequence[TraceRequest],
    slo_of: Mapping[str, SLO],
    default_class: str,
    *,
    rate: float | None = None,
    max_model_len: int | None = None,
) -> list[Conversation]:
    """Return a conversation of one turn for each row; the first row arrives at 0.

    Args:
        rows: at least one row.
        slo_of: the SLO of each class.
        default_class: the class of rows that name none.
        rate: requests per second over the whole trace, all gaps multiplied alike; ``None`` keeps
            the trace's own times.
        max_model_len: largest sum of prompt and output tokens.

    Raises:
        WorkloadError: for an unknown class, a request that is too long, or a rate that cannot
            be reached.
    """
    _check_lengths(rows, max_model_len)
    turns = []
    for row in rows:
        name = row.name or default_class
        if name not in slo_of:
            known = ", ".join(slo_of)
            raise WorkloadError(
                f"the trace's line {row.line}: no class {name!r}; there are {known}"
            )
        turns.append(
            Turn(
                slo=slo_of[name],
                prompt_tokens=row.prompt_tokens,
                output_tokens=row.output_tokens,
            )
        )
    scale = _time_scale(rows, rate)
    start_s = rows[0].arrival_s
    return [
        Conversation(scale * (row.arrival_s - start_s), (turn,))
        for row, turn in zip(rows, turns, strict=True)
    ]


def _time_scale(rows: Sequence[TraceRequest], rate: float | None) -> float:
    """Return the factor on gaps; one more mean gap is counted after the last request."""
    if rate is None:
        return 1.0
    if not 0 < rate < math.inf:
        raise WorkloadError(f"the rate must be above 0 requests per second, not {rate}")
    seconds = rows[-1].arrival_s - rows[0].arrival_s
    if len(rows) > 1 and not seconds:
        raise WorkloadError("all requests of the trace arrive at once: they have no rate to change")
    return (len(rows) - 1) / rate / seconds if seconds else 1.0


def _check_lengths(rows: Sequence[TraceRequest], max_model_len: int | None) -> None:
    if max_model_len is None:
        return
    long = [row for row in rows if row.prompt_tokens + row.output_tokens > max_model_len]
    if long:
        first = long[0]
        raise WorkloadError(
            f"the trace's line {first.line}: {first.prompt_tokens} prompt and {first.output_tokens} output "
            f"tokens are more than the model's {max_model_len}; so are {len(long)} of "
            f"{len(rows)} rows. Leave them out or take a model with a longer context"
        )


def _read(file: Path, lines: Iterator[list[str]]) -> list[TraceRequest]:
    header = [name.strip() for name in next(lines, [])]
    missing = [name for name in NEEDED if name not in header]
    if missing:
        found = ", ".join(header)[:MOST_SHOWN] or "nothing"
        raise WorkloadError(
            f"trace {file}, line 1: no column {', '.join(missing)}, found {found}; "
            f"the columns are {', '.join(NEEDED)} and, where wanted, {CLASS}"
        )
    rows: list[TraceRequest] = []
    for line, cells in enumerate(lines, start=2):
        if not cells:
            continue
        where = f"trace {file}, line {line}"
        if len(cells) != len(header):
            raise WorkloadError(f"{where}: {len(cells)} values for {len(header)} columns")
        row = _row(where, line, dict(zip(header, (cell.strip() for cell in cells), strict=True)))
        if rows and row.arrival_s < rows[-1].arrival_s:
            raise WorkloadError(
                f"{where}: arrival_s {row.arrival_s:g} is before the row above it "
                f"({rows[-1].arrival_s:g}); sort the rows by it"
            )
        rows.append(row)
    if not rows:
        raise WorkloadError(f"trace {file} has no rows")
    return rows


def _row(where: str, line: int, cells: Mapping[str, str]) -> TraceRequest:
    return TraceRequest(
        arrival_s=_seconds(where, cells["arrival_s"]),
        prompt_tokens=_tokens(where, "prompt_tokens", cells["prompt_tokens"]),
        output_tokens=_tokens(where, "output_tokens", cells["output_tokens"]),
        name=cells.get(CLASS, ""),
        line=line,
    )


def _seconds(where: str, cell: str) -> float:
    try:
        seconds = float(cell)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= MAX_SECONDS:
        raise WorkloadError(
            f"{where}: arrival_s must be seconds from 0 to {MAX_SECONDS:g}, not {cell[:MOST_SHOWN]!r}"
        )
    return seconds


def _tokens(where: str, name: str, cell: str) -> int:
    try:
        number = float(cell)
    except ValueError:
        number = math.nan
    # Programs that write tables often write 12 as 12.0.
    if not 1 <= number <= MAX_TOKENS or number != int(number):
        raise WorkloadError(
            f"{where}: {name} must be a whole number from 1 to {MAX_TOKENS}, not {cell[:MOST_SHOWN]!r}"
        )
    return int(number)
