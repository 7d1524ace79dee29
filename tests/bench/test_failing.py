"""Failures of a series: each kind has its traceback once."""

from __future__ import annotations

import pytest

from shared.failing import FailureLog


def fail(words: str) -> None:
    raise AttributeError(words)


def test_equal_failures_have_one_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    log = FailureLog()
    for name, words in (("a", "no form"), ("b", "no form"), ("c", "no shape")):
        try:
            fail(words)
        except AttributeError as error:
            log.add(name, error)
    assert log.lines == [
        "a: AttributeError: no form", "b: AttributeError: no form", "c: AttributeError: no shape"
    ]  # fmt: skip
    told = capsys.readouterr().err
    assert told.count("Traceback") == 2
    assert "b failed as a did: no form\n" in told
