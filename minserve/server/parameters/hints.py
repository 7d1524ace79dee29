"""Hints: parameters whose values change no result here.

Any sane value is accepted, and the answer's header names those that asked for something.
"""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

from minserve.server.parameters.forms import Int64
from minserve.server.parameters.parameter import (
    CHAT,
    CHOICES,
    GENERATION,
    MESSAGES,
    Parameter,
    Sort,
)

# More fields than this are no hint, but a load.
_Object = Annotated[dict[str, Any], Meta(max_length=256)]
_Number = Int64 | float


def _hint(name: str, known_from: str, says: str, form: Any, **more: Any) -> Parameter:
    more = {"endpoints": GENERATION, **more}
    return Parameter(name=name, sort=Sort.HINT, known_from=known_from, says=says, form=form, **more)


_LABEL = "a label for the client's own records"
_CACHE = "prefixes are always cached"
_ROUTE = "the server chooses who runs a request"
_IMAGES = "there are no images, audio or video"
_DRAFTS = "drafts change no result"
_EFFORT = "use `reasoning_effort` or `enable_thinking`"
_OF_REFUSED = "a setting of {}, which is refused unless it is off"

LABELS = (
    _hint("metadata", "O", _LABEL, _Object, endpoints=CHOICES, neutral=({},)),
    _hint("user", "OVS", _LABEL, str, neutral=("",)),
    _hint("safety_identifier", "O", _LABEL, str, neutral=("",)),
    _hint("request_id", "V", "the header `x-request-id` names a request", str),
    _hint("rid", "S", "the header `x-request-id` names a request", str | list[str]),
    _hint("session_id", "VS", _LABEL, str),
    _hint("custom_labels", "S", _LABEL, dict[str, str], neutral=({},)),
    _hint("store", "OV", "nothing is stored", bool, neutral=(False,)),
)

EFFORT = (
    _hint(
        "service_tier",
        "OV",
        "there is one tier; `slo` asks for a promise",
        str,
        neutral=("auto", "default"),
    ),
    _hint("verbosity", "O", "the length is the model's own", str, endpoints=CHAT),
    _hint("reasoning", "S", _EFFORT, _Object, endpoints=CHAT, neutral=({},)),
    _hint("thinking", "X", _EFFORT, _Object | bool | str, endpoints=CHAT),
    _hint(
        "stream_reasoning",
        "S",
        "thinking is streamed as it comes",
        bool,
        endpoints=CHAT,
        neutral=(True,),
    ),
)

CACHES = (
    _hint("prompt_cache_key", "OV", _CACHE, str, neutral=("",)),
    _hint("prompt_cache_options", "O", _CACHE, _Object, neutral=({},)),
    _hint("prompt_cache_retention", "O", _CACHE, str),
    _hint("cache_prompt", "L", "cached prefixes change no result", bool, neutral=(True,)),
    _hint(
        "n_cache_reuse", "L", "only whole prefixes are taken from the cache", Int64, neutral=(0,)
    ),
    _hint("n_keep", "L", "a full context ends an output; nothing is discarded", Int64),
    _hint("n_discard", "L", "a full context ends an output; nothing is discarded", Int64),
    _hint("id_slot", "L", _ROUTE, Int64, neutral=(-1,)),
    _hint("routed_dp_rank", "S", _ROUTE, Int64),
    _hint("data_parallel_rank", "S", _ROUTE, Int64),
    _hint("disagg_prefill_dp_rank", "S", _ROUTE, Int64),
)

SPEED = (
    _hint("prediction", "O", _DRAFTS, _Object, endpoints=CHAT),
    _hint("ngram_corpus_id", "S", _DRAFTS, str | list[str | None]),
    _hint("speculative.n_max", "L", _DRAFTS, Int64),
    _hint("speculative.n_min", "L", _DRAFTS, Int64),
    _hint("speculative.p_min", "L", _DRAFTS, _Number),
    _hint("backend_sampling", "L", "where tokens are sampled changes no result", bool),
    _hint("stream_interval", "V", "each token is sent at once", Int64, neutral=(1,)),
    _hint("sse_ping_interval", "L", "the server's own setting counts", Int64),
)

NOT_THERE = (
    _hint("guided_decoding_backend", "V", "structures are held in one way", str),
    _hint("max_dynamic_patch", "S", _IMAGES, Int64),
    _hint("min_dynamic_patch", "S", _IMAGES, Int64),
    _hint("use_audio_in_video", "S", _IMAGES, bool, neutral=(False,)),
    _hint("images_config", "S", _IMAGES, _Object, neutral=({},)),
    _hint("return_mm_kwargs", "V", _IMAGES, bool, neutral=(True,)),
    _hint("dynatemp_exponent", "L", _OF_REFUSED.format("`dynatemp_range`"), _Number),
    _hint("dry_base", "L", _OF_REFUSED.format("`dry_multiplier`"), _Number),
    _hint("dry_allowed_length", "L", _OF_REFUSED.format("`dry_multiplier`"), Int64),
    _hint("dry_penalty_last_n", "L", _OF_REFUSED.format("`dry_multiplier`"), Int64),
    _hint("dry_sequence_breakers", "L", _OF_REFUSED.format("`dry_multiplier`"), list[str]),
    _hint("xtc_threshold", "L", _OF_REFUSED.format("`xtc_probability`"), _Number),
    _hint("mirostat_tau", "L", _OF_REFUSED.format("`mirostat`"), _Number),
    _hint("mirostat_eta", "L", _OF_REFUSED.format("`mirostat`"), _Number),
    _hint("adaptive_decay", "L", _OF_REFUSED.format("`adaptive_target`"), _Number),
    _hint("reasoning_budget_start_tag", "L", _OF_REFUSED.format("a reasoning budget"), str),
    _hint("reasoning_budget_end_tag", "L", _OF_REFUSED.format("a reasoning budget"), str),
    _hint("reasoning_budget_end_tags", "L", _OF_REFUSED.format("a reasoning budget"), list[str]),
    _hint("reasoning_budget_message", "L", _OF_REFUSED.format("a reasoning budget"), str),
)

HINTS = (*LABELS, *EFFORT, *CACHES, *SPEED, *NOT_THERE)
# Within other parameters, whose parser finds them. The header names them like this.
NESTED = (
    _hint("stream_options.include_obfuscation", "O", "streams are not padded", bool),
    _hint(
        "messages.annotations", "O", "they are about an earlier answer", list, endpoints=MESSAGES
    ),
    _hint(
        "messages.refusal", "O", "the content counts, where both are given", str, endpoints=MESSAGES
    ),
    _hint("messages.cache_control", "X", _CACHE, _Object, endpoints=MESSAGES),
    _hint("messages.content.cache_control", "X", _CACHE, _Object, endpoints=MESSAGES),
    _hint("messages.content.prompt_cache_breakpoint", "O", _CACHE, _Object, endpoints=MESSAGES),
)
