"""Acceptance by chance for `speculative.py`, with models of random weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from minserve import Engine
from minserve.engine.device.runner import model_runner
from minserve.engine.sampling.noise import ACCEPTANCE, uniforms, words
from minserve.engine.sampling.rows import SamplingRow
from minserve.engine.sampling.sampler import Sampler
from minserve.engine.speculation.draft_model_proposer import DraftModelProposer
from minserve.engine.speculation.proposal import Proposal, SampledToken, Verified
from minserve.engine.speculation.verification import PendingTokens
from minserve.errors import MinserveError
from minserve.request import Sequence as EngineSequence
from shared.synthetic_models import random_weights


class SyntheticSampler(Sampler):
    """Accepts each drafted token with a fixed probability, whatever the models' outputs are.

    The real verification runs too, for its cost. A draw is a function of the request's seed and
    the output position, so it does not depend on the rest of the batch.
    """

    def __init__(self, rate: float, *, fused: bool = False) -> None:
        super().__init__(fused=fused)
        self._rate = rate

    def launch(
        self,
        logits: torch.Tensor,
        seqs: list[EngineSequence],
        proposals: Sequence[Proposal | None],
    ) -> PendingTokens:
        """Do as `Sampler.launch`, except for which tokens are accepted."""
        pending = super().launch(logits, seqs, proposals)
        real = pending.results

        def results() -> list[Verified | MinserveError]:
            return [
                one if proposal is None or isinstance(one, MinserveError)
                else self._decide(one, seq, proposal.token_ids)
                for one, seq, proposal in zip(real(), seqs, proposals, strict=True)
            ]  # fmt: skip

        pending.results = results
        return pending

    def _decide(self, real: Verified, seq: EngineSequence, drafted: tuple[int, ...]) -> Verified:
        num = 0
        while num < len(drafted):
            if uniforms(words([SamplingRow(seq, drafted[:num])], [ACCEPTANCE]))[0] >= self._rate:
                break
            num += 1
        accepted = tuple(SampledToken(token, None) for token in drafted[:num])
        return Verified((*accepted, real.tokens[-1]), len(accepted))


def synthetic_loader(rate: float, device: str) -> Callable[..., Engine]:
    """Return a maker of engines with random weights, whose samplers accept at ``rate``."""

    def load(target: str, **settings: Any) -> Engine:
        with random_weights(device):
            engine = Engine(target, **settings)
        if isinstance(engine._core.proposer, DraftModelProposer):
            runner = model_runner(engine._core.runner)
            runner.sampler = SyntheticSampler(rate, fused=runner.backend.in_triton)
        return engine

    return load
