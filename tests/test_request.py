"""What a request and a sequence say of an SLO, where there is one and where there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from minserve.request import Request, Sequence
from minserve.sampling_params import SamplingParams
from minserve.slo.objectives import SLO


def make_request(slo: SLO | None) -> Request:
    return Request(
        request_id="r",
        prompt_token_ids=(1, 2, 3),
        params=SamplingParams(max_tokens=5),
        seed=0,
        arrival_s=0.0,
        slo=slo,
        targets=None if slo is None else slo.resolve(0.1, 0.01),
    )


def test_a_request_with_an_slo_has_its_value_and_its_progress() -> None:
    request = make_request(SLO(ttft=1.0, tpot=0.5, value=3.0, on_unattainable="reject"))
    assert (request.value, request.refuses_delay) == (3.0, True)
    assert Sequence(request).slo_progress.tpot_s == 0.5
    assert not make_request(SLO(ttft=1.0)).refuses_delay


def test_a_request_without_an_slo_is_worth_nothing_and_is_never_refused_for_it() -> None:
    request = make_request(None)
    assert (request.value, request.refuses_delay) == (0.0, False)


def test_a_sequence_without_an_slo_that_is_treated_as_one_with_an_slo_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"Sequence\('r', .*\) has no SLO"):
        _ = Sequence(make_request(None)).slo_progress


@pytest.mark.parametrize(
    ("value", "priority", "weight"),
    [(1.0, 0, 1.0), (3.0, 0, 3.0), (1.0, -1, 2.0), (3.0, 2, 0.75), (1.0, 10, 2.0**-10),
     (1.0, 11, 2.0**-10), (1.0, 2**63 - 1, 2.0**-10), (1e6, -(2**63), 1e6 * 2**10),
     (1e-6, 99, 1e-6 * 2**-10)],
)  # fmt: skip
def test_priority_weighs_the_slo_in_steps_of_two(
    value: float, priority: int, weight: float
) -> None:
    request = Request(
        request_id="r",
        prompt_token_ids=(1,),
        params=SamplingParams(max_tokens=1),
        seed=0,
        arrival_s=0.0,
        priority=priority,
        slo=SLO(ttft=1.0, value=value),
    )
    assert request.value == weight
    assert replace(request, slo=None).value == 0.0
