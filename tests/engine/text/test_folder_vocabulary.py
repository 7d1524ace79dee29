"""Vocabularies of folders: what the settings say is in effect, as transformers 4.57 reads them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from minserve.engine.text.tokenizer import Tokenizer
from minserve.errors import ModelLoadError, UnsupportedModelError
from minserve.models.finding.source import find_model
from parts.tokenizers_parity import vocabularies as made

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer

LLAMA = {"tokenizer_class": "LlamaTokenizer"}
BEHIND = made.SPM_SIZE
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def load(folder: Path) -> Tokenizer:
    return Tokenizer.load(find_model(str(folder)))


def token(content: str, **flags: Any) -> dict[str, Any]:
    names = ("lstrip", "rstrip", "single_word", "normalized")
    return {"content": content, "special": True, **dict.fromkeys(names, False), **flags}


def llama_json(folder: Path, settings: dict[str, Any], **files: dict[str, Any]) -> Tokenizer:
    tokenizer = made.llama_tokenizer_json("llama", legacy=False)
    return load(made.json_folder(folder / "m", tokenizer, settings, **files))


def llama_model(folder: Path, settings: dict[str, Any], **files: dict[str, Any]) -> Tokenizer:
    return load(made.sentencepiece_folder(folder / "m", "llama", settings, **files))


@pytest.mark.parametrize("make", [llama_json, llama_model])
@pytest.mark.parametrize(
    ("settings", "before", "after"),
    [
        (LLAMA, [1], []),
        (LLAMA | {"add_bos_token": False}, [], []),
        (LLAMA | {"add_bos_token": False, "add_eos_token": True}, [], [2]),
        ({"tokenizer_class": "CodeLlamaTokenizer", "add_eos_token": True}, [1], [2]),
        (LLAMA | {"bos_token": token("</s>", __type="AddedToken")}, [2], []),
        ({"add_eos_token": True}, [1], [2]),  # a model of type llama has Llama's class
    ],
)
def test_a_class_and_its_settings_say_what_surrounds_a_text(
    tmp_path, make, settings, before, after
):
    tokenizer = make(tmp_path, settings)
    inner = tokenizer.encode("a", add_special_tokens=False)
    assert tokenizer.encode("a") == [*before, *inner, *after]
    assert not {1, 2} & set(inner)


def test_a_class_that_says_nothing_leaves_it_to_the_file(tmp_path):
    tokenizer = llama_json(tmp_path, {"tokenizer_class": "PreTrainedTokenizerFast"})
    assert 1 not in tokenizer.encode("a")


def test_a_class_that_no_file_names_counts_where_no_file_says_more(tmp_path):
    """A model of type llama has Llama's class, but its tokenizer.json knows what belongs around."""
    assert llama_model(tmp_path / "model", {}).encode("a")[0] == 1
    assert llama_json(tmp_path / "json", {}).encode("a")[0] != 1


def llama3_json(folder: Path, settings: dict[str, Any] | None) -> tuple[Tokenizer, RustTokenizer]:
    """A folder like Llama 3's, which has byte-level BPE and none of Llama 2's special tokens."""
    from tokenizers import processors

    model = json.loads(made.byte_level_bpe("llama-bpe").to_str())["model"]
    ids, merges = model["vocab"], [tuple(pair) for pair in model["merges"]]
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    tokens = [token for token in sorted(ids, key=ids.__getitem__) if token not in made.SPECIAL]
    file = made.assemble("llama-bpe", tokens + names, merges, names)
    file.post_processor = processors.TemplateProcessing(
        single=f"{names[0]} $A", special_tokens=[(names[0], file.token_to_id(names[0]))]
    )
    made.json_folder(folder, file, settings or {})
    if settings is None:
        (folder / "tokenizer_config.json").unlink()
    return load(folder), file


@pytest.mark.parametrize(
    ("settings", "stops"),
    [
        (None, []),
        ({}, []),
        ({"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}, ["<|eot_id|>"]),
        ({"tokenizer_class": "LlamaTokenizerFast"}, []),
        ({"tokenizer_class": "LlamaTokenizerFast", "add_eos_token": False}, []),
    ],
)
def test_a_class_adds_no_token_that_the_vocabulary_lacks(tmp_path, settings, stops):
    tokenizer, file = llama3_json(tmp_path / "m", settings)
    text = "hi <s> </s> <unk> x"
    assert tokenizer.encode(text) == file.encode(text).ids
    assert tokenizer.vocab_size == file.get_vocab_size()
    assert tokenizer.eos_token_ids == {file.token_to_id(token) for token in stops}


def test_an_ordinary_word_is_no_special_token_by_the_kind_of_model(tmp_path):
    """A vocabulary of HTML may have "</s>" as a word."""
    file = made.byte_level_bpe("llama-bpe", special=[])
    tokenizer = load(made.json_folder(tmp_path / "m", file, {}))
    assert file.token_to_id("</s>") is not None
    assert not tokenizer.eos_token_ids
    assert tokenizer.encode("a</s>") == file.encode("a</s>").ids


def test_a_folder_that_transformers_5_wrote_keeps_what_it_wrote_into_the_file(tmp_path):
    from transformers import AutoTokenizer

    made.json_folder(tmp_path / "m", made.llama_tokenizer_json("llama", legacy=False), LLAMA)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "m")
    theirs.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text('{"model_type": "llama"}')
    assert load(tmp_path / "saved").encode("a <s> b") == theirs.encode("a <s> b")


def test_a_prefix_space_in_the_settings_means_that_the_model_file_is_read(tmp_path):
    """Yi 1.5's tokenizer.json puts a space before texts, and its settings say that none belongs."""
    llama_json(tmp_path, LLAMA | {"add_prefix_space": False})
    model = tmp_path / "m" / "tokenizer.model"
    model.write_bytes(made.sentencepiece_model("llama"))
    tokenizer = load(tmp_path / "m")
    assert tokenizer.kind == "SentencePiece BPE"
    assert tokenizer.token_text(tokenizer.encode("The")[1])[0] == "T"
    model.unlink()
    assert load(tmp_path / "m").kind == "tokenizer.json (BPE)"


@pytest.mark.parametrize("make", [llama_json, llama_model])
def test_tokens_that_only_the_settings_have_are_in_effect(tmp_path, make):
    added = {str(BEHIND): token("[A]"), str(BEHIND + 1): token("[B]", special=False, rstrip=True)}
    tokenizer = make(tmp_path, LLAMA | {"legacy": False, "added_tokens_decoder": added})
    ids = tokenizer.encode("[A] [B]  [A]", add_special_tokens=False)
    assert [ids[0], *ids[-2:]] == [BEHIND, BEHIND + 1, BEHIND]
    assert tokenizer.decode(ids) == " [B]".removeprefix(" ")
    assert tokenizer.vocab_size == BEHIND + 2
    assert tokenizer.token_bytes(BEHIND) == b"[A]"


@pytest.mark.parametrize("make", [llama_json, llama_model])
def test_the_older_files_of_added_tokens_count_where_the_settings_have_none(tmp_path, make):
    files = {"added_tokens": {"[PAD]": BEHIND}, "special_tokens_map": {"pad_token": "[PAD]"}}
    tokenizer = make(tmp_path, LLAMA, **files)
    assert tokenizer.encode("[PAD]") == [1, BEHIND]
    assert tokenizer.decode([BEHIND]) == ""
    assert tokenizer.decode([BEHIND], skip_special_tokens=False) == "[PAD]"


@pytest.mark.parametrize("make", [llama_json, llama_model])
def test_a_special_token_that_the_vocabulary_lacks_gets_the_next_id(tmp_path, make):
    assert make(tmp_path, LLAMA | {"pad_token": "[PAD]"}).encode("[PAD]") == [1, BEHIND]


@pytest.mark.parametrize("make", [llama_json, llama_model])
def test_codellamas_tokens_for_filling_in_are_special(tmp_path, make):
    signs = [f"▁<{name}>" for name in ("PRE", "MID", "SUF", "EOT")]
    added = {sign: BEHIND + i for i, sign in enumerate(signs)}
    tokenizer = make(tmp_path, {"tokenizer_class": "CodeLlamaTokenizer"}, added_tokens=added)
    ids = [tokenizer.encode(sign)[-1] for sign in signs]
    assert ids == list(range(BEHIND, BEHIND + 4))
    assert tokenizer.decode(ids) == ""


@pytest.mark.parametrize("make", [llama_json, llama_model])
@pytest.mark.parametrize(
    ("settings", "size"), [({}, BEHIND), ({"additional_special_tokens": ["▁<MID>"]}, BEHIND + 1)]
)
def test_only_those_tokens_for_filling_in_that_a_file_names_are_added(
    tmp_path, make, settings, size
):
    tokenizer = make(tmp_path, {"tokenizer_class": "CodeLlamaTokenizer"} | settings)
    assert tokenizer.vocab_size == size


def test_opt_puts_its_end_of_text_before_each_text(tmp_path):
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}
    settings |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), "</s>")
    tokenizer = load(made.merges_folder(tmp_path / "m", settings))
    end = made.SPECIAL.index("</s>")
    assert tokenizer.encode("a")[0] == end
    assert tokenizer.eos_token_ids == {end}
    assert end not in tokenizer.encode("a", add_special_tokens=False)


@pytest.mark.parametrize(
    ("settings", "has_space"), [({}, False), ({"add_prefix_space": True}, True)]
)
@pytest.mark.parametrize("has_json", [True, False])
def test_the_settings_decide_on_the_space_before_a_byte_level_text(
    tmp_path, settings, has_space, has_json
):
    from tokenizers import pre_tokenizers

    settings = {"tokenizer_class": "GPT2Tokenizer", **settings}
    if has_json:
        bpe = made.byte_level_bpe("gpt-2")
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=not has_space)
        made.json_folder(tmp_path / "m", bpe, settings)
    else:
        made.merges_folder(tmp_path / "m", settings)
    tokenizer = load(tmp_path / "m")
    assert tokenizer.decode(tokenizer.encode("x")) == (" x" if has_space else "x")


def test_special_tokens_of_the_class_are_seen_by_chat_templates(tmp_path):
    template = "{{ bos_token }}{{ eos_token }}{{ unk_token }}"
    tokenizer = llama_model(tmp_path, LLAMA | {"chat_template": template})
    assert tokenizer.render_chat([]) == "<s></s><unk>"


def test_special_tokens_with_names_of_their_own_are_seen_too(tmp_path):
    settings = {"extra_special_tokens": {"tool_token": "[T]"}, "chat_template": "{{ tool_token }}"}
    tokenizer = llama_json(tmp_path, LLAMA | settings)
    assert tokenizer.render_chat([]) == "[T]"
    assert tokenizer.encode("[T]") == [1, BEHIND]


def test_tokenizer_json_counts_before_the_older_file_of_added_tokens(tmp_path):
    """Tokens of the older file have other flags, and would no longer be found in a word."""
    tokenizer = llama_json(tmp_path, LLAMA, added_tokens={"<s>": 1})
    assert tokenizer.encode("a<s>b")[2] == 1


def test_loading_takes_no_transformers(tmp_path):
    """Importing it takes seconds of each start."""
    made.sentencepiece_folder(tmp_path / "m", "llama", LLAMA)
    made.json_folder(tmp_path / "j", made.byte_level_bpe("qwen2"), {})
    program = (
        "import sys\n"
        "from minserve.engine.text.tokenizer import Tokenizer\n"
        "from minserve.models.finding.source import find_model\n"
        "for folder in sys.argv[1:]: Tokenizer.load(find_model(folder))\n"
        "assert 'transformers' not in sys.modules\n"
    )
    folders = [str(tmp_path / "m"), str(tmp_path / "j")]
    subprocess.run([sys.executable, "-c", program, *folders], check=True)


# ------------------------------------------------------------------------------------- errors


def refused(folder: Path, message: str, kind: type[Exception] = ModelLoadError) -> None:
    with pytest.raises(kind, match=message) as error:
        load(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize(
    ("content", "message"), [(LFS, "git lfs pull"), ("{}", "broken|no sentencepiece|damaged")]
)
def test_files_that_hold_no_vocabulary(tmp_path, name, content, message):
    made.write_json(tmp_path / "m", {"config": {}, "tokenizer_config": LLAMA})
    (tmp_path / "m" / name).write_text(content)
    refused(tmp_path / "m", message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.pieces.add(piece="▁the"), "'▁the' has the ids"),
        (lambda model: model.pieces.pop(0), "broken"),
        (lambda model: model.pieces.pop(9), "broken"),  # a byte
        (lambda model: setattr(model.trainer_spec, "model_type", 3), "BPE and Unigram"),
    ],
)
def test_broken_sentencepiece_models(tmp_path, change, message):
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    folder = made.sentencepiece_folder(tmp_path / "m", "llama", LLAMA)
    model = ModelProto.FromString(made.sentencepiece_model("llama"))
    change(model)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    refused(folder, rf"tokenizer\.model.*{message}")


def test_a_piece_that_is_no_text_is_named(tmp_path):
    folder = made.sentencepiece_folder(tmp_path / "m", "llama", LLAMA)
    whole = made.sentencepiece_model("llama")
    damaged = whole.replace("▁the".encode(), b"\xff" + "▁the".encode()[1:], 1)
    (folder / "tokenizer.model").write_bytes(damaged)
    refused(folder, r"tokenizer\.model.*piece \d+ is no text")


@pytest.mark.parametrize("make", [llama_json, llama_model])
@pytest.mark.parametrize("added", [{"<s>": 7}, {"[X]": 7}])
def test_an_added_token_whose_id_is_another_tokens(tmp_path, make, added):
    with pytest.raises(ModelLoadError, match=r"another model's|but 7 in"):
        make(tmp_path, LLAMA, added_tokens=added)


@pytest.mark.parametrize(
    ("files", "message", "kind"),
    [
        ({}, "no tokenizer in this folder", ModelLoadError),
        ({"qwen.tiktoken": ""}, r"qwen\.tiktoken.*--tokenizer", UnsupportedModelError),
        ({"tekken.json": "{}"}, r"tekken\.json.*--tokenizer", UnsupportedModelError),
        (
            {
                "tokenizer_config.json": json.dumps(
                    {
                        "tokenizer_class": "MyTokenizer",
                        "auto_map": {"AutoTokenizer": ["my.T", None]},
                    }
                ),
                "tokenizer.json": "{}",
            },
            "MyTokenizer is code of the model's own.*--tokenizer",
            UnsupportedModelError,
        ),
        (
            {"tokenizer_config.json": '{"tokenizer_class": "T5Tokenizer"}', "tokenizer.model": ""},
            "T5Tokenizer",
            UnsupportedModelError,
        ),
        (
            {"vocab.json": "{}", "merges.txt": "", "tokenizer_config.json": "{}"},
            r"GPT2Tokenizer and Qwen2Tokenizer",
            UnsupportedModelError,
        ),
        ({"tokenizer_config.json": "{"}, r"tokenizer_config\.json: cannot be read", ModelLoadError),
        (
            {"tokenizer_config.json": '{"added_tokens_decoder": {"x": {"content": "a"}}}'},
            "added_tokens_decoder",
            ModelLoadError,
        ),
        ({"added_tokens.json": '{"a": "b"}'}, r"added_tokens\.json", ModelLoadError),
    ],
)
def test_folders_whose_tokenizer_cannot_be_read(tmp_path, files, message, kind):
    (tmp_path / "config.json").write_text("{}")
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    refused(tmp_path, message, kind)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("eos_token", ["</s>"]),
        ("eos_token", -1),
        ("bos_token", "\ud800"),
        ("pad_token", {"content": "\udfff"}),
        ("unk_token", {"text": "a"}),
        ("additional_special_tokens", [[1]]),
        ("additional_special_tokens", "[A]"),
        ("extra_special_tokens", {"a": 1}),
    ],
)
def test_special_tokens_that_are_none(tmp_path, name, entry, value):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text(json.dumps({entry: value}))
    refused(tmp_path, rf"{re.escape(name)}: .*'{entry}'")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("added_tokens", {"[A]": 10**12}, r"1000000000000 of '\[A\]' is no token's id"),
        ("added_tokens", {"[A]": -1}, r"-1 of '\[A\]' is no token's id"),
        ("added_tokens", {"[A]": True}, r"True of '\[A\]' is no token's id"),
        ("added_tokens", {"[A]": 5, "[B]": 5}, r"5 of '\[B\]' is also another token's"),
        ("added_tokens", {"\ud800": 5}, "describes no token"),
        (
            "tokenizer_config",
            {"added_tokens_decoder": {10**12: {"content": "a"}}},
            "1000000000000 of 'a' is no token's id",
        ),
    ],
)
def test_added_tokens_whose_ids_or_texts_are_none(tmp_path, file, content, message):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / f"{file}.json").write_text(json.dumps(content))
    refused(tmp_path, rf"{file}\.json: .*{message}")


def test_a_bos_that_is_wanted_but_has_no_name(tmp_path):
    with pytest.raises(ModelLoadError, match="bos_token"):
        llama_json(tmp_path, LLAMA | {"bos_token": None})
