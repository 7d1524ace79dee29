"""The ground type of an output's form: what it takes, and what it refuses by name."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from minserve import SamplingParams
from minserve.errors import InvalidRequestError
from minserve.structure import MAX_CHOICES, MAX_STRUCTURE_LENGTH, Structure, StructureKind


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("yaml", "a: 1"),
        (None, ""),
        ("json", "{}"),
        ("json_schema", ""),
        ("json_schema", "{"),
        ("json_schema", "1"),
        ("json_schema", "[]"),
        ("json_schema", "[" * 10_000 + "]" * 10_000),
        ("json_schema", {"type": "object"}),
        ("json_schema", '{"const": "' + "x" * MAX_STRUCTURE_LENGTH + '"}'),
        ("regex", ""),
        ("regex", None),
        ("regex", "a" * (MAX_STRUCTURE_LENGTH + 1)),
        ("choice", "[]"),
        ("choice", "{}"),
        ("choice", '["a", ""]'),
        ("choice", '["a", 1]'),
        ("choice", json.dumps(["a"] * (MAX_CHOICES + 1))),
        ("lark", " \n"),
        ("gbnf", ""),
    ],
)
def test_what_is_no_structure_is_refused_by_the_fields_name(kind: Any, source: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        Structure(kind, source, param="my_field")
    assert caught.value.param == "my_field"
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("marker", ["", 7, "x" * 1000])
def test_a_marker_is_a_short_text(marker: Any) -> None:
    for name in ("begins_after", "opener"):
        with pytest.raises(InvalidRequestError):
            Structure.of_json(**{name: marker})


@pytest.mark.parametrize("schema", [{"const": float("nan")}, {"a": {1, 2}}])
def test_what_has_no_json_is_refused(schema: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        Structure.of_schema(schema, param="guided_json")
    assert caught.value.param == "guided_json"


def test_a_schema_keeps_its_nulls() -> None:
    schema = {"properties": {"a": {"const": None}}, "enum": [None, 1]}
    assert json.loads(Structure.of_schema(schema).source) == schema
    assert Structure.of_schema(json.dumps(schema)).source == json.dumps(schema)
    assert Structure.of_choice(["a", 'b"ü']).choices == ["a", 'b"ü']


def test_it_is_a_setting_that_travels_between_processes() -> None:
    structure = Structure.of_schema({"type": "object"}, begins_after="</think>", opener="<think>")
    params = SamplingParams(structure=structure)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params
    assert hash(params) == hash(SamplingParams(structure=structure))
    assert params.adjusts_logits
    assert structure.kind is StructureKind.JSON_SCHEMA
    with pytest.raises(InvalidRequestError):
        SamplingParams(structure={"type": "object"})  # type: ignore[arg-type]
