"""Bodies are parsed strictly: what would change the result is honoured or refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from minserve.errors import InvalidRequestError
from minserve.prompts import PromptOptions
from minserve.server.body import parse_object
from minserve.server.protocol import parse_chat, parse_completion, parse_detokenize, parse_tokenize

HELLO = [{"role": "user", "content": "hello"}]


def sent(**fields: Any) -> dict[str, Any]:
    """Return a body as the endpoints parse it: read from JSON."""
    return parse_object(json.dumps(fields).encode())


def completion(**fields: Any) -> Any:
    return parse_completion(sent(**{"prompt": "hello", **fields}), {})


def chat(**fields: Any) -> Any:
    return parse_chat(sent(**{"messages": HELLO, **fields}), {})


def test_defaults_are_those_of_openai() -> None:
    call = completion()
    assert (call.params.max_tokens, call.params.temperature, call.params.n) == (16, 1.0, 1)
    assert not call.stream
    assert not call.echo
    assert chat().params.max_tokens is None


def test_sampling_fields_arrive_in_the_params() -> None:
    fields = {
        "max_tokens": 7,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "n": 3,
        "seed": 11,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.2,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "stop": ["a", "b"],
        "stop_token_ids": [4, 5],
    }
    for call in (completion(**fields), chat(**fields)):
        for name, value in fields.items():
            expected = tuple(value) if isinstance(value, list) else value
            assert getattr(call.params, name) == expected, name


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("text", ["text"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_the_four_forms_of_a_prompt(prompt: Any, prompts: list[Any]) -> None:
    assert completion(prompt=prompt).prompts == prompts


@pytest.mark.parametrize(
    "prompt",
    [None, [], [[]], [[1], []], [1, "a"], ["a", 1], [True], [1.5], [-1], 5, {}, [[1], "a"]],
)
def test_other_prompts_are_refused(prompt: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        completion(prompt=prompt)
    assert caught.value.param == "prompt"


HARMLESS = [
    {"best_of": 1},
    {"logprobs": None},
    {"stop": None},
    {"stop": []},
    {"suffix": None},
    {"logit_bias": None},
    {"logit_bias": {}},
    {"allowed_token_ids": []},
    {"bad_words": []},
    {"stream_options": None},
    {"stream_options": {"include_usage": True}},
    {"service_tier": "auto"},
    {"some_future_field": None},
    {"early_stopping": False},
    {"typical_p": 1},
    {"typical_p": 1.0},
    {"mirostat": 0},
    {"model": ""},
    {"stop": ""},
]
HARMLESS_CHAT = [
    {"tools": None},
    {"tools": []},
    {"tool_choice": "none"},
    {"response_format": {"type": "text"}},
    {"modalities": ["text"]},
    {"store": False},
    {"metadata": None},
    {"parallel_tool_calls": True},
    {"function_call": "none"},
    {"metadata": {}},
    {"service_tier": "default"},
    {"logprobs": False, "top_logprobs": 0},
]


@pytest.mark.parametrize("fields", HARMLESS, ids=str)
def test_harmless_defaults_are_accepted(fields: dict[str, Any]) -> None:
    plain = completion()
    call = completion(**fields)
    assert (call.prompts, call.params) == (plain.prompts, plain.params)


@pytest.mark.parametrize("fields", HARMLESS_CHAT, ids=str)
def test_harmless_chat_defaults_are_accepted(fields: dict[str, Any]) -> None:
    assert chat(**fields) == chat()


REFUSED = [
    ("best_of", 3),
    ("suffix", "end"),
    ("logit_bias", {"5": 100.5}),
    ("logit_bias", {"-5": 1}),
    ("logit_bias", {"05": 1}),
    ("logit_bias", {"five": 1}),
    ("logit_bias", {"5": "1"}),
    ("logit_bias", {"5": True}),
    ("logit_bias", {"9" * 5000: 1}),
    ("logit_bias", {str(i): 1 for i in range(1025)}),
    ("logit_bias", [5]),
    ("allowed_token_ids", [-1]),
    ("allowed_token_ids", 5),
    ("allowed_token_ids", [5] * 1025),
    ("bad_words", "word"),
    ("bad_words", [""]),
    ("bad_words", [5]),
    ("bad_words", ["a"] * 257),
    ("bad_words", ["a" * 8193]),
    ("temprature", 0.5),
    ("use_beam_search", True),
    ("typical_p", True),
    ("mirostat", False),
    ("messages", []),
    ("max_completion_tokens", 5),
    ("metadata", "text"),
    ("request_id", 5),
    ("truncate_prompt_tokens", 0),
    ("truncate_prompt_tokens", -2),
    ("add_special_tokens", 1),
    ("echo", 1),
    ("stream", "yes"),
    ("include_acceptance", 1),
    ("include_acceptance", "true"),
    ("max_tokens", 1.5),
    ("max_tokens", 1e300),
    ("max_tokens", True),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", "5"),
    ("n", 0),
    ("n", 10**9),
    ("n", True),
    ("temperature", -0.1),
    ("temperature", 1e308),
    ("temperature", True),
    ("temperature", [[[]]]),
    ("temperature", 10**19),
    ("top_p", -0.1),
    ("top_p", 1.1),
    ("top_k", -2),
    ("top_k", 10**15),
    ("min_p", 2),
    ("seed", 1.5),
    ("seed", 2**65),
    ("logprobs", True),
    ("logprobs", 101),
    ("logprobs", -1),
    ("stop", 5),
    ("stop", [""]),
    ("stop", ["a", None]),
    ("stop", ["x"] * 65),
    ("stop", "x" * 8193),
    ("stop", ["x" * 4097, "y" * 4096]),
    ("stop_token_ids", 5),
    ("stop_token_ids", [5] * 1025),
    ("cache_salt", "x" * 1025),
    ("cache_salt", 5),
    ("stop_token_ids", "ab"),
    ("stop_token_ids", [1, "a"]),
    ("stop_token_ids", [-1]),
    ("presence_penalty", 3),
    ("repetition_penalty", 0),
    ("min_tokens", 17),
    ("priority", "high"),
    ("stream_options", True),
    ("user", 5),
    ("model", 5),
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_a_value_that_cannot_be_honoured_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        completion(**{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"temprature": 1}, "temprature: is not supported by this server; is temperature meant?"),
        ({"messages": []}, "messages: is a parameter of /v1/chat/completions and /tokenize only"),
        ({"n_predict": 5}, "n_predict: 5 is not supported; use `max_tokens`"),
        ({"stream": 1}, "stream: must be true or false, not 1"),
        ({"model": 5}, "model: must be a string, not 5"),
        ({"max_tokens": 1.5}, "max_tokens: must be an integer, not 1.5"),
        ({"n": 200}, "n must be between 1 and 128, not 200"),
        ({"priority": 2**63}, f"priority: must be an integer <= {2**63 - 1}, not {2**63}"),
        ({"stop": 5}, "stop must be a string or a list of strings, not 5"),
        ({"ignore_eos": 0}, "ignore_eos: must be true or false, not 0"),
        ({"stream_options": []}, "stream_options: must be an object, not an empty list"),
        (
            {"stream_options": {"include_usage": "no"}},
            'stream_options.include_usage: must be true or false, not "no"',
        ),
        ({"prompt": [1, -2]}, "prompt[1]: must be an integer >= 0, not -2"),
        ({"x - at `$.n[9].y`": 1}, "x - at `$.n[9].y`: is not supported by this server"),
        ({"x` - at `$.n[9].y": 1}, ": is not supported by this server"),
        (
            {"typical_p": 0.5},
            "0.5 is not supported; use `temperature`, `top_p`, `top_k` or `min_p`",
        ),
    ],
)
def test_an_error_says_what_was_expected_and_what_came(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        completion(**fields)
    assert str(caught.value).endswith(says)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("n", True, "n: must be an integer, not true"),
        ("temperature", "hot", 'temperature: must be a number, not "hot"'),
        ("ignore_eos", [1], "ignore_eos: must be true or false, not a list"),
        ("stop_token_ids", [1.5], "stop_token_ids[0]: must be an integer, not 1.5"),
    ],
)
def test_settings_of_another_type_are_refused_in_the_words_of_json(
    field: str, value: Any, says: str
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        completion(**{field: value})
    assert str(refused.value).startswith(says)
    assert refused.value.param == field


def test_a_whole_number_is_an_integer_however_it_is_written() -> None:
    for name in ("max_tokens", "logprobs", "priority", "n", "seed", "top_k", "min_tokens"):
        call = completion(**{name: 5.0})
        assert call == completion(**{name: 5})
        assert isinstance(getattr(call.params, name, 5), int)
    assert completion(prompt=[1.0, 2]).prompts == [[1, 2]]
    assert completion(stop_token_ids=[3.0]).params.stop_token_ids == (3,)


def test_numbers_are_not_coerced() -> None:
    for value in ("5", 5.5, True, [5], {"value": 5}):
        for name in ("max_tokens", "logprobs", "priority", "n", "seed", "top_k", "min_tokens"):
            with pytest.raises(InvalidRequestError) as caught:
                completion(**{name: value})
            assert caught.value.param == name


def test_a_null_field_is_not_given_at_any_depth() -> None:
    raw = b"""{"prompt": "a", "n": null, "new": null, "stream_options": {"new": null}, "stop": null}"""
    assert parse_completion(parse_object(raw), {}) == completion(prompt="a")
    with pytest.raises(InvalidRequestError, match="twice"):
        parse_object(b'{"n": null, "n": 2}')


def test_a_stream_without_a_usage_chunk_cannot_tell_the_acceptance() -> None:
    asked = {"include_acceptance": True, "stream": True}
    for parse in (completion, chat):
        assert parse(**asked, stream_options={"include_usage": True}).include_acceptance
        with pytest.raises(InvalidRequestError, match="include_usage") as caught:
            parse(**asked)
        assert caught.value.param == "include_acceptance"


def test_unknown_stream_options_are_refused() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        completion(stream=True, stream_options={"include_costs": True})
    assert caught.value.param == "stream_options.include_costs"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tool_choice", "required"),
        ("response_format", "json_object"),
        ("modalities", ["audio"]),
        ("logprobs", 1),
        ("top_logprobs", 5),
        ("max_completion_tokens", 0),
        ("echo", True),
        ("prompt", "hello"),
        ("chat_template", "{{ 1 }}"),
        ("chat_template_kwargs", {"messages": []}),
        ("chat_template_kwargs", {"bos_token": "x"}),
        ("chat_template_kwargs", {"a b": 1}),
        ("chat_template_kwargs", {"a": "x" * 20_000}),
        ("chat_template_kwargs", [1]),
    ],
)
def test_chat_refuses_what_it_cannot_do(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        chat(**{name: value})
    assert caught.value.param == name


def test_top_p_of_0_takes_the_most_likely_token() -> None:
    for parse in (completion, chat):
        assert parse(top_p=0).params.greedy
        assert parse(top_p=0.0, top_k=50, temperature=2).params.greedy
    with pytest.raises(InvalidRequestError, match="top_k"):
        completion(top_p=0, top_k="many")


def test_how_a_prompt_becomes_tokens_is_asked_for() -> None:
    for parse in (completion, chat):
        assert parse().prompt_options == PromptOptions()
        asked = parse(add_special_tokens=False, truncate_prompt_tokens=-1).prompt_options
        assert asked == PromptOptions(add_special_tokens=False, truncate_prompt_tokens=-1)
        assert parse(return_token_ids=True).return_token_ids
        assert parse(prompt_logprobs=3).params.prompt_logprobs == 3
    assert not chat(add_generation_prompt=False).prompt_options.add_generation_prompt
    variables = {"enable_thinking": False, "tone": None, "depth": 1.0}
    assert chat(chat_template_kwargs=variables).prompt_options.template_kwargs == variables


def test_a_prompt_ends_within_the_last_message_or_with_the_next_ones_beginning() -> None:
    expected = PromptOptions(add_generation_prompt=False, continue_final_message=True)
    assert chat(continue_final_message=True).prompt_options == expected
    both = {"continue_final_message": True, "add_generation_prompt": True}
    for parse in (parse_chat, lambda values, _: parse_tokenize(values)):
        with pytest.raises(InvalidRequestError) as caught:
            parse({"messages": HELLO, **both}, {})
        assert caught.value.param == "continue_final_message"


def test_max_completion_tokens_wins() -> None:
    assert chat(max_tokens=5, max_completion_tokens=9).params.max_tokens == 9


def test_chat_logprobs_are_a_switch_and_a_number() -> None:
    assert chat(logprobs=True).params.logprobs == 0
    assert chat(logprobs=True, top_logprobs=5).params.logprobs == 5


def test_echo_asks_for_prompt_logprobs_too() -> None:
    call = completion(echo=True, logprobs=2, max_tokens=1)
    assert (call.params.logprobs, call.params.prompt_logprobs) == (2, 2)
    assert completion(echo=True).params.prompt_logprobs is None


def test_prompt_logprobs_are_the_most_that_the_answer_tells_of() -> None:
    for asked, echo, needed in ((None, True, 2), (5, True, 5), (0, True, 2), (3, False, 3)):
        call = completion(logprobs=2, echo=echo, prompt_logprobs=asked)
        assert (call.params.prompt_logprobs, call.prompt_logprobs) == (needed, asked)
    assert chat(prompt_logprobs=4).params.prompt_logprobs == chat(prompt_logprobs=4).prompt_logprobs


def test_echo_without_output_runs_one_token_and_drops_it() -> None:
    call = completion(echo=True, max_tokens=0)
    assert call.drop_output
    assert call.params.max_tokens == 1
    with pytest.raises(InvalidRequestError, match="min_tokens"):
        completion(echo=True, max_tokens=0, min_tokens=1)


def test_tokenize_takes_prompt_or_messages() -> None:
    assert parse_tokenize({"prompt": "hi"}).prompt_options == PromptOptions()
    assert parse_tokenize({"messages": HELLO}).prompt == HELLO
    for body in ({"prompt": "hi"}, {"messages": HELLO}):
        call = parse_tokenize({**body, "add_special_tokens": False, "return_token_strs": True})
        assert call.prompt_options == PromptOptions(add_special_tokens=False)
        assert call.return_token_strs
    for body in (
        {},
        {"prompt": "hi", "messages": HELLO},
        {"prompt": ["hi"]},
        {"prompt": "hi", "continue_final_message": True},
        {"prompt": "hi", "chat_template_kwargs": {"a": 1}},
        {"content": "hi"},
    ):
        with pytest.raises(InvalidRequestError):
            parse_tokenize(body)


def test_detokenize_takes_ids_only() -> None:
    assert parse_detokenize({"tokens": [1, 2]}) == (None, [1, 2])
    assert parse_detokenize({"tokens": [], "model": "m"}) == ("m", [])
    for tokens in (None, "ab", [1.5], [True], [-1], [[1]]):
        with pytest.raises(InvalidRequestError):
            parse_detokenize({"tokens": tokens})
