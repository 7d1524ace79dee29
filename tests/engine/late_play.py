"""A core on a late device, and what was told of its requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from late_device import END, LateDevice, expected_tokens

from minserve.engine.block_pool import BlockPool
from minserve.engine.core import EngineCore
from minserve.engine.speculation.proposer import NgramProposer
from minserve.outputs import OutputDelta
from minserve.planner.policies.registry import make_planner
from minserve.planner.predict.perf_model import PerfModel, Piece
from minserve.request import FinishReason, Request, Sequence
from minserve.sampling_params import SamplingParams
from minserve.slo.objectives import SLO

BLOCK = 4
DEVICE = (Piece(tokens=0.002, seqs=0.0005, context_tokens=1e-6, base=0.01, draft_tokens=1e-5),)


class TickingClock:
    """A clock that goes on a little whenever it is read."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


class Play:
    """A core on a late device, and what was told of its requests."""

    def __init__(
        self,
        policy: str = "sarathi",
        *,
        num_blocks: int = 60,
        max_num_seqs: int = 8,
        drafts: int = 0,
        ahead: bool = True,
        fails: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.device = LateDevice(BLOCK, fails)
        self.core = EngineCore(
            self.device,
            BlockPool(num_blocks, BLOCK),
            make_planner(policy, model=PerfModel(DEVICE)),
            token_budget=16,
            max_num_seqs=max_num_seqs,
            max_model_len=num_blocks * BLOCK,
            clock=TickingClock(),
            proposer=NgramProposer(drafts) if drafts else None,
            plans_ahead=True,
            launches_ahead=ahead,
        )
        self.told: dict[tuple[str, int], list[int]] = {}
        self.ends: dict[tuple[str, int], OutputDelta] = {}
        self.requests: dict[str, Request] = {}

    def add(self, name: str, prompt: list[int], slo: SLO | None = None, **params: Any) -> None:
        request = Request(
            request_id=name,
            prompt_token_ids=tuple(prompt),
            params=SamplingParams(**params),
            seed=int(name),
            arrival_s=self.core.clock(),
            stop_token_ids=frozenset({END}),
            slo=slo,
            targets=None if slo is None else slo.resolve(0.0, 0.0),
        )
        self.requests[name] = request
        for index in range(request.params.n):
            self.told[name, index] = []
            self.core.add(Sequence(request, index), None)

    def take(self, deltas: list[OutputDelta]) -> None:
        for delta in deltas:
            key = (delta.request_id, delta.index)
            assert key not in self.ends, "told behind the end"
            self.told[key] += delta.token_ids
            if delta.finish_reason is not None:
                self.ends[key] = delta

    def step(self) -> None:
        self.take(self.core.step())
        self.check_books()

    def check_books(self) -> None:
        """The pool's books add up, and blocks that others may find hold the KV that is said."""
        self.core.check_integrity()
        for entry in self.core.pool._index.values():
            for place, token in enumerate(entry.token_ids):
                assert self.device.kv[entry.block, place][-1] == token

    def run(self) -> None:
        while self.core.has_work:
            self.step()
        self.check_idle()

    def check_idle(self) -> None:
        assert self.ends.keys() == self.told.keys()
        assert self.core.pool.num_free_blocks == self.core.pool.num_blocks
        self.core.check_integrity()

    def check_tokens(self) -> None:
        """Each output is what it should be, or what had come of it when it was cut off."""
        for (name, index), told in self.told.items():
            expected = expected_tokens(self.requests[name], index)
            reason = self.ends[name, index].finish_reason
            if reason in (FinishReason.ABORT, FinishReason.ERROR):
                expected = expected[: len(told)]
            assert told == expected, (name, index, reason)


def lasting_seed(num: int, ends_at: int | None = None) -> int:
    """A seed whose output behind prompt [1] has ``num`` tokens, with its end there or beyond."""
    for seed in range(100_000):
        request = Request(request_id="x", prompt_token_ids=(1,), params=SamplingParams(max_tokens=num),
                          seed=seed, arrival_s=0.0)  # fmt: skip
        tokens = expected_tokens(request, 0)
        ends = tokens.index(END) + 1 if END in tokens else None
        if ends == ends_at:
            return seed
    raise AssertionError("no such seed")
