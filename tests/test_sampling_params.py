"""Settings that name tokens and words: what they may be, and in which forms."""

from __future__ import annotations

from dataclasses import replace

import pytest

from minserve.errors import InvalidRequestError
from minserve.sampling_params import SamplingParams


def test_a_bias_may_name_tokens_as_numbers_or_as_json_does() -> None:
    params = SamplingParams(logit_bias={"50256": -100, 7: 1.5})
    assert params.logit_bias == {50256: -100.0, 7: 1.5}
    assert replace(params, max_tokens=3).logit_bias == params.logit_bias
    assert SamplingParams(logit_bias=None).logit_bias == {}


@pytest.mark.parametrize(
    "key", ["-1", "+1", " 1", "1 ", "01", "1.0", "", "x", "\u0661", -1, True, 1.0]
)
def test_a_bias_for_what_is_no_token_is_refused(key: object) -> None:
    with pytest.raises(InvalidRequestError, match="which is no id") as refused:
        SamplingParams(logit_bias={key: 1.0})
    assert refused.value.param == "logit_bias"


@pytest.mark.parametrize("bias", [100.1, -101, float("nan"), float("inf"), None, "1", True])
def test_a_bias_outside_its_range_is_refused(bias: object) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        SamplingParams(logit_bias={1: bias})
    assert refused.value.param == "logit_bias"


def test_settings_are_hashable_whatever_they_name() -> None:
    settings = {"logit_bias": {1: 2.0}, "allowed_token_ids": [1], "bad_words": ["x"]}
    assert hash(SamplingParams(**settings)) == hash(SamplingParams(**settings))


@pytest.mark.parametrize(
    "settings",
    [{"logit_bias": {1: 2.0}}, {"allowed_token_ids": [1]}, {"bad_words": ["x"]},
     {"repetition_penalty": 1.1}],
    ids=str,
)  # fmt: skip
def test_what_changes_a_choice_is_said_to(settings: dict) -> None:
    assert SamplingParams(**settings).adjusts_logits
    assert not SamplingParams().adjusts_logits
