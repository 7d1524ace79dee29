"""Vocabularies of GGUF files: llama.cpp's rules, its defaults, and errors that name the file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import pytest

from minserve.engine.text.backend import BYTE_OF_CHAR
from minserve.engine.text.tokenizer import Tokenizer
from minserve.errors import ModelLoadError, UnsupportedModelError
from minserve.models.finding.source import find_model

NUM_SPECIAL = 3
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["▁", "h", "e", "l", "o", "w", "he", "ll", "hell", "hello", "▁hello", "▁w", "lo"]


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return Tokenizer.load(find_model("smollm2"))


def write_gguf_tokenizer(path: Path, tokens: list[str], **values: Any) -> Path:
    """A GGUF file with nothing but a tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(values.pop("model"))
    writer.add_token_list(tokens)
    for name, value in values.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load_gguf(path: Path) -> Tokenizer:
    return Tokenizer.load(find_model(str(path)))


def sentencepiece_file(
    path: Path, more: dict[str, int] | None = None, pieces: list[str] = PIECES, **values: Any
) -> Path:
    """A Llama 2 kind of vocabulary: three control tokens, all bytes, pieces, and more by type."""
    more = more or {}
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))] + [0.0] * len(more)
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *pieces, *more]
    defaults = {
        "model": "llama",
        "token_scores": scores,
        "token_types": [2, 3, 3] + [6] * 256 + [1] * len(pieces) + list(more.values()),
    }
    return write_gguf_tokenizer(path, tokens, **defaults | values)


def pieces_of(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.token_text(i) for i in tokenizer.encode(text)]


def test_a_sentencepiece_gguf(tmp_path):
    tokenizer = load_gguf(sentencepiece_file(tmp_path / "spm.gguf"))
    ids = tokenizer.encode("hello w")
    assert [tokenizer.token_text(i) for i in ids] == ["<s>", " hello", " w"]
    assert tokenizer.decode(ids) == "hello w"
    ids = tokenizer.encode("hé 日", add_special_tokens=False)
    assert tokenizer.decode(ids) == "hé 日"
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == " hé 日".encode()
    assert tokenizer.encode("</s>", add_special_tokens=False) == [2]
    assert tokenizer.eos_token_ids == {2}


def test_a_sentencepiece_gguf_that_asks_for_no_bos_and_no_space(tmp_path):
    file = sentencepiece_file(tmp_path / "s.gguf", add_bos_token=False, add_space_prefix=False)
    tokenizer = load_gguf(file)
    assert pieces_of(tokenizer, "hello") == ["hello"]


def test_a_llama3_gguf_groups_digits_by_three_and_adds_its_bos(tmp_path, smollm2):
    backend = json.loads(smollm2._backend.rust.to_str())["model"]
    tokens = sorted(backend["vocab"], key=backend["vocab"].get)
    file = write_gguf_tokenizer(
        tmp_path / "l3.gguf",
        [*tokens, "1234", "123"],
        model="gpt2",
        tokenizer_pre="llama-bpe",
        token_merges=[" ".join(pair) for pair in backend["merges"]],
        token_types=[3] * 17 + [1] * (len(tokens) - 15),
        bos_token_id=1,
        eos_token_id=2,
        eot_token_id=0,
    )
    tokenizer = load_gguf(file)
    pieces = [tokenizer.token_text(i) for i in tokenizer.encode("on 1234")]
    assert pieces == ["<|im_start|>", "on", " ", "123", "4"]
    assert tokenizer.eos_token_ids == {0, 2, 4}


def test_equal_scores_merge_the_leftmost_pair(tmp_path):
    """Both splits of "aaa" lead to pieces of one score; ids must not decide."""
    pieces = ["▁", "a", "b", "ab", "ba"]
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *pieces]
    for first, second in (("ab", "ba"), ("ba", "ab")):
        tokens[-2:] = [first, second]
        file = write_gguf_tokenizer(
            tmp_path / f"{first}.gguf",
            tokens,
            model="llama",
            token_scores=[0.0] * 259 + [-9.0] * 3 + [-1.0] * 2,
            token_types=[2, 3, 3] + [6] * 256 + [1] * 5,
        )
        assert pieces_of(load_gguf(file), "aba")[1:] == [" ", "ab", "a"]


def test_a_space_stands_before_text_and_after_each_special_token(tmp_path):
    file = sentencepiece_file(tmp_path / "s.gguf", {"<x>": 3, "<user>": 4})
    tokenizer = load_gguf(file)
    assert pieces_of(tokenizer, "hello<x>hello</s>w") == [
        *("<s>", " hello", "<x>", " hello", "</s>", " w"),
    ]
    assert pieces_of(tokenizer, "<user>w<user> w") == [
        *("<s>", "<user>", " w", "<user>", " ", " w"),
    ]
    assert tokenizer.decode(tokenizer.encode("<x>w<user>w")) == "w<user> w"


def test_special_tokens_have_default_ids_where_the_file_names_none(tmp_path):
    tokenizer = load_gguf(sentencepiece_file(tmp_path / "s.gguf"))
    assert tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_ids == {2}


def test_a_runs_of_spaces_as_a_user_defined_token_is_found(tmp_path):
    """Gemma's: the file spells them with sentencepiece's sign, texts with spaces."""
    file = sentencepiece_file(tmp_path / "s.gguf", {"▁▁▁": 4}, add_space_prefix=False)
    assert pieces_of(load_gguf(file), "hello    w") == ["<s>", "hello", "   ", " w"]


def test_the_tokens_of_phi3_swallow_the_spaces_behind_them(tmp_path):
    more = {"<|user|>": 4, "<|endoftext|>": 3}
    plain = load_gguf(sentencepiece_file(tmp_path / "s.gguf", more))
    phi3 = load_gguf(sentencepiece_file(tmp_path / "p.gguf", more, name="Phi-3 Mini"))
    assert pieces_of(plain, "<|user|> w") == ["<s>", "<|user|>", " ", " w"]
    assert pieces_of(phi3, "<|user|> w") == ["<s>", "<|user|>", " w"]
    assert pieces_of(phi3, "<|endoftext|> w") == ["<s>", "<|endoftext|>", " ", " w"]


def test_an_added_token_that_looks_like_the_sign_of_a_byte_keeps_its_text(tmp_path):
    """DeepSeek Coder's has "ü", which in GPT-2's alphabet stands for the byte 0xFC."""
    file = write_gguf_tokenizer(
        tmp_path / "t.gguf",
        [*BYTE_OF_CHAR, "ü!", "<s>"],
        model="gpt2",
        tokenizer_pre="deepseek-coder",
        token_merges=["ü !"],
        token_types=[4 if c == "ü" else 1 for c in BYTE_OF_CHAR] + [1, 3],
    )
    tokenizer = load_gguf(file)
    ids = tokenizer.encode("aü日<s>")
    assert tokenizer.decode(ids, skip_special_tokens=False) == "aü日<s>"
    assert tokenizer.decode(ids) == "aü日"
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == "aü日<s>".encode()


def test_several_chat_templates_have_names(tmp_path):
    templates = [
        {"name": "default", "template": "{{ 1 }}"},
        {"name": "tool_use", "template": "{{ 2 }}"},
    ]
    file = sentencepiece_file(tmp_path / "s.gguf", chat_template=templates)
    tokenizer = load_gguf(file)
    assert set(tokenizer.chat_template_names) == {"default", "tool_use"}
    assert tokenizer.render_chat([]) == "1"
    assert tokenizer.render_chat([], tools=[{}]) == "2"


def test_the_kind_names_the_form(smollm2, tmp_path):
    assert smollm2.kind == "GGUF gpt2/smollm"
    assert "SentencePiece" in load_gguf(sentencepiece_file(tmp_path / "s.gguf")).kind


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ({"model": "t5"}, UnsupportedModelError, "'t5'"),
        (
            {"model": "gpt2", "tokenizer_pre": "novel", "token_merges": ["a b"]},
            UnsupportedModelError,
            "'novel'",
        ),
        ({"model": "gpt2", "tokenizer_pre": "gpt-2"}, ModelLoadError, "merges"),
        (
            {"model": "gpt2", "tokenizer_pre": "gpt-2", "token_merges": ["a q"]},
            ModelLoadError,
            "broken",
        ),
        ({"model": "llama"}, ModelLoadError, "scores"),
        ({"model": "bert"}, UnsupportedModelError, "WordPiece.*--tokenizer"),
        ({"model": "gpt2", "token_merges": ["a b"]}, UnsupportedModelError, "no pre-tokenizer"),
        (
            {"model": "gpt2", "tokenizer_pre": "gpt-2", "token_merges": ["ab"]},
            ModelLoadError,
            "broken",
        ),
        (
            {"model": "gpt2", "tokenizer_pre": "llama-bpe", "token_merges": ["a b"]},
            ModelLoadError,
            "bos_token",
        ),
        (
            {"model": "llama", "token_scores": [0.0, 0.0], "token_types": [2, 1, 1]},
            ModelLoadError,
            "2 scores for 3 tokens",
        ),
        (
            {"model": "llama", "token_scores": [0.0] * 3, "token_types": [2, 6, 1]},
            ModelLoadError,
            "there must be 256",
        ),
    ],
)
def test_gguf_tokenizers_that_cannot_be_built(tmp_path, values, kind, message):
    file = write_gguf_tokenizer(tmp_path / "t.gguf", ["a", "b", "ab"], **values)
    with pytest.raises(kind, match=rf"t\.gguf.*{message}"):
        load_gguf(file)


def test_a_token_that_stands_there_twice_is_named(tmp_path):
    file = write_gguf_tokenizer(
        tmp_path / "t.gguf", ["a", "b", "a"], model="gpt2", tokenizer_pre="gpt-2"
    )
    with pytest.raises(ModelLoadError, match=r"t\.gguf.*'a' has the ids 0 and 2"):
        load_gguf(file)


@pytest.mark.parametrize(
    ("kind", "value"),
    [("string", "</s>"), ("array", [1]), ("float32", 1.0), ("bool", True), ("int32", -1)],
)
@pytest.mark.parametrize("name", ["bos", "eos", "eot"])
def test_what_is_no_tokens_id_is_named_with_its_key(tmp_path, tiny_llama_dir, name, kind, value):
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b"])
    getattr(writer, f"add_{kind}")(f"tokenizer.ggml.{name}_token_id", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = rf"t\.gguf: metadata 'tokenizer\.ggml\.{name}_token_id'.*{re.escape(repr(value))}"
    with pytest.raises(ModelLoadError, match=message):
        load_gguf(tmp_path / "t.gguf")
    with pytest.raises(ModelLoadError, match=message):  # with a tokenizer from elsewhere
        Tokenizer.load(find_model(str(tmp_path / "t.gguf")), str(tiny_llama_dir))
