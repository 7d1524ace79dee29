"""Vocabularies that a GGUF file's metadata describes, run by llama.cpp's rules.

transformers can convert them too, but takes 8 s for a vocabulary of 49152, and leaves out the
pre-tokenizer that the file names, which changes tokens (runs of spaces before digits).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from minserve.engine.text.backend import RustBackend, TokenizerBackend
from minserve.engine.text.pre_tokenizers import PRE_TOKENIZERS, PreTokenizerRule
from minserve.engine.text.sentencepiece_backend import (
    SPACE,
    PrefixSpace,
    SentencePieceBackend,
    SentencePieceRules,
)
from minserve.engine.text.sentencepiece_proto import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    new_model_proto,
)
from minserve.engine.text.stop_tokens import named_tokens, stop_tokens
from minserve.engine.text.vocabulary import Vocabulary, check_pieces
from minserve.errors import ModelLoadError, UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tokenizers import AddedToken

    from minserve.models.gguf_files.gguf_file import GGUFFile

_PREFIX = "tokenizer.ggml."
# ggml's numbers of token types are sentencepiece's; 0 is "undefined".
_TYPES = range(NORMAL, BYTE + 1)
_SPM, _BPE = "llama", "gpt2"
_OTHERS = {"t5": "Unigram", "bert": "WordPiece"}
_NUM_BYTES = 256


def load_gguf(gguf: GGUFFile) -> Vocabulary:
    """Build the tokenizer of a GGUF file.

    Raises:
        ModelLoadError: where the file has none, or one that is broken.
        UnsupportedModelError: where it is of a kind that cannot be run.
    """
    kind = gguf.require(_PREFIX + "model", str)
    if kind not in (_SPM, _BPE):
        named = f"model {kind!r}" + (f" ({_OTHERS[kind]})" if kind in _OTHERS else "")
        raise _unsupported(gguf, named)
    try:
        return _load(gguf, kind)
    except ModelLoadError:
        raise
    except Exception as error:  # tokenizers raises plain Exception, values of wrong types any
        raise ModelLoadError(f"{gguf.path}: the tokenizer is broken: {error}") from error


def _load(gguf: GGUFFile, kind: str) -> Vocabulary:
    tokens = [
        token or f"[EMPTY_{i}]"  # so named by llama.cpp
        for i, token in enumerate(gguf.require(_PREFIX + "tokens", list))
    ]
    check_pieces(str(gguf.path), tokens)
    ids = {token: i for i, token in enumerate(tokens)}
    named = named_tokens(gguf)
    stops = stop_tokens(named, ids)
    special = _special_tokens(named, tokens, kind)
    added = _added_tokens(gguf, tokens, stops)
    backend: TokenizerBackend
    if kind == _SPM:
        backend = _sentencepiece(gguf, tokens, special, added)
    else:
        backend = _byte_level_bpe(gguf, ids, special, added)
    return Vocabulary(
        backend=backend,
        special_tokens={name: tokens[i] for name, i in special.items()},
        eos_token_ids=stops,
        chat_templates=_chat_templates(gguf),
    )


def _unsupported(gguf: GGUFFile, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{gguf.path}: GGUF tokenizer with {what} is not supported; "
        "name a folder or hub id with the model's tokenizer by --tokenizer"
    )


def _chat_templates(gguf: GGUFFile) -> dict[str, str]:
    """Return the templates by name; the only or first one is the default."""
    key = "tokenizer.chat_template"
    named = {name: f"{key}.{name}" for name in gguf.metadata.get(key + "s") or []}
    found = {name: gguf.metadata.get(k) for name, k in ({"default": key} | named).items()}
    return {name: text for name, text in found.items() if isinstance(text, str)}


def _special_tokens(named: Mapping[str, int], tokens: list[str], kind: str) -> dict[str, int]:
    """Return the ids of the special tokens that have a name, such as ``bos_token``."""
    defaults = {"bos": 1, "eos": 2, "unknown": 0} if kind == _SPM else {}
    names = (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    found = {}
    for name, key in names:
        for i in (named.get(key), defaults.get(key)):
            if i is not None and i < len(tokens):
                found[f"{name}_token"] = i
                break
    return found


def _added_tokens(
    gguf: GGUFFile, tokens: list[str], stops: frozenset[int]
) -> dict[int, AddedToken]:
    """Return the tokens that are found wherever they are written, and never split.

    Those that end an output count as control tokens, whatever the file says.
    """
    from tokenizers import AddedToken

    types = gguf.metadata.get(_PREFIX + "token_type") or []
    if types and len(types) < len(tokens):
        raise ModelLoadError(f"{gguf.path}: {len(types)} token types for {len(tokens)} tokens")
    # The files do not say that a token swallows the spaces behind it. Phi-3's do.
    name = str(gguf.metadata.get("general.name", "")).lower()
    swallows = "phi-3" in name or "phi3" in name
    found = {}
    for i, token in enumerate(tokens):
        kind = CONTROL if i in stops else types[i] if types else NORMAL
        if kind in (CONTROL, USER_DEFINED, UNKNOWN):
            found[i] = AddedToken(
                token,
                special=kind != USER_DEFINED,
                normalized=False,
                rstrip=swallows and token not in ("<unk>", "<s>", "<|endoftext|>"),
            )
    return found


def _surrounding(
    gguf: GGUFFile, special: Mapping[str, int], adds_bos: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids before and behind a text."""
    around = []
    for name, default in (("bos_token", adds_bos), ("eos_token", False)):
        wanted = gguf.metadata.get(f"{_PREFIX}add_{name}", default)
        if wanted and name not in special:
            raise ModelLoadError(
                f"{gguf.path}: a {name} belongs around each text, but metadata "
                f"'{_PREFIX}{name}_id' does not say which it is"
            )
        around.append((special[name],) if wanted else ())
    return around[0], around[1]


# --------------------------------------------------------------------------- byte-level BPE


def _byte_level_bpe(
    gguf: GGUFFile,
    ids: dict[str, int],
    special: Mapping[str, int],
    added: Mapping[int, AddedToken],
) -> RustBackend:
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers import decoders, models, processors

    name, rule = _rule(gguf)
    merges = [_pair(merge) for merge in gguf.require(_PREFIX + "merges", list)]
    backend = RustTokenizer(models.BPE(ids, merges, ignore_merges=rule.ignore_merges))
    backend.pre_tokenizer = rule.pre_tokenizer()
    if (normalizer := rule.normalizer()) is not None:
        backend.normalizer = normalizer
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(list(added.values()))
    before, after = _surrounding(gguf, special, rule.adds_bos)
    if before or after:
        texts = {i: text for text, i in ids.items() if i in (*before, *after)}
        backend.post_processor = processors.TemplateProcessing(
            single=[*(texts[i] for i in before), "$A", *(texts[i] for i in after)],
            special_tokens=[(text, i) for i, text in texts.items()],
        )
    return RustBackend(backend, f"GGUF {_BPE}/{name}")


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _rule(gguf: GGUFFile) -> tuple[str, PreTokenizerRule]:
    name = gguf.metadata.get(_PREFIX + "pre")
    if name is None or name == "default":
        raise _unsupported(gguf, "no word on how texts are cut (no pre-tokenizer)")
    if name not in PRE_TOKENIZERS:
        raise _unsupported(gguf, f"pre-tokenizer {name!r}")
    return name, PRE_TOKENIZERS[name]


# ---------------------------------------------------------------------------- sentencepiece


def _sentencepiece(
    gguf: GGUFFile,
    tokens: list[str],
    special: Mapping[str, int],
    added: Mapping[int, AddedToken],
) -> SentencePieceBackend:
    """Build a sentencepiece model of the file's tokens; sentencepiece merges them by its rules."""
    scores = gguf.require(_PREFIX + "scores", list)
    types = gguf.metadata.get(_PREFIX + "token_type") or [1] * len(tokens)
    if len(scores) < len(tokens):
        raise ModelLoadError(f"{gguf.path}: {len(scores)} scores for {len(tokens)} tokens")
    model = new_model_proto()
    unknown = special["unk_token"]
    num_bytes = 0
    in_model = dict(added)
    for i, token in enumerate(tokens):
        kind = types[i] if types[i] in _TYPES else NORMAL
        if i == unknown:
            kind = UNKNOWN
        elif kind == UNKNOWN:
            kind = CONTROL
        elif kind == USER_DEFINED and SPACE in token:
            # Written with sentencepiece's sign for a space it is not found in a raw text, but
            # sentencepiece finds it in what it makes of the text (Gemma's runs of spaces).
            in_model.pop(i, None)
        elif i in added:
            kind = CONTROL
        num_bytes += kind == BYTE
        model.pieces.add(piece=token, score=scores[i], type=kind)
    if num_bytes not in (0, _NUM_BYTES):
        raise ModelLoadError(f"{gguf.path}: {num_bytes} tokens are bytes; there must be 256")
    model.trainer_spec.model_type = BPE
    model.trainer_spec.byte_fallback = num_bytes > 0
    model.trainer_spec.unk_piece = tokens[unknown]
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.remove_extra_whitespaces = False
    has_prefix = gguf.metadata.get(_PREFIX + "add_space_prefix", True)
    before, after = _surrounding(gguf, special, adds_bos=True)
    rules = SentencePieceRules(
        prefix=PrefixSpace.ALWAYS if has_prefix else PrefixSpace.NEVER,
        added=in_model,
        before=before,
        after=after,
    )
    return SentencePieceBackend(model, rules, f"GGUF {_SPM} (SentencePiece BPE)")
