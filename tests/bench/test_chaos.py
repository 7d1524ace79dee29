"""How answers in chaos are judged."""

from __future__ import annotations

import pytest
from chaos import Answer, judge

WHOLE = Answer([["a", "b", "c"], ["d", "e", "f"]])


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (Answer([["a", "b", "c"], ["d", "e", "f"]]), None),
        (Answer([["a", "b", "c"], ["d", "e", "f"]], error="HTTP 500"), "lost"),
        (Answer([["a", "b", "c"], ["d", "e"]]), "lost"),
        (Answer([["a", "b", "b", "c"], ["d", "e", "f"]]), "doubled"),
        (Answer([["a", "b", "c"], ["d", "x", "f"]]), "mismatched"),
    ],
)
def test_each_fault_is_counted_once(answer: Answer, fault: str | None) -> None:
    assert judge([WHOLE], [answer]) == {
        name: int(name == fault) for name in ("lost", "doubled", "mismatched")
    }
