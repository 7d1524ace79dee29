"""All cases, each once."""

from __future__ import annotations

from parts.hostile import (
    auth_cases,
    body_cases,
    connection_cases,
    field_cases,
    form_cases,
    wire_cases,
)
from parts.hostile.case import HostileCase


def all_cases() -> list[HostileCase]:
    """Return every case, in the order in which they run.

    The hardest come last, so that what they break does not hide what the others find.
    """
    return [
        *field_cases.cases(),
        *form_cases.cases(),
        *body_cases.cases(),
        *wire_cases.cases(),
        *connection_cases.cases(),
        *auth_cases.cases(),
    ]
