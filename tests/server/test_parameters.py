"""The table of parameters: what it sorts, and that parser, description and page follow it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minserve.errors import InvalidRequestError
from minserve.sampling_params import SamplingParams
from minserve.server.body import parse_object
from minserve.server.json_array import dump_json
from minserve.server.parameters.forms import Message, StreamOptions, TextPart
from minserve.server.parameters.hints import NESTED
from minserve.server.parameters.page import write_tables
from minserve.server.parameters.parameter import PATHS, SERVERS, Endpoint, Parameter, Sort
from minserve.server.parameters.responses import RESPONSES_NESTED
from minserve.server.parameters.responses_forms import (
    Includable,
    InputItem,
    InputPart,
    ReasoningOptions,
    TextOptions,
)
from minserve.server.parameters.table import BY_ENDPOINT, FIELDS, PARAMETERS
from minserve.server.parameters.works import OWN_MEANING, SAMPLING
from minserve.server.protocol import (
    parse_chat,
    parse_completion,
    parse_detokenize,
    parse_tokenize,
)
from minserve.server.responses_api.responses_call import parse_responses

HELLO = [{"role": "user", "content": "hello"}]
ENOUGH: dict[Endpoint, dict[str, Any]] = {
    "completions": {"prompt": "hello"},
    "chat": {"messages": HELLO},
    "responses": {"input": "hello"},
    "tokenize": {"prompt": "hello"},
    "detokenize": {"tokens": [1]},
}
PARSERS: dict[Endpoint, Callable[[dict[str, Any]], Any]] = {
    "completions": lambda values: parse_completion(values, {}),
    "chat": lambda values: parse_chat(values, {}),
    "responses": lambda values: parse_responses(values, {}),
    "tokenize": parse_tokenize,
    "detokenize": parse_detokenize,
}
ROWS = [(endpoint, one) for one in FIELDS for endpoint in one.endpoints]
each_endpoint = pytest.mark.parametrize("endpoint", list(PATHS))


def parse(endpoint: Endpoint, **values: Any) -> Any:
    """Parse a body that is complete but for these fields, read from JSON."""
    body = json.dumps({**ENOUGH[endpoint], **values}).encode()
    return PARSERS[endpoint](parse_object(body))


def refused(endpoint: Endpoint, **values: Any) -> InvalidRequestError | None:
    """Parse a body, and return its error; no other error may come."""
    try:
        parse(endpoint, **values)
    except InvalidRequestError as error:
        return error
    return None


def of_sorts(endpoint: Endpoint, *sorts: Sort) -> list[tuple[str, Parameter]]:
    return [row for row in BY_ENDPOINT[endpoint].items() if row[1].sort in sorts]


# --- the table itself ---


def test_each_parameter_of_an_endpoint_has_one_row_with_all_that_readers_need() -> None:
    rows = Counter((endpoint, one.name) for endpoint, one in ROWS)
    assert [row for row, count in rows.items() if count > 1] == []
    for one in PARAMETERS:
        assert one.endpoints
        assert set(one.endpoints) <= set(PATHS)
        assert one.known_from
        assert set(one.known_from) <= set(SERVERS)
        # A header's value, which no client chooses.
        assert re.fullmatch(r"[a-z_]+(\.[a-z_]+)*", one.name), one.name
        assert one.says or one.sort is Sort.NEUTRAL, one.name
        assert one.default or one.sort is not Sort.WORKS, one.name
        assert one.neutral or one.sort is not Sort.NEUTRAL, one.name
        assert one.form is not Any or one.sort is not Sort.HINT, one.name


def test_each_sampling_setting_is_a_parameter() -> None:
    rows = {one.name for one in SAMPLING}
    settings = {one.name for one in fields(SamplingParams)}
    # Several parameters ask for a structure, each in its own form.
    settings.remove("structure")
    assert settings == rows | set(OWN_MEANING)
    for endpoint in ("completions", "chat"):
        assert settings <= BY_ENDPOINT[endpoint].keys()


def test_the_fields_of_forms_work_or_are_nested_hints() -> None:
    nested = {one.name for one in (*NESTED, *RESPONSES_NESTED)}
    forms = {
        "messages": Message,
        "messages.content": TextPart,
        "stream_options": StreamOptions,
        "input": InputItem,
        "input.content": InputPart,
        "text": TextOptions,
        "reasoning": ReasoningOptions,
    }
    known = {f"{place}.{name}" for place, form in forms.items() for name in form.__struct_fields__}
    assert nested <= known | {f"include.{name}" for name in get_args(Includable)}


# Current lists of others: those of the Python client, and of the servers' protocols.
OPENAI_CHAT = """audio frequency_penalty function_call functions logit_bias logprobs
    max_completion_tokens max_tokens messages metadata modalities model moderation n
    parallel_tool_calls prediction presence_penalty prompt_cache_key prompt_cache_options
    prompt_cache_retention reasoning_effort response_format safety_identifier seed service_tier stop
    store stream stream_options temperature tool_choice tools top_logprobs top_p user verbosity
    web_search_options"""
OPENAI_COMPLETIONS = """best_of echo frequency_penalty logit_bias logprobs max_tokens model n
    presence_penalty prompt seed stop stream stream_options suffix temperature top_p user"""
VLLM = """frequency_penalty logit_bias logprobs max_tokens model n presence_penalty response_format
    seed stop stream stream_options temperature top_p user use_beam_search top_k min_p
    repetition_penalty watermarking length_penalty stop_token_ids include_stop_str_in_output
    ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens
    truncation_side prompt_logprobs logprob_token_ids allowed_token_ids bad_words
    add_special_tokens structured_outputs priority request_id session_id
    return_tokens_as_token_ids return_token_ids routed_experts_prompt_start return_token_offsets
    return_mm_kwargs cache_salt kv_transfer_params ec_transfer_params vllm_xargs
    repetition_detection thinking_token_budget stream_interval"""
VLLM_CHAT = """messages top_logprobs max_completion_tokens tools tool_choice reasoning_effort
    include_reasoning parallel_tool_calls echo add_generation_prompt continue_final_message
    documents chat_template chat_template_kwargs media_io_kwargs mm_processor_kwargs
    return_prompt_text"""
VLLM_TOKENIZE = """model prompt messages add_special_tokens return_token_strs add_generation_prompt
    continue_final_message chat_template chat_template_kwargs media_io_kwargs mm_processor_kwargs
    tools"""
SGLANG = """model frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop
    stream stream_options temperature top_p user return_hidden_states return_routed_experts
    routed_experts_start_len return_cached_tokens_details return_token_ids top_k min_p min_tokens
    regex ebnf repetition_penalty stop_token_ids stop_regex no_stop_trim ignore_eos
    skip_special_tokens lora_path session_id session_params response_format custom_params
    custom_logit_processor images_config bootstrap_host bootstrap_port bootstrap_room
    routed_dp_rank disagg_prefill_dp_rank data_parallel_rank rid extra_key cache_salt
    ngram_corpus_id priority"""
SGLANG_CHAT = """messages top_logprobs max_completion_tokens tools tool_choice parallel_tool_calls
    return_prompt_token_ids return_meta_info reasoning_effort reasoning task continue_final_message
    separate_reasoning stream_reasoning chat_template_kwargs max_dynamic_patch min_dynamic_patch
    use_audio_in_video input_ids"""
LLAMA_CPP = """verbose timings_per_token stream stream_options cache_prompt return_tokens
    return_progress sse_ping_interval n_predict max_tokens n_indent n_keep n_discard n_cmpl n
    n_cache_reuse t_max_predict_ms response_fields top_k top_p min_p top_n_sigma xtc_probability
    xtc_threshold typical_p temperature dynatemp_range dynatemp_exponent repeat_last_n
    repeat_penalty frequency_penalty presence_penalty dry_multiplier dry_base dry_allowed_length
    dry_penalty_last_n mirostat mirostat_tau mirostat_eta adaptive_target adaptive_decay seed
    n_probs logprobs min_keep backend_sampling post_sampling_probs lora dry_sequence_breakers
    json_schema grammar grammar_lazy preserved_tokens grammar_triggers reasoning_budget_tokens
    reasoning_budget_start_tag reasoning_budget_end_tags reasoning_budget_end_tag
    reasoning_budget_message logit_bias ignore_eos stop samplers id_slot speculative.n_max
    speculative.n_min speculative.p_min"""
LLAMA_CPP_CHAT = """messages tools tool_choice parallel_tool_calls response_format chat_format
    reasoning_format generation_prompt parse_tool_calls chat_parser continue_final_message echo
    reasoning_control reasoning_effort chat_template_kwargs"""


OPENAI_RESPONSES = """access_programs background background_options context_management conversation
    image include input instructions max_output_tokens max_tool_calls metadata model moderation
    parallel_tool_calls previous_response_id prompt prompt_cache_key prompt_cache_options
    prompt_cache_retention reasoning safety_identifier service_tier store stream stream_options
    temperature text tool_choice tools top_logprobs top_p truncation user"""
VLLM_RESPONSES = """background include input instructions max_output_tokens max_tool_calls metadata
    model logit_bias parallel_tool_calls previous_response_id prompt reasoning service_tier store
    stream temperature text tool_choice tools top_logprobs top_p top_k truncation user
    skip_special_tokens include_stop_str_in_output prompt_cache_key request_id mm_processor_kwargs
    priority cache_salt enable_response_messages previous_input_messages previous_response
    structured_outputs repetition_penalty seed stop ignore_eos vllm_xargs"""


@pytest.mark.parametrize(
    ("endpoint", "server", "names"),
    [
        ("responses", "O", OPENAI_RESPONSES),
        ("responses", "V", VLLM_RESPONSES),
        ("chat", "O", OPENAI_CHAT),
        ("completions", "O", OPENAI_COMPLETIONS),
        ("chat", "V", f"{VLLM} {VLLM_CHAT}"),
        ("completions", "V", f"{VLLM} prompt echo suffix prompt_embeds"),
        ("tokenize", "V", VLLM_TOKENIZE),
        ("chat", "S", f"{SGLANG} {SGLANG_CHAT}"),
        ("completions", "S", f"{SGLANG} prompt best_of echo suffix json_schema custom_labels"),
        ("chat", "L", f"{LLAMA_CPP} {LLAMA_CPP_CHAT}"),
        ("completions", "L", f"{LLAMA_CPP} prompt"),
        ("detokenize", "V", "model tokens"),
    ],
)
def test_the_parameters_of_other_servers_are_sorted(
    endpoint: Endpoint, server: str, names: str
) -> None:
    known = BY_ENDPOINT[endpoint]
    assert set(names.split()) - known.keys() == set()
    unnamed = [name for name in names.split() if server not in known[name].known_from]
    assert unnamed == []


def test_the_tables_of_the_page_are_those_of_the_code() -> None:
    page = (Path(__file__).parents[2] / "docs" / "parameters.md").read_text(encoding="utf-8")
    assert page == write_tables(page)
    for one in PARAMETERS:
        assert f"`{one.name}`" in page


# --- the parser follows it ---

SANE: dict[Any, Any] = {
    str: "text",
    int: 7,
    float: 0.5,
    bool: True,
    list: [1],
    list[str]: ["a"],
    dict[str, Any]: {"a": {"b": [1, None]}},
    dict[str, str]: {"a": "b"},
}


@each_endpoint
def test_values_that_ask_for_nothing_change_nothing(endpoint: Endpoint) -> None:
    plain = parse(endpoint)
    for name, parameter in BY_ENDPOINT[endpoint].items():
        for value in (*parameter.neutral, None):
            if name not in ENOUGH[endpoint]:
                assert parse(endpoint, **{name: value}) == plain, (name, value)


@each_endpoint
def test_hints_change_nothing_and_are_named(endpoint: Endpoint) -> None:
    for name, parameter in of_sorts(endpoint, Sort.HINT):
        sane = [value for form, value in SANE.items() if _takes(parameter.form, value)]
        assert sane, name
        for value in sane:
            call = parse(endpoint, **{name: value})
            neutral = parameter.is_neutral(value, {})
            assert call.ignored == (() if neutral else (name,))
            assert _without_hints(call) == _without_hints(parse(endpoint))


def _takes(form: Any, value: Any) -> bool:
    try:
        msgspec.convert(value, form)
    except msgspec.ValidationError:
        return False
    return True


def _without_hints(call: Any) -> dict[str, Any]:
    return {one.name: getattr(call, one.name) for one in fields(call) if one.name != "ignored"}


@each_endpoint
def test_what_is_not_implemented_is_refused_by_name_with_advice(endpoint: Endpoint) -> None:
    for name, parameter in of_sorts(endpoint, Sort.NEUTRAL, Sort.REFUSED):
        error = refused(endpoint, **{name: {"something": ["else"]}})
        assert error is not None, name
        assert error.param == name
        assert "is not supported" in str(error)
        assert parameter.says in str(error)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.sampled_from([0, 1, -1, 1.0, "", "none", "auto", 10**19, 1e308, [], {}]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text() | st.just("role"), inner, max_size=3)
    ),
    max_leaves=8,
)


@each_endpoint
@given(data=st.data())
def test_any_value_of_any_parameter_is_taken_or_refused_by_its_name(
    endpoint: Endpoint, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(BY_ENDPOINT[endpoint])))
    value = data.draw(JSON)
    if (error := refused(endpoint, **{name: value})) is not None:
        named = re.split(r"[\[]", error.param or "")[0]
        # What several parameters say together may be blamed on either.
        blamed = {name, *{"messages": ("prompt",), "prompt": ("messages",)}.get(name, ())}
        assert named in blamed or named.split(".")[0] in blamed
        dump_json({"message": str(error), "param": error.param})


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from([*Message.__struct_fields__, "audio"]) | st.text(max_size=3),
            JSON | st.sampled_from(["user", "assistant", "tool"]),
            max_size=4,
        ),
        max_size=2,
    )
)
def test_any_messages_are_taken_or_refused_by_their_place(messages: list[dict[str, Any]]) -> None:
    if (error := refused("chat", messages=messages)) is not None:
        assert (error.param or "").startswith("messages")


@pytest.mark.parametrize("depth", [50, 200, 400, 450, 480, 495, 600])
def test_what_is_nested_deeply_is_taken_or_refused(depth: int) -> None:
    deep = b'{"a": [' * depth + b"1" + b"]}" * depth
    for name in ("metadata", "chat_template_kwargs", "tools", "messages", "stop", "no_such"):
        body = b'{"messages": %s, "%s": %s}' % (json.dumps(HELLO).encode(), name.encode(), deep)
        if name == "messages":
            body = b'{"messages": [{"role": "user", "content": %s}]}' % deep
        with suppress(InvalidRequestError):
            PARSERS["chat"](parse_object(body))


def test_the_parser_works_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from minserve.server.protocol import parse_chat\n"
        f"print(parse_chat({{'messages': {HELLO!r}}}, {{}}).prompts)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([HELLO])
