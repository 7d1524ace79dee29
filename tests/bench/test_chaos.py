"""How answers in chaos are judged."""

from __future__ import annotations

import pytest
from chaos import StreamResult, judge

WHOLE = StreamResult([["a", "b", "c"], ["d", "e", "f"]])


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (StreamResult([["a", "b", "c"], ["d", "e", "f"]]), None),
        (StreamResult([["a", "b", "c"], ["d", "e", "f"]], error="HTTP 500"), "lost"),
        (StreamResult([["a", "b", "c"], ["d", "e"]]), "lost"),
        (StreamResult([["a", "b", "b", "c"], ["d", "e", "f"]]), "doubled"),
        (StreamResult([["a", "b", "c"], ["d", "x", "f"]]), "mismatched"),
    ],
)
def test_each_fault_is_counted_once(answer: StreamResult, fault: str | None) -> None:
    assert judge([WHOLE], [answer]) == {
        name: int(name == fault) for name in ("lost", "doubled", "mismatched")
    }
