"""Bad words as token sequences: what an output must not hold, in the tokens that would spell it."""

from __future__ import annotations

from collections.abc import Iterable

from minserve.engine.text.tokenizer import Tokenizer
from minserve.prompts import BadWordIds


def bad_word_ids(words: Iterable[str], tokenizer: Tokenizer, vocab_size: int) -> BadWordIds:
    """Return the token sequences of bad words, each as the tokenizer writes it.

    As in vLLM, a word stands for itself at the beginning of a text and behind a space, whether
    it is written with a leading space or not: most vocabularies have tokens of their own for
    words behind a space. Another way to spell it, such as one letter a token, is not banned.

    Args:
        vocab_size: the width of the model's logits; what has a token beyond it cannot come.
    """
    sequences = {}
    for word in words:
        stripped = word.lstrip(" ")
        for text in (stripped, f" {stripped}") if stripped else (word,):
            ids = tuple(tokenizer.encode(text, add_special_tokens=False))
            if ids and max(ids) < vocab_size:
                sequences[ids] = True
    return tuple(sequences)
