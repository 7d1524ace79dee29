"""What an `Intake` does with the prompts of one call."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest

from minserve.config import EngineConfig
from minserve.engine.intake import Intake, load_tokenizer
from minserve.sampling_params import SamplingParams


def test_what_all_prompts_of_a_call_share_is_worked_out_once(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(model=str(tiny_llama_dir))
    tokenizer = load_tokenizer(config)
    encoded: Counter[str] = Counter()
    encode = tokenizer.encode

    def counting(text: str, **options: bool) -> list[int]:
        encoded[text] += 1
        return encode(text, **options)

    monkeypatch.setattr(tokenizer, "encode", counting)
    intake = Intake(
        config,
        tokenizer,
        max_model_len=512,
        vocab_size=512,
        clock=time.monotonic,
        sampling_defaults={},
    )
    encoded.clear()
    one, other = SamplingParams(bad_words=("to", "be")), SamplingParams(bad_words=("to",))
    requests = [intake.request([token], one)[1] for token in range(1, 100)]
    assert encoded == {"to": 1, " to": 1, "be": 1, " be": 1}
    (_, different), (_, same) = intake.request([1], other), intake.request([1], one)
    assert {request.bad_word_ids for request in requests} == {same.bad_word_ids}
    assert set(different.bad_word_ids) < set(same.bad_word_ids)
