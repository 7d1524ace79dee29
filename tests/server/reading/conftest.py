"""What a reader knows of the embedded model."""

from __future__ import annotations

import time

import pytest

from minserve.config import EngineConfig
from minserve.engine.intake import Intake, load_front
from minserve.server.reading.reader import Facts


@pytest.fixture(scope="session")
def facts() -> Facts:
    config = EngineConfig.create("smollm2")
    tokenizer, defaults = load_front(config)
    intake = Intake(
        config,
        tokenizer,
        max_model_len=8192,
        vocab_size=49152,
        clock=time.monotonic,
        sampling_defaults=defaults,
    )
    return Facts(
        model_name="smollm2",
        tokenizer=tokenizer,
        prompts=intake.prompts,
        max_model_len=8192,
        vocab_size=49152,
        max_queue=64,
        sampling_defaults=defaults,
        slo_classes=dict(intake.promises.classes),
        default_slo=None,
        thinking_marker=None,
    )
