"""Looking up a token's text changes nothing: each delta is what decoding a window would give."""

from __future__ import annotations

import pickle
import random

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models

from minserve.engine.text.backend import RustBackend, TokenizerBackend
from minserve.engine.text.detokenizer import IncrementalDetokenizer
from minserve.engine.text.plain_tokens import PlainTokens
from minserve.engine.text.sentencepiece_backend import (
    PrefixSpace,
    SentencePieceBackend,
    SentencePieceRules,
)
from minserve.engine.text.sentencepiece_export import to_rust
from minserve.engine.text.tokenizer import Tokenizer
from minserve.engine.text.vocabulary import parse_model_proto
from minserve.models.finding.source import find_model
from minserve.sampling_params import SamplingParams
from parts.tokenizers_parity import vocabularies as made

TEXT = "Hi 😀 世界, naïve <|im_end|> two  spaces\n\n\tand   three \ufffd end."


def sentencepiece(prefix: PrefixSpace) -> SentencePieceBackend:
    model = parse_model_proto("here", made.sentencepiece_model("llama"))
    return SentencePieceBackend(model, SentencePieceRules(prefix, {}), "test")


def byte_level() -> TokenizerBackend:
    return Tokenizer.load(find_model("smollm2"))._backend


BACKENDS = {
    "bytes": byte_level,
    **{f"sentencepiece, {one.name}": lambda one=one: sentencepiece(one) for one in PrefixSpace},
    **{
        f"its form in Rust, {one.name}": lambda one=one: RustBackend(to_rust(sentencepiece(one)))
        for one in PrefixSpace
    },
}


def deltas(
    backend: TokenizerBackend,
    ids: list[int],
    prompt: list[int],
    params: SamplingParams,
    plain: PlainTokens | None,
) -> list[tuple[str, str | None]]:
    detokenizer = IncrementalDetokenizer(backend.decode, prompt, params, plain)
    found = [detokenizer.add([one]) for one in ids]
    return [*found, (detokenizer.flush(), None)]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("skip", [True, False])
def test_each_delta_is_what_decoding_gives(name: str, skip: bool) -> None:
    backend = BACKENDS[name]()
    assert backend.texts_add_up
    plain, rng = PlainTokens(backend.decode, backend.special_ids), random.Random(name)
    words = backend.encode(TEXT, add_special_tokens=False)
    low = min(backend.vocab_size, 300)  # where the single bytes are
    params = SamplingParams(skip_special_tokens=skip, stop=("e e", "\n\t"), max_tokens=1000)
    for _ in range(60):
        ids = [
            rng.choice(
                (rng.randrange(backend.vocab_size + 2), rng.randrange(low), rng.choice(words))
            )
            for _ in range(30)
        ]
        prompt = rng.choices(words, k=rng.randrange(4))
        expected = deltas(backend, ids, prompt, params, None)
        assert deltas(backend, ids, prompt, params, plain) == expected
    assert deltas(backend, words, words, params, plain) == deltas(
        backend, words, words, params, None
    )
    found = [one for one in plain.values() if one is not None]
    assert len(found) > 20


def test_most_tokens_of_a_text_are_never_decoded_again() -> None:
    backend = byte_level()
    ids = backend.encode("The quick brown fox jumps over the lazy dog. " * 20, False)
    plain, calls = PlainTokens(backend.decode, backend.special_ids), []

    def decode(token_ids: list[int], skip: bool) -> str:
        calls.append(token_ids)
        return backend.decode(token_ids, skip)

    detokenizer = IncrementalDetokenizer(decode, ids[:5], SamplingParams(), plain)
    assert "".join(detokenizer.add([one])[0] for one in ids) == backend.decode(ids, True)
    assert len(calls) == 1  # of the prompt's end


def test_tokens_that_may_be_left_out_or_are_no_whole_characters_have_no_text_of_their_own() -> None:
    backend = byte_level()
    plain = PlainTokens(backend.decode, backend.special_ids)
    end, *_ = backend.encode("<|im_end|>", add_special_tokens=False)
    half, *_ = backend.encode("😀", add_special_tokens=False)
    assert plain[end] is plain[half] is plain[backend.vocab_size + 5] is None
    word = backend.encode(" dog", add_special_tokens=False)[0]
    assert plain[word] == (" dog", " dog")


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.WordPiece(),
        decoders.BPEDecoder(),
        decoders.CTC(),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()]),
        decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 0, 1),
            ]
        ),
        decoders.Sequence(
            [decoders.Replace("_", " "), decoders.ByteFallback(), decoders.Fuse()],
        ),
    ],
)
def test_where_texts_depend_on_each_other_every_token_is_decoded(decoder) -> None:
    rust = RustTokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    if decoder is not None:
        rust.decoder = decoder
    assert Tokenizer(RustBackend(rust)).plain_tokens is None


def test_the_texts_go_to_other_processes_with_their_tokenizer() -> None:
    tokenizer = Tokenizer(sentencepiece(PrefixSpace.ALWAYS))
    word = tokenizer.encode("self", add_special_tokens=False)[0]
    assert tokenizer.plain_tokens[word] == (" self", "self")
    twin = pickle.loads(pickle.dumps(tokenizer)).plain_tokens
    assert twin[word] == (" self", "self")
    assert twin[word + 1] == tokenizer.plain_tokens[word + 1]
