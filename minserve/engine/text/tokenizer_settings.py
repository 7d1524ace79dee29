"""`TokenizerSettings`: what a Hugging Face folder says about its tokenizer besides the vocabulary.

It stands in tokenizer_config.json, special_tokens_map.json, added_tokens.json and the files of
chat templates. They are read as transformers 4.57 reads them, the last release whose classes
for fast tokenizers (LlamaTokenizerFast and so on) take a folder's tokenizer.json as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minserve.engine.text.named_tokens import (
    FILLING_NAMES,
    MORE_SPECIAL,
    SPECIAL_NAMES,
    check_special_tokens,
    checked_id,
    checked_text,
    described_token,
    listed,
    special_token,
)
from minserve.errors import ModelLoadError, UnsupportedModelError
from minserve.models.finding.json_file import read_json

if TYPE_CHECKING:
    from tokenizers import AddedToken


@dataclass(frozen=True)
class ClassRules:
    """What a class of transformers does beyond what the files say.

    Attributes:
        special_tokens: its special tokens where the settings do not name them.
        adds_bos: whether it puts a BOS before a text where the settings do not say; ``None``
            for a class that leaves it to tokenizer.json.
        more_special: tokens that it marks as special besides: their settings and texts.
    """

    special_tokens: Mapping[str, str]
    adds_bos: bool | None = None
    more_special: tuple[tuple[str, str], ...] = ()


_ANGLED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_END_OF_TEXT = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
CLASS_RULES: dict[str, ClassRules] = {
    "LlamaTokenizer": ClassRules(_ANGLED, adds_bos=True),
    "CodeLlamaTokenizer": ClassRules(
        _ANGLED,
        adds_bos=True,
        more_special=tuple(
            zip(FILLING_NAMES, ("▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>"), strict=True)
        ),
    ),
    "GemmaTokenizer": ClassRules(
        {
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
        },
        adds_bos=True,
    ),
    "GPT2Tokenizer": ClassRules(_END_OF_TEXT),
    "CodeGenTokenizer": ClassRules(_END_OF_TEXT),
    "Qwen2Tokenizer": ClassRules(
        dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    ),
    "GPTNeoXTokenizer": ClassRules(_END_OF_TEXT, adds_bos=False),
    "CohereTokenizer": ClassRules(
        {
            "bos_token": "<BOS_TOKEN>",
            "eos_token": "<|END_OF_TURN_TOKEN|>",
            "unk_token": "<UNK>",
        },
        adds_bos=True,
    ),
}
_NO_CLASS = ClassRules({})
# The class that transformers takes for a model whose files name none.
_CLASS_OF_MODEL = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "phi3"), "LlamaTokenizer"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), "GemmaTokenizer"),
    **dict.fromkeys(("qwen2", "qwen3", "qwen2_moe", "qwen3_moe"), "Qwen2Tokenizer"),
    **dict.fromkeys(("opt", "gpt2", "gptj", "gpt_neo", "granite"), "GPT2Tokenizer"),
    "phi": "CodeGenTokenizer",
    "gpt_neox": "GPTNeoXTokenizer",
    "cohere": "CohereTokenizer",
}


@dataclass(frozen=True)
class TokenizerSettings:
    """A folder's settings.

    Attributes:
        class_name: transformers' class for it, without "Fast"; ``None`` where none is known.
        class_is_named: whether a file names the class; else only the kind of model suggests it.
        values: tokenizer_config.json, and what the other files add to it.
        special_tokens: names such as ``bos_token`` to tokens.
        more_special: further tokens to mark as special.
        added_tokens: tokens of the folder by id, those of tokenizer.json excepted.
        class_tokens: texts of those special tokens that the class has and no file names.
    """

    folder: Path
    class_name: str | None
    class_is_named: bool
    values: Mapping[str, Any]
    special_tokens: Mapping[str, AddedToken]
    more_special: tuple[AddedToken, ...]
    added_tokens: Mapping[int, AddedToken]
    class_tokens: frozenset[str]
    chat_templates: Mapping[str, str]

    @property
    def rules(self) -> ClassRules:
        return CLASS_RULES.get(self.class_name or "", _NO_CLASS)

    @property
    def tells_surrounding(self) -> bool:
        return "add_bos_token" in self.values or "add_eos_token" in self.values

    def within(self, has: Callable[[str], bool]) -> TokenizerSettings:
        """Return the settings without tokens that only the class has, and the vocabulary has not.

        Such a token would get a new id, which the model has never seen.

        Args:
            has: tells whether the vocabulary has a token.
        """
        lacking = {text for text in self.class_tokens if not has(text)}
        return replace(
            self,
            special_tokens={
                k: t for k, t in self.special_tokens.items() if t.content not in lacking
            },
            more_special=tuple(t for t in self.more_special if t.content not in lacking),
        )

    def surrounding(self) -> tuple[bool, bool] | None:
        """Return whether a BOS and an EOS surround a text; ``None``: tokenizer.json says it."""
        default = self.rules.adds_bos
        # transformers 5 writes its class's rule into tokenizer.json, and marks such a folder.
        if default is None or ("backend" in self.values and not self.tells_surrounding):
            return None
        return (
            bool(self.values.get("add_bos_token", default)),
            bool(self.values.get("add_eos_token", False)),
        )


def read_settings(folder: Path) -> TokenizerSettings:
    """Read a folder's settings.

    Raises:
        ModelLoadError: where a file cannot be read or contradicts itself.
        UnsupportedModelError: where the tokenizer is a program of the folder's own.
    """
    path = folder / "tokenizer_config.json"
    values = dict(_read(path))
    check_special_tokens(path, values)
    config = _read(folder / "config.json")
    class_name, is_named = _class_of(values, config)
    _refuse_own_code(folder, class_name, values, config)
    added = _added_tokens(folder, values)
    rules = CLASS_RULES.get(class_name or "", _NO_CLASS)
    by_text = {token.content: token for token in added.values()}
    told = {key: values.get(key, rules.special_tokens.get(key)) for key in SPECIAL_NAMES}
    # Some models have special tokens with names of their own, which templates may use.
    named = values.get(MORE_SPECIAL[1])
    special = {k: t for k, v in told.items() if (t := special_token(path, k, v)) is not None}
    special = {key: by_text.get(token.content, token) for key, token in special.items()}
    if isinstance(named, dict):
        special |= {k: t for k, v in named.items() if (t := special_token(path, k, v)) is not None}
    more = [(key, one) for key in MORE_SPECIAL for one in listed(values.get(key))]
    more += [(key, values.get(key, default)) for key, default in rules.more_special]
    more_special = [(k, t) for k, v in more if (t := special_token(path, k, v)) is not None]
    in_files = {t.content for key, t in (*special.items(), *more_special) if key in values}
    of_class = (*rules.special_tokens.items(), *rules.more_special)
    return TokenizerSettings(
        folder=folder,
        class_name=class_name,
        class_is_named=is_named,
        values=values,
        special_tokens=special,
        more_special=tuple(token for _, token in more_special),
        added_tokens=dict(sorted(added.items())),
        class_tokens=frozenset(text for _, text in of_class) - in_files - by_text.keys(),
        chat_templates=_chat_templates(folder, values),
    )


def _class_of(values: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[str | None, bool]:
    """Return the class of a folder's tokenizer, and whether a file names it."""
    named = values.get("tokenizer_class") or config.get("tokenizer_class")
    kind = config.get("model_type")
    name = named or (_CLASS_OF_MODEL.get(kind) if isinstance(kind, str) else None)
    return name.removesuffix("Fast") if isinstance(name, str) else None, bool(named)


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _refuse_own_code(
    folder: Path, class_name: str | None, values: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    """Refuse a tokenizer that only a program in the folder can run."""
    for file, auto_map in (("tokenizer_config.json", values), ("config.json", config)):
        names = auto_map.get("auto_map")
        code = names.get("AutoTokenizer") if isinstance(names, dict) else names
        if code and class_name not in CLASS_RULES and class_name != "PreTrainedTokenizer":
            raise UnsupportedModelError(
                f"{folder / file}: the tokenizer {class_name} is code of the model's own, which "
                "is not run here; name a folder, GGUF file or hub id with the same vocabulary as "
                "a tokenizer.json by --tokenizer"
            )


def _added_tokens(folder: Path, values: dict[str, Any]) -> dict[int, AddedToken]:
    """Return the added tokens by id. Older files' special tokens are put into ``values``."""
    path = folder / "tokenizer_config.json"
    if "added_tokens_decoder" in values:
        decoder, entry = values["added_tokens_decoder"], "added_tokens_decoder"
        try:
            ids = {key: int(key) for key in decoder}
            tokens = {key: described_token(path, entry, one) for key, one in decoder.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise ModelLoadError(f"{path}: 'added_tokens_decoder' makes no sense") from error
        return {checked_id(path, tokens[key].content, i): tokens[key] for key, i in ids.items()}
    _merge_older(folder / "special_tokens_map.json", values)
    names = (*SPECIAL_NAMES, *MORE_SPECIAL)
    special = {
        token.content
        for key in names
        for value in (listed(values.get(key)) if key in MORE_SPECIAL else [values.get(key)])
        if (token := special_token(path, key, value)) is not None
    }
    from tokenizers import AddedToken

    path = folder / "added_tokens.json"
    found: dict[int, AddedToken] = {}
    for text, number in _read(path).items():
        i = checked_id(path, checked_text(path, text, text), number)
        if i in found:
            raise ModelLoadError(f"{path}: id {i} of {text!r} is also another token's")
        found[i] = AddedToken(text, special=text in special, normalized=text not in special)
    return found


def _merge_older(path: Path, values: dict[str, Any]) -> None:
    """Put the special tokens of special_tokens_map.json into ``values``."""
    older = _read(path)
    check_special_tokens(path, older)
    for key, value in older.items():
        if key == MORE_SPECIAL[0] and isinstance(value, list):
            value = [*listed(values.get(key)), *value]
        values[key] = value


def _chat_templates(folder: Path, values: Mapping[str, Any]) -> dict[str, str]:
    """Return the templates by name. Files of their own come before tokenizer_config.json."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {p.stem: p for p in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    try:
        found = {name: p.read_text(encoding="utf-8") for name, p in files.items() if p.is_file()}
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{folder}: a chat template cannot be read: {error}") from error
    if found:
        return found
    value = values.get("chat_template") or _read(folder / "chat_template.json").get("chat_template")
    if isinstance(value, str):
        return {"default": value}
    named = value if isinstance(value, list) else []
    try:
        return {str(entry["name"]): str(entry["template"]) for entry in named}
    except (KeyError, TypeError) as error:
        path = folder / "tokenizer_config.json"
        raise ModelLoadError(f"{path}: 'chat_template' holds no templates by name") from error
