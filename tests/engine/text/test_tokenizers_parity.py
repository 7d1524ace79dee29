"""Every form of vocabulary gives the tokens of the library that the form belongs to."""

from __future__ import annotations

from pathlib import Path

from minserve.engine.text.tokenizer import Tokenizer
from minserve.models.finding.source import find_model
from parts.tokenizers_parity.cases import make_cases
from parts.tokenizers_parity.comparing import mismatches
from parts.tokenizers_parity.vocabularies import texts

NUM_TEXTS = 200


def test_every_form_of_vocabulary_agrees_with_its_own_library(tmp_path: Path) -> None:
    cases = make_cases(tmp_path)
    assert len(cases) > 20
    found = []
    for case in cases:
        tokenizer = Tokenizer.load(find_model(str(case.path)))
        for text in texts(NUM_TEXTS, seed=1):
            found += mismatches(case, tokenizer, text)
    assert not found


def test_the_comparison_sees_a_wrong_token(tmp_path: Path) -> None:
    first, second, *_ = make_cases(tmp_path)
    assert first.reference("a<pad>") != second.reference("a<pad>")
    tokenizer = Tokenizer.load(find_model(str(second.path)))
    assert not mismatches(second, tokenizer, "a<pad>")
    assert mismatches(first, tokenizer, "a<pad>")
