"""Tokenizers of a GGUF file and of a folder: right tokens, exact bytes, any thread."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from minserve.engine.text.tokenizer import Tokenizer
from minserve.errors import InvalidRequestError, ModelLoadError
from minserve.models.finding.source import find_model

TEXTS = [
    "Hello world",
    "  two  spaces   and trailing ",
    "tabs\tand\n\nnewlines\r\n",
    "héllo Grüße 東京の天気 Привет 🙂👩‍👩‍👧 café",
    "    if x == 12345:\n        return 6.5e-7",
    "don't, we'll, it's",
]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi  there 7"}]


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return Tokenizer.load(find_model("smollm2"))


@pytest.fixture(scope="module")
def tiny(tiny_llama_dir: Path) -> Tokenizer:
    return Tokenizer.load(find_model(str(tiny_llama_dir)))


@pytest.fixture(params=["smollm2", "tiny"])
def either(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_as_it_was(either, text):
    ids = either.encode(text)
    assert either.decode(ids) == text
    assert b"".join(either.token_bytes(i) for i in ids) == text.encode()


def test_long_texts_give_the_same_tokens(either):
    """They take another path through the Rust code."""
    piece = "<|im_start|>" + "".join(TEXTS)
    expected = either.encode(piece) * 200
    assert len(piece) * 200 > 10_000
    # Each piece begins with a special token, so nothing merges across its start.
    assert either.encode(piece * 200) == expected


def test_smollm2_knows_its_special_tokens(smollm2):
    assert smollm2.vocab_size == 49152
    assert smollm2.bos_token_id == 1
    # Not only <|im_end|>, which the file names: <|endoftext|> and <reponame> end an output too.
    assert smollm2.eos_token_ids == {0, 2, 4}
    assert smollm2.max_token_bytes == 81
    assert smollm2.encode("<|im_start|>user\nhi<|im_end|>\n") == [1, 4093, 198, 6004, 2, 198]
    assert smollm2.decode([1, 4093, 2]) == "user"
    assert smollm2.decode([1, 4093, 2], skip_special_tokens=False) == "<|im_start|>user<|im_end|>"
    assert smollm2.token_text(1) == "<|im_start|>"
    assert smollm2.token_bytes(2) == b"<|im_end|>"


def test_smollm2_cuts_digits_first_as_it_was_trained(smollm2):
    """Digits stand alone, so two spaces before one are one token and not two."""
    pieces = [smollm2.token_text(i) for i in smollm2.encode("x  2024")]
    assert pieces == ["x", "  ", "2", "0", "2", "4"]
    assert [smollm2.token_text(i) for i in smollm2.encode("the cat")] == ["the", " cat"]


def test_smollm2_chat_is_written_by_its_template(smollm2):
    assert smollm2.has_chat_template
    text = smollm2.render_chat(CHAT)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi  there 7<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = smollm2.encode(text, add_special_tokens=False)
    assert (ids.count(1), ids.count(2)) == (3, 2)
    assert not smollm2.render_chat(CHAT, add_generation_prompt=False).endswith("assistant\n")


def test_a_split_character_has_exact_bytes_per_token(either):
    ids = either.encode("👩")
    assert len(ids) > 1
    assert b"".join(either.token_bytes(i) for i in ids) == "👩".encode()
    assert either.token_text(ids[0]) == "\ufffd"


def test_ids_beyond_the_vocabulary_decode_to_nothing(either):
    """Models pad their vocabulary, and a random model may sample such an id."""
    beyond = either.vocab_size + 3
    assert either.decode([*either.encode("a"), beyond]) == "a"
    assert either.token_text(beyond) == ""
    assert either.token_bytes(beyond) == b""


@pytest.mark.parametrize("no_token", [-1, -(2**40), 2**32, 2**70])
def test_numbers_that_are_no_ids_decode_to_nothing(either, no_token):
    for skip in (True, False):
        assert either.decode([*either.encode("a"), no_token], skip) == "a"
    assert either.token_bytes(no_token) == b""


def test_a_folder_agrees_with_transformers(tiny, tiny_llama_dir):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tiny_llama_dir)
    for text in [*TEXTS, tiny.render_chat(CHAT)]:
        assert tiny.encode(text) == theirs.encode(text)
        assert tiny.decode(tiny.encode(text)) == theirs.decode(
            theirs.encode(text), skip_special_tokens=True
        )
    assert tiny.render_chat(CHAT) == theirs.apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=True
    )


def test_transformers_reads_a_saved_tokenizer_alike(smollm2, tmp_path):
    from transformers import AutoTokenizer

    smollm2.save(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, smollm2.render_chat(CHAT)]:
        assert saved.encode(text) == smollm2.encode(text)
    assert saved.eos_token_id in smollm2.eos_token_ids
    assert smollm2.render_chat(CHAT) == saved.apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=True
    )


def test_end_tokens_are_those_of_generation_config_and_of_the_tokenizer(tiny_llama_dir, tmp_path):
    folder = Path(shutil.copytree(tiny_llama_dir, tmp_path / "m"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 7]}))
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": 3}
    (folder / "config.json").write_text(json.dumps(config))
    assert Tokenizer.load(find_model(str(folder))).eos_token_ids == {2, 4, 7}


def test_another_tokenizer_can_be_named(tiny_llama_dir, tiny):
    other = Tokenizer.load(find_model("smollm2"), str(tiny_llama_dir))
    assert other.encode("the rain") == tiny.encode("the rain")
    source = find_model("smollm2")
    reverse = Tokenizer.load(find_model(str(tiny_llama_dir)), str(source.gguf_file))
    assert reverse.vocab_size == 49152


def test_a_tokenizer_that_is_nowhere_is_named():
    with pytest.raises(ModelLoadError, match=r"no tokenizer at 'no/such/place'.*hub id"):
        Tokenizer.load(find_model("smollm2"), "no/such/place")


def test_truncation_and_padding_in_a_file_are_not_applied(tiny_llama_dir, tmp_path):
    folder = Path(shutil.copytree(tiny_llama_dir, tmp_path / "m"))
    file = folder / "tokenizer.json"
    saved = json.loads(file.read_text())
    saved["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    file.write_text(json.dumps(saved))
    tokenizer = Tokenizer.load(find_model(str(folder)))
    assert tokenizer.decode(tokenizer.encode(TEXTS[3])) == TEXTS[3]


def test_a_folder_without_tokenizer_is_refused(tiny_llama_dir, tmp_path):
    shutil.copy(tiny_llama_dir / "config.json", tmp_path)
    with pytest.raises(ModelLoadError, match="tokenizer") as error:
        Tokenizer.load(find_model(str(tmp_path)))
    assert str(tmp_path) in str(error.value)


def test_a_model_without_template_cannot_chat(tiny_opt_dir):
    tokenizer = Tokenizer.load(find_model(str(tiny_opt_dir)))
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequestError, match="no chat template"):
        tokenizer.render_chat(CHAT)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0]['content'] + 1 }}", "chat template refused"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "chat template refused"),
        ("{% for %}", "chat template refused"),
    ],
)
def test_a_failing_template_is_an_invalid_request(tiny, template, message):
    broken = Tokenizer(tiny._backend, chat_template=template)
    with pytest.raises(InvalidRequestError, match=message):
        broken.render_chat(CHAT)


def test_templates_see_the_special_tokens(tiny):
    template = "{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}"
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = Tokenizer(tiny._backend, special_tokens=special, chat_template=template)
    assert tokenizer.render_chat([{"role": "user", "content": "x"}]) == "<s>x</s>"
    assert tokenizer.eos_token_ids == {2}


def test_threads_may_encode_and_decode_at_once(either):
    expected = {text: either.encode(text) for text in TEXTS}

    def work(i: int) -> bool:
        text = TEXTS[i % len(TEXTS)]
        ids = either.encode(text)
        return (
            ids == expected[text]
            and either.decode(ids) == text
            and either.render_chat(CHAT).endswith("assistant\n")
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(2000)))
