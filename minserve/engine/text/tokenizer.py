"""`Tokenizer` turns text into token ids and back. It knows nothing of requests or models.

`encode`, `decode` and the rest only read, so one `Tokenizer` may be used from any number of
threads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minserve.engine.text.backend import TokenizerBackend
from minserve.engine.text.chat_template import (
    DEFAULT,
    choose_template,
    pick_template,
    render,
    what_is_wrong,
)
from minserve.engine.text.folder_vocabulary import has_vocabulary, load_folder
from minserve.engine.text.gguf_vocabulary import load_gguf
from minserve.engine.text.plain_tokens import PlainTokens
from minserve.engine.text.stop_tokens import folder_stop_tokens, named_ends, named_tokens
from minserve.engine.text.template_facts import TemplateFacts, template_facts
from minserve.engine.text.text_offsets import TextOffsets, prompt_offsets
from minserve.engine.text.vocabulary import Vocabulary, are_alike
from minserve.errors import InvalidRequestError, ModelLoadError

if TYPE_CHECKING:
    from minserve.models.finding.source import ModelSource

# The metadata of a GGUF file that tells the kind of its vocabulary.
_GGUF_KIND = "tokenizer.ggml.model"
# A tokenizer's file stands for its folder: tokenizer.json, tokenizer.model, merges.txt.
_FOLDERS_FILES = (".json", ".model", ".txt")


class Tokenizer:
    """A model's vocabulary, special tokens and chat templates.

    Attributes:
        kind: a few words that name the form of the vocabulary, such as "tokenizer.json (BPE)".
        vocab_size: one more than the highest id, added tokens included. A model's own
            vocabulary may be padded beyond it; such ids decode to nothing.
        eos_token_ids: every id that ends an output by the model's own word.
        bos_token_id: the id that begins a text, where the model has one.
        chat_template_names: names of the model's chat templates; an only one is "default".
        max_token_bytes: no token stands for more bytes of UTF-8 than this.
        mark_ids: ids of tokens that are marks and no text, such as ``<|im_end|>``.
        plain_tokens: the tokens of always the same text; ``None`` where the texts of tokens depend
            on each other.
    """

    def __init__(
        self,
        backend: TokenizerBackend,
        *,
        special_tokens: Mapping[str, str] | None = None,
        eos_token_ids: Iterable[int] = (),
        chat_template: str | Mapping[str, str] | None = None,
    ) -> None:
        """Make a tokenizer of a vocabulary.

        Args:
            special_tokens: names as in ``bos_token``, ``eos_token`` to the tokens' text;
                chat templates see them under these names.
            eos_token_ids: ids that end an output, besides that of ``eos_token``.
            chat_template: the jinja template, or several by name.
        """
        if isinstance(chat_template, str):
            chat_template = {DEFAULT: chat_template}
        self._backend = backend
        self._special_tokens = dict(special_tokens or {})
        self._chat_templates = dict(chat_template or {})
        self.kind = backend.kind
        self.vocab_size = backend.vocab_size
        self.max_token_bytes = backend.max_token_bytes
        self.mark_ids = backend.mark_ids
        self.plain_tokens = (
            PlainTokens(backend.decode, backend.special_ids) if backend.texts_add_up else None
        )
        self.bos_token_id = self._special_id("bos_token")
        eos = self._special_id("eos_token")
        self.eos_token_ids = frozenset(eos_token_ids) | ({eos} if eos is not None else set())

    def has_vocabulary_of(self, other: Tokenizer) -> bool:
        """Return whether an id means the same token in both, wherever both have one."""
        return are_alike(self._backend.vocabulary(), other._backend.vocabulary())

    @classmethod
    def load(
        cls,
        source: ModelSource,
        tokenizer: str | None = None,
        *,
        chat_template: str | None = None,
        generation_config: bool = True,
    ) -> Tokenizer:
        """Load a model's tokenizer.

        Args:
            source: the model; its files say which tokens end an output.
            tokenizer: a folder, GGUF file or hub id to take the tokenizer from instead.
            chat_template: a file with the chat template to use, or the name of one of the
                model's.
            generation_config: false leaves the model's generation_config.json unread, which
                may name tokens that end an output.

        Raises:
            ModelLoadError: where there is no tokenizer, or it cannot be read.
            ConfigError: where there is no such chat template, or it cannot be read.
        """
        vocabulary = _load_vocabulary(source, tokenizer)
        templates: str | Mapping[str, str] = vocabulary.chat_templates
        if chat_template is not None:
            templates = choose_template(vocabulary.chat_templates, chat_template)
        return cls(
            vocabulary.backend,
            special_tokens=vocabulary.special_tokens,
            eos_token_ids=vocabulary.eos_token_ids | _eos_of(source, tokenizer, generation_config),
            chat_template=templates,
        )

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which Hugging Face's libraries read."""
        settings = {
            **self._backend.save(folder),
            "clean_up_tokenization_spaces": False,
            **self._special_tokens,
        }
        if self.chat_template_names == (DEFAULT,):
            settings["chat_template"] = self._chat_templates[DEFAULT]
        elif self._chat_templates:
            settings["chat_template"] = [
                {"name": name, "template": text} for name, text in self._chat_templates.items()
            ]
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text; special tokens written out in it become single ids.

        Args:
            add_special_tokens: add what the model wants around a text (often a BOS).
        """
        return self._backend.encode(text, add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids. Bytes that are no UTF-8 (yet) become U+FFFD."""
        return self._backend.decode(ids, skip_special_tokens)

    def token_of(self, text: str) -> int | None:
        """Return the id of the one token that a text is; ``None`` where it is several, or none."""
        ids = self.encode(text, add_special_tokens=False)
        return ids[0] if len(ids) == 1 else None

    def special_id(self, text: str) -> int | None:
        """Return the id of a special token by its text; ``None`` where no special token has it."""
        token_id = self._backend.token_to_id(text)
        return token_id if token_id in self._backend.special_ids else None

    def mark_id(self, text: str) -> int | None:
        """Return the id of a mark by its text; ``None`` where no mark has it."""
        token_id = self._backend.token_to_id(text)
        return token_id if token_id in self.mark_ids else None

    def decoder(self, preserved: Sequence[str] = ()) -> Callable[[Sequence[int], bool], str]:
        """Return `decode`, or one that leaves some special tokens in the text.

        Args:
            preserved: those special tokens, as they are written.
        """
        kept = {token_id for text in preserved if (token_id := self.special_id(text)) is not None}
        if not kept:
            return self.decode
        skipped, decode = self._backend.special_ids - kept, self._backend.decode

        def decode_with_them(ids: Sequence[int], skip_special_tokens: bool) -> str:
            if skip_special_tokens:
                ids = [token_id for token_id in ids if token_id not in skipped]
            return decode(ids, False)

        return decode_with_them

    def token_text(self, token_id: int) -> str:
        """Return one token as text, with its leading space; special tokens as they are written."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the exact bytes of one token, perhaps part of a character; empty if unknown."""
        return self._backend.token_bytes(token_id)

    def prompt_offsets(self, text: str | None, token_ids: Sequence[int]) -> TextOffsets:
        """Return what tells where the tokens of a prompt begin in its text.

        Args:
            text: the text as it was given; ``None`` for that of all tokens, special ones included.
        """
        return prompt_offsets(self, text, token_ids)

    def output_offsets(
        self,
        behind: Sequence[int],
        start: int,
        skip_special_tokens: bool = True,
        preserved_tokens: Sequence[str] = (),
    ) -> TextOffsets:
        """Return what tells where the tokens of an output begin in its text.

        Args:
            behind: the tokens of the prompt.
            start: the place of the output's first token.
            skip_special_tokens, preserved_tokens: as in `SamplingParams`.
        """
        return TextOffsets(
            self,
            behind=behind,
            start=start,
            skip_special_tokens=skip_special_tokens,
            preserved_tokens=preserved_tokens,
        )

    @property
    def has_chat_template(self) -> bool:
        """True where the model says how a conversation is written as a prompt."""
        return bool(self._chat_templates)

    @property
    def chat_template_names(self) -> tuple[str, ...]:
        return tuple(self._chat_templates)

    @property
    def chat_template(self) -> str:
        """The template of usual conversations; empty where there is none."""
        try:
            return pick_template(self._chat_templates, with_tools=False)
        except InvalidRequestError:
            return ""

    def broken_chat_templates(self) -> dict[str, str]:
        """Return what is wrong with those chat templates that are no valid jinja, by their names.

        Chats with one of these are refused.
        """
        problems = {name: what_is_wrong(text) for name, text in self._chat_templates.items()}
        return {name: problem for name, problem in problems.items() if problem is not None}

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
        template = pick_template(self._chat_templates, with_tools=bool(kwargs.get("tools")))
        variables = {"add_generation_prompt": True, **self._special_tokens, **kwargs}
        return render(template, messages, variables)

    def template_facts(self, *, with_tools: bool = False) -> TemplateFacts:
        """Return what the model's chat template knows, which is tried out for it.

        Args:
            with_tools: of the template for conversations with tools, where that is another one.
        """
        try:
            template = pick_template(self._chat_templates, with_tools=with_tools)
        except InvalidRequestError:
            return TemplateFacts()

        def write(messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
            own = {"add_generation_prompt": True, **self._special_tokens, **variables}
            return render(template, messages, own)

        return template_facts(template, write)

    def _special_id(self, name: str) -> int | None:
        token = self._special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)


def has_tokenizer(source: ModelSource) -> bool:
    """Return whether a model comes with a tokenizer of its own; draft models may not."""
    from minserve.models.gguf_files.gguf_file import GGUFFile

    if source.gguf_file is not None:
        return _GGUF_KIND in GGUFFile(source.gguf_file).metadata
    return has_vocabulary(source.config_dir)


def _load_vocabulary(source: ModelSource, tokenizer: str | None) -> Vocabulary:
    from minserve.models.gguf_files.gguf_file import GGUFFile

    if tokenizer is None:
        if source.gguf_file is not None:
            return load_gguf(GGUFFile(source.gguf_file))
        return load_folder(source.config_dir)
    path = Path(tokenizer).expanduser()
    if path.suffix in _FOLDERS_FILES and path.is_file():
        return load_folder(path.parent)
    if path.suffix == ".gguf" or path.is_file():
        return load_gguf(GGUFFile(path))
    return load_folder(_folder_of(tokenizer))


def _folder_of(tokenizer: str) -> Path:
    """Return the folder of a tokenizer, downloaded if it is a hub id."""
    from minserve.models.finding.hub import HUB_ID, fetch

    path = Path(tokenizer).expanduser()
    if path.is_dir():
        return path
    if HUB_ID.fullmatch(tokenizer):
        return fetch(tokenizer, weights=False)
    raise ModelLoadError(
        f"no tokenizer at {tokenizer!r}: give a folder, a .gguf file, or a hub id such as org/name"
    )


def _eos_of(source: ModelSource, tokenizer: str | None, generation_config: bool) -> frozenset[int]:
    """Return the ids that end an output by the word of the model's files besides its vocabulary."""
    from minserve.models.gguf_files.gguf_file import GGUFFile

    if source.gguf_file is None:
        return folder_stop_tokens(source.config_dir, generation_config=generation_config)
    # Its own vocabulary has them already.
    named = {} if tokenizer is None else named_tokens(GGUFFile(source.gguf_file))
    return named_ends(named)
