"""OpenAI's request bodies, parsed strictly into minserve's own types.

A field that would change the result and is not implemented is refused by name. A field that
asks for nothing (an empty tool list, ``best_of: 1``) is accepted, because clients send it unasked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from msgspec import Meta, field

from minserve.errors import InvalidRequestError
from minserve.prompts import Prompt, PromptOptions
from minserve.sampling_params import MAX_LOGPROBS, SamplingParams
from minserve.server.body import Form, brief, convert, refusal, refuse_unsupported

COMPLETION_MAX_TOKENS = 16
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
_HARMLESS_TOKENIZE: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "return_token_strs": (False,),
}
_TokenId = Annotated[int, Meta(ge=0)]
# Fields that `SamplingParams` has by the same name, with their types; it checks their ranges.
_SETTINGS: dict[str, Any] = {
    **get_type_hints(SamplingParams),
    "stop": Any,
    "stop_token_ids": list[_TokenId],
}
for _name in ("max_tokens", "logprobs", "prompt_logprobs"):
    del _SETTINGS[_name]
_Positive = Annotated[int, Meta(ge=1)]
_Nothing = tuple[()]


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
        prompt_options: how the prompts become token ids.
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
    prompt_options: PromptOptions = dataclass_field(default_factory=PromptOptions)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeCall:
    """A checked /tokenize body, whose prompt is a text or messages."""

    model: str | None
    prompt: str | list[dict[str, str]]
    add_special_tokens: bool


class _StreamOptions(Form):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class _TextPart(Form):
    text: str
    type: Literal["text"] = "text"


class _Message(Form):
    """A message of a chat. An answer comes back in the next turn with its empty fields."""

    role: str
    content: str | list[_TextPart]
    name: str | None = None
    tool_calls: _Nothing = ()
    annotations: _Nothing = ()


_Messages = Annotated[list[_Message], Meta(min_length=1)]


class _Body(Form):
    """The fields that both endpoints share, beside `_SETTINGS` and `_HARMLESS`."""

    model: str | None = None
    stream: bool = False
    stream_options: _StreamOptions = field(default_factory=_StreamOptions)
    include_acceptance: bool = False
    priority: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] = 0
    cache_salt: str = ""
    # Labels for the client's own records; no value of theirs changes the result.
    user: str = ""
    safety_identifier: str = ""
    prompt_cache_key: str = ""
    store: bool = False
    parallel_tool_calls: bool = True


_B = TypeVar("_B", bound=_Body)


class _CompletionBody(_Body):
    prompt: Any = None
    echo: bool = False
    best_of: int = 1
    max_tokens: int = COMPLETION_MAX_TOKENS
    logprobs: int | None = None


class _ChatBody(_Body, kw_only=True):
    messages: _Messages
    max_tokens: _Positive | None = None
    max_completion_tokens: _Positive | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] = 0


class _TokenizeBody(Form):
    model: str | None = None
    prompt: str | None = None
    messages: _Messages | None = None
    add_special_tokens: bool | None = None


class _DetokenizeBody(Form, kw_only=True):
    model: str | None = None
    tokens: list


def parse_completion(values: dict[str, Any], defaults: Mapping[str, Any]) -> GenerationCall:
    """Check a /v1/completions body.

    Args:
        defaults: the model's own sampling settings, for those that the body leaves out.

    Raises:
        InvalidRequestError: if a field is wrong; the error names it.
    """
    body, settings = _read(values, _CompletionBody, _HARMLESS_COMPLETION, defaults)
    prompts = parse_prompts(body.prompt)
    if body.best_of not in (1, settings.get("n", 1)):
        raise refusal("best_of", "only 1 (or the same as n) is supported")
    drop_output = body.echo and body.max_tokens == 0
    if drop_output and settings.get("min_tokens"):
        raise refusal("min_tokens", "is larger than max_tokens (0)")
    params = SamplingParams(
        **settings,
        max_tokens=1 if drop_output else body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    return _call(body, prompts, params, chat=False, echo=body.echo, drop_output=drop_output)


def parse_chat(values: dict[str, Any], defaults: Mapping[str, Any]) -> GenerationCall:
    """Check a /v1/chat/completions body.

    Args:
        defaults: the model's own sampling settings, for those that the body leaves out.

    Raises:
        InvalidRequestError: if a field is wrong; the error names it.
    """
    body, settings = _read(values, _ChatBody, _HARMLESS_CHAT, defaults)
    if body.top_logprobs and not body.logprobs:
        raise refusal("top_logprobs", "needs logprobs: true")
    newer = body.max_completion_tokens
    params = SamplingParams(
        **settings,
        # Without a limit in a chat, the model's own limits count.
        max_tokens=body.max_tokens if newer is None else newer,
        logprobs=body.top_logprobs if body.logprobs else None,
    )
    return _call(body, [_plain_messages(body.messages)], params, chat=True)


def _read(
    values: dict[str, Any],
    form: type[_B],
    harmless: dict[str, tuple[Any, ...]],
    defaults: Mapping[str, Any],
) -> tuple[_B, dict[str, Any]]:
    """Return the body, and the sampling settings in it, which `SamplingParams` checks itself."""
    values = dict(values)
    settings = {name: values.pop(name) for name in _SETTINGS if name in values}
    for name, value in settings.items():
        try:
            convert(value, _SETTINGS[name], name)
        except InvalidRequestError as error:
            raise InvalidRequestError(str(error), name) from None
    refuse_unsupported(values, _HARMLESS | harmless)
    proposed = {name: value for name, value in defaults.items() if name in _SETTINGS}
    return convert(values, form), {**proposed, **settings}


def _call(
    body: _Body, prompts: list[Prompt], params: SamplingParams, **more: Any
) -> GenerationCall:
    options = body.stream_options
    if options.include_obfuscation:
        raise refusal("stream_options.include_obfuscation", "true is not supported")
    if body.include_acceptance and body.stream and not options.include_usage:
        raise refusal(
            "include_acceptance", "needs stream_options.include_usage: it is told in that chunk"
        )
    return GenerationCall(
        model=body.model,
        prompts=prompts,
        params=params,
        stream=body.stream,
        include_usage=options.include_usage,
        continuous_usage=options.continuous_usage_stats,
        include_acceptance=body.include_acceptance,
        priority=body.priority,
        cache_salt=body.cache_salt,
        **more,
    )


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
    try:
        return convert(value, list[_TokenId], param)
    except InvalidRequestError as error:  # It names the item; clients look for the field.
        raise InvalidRequestError(str(error), param) from None


def _plain_messages(messages: list[_Message]) -> list[dict[str, str]]:
    """Return messages as chat templates take them; the text parts of each joined with newlines.

    Raises:
        InvalidRequestError: naming the message with an unknown role.
    """
    plain = []
    for i, message in enumerate(messages):
        role, content = message.role, message.content
        if role not in ROLES:
            problem = f"must be one of {', '.join(ROLES)}, not {brief(role)}"
            raise refusal(f"messages[{i}].role", problem)
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        # "developer" is OpenAI's later name for the role that chat templates call "system".
        one = {"role": "system" if role == "developer" else role, "content": content}
        plain.append(one if message.name is None else {**one, "name": message.name})
    return plain


def parse_tokenize(values: dict[str, Any]) -> TokenizeCall:
    """Check a /tokenize body.

    Raises:
        InvalidRequestError: if a field is wrong; the error names it.
    """
    values = dict(values)
    refuse_unsupported(values, _HARMLESS_TOKENIZE)
    body = convert(values, _TokenizeBody)
    prompt: str | list[dict[str, str]]
    match body.prompt, body.messages:
        case str(prompt), None:
            pass
        case None, [*messages]:
            prompt = _plain_messages(messages)
        case _:
            raise InvalidRequestError("give either prompt or messages", "prompt")
    special = body.add_special_tokens
    if special is None:
        # A chat template writes the special tokens itself, so a chat takes none on top.
        special = isinstance(prompt, str)
    return TokenizeCall(model=body.model, prompt=prompt, add_special_tokens=special)


def parse_detokenize(values: dict[str, Any]) -> tuple[str | None, list[int]]:
    """Check a /detokenize body.

    Returns:
        The model's name, where given, and the token ids.

    Raises:
        InvalidRequestError: if a field is wrong; the error names it.
    """
    body = convert(values, _DetokenizeBody)
    return body.model, body.tokens and parse_token_ids(body.tokens, "tokens")
