"""`TokenizerSettings`: what a Hugging Face folder says about its tokenizer besides the vocabulary.

It stands in tokenizer_config.json, special_tokens_map.json, added_tokens.json and the files of
chat templates. They are read as transformers 4.57 reads them, the last release whose classes
for fast tokenizers (LlamaTokenizerFast and so on) take a folder's tokenizer.json as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minserve.errors import ModelLoadError, UnsupportedModelError
from minserve.models.finding.json_file import read_json

if TYPE_CHECKING:
    from tokenizers import AddedToken

SPECIAL_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# The last of these is transformers 5's name for the first.
_MORE_SPECIAL = ("additional_special_tokens", "extra_special_tokens")


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
            (f"{name}_token", f"▁<{text}>")
            for name, text in (
                ("prefix", "PRE"),
                ("middle", "MID"),
                ("suffix", "SUF"),
                ("eot", "EOT"),
            )
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
        class_name: transformers' class for it, without "Fast"; ``None`` where none is named.
        values: tokenizer_config.json, and what the other files add to it.
        special_tokens: names such as ``bos_token`` to tokens.
        more_special: further tokens to mark as special.
        added_tokens: tokens of the folder by id, those of tokenizer.json excepted.
    """

    folder: Path
    class_name: str | None
    values: Mapping[str, Any]
    special_tokens: Mapping[str, AddedToken]
    more_special: tuple[AddedToken, ...]
    added_tokens: Mapping[int, AddedToken]
    chat_templates: Mapping[str, str]

    @property
    def rules(self) -> ClassRules:
        return CLASS_RULES.get(self.class_name or "", _NO_CLASS)

    def surrounding(self) -> tuple[bool, bool] | None:
        """Return whether a BOS and an EOS surround a text; ``None``: tokenizer.json says it."""
        default = self.rules.adds_bos
        told = "add_bos_token" in self.values or "add_eos_token" in self.values
        # transformers 5 writes its class's rule into tokenizer.json, and marks such a folder.
        if default is None or ("backend" in self.values and not told):
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
    values = dict(_read(folder / "tokenizer_config.json"))
    config = _read(folder / "config.json")
    name = values.get("tokenizer_class") or config.get("tokenizer_class")
    name = name or _CLASS_OF_MODEL.get(config.get("model_type", ""))
    class_name = name.removesuffix("Fast") if isinstance(name, str) else None
    _refuse_own_code(folder, class_name, values, config)
    added = _added_tokens(folder, values)
    rules = CLASS_RULES.get(class_name or "", _NO_CLASS)
    by_text = {token.content: token for token in added.values()}
    special = {
        key: by_text.get(token.content, token)
        for key in SPECIAL_NAMES
        if (token := _special(folder, values.get(key, rules.special_tokens.get(key)))) is not None
    }
    # Some models have special tokens with names of their own, which templates may use.
    named = values.get(_MORE_SPECIAL[1])
    if isinstance(named, dict):
        special |= {k: t for k, v in named.items() if (t := _special(folder, v)) is not None}
    more = [t for key in _MORE_SPECIAL for t in _listed(values.get(key))]
    more += [token for key, default in rules.more_special if (token := values.get(key, default))]
    return TokenizerSettings(
        folder=folder,
        class_name=class_name,
        values=values,
        special_tokens=special,
        more_special=tuple(t for v in more if (t := _special(folder, v)) is not None),
        added_tokens=dict(sorted(added.items())),
        chat_templates=_chat_templates(folder, values),
    )


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
        decoder = values["added_tokens_decoder"]
        try:
            return {int(i): _token(path, token) for i, token in decoder.items()}
        except (AttributeError, ValueError) as error:
            raise ModelLoadError(f"{path}: 'added_tokens_decoder' makes no sense") from error
    for key, value in _read(folder / "special_tokens_map.json").items():
        if key == _MORE_SPECIAL[0] and isinstance(value, list):
            value = [*_listed(values.get(key)), *value]
        values[key] = value
    names = (*SPECIAL_NAMES, *_MORE_SPECIAL)
    special = {
        token.content
        for key in names
        for value in (_listed(values.get(key)) if key in _MORE_SPECIAL else [values.get(key)])
        if (token := _special(folder, value)) is not None
    }
    from tokenizers import AddedToken

    path = folder / "added_tokens.json"
    found: dict[int, AddedToken] = {}
    for text, i in _read(path).items():
        if not isinstance(i, int) or i in found:
            raise ModelLoadError(f"{path}: id {i!r} of {text!r} is no id, or another token's")
        found[i] = AddedToken(text, special=text in special, normalized=text not in special)
    return found


def _listed(value: Any) -> list[Any]:
    """Return the tokens of a list, or of a table of named ones."""
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _special(folder: Path, value: Any) -> AddedToken | None:
    """Return a special token that the settings name by its text or describe."""
    from tokenizers import AddedToken

    if value is None or value == "":
        return None
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    return _token(folder / "tokenizer_config.json", value | {"special": True})


def _token(path: Path, value: Any) -> AddedToken:
    from tokenizers import AddedToken

    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise ModelLoadError(f"{path}: {value!r:.80} describes no token")
    flags = ("single_word", "lstrip", "rstrip", "special")
    told = {key: bool(value.get(key, False)) for key in flags}
    told["normalized"] = bool(value.get("normalized", not told["special"]))
    return AddedToken(value["content"], **told)


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
    named = _listed(value) if isinstance(value, list) else []
    try:
        return {str(entry["name"]): str(entry["template"]) for entry in named}
    except (KeyError, TypeError) as error:
        path = folder / "tokenizer_config.json"
        raise ModelLoadError(f"{path}: 'chat_template' holds no templates by name") from error
