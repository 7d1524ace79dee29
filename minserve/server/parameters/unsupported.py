"""Parameters that are not implemented, with the values that ask for nothing, and what to use."""

from __future__ import annotations

from typing import Any

from minserve.server.parameters.parameter import (
    CHAT,
    COMPLETIONS,
    DETOKENIZE,
    GENERATION,
    MESSAGES,
    TEMPLATES,
    TOKENIZE,
    Parameter,
    Sort,
)


def _neutral(
    name: str, known_from: str, neutral: tuple[Any, ...], says: str = "", **more: Any
) -> Parameter:
    return Parameter(
        name=name, sort=Sort.NEUTRAL, known_from=known_from, neutral=neutral, says=says, **more
    )


def _refused(name: str, known_from: str, says: str, **more: Any) -> Parameter:
    return Parameter(name=name, sort=Sort.REFUSED, known_from=known_from, says=says, **more)


_TEXT_ONLY = "this server reads and writes text only"
_AT_ONCE = "a structure holds from the beginning of the output; use `grammar`"
_SPACES = "JSON is written in one line, or indented by the model; use `grammar` for another form"
_TOP = "use `temperature`, `top_p`, `top_k` or `min_p`"
_PENALTIES = "use `repetition_penalty`, `presence_penalty` or `frequency_penalty`"
_THINKING = "use `max_tokens`, which counts the thinking too"
_EXPERTS = "no model here has experts"
_TRANSFER = "KV is not moved between servers"
_LORA = "there are no adapters"
_IDS = "use `return_token_ids`"
_USAGE = "see `usage`, and the metrics"

CHATS = (
    _neutral("functions", "O", ([],), "use `tools`", endpoints=CHAT),
    _neutral("function_call", "O", ("none", "auto"), "use `tool_choice`", endpoints=CHAT),
    _neutral("modalities", "O", (["text"], []), _TEXT_ONLY, endpoints=CHAT),
    _refused("audio", "O", _TEXT_ONLY, endpoints=CHAT),
    _neutral("web_search_options", "O", ({},), "this server fetches nothing", endpoints=CHAT),
    _refused("moderation", "O", "this server moderates nothing", endpoints=CHAT),
    _neutral("echo", "VL", (False,), "use `continue_final_message`", endpoints=CHAT),
    _neutral("documents", "V", ([],), "put them into a message", endpoints=CHAT),
    _refused(
        "chat_template",
        "V",
        "a template is a program, so only the operator gives one (`--chat-template FILE`)",
        endpoints=MESSAGES,
    ),
    _neutral("reasoning_control", "L", (False,), _THINKING, endpoints=CHAT),
    _neutral("thinking_forced_open", "L", (False,), _THINKING, endpoints=CHAT),
    _refused("task", "S", "say it in a message", endpoints=CHAT),
    _refused("input_ids", "S", "send them as `prompt` to /v1/completions", endpoints=CHAT),
    _neutral(
        "return_prompt_text",
        "V",
        (False,),
        "use `return_token_ids` and /detokenize",
        endpoints=CHAT,
    ),
    _neutral("chat_format", "L", (0,), "the model's template counts", endpoints=CHAT),
    _neutral("chat_parser", "L", ("",), "the operator sets `--tool-format`", endpoints=CHAT),
    _neutral(
        "generation_prompt",
        "L",
        ("",),
        "use `continue_final_message`, with the beginning as the last message",
        endpoints=CHAT,
    ),
)

FORMATS = (
    _neutral("grammar_lazy", "L", (False,), _AT_ONCE),
    _neutral("grammar_triggers", "L", ([],), _AT_ONCE),
    _neutral("structural_tag", "S", ("",), _AT_ONCE),
    _refused("guided_whitespace_pattern", "V", _SPACES),
    _neutral("n_indent", "L", (0,), _SPACES),
    _neutral("stop_regex", "S", ([], ""), "use `stop`"),
)

SAMPLERS = (
    _neutral("best_of", "OS", (1,), "use `n`, and choose", same_as="n"),
    _neutral("n_cmpl", "L", (1,), "use `n`", same_as="n"),
    _neutral("use_beam_search", "V", (False,), "use `n`"),
    _neutral("length_penalty", "V", (1,), "it belongs to beam search"),
    _neutral("early_stopping", "V", (False,), "it belongs to beam search"),
    _neutral("watermarking", "V", (False,)),
    _neutral("typical_p", "L", (1,), _TOP),
    _neutral("top_n_sigma", "L", (-1, 0), _TOP),
    _neutral("xtc_probability", "L", (0,), _TOP),
    _neutral("dynatemp_range", "L", (0,), _TOP),
    _neutral("mirostat", "L", (0,), _TOP),
    _neutral("adaptive_target", "L", (-1,), _TOP),
    _neutral("min_keep", "L", (0, 1), _TOP),
    _neutral("samplers", "L", ([],), _TOP),
    _neutral("repeat_penalty", "L", (1,), "use `repetition_penalty`"),
    _neutral("repeat_last_n", "L", (-1,), "penalties look at all tokens"),
    _neutral("dry_multiplier", "L", (0,), _PENALTIES),
    _neutral("custom_logit_processor", "S", ("", []), "use `logit_bias`"),
    _neutral("custom_params", "S", ({},), "use `logit_bias`"),
)

LENGTHS = (
    _refused("n_predict", "L", "use `max_tokens`"),
    _neutral("t_max_predict_ms", "L", (0, -1), "use `max_tokens`"),
    _neutral("t_max_prompt_ms", "L", (0, -1), "use `slo`"),
    _neutral("thinking_token_budget", "V", (-1,), _THINKING),
    _neutral("reasoning_budget_tokens", "L", (-1,), _THINKING),
    _refused("repetition_detection", "V", _PENALTIES),
    _neutral("truncation_side", "V", ("left",), "the last tokens are kept"),
    _neutral("no_stop_trim", "S", (False,), "use `include_stop_str_in_output`"),
    _neutral("spaces_between_special_tokens", "VS", (True,), "use `return_token_ids`"),
)

PROMPTS = (
    _neutral(
        "suffix",
        "OVS",
        ("",),
        "write the model's own fill-in-the-middle tokens into `prompt`",
        endpoints=COMPLETIONS,
    ),
    _refused("prompt_embeds", "V", "send texts or token ids as `prompt`", endpoints=COMPLETIONS),
    _neutral("image_data", "L", ([],), _TEXT_ONLY),
    _neutral("media_io_kwargs", "V", ({},), _TEXT_ONLY, endpoints=MESSAGES),
    _neutral("mm_processor_kwargs", "V", ({},), _TEXT_ONLY, endpoints=TEMPLATES),
    _neutral("lora", "L", ([],), _LORA),
    _neutral("lora_path", "S", ([], ""), _LORA),
    _neutral("extra_key", "S", ("", []), "use `cache_salt`"),
    _neutral("session_params", "S", ({},), "send the whole prompt; its prefix is cached"),
    _neutral("kv_transfer_params", "V", ({},), _TRANSFER),
    _neutral("ec_transfer_params", "V", ({},), _TRANSFER),
    _refused("bootstrap_host", "S", _TRANSFER),
    _refused("bootstrap_port", "S", _TRANSFER),
    _refused("bootstrap_room", "S", _TRANSFER),
    _neutral(
        "vllm_xargs",
        "V",
        ({},),
        "this server has no such extensions",
        endpoints=GENERATION,
    ),
)

ANSWERS = (
    _neutral("n_probs", "L", (0,), "use `logprobs`"),
    _neutral("post_sampling_probs", "L", (False,), "`logprobs` are the model's own"),
    _neutral("logprob_token_ids", "V", ([],), "use `top_logprobs` or `logprobs`"),
    _neutral("return_tokens_as_token_ids", "V", (False,), _IDS),
    _neutral("return_prompt_token_ids", "S", (False,), _IDS),
    _neutral("return_tokens", "L", (False,), _IDS),
    _neutral("return_token_offsets", "V", (False,), _IDS),
    _neutral("return_cached_tokens_details", "S", (False,), _USAGE),
    _neutral("return_meta_info", "S", (False,), _USAGE),
    _neutral("timings_per_token", "L", (False,), _USAGE),
    _neutral("return_progress", "L", (False,), _USAGE),
    _neutral("verbose", "L", (False,), _USAGE),
    _neutral("response_fields", "L", ([],), "the answer has all fields"),
    _neutral("return_hidden_states", "S", (False,), "hidden states are not kept"),
    _neutral("return_routed_experts", "S", (False,), _EXPERTS),
    _neutral("routed_experts_start_len", "S", (0,), _EXPERTS),
    _neutral("routed_experts_prompt_start", "V", (0,), _EXPERTS),
)

TOKENS = (
    _refused("content", "L", "use `prompt`", endpoints=TOKENIZE),
    _refused("add_special", "L", "use `add_special_tokens`", endpoints=TOKENIZE),
    _neutral("parse_special", "L", (True,), endpoints=TOKENIZE),
    _neutral("with_pieces", "L", (False,), "use `return_token_strs`", endpoints=TOKENIZE),
    _neutral(
        "skip_special_tokens",
        "S",
        (False,),
        "special tokens are part of the text",
        endpoints=DETOKENIZE,
    ),
)

# Parameters by their subject, as the page shows them.
SUBJECTS = {
    "Chats and tools": CHATS,
    "Formats": FORMATS,
    "Sampling": SAMPLERS,
    "Lengths": LENGTHS,
    "Prompts": PROMPTS,
    "Answers": ANSWERS,
    "Tokenizing": TOKENS,
}
REFUSED = tuple(one for rows in SUBJECTS.values() for one in rows)
