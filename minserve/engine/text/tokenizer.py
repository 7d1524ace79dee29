"""`Tokenizer` turns text into token ids and back. It knows nothing of requests or models.

It works on the Rust tokenizer itself (`tokenizers.Tokenizer`), not on transformers' wrapper
around it: the wrapper sets truncation and padding on each call, which fails with "Already
borrowed" when another thread is using the tokenizer. `encode`, `decode` and the rest only
read, so one `Tokenizer` may be used from any number of threads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minserve.errors import InvalidRequestError, ModelLoadError, UnsupportedModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

    from minserve.models.gguf_file import GGUFFile
    from minserve.models.source import ModelSource

# The pattern by which Llama 3 cuts text before merging, as published in its tokenizer.json.
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_NAMES = ("llama-bpe", "llama3")
# ggml's token types.
_CONTROL, _USER_DEFINED = 3, 4
# Characters from which on tokenizing takes milliseconds.
_LONG_TEXT = 10_000
_BYTE_LEVEL, _SENTENCEPIECE = "ByteLevel", "SentencePiece"


class Tokenizer:
    """A model's vocabulary, special tokens and chat template.

    Attributes:
        vocab_size: number of tokens, added ones included. A model's own vocabulary may be
            padded beyond it; such ids decode to nothing.
        eos_token_ids: every id that ends an output by the model's own word.
        bos_token_id: the id that begins a text, where the model has one.
        max_token_bytes: no token stands for more bytes of UTF-8 than this.
    """

    def __init__(
        self,
        backend: RustTokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        eos_token_ids: Iterable[int] = (),
        chat_template: str | None = None,
    ) -> None:
        """Wrap a Rust tokenizer.

        Args:
            special_tokens: names as in ``bos_token``, ``eos_token`` to the tokens' text;
                chat templates see them under these names.
            eos_token_ids: ids that end an output, besides that of ``eos_token``.
        """
        # Files of embedding models may carry either; here both would cut or fill prompts.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._special_tokens = dict(special_tokens or {})
        self._chat_template = chat_template
        self._added = backend.get_added_tokens_decoder()
        self._alphabet = _alphabet(backend)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.max_token_bytes: int = max(
            len(token if self._alphabet == _BYTE_LEVEL else token.encode())
            for token in backend.get_vocab(with_added_tokens=True)
        )
        self.bos_token_id = self._special_id("bos_token")
        eos = self._special_id("eos_token")
        self.eos_token_ids = frozenset(eos_token_ids) | ({eos} if eos is not None else set())

    def has_vocabulary_of(self, other: Tokenizer) -> bool:
        """Return whether every token has the same id in both."""
        mine, theirs = (t._backend.get_vocab(with_added_tokens=True) for t in (self, other))
        return mine == theirs

    @classmethod
    def load(cls, source: ModelSource, tokenizer: str | None = None) -> Tokenizer:
        """Load a model's tokenizer.

        Args:
            source: the model; its files say which tokens end an output.
            tokenizer: a folder, ``.gguf`` file or hub id to take the tokenizer from instead.

        Raises:
            ModelLoadError: where there is no tokenizer, or it cannot be read.
        """
        from minserve.models.gguf_file import GGUFFile

        gguf = GGUFFile(source.gguf_file) if source.gguf_file is not None else None
        eos = _eos_of_gguf(gguf) if gguf else _eos_of_folder(source.config_dir)
        if tokenizer is not None and tokenizer.endswith(".gguf"):
            return _from_gguf(GGUFFile(Path(tokenizer)), eos)
        if tokenizer is None and gguf is not None:
            return _from_gguf(gguf, eos)
        return _from_transformers(tokenizer or str(source.config_dir), eos)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which Hugging Face's libraries read."""
        self._backend.save(str(folder / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self._special_tokens,
        }
        if self._chat_template is not None:
            settings["chat_template"] = self._chat_template
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text; special tokens written out in it become single ids.

        Args:
            add_special_tokens: add what the model wants around a text (often a BOS).
        """
        if len(text) < _LONG_TEXT:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        # The batch call lets other threads run meanwhile, which a single `encode` does not.
        [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids. Bytes that are no UTF-8 (yet) become U+FFFD."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """Return one token as text, with its leading space; special tokens as they are written."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the exact bytes of one token, perhaps part of a character; empty if unknown."""
        added = self._added.get(token_id)
        if added is not None:
            return added.content.encode()
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._alphabet == _BYTE_LEVEL:
            return bytes(_BYTE_OF_CHAR[c] for c in token if c in _BYTE_OF_CHAR)
        if self._alphabet == _SENTENCEPIECE:
            if len(token) == 6 and token.startswith("<0x"):
                return bytes([int(token[3:5], 16)])
            return token.replace("▁", " ").encode()
        return self._backend.decode([token_id], skip_special_tokens=False).encode()

    @property
    def has_chat_template(self) -> bool:
        """True where the model says how a conversation is written as a prompt."""
        return self._chat_template is not None

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
        """Write a conversation as a prompt, by the model's chat template.

        The template runs in jinja2's sandbox. Special tokens are part of the result, so
        encode it with ``add_special_tokens=False``.

        Args:
            messages: dicts with ``role`` and ``content``, in order.
            kwargs: further variables of the template; ``add_generation_prompt`` is true
                unless it is given.

        Raises:
            InvalidRequestError: where the model has no template, or the template refuses
                the messages or fails on them.
        """
        if self._chat_template is None:
            raise InvalidRequestError(
                "this model has no chat template, so it cannot answer chats; "
                "send a text prompt instead",
                "messages",
            )
        from transformers.utils.chat_template_utils import render_jinja_template

        variables = {"add_generation_prompt": True, **self._special_tokens, **kwargs}
        try:
            # Typed as one text, but it is the texts and where the answers in them stand.
            texts = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                chat_template=self._chat_template,
                **variables,
            )[0]
        except Exception as error:  # a template is a program and can raise anything
            raise InvalidRequestError(
                f"the model's chat template refused the messages: {error}", "messages"
            ) from error
        return texts[0]

    def _special_id(self, name: str) -> int | None:
        token = self._special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)


def _byte_of_char() -> dict[str, int]:
    """Return GPT-2's alphabet: printable Latin-1 bytes as themselves, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


_BYTE_OF_CHAR = _byte_of_char()


def _alphabet(backend: RustTokenizer) -> str | None:
    """Return how the vocabulary spells bytes, which its decoder tells."""
    decoder = backend.decoder.__getstate__().decode() if backend.decoder else ""
    if '"ByteLevel"' in decoder:
        return _BYTE_LEVEL
    return _SENTENCEPIECE if "▁" in decoder else None


# ------------------------------------------------------------------------------------ loading


def _eos_of_gguf(gguf: GGUFFile) -> set[int]:
    ids = (gguf.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    return {i for i in ids if i is not None}


def _eos_of_folder(folder: Path) -> set[int]:
    """Return the ids in generation_config.json and config.json, each an int or a list there."""
    from minserve.models.json_file import read_json

    ids: set[int] = set()
    for file in (folder / "generation_config.json", folder / "config.json"):
        value = read_json(file).get("eos_token_id") if file.is_file() else None
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return ids


def _from_transformers(where: str, eos: set[int]) -> Tokenizer:
    """Load from a folder or hub id; transformers knows all the file formats."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except Exception as error:  # depends on which of many loaders failed
        raise ModelLoadError(f"{where}: the tokenizer cannot be loaded: {error}") from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModelError(
            f"{where}: tokenizer {type(loaded).__name__} has no tokenizer.json form"
        )
    template = loaded.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return Tokenizer(
        backend,
        special_tokens={k: str(v) for k, v in loaded.special_tokens_map.items()},
        eos_token_ids=eos,
        chat_template=template,
    )


def _from_gguf(gguf: GGUFFile, eos: set[int]) -> Tokenizer:
    """Build the tokenizer that a GGUF file's metadata describes.

    transformers can convert it too, but takes 8 s for a vocabulary of 49152 and leaves out
    the pre-tokenizer that the file names, which changes tokens (runs of spaces before digits).
    """
    get = gguf.metadata.get
    tokens = gguf.require("tokenizer.ggml.tokens", list)
    special = {
        f"{name}_token": tokens[index]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if isinstance(index := get(f"tokenizer.ggml.{key}_token_id"), int) and index < len(tokens)
    }
    kind = gguf.require("tokenizer.ggml.model", str)
    builders = {"gpt2": _byte_level_bpe, "llama": _sentencepiece_bpe}
    if kind not in builders:
        raise _unsupported(gguf, f"model {kind!r}")
    try:
        backend = builders[kind](gguf, tokens)
        _add_special_tokens(backend, gguf, tokens, special)
    except ModelLoadError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise ModelLoadError(f"{gguf.path}: the tokenizer is broken: {error}") from error
    return Tokenizer(
        backend,
        special_tokens=special,
        eos_token_ids=eos,
        chat_template=get("tokenizer.chat_template"),
    )


def _unsupported(gguf: GGUFFile, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{gguf.path}: GGUF tokenizer with {what} is not supported; "
        "name a folder or hub id with the model's tokenizer"
    )


def _byte_level_bpe(gguf: GGUFFile, tokens: list[str]) -> RustTokenizer:
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers import decoders, models

    merges = [tuple(m.split(" ", 1)) for m in gguf.require("tokenizer.ggml.merges", list)]
    name = gguf.metadata.get("tokenizer.ggml.pre", "unnamed")
    vocab = {token: i for i, token in enumerate(tokens)}
    # Llama 3 takes a word that is a token whole, whether or not merges lead to it.
    ignore_merges = name in _LLAMA3_NAMES
    backend = RustTokenizer(models.BPE(vocab, merges, ignore_merges=ignore_merges))
    backend.pre_tokenizer = _pre_tokenizer(gguf, name)
    backend.decoder = decoders.ByteLevel()
    return backend


def _pre_tokenizer(gguf: GGUFFile, name: str) -> PreTokenizer:
    """Return how text is cut before merging, by llama.cpp's name for it."""
    from tokenizers import Regex, pre_tokenizers

    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "smollm":
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    if name in _LLAMA3_NAMES:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_LLAMA3_PATTERN), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    raise _unsupported(gguf, f"pre-tokenizer {name!r}")


def _sentencepiece_bpe(gguf: GGUFFile, tokens: list[str]) -> RustTokenizer:
    """Return Llama 2's kind: SentencePiece's BPE, whose merges follow from the tokens' scores."""
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers import decoders, models, normalizers

    scores = gguf.require("tokenizer.ggml.scores", list)
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = tokens[gguf.metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    backend = RustTokenizer(
        models.BPE(
            vocab,
            _merges_from_scores(vocab, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = gguf.metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _merges_from_scores(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Return every split of a token into two tokens, best resulting token first."""
    found = []
    for token, index in vocab.items():
        for cut in range(1, len(token)):
            left, right = vocab.get(token[:cut]), vocab.get(token[cut:])
            if left is not None and right is not None:
                found.append((-scores[index], left, right, token[:cut], token[cut:]))
    return [(left, right) for *_, left, right in sorted(found)]


def _add_special_tokens(
    backend: RustTokenizer, gguf: GGUFFile, tokens: list[str], special: Mapping[str, str]
) -> None:
    """Mark control and user-defined tokens as never split, and set what surrounds a text."""
    from tokenizers import AddedToken, processors

    types = gguf.metadata.get("tokenizer.ggml.token_type") or []
    for kind, add in ((_CONTROL, backend.add_special_tokens), (_USER_DEFINED, backend.add_tokens)):
        marked = (t for t, its_kind in zip(tokens, types, strict=False) if its_kind == kind)
        add([AddedToken(t, normalized=False, special=kind == _CONTROL) for t in marked])
    # Where the file does not say, llama.cpp adds a BOS for these two kinds.
    default = gguf.metadata["tokenizer.ggml.model"] == "llama" or (
        gguf.metadata.get("tokenizer.ggml.pre") in _LLAMA3_NAMES
    )
    around = {
        name: special[name]
        for name, wanted in (
            ("bos_token", gguf.metadata.get("tokenizer.ggml.add_bos_token", default)),
            ("eos_token", gguf.metadata.get("tokenizer.ggml.add_eos_token", False)),
        )
        if wanted and name in special
    }
    if around:
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join(filter(None, [around.get("bos_token"), "$A", around.get("eos_token")])),
            special_tokens=[(t, backend.token_to_id(t)) for t in set(around.values())],
        )
