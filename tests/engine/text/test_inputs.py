"""Prompts of each kind become token ids; every bad one is refused with its reason."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from minserve.engine.text.backend import RustBackend
from minserve.engine.text.inputs import PromptProcessor
from minserve.engine.text.tokenizer import Tokenizer
from minserve.errors import InvalidRequestError, RequestTooLongError
from minserve.models.finding.source import find_model
from minserve.prompts import PromptOptions

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
    """The early refusals never refuse what fits, however much text its tokens stand for."""
    longest = max(range(tokenizer.vocab_size), key=lambda i: len(tokenizer.token_bytes(i)))
    text = tokenizer.token_text(longest)
    assert len(text) == tokenizer.max_token_bytes
    ids = tokenizer.encode(text * (MAX_LEN - 1))
    assert len(ids) < MAX_LEN
    assert prompts.process(text * (MAX_LEN - 1)) == (text * (MAX_LEN - 1), tuple(ids))


@pytest.mark.parametrize("special", [None, True, False])
def test_special_tokens_are_added_where_they_are_asked_for(special):
    """A model with a BOS, as Llama's, whose template writes none."""
    rust = RustTokenizer(WordLevel({"<s>": 0, "user": 1, "!": 2}, unk_token="!"))
    rust.pre_tokenizer = WhitespaceSplit()
    rust.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    template = "{% for m in messages %}{{ m.role }} {% endfor %}"
    own = PromptProcessor(Tokenizer(RustBackend(rust), chat_template=template), 3, MAX_LEN)
    options = PromptOptions(add_special_tokens=special)
    assert own.process("user", options).token_ids == ((1,) if special is False else (0, 1))
    assert own.process(CHAT, options).token_ids == ((0, 1) if special else (1,))


def test_a_chat_may_go_on_in_its_last_message(prompts, tokenizer):
    chat = [*CHAT, {"role": "assistant", "content": "Hello, I"}]
    options = PromptOptions(add_generation_prompt=False, continue_final_message=True)
    text, ids = prompts.process(chat, options)
    assert text.endswith("assistant\nHello, I")
    assert ids == tuple(tokenizer.encode(text, add_special_tokens=False))
    closed, _ = prompts.process(chat, PromptOptions(add_generation_prompt=False))
    assert closed == text + "<|im_end|>\n"


def test_a_template_sees_variables_of_the_request_but_none_of_its_own(tokenizer):
    template = "{{ messages[0].content }} {{ mood }}{% if add_generation_prompt %}!{% endif %}"
    own = PromptProcessor(
        Tokenizer(tokenizer._backend, chat_template=template), tokenizer.vocab_size, MAX_LEN
    )
    assert own.process(CHAT, PromptOptions(template_kwargs={"mood": "glad"})).text == "Hi glad!"
    for name in ("messages", "chat_template", "tools"):
        with pytest.raises(InvalidRequestError, match=name) as error:
            own.process(CHAT, PromptOptions(template_kwargs={name: []}))
        assert error.value.param == "chat_template_kwargs"


def test_a_long_prompt_can_be_cut_to_its_last_tokens(prompts, tokenizer):
    text = " ".join(f"word {i}" for i in range(50))
    ids = tuple(tokenizer.encode(text))
    assert prompts.process(text, PromptOptions(truncate_prompt_tokens=5)) == (None, ids[-5:])
    assert prompts.process("short", PromptOptions(truncate_prompt_tokens=9)).text == "short"
    all_that_fit = PromptOptions(truncate_prompt_tokens=-1)
    assert prompts.process(text, all_that_fit).token_ids == ids[-(MAX_LEN - 1) :]
    assert prompts.process(list(ids), all_that_fit).token_ids == ids[-(MAX_LEN - 1) :]
    assert prompts.process("short", all_that_fit).token_ids == tuple(tokenizer.encode("short"))
    with pytest.raises(RequestTooLongError):
        prompts.process(text, PromptOptions(truncate_prompt_tokens=MAX_LEN))


def test_of_a_long_text_only_the_beginning_is_tokenized_before_it_is_refused(prompts, monkeypatch):
    seen = []
    encode = Tokenizer.encode

    def spy(self, text, **options):
        seen.append(len(text))
        return encode(self, text, **options)

    monkeypatch.setattr(Tokenizer, "encode", spy)
    with pytest.raises(RequestTooLongError, match="more than 64"):
        prompts.process("word " * 1000)
    assert sum(seen) < 1000


def test_what_was_tokenized_passes(prompts):
    once = prompts.process("The capital of France is")
    assert prompts.process(once) is once


@pytest.mark.parametrize("prompt", ["bad \ud800 text", [{"role": "user", "content": "\udfff"}]])
def test_half_a_surrogate_pair_is_no_text(prompts, prompt):
    with pytest.raises(InvalidRequestError, match=r"half of a surrogate pair \(U\+D"):
        prompts.process(prompt)


def test_ids_that_the_model_does_not_have_are_refused_also_from_text(tokenizer):
    small = PromptProcessor(tokenizer, 100, MAX_LEN)
    with pytest.raises(InvalidRequestError, match="outside the vocabulary"):
        small.process("Hello world")
