"""How families of byte-level BPE cut texts; the words are those of the models' tokenizer.json."""

from __future__ import annotations

import pytest

from minserve.engine.text.backend import BYTE_OF_CHAR
from minserve.engine.text.pre_tokenizers import PRE_TOKENIZERS

TEXT = "I'M  fooBAR 12345 x=é\n\n  中文かな!\n"


def words(name: str, text: str = TEXT) -> list[str]:
    found = PRE_TOKENIZERS[name].pre_tokenizer().pre_tokenize_str(text)
    return [bytes(BYTE_OF_CHAR[c] for c in word).decode() for word, _ in found]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            "gpt-2 olmo",
            "I|'|M| | fooBAR| 12345| x|=|é|\n\n | 中文かな|!|\n",
        ),
        (
            "smollm starcoder command-r",
            "I|'|M| | fooBAR| |1|2|3|4|5| x|=|é|\n\n | 中文かな|!|\n",
        ),
        (
            "llama-bpe llama-v3 falcon3 lfm2 dbrx",
            "I|'M| | fooBAR| |123|45| x|=é|\n\n| | 中文かな|!\n",
        ),
        (
            "qwen2 deepseek-r1-qwen stablelm2 hunyuan",
            "I|'M| | fooBAR| |1|2|3|4|5| x|=é|\n\n| | 中文かな|!\n",
        ),
        (
            "gpt-4o llama4",
            "I'M| | foo|BAR| |123|45| x|=é|\n\n| | 中文かな|!\n",
        ),
        (
            "tekken",
            "I|'M| | foo|BAR| |1|2|3|4|5| x|=é|\n\n| | 中文かな|!\n",
        ),
        (
            "deepseek-v3",
            "I|'M| | fooBAR| |123|45| x|=|é|\n\n|  |中文かな|!\n",
        ),
        (
            "deepseek-coder",
            "I|'|M| | fooBAR| |1|2|3|4|5| x|=|é|\n|\n| | |中文かな|!|\n",
        ),
        (
            "deepseek-llm",
            "I|'|M| | fooBAR| |12345| x|=|é|\n|\n|  |中文かな|!|\n",
        ),
        (
            "falcon",
            "I|'|M| | fooBAR| |123|45| x|=|é|\n\n | 中文かな|!|\n",
        ),
    ],
)
def test_words_of_a_family(names, expected):
    for name in names.split():
        assert "|".join(words(name)) == expected, name


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_no_family_loses_text(name):
    assert (
        "".join(words(name, TEXT * 2 + "\0\t <a> ٣½ e\u0301")) == TEXT * 2 + "\0\t <a> ٣½ e\u0301"
    )


def test_texts_are_composed_where_the_models_own_tokenizer_does_so():
    composed = {name for name, rule in PRE_TOKENIZERS.items() if rule.normalizer() is not None}
    assert {"qwen2", "olmo", "command-r"} <= composed
    assert not {"llama-bpe", "gpt-2", "smollm", "tekken", "deepseek-v3"} & composed
    normalizer = PRE_TOKENIZERS["qwen2"].normalizer()
    assert normalizer is not None
    assert normalizer.normalize_str("e\u0301") == "é"
