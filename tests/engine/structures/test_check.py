"""Structures are checked without the model's vocabulary, and none of them for ever."""

from __future__ import annotations

import threading
from itertools import count

import pytest

from minserve.engine.structures.check import StructureCheck
from minserve.engine.structures.deadline import within
from minserve.engine.text.tokenizer import Tokenizer
from minserve.errors import InvalidRequestError
from minserve.models.finding.source import find_model
from minserve.structure import Structure, StructureKind


@pytest.fixture(scope="module")
def check() -> StructureCheck:
    return StructureCheck(Tokenizer.load(find_model("smollm2")))


def test_what_can_be_held_comes_back_in_a_form_that_compiles_fast(check: StructureCheck) -> None:
    schema = Structure.of_schema({"type": "object"}, begins_after="</think>")
    assert check.checked(schema) is schema
    found = check.checked(
        Structure("gbnf", 'root ::= "a" | "<|im_end|>"', begins_after="x", param="grammar")
    )
    assert found.kind is StructureKind.LARK
    assert (found.begins_after, found.param) == ("x", "grammar")
    named = Structure("lark", "start: <|im_end|>")
    assert check.checked(named) is named


def test_a_hopeless_structure_is_given_up_by_name() -> None:
    check = StructureCheck(Tokenizer.load(find_model("smollm2")))
    assert not check.is_stuck
    with pytest.raises(InvalidRequestError, match="takes too long") as caught:
        check.checked(Structure.of_schema({"type": "integer", "multipleOf": 999_983}, param="x"))
    assert caught.value.param == "x"
    assert check.is_stuck


def test_work_is_waited_for_by_the_clock_that_is_given() -> None:
    go_on = threading.Event()
    seconds = count()
    with pytest.raises(TimeoutError):
        within(3.0, lambda: float(next(seconds)), go_on.wait)
    go_on.set()
    assert within(3.0, lambda: 0.0, lambda: "done") == "done"
    with pytest.raises(KeyError):
        within(3.0, lambda: 0.0, lambda: {}["missing"])
