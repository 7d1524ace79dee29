"""The engine on the Triton kernels: token for token what it says on plain torch (float32).

Without a GPU the kernels run in Triton's interpreter, hence the few tokens.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from speculating import GREEDY, PROMPTS, SEEDED, essence, make_engine, outputs_of

from minserve import SamplingParams


@pytest.mark.parametrize(
    ("family", "how", "params"),
    [
        ("llama", "draft", replace(GREEDY, max_tokens=8)),
        ("opt", "off", replace(SEEDED, max_tokens=6)),
    ],
)
def test_outputs_are_those_of_the_torch_backend(
    request: pytest.FixtureRequest, family: str, how: str, params: SamplingParams
) -> None:
    pair = request.getfixturevalue(f"tiny_{family}_pair")
    # Prefills in chunks, beside decodes, and too few blocks for all at once.
    tight = {"token_budget": 20, "num_blocks": 7, "max_num_seqs": 4, "max_speculation": 3}
    engine = make_engine(pair, how, attention_backend="triton", **tight)
    assert engine._core.runner.backend.name == "triton"
    want = essence(outputs_of(make_engine(pair, attention_backend="torch"), PROMPTS[:3], params))
    assert essence(outputs_of(engine, PROMPTS[:3], params)) == want
    if how == "draft":
        assert engine._core.speculation.num_accepted_tokens > 0
