"""Tokens as a folder's settings name them: by their text, or by an object with text and flags.

Whatever stands in the files, what is returned can be given to the `tokenizers` library.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minserve.errors import ModelLoadError

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
MORE_SPECIAL = ("additional_special_tokens", "extra_special_tokens")
# CodeLlama's signs for filling in.
FILLING_NAMES = ("prefix_token", "middle_token", "suffix_token", "eot_token")
# A list with an entry for each id is made. The largest vocabularies have some 260,000.
_MOST_IDS = 1 << 22


def check_special_tokens(path: Path, values: Mapping[str, Any]) -> None:
    """Check all entries of a settings file that name special tokens.

    Raises:
        ModelLoadError: naming the file and the entry that makes no sense.
    """
    for key in (*SPECIAL_NAMES, *FILLING_NAMES):
        special_token(path, key, values.get(key))
    for key in MORE_SPECIAL:
        value = values.get(key)
        if value is not None and not isinstance(value, list | dict):
            raise ModelLoadError(f"{path}: {key!r} should be a list of tokens, not {value!r:.80}")
        for one in listed(value):
            special_token(path, key, one)


def listed(value: Any) -> list[Any]:
    """Return the tokens of a list, or of a table of named ones."""
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def special_token(path: Path, entry: str, value: Any) -> AddedToken | None:
    """Return the special token that an entry names; ``None`` where it names none.

    Raises:
        ModelLoadError: naming the file and the entry, where it describes no token.
    """
    from tokenizers import AddedToken

    if value is None or value == "":
        return None
    if isinstance(value, str):
        return AddedToken(checked_text(path, entry, value), special=True, normalized=False)
    if not isinstance(value, dict):
        raise _no_token(path, entry, value)
    return described_token(path, entry, value | {"special": True})


def described_token(path: Path, entry: str, value: Any) -> AddedToken:
    """Return the token that an object with ``content`` and flags describes.

    Raises:
        ModelLoadError: naming the file and the entry, where it describes no token.
    """
    from tokenizers import AddedToken

    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise _no_token(path, entry, value)
    flags = ("single_word", "lstrip", "rstrip", "special")
    told = {key: bool(value.get(key, False)) for key in flags}
    told["normalized"] = bool(value.get("normalized", not told["special"]))
    return AddedToken(checked_text(path, entry, value["content"]), **told)


def checked_text(path: Path, entry: str, text: str) -> str:
    """Return the text of a token, which JSON may have written as half of a surrogate pair.

    Raises:
        ModelLoadError: where it is no text.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _no_token(path, entry, text) from None
    return text


def checked_id(path: Path, text: str, number: Any) -> int:
    """Return the id of an added token.

    Raises:
        ModelLoadError: where it cannot be one.
    """
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < _MOST_IDS:
        raise ModelLoadError(f"{path}: {number!r:.80} of {text!r:.80} is no token's id")
    return number


def _no_token(path: Path, entry: str, value: Any) -> ModelLoadError:
    return ModelLoadError(f"{path}: {value!r:.80} in {entry!r} describes no token")
