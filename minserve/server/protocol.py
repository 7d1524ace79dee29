"""OpenAI's request bodies, parsed strictly into minserve's own types.

A field that would change the result and is not implemented is refused by name. A field that
asks for nothing (an empty tool list, ``best_of: 1``) is accepted, because clients send it unasked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minserve.errors import InvalidRequestError
from minserve.sampling_params import MAX_LOGPROBS, SEED_MAX, SEED_MIN, SamplingParams
from minserve.server.body import Fields, brief, is_integer

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]

COMPLETION_MAX_TOKENS = 16
INT32_MAX = 2**31 - 1
ROLES = ("system", "developer", "user", "assistant", "tool")

# Fields that are not implemented, with the values that ask for nothing.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "logit_bias": ({},),
    "service_tier": ("auto", "default"),
    "add_special_tokens": (True,),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1, 1.0),
    "spaces_between_special_tokens": (True,),
    "use_beam_search": (False,),
}
_HARMLESS_COMPLETION: dict[str, tuple[Any, ...]] = {"suffix": ("",)}
_HARMLESS_CHAT: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
# Labels for the client's own records; no value of theirs changes the result.
_LABELS = ("user", "safety_identifier", "prompt_cache_key")
_LABEL_FLAGS = ("store", "parallel_tool_calls")
_NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationCall:
    """A checked body of a completions or chat request.

    Attributes:
        model: the name that the client asked for; ``None`` takes the model that is served.
        prompts: one prompt per group of ``params.n`` choices; a chat has exactly one.
        echo: repeat the prompt in front of each output.
        drop_output: true for ``max_tokens: 0`` with ``echo``: the client wants only the prompt.
        include_usage: end a stream with a usage chunk.
        continuous_usage: put the usage so far in every chunk.
        include_acceptance: report in the final usage how many drafted tokens were accepted.
    """

    chat: bool
    model: str | None
    prompts: list[Prompt]
    params: SamplingParams
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    include_acceptance: bool = False
    echo: bool = False
    drop_output: bool = False
    priority: int = 0
    cache_salt: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeCall:
    """A /tokenize body: ``prompt`` or ``messages``, never both."""

    model: str | None
    prompt: str | None
    messages: list[dict[str, str]] | None
    add_special_tokens: bool


def parse_completion(values: dict[str, Any]) -> GenerationCall:
    """Check a /v1/completions body.

    Raises:
        InvalidRequestError: if a field is wrong; the error names it.
    """
    fields = Fields(values)
    prompts = parse_prompts(fields.take("prompt"))
    echo = fields.boolean("echo")
    n = fields.integer("n")
    if fields.integer("best_of") not in (None, 1, n):
        raise fields.error("best_of", "only 1 (or the same as n) is supported")
    max_tokens = fields.integer("max_tokens")
    drop_output = echo and max_tokens == 0
    if drop_output:
        if fields.integer("min_tokens", 0):
            raise fields.error("min_tokens", "is larger than max_tokens (0)")
        max_tokens = 1
    logprobs = fields.integer("logprobs")
    _refuse_unsupported(fields, _HARMLESS_COMPLETION)
    return _finish_call(
        fields,
        chat=False,
        prompts=prompts,
        echo=echo,
        drop_output=drop_output,
        params={
            "n": n,
            "max_tokens": COMPLETION_MAX_TOKENS if max_tokens is None else max_tokens,
            "logprobs": logprobs,
            "prompt_logprobs": logprobs if echo else None,
        },
    )


def parse_chat(values: dict[str, Any]) -> GenerationCall:
    """Check a /v1/chat/completions body.

    Raises:
        InvalidRequestError: if a field is wrong; the error names it.
    """
    fields = Fields(values)
    messages = parse_messages(fields.take("messages"))
    older = fields.integer("max_tokens", 1)
    newer = fields.integer("max_completion_tokens", 1)
    wanted = fields.boolean("logprobs")
    top = fields.integer("top_logprobs", 0, MAX_LOGPROBS)
    if top and not wanted:
        raise fields.error("top_logprobs", "needs logprobs: true")
    _refuse_unsupported(fields, _HARMLESS_CHAT)
    return _finish_call(
        fields,
        chat=True,
        prompts=[messages],
        params={
            "n": fields.integer("n"),
            "max_tokens": older if newer is None else newer,
            "logprobs": (top or 0) if wanted else None,
        },
    )


def _finish_call(fields: Fields, *, params: dict[str, Any], **call: Any) -> GenerationCall:
    """Take the fields that both endpoints share and refuse the rest."""
    model = fields.string("model")
    options = fields.object("stream_options")
    include_usage = options.boolean("include_usage")
    continuous_usage = options.boolean("continuous_usage_stats")
    options.only("include_obfuscation", False)
    options.finish()
    stream = fields.boolean("stream")
    include_acceptance = fields.boolean("include_acceptance")
    if include_acceptance and stream and not include_usage:
        raise fields.error(
            "include_acceptance", "needs stream_options.include_usage: it is told in that chunk"
        )
    priority = fields.integer("priority") or 0
    cache_salt = fields.string("cache_salt") or ""
    sampling = _parse_sampling(fields, params)
    fields.finish()
    return GenerationCall(
        model=model,
        params=sampling,
        stream=stream,
        include_usage=include_usage,
        continuous_usage=continuous_usage,
        include_acceptance=include_acceptance,
        priority=priority,
        cache_salt=cache_salt,
        **call,
    )


def _parse_sampling(fields: Fields, params: dict[str, Any]) -> SamplingParams:
    """Build the sampling settings; `SamplingParams` itself checks their ranges."""
    given = {name: value for name, value in params.items() if value is not None}
    # Without a limit in a chat, the output may grow to the model's length.
    given["max_tokens"] = params["max_tokens"]
    for name in _NUMBERS:
        value = fields.number(name)
        if value is not None:
            given[name] = value
    given["seed"] = fields.integer("seed", SEED_MIN, SEED_MAX)
    given["min_tokens"] = fields.integer("min_tokens", 0) or 0
    given["top_k"] = fields.integer("top_k", -1, INT32_MAX) or 0
    given["stop"] = _parse_stop(fields)
    given["stop_token_ids"] = _parse_stop_token_ids(fields)
    given["ignore_eos"] = fields.boolean("ignore_eos")
    given["skip_special_tokens"] = fields.boolean("skip_special_tokens", default=True)
    return SamplingParams(**given)


def _parse_stop(fields: Fields) -> tuple[str, ...]:
    value = fields.take("stop")
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise fields.error("stop", f"must be a string or a list of strings, not {brief(value)}")
    if not all(isinstance(item, str) for item in value):
        raise fields.error("stop", "must hold strings only")
    return tuple(value)


def _parse_stop_token_ids(fields: Fields) -> tuple[int, ...]:
    value = fields.take("stop_token_ids")
    return () if value is None or value == [] else tuple(parse_token_ids(value, "stop_token_ids"))


def _refuse_unsupported(fields: Fields, more: Mapping[str, tuple[Any, ...]]) -> None:
    for name, harmless in (*_HARMLESS.items(), *more.items()):
        fields.only(name, *harmless)
    for name in _LABELS:
        fields.string(name)
    for name in _LABEL_FLAGS:
        fields.boolean(name)


def parse_prompts(value: Any) -> list[Prompt]:
    """Return the prompts of any of the four forms that ``prompt`` may have.

    Returns:
        One entry per prompt: a string, or a list of token ids.

    Raises:
        InvalidRequestError: for an absent, empty or mixed prompt.
    """
    if value is None:
        raise InvalidRequestError("prompt is required", "prompt")
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise InvalidRequestError(
            f"prompt must be a string, a list of strings, token ids or a list of id lists, "
            f"not {brief(value)}",
            "prompt",
        )
    if not value:
        raise InvalidRequestError("prompt is an empty list", "prompt")
    if all(isinstance(item, str) for item in value):
        return value
    if all(isinstance(item, list) for item in value):
        return [parse_token_ids(item, "prompt") for item in value]
    return [parse_token_ids(value, "prompt")]


def parse_token_ids(value: Any, param: str) -> list[int]:
    """Return the value, which must be a non-empty list of non-negative integers.

    Raises:
        InvalidRequestError: naming ``param``.
    """
    if not isinstance(value, list) or not value:
        raise InvalidRequestError(f"{param} must be a non-empty list of token ids", param)
    for item in value:
        if not is_integer(item) or item < 0:
            raise InvalidRequestError(
                f"{param}: token ids are integers from 0 up, not {brief(item)}", param
            )
    return value


def parse_messages(value: Any) -> list[dict[str, str]]:
    """Check chat messages, and join the text parts of each with newlines.

    Returns:
        Messages with ``role``, ``content`` and, where given, ``name``.

    Raises:
        InvalidRequestError: naming the message and its field.
    """
    if value is None:
        raise InvalidRequestError("messages is required", "messages")
    if not isinstance(value, list) or not value:
        raise InvalidRequestError("messages must be a non-empty list", "messages")
    return [_parse_message(item, f"messages[{i}]") for i, item in enumerate(value)]


def _parse_message(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{where} must be an object, not {brief(value)}", where)
    fields = Fields(value, f"{where}.")
    role = fields.string("role")
    if role not in ROLES:
        raise fields.error("role", f"must be one of {', '.join(ROLES)}, not {brief(role)}")
    # OpenAI's later name for the same role; chat templates know only the older name.
    message = {"role": "system" if role == "developer" else role}
    message["content"] = _parse_content(fields.take("content"), f"{where}.content")
    name = fields.string("name")
    if name is not None:
        message["name"] = name
    # An assistant's answer comes back in the next turn with its empty fields.
    for unused in ("tool_calls", "annotations"):
        fields.only(unused, [])
    fields.finish()
    return message


def _parse_content(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        problem = f"{where} must be a string or a list of text parts"
        raise InvalidRequestError(problem, where)
    texts = []
    for i, part in enumerate(value):
        if not isinstance(part, dict):
            raise InvalidRequestError(f"{where}[{i}] must be an object", f"{where}[{i}]")
        fields = Fields(part, f"{where}[{i}].")
        fields.only("type", "text")
        text = fields.string("text")
        if text is None:
            raise fields.error("text", "is required")
        fields.finish()
        texts.append(text)
    return "\n".join(texts)


def parse_tokenize(values: dict[str, Any]) -> TokenizeCall:
    """Check a /tokenize body.

    Raises:
        InvalidRequestError: if a field is wrong; the error names it.
    """
    fields = Fields(values)
    model = fields.string("model")
    prompt = fields.string("prompt")
    messages = fields.take("messages")
    if (prompt is None) == (messages is None):
        raise InvalidRequestError("give either prompt or messages", "prompt")
    # A chat template writes the special tokens itself, so a chat takes none on top.
    special = fields.boolean("add_special_tokens", default=messages is None)
    fields.only("add_generation_prompt", True)
    fields.only("return_token_strs", False)
    fields.finish()
    return TokenizeCall(
        model=model,
        prompt=prompt,
        messages=None if messages is None else parse_messages(messages),
        add_special_tokens=special,
    )


def parse_detokenize(values: dict[str, Any]) -> tuple[str | None, list[int]]:
    """Check a /detokenize body.

    Returns:
        The model's name, where given, and the token ids.

    Raises:
        InvalidRequestError: if a field is wrong; the error names it.
    """
    fields = Fields(values)
    model = fields.string("model")
    tokens = fields.take("tokens")
    if tokens != []:
        tokens = parse_token_ids(tokens, "tokens")
    fields.finish()
    return model, tokens
