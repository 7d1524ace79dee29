"""Structured output over a real socket: each form in which clients ask for it, and bad ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from live_server import RunningServer, post
from pydantic import BaseModel

from minserve.server.protocol import parse_chat, parse_completion
from minserve.server_config import ServerConfig
from minserve.structure import Structure, StructureKind

HELLO = [{"role": "user", "content": "hello"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 2]}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}
GBNF = 'root ::= "(" [0-9] ")"'


class Answer(BaseModel):
    """What a client of OpenAI's Python library parses answers into."""

    colour: Literal["red", "green"]
    likes: bool


def is_answer(text: str) -> bool:
    value = json.loads(text)
    return value.keys() == {"ok", "n"} and isinstance(value["ok"], bool) and value["n"] in (1, 2)


def is_number(text: str) -> bool:
    return re.fullmatch(r"\([0-9]\)", text) is not None


def is_word(text: str) -> bool:
    return re.fullmatch("[a-c]{3}", text) is not None


FORMS: list[tuple[dict[str, Any], Callable[[str], bool]]] = [
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}, is_answer),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": False, "description": "d", "schema": SCHEMA}}}, is_answer),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, is_answer),
    ({"structured_outputs": {"json": SCHEMA}}, is_answer),
    ({"structured_outputs": {"json": json.dumps(SCHEMA), "disable_fallback": True}}, is_answer),
    ({"structured_outputs": {"regex": "[a-c]{3}"}}, is_word),
    ({"structured_outputs": {"choice": ["abc", "cab"]}}, is_word),
    ({"structured_outputs": {"grammar": GBNF}}, is_number),
    ({"structured_outputs": {"grammar": "start: /[(][0-9][)]/"}}, is_number),
    ({"guided_json": SCHEMA}, is_answer),
    ({"guided_json": json.dumps(SCHEMA), "guided_decoding_backend": "outlines"}, is_answer),
    ({"guided_regex": "^[a-c]{3}$"}, is_word),
    ({"guided_choice": ["abc"]}, is_word),
    ({"guided_grammar": GBNF}, is_number),
    ({"json_schema": json.dumps(SCHEMA)}, is_answer),
    ({"json_schema": SCHEMA}, is_answer),
    ({"regex": "[a-c]{3}"}, is_word),
    ({"ebnf": GBNF}, is_number),
    ({"grammar": GBNF}, is_number),
]  # fmt: skip


@pytest.mark.parametrize(("form", "is_right"), FORMS)
def test_each_form_of_asking_is_held(
    client: openai.OpenAI, form: dict[str, Any], is_right: Callable[[str], bool]
) -> None:
    chat = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=300, seed=1, extra_body=form
    )
    assert chat.choices[0].finish_reason == "stop"
    assert is_right(chat.choices[0].message.content or "")
    text = client.completions.create(
        model="tiny", prompt="hello", max_tokens=300, n=2, seed=1, extra_body=form
    )
    assert [(one.finish_reason, is_right(one.text)) for one in text.choices] == [("stop", True)] * 2


def test_streams_bring_the_same_text(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": HELLO,
        "max_tokens": 300,
        "seed": 2,
        "response_format": FORMS[0][0]["response_format"],
    }
    whole = client.chat.completions.create(**asked).choices[0].message.content
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(one.choices[0].delta.content or "" for one in chunks) == whole
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_answers_are_parsed_into_a_clients_own_types(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="tiny", messages=HELLO, max_tokens=300, response_format=Answer
    )
    assert isinstance(answer.choices[0].message.parsed, Answer)


def test_json_objects_are_whole_or_cut_by_their_length(client: openai.OpenAI) -> None:
    for seed in range(3):
        answer = client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            max_tokens=100,
            seed=seed,
            response_format={"type": "json_object"},
        )
        text = answer.choices[0].message.content or ""
        assert text.startswith("{")
        if answer.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("param", "value", "says"),
    [
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x"}}, "schema: is required"),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": [1]}}, "JSON schema must be"),
        ("response_format", {"type": "yaml"}, "is not supported"),
        ("response_format", {"type": "text", "schema": SCHEMA}, "where a schema is given"),
        ("response_format", {"type": "json_object", "strict": True}, "is not supported"),
        ("response_format", {"type": "structural_tag", "structures": []}, "is not supported"),
        ("response_format", "json", "must be an object"),
        ("structured_outputs", {"regex": "a", "choice": ["b"]}, "several structures"),
        ("structured_outputs", {"structural_tag": "x"}, "is not supported"),
        ("structured_outputs", {"regex": "a", "disable_any_whitespace": True}, "is not supported"),
        ("structured_outputs", {"whitespace_pattern": "x", "regex": "a"}, "is not supported"),
        ("structured_outputs", {"choice": []}, "one string or more"),
        ("guided_json", 7, "JSON schema must be"),
        ("guided_json", "{", "is not JSON"),
        ("guided_json", {"type": "no-such-type"}, "no-such-type"),
        ("guided_json", {"type": "string", "not": {"const": "x"}}, "not"),
        ("guided_json", {"$ref": "#"}, "no output at all"),
        ("guided_json", {"allOf": [{"type": "string"}, {"type": "null"}]}, "nsatisfiable"),
        ("guided_json", {"enum": ["x" * 270_000]}, "characters"),
        ("guided_json", {"properties": {f"p{i}": {"type": "string"} for i in range(1500)}}, "too complex"),
        ("guided_json", {"type": "integer", "multipleOf": 999_983}, "too long"),
        ("guided_json", {"type": "string", "allOf": [{"pattern": f"^.*x{{{i}}}.*$"} for i in range(1, 30)]}, "too long"),
        ("guided_json", {"patternProperties": {f"^[a-z]{{1,{i + 2}}}{i}$": {} for i in range(200)}}, "too long"),
        ("guided_regex", "(a", "unclosed group"),
        ("guided_regex", "(?=a)b", "look-around"),
        ("guided_regex", "|".join(f"(a{{{i}}}b*)+" for i in range(1, 1500)), "too complex"),
        ("guided_choice", ["x"] * 100_000, "characters"),
        ("guided_choice", [""], "non-empty"),
        ("guided_choice", [1], "a string"),
        ("guided_grammar", "root ::= other", "other"),
        ("guided_grammar", "root ::= " + "(" * 5000, "deeply"),
        ("guided_grammar", "root ::= " + '"a" ' * 5000, "characters"),
        ("grammar", "start: <|nothing|>", "unknown special token"),
        ("grammar_lazy", True, "is not supported"),
        ("ebnf", "root", "grammar"),
        ("regex", " ", "is empty"),
    ],
)  # fmt: skip
def test_what_cannot_be_held_is_refused_by_name(
    server: RunningServer, param: str, value: Any, says: str
) -> None:
    body = {"prompt": "hello", "max_tokens": 4, param: value}
    status, _, answer = post(server, "/v1/completions", body)
    error = json.loads(answer)["error"]
    assert status == 400, error
    assert error["param"].split(".")[0].split("[")[0] == param
    assert says in error["message"]
    assert len(error["message"]) < 600


def test_one_structure_is_taken_at_a_time(server: RunningServer) -> None:
    body = {"prompt": "x", "regex": "a", "ebnf": GBNF}
    status, _, answer = post(server, "/v1/completions", body)
    assert status == 400
    assert json.loads(answer)["error"]["param"] == "ebnf"


def test_after_all_that_the_server_serves(client: openai.OpenAI) -> None:
    """Also from the process that reads, which hopeless structures end."""
    for _ in range(2):
        answer = client.completions.create(
            model="tiny", prompt="x", max_tokens=9, extra_body={"regex": "[a-c]{3}"}
        )
        assert is_word(answer.choices[0].text)


def test_what_asks_for_nothing_gives_free_text() -> None:
    for body in ({"response_format": {"type": "text"}}, {"structured_outputs": {"json_object": False}}):  # fmt: skip
        assert parse_completion({"prompt": "x", **body}, {}).params.structure is None
        assert parse_chat({"messages": HELLO, **body}, {}).params.structure is None


def test_a_schema_comes_as_it_was_sent() -> None:
    """Where ``null`` is a value, and numbers stay as they are."""
    schema = {"enum": [None, 1.0], "properties": {"a": {"const": None}}}
    body = {"prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}  # fmt: skip
    structure = parse_completion(body, {}).params.structure
    assert structure == Structure(
        StructureKind.JSON_SCHEMA, json.dumps(schema), param="response_format"
    )


THINKING = (
    "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    "{% if think == 'open' %}<think>{% elif think == 'shut' %}<think></think>{% endif %}"
)


@pytest.fixture(scope="module")
def thinking_dir(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with marks around its thinking."""
    folder = tmp_path_factory.mktemp("thinking")
    for file in tiny_llama_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    used = max(tokenizer["model"]["vocab"].values())
    tokenizer["added_tokens"] += [
        {"id": used + 1 + i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
        for i, text in enumerate(("<think>", "</think>"))
    ]  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "chat_template.jinja").write_text(THINKING)
    return folder


def test_a_model_may_think_before_the_structure(
    start_server: Callable[..., RunningServer], thinking_dir: Path
) -> None:
    server = start_server(thinking_dir, ServerConfig(served_model_name="tiny"))
    ids = server.engine.tokenizer
    opens, ends = ids.mark_id("<think>"), ids.mark_id("</think>")

    def answer(think: str, **more: Any) -> str:
        body = {
            "messages": HELLO,
            "max_tokens": 60,
            "seed": 3,
            "regex": "[a-c]{3}",
            "separate_reasoning": False,
            "chat_template_kwargs": {"think": think},
            **more,
        }
        status, _, data = post(server, "/v1/chat/completions", body)
        assert status == 200, data
        return json.loads(data)["choices"][0]["message"]["content"]

    like = {"logit_bias": {str(ends): 12.0}}
    assert re.fullmatch(r"(?s).*</think>[a-c]{3}", answer("open", **like))
    assert is_word(answer("shut", **like))
    assert is_word(answer("no", logit_bias={str(opens): -100.0}))
    thoughtful = answer("no", logit_bias={str(opens): 100.0, str(ends): 100.0})
    assert re.fullmatch(r"(?s)<think>.*</think>[a-c]{3}", thoughtful)
