"""The intake of a controller, for tests of engines that run what others took in."""

from __future__ import annotations

import time

from minserve.engine.intake import Intake
from minserve.engine.relay import RelayEngine


def intake_for(relay: RelayEngine) -> Intake:
    """An intake whose requests the engine can run."""
    intake = Intake(
        relay.config,
        relay.tokenizer,
        max_model_len=relay.max_model_len,
        vocab_size=relay.vocab_size,
        clock=time.monotonic,
        sampling_defaults={},
    )
    intake.perf_model = relay.perf_model
    return intake
