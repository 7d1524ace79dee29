"""Names of models that other programs take, and what to give here in their place."""

from __future__ import annotations

import re

_ID = r"\w[\w.-]*/\w[\w.-]*?"
_TAG = r":\w[\w.-]*"
_HUB_ADDRESS = re.compile(
    rf"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/({_ID})(?:{_TAG}|/.*)?", re.ASCII
)
_TAGGED_ID = re.compile(rf"({_ID}){_TAG}", re.ASCII)
_OLLAMA = re.compile(rf"\w[\w.-]*{_TAG}", re.ASCII)


def foreign_name(model: str) -> str | None:
    """Return in words what to give in place of a name; ``None`` for a name of no known kind.

    Known are an address on the Hugging Face hub, ``org/name:TAG`` (llama.cpp's way to choose a GGUF
    file of a repository), and ``name:tag`` (Ollama's).
    """
    if (found := _HUB_ADDRESS.fullmatch(model)) is not None:
        return f"for the hub write {found[1]}"
    if (found := _TAGGED_ID.fullmatch(model)) is not None:
        return (
            f"a tag chooses no file here; download one with 'hf download {found[1]}' and the file's "
            "name, and give the .gguf file"
        )
    if _OLLAMA.fullmatch(model):
        return "an Ollama name: give the path of Ollama's folder or of the model's manifest"
    return None
