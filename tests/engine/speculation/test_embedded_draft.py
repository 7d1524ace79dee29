"""The draft that comes with the embedded model."""

from __future__ import annotations

from minserve import Engine, SamplingParams

CHATS = [
    [{"role": "user", "content": text}]
    for text in ("What is the capital of France?", "Write a Python function that adds two numbers.")
]
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True),
    SamplingParams(temperature=0.8, max_tokens=32, ignore_eos=True, seed=7),
]


def test_the_embedded_draft_helps_the_embedded_model_and_changes_nothing() -> None:
    engine = Engine(
        "smollm2", speculator="draft", policy="sarathi", dtype="float32", threads=1, num_blocks=32
    )
    proposer, engine._core.proposer = engine._core.proposer, None
    alone = [output.outputs[0].token_ids for output in engine.generate(CHATS, PARAMS)]
    engine._core.proposer = proposer
    drafted = [output.outputs[0].token_ids for output in engine.generate(CHATS, PARAMS)]
    assert drafted == alone
    assert 0 < engine.speculation_stats.num_accepted_tokens < 60
