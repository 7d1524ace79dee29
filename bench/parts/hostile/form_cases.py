"""Structures, tools and responses that cannot be had: grammars that explode, calls of nothing."""

from __future__ import annotations

from typing import Any

from parts.hostile.case import (
    CHAT,
    COMPLETIONS,
    MESSAGES,
    PROMPT,
    RESPONSES,
    HostileCase,
    refused,
    served,
)

DEPTH = 400


def _nested(depth: int) -> dict[str, Any]:
    """Return a schema of objects in objects."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def _object(**properties: Any) -> dict[str, Any]:
    names = list(properties)
    return {"type": "object", "properties": properties, "required": names}


SCHEMAS: dict[str, Any] = {
    "a reference to itself": {"$ref": "#"},
    "references in a circle": {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
    },
    "a reference to a server": {"$ref": "http://127.0.0.1:1/schema"},
    "a reference to a file": {"$ref": "file:///etc/passwd"},
    "a reference to nothing": {"$ref": "#/$defs/none"},
    "a minimum above the maximum": _object(a={"type": "integer", "minimum": 5, "maximum": 1}),
    "more items than there may be": {"type": "array", "minItems": 5, "maxItems": 1},
    "no value at all": {"enum": []},
    "false": False,
    "a list": [],
    "a type that is none": {"type": "banana"},
    "not": {"not": {"type": "string"}},
    "forms that exclude nothing": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    "an unknown format": {"type": "string", "format": "no-such"},
    "look-around": {"type": "string", "pattern": "^(?=a)b$"},
    "a remainder that explodes": {"type": "integer", "multipleOf": 999_983},
    "alternatives that multiply": {
        "allOf": [
            {"anyOf": [{"properties": {f"k{i}": {"const": j}}} for j in range(4)]}
            for i in range(15)
        ]
    },
    "a hundred thousand values": {"enum": [str(i) for i in range(100_000)]},
    "options of the compiler": {"type": "object", "x-guidance": {"lenient": True}},
}
REGEXES = {
    "that explodes": "((a{1,1000}){1,1000}){1,1000}",
    "with a reference": r"(a)\1",
    "that is nested deeply": "(" * 5000 + "a" + ")" * 5000,
    "of a megabyte": "a" * 10**6,
    "that allows nothing": r"[^\s\S]",
}
_WAYS = "\n".join(f'x{i}: e e | "a"' for i in range(40))
GRAMMARS = {
    "left-recursive without an end": 'start: start "a"',
    "in a circle": "start: a\na: b\nb: a",
    "ambiguous everywhere": f"start: e\ne: {' | '.join(f'x{i} e x{i}' for i in range(40))}\n{_WAYS}",
    "of repetitions": 'start: x{1000}\nx: y{1000}\ny: "a"{1000}',
    "nested deeply": "root ::= " + "(" * 3000 + '"a"' + ")" * 3000,
    "of a file": '%include "/etc/passwd"\nstart: "a"',
    "of blank lines": "\n" * 16_000 + "root",
    "too long": "start: " + " | ".join(f'"w{i}"' for i in range(15_000)),
}


def _structures() -> list[HostileCase]:
    def schema(value: Any) -> dict[str, Any]:
        form = {"name": "x", "schema": value}
        return {
            "messages": MESSAGES,
            "response_format": {"type": "json_schema", "json_schema": form},
        }

    def other(name: str, value: Any, **more: Any) -> dict[str, Any]:
        return {"prompt": PROMPT, "max_tokens": 8, "structured_outputs": {name: value}, **more}

    def case(name: str, body: Any, param: str = "structured_outputs") -> HostileCase:
        return refused("structures", name, COMPLETIONS, body, param=param)

    return [
        *(
            refused("structures", f"a schema: {name}", CHAT, schema(value), param="response_format")
            for name, value in SCHEMAS.items()
        ),
        # It may be too deep for the reader of JSON already, which names no field.
        refused("structures", "a schema: nested deeply", CHAT, schema(_nested(DEPTH))),
        *(case(f"a regex {name}", other("regex", value)) for name, value in REGEXES.items()),
        *(case(f"a grammar {name}", other("grammar", value)) for name, value in GRAMMARS.items()),
        case("a hundred thousand choices", other("choice", [f"c{i}" for i in range(100_000)])),
        case("two of them", other("regex", "a", guided_regex="b"), "guided_regex"),
        case(
            "a token that it does not have",
            other("regex", "[0-9]", allowed_token_ids=[0]),
            "allowed_token_ids",
        ),
        case(
            "words that it needs are bad",
            other("choice", ["a"], bad_words=["a"]),
            "bad_words",
        ),
    ]


def _tools() -> list[HostileCase]:
    def chat(parameters: Any, **more: Any) -> dict[str, Any]:
        function = {"name": "f", "parameters": parameters}
        tools = [{"type": "function", "function": function}]
        return {"messages": MESSAGES, "tools": tools, "tool_choice": "required", **more}

    def half(where: str) -> dict[str, Any]:
        """Return a chat whose answer is a call that holds half of a surrogate pair."""
        inner = {"name": '"\\ud83d", "arguments": {}', "arguments": '"f", "arguments": "\\ud83d"'}
        text = f'<tool_call>\n{{"name": {inner[where]}}}\n</tool_call>'
        return chat({}, tool_choice="auto", max_tokens=40, structured_outputs={"choice": [text]})

    def case(name: str, body: Any, param: str) -> HostileCase:
        return refused("tools", name, CHAT, body, param=param)

    unknown = {"type": "function", "function": {"name": "g"}}
    return [
        case("arguments that are no object", chat({"type": "integer"}), "tools"),
        case("arguments that cannot be held", chat({"not": {}}), "tools"),
        case("arguments without an end", chat(_object(a={"$ref": "#"})), "tools"),
        case("arguments with options", chat({"type": "object", "x-guidance": {}}), "tools"),
        case("a choice of none of them", chat({}, tool_choice=unknown), "tool_choice"),
        served("tools", "half of a surrogate pair as arguments", CHAT, half("arguments")),
        served("tools", "half of a surrogate pair as a name", CHAT, half("name")),
    ]


def _responses() -> list[HostileCase]:
    def case(name: str, param: str, **fields: Any) -> HostileCase:
        body = {"input": "hello", **fields}
        return refused("responses", name, RESPONSES, body, param=param)

    result = {"type": "function_call_output", "call_id": "c", "output": "x"}
    too_long = "word " * 100_000
    return [
        case("an earlier response", "previous_response_id", previous_response_id="resp_1"),
        case("a result without its call", "input", input=[result]),
        case("a result of a call without an id", "input", input=[{**result, "call_id": ""}]),
        case("an item of no type", "input", input=[{"type": "no_such"}]),
        case("an input longer than the model", "input", input=too_long),
        case("an output longer than the model", "max_output_tokens", max_output_tokens=10**8),
        case("fields of chats", "messages", messages=MESSAGES),
        case("several outputs", "n", n=2),
        case("a tool of the server's", "tools", tools=[{"type": "web_search"}]),
        case("a form that cannot be held", "text", text={
            "format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}),
        case("metadata of a megabyte", "metadata", metadata={"a": "x" * 10**6}),
    ]  # fmt: skip


def cases() -> list[HostileCase]:
    """Return all cases of forms of answers."""
    return [*_structures(), *_tools(), *_responses()]
