"""Copies of objects with slots."""

from __future__ import annotations

from minserve.request import Request, Sequence
from minserve.sampling_params import SamplingParams
from minserve.slots import copy_slots


def test_a_copy_has_the_same_attributes_and_is_another_object() -> None:
    request = Request(
        request_id="r", prompt_token_ids=(5, 6), params=SamplingParams(), seed=0, arrival_s=1.0
    )
    seq = Sequence(request, index=2)
    twin = copy_slots(seq)
    assert type(twin) is Sequence
    assert twin is not seq
    for name in Sequence.__slots__:
        assert getattr(twin, name) is getattr(seq, name)
    twin.num_computed_tokens += 1
    assert seq.num_computed_tokens == 0
