"""Vocabularies of Hugging Face folders: tokenizer.json, tokenizer.model, or vocab.json + merges.txt.

A tokenizer.json is run as it is. transformers 5 builds a new one for some classes (Llama's,
GPT-2's) and loses the file's normalizer and pre-tokenizer; the models were trained with them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minserve.engine.text.backend import RustBackend, TokenizerBackend
from minserve.engine.text.pre_tokenizers import PRE_TOKENIZERS
from minserve.engine.text.sentencepiece_backend import (
    PrefixSpace,
    SentencePieceBackend,
    SentencePieceRules,
)
from minserve.engine.text.sentencepiece_proto import BPE, CONTROL, UNIGRAM, UNKNOWN
from minserve.engine.text.tokenizer_settings import TokenizerSettings, read_settings
from minserve.engine.text.vocabulary import (
    Vocabulary,
    check_pieces,
    parse_model_proto,
)
from minserve.errors import ModelLoadError, UnsupportedModelError
from minserve.models.finding.files import refuse_pointers, unreadable

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as RustTokenizer

_JSON, _MODEL, _VOCAB, _MERGES = "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"
_LLAMA, _CODE_LLAMA, _GEMMA = "LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer"
_GPT2 = "GPT2Tokenizer"
_BYTE_LEVEL_CLASSES = {_GPT2: "gpt-2", "Qwen2Tokenizer": "qwen2"}


def has_vocabulary(folder: Path) -> bool:
    """Return whether a folder holds a vocabulary of any form that is known here."""
    return any((folder / name).is_file() for name in (_JSON, _MODEL, _VOCAB))


def load_folder(folder: Path) -> Vocabulary:
    """Load the tokenizer of a folder.

    Raises:
        ModelLoadError: where it has none, or one that is broken.
        UnsupportedModelError: where it has one of a kind that cannot be read.
    """
    settings = read_settings(folder)
    return _choose(settings)(settings)


def _vocabulary(backend: TokenizerBackend, settings: TokenizerSettings) -> Vocabulary:
    return Vocabulary(
        backend=backend,
        special_tokens={key: token.content for key, token in settings.special_tokens.items()},
        chat_templates=settings.chat_templates,
    )


def _choose(settings: TokenizerSettings) -> Callable[[TokenizerSettings], Vocabulary]:
    """Return the reader of the folder's vocabulary, as transformers 4.57 chooses among files."""
    folder = settings.folder
    has_model = (folder / _MODEL).is_file()
    # A Llama tokenizer whose settings speak of the prefix space is built from the model anew.
    rebuilt = settings.class_name == _LLAMA and settings.values.get("add_prefix_space") is not None
    # Not what transformers 5 saved: it always writes the setting, and obeys it in the file.
    if (folder / _JSON).is_file() and not (
        has_model and rebuilt and "backend" not in settings.values
    ):
        return _from_tokenizer_json
    if has_model:
        return _from_sentencepiece
    if (folder / _VOCAB).is_file() and (folder / _MERGES).is_file():
        return _from_merges
    others = [*folder.glob("*.tiktoken"), *folder.glob("tekken.json")]
    if others:
        raise UnsupportedModelError(
            f"{others[0]}: a vocabulary of this kind cannot be read; name a folder, GGUF file or "
            "hub id that has it as a tokenizer.json by --tokenizer"
        )
    raise ModelLoadError(
        f"{folder}: no tokenizer in this folder (tokenizer.json, tokenizer.model, or vocab.json "
        "and merges.txt); name where it is by --tokenizer"
    )


def _content(path: Path) -> bytes:
    """Return what is in a file that is there itself, and not git-lfs' pointer to it."""
    refuse_pointers([path])
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error


# --------------------------------------------------------------------------- tokenizer.json


def _from_tokenizer_json(settings: TokenizerSettings) -> Vocabulary:
    from tokenizers import Tokenizer as RustTokenizer

    path = settings.folder / _JSON
    data = _content(path)
    try:
        backend = RustTokenizer.from_buffer(data)
    except Exception as error:  # tokenizers raises plain Exception
        raise ModelLoadError(f"{path}: the tokenizer is broken: {error}") from error
    # What only the kind of model suggests may be an ordinary word here, such as HTML's "</s>".
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    settings = settings.within(
        (lambda text: backend.token_to_id(text) is not None)
        if settings.class_is_named
        else added.__contains__
    )
    _add_tokens(backend, settings, path)
    _set_prefix_space(backend, settings)
    _surround(backend, settings, path)
    kind = f"tokenizer.json ({type(backend.model).__name__})"
    return _vocabulary(RustBackend(backend, kind), settings)


def _from_merges(settings: TokenizerSettings) -> Vocabulary:
    """Build byte-level BPE from the files that GPT-2, OPT and Qwen2 were published with."""
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers import decoders, models

    path, name = settings.folder / _VOCAB, settings.class_name or ""
    if name not in _BYTE_LEVEL_CLASSES:
        raise UnsupportedModelError(
            f"{path}: how {name or 'this tokenizer'} uses a vocabulary with merges.txt is not "
            f"known here, only {' and '.join(_BYTE_LEVEL_CLASSES)}; add its tokenizer.json"
        )
    rule = PRE_TOKENIZERS[_BYTE_LEVEL_CLASSES[name]]
    try:
        vocab = json.loads(path.read_text(encoding="utf-8"))
        lines = (settings.folder / _MERGES).read_text(encoding="utf-8").split("\n")
        pairs = [line.split() for line in lines if line and not line.startswith("#version")]
        backend = RustTokenizer(models.BPE(vocab, [(left, right) for left, right in pairs]))
    except Exception as error:  # tokenizers raises plain Exception
        raise ModelLoadError(f"{path}: the tokenizer is broken: {error}") from error
    backend.pre_tokenizer = rule.pre_tokenizer()
    if name == _GPT2 and settings.values.get("add_prefix_space"):
        backend.pre_tokenizer = _byte_level(add_prefix_space=True)
    if (normalizer := rule.normalizer()) is not None:
        backend.normalizer = normalizer
    backend.decoder = decoders.ByteLevel()
    settings = settings.within(lambda text: text in vocab)
    _add_tokens(backend, settings, path)
    # Of these classes only GPT-2's knows the setting (OPT has it), and only in this form.
    if name == _GPT2 and settings.values.get("add_bos_token"):
        _put_around(backend, settings, path, bos=True, eos=False)
    return _vocabulary(RustBackend(backend, "vocab.json + merges.txt (BPE)"), settings)


def _add_tokens(backend: RustTokenizer, settings: TokenizerSettings, path: Path) -> None:
    """Add the tokens that the settings have and the vocabulary lacks, or has otherwise."""
    in_file = backend.get_added_tokens_decoder()
    known = {repr(token) for token in in_file.values()}
    special = {token.content for token in _all_special(settings)}
    # What the older added_tokens.json says does not count where tokenizer.json says it better.
    older = in_file if "added_tokens_decoder" not in settings.values else {}
    tokens = [
        t for i, t in settings.added_tokens.items() if repr(t) not in known and i not in older
    ]
    have = {t.content for t in in_file.values()}
    have |= {t.content for t in tokens}
    for token in _all_special(settings):
        if token.content not in have:
            have.add(token.content)
            tokens.append(token)
    for token in tokens:
        token.special = token.special or token.content in special
    backend.add_tokens(tokens)
    for i, token in settings.added_tokens.items():
        found = backend.token_to_id(token.content)
        if found != i:
            raise ModelLoadError(
                f"{path}: token {token.content!r} has id {found} here, but {i} in the folder's "
                "tokenizer_config.json or added_tokens.json; one of the files is another model's"
            )


def _all_special(settings: TokenizerSettings) -> Iterable[AddedToken]:
    return [*settings.special_tokens.values(), *settings.more_special]


def _byte_level(add_prefix_space: bool, use_regex: bool = True) -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=use_regex)


def _set_prefix_space(backend: RustTokenizer, settings: TokenizerSettings) -> None:
    """Let the setting override that of a byte-level pre-tokenizer that stands alone.

    All classes but Llama's set it to false where nothing is said; those of transformers 5, which
    marks what it wrote, do not.
    """
    is_kept = settings.class_name == _LLAMA or "backend" in settings.values
    default = None if is_kept else False
    wanted = settings.values.get("add_prefix_space", default)
    if backend.pre_tokenizer is None or wanted is None:
        return
    state = json.loads(backend.pre_tokenizer.__getstate__())
    if state["type"] == "ByteLevel" and state["add_prefix_space"] != wanted:
        backend.pre_tokenizer = _byte_level(wanted, state.get("use_regex", True))


def _surround(backend: RustTokenizer, settings: TokenizerSettings, path: Path) -> None:
    """Put around each text what the settings or a class that is named say; else the file counts."""
    surrounding = settings.surrounding()
    if surrounding is None:
        return
    bos, eos = surrounding
    if not (settings.class_is_named or settings.tells_surrounding):
        return
    # A class that wants a BOS before each text, of a vocabulary that lacks the class's BOS.
    told = {"bos_token", "add_bos_token"} & settings.values.keys()
    if bos and not eos and not told and "bos_token" not in settings.special_tokens:
        return
    _put_around(backend, settings, path, bos=bos, eos=eos)


def _put_around(
    backend: RustTokenizer, settings: TokenizerSettings, path: Path, *, bos: bool, eos: bool
) -> None:
    """Put special tokens around each text."""
    from tokenizers import processors

    tokens = {
        name: _needed(settings, name, path).content
        for name, wanted in (("bos_token", bos), ("eos_token", eos))
        if wanted
    }
    # Written as pairs, not in one string, since a token may hold a space or a colon.
    template = [tokens.get("bos_token"), "$A", tokens.get("eos_token")]
    ids = {token: backend.token_to_id(token) for token in tokens.values()}
    backend.post_processor = processors.TemplateProcessing(
        single=[piece for piece in template if piece is not None],
        special_tokens=list(ids.items()),
    )


def _needed(settings: TokenizerSettings, name: str, path: Path) -> AddedToken:
    if name not in settings.special_tokens:
        raise ModelLoadError(
            f"{path.parent}: add_{name} is set, but tokenizer_config.json names no {name}"
        )
    return settings.special_tokens[name]


# -------------------------------------------------------------------------- tokenizer.model


def _from_sentencepiece(settings: TokenizerSettings) -> Vocabulary:
    path = settings.folder / _MODEL
    if settings.class_name not in (_LLAMA, _CODE_LLAMA, _GEMMA):
        raise UnsupportedModelError(
            f"{path}: how {settings.class_name or 'this model'} uses a sentencepiece model is not "
            "known here; name a folder or hub id that has it as a tokenizer.json by --tokenizer"
        )
    data = _content(path)
    model = parse_model_proto(str(path), data)
    pieces = [piece.piece for piece in model.pieces]
    check_pieces(str(path), pieces)
    settings = settings.within(set(pieces).__contains__)
    names = {BPE: "BPE", UNIGRAM: "Unigram"}
    if model.trainer_spec.model_type not in names:
        raise UnsupportedModelError(f"{path}: only models of the kinds BPE and Unigram can be read")
    added = _added_to_pieces(settings, model, path)
    ids = {piece: i for i, piece in enumerate(pieces)}
    ids |= {token.content: i for i, token in added.items()}
    bos, eos = settings.surrounding() or (False, False)
    rules = SentencePieceRules(
        prefix=_prefix_space(settings, model, path),
        added=added,
        before=(ids[_needed(settings, "bos_token", path).content],) if bos else (),
        after=(ids[_needed(settings, "eos_token", path).content],) if eos else (),
    )
    kind = f"SentencePiece {names[model.trainer_spec.model_type]}"
    try:
        return _vocabulary(SentencePieceBackend(model, rules, kind), settings)
    except (RuntimeError, ValueError) as error:
        raise ModelLoadError(f"{path}: the tokenizer is broken: {error}") from error


def _prefix_space(settings: TokenizerSettings, model: Any, path: Path) -> PrefixSpace:
    """Return where a space is put before text.

    The model's own word (Yi's says "nowhere") counts where the settings say nothing.
    """
    told = settings.values.get("add_prefix_space") if settings.class_name == _LLAMA else None
    is_legacy = settings.class_name != _LLAMA or settings.values.get("legacy") in (None, True)
    wanted = told if told is not None else model.normalizer_spec.add_dummy_prefix or not is_legacy
    if settings.class_name == _GEMMA or not wanted:
        return PrefixSpace.NEVER
    if is_legacy:
        return PrefixSpace.ALWAYS
    if model.normalizer_spec.remove_extra_whitespaces:
        raise UnsupportedModelError(
            f"{path}: 'legacy: false' in tokenizer_config.json does not go together with a model "
            "that removes spaces"
        )
    return PrefixSpace.FIRST


def _added_to_pieces(settings: TokenizerSettings, model: Any, path: Path) -> dict[int, AddedToken]:
    """Return the added tokens by id: control pieces, and what the folder adds behind them all."""
    from tokenizers import AddedToken

    ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
    added = {
        i: AddedToken(piece.piece, special=True, normalized=False)
        for i, piece in enumerate(model.pieces)
        if piece.type in (CONTROL, UNKNOWN)
    }
    for i, token in settings.added_tokens.items():
        if ids.get(token.content, i) != i or (i < len(ids) and token.content not in ids):
            raise ModelLoadError(
                f"{path}: id {i} is {model.pieces[i].piece!r} here, but {token.content!r} in the "
                "folder's tokenizer_config.json or added_tokens.json; one of the files is another "
                "model's"
                if i < len(ids)
                else f"{path}: token {token.content!r} has id {ids[token.content]} here, but {i} "
                "in the folder's tokenizer_config.json or added_tokens.json"
            )
        added[i] = token
    special = {token.content for token in _all_special(settings)}
    have = {token.content: i for i, token in added.items()}
    for token in _all_special(settings):
        if token.content in have:
            continue
        behind = max([len(ids), *(i + 1 for i in added)])
        i = ids.get(token.content, behind)
        added[i], have[token.content] = token, i
    for token in added.values():
        token.special = token.special or token.content in special
    return dict(sorted(added.items()))
