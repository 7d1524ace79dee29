"""Which tokens of a GGUF file end an output.

Many files name only one of them in their metadata: Llama 3 Instruct's often have the end of a
text and not ``<|eot_id|>``, with which the model ends its answers. llama.cpp therefore knows
the others by their text (src/llama-vocab.cpp), and so does this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
_KEYS = ("eos", "eot", "eom")


def stop_tokens(metadata: Mapping[str, Any], ids: Mapping[str, int]) -> frozenset[int]:
    """Return the ids that end an output, the file's own ``eos_token_id`` included where it has one.

    Args:
        metadata: of the GGUF file.
        ids: the vocabulary.
    """
    found = {ids[text] for text in _ENDS if text in ids}
    for name, texts in _FILL_ENDS.items():
        named = metadata.get(f"tokenizer.ggml.{name}_token_id")
        by_text = [ids[text] for text in texts if text in ids][:1]
        found.update([named] if named is not None else by_text)
    named_ids = (metadata.get(f"tokenizer.ggml.{key}_token_id") for key in _KEYS)
    found.update(i for i in named_ids if i is not None)
    # In these formats <|end|> ends a part of an answer, and the answer goes on.
    if "<|call|>" in ids and "<|return|>" in ids:
        found.discard(ids.get("<|end|>", -1))
    if {"<|call|>", "<|calls|>"} & ids.keys() and "<|flush|>" in ids:
        found.discard(ids.get("<|end|>", -1))
    if "<|tool_response>" in ids:
        found.discard(ids.get("</s>", -1))
    return frozenset(i for i in found if i < len(ids))
