"""`Workbench` times batches of synthetic sequences on a core and leaves nothing behind.

The sequences' blocks are the pool's and the KV that they read was written, so that memory takes
as long as in service.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from itertools import count

import torch

from minserve.engine.batch import Scheduled
from minserve.engine.core import EngineCore
from minserve.engine.device.runner import model_runner
from minserve.engine.profile.profile_design import DRAFT_CONTEXT, ProfileBatch
from minserve.engine.speculation.proposal import Proposal
from minserve.engine.speculation.proposer import DraftRequest
from minserve.kernels.kv_quantization import raw
from minserve.request import Request, Sequence
from minserve.sampling_params import SamplingParams

# Repeats of drafting; the first of a process is slow.
DRAFT_REPEATS = 4


class Workbench:
    """Runs batches of synthetic sequences on an idle core.

    Args:
        params: the sequences' sampling settings; the default draws from the whole vocabulary.
    """

    def __init__(self, core: EngineCore, seed: int, params: SamplingParams | None = None) -> None:
        self._core = core
        self._runner = model_runner(core.runner)
        self._params = params or SamplingParams()
        self._rng = random.Random(seed)
        self._vocab = range(self._runner.model.shape.vocab_size)
        self._ids = count()
        self._written: set[int] = set()

    def time(self, batch: ProfileBatch, drafted: Proposal | None = None) -> float:
        """Return the seconds that the runner takes for the batch.

        Args:
            drafted: what each of its sequences verifies.
        """
        with self._scheduled(batch) as scheduled:
            if drafted is not None:
                scheduled = [item._replace(proposal=drafted) for item in scheduled]
                for item in scheduled:
                    self._core.pool.grow(item.seq, item.num_tokens + len(drafted.token_ids))
            self._write_kv(scheduled)
            self._synchronize()
            started = time.perf_counter()
            self._runner.run(scheduled)
            self._synchronize()
            return time.perf_counter() - started

    def prepare(self, batch: ProfileBatch, most_blocks: int) -> bool:
        """Write KV into at most so many of the blocks that the batch will hold.

        Returns:
            True once no block is left to write.
        """
        with self._scheduled(batch) as scheduled:
            return self._write_kv(scheduled, most_blocks)

    def time_drafts(self, num_seqs: int, num_steps: int) -> dict[tuple[int, int, int], list[float]]:
        """Return the seconds of drafting, by forward passes, tokens run, and eager passes.

        It is measured behind contexts whose draft KV is missing, and then behind the same
        contexts with it.
        """
        proposer = self._core.proposer
        assert proposer is not None, "only who drafts is timed"
        times: dict[tuple[int, int, int], list[float]] = {}
        for _ in range(DRAFT_REPEATS):
            with self._scheduled(ProfileBatch(decodes=(DRAFT_CONTEXT,) * num_seqs)) as scheduled:
                wanted = [DraftRequest(item.seq, num_steps) for item in scheduled]
                for one in wanted:
                    self._core.pool.grow(one.seq, 1 + num_steps)
                for _ in range(2):
                    lengths = [proposer.lag(one.seq) + 1 for one in wanted]
                    tokens = sum(lengths) + len(wanted) * (num_steps - 1)
                    eager = int(proposer.passes.is_eager(lengths))
                    self._synchronize()
                    started = time.perf_counter()
                    proposer.propose(wanted)
                    self._synchronize()
                    seconds = time.perf_counter() - started
                    times.setdefault((num_steps, tokens, eager), []).append(seconds)
                    for one in wanted:
                        proposer.roll_back(one.seq)
                for one in wanted:
                    proposer.forget(one.seq)
        return times

    @contextmanager
    def _scheduled(self, batch: ProfileBatch) -> Iterator[list[Scheduled]]:
        """Yield the batch's sequences, which hold blocks for as long as the context lasts.

        Nothing is committed, so the prefix index never sees them.
        """
        scheduled: list[Scheduled] = []
        try:
            for start in batch.decodes:
                seq = self._sequence(start, start)
                seq.token_ids.append(self._rng.choice(self._vocab))
                scheduled.append(Scheduled(seq, 1))
            for start, num_tokens in batch.chunks:
                seq = self._sequence(start + num_tokens, start)
                scheduled.append(Scheduled(seq, num_tokens))
            for item in scheduled:
                self._core.pool.grow(item.seq, item.num_tokens)
            yield scheduled
        finally:
            for item in scheduled:
                self._core.pool.release(item.seq)

    def _sequence(self, num_prompt_tokens: int, num_computed_tokens: int) -> Sequence:
        # Nothing but the KV is read of tokens that are computed already.
        tokens = self._rng.choices(self._vocab, k=num_prompt_tokens - num_computed_tokens)
        request = Request(
            request_id=f"profile-{next(self._ids)}",
            prompt_token_ids=(0,) * num_computed_tokens + tuple(tokens),
            params=self._params,
            seed=0,
            arrival_s=0.0,
        )
        seq = Sequence(request)
        seq.num_computed_tokens = num_computed_tokens
        return seq

    def _write_kv(self, scheduled: SequenceOf[Scheduled], most: int | None = None) -> bool:
        """Fill blocks that are used for the first time: memory never written reads faster.

        Returns:
            True where no block is left to fill.
        """
        blocks = {block for item in scheduled for block in item.seq.block_table} - self._written
        now = sorted(blocks)[:most]
        if now:
            self._written.update(now)
            for kv in self._runner.kv:
                for part in kv.parts:
                    noise = torch.randn(part.shape[1:], device=part.device)
                    raw(part)[now] = raw(noise.to(part.dtype))
        return len(now) == len(blocks)

    def _synchronize(self) -> None:
        device = self._runner.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
