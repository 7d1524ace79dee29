"""The parameters that work."""

from __future__ import annotations

from typing import Annotated, Any, get_type_hints

from msgspec import Meta

from minserve.sampling_params import (
    MAX_BAD_WORDS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_NAMED_TOKENS,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    MAX_TOP_K,
    SEED_MAX,
    SEED_MIN,
    SamplingParams,
)
from minserve.server.parameters.chat import CHAT_ANSWER, CHAT_PROMPT
from minserve.server.parameters.forms import Int64, Messages, Positive, StreamOptions, TokenId
from minserve.server.parameters.parameter import (
    ALL,
    CHAT,
    CHOICES,
    COMPLETIONS,
    DETOKENIZE,
    GENERATION,
    TOKENIZE,
    Parameter,
    working,
)
from minserve.server.structure_fields import RESPONSE_FORMAT_SCHEMA, STRUCTURED_OUTPUTS_SCHEMA
from minserve.structure import MAX_CHOICES

_HINTS = get_type_hints(SamplingParams)
_LOGPROBS = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
_TOKEN_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
# It is hashed with each block of a prompt.
MAX_SALT_LENGTH = 1024
_A_SCHEMA = "a JSON schema, as an object or as its JSON"
_A_REGEX = "a regular expression that the output matches as a whole"
_A_GRAMMAR = "a grammar, in GBNF or like Lark's"
_SCHEMA = {"type": ["object", "boolean", "string"]}
_STRINGS = {"type": "array", "items": {"type": "string"}, "minItems": 1}


def _setting(name: str, known_from: str, says: str, **more: Any) -> Parameter:
    """Return the row of a field of `SamplingParams`, which checks the range itself."""
    return working(
        name, known_from, says, **{"form": _HINTS[name], "endpoints": GENERATION, **more}
    )


def _range(low: float, high: float | None = None) -> dict[str, float]:
    return {"minimum": low} | ({} if high is None else {"maximum": high})


SAMPLING = (
    _setting(
        "n",
        "OVSL",
        f"1 to {MAX_N} outputs per prompt",
        endpoints=CHOICES,
        default="1",
        schema=_range(1, MAX_N),
    ),
    _setting(
        "min_tokens",
        "VS",
        "before so many tokens nothing ends the output; a stop text counts where it is complete",
        default="0",
        schema=_range(0),
    ),
    _setting(
        "temperature",
        "OVSL",
        "0 to 100; 0 takes the most likely token",
        default="1",
        schema=_range(0, 100),
    ),
    _setting(
        "top_p",
        "OVSL",
        "0 to 1: the most likely tokens of this mass together; 0 takes the most likely one",
        default="1",
        schema=_range(0, 1),
    ),
    _setting(
        "top_k",
        "VSL",
        "so many of the most likely tokens; 0 or -1 for all",
        default="0",
        schema=_range(-1, MAX_TOP_K),
    ),
    _setting(
        "min_p",
        "VSL",
        "0 to 1: drops tokens less likely than this times the most likely one",
        default="0",
        schema=_range(0, 1),
    ),
    _setting("presence_penalty", "OVSL", "-2 to 2", default="0", schema=_range(-2, 2)),
    _setting("frequency_penalty", "OVSL", "-2 to 2", default="0", schema=_range(-2, 2)),
    _setting("repetition_penalty", "VS", "0.01 to 100", default="1", schema=_range(0.01, 100)),
    _setting(
        "seed",
        "OVSL",
        "a 64-bit integer, for [sampled outputs that come again](#sampling)",
        default="drawn",
        form=int,
        schema=_range(SEED_MIN, SEED_MAX),
    ),
    _setting(
        "stop",
        "OVSL",
        f"a text or up to {MAX_STOP_STRINGS} texts that end the output, of {MAX_STOP_LENGTH} characters together; "
        "they are not part of it",
        default="none",
        form=Any,
        schema={
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {"type": "string", "minLength": 1},
                    "maxItems": MAX_STOP_STRINGS,
                },
            ]
        },
        neutral=("",),
    ),
    _setting(
        "stop_token_ids",
        "VS",
        f"token ids that end the output; up to {MAX_NAMED_TOKENS}",
        default="none",
        form=list[TokenId],
    ),
    _setting(
        "include_stop_str_in_output",
        "V",
        "ends the text with the stop text, or the stop token's text, and not before it",
        default="false",
        neutral=(False,),
    ),
    _setting(
        "logit_bias",
        "OVSL",
        f"an object of up to {MAX_NAMED_TOKENS} token ids and what is added to their logits, "
        "-100 to 100",
        default="none",
        form=dict[str, int | float],
        neutral=({}, []),
    ),
    _setting(
        "allowed_token_ids",
        "V",
        f"up to {MAX_NAMED_TOKENS}: the only token ids that are sampled, those that end the output "
        "included",
        default="all",
        form=list[TokenId],
        neutral=([],),
    ),
    _setting(
        "bad_words",
        "V",
        f"up to {MAX_BAD_WORDS} texts that the output never holds as the tokenizer writes them, with "
        "or without a leading space",
        default="none",
        form=list[str],
        neutral=([],),
    ),
    _setting("ignore_eos", "VSL", "goes on behind the model's end of text", default="false"),
    _setting("skip_special_tokens", "VS", "leaves special tokens out of the text", default="true"),
    _setting(
        "preserved_tokens",
        "L",
        f"up to {MAX_NAMED_TOKENS} special tokens, as they are written, that stay in the text",
        default="none",
        form=list[str],
        neutral=([],),
    ),
)

STRUCTURE = (
    working(
        "response_format",
        "OVSL",
        '`{"type": "json_object"}`, or `json_schema` with a JSON schema, or `text`',
        default="text",
        schema=RESPONSE_FORMAT_SCHEMA,
        neutral=({"type": "text"}, {}),
    ),
    working(
        "structured_outputs",
        "V",
        "an object with one of `json`, `regex`, `choice`, `grammar`, `json_object`",
        default="none",
        schema=STRUCTURED_OUTPUTS_SCHEMA,
        neutral=({},),
        endpoints=GENERATION,
    ),
    working("guided_json", "V", _A_SCHEMA, default="none", schema=_SCHEMA),
    working("json_schema", "SL", _A_SCHEMA, default="none", schema=_SCHEMA, neutral=("",)),
    working("guided_regex", "V", _A_REGEX, form=str, default="none", neutral=("",)),
    working("regex", "S", _A_REGEX, form=str, default="none", neutral=("",)),
    working(
        "guided_choice",
        "V",
        f"up to {MAX_CHOICES} texts, one of which is the output",
        form=list[str],
        default="none",
        neutral=([],),
    ),
    working("guided_grammar", "V", _A_GRAMMAR, form=str, default="none", neutral=("",)),
    working("ebnf", "S", _A_GRAMMAR, form=str, default="none", neutral=("",)),
    working("grammar", "L", _A_GRAMMAR, form=str, default="none", neutral=("",)),
)

PROMPT = (
    working(
        "model",
        "OVSL",
        "the served model's name; another name gets 404",
        endpoints=ALL,
        form=str,
        neutral=("",),
        default="the served model",
    ),
    working(
        "prompt",
        "OVSL",
        "a text, a list of texts, token ids, or a list of token id lists",
        endpoints=COMPLETIONS,
        required=True,
        schema={
            "anyOf": [
                {"type": "string"},
                _STRINGS,
                _TOKEN_IDS,
                {"type": "array", "items": _TOKEN_IDS, "minItems": 1},
            ]
        },
        default="required",
    ),
    working("prompt", "VS", "a text", endpoints=TOKENIZE, form=str, default="this or `messages`"),
    working(
        "messages",
        "OVSL",
        "[the messages of a chat](#messages)",
        endpoints=CHAT,
        form=Messages,
        by_place=True,
        required=True,
        default="required",
    ),
    working(
        "messages",
        "VS",
        "[the messages of a chat](#messages)",
        endpoints=TOKENIZE,
        form=Messages,
        by_place=True,
        default="this or `prompt`",
    ),
    working(
        "tokens",
        "VSL",
        "token ids",
        endpoints=DETOKENIZE,
        required=True,
        schema={**_TOKEN_IDS, "minItems": 0},
        default="required",
    ),
    working(
        "add_special_tokens",
        "VS",
        "adds what the model wants around a text, often a BOS",
        endpoints=(*CHOICES, *TOKENIZE),
        form=bool,
        default="true; for messages false, since the template writes special tokens itself",
    ),
    *CHAT_PROMPT,
    working(
        "truncate_prompt_tokens",
        "V",
        "keeps so many tokens of a longer prompt, the last ones; -1 keeps what leaves room for "
        "one token of output",
        form=Annotated[int, Meta(ge=-1)],
        schema={"not": {"const": 0}},
        default="a longer prompt is refused",
    ),
    working(
        "return_token_strs",
        "V",
        "adds `token_strs`, the text of each token",
        endpoints=TOKENIZE,
        form=bool,
        default="false",
    ),
)

ANSWER = (
    working(
        "max_tokens",
        "OVSL",
        "at least 1. With `echo`, 0 asks for the prompt alone",
        endpoints=COMPLETIONS,
        form=int,
        default="16",
        schema=_range(0),
    ),
    working(
        "max_tokens",
        "OVSL",
        "at least 1",
        endpoints=CHAT,
        form=Positive,
        default="what the model proposes, or what fits",
    ),
    working(
        "max_completion_tokens",
        "OVSL",
        "the same; counts more than `max_tokens`",
        endpoints=CHAT,
        form=Positive,
        default="`max_tokens`",
    ),
    working(
        "logprobs",
        "OVSL",
        f"0 to {MAX_LOGPROBS} alternatives for each token",
        endpoints=COMPLETIONS,
        form=int,
        default="none",
        schema=_range(0, MAX_LOGPROBS),
    ),
    working(
        "logprobs",
        "OVSL",
        "log probabilities of the output's tokens",
        endpoints=CHAT,
        form=bool,
        default="false",
    ),
    working(
        "top_logprobs",
        "OVS",
        f"0 to {MAX_LOGPROBS} alternatives for each token; needs `logprobs: true`",
        endpoints=CHAT,
        form=_LOGPROBS,
        default="0",
    ),
    *CHAT_ANSWER,
    working(
        "prompt_logprobs",
        "V",
        f"0 to {MAX_LOGPROBS} alternatives for each token of the prompt",
        form=_LOGPROBS,
        default="none",
    ),
    working(
        "echo",
        "OVS",
        "repeats the prompt before the output, with `logprobs` also its log probabilities",
        endpoints=COMPLETIONS,
        form=bool,
        default="false",
    ),
    working(
        "return_token_ids",
        "VS",
        "adds `prompt_token_ids` and each choice's `token_ids`",
        form=bool,
        default="false",
    ),
    working(
        "stream",
        "OVSL",
        "[server-sent events](http.md#streams)",
        endpoints=GENERATION,
        form=bool,
        default="false",
    ),
    working(
        "stream_options",
        "OVSL",
        "`include_usage`, `continuous_usage_stats`",
        form=StreamOptions,
        by_place=True,
        default="none",
    ),
    working(
        "priority",
        "VS",
        "a lower number goes first, and each step doubles the "
        "[weight of an SLO](precedence.md#value-and-priority)",
        endpoints=GENERATION,
        form=Int64,
        default="0",
    ),
    working(
        "cache_salt",
        "VS",
        f"up to {MAX_SALT_LENGTH} characters; only requests of the same salt share cached prefixes",
        endpoints=GENERATION,
        form=Annotated[str, Meta(max_length=MAX_SALT_LENGTH)],
        default='""',
    ),
    working(
        "slo",
        "M",
        "[a promise](promises.md#ask-for-one)",
        endpoints=GENERATION,
        schema={"type": ["string", "object"]},
        default="the default class",
    ),
    working(
        "include_acceptance",
        "M",
        "adds what became of [drafts](speculation.md) to the final usage",
        form=bool,
        default="false",
    ),
)

WORKS = (*PROMPT, *ANSWER, *SAMPLING, *STRUCTURE)
# Fields of `SamplingParams` that an endpoint gives a meaning of its own.
OWN_MEANING = ("max_tokens", "logprobs", "prompt_logprobs")
