"""How a chat is put to the model, and how its answer is read: what a request and a model say together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from minserve.chat_formats import DESCRIBED
from minserve.prompts import PromptOptions
from minserve.sampling_params import SamplingParams
from minserve.server.answer.answer_parser import AnswerForm
from minserve.server.answer.formats import TOOL_PARSERS
from minserve.server.answer.grammar import CallRules
from minserve.server.body import refusal
from minserve.server.chat_facts import ChatFacts
from minserve.server.messages import PlainMessage
from minserve.server.protocol import GenerationCall
from minserve.server.thinking import ThinkingWish
from minserve.server.tool_prompts import with_described_tools
from minserve.server.tools import ToolUse
from minserve.structure import Structure, StructureKind


def put_to_model(
    messages: Sequence[PlainMessage],
    options: PromptOptions,
    tool_use: ToolUse | None,
    thinking: ThinkingWish,
    facts: ChatFacts,
) -> tuple[list[PlainMessage], PromptOptions, list[str]]:
    """Return a chat's messages and options as the model's template wants them.

    Returns:
        Messages, options, and the names of hints that the template does not know.

    Raises:
        InvalidRequestError: where the model cannot be told of the tools.
    """
    template = facts.template_for(with_tools=tool_use is not None)
    known, unknown = thinking.for_template(() if template is None else template.variables)
    # What was given for the template itself counts more.
    options = replace(options, template_kwargs={**known, **options.template_kwargs})
    if tool_use is not None:
        _check_tools_work(facts)
    described = tool_use is not None and facts.describes_tools
    if described or not (template is not None and template.shows_calls):
        try:
            written = with_described_tools(
                messages,
                tool_use.tools if tool_use is not None and described else (),
                takes_system=template is None or template.takes_system,
            )
        except RecursionError:
            raise refusal("messages", "or tools are nested too deeply") from None
    else:
        written = _with_texts(messages) if template.wants_text else list(messages)
    if tool_use is not None and not described:
        tools = tuple(one.for_template() for one in tool_use.tools)
        options = replace(options, tools=tools)
    return written, options, unknown


def _check_tools_work(facts: ChatFacts) -> None:
    if facts.tool_format is None:
        raise refusal("tools", "this server was started with --tool-format none")
    if facts.describes_tools and facts.tool_format != DESCRIBED:
        raise refusal(
            "tools",
            f"the model's chat template knows no tools, and --tool-format {facts.tool_format} has "
            f"no other way to describe them; the server needs --tool-format {DESCRIBED}",
        )


def _with_texts(messages: Sequence[PlainMessage]) -> list[PlainMessage]:
    """Return messages whose calls have their arguments as a text."""

    def call(one: Mapping[str, Any]) -> dict[str, Any]:
        function = one["function"]
        arguments = function["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        return {**one, "function": {**function, "arguments": text}}

    return [
        {**message, "tool_calls": [call(one) for one in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def plan_chat(call: GenerationCall, facts: ChatFacts) -> GenerationCall:
    """Return a chat as it is put to the model, with the form of its answers.

    `plan_answer` follows when the prompt is known.

    Raises:
        InvalidRequestError: where the model cannot do what is asked.
    """
    [messages] = call.prompts
    written, options, unknown = put_to_model(
        messages,  # type: ignore[arg-type]  # those of a chat
        call.prompt_options,
        call.tool_use,
        call.thinking,
        facts,
    )
    form = _form(call, facts)
    try:
        params = _params(call, form, facts)
    except RecursionError:
        raise refusal("tools", "are nested too deeply") from None
    return replace(
        call,
        prompts=[written],
        prompt_options=options,
        params=params,
        form=form,
        ignored=(*call.ignored, *unknown),
    )


def _form(call: GenerationCall, facts: ChatFacts) -> AnswerForm | None:
    """Return how the answers are read; ``None`` where all text is content."""
    use = call.tool_use
    parses = use is not None and use.is_parsed
    if not parses and facts.thinking is None:
        return None
    tools = facts.tool_format if parses else None
    separates = facts.separates_thinking and call.thinking.separate
    markers = [] if tools is None else list(TOOL_PARSERS[tools].special_markers)
    if facts.thinking is not None and separates:
        markers += [facts.thinking.begin, facts.thinking.end]
    shown = call.params.preserved_tokens
    return AnswerForm(
        tools=tools,
        tool_names=frozenset() if use is None else frozenset(one.name for one in use.tools),
        only_one=use is not None and not use.parallel,
        reasoning=facts.thinking,
        separates=separates,
        includes=call.thinking.include,
        hidden=tuple(
            one
            for one in markers
            if call.params.skip_special_tokens and one in facts.special and one not in shown
        ),
    )


def _params(call: GenerationCall, form: AnswerForm | None, facts: ChatFacts) -> SamplingParams:
    """Return settings with which the answers have their form."""
    params, use = call.params, call.tool_use
    if form is not None and form.hidden:
        params = replace(params, preserved_tokens=(*params.preserved_tokens, *form.hidden))
    if use is None or facts.tool_format is None:
        return params
    parser = TOOL_PARSERS[facts.tool_format]
    strict = parser.can_be_free and any(one.strict for one in use.tools)
    if not use.must_call and (params.structure is not None or not strict):
        # As in vLLM: the form that was asked for holds, and calls are not in it.
        return params
    rules = CallRules(
        tools=use.callable,
        many=use.parallel and use.forced is None,
        freely=not use.must_call,
        mark_ids=facts.mark_ids,
        template="" if facts.tool_template is None else facts.tool_template.text,
    )
    structure = Structure(StructureKind.LARK, parser.grammar(rules), param="tools")
    return replace(params, structure=structure)


def plan_answer(call: GenerationCall, prompt_end: str, facts: ChatFacts) -> GenerationCall:
    """Return a chat that knows whether its prompt ends within the thinking.

    Args:
        call: as `plan_chat` returns it, with its messages.
        prompt_end: the text of the prompt's last tokens, special ones included.
    """
    thinking = facts.thinking
    if thinking is None:
        return call
    end = prompt_end.rstrip()
    is_open = end.endswith(thinking.begin)
    is_closed = end.endswith(thinking.end)
    if call.prompt_options.continue_final_message:
        text = call.prompts[0][-1]["content"]  # type: ignore[index, call-overload]
        is_open = text.rfind(thinking.begin) > text.rfind(thinking.end)
        is_closed = thinking.end in text and not is_open
    form = None if call.form is None else replace(call.form, is_open=is_open)
    params, structure = call.params, call.params.structure
    if structure is not None and facts.separates_thinking and not is_closed:
        # What the model thinks has no form. Where the prompt does not begin it, the model may.
        opener = None if is_open else thinking.begin
        structure = replace(structure, begins_after=thinking.end, opener=opener)
        params = replace(params, structure=structure)
    return replace(call, form=form, params=params, thinks_no_more=is_closed)
