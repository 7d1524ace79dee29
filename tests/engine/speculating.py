"""What the tests of speculation share: engines on trained pairs, oracles, and steps by hand."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from typing import Any

import torch

from minserve import Engine, SamplingParams
from minserve.engine.device.batch_tensors import Chunk
from minserve.engine.device.paged_model import PagedModel
from minserve.engine.speculation.proposal import Proposal
from minserve.engine.speculation.proposer import DraftRequest, Proposer
from minserve.outputs import CompletionOutput, OutputDelta
from minserve.planner.predict.perf_model import PerfModel, Piece
from minserve.request import Sequence

SETTINGS = {"dtype": "float32", "threads": 1, "token_budget": 256, "max_num_seqs": 16, "num_blocks": 300,
            "block_size": 8, "max_speculation": 6}  # fmt: skip
# Drafts cost next to nothing and each iteration the same, so that they nearly always pay.
DEVICE = (Piece(tokens=1e-9, base=0.01),)
PROMPTS = [
    "import os\nimport sys\n\n",
    "def read(self, path):\n    ",
    "class Error(Exception):",
    "x",
    "for name in names:\n        self.assertEqual(name, self.name)\n" * 3,
    "return [i for i in range(10) if i % 2 == 0 and i > 3]",
]
GREEDY = SamplingParams(temperature=0.0, max_tokens=16)
SEEDED = SamplingParams(temperature=0.8, seed=11, max_tokens=16)


def make_engine(pair: Any, how: str = "off", policy: str = "sarathi", **settings: Any) -> Engine:
    """An engine on the pair's target that speculates by ``how``: draft, ngram or off."""
    settings = {**SETTINGS, "policy": policy, "speculator": how, **settings}
    if how == "draft":
        settings.setdefault("draft_model", str(pair.draft))
    engine = Engine(str(pair.target), **settings)
    if policy in ("dp", "edf"):
        engine._core.planner.model = PerfModel(DEVICE)
    return engine


def outputs_of(
    engine: Engine,
    prompts: SequenceOf[Any] = PROMPTS,
    params: SamplingParams | list[SamplingParams] = GREEDY,
) -> list[CompletionOutput]:
    """All outputs, of all prompts."""
    found = [o for result in engine.generate(list(prompts), params) for o in result.outputs]
    assert engine._core.num_unfinished == 0
    assert engine._core.pool.num_free_blocks == engine.config.num_blocks
    engine._core.check_integrity()
    return found


def essence(outputs: list[CompletionOutput]) -> list[tuple]:
    """What must not depend on speculation."""
    return [(o.token_ids, o.text, o.finish_reason, o.stop_reason) for o in outputs]


class Oracle(Proposer):
    """Knows how each prompt goes on, and errs where it is told to.

    Args:
        known: token ids of whole texts, prompt and output.
        errs_every: every so many tokens of a text it proposes another one; 0 never errs.
    """

    name = "oracle"

    def __init__(self, max_tokens: int, known: list[list[int]], errs_every: int = 0) -> None:
        super().__init__(max_tokens)
        self._known = known
        self._errs_every = errs_every

    def limit(self, seq: Sequence) -> int:
        return self.max_tokens

    def propose(self, wanted: SequenceOf[DraftRequest]) -> dict[str, Proposal]:
        return {one.seq.seq_id: Proposal(self._next(one)) for one in wanted if one.num_tokens}

    def _next(self, one: DraftRequest) -> tuple[int, ...]:
        start = one.seq.num_tokens
        text = next(t for t in self._known if t[:start] == one.seq.token_ids)
        places = range(start, start + one.num_tokens)
        tokens = [text[p] if p < len(text) else 0 for p in places]
        every = self._errs_every
        return tuple(
            t ^ 1 if every and p % every == 0 else t for p, t in zip(places, tokens, strict=True)
        )


def with_oracle(engine: Engine, prompts: list[list[int]], outputs: list[CompletionOutput], **more):
    """The engine, from now on drafting what the outputs say."""
    known = [prompt + output.token_ids for prompt, output in zip(prompts, outputs, strict=True)]
    engine._core.proposer = Oracle(SETTINGS["max_speculation"], known, **more)
    return engine


def submit(engine: Engine, prompts: SequenceOf[Any], params: SamplingParams) -> list[Sequence]:
    """Queue requests, for stepping by hand."""
    sequences = []
    for prompt in prompts:
        submission = engine._prepare(prompt, params)
        engine._enqueue(submission)
        sequences += submission.sequences
    return sequences


def steps(engine: Engine) -> Iterator[list[OutputDelta]]:
    """Step until nothing is left to do."""
    while engine._core.has_work:
        yield engine._core.step()


def fresh_kv(model: PagedModel, token_ids: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per layer, keys and values of a text from one forward pass with a cache of its own."""
    size, dtype = model.block_size, model.kv[0].key.dtype
    num_blocks = -(-len(token_ids) // size)
    layers = range(len(model.kv))
    kv = [model.backend.allocate(num_blocks, size, dtype, model.device) for _ in layers]
    alone = PagedModel(model.model, model.backend, kv, size, model.device)
    alone.forward([Chunk(token_ids, 0, list(range(num_blocks)))], 0)
    return [read_kv(layer, list(range(num_blocks)), len(token_ids)) for layer in kv]


def read_kv(layer: Any, block_table: list[int], num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a sequence's first tokens."""
    return tuple(t[block_table].flatten(0, 1)[:num].clone() for t in (layer.key, layer.value))


def assert_kv_is_fresh(model: PagedModel, seq: Sequence, num: int) -> None:
    """The cache holds, for a sequence's first tokens, what one pass over them gives."""
    if num <= 0:
        return
    expected = fresh_kv(model, seq.token_ids[:num])
    for layer, (key, value) in zip(model.kv, expected, strict=True):
        got_key, got_value = read_kv(layer, seq.block_table, num)
        torch.testing.assert_close(got_key, key, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(got_value, value, rtol=1e-3, atol=1e-4)
