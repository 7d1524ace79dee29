"""A sentencepiece vocabulary in the form of tokenizer.json, for programs that read only that.

The form cannot say everything: where two pairs of pieces merge to pieces of one score,
sentencepiece merges the left pair, and tokenizer.json has one fixed order. Trained models give
every piece a score of its own. This form is written for others and never run here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from minserve.engine.text.sentencepiece_proto import (
    BPE,
    BYTE,
    CONTROL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer

    from minserve.engine.text.sentencepiece_backend import SentencePieceBackend


def to_rust(backend: SentencePieceBackend) -> RustTokenizer:
    """Return a Rust tokenizer that gives the same tokens."""
    from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as RustTokenizer

    from minserve.engine.text.sentencepiece_backend import SPACE, PrefixSpace

    prefix = backend.rules.prefix
    rust = RustTokenizer(_model(backend))
    steps = _normalizing_steps(backend.model.normalizer_spec)
    if prefix is PrefixSpace.FIRST:
        rust.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    else:
        steps += [normalizers.Prepend(SPACE)] if prefix is PrefixSpace.ALWAYS else []
        steps.append(normalizers.Replace(" ", SPACE))
    if steps:
        rust.normalizer = normalizers.Sequence(steps)
    strip = [] if prefix is PrefixSpace.NEVER else [decoders.Strip(" ", 1, 0)]
    rust.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    # With a prefix the normalizer would put one before the token itself.
    is_normalized = prefix is PrefixSpace.NEVER
    symbols = [piece.piece for piece in backend.model.pieces if piece.type == USER_DEFINED]
    rust.add_tokens([AddedToken(symbol, normalized=is_normalized) for symbol in symbols])
    rust.add_tokens(list(backend.rules.added.values()))
    _surround(rust, backend)
    return rust


def _model(backend: SentencePieceBackend) -> Any:
    from tokenizers import models

    spec, pieces = backend.model.trainer_spec, backend.model.pieces
    unknown = next(i for i, piece in enumerate(pieces) if piece.type == UNKNOWN)
    if spec.model_type != BPE:
        scores = [(piece.piece, piece.score) for piece in pieces]
        return models.Unigram(scores, unk_id=unknown, byte_fallback=spec.byte_fallback)
    apart = (BYTE, CONTROL, UNKNOWN, UNUSED)
    mergeable = {piece.piece: piece.score for piece in pieces if piece.type not in apart}
    return models.BPE(
        dict(backend.vocabulary()),
        list(_merges(mergeable)),
        unk_token=pieces[unknown].piece,
        fuse_unk=True,
        byte_fallback=spec.byte_fallback,
    )


def _merges(scores: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """Return every split of a piece into two pieces, the best piece first."""
    ranked = sorted((p for p in scores if len(p) > 1), key=lambda p: scores[p], reverse=True)
    for piece in ranked:
        for cut in range(len(piece) - 1, 0, -1):
            if piece[:cut] in scores and piece[cut:] in scores:
                yield piece[:cut], piece[cut:]


def _normalizing_steps(spec: Any) -> list[Any]:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    return steps


def _surround(rust: RustTokenizer, backend: SentencePieceBackend) -> None:
    from tokenizers import processors

    rules = backend.rules
    if rules.before or rules.after:
        texts = {i: rules.added[i].content for i in (*rules.before, *rules.after)}
        rust.post_processor = processors.TemplateProcessing(
            single=[*(texts[i] for i in rules.before), "$A", *(texts[i] for i in rules.after)],
            special_tokens=[(text, i) for i, text in texts.items()],
        )
