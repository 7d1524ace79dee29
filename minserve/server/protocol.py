"""The bodies of requests, parsed strictly into minserve's own types.

What becomes of each field is a row of the table in `minserve.server.parameters.table`; here is what
several fields mean together. Parsing depends on the body and the model's sampling settings alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from minserve.errors import InvalidRequestError
from minserve.prompts import Prompt, PromptOptions
from minserve.sampling_params import SamplingParams
from minserve.server.answer.answer_parser import AnswerForm
from minserve.server.body import brief, convert, refusal
from minserve.server.messages import PlainMessage, plain_messages
from minserve.server.parameters.forms import StreamOptions, TokenId
from minserve.server.parameters.table import read_body
from minserve.server.parameters.works import SAMPLING
from minserve.server.structure_fields import read_structure
from minserve.server.thinking import ThinkingWish
from minserve.server.tools import ToolUse, read_tool_use

COMPLETION_MAX_TOKENS = 16
MAX_TEMPLATE_KWARGS_BYTES = 2**14
# Parameters that a text without messages has no use for.
_OF_CHATS = (
    "continue_final_message",
    "chat_template_kwargs",
    "tools",
    "tool_choice",
    "reasoning_effort",
    "enable_thinking",
)
_SETTINGS = frozenset(one.name for one in SAMPLING)
# Variables of a template that are parameters of their own, or the server's.
_RESERVED = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "conversations",
        "documents",
        "messages",
        "return_assistant_tokens_mask",
        "return_dict",
        "self",
        "tokenize",
        "tools",
    }
)


_Call = TypeVar("_Call", bound="GenerationCall")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationCall:
    """A checked body of a completions or chat request.

    Attributes:
        model: the name that the client asked for; ``None`` takes the model that is served.
        prompts: one prompt per group of ``params.n`` choices; a chat has exactly one.
        slo: what the body asks for, unchecked: headers may have parts of it.
        echo: repeat the prompt in front of each output.
        drop_output: true for ``max_tokens: 0`` with ``echo``: the client wants only the prompt.
        prompt_logprobs: the alternatives to tell of each prompt token, in a field of the answer.
            ``params.prompt_logprobs`` also counts what ``echo`` with log probabilities needs.
        return_token_ids: tell the ids of the tokens of prompts and outputs.
        include_usage: end a stream with a usage chunk.
        continuous_usage: put the usage so far in every chunk.
        include_acceptance: report in the final usage how many drafted tokens were accepted.
        prompt_options: how the prompts become token ids.
        tool_use: the tools of a chat that may be called, and how.
        thinking: what a chat says of thinking.
        form: how the text of a chat's outputs is read; ``None`` where all of it is the answer.
        thinks_no_more: the prompt of a chat ends behind the thinking.
        ignored: names of hints that change nothing here, for the header of the answer.
    """

    chat: bool
    model: str | None
    prompts: list[Prompt]
    params: SamplingParams
    slo: Any = None
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    include_acceptance: bool = False
    echo: bool = False
    drop_output: bool = False
    prompt_logprobs: int | None = None
    return_token_ids: bool = False
    priority: int = 0
    cache_salt: str = ""
    prompt_options: PromptOptions = field(default_factory=PromptOptions)
    tool_use: ToolUse | None = None
    thinking: ThinkingWish = field(default_factory=ThinkingWish)
    form: AnswerForm | None = None
    thinks_no_more: bool = False
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeCall:
    """A checked /tokenize body, whose prompt is a text or messages.

    Attributes:
        return_token_strs: tell the text of each token too.
        tool_use, thinking: as in `GenerationCall`.
        ignored: names of hints that change nothing here.
    """

    model: str | None
    prompt: str | list[PlainMessage]
    prompt_options: PromptOptions = field(default_factory=PromptOptions)
    tool_use: ToolUse | None = None
    thinking: ThinkingWish = field(default_factory=ThinkingWish)
    return_token_strs: bool = False
    ignored: tuple[str, ...] = ()


def parse_completion(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> GenerationCall:
    """Check a /v1/completions body.

    Args:
        defaults: the model's own sampling settings, for those that the body leaves out.

    Raises:
        InvalidRequestError: if a field is wrong; the error names it.
    """
    given, hints = read_body(values, "completions")
    settings = sampling_settings(given, defaults)
    echo = given.get("echo", False)
    max_tokens = given.get("max_tokens", COMPLETION_MAX_TOKENS)
    drop_output = echo and max_tokens == 0
    if drop_output and settings.get("min_tokens"):
        raise refusal("min_tokens", "is larger than max_tokens (0)")
    logprobs = given.get("logprobs")
    params = SamplingParams(
        **settings,
        structure=read_structure(given),
        max_tokens=1 if drop_output else max_tokens,
        logprobs=logprobs,
        prompt_logprobs=_most(given.get("prompt_logprobs"), logprobs if echo else None),
    )
    prompts = parse_prompts(given["prompt"])
    return generation_call(
        given, hints, prompts, params, chat=False, echo=echo, drop_output=drop_output
    )


def parse_chat(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> GenerationCall:
    """Check a /v1/chat/completions body.

    Args:
        defaults: the model's own sampling settings, for those that the body leaves out.

    Raises:
        InvalidRequestError: if a field is wrong; the error names it.
    """
    given, hints = read_body(values, "chat")
    settings = sampling_settings(given, defaults)
    logprobs, top_logprobs = given.get("logprobs", False), given.get("top_logprobs", 0)
    if top_logprobs and not logprobs:
        raise refusal("top_logprobs", "needs logprobs: true")
    params = SamplingParams(
        **settings,
        structure=read_structure(given),
        # Without a limit in a chat, the model's own limits count.
        max_tokens=given.get("max_completion_tokens", given.get("max_tokens")),
        logprobs=top_logprobs if logprobs else None,
        prompt_logprobs=given.get("prompt_logprobs"),
    )
    messages, their_hints = plain_messages(given["messages"])
    return generation_call(
        given,
        hints + their_hints,
        [messages],
        params,
        chat=True,
        tool_use=read_tool_use(given),
        thinking=_thinking(given),
    )


def _thinking(given: Mapping[str, Any]) -> ThinkingWish:
    return ThinkingWish(
        separate=given.get("separate_reasoning", True) and given.get("reasoning_format") != "none",
        include=given.get("include_reasoning", True),
        effort=given.get("reasoning_effort"),
        enable=given.get("enable_thinking"),
    )


def _most(*numbers: int | None) -> int | None:
    """Return the largest number that is given."""
    return max((one for one in numbers if one is not None), default=None)


def sampling_settings(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sampling settings of a body, which `SamplingParams` checks itself."""
    settings = {name: value for name, value in defaults.items() if name in _SETTINGS}
    settings |= {name: value for name, value in given.items() if name in _SETTINGS}
    if given.get("top_p") == 0:
        # The smallest set of tokens that has no mass at all: the most likely token alone.
        settings |= {"top_p": 1.0, "top_k": 1}
    return settings


def generation_call(
    given: Mapping[str, Any],
    hints: list[str],
    prompts: list[Prompt],
    params: SamplingParams,
    *,
    kind: type[_Call] = GenerationCall,  # type: ignore[assignment]  # the type of its default
    **more: Any,
) -> _Call:
    """Return the call of a body, whose prompts and sampling settings are parsed already.

    Args:
        given: the body's values, by name.
        hints: the names of those that change nothing; more of them are appended.
        kind: of call.
        more: attributes of the call that no field of the same name and meaning gives.

    Raises:
        InvalidRequestError: if fields contradict each other; the error names one.
    """
    options = given.get("stream_options") or StreamOptions()
    if options.include_obfuscation:
        hints.append("stream_options.include_obfuscation")
    stream, acceptance = given.get("stream", False), given.get("include_acceptance", False)
    if acceptance and stream and not options.include_usage:
        raise refusal(
            "include_acceptance", "needs stream_options.include_usage: it is told in that chunk"
        )
    return kind(
        model=given.get("model"),
        prompts=prompts,
        params=params,
        slo=given.get("slo"),
        stream=stream,
        include_usage=options.include_usage,
        continuous_usage=options.continuous_usage_stats,
        include_acceptance=acceptance,
        prompt_logprobs=given.get("prompt_logprobs"),
        return_token_ids=given.get("return_token_ids", False),
        priority=given.get("priority", 0),
        cache_salt=given.get("cache_salt", ""),
        prompt_options=_prompt_options(given),
        ignored=tuple(hints),
        **more,
    )


def _prompt_options(given: Mapping[str, Any]) -> PromptOptions:
    ends_open = given.get("continue_final_message", False)
    if ends_open and given.get("add_generation_prompt"):
        raise refusal(
            "continue_final_message",
            "the prompt cannot end within the last message and with the beginning of another; "
            "leave out add_generation_prompt",
        )
    if (keep := given.get("truncate_prompt_tokens")) == 0:
        raise refusal("truncate_prompt_tokens", "must be -1 or at least 1, not 0")
    return PromptOptions(
        add_special_tokens=given.get("add_special_tokens"),
        add_generation_prompt=given.get("add_generation_prompt", not ends_open),
        continue_final_message=ends_open,
        template_kwargs=_template_kwargs(given.get("chat_template_kwargs", {})),
        truncate_prompt_tokens=keep,
    )


def _template_kwargs(value: Any) -> dict[str, Any]:
    """Return variables for a chat template, in which ``null`` is a value like others.

    Raises:
        InvalidRequestError: for what is no object of names, is too large, or has a variable of the
            server's own.
    """
    param = "chat_template_kwargs"
    if not isinstance(value, dict):
        raise refusal(param, f"must be an object, not {brief(value)}")
    for name in value:
        # Special tokens are named like bos_token.
        if name in _RESERVED or name.endswith("_token") or not name.isidentifier():
            raise refusal(param, f"{brief(name)} cannot be set as a variable of the template")
    try:
        size = len(msgspec.json.encode(value))
    except RecursionError:
        raise refusal(param, "is nested too deeply") from None
    if size > MAX_TEMPLATE_KWARGS_BYTES:
        raise refusal(
            param, f"has {size} bytes of JSON, and at most {MAX_TEMPLATE_KWARGS_BYTES} are taken"
        )
    return value


def parse_prompts(value: Any) -> list[Prompt]:
    """Return the prompts of any of the four forms that ``prompt`` may have.

    Returns:
        One entry per prompt: a string, or a list of token ids.

    Raises:
        InvalidRequestError: for an empty or mixed prompt.
    """
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
        return convert(value, list[TokenId], param)
    except InvalidRequestError as error:  # It names the item; clients look for the field.
        raise InvalidRequestError(str(error), param) from None


def parse_tokenize(values: Mapping[str, Any]) -> TokenizeCall:
    """Check a /tokenize body.

    Raises:
        InvalidRequestError: if a field is wrong; the error names it.
    """
    given, hints = read_body(values, "tokenize")
    prompt: str | list[PlainMessage]
    match given.get("prompt"), given.get("messages"):
        case str(prompt), None:
            _refuse_of_chats(given)
        case None, [*messages]:
            prompt, their_hints = plain_messages(messages)
            hints += their_hints
        case _:
            raise InvalidRequestError("give either prompt or messages", "prompt")
    return TokenizeCall(
        model=given.get("model"),
        prompt=prompt,
        prompt_options=_prompt_options(given),
        return_token_strs=given.get("return_token_strs", False),
        tool_use=read_tool_use(given),
        thinking=_thinking(given),
        ignored=tuple(hints),
    )


def _refuse_of_chats(given: Mapping[str, Any]) -> None:
    for name in _OF_CHATS:
        if given.get(name):
            raise refusal(name, "needs messages")


def parse_detokenize(values: Mapping[str, Any]) -> tuple[str | None, list[int]]:
    """Check a /detokenize body.

    Returns:
        The model's name, where given, and the token ids.

    Raises:
        InvalidRequestError: if a field is wrong; the error names it.
    """
    given, _ = read_body(values, "detokenize")
    tokens = given["tokens"]
    return given.get("model"), [] if tokens == [] else parse_token_ids(tokens, "tokens")
