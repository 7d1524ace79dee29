"""A sentencepiece vocabulary that was saved gives Hugging Face's libraries the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minserve.engine.text.tokenizer import Tokenizer
from minserve.models.finding.source import find_model
from parts.tokenizers_parity import vocabularies as made

NUM_TEXTS = 300
CHAT = [{"role": "user", "content": "x"}]
ADDED = {
    "content": "[A]",
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "single_word": False,
}


@pytest.mark.parametrize(
    ("style", "settings"),
    [
        ("llama", {"legacy": True}),
        ("llama", {"legacy": False, "add_eos_token": True}),
        ("llama", {"added_tokens_decoder": {str(made.SPM_SIZE + 3): {**ADDED, "special": True}}}),
        ("gemma", {"tokenizer_class": "GemmaTokenizer"}),
    ],
)
def test_transformers_reads_a_saved_vocabulary_alike(
    tmp_path: Path, style: str, settings: dict[str, Any]
) -> None:
    from transformers import AutoTokenizer

    settings = {"tokenizer_class": "LlamaTokenizer", "chat_template": "{{ bos_token }}"} | settings
    folder = made.sentencepiece_folder(tmp_path / "m", style, settings)
    ours = Tokenizer.load(find_model(str(folder)))
    (tmp_path / "saved").mkdir()
    ours.save(tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in [*made.texts(NUM_TEXTS, seed=2), "a[A]b"]:
        if style == "gemma" and "▁" in text:
            continue  # tokenizer.json finds Gemma's runs of spaces in no other way
        ids = ours.encode(text)
        assert theirs.encode(text) == ids
        assert theirs.decode(ids) == ours.decode(ids, skip_special_tokens=False)
    assert theirs.eos_token_id in ours.eos_token_ids
    assert theirs.apply_chat_template(CHAT, tokenize=False) == ours.render_chat(CHAT)
