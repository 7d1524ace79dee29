"""How chats with tools and thinking are put to a model, and how its answers will be read."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tool_templates import BY_NAME, HERMES

from minserve.config import EngineConfig
from minserve.engine.text.backend import RustBackend
from minserve.engine.text.inputs import PromptProcessor
from minserve.engine.text.tokenizer import Tokenizer
from minserve.errors import InvalidRequestError
from minserve.server.answer.parts import Content
from minserve.server.body import parse_object
from minserve.server.chat_facts import ChatFacts, find_chat_facts
from minserve.server.chat_plan import plan_answer, plan_chat
from minserve.server.protocol import GenerationCall, parse_chat
from minserve.structure import StructureKind

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather.", "parameters": PARAMETERS},
}
ARGUMENTS = {"city": "Köln"}
CALL = {"name": "weather", "arguments": ARGUMENTS}
HELLO = [{"role": "user", "content": "hello"}]
# As clients send it, and as transformers wants it.
ROUND_TRIP: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    *HELLO,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "abcdefgh1",
                "type": "function",
                "function": {**CALL, "arguments": json.dumps(ARGUMENTS)},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "abcdefgh1", "content": "rain"},
]
AS_OBJECTS = [
    *ROUND_TRIP[:2],
    {
        **ROUND_TRIP[2],
        "content": "",
        "tool_calls": [{"id": "abcdefgh1", "type": "function", "function": CALL}],
    },
    {**ROUND_TRIP[3], "name": "weather"},
]

Planned = tuple[GenerationCall, str]


class Chats:
    """Chats with a tiny model that has a template of a test."""

    def __init__(
        self, folder: Path, template: str, special: Sequence[str] = (), **settings: Any
    ) -> None:
        rust = RustTokenizer.from_file(str(folder / "tokenizer.json"))
        rust.add_special_tokens(list(special))
        backend = RustBackend(rust)
        named = {"bos_token": "<s>", "eos_token": "</s>"}
        self.folder, self.template = folder, template
        self.tokenizer = Tokenizer(backend, special_tokens=named, chat_template=template)
        self.facts: ChatFacts = find_chat_facts(self.tokenizer, EngineConfig(**settings))
        self.prompts = PromptProcessor(self.tokenizer, 10_000, 10_000)

    def plan(self, **fields: Any) -> Planned:
        """Return a chat as it is run, and its prompt."""
        call = plan_chat(parse_chat({"messages": HELLO, **fields}, {}), self.facts)
        prompt = self.prompts.process(call.prompts[0], call.prompt_options)
        end = self.tokenizer.decode(prompt.token_ids[-16:], skip_special_tokens=False)
        return plan_answer(call, end, self.facts), prompt.text or ""

    def by_transformers(self, messages: Any, **variables: Any) -> str:
        from transformers import AutoTokenizer

        theirs = AutoTokenizer.from_pretrained(self.folder)
        options = {"tokenize": False, "add_generation_prompt": True}
        return theirs.apply_chat_template(
            messages, chat_template=self.template, **{**options, **variables}
        )


@pytest.fixture(scope="module")
def chats(tiny_llama_dir: Path) -> Callable[..., Chats]:
    return lambda template, **settings: Chats(
        tiny_llama_dir, BY_NAME.get(template, template), **settings
    )


# --- prompts ---


@pytest.mark.parametrize("template", ["hermes", "hybrid", "llama3", "mistral-list", "mistral-args"])
def test_templates_that_know_tools_write_the_prompt(
    template: str, chats: Callable[..., Chats]
) -> None:
    there = chats(template)
    for mine, theirs in ((HELLO, HELLO), (ROUND_TRIP, AS_OBJECTS)):
        for tools in ([TOOL], None):
            more = {} if tools is None else {"tools": tools}
            _, prompt = there.plan(messages=mine, **more)
            assert prompt == there.by_transformers(theirs, tools=tools)


def test_arguments_are_a_text_where_a_template_wants_it(chats: Callable[..., Chats]) -> None:
    there = chats("always-thinking")
    assert '```json\n{"city": "K\\u00f6ln"}\n```' in there.plan(messages=ROUND_TRIP)[1]


def test_other_templates_have_tools_described_in_a_message(chats: Callable[..., Chats]) -> None:
    there = chats("no-system")
    _, prompt = there.plan(tools=[TOOL])
    assert prompt.startswith("<|im_start|>user\n# Tools\n")
    assert f"<tools>\n{json.dumps(TOOL)}\n</tools>" in prompt
    assert prompt.endswith("</tool_call>\n\nhello<|im_end|>\n<|im_start|>assistant\n")

    plain = "{% for m in messages %}[{{ m.role }}: {{ m.content }}]{% endfor %}"
    _, prompt = chats(plain).plan(messages=ROUND_TRIP, tools=[TOOL])
    assert prompt.startswith("[system: Be brief.\n\n# Tools\n")
    assert prompt.endswith(
        "[user: hello][assistant: <tool_call>\n"
        '{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>]'
        "[user: <tool_response>\nrain\n</tool_response>]"
    )
    # Calls of earlier turns are told where no tools are offered any more, too.
    _, prompt = chats(plain).plan(messages=[*ROUND_TRIP, *ROUND_TRIP[3:]])
    response = "<tool_response>\nrain\n</tool_response>"
    assert prompt.endswith(f"</tool_call>][user: {response}\n{response}]")
    assert prompt.startswith("[system: Be brief.][user")


def test_none_hides_the_tools(chats: Callable[..., Chats]) -> None:
    there = chats("hermes")
    call, prompt = there.plan(tools=[TOOL], tool_choice="none")
    assert prompt == there.plan()[1]
    assert call.form is None


def test_tools_can_be_switched_off_and_their_form_given(chats: Callable[..., Chats]) -> None:
    call, _ = chats("hermes", tool_format="mistral").plan(tools=[TOOL])
    assert call.form is not None
    assert call.form.tools == "mistral"
    for template, setting in (("hermes", "none"), ("no-system", "llama3")):
        with pytest.raises(InvalidRequestError, match="--tool-format") as caught:
            chats(template, tool_format=setting).plan(tools=[TOOL])
        assert caught.value.param == "tools"


def test_a_template_that_fails_on_a_call_refuses_the_chat(chats: Callable[..., Chats]) -> None:
    two = [{**ROUND_TRIP[2], "tool_calls": 2 * ROUND_TRIP[2]["tool_calls"]}]
    with pytest.raises(InvalidRequestError, match="one call alone"):
        chats("llama3").plan(messages=[*HELLO, *two], tools=[TOOL])


# --- structures ---


def test_required_calls_are_held_by_a_grammar(chats: Callable[..., Chats]) -> None:
    there = chats("hermes")
    assert there.plan(tools=[TOOL])[0].params.structure is None
    structure = there.plan(tools=[TOOL], tool_choice="required")[0].params.structure
    assert structure is not None
    assert (structure.kind, structure.param) == (StructureKind.LARK, "tools")
    assert structure.begins_after is None
    strict = {"type": "function", "function": {**TOOL["function"], "strict": True}}  # type: ignore[dict-item]
    assert there.plan(tools=[strict])[0].params.structure is not None
    # Llama's calls are told from an answer by nothing, so that nothing can be held.
    assert chats("llama3").plan(tools=[strict])[0].params.structure is None


def with_parameters(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "parameters": parameters}}


@pytest.mark.parametrize("template", ["hermes", "llama3"])
def test_held_arguments_are_an_object_whatever_their_schema_says(
    chats: Callable[..., Chats], template: str
) -> None:
    there = chats(template)
    for wrong, says in (
        ({"type": "integer"}, "object"),
        ({"type": ["null", "string"]}, "object"),
        ({"type": "object", "x-guidance": {}}, "x-guidance"),
    ):
        tools = [with_parameters(wrong)]
        assert there.plan(tools=tools)[0].params.structure is None
        with pytest.raises(InvalidRequestError, match=says) as caught:
            there.plan(tools=tools, tool_choice="required")
        assert caught.value.param == "tools"
    for loose in (
        {"properties": {}},
        {"type": ["object", "null"]},
        {"anyOf": [{}, {"type": "null"}]},
    ):
        tools = [with_parameters(loose)]
        structure = there.plan(tools=tools, tool_choice="required")[0].params.structure
        assert structure is not None
        arguments = structure.source.partition("arguments_0: %json ")[2]
        assert json.loads(arguments)["type"] == "object"


def test_arguments_that_are_no_strict_json_stay_the_text_that_they_are(
    chats: Callable[..., Chats],
) -> None:
    for text in ('{"a": NaN}', '{"a": 1e400}', '{"a": "\\ud83d"}', '{"a": 1, "a": 2}', "[1]", "{"):
        messages = json.loads(json.dumps(ROUND_TRIP))
        [call] = next(one for one in messages if "tool_calls" in one)["tool_calls"]
        call["function"]["arguments"] = text
        planned, _ = chats("hermes").plan(messages=messages, tools=[TOOL])
        [written] = [one for one in planned.prompts[0] if "tool_calls" in one]  # type: ignore[operator]
        assert written["tool_calls"][0]["function"]["arguments"] == text  # type: ignore[index]


# --- thinking ---


@pytest.mark.parametrize(
    ("template", "fields", "is_open", "begins_after"),
    [
        ("hermes", {}, False, None),
        ("always-thinking", {}, True, "</think>"),
        ("hybrid", {}, False, "</think>"),
        ("hybrid", {"enable_thinking": False}, False, None),
        ("hybrid", {"reasoning_effort": "none"}, False, None),
        ("hybrid", {"chat_template_kwargs": {"enable_thinking": False}}, False, None),
        (
            "hybrid",
            {"chat_template_kwargs": {"enable_thinking": True}, "enable_thinking": False},
            False,
            "</think>",
        ),
    ],
)
def test_the_prompt_tells_whether_the_answer_begins_with_thinking(
    template: str,
    fields: dict[str, Any],
    is_open: bool,
    begins_after: str | None,
    chats: Callable[..., Chats],
) -> None:
    call, _ = chats(template).plan(tools=[TOOL], tool_choice="required", **fields)
    assert call.form is not None
    assert call.form.is_open == is_open
    assert call.params.structure is not None
    assert call.params.structure.begins_after == begins_after
    # Where the prompt does not begin the thinking, the model may.
    opens = begins_after is not None and not is_open
    assert call.params.structure.opener == ("<think>" if opens else None)
    assert call.thinks_no_more == (template == "hybrid" and begins_after is None)
    assert call.ignored == ()


def test_a_message_that_is_continued_may_be_within_the_thinking(
    chats: Callable[..., Chats],
) -> None:
    template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}{# </think> #}"
    for text, is_open in (("<think>so", True), ("<think>so</think>a", False), ("a", False)):
        call, _ = chats(template).plan(
            messages=[*HELLO, {"role": "assistant", "content": text}], continue_final_message=True
        )
        assert call.form is not None
        assert call.form.is_open == is_open


def test_what_a_template_does_not_know_of_thinking_is_a_hint(chats: Callable[..., Chats]) -> None:
    call, _ = chats("hermes").plan(reasoning_effort="low", enable_thinking=False, user="me")
    assert call.ignored == ("user", "reasoning_effort", "enable_thinking")
    effort = HERMES + "{{ reasoning_effort }}"
    call, prompt = chats(effort).plan(reasoning_effort="low")
    assert call.ignored == ()
    assert prompt.endswith("low")


def test_thinking_may_stay_in_the_text(chats: Callable[..., Chats]) -> None:
    for fields in ({"reasoning_format": "none"}, {"separate_reasoning": False}):
        call, _ = chats("hybrid").plan(**fields)
        assert call.form is not None
        assert not call.form.separates
    call, _ = chats("hybrid", reasoning_format="none").plan(
        tools=[TOOL], tool_choice="required", include_reasoning=False
    )
    assert call.form is not None
    assert call.form.reasoning is not None  # its tokens are counted
    assert not call.form.separates
    assert call.params.structure is not None
    assert call.params.structure.begins_after is None
    call, _ = chats("hybrid").plan(include_reasoning=False)
    assert call.form is not None
    assert (call.form.separates, call.form.includes) == (True, False)


def test_special_tokens_that_are_marks_are_shown_to_the_parser_alone(
    chats: Callable[..., Chats],
) -> None:
    there = chats("mistral-args", special=["[TOOL_CALLS]"])
    call, _ = there.plan(tools=[TOOL], tool_choice="required")
    assert call.form is not None
    assert call.form.hidden == call.params.preserved_tokens == ("[TOOL_CALLS]",)
    # A grammar names the token, by its id where its text does not do.
    assert call.params.structure is not None
    token_id = there.tokenizer.token_of("[TOOL_CALLS]")
    assert f"<[{token_id}]>" in call.params.structure.source
    assert there.prompts.structure_check().checked(call.params.structure)
    text = "a[TOOL_CALLS] b"
    ids = there.tokenizer.encode(text, add_special_tokens=False)
    shown = there.tokenizer.decoder(call.params.preserved_tokens)
    assert (shown(ids, True), there.tokenizer.decode(ids)) == (text, "a b")
    parser = call.form.parser()
    parts = parser.feed(text) + parser.end()
    assert "".join(part.text for part in parts if isinstance(part, Content)) == "a b"
    # Who wants to see special tokens sees this one too.
    for fields in ({"skip_special_tokens": False}, {"preserved_tokens": ["[TOOL_CALLS]"]}):
        call, _ = there.plan(tools=[TOOL], **fields)
        assert call.form is not None
        assert call.form.hidden == ()


def test_a_plain_chat_is_read_as_before(chats: Callable[..., Chats]) -> None:
    call, _ = chats("hermes").plan()
    assert call.form is None
    call, _ = chats("hermes").plan(tools=[TOOL], parse_tool_calls=False)
    assert call.form is None


@pytest.mark.parametrize("depth", [50, 200, 400, 450, 480, 495, 600])
def test_what_is_nested_deeply_is_put_to_the_model_or_refused(
    depth: int, chats: Callable[..., Chats]
) -> None:
    schema = b'{"properties": {"a": ' * depth + b"{}" + b"}}" * depth
    tool = b'{"type": "function", "function": {"name": "f", "parameters": %s}}' % schema
    arguments = json.dumps(schema.decode()).encode()
    call = b'{"id": "abcdefgh1", "function": {"name": "f", "arguments": %s}}' % arguments
    body = (
        b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [%s]}],'
        b' "tools": [%s], "tool_choice": "required"}' % (call, tool)
    )
    for template in ("hermes", "no-system", "always-thinking"):
        with suppress(InvalidRequestError):
            chats(template).plan(**parse_object(body))
