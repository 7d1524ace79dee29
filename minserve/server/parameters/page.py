"""Writes the tables of a page on the parameters: ``python -m minserve.server.parameters.page FILE``.

The page's text is written by people; what stands between ``<!-- table: NAME -->`` and
``<!-- end -->`` comes from here.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from minserve.server.parameters.hints import HINTS, NESTED
from minserve.server.parameters.parameter import (
    ALL,
    CHOICES,
    GENERATION,
    RESPONSES,
    SERVERS,
    Endpoint,
    Parameter,
)
from minserve.server.parameters.responses import (
    RESPONSES_HINTS,
    RESPONSES_NESTED,
    RESPONSES_REFUSED,
    RESPONSES_WORKS,
)
from minserve.server.parameters.unsupported import SUBJECTS
from minserve.server.parameters.works import ANSWER, PROMPT, SAMPLING, STRUCTURE

_TABLE = re.compile(r"(<!-- table: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
Usual = tuple[Endpoint, ...]


def write_tables(page: str) -> str:
    """Return a page with its tables renewed.

    Raises:
        KeyError: for a table of an unknown name.
    """
    return _TABLE.sub(lambda found: f"{found[1]}{_TABLES[found[2]]()}{found[3]}", page)


def _works(parameters: Iterable[Parameter], usual: Usual = GENERATION) -> str:
    return _rows(
        ("parameter", "values", "default", "as in"),
        ((_name(one, usual), one.says, one.default, _origin(one)) for one in parameters),
    )


def _hints(parameters: Iterable[Parameter], usual: Usual = GENERATION) -> str:
    return _rows(
        ("parameter", "why it changes nothing", "as in"),
        ((_name(one, usual), one.says, _origin(one)) for one in parameters),
    )


def _refused(parameters: Iterable[Parameter], usual: Usual = CHOICES) -> str:
    rows = ((_name(one, usual), _neutral(one), one.says, _origin(one)) for one in parameters)
    return _rows(("parameter", "taken as not given", "otherwise refused", "as in"), rows)


def _name(parameter: Parameter, usual: Usual) -> str:
    """Return a parameter's name, with the endpoints it belongs to unless they are the usual ones."""
    endpoints = parameter.endpoints
    if endpoints == usual:
        return f"`{parameter.name}`"
    return f"`{parameter.name}` ({'all' if endpoints == ALL else ', '.join(endpoints)})"


def _neutral(parameter: Parameter) -> str:
    values = [f"`{json.dumps(one)}`" for one in parameter.neutral]
    return ", ".join(values + ([f"the same as `{parameter.same_as}`"] if parameter.same_as else []))


def _origin(parameter: Parameter) -> str:
    return ", ".join(SERVERS[letter] for letter in parameter.known_from)


def _rows(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n".replace("|  |", "| |") for cells in lines)


_TABLES: dict[str, Callable[[], str]] = {
    "prompt": lambda: _works(PROMPT),
    "answer": lambda: _works(ANSWER),
    "sampling": lambda: _works(SAMPLING),
    "structure": lambda: _works(STRUCTURE),
    "hints": lambda: _hints((*HINTS, *NESTED)),
    "refused": lambda: _refused(one for rows in SUBJECTS.values() for one in rows),
    "responses": lambda: _works(RESPONSES_WORKS, RESPONSES),
    "responses hints": lambda: _hints((*RESPONSES_HINTS, *RESPONSES_NESTED), RESPONSES),
    "responses refused": lambda: _refused(RESPONSES_REFUSED, RESPONSES),
}

if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(write_tables(file.read_text(encoding="utf-8")), encoding="utf-8")
