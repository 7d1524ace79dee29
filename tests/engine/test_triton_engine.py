"""The engine as a GPU runs it: token for token what it says on plain torch (float32).

Without a GPU the kernels run in Triton's interpreter, hence the few tokens, graphs do their
work again, and inputs and results take the way that they would take there.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from padded_backend import Rerun
from speculating import GREEDY, PROMPTS, SEEDED, essence, make_engine, outputs_of

from minserve import Engine, SamplingParams
from minserve.engine.device import transfers
from minserve.engine.device.cuda_graphs import DecodeGraphs, GraphLimits
from minserve.engine.speculation.draft_model_proposer import MOST_DECODE_TOKENS, DraftModelProposer

# Prefills in chunks, beside decodes, and too few blocks for all at once.
TIGHT = {"token_budget": 20, "num_blocks": 9, "max_num_seqs": 4, "max_speculation": 3}


def as_on_a_gpu(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What loading does on a GPU, on a CPU: graphs, plans made ahead, results behind the host."""
    core = engine._core
    core.plans_ahead = True
    limits = GraphLimits(4, 20, 72, (1, 1 + core.proposer.max_tokens if core.proposer else 1))
    core.runner.graphs = DecodeGraphs(core.runner, Rerun(), limits)
    if isinstance(core.proposer, DraftModelProposer):
        paged_draft = core.proposer.model
        drafting = replace(limits, max_queries=(1, MOST_DECODE_TOKENS))
        paged_draft.graphs = DecodeGraphs(paged_draft, Rerun(), drafting)
    monkeypatch.setattr(transfers, "runs_behind", lambda _: True)


@pytest.mark.parametrize(
    ("family", "how", "policy", "params"),
    [
        ("llama", "draft", "sarathi", replace(GREEDY, max_tokens=8)),
        ("llama", "ngram", "dp", replace(SEEDED, max_tokens=6, logprobs=2, top_p=0.8)),
        ("opt", "off", "dp", replace(SEEDED, max_tokens=6)),
    ],
)
def test_outputs_are_those_of_plain_torch(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    how: str,
    policy: str,
    params: SamplingParams,
) -> None:
    pair = request.getfixturevalue(f"tiny_{family}_pair")
    want = essence(outputs_of(make_engine(pair, attention_backend="torch"), PROMPTS[:3], params))
    engine = make_engine(pair, how, policy, attention_backend="triton", **TIGHT)
    core = engine._core
    if not torch.cuda.is_available():
        as_on_a_gpu(engine, monkeypatch)
    assert core.runner.graphs is not None
    assert essence(outputs_of(engine, PROMPTS[:3], params)) == want
    # On a GPU a plan that holds is launched behind the batch that runs.
    assert core.stats.plans_ahead["held"] + core.stats.plans_ahead["launched"] > 0
    if how == "draft":
        assert core.stats.speculation.num_accepted_tokens > 0
