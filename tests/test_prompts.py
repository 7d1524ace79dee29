"""Tokenized prompts travel between processes whole."""

from __future__ import annotations

import pickle

from minserve.prompts import TokenizedPrompt


def test_a_tokenized_prompt_survives_a_pickle() -> None:
    prompt = TokenizedPrompt("text", (0, 5, 2**31 - 1))
    again = pickle.loads(pickle.dumps(prompt))
    assert again == prompt
    assert type(again) is TokenizedPrompt
