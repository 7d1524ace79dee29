"""The fields of a body that give the output a structure, each as some server or other has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from minserve.server.body import Form, brief, convert, refusal
from minserve.structure import Structure, StructureKind


class JsonSchemaFormat(Form):
    """What OpenAI's ``json_schema`` has beside the schema: labels, which change no result."""

    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Form):
    """``response_format`` without its schemas, in which ``null`` is a value like others."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Form):
    """vLLM's ``structured_outputs`` without its schema."""

    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_fallback: bool = False
    disable_any_whitespace: Literal[False] = False
    disable_additional_properties: Literal[False] = False


# JSON schemas of the fields, for the description of the endpoints.
_SCHEMA = {"type": ["object", "boolean"]}
_GRAMMAR = {"type": "string"}
RESPONSE_FORMAT_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["type"],
    "properties": {
        "type": {"enum": ["text", "json_object", "json_schema"]},
        "schema": _SCHEMA,
        "json_schema": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "description": {"type": "string"},
                "strict": {"type": "boolean"},
                "schema": _SCHEMA,
            },
            "additionalProperties": False,
        },
    },
    "additionalProperties": False,
}
STRUCTURED_OUTPUTS_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "json": {"type": ["object", "boolean", "string"]},
        "regex": {"type": "string"},
        "choice": {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
        "grammar": _GRAMMAR,
        "json_object": {"type": "boolean"},
        "disable_fallback": {"type": "boolean"},
        "disable_any_whitespace": {"const": False},
        "disable_additional_properties": {"const": False},
    },
    "additionalProperties": False,
}


def read_structure(given: Mapping[str, Any]) -> Structure | None:
    """Return the structure that a body asks for.

    Args:
        given: the values of the body's fields that work.

    Raises:
        InvalidRequestError: for a field that is wrong, or a second one.
    """
    found: Structure | None = None
    for name, read in _FIELDS.items():
        if name not in given or (one := read(given[name], name)) is None:
            continue
        if found is not None:
            raise refusal(name, f"is a second structure of the output beside {found.param}")
        found = one
    return found


def _response_format(value: Any, param: str) -> Structure | None:
    rest, schema = _without(value, "schema", param)
    if isinstance(rest.get("json_schema"), dict):
        rest["json_schema"], inner = _without(rest["json_schema"], "schema", param)
    else:
        inner = None
    form = convert(rest, ResponseFormat, param)
    if form.type == "json_object" and form.json_schema is None and schema is None:
        return Structure.of_json(param=param)
    if form.type == "json_object" and form.json_schema is None:
        return _schema(schema, param)
    if form.type == "json_schema":
        schema = inner if schema is None else schema
        if schema is None:
            raise refusal(f"{param}.json_schema.schema", "is required")
        return _schema(schema, param)
    if form.json_schema is not None or schema is not None:
        raise refusal(f"{param}.type", 'must be "json_schema" where a schema is given')
    return None


def _structured_outputs(value: Any, param: str) -> Structure | None:
    rest, schema = _without(value, "json", param)
    form = convert(rest, StructuredOutputs, param)
    asked: list[Structure] = []
    if schema is not None:
        asked.append(_schema(schema, param))
    if form.regex is not None:
        asked.append(Structure(StructureKind.REGEX, form.regex, param=param))
    if form.choice is not None:
        asked.append(Structure.of_choice(form.choice, param=param))
    if form.grammar is not None:
        asked.append(Structure(StructureKind.GBNF, form.grammar, param=param))
    if form.json_object:
        asked.append(Structure.of_json(param=param))
    if len(asked) > 1:
        raise refusal(param, "has several structures; give one of them")
    return asked[0] if asked else None


def _schema(value: Any, param: str) -> Structure:
    """Return the structure of a schema, as an object or as JSON."""
    if not isinstance(value, (dict, bool, str)):
        raise refusal(param, f"a JSON schema must be an object or its JSON, not {brief(value)}")
    return Structure.of_schema(value, param=param)


def _text(kind: StructureKind) -> Callable[[Any, str], Structure]:
    return lambda value, param: Structure(kind, value, param=param)


def _choice(value: Any, param: str) -> Structure:
    return Structure.of_choice(value, param=param)


def _without(value: Any, name: str, param: str) -> tuple[dict[str, Any], Any]:
    """Return an object without one of its fields, and the field."""
    if not isinstance(value, dict):
        raise refusal(param, f"must be an object, not {brief(value)}")
    rest = dict(value)
    return rest, rest.pop(name, None)


_FIELDS: dict[str, Callable[[Any, str], Structure | None]] = {
    "response_format": _response_format,
    "structured_outputs": _structured_outputs,
    "guided_json": _schema,
    "guided_regex": _text(StructureKind.REGEX),
    "guided_choice": _choice,
    "guided_grammar": _text(StructureKind.GBNF),
    "json_schema": _schema,
    "regex": _text(StructureKind.REGEX),
    "ebnf": _text(StructureKind.GBNF),
    "grammar": _text(StructureKind.GBNF),
}
