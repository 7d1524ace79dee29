"""Some special tokens can stay in the text while the others are left out."""

from __future__ import annotations

from pathlib import Path

from minserve import Engine, SamplingParams
from minserve.engine.text.tokenizer import Tokenizer
from minserve.models.finding.source import find_model

START, END = "<|im_start|>", "<|im_end|>"


def test_the_others_are_left_out(tiny_llama_dir: Path) -> None:
    tokenizer = Tokenizer.load(find_model(str(tiny_llama_dir)))
    start, end = tokenizer.special_id(START), tokenizer.special_id(END)
    assert start is not None
    assert end is not None
    assert tokenizer.special_id("the") is None
    ids = [start, *tokenizer.encode("Grüße", add_special_tokens=False), end]
    decode = tokenizer.decoder([END, "the", "no such token"])
    assert decode(ids, True) == f"Grüße{END}"
    assert decode(ids, False) == f"{START}Grüße{END}"
    assert tokenizer.decoder([])(ids, True) == tokenizer.decoder(["the"])(ids, True) == "Grüße"


def test_an_output_has_them(tiny_llama_dir: Path) -> None:
    engine = Engine(str(tiny_llama_dir), device="cpu", threads=1, num_blocks=16)
    start = engine.tokenizer.special_id(START)
    assert start is not None
    texts = [
        engine.generate("Hi", SamplingParams(max_tokens=2, allowed_token_ids=(start,), **more))[0]
        .outputs[0]
        .text
        for more in ({}, {"preserved_tokens": (START,)}, {"preserved_tokens": (END,)})
    ]
    assert texts == ["", 2 * START, ""]
