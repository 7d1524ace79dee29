"""Prompts of each kind become token ids; every bad one is refused with its reason."""

from __future__ import annotations

import pytest

from minserve.engine.text.backend import RustBackend
from minserve.engine.text.inputs import PromptProcessor
from minserve.engine.text.tokenizer import Tokenizer
from minserve.errors import InvalidRequestError, RequestTooLongError
from minserve.models.finding.source import find_model

MAX_LEN = 64
CHAT = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(find_model("smollm2"))


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer) -> PromptProcessor:
    return PromptProcessor(tokenizer, tokenizer.vocab_size, MAX_LEN)


def test_text_is_kept_and_tokenized(prompts, tokenizer):
    text, ids = prompts.process("The capital of France is")
    assert text == "The capital of France is"
    assert ids == tuple(tokenizer.encode(text))


def test_text_gets_the_special_tokens_that_the_model_wants(tokenizer):
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers import processors

    backend = RustTokenizer.from_str(tokenizer._backend.rust.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    with_bos = Tokenizer(
        RustBackend(backend), chat_template="<|im_start|>{{ messages[0].content }}"
    )
    prompts = PromptProcessor(with_bos, tokenizer.vocab_size, MAX_LEN)
    assert prompts.process("user")[1] == (1, 4093)
    # A chat template has written them itself: not twice.
    assert prompts.process([{"role": "user", "content": "user"}])[1] == (1, 4093)


@pytest.mark.parametrize("ids", [[5, 0, 49151], (7,), range(3)])
def test_token_ids_are_taken_as_they_are(prompts, ids):
    assert prompts.process(ids) == (None, tuple(ids))


def test_a_chat_is_rendered(prompts, tokenizer):
    text, ids = prompts.process(CHAT)
    assert text == tokenizer.render_chat(CHAT)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert ids == tuple(tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("prompt", ["", [], ()])
def test_an_empty_prompt_is_refused(prompts, prompt):
    with pytest.raises(InvalidRequestError, match="the prompt is empty") as error:
        prompts.process(prompt)
    assert error.value.param == "prompt"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 2, 49152], r"token 2 .* 49152.*0 to 49151"),
        ([-1], r"token 0 .* -1"),
        ([1, True], "token 1 .* integer, not True"),
        ([1, 2.0], r"token 1 .* integer, not 2\.0"),
        ([1, None], "token 1 .* integer, not None"),
        (["a", "b"], "token 0 .* integer, not 'a'"),
        ([1, {"role": "user"}], "token 1 .* integer"),
        ([10**4000], "token 0 .* outside the vocabulary"),
    ],
)
def test_bad_token_ids_are_named(prompts, ids, message):
    with pytest.raises(InvalidRequestError, match=message) as error:
        prompts.process(ids)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("prompt", [None, 5, 1.5, b"bytes", {"role": "user"}, {1, 2}])
def test_other_types_are_refused(prompts, prompt):
    with pytest.raises(InvalidRequestError, match=type(prompt).__name__):
        prompts.process(prompt)


@pytest.mark.parametrize("extra", ["text", 5, {"content": "no role"}, {"role": 1}])
def test_bad_messages_are_named(prompts, extra):
    with pytest.raises(InvalidRequestError, match="message 1 must be") as error:
        prompts.process([*CHAT, extra])
    assert error.value.param == "messages"


def test_messages_that_the_template_cannot_take_are_refused(prompts):
    with pytest.raises(InvalidRequestError, match="chat template"):
        prompts.process([{"role": "user", "content": None}])


def test_one_token_must_be_left_for_the_output(prompts):
    assert len(prompts.process([3] * (MAX_LEN - 1))[1]) == MAX_LEN - 1
    with pytest.raises(RequestTooLongError, match=r"length is 64 tokens.* in 64 tokens"):
        prompts.process([3] * MAX_LEN)
    with pytest.raises(RequestTooLongError, match="in 100 tokens"):
        prompts.process(" the" * 100)
    with pytest.raises(RequestTooLongError):
        prompts.process([{"role": "user", "content": " the" * 100}])


def test_an_absurdly_long_text_is_refused_without_tokenizing(prompts, monkeypatch):
    """Which would take 10 s and more."""
    monkeypatch.setattr(Tokenizer, "encode", lambda *_, **__: pytest.fail("it is tokenized"))
    with pytest.raises(RequestTooLongError, match="at least"):
        prompts.process("word " * 4_000_000)


def test_the_longest_tokens_there_are_still_fit(prompts, tokenizer):
    """The early refusal counts tokens of the longest kind: it never refuses what fits."""
    longest = max(range(tokenizer.vocab_size), key=lambda i: len(tokenizer.token_bytes(i)))
    text = tokenizer.token_text(longest)
    assert len(text) == tokenizer.max_token_bytes
    fits = (MAX_LEN - 1) * len(text)
    prompts._encode("x" * fits, "prompt", add_special_tokens=True)
    with pytest.raises(RequestTooLongError, match="at least 64"):
        prompts._encode("x" * (fits + 1), "prompt", add_special_tokens=True)


@pytest.mark.parametrize("prompt", ["bad \ud800 text", [{"role": "user", "content": "\udfff"}]])
def test_half_a_surrogate_pair_is_no_text(prompts, prompt):
    with pytest.raises(InvalidRequestError, match=r"half of a surrogate pair \(U\+D"):
        prompts.process(prompt)


def test_ids_that_the_model_does_not_have_are_refused_also_from_text(tokenizer):
    small = PromptProcessor(tokenizer, 100, MAX_LEN)
    with pytest.raises(InvalidRequestError, match="outside the vocabulary"):
        small.process("Hello world")
