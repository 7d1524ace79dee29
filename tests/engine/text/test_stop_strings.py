"""Stop strings are found where brute force finds them, in pieces of any size."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minserve.engine.text.stop_strings import StopMatcher
from minserve.errors import InvalidRequestError
from minserve.sampling_params import MAX_STOP_LENGTH, SamplingParams

FEW_LETTERS = st.text(alphabet="ab", max_size=12)


@given(st.text(alphabet="ab", min_size=1, max_size=6), st.lists(FEW_LETTERS, max_size=6))
def test_ends_and_beginnings_are_those_of_brute_force(stop: str, pieces: list[str]) -> None:
    matcher, text = StopMatcher(stop), ""
    for piece in pieces:
        before, text = len(text), text + piece
        ends = [e for e in range(before + 1, len(text) + 1) if text[:e].endswith(stop)]
        assert matcher.feed(piece) == (ends[0] - before if ends else None)
        beginnings = [n for n in range(len(stop)) if text.endswith(stop[:n])]
        assert matcher.num_matched == max(beginnings)


def test_stop_strings_are_bounded_together() -> None:
    half = "a" * (MAX_STOP_LENGTH // 2)
    SamplingParams(stop=(half, half))
    with pytest.raises(InvalidRequestError, match="at most 8192 characters") as error:
        SamplingParams(stop=(half, half, "a"))
    assert error.value.param == "stop"
