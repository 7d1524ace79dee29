"""JSON of any kind: it is read strictly, parsed or refused, and written as it was."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minserve.errors import InvalidRequestError
from minserve.server.body import parse_object
from minserve.server.json_array import dump_json
from minserve.server.protocol import parse_chat, parse_completion, parse_detokenize, parse_tokenize

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "JSON object"),
        (b'"text"', "JSON object"),
        (b"null", "JSON object"),
        (b'{"a": 1, "a": 2}', "'a' appears twice"),
        (b'{"a": {"b": 1, "b": 1}}', "'b' appears twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": Infinity}', "Infinity"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": 1' + b"0" * 30 + b"}", "too large"),
        (b'{"a": -1' + b"0" * 5000 + b"}", "too large"),
        (rb'{"a": "\ud800"}', "surrogate"),
        (rb'{"a": ["ok", {"b": "x\uDFFFy"}]}', "surrogate"),
        (rb'{"\ud83d": 1}', "surrogate"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "UTF-8"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_not_strict_json_is_refused(raw: bytes, says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        parse_object(raw)


def test_a_field_that_appears_twice_is_found_among_very_many() -> None:
    """Comparing each with each would take minutes, in which no other client is served."""
    fields = b", ".join(b'"%d": 0' % i for i in range(300_000))
    with pytest.raises(InvalidRequestError, match="'299999' appears twice"):
        parse_object(b"{" + fields + b', "299999": 0}')


def test_escapes_and_long_digit_strings_are_no_numbers() -> None:
    value = {"emoji": "🙂", "digits": "1" * 100, "small": 5, "backslash": "\\ud800"}
    assert parse_object(json.dumps(value).encode()) == value


def test_half_of_a_surrogate_pair_is_refused_in_the_name_of_an_empty_field_too() -> None:
    with pytest.raises(InvalidRequestError, match="surrogate"):
        parse_object(b'{"prompt": "hi", "q\\ud800": null}')


FIELD_NAMES = st.sampled_from(
    [
        "prompt",
        "messages",
        "max_tokens",
        "n",
        "temperature",
        "top_p",
        "top_k",
        "stop",
        "stop_token_ids",
        "seed",
        "logprobs",
        "echo",
        "stream",
        "stream_options",
        "best_of",
        "logit_bias",
        "tools",
        "response_format",
        "priority",
        "metadata",
    ]
)


@given(st.dictionaries(FIELD_NAMES | st.text(), JSON, max_size=6))
def test_any_body_is_parsed_or_refused_but_never_crashes(body: dict[str, Any]) -> None:
    generations = (partial(parse, defaults={}) for parse in (parse_completion, parse_chat))
    for parse in (*generations, parse_tokenize, parse_detokenize):
        for read in (dict, lambda value: parse_object(json.dumps(value).encode())):
            try:
                parse(read(body))
            except InvalidRequestError as error:
                dump_json({"message": str(error), "param": error.param})


@given(JSON.filter(lambda value: "inf" not in str(value)))
def test_what_is_written_is_read_as_the_same_value_in_the_same_order(value: Any) -> None:
    assert json.dumps(json.loads(dump_json(value))) == json.dumps(value)


def test_numbers_that_json_lacks_are_written_as_null() -> None:
    values = [float("nan"), float("inf"), float("-inf"), 1.0]
    assert dump_json(values) == b"[null,null,null,1.0]"
