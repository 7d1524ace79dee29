"""Which tokens end an output, by a model's files.

Many GGUF files name only one of them in their metadata: Llama 3 Instruct's often have the end of a
text and not ``<|eot_id|>``, with which the model ends its answers. llama.cpp therefore knows
the others by their text (src/llama-vocab.cpp), and so does this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minserve.errors import ModelLoadError
from minserve.models.finding.generation_config import ADVICE, FILE, read_generation_config
from minserve.models.finding.json_file import read_json
from minserve.models.gguf_files.gguf_file import token_id

if TYPE_CHECKING:
    from minserve.models.gguf_files.gguf_file import GGUFFile

_ENDS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "[e~[",
)
# Filling in code: a pad, the next repository or the next file means that the filling has ended.
_FILL_ENDS = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
# Names of the tokens that a GGUF file's metadata may give ids of, and those that end an output.
_NAMED = ("bos", "eos", "eot", "eom", "unknown", "padding", *_FILL_ENDS)
_NAMED_ENDS = ("eos", "eot", "eom")


def folder_stop_tokens(folder: Path, *, generation_config: bool = True) -> frozenset[int]:
    """Return the ids that end an output by a folder's files besides those of its tokenizer.

    Those of generation_config.json are what the model was published to be run with. config.json's
    count only where it names none, as in transformers: they are often older.

    Args:
        generation_config: false leaves generation_config.json unread.

    Raises:
        ModelLoadError: naming the file and the value that is no token's id.
    """
    for name in (FILE, "config.json") if generation_config else ("config.json",):
        file = folder / name
        read = read_generation_config if name == FILE else read_json
        value = read(file).get("eos_token_id") if file.is_file() else None
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(map(_is_id, ids)):
            raise ModelLoadError(
                f"{file}: 'eos_token_id' should be a token's id or a list of them, not {value!r:.80}"
                f"{ADVICE if name == FILE else ''}"
            )
        if ids:
            return frozenset(ids)
    return frozenset()


def named_tokens(gguf: GGUFFile) -> dict[str, int]:
    """Return the ids that a GGUF file's metadata names, by names such as ``eos``.

    Raises:
        ModelLoadError: naming the file and the key whose value is no token's id.
    """
    ids = {name: token_id(gguf.metadata, name, gguf.path) for name in _NAMED}
    return {name: i for name, i in ids.items() if i is not None}


def named_ends(named: Mapping[str, int]) -> frozenset[int]:
    """Return those of `named_tokens` that end an output."""
    return frozenset(named[name] for name in _NAMED_ENDS if name in named)


def stop_tokens(named: Mapping[str, int], ids: Mapping[str, int]) -> frozenset[int]:
    """Return the ids of a GGUF file's vocabulary that end an output.

    Args:
        named: the ids that the file's metadata names, from `named_tokens`.
        ids: the vocabulary.
    """
    found = {ids[text] for text in _ENDS if text in ids}
    for name, texts in _FILL_ENDS.items():
        by_text = [ids[text] for text in texts if text in ids][:1]
        found.update([named[name]] if name in named else by_text)
    ends = named_ends(named)
    found |= ends
    # In these formats <|end|> ends a part of an answer, and the answer goes on.
    if "<|call|>" in ids and "<|return|>" in ids:
        found.discard(ids.get("<|end|>", -1))
    if {"<|call|>", "<|calls|>"} & ids.keys() and "<|flush|>" in ids:
        found.discard(ids.get("<|end|>", -1))
    html = ids.get("</s>", -1)
    # Gemma's answers end with other tokens, and in their text </s> is a tag of HTML.
    is_gemma = {"<end_of_turn>", "<eos>"} <= ids.keys()
    if "<|tool_response>" in ids or (is_gemma and html not in ends):
        found.discard(html)
    return frozenset(i for i in found if i < len(ids))


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
