"""`RelayEngine` runs a core for a caller that has its own loop and its own clients.

It takes requests that an `Intake` elsewhere has checked, also requests that began elsewhere,
and returns all news of an iteration at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, NamedTuple

from minserve.activity import Activity, Cursor
from minserve.config import DEFAULT_MODEL
from minserve.engine.base import EngineBase, Submission
from minserve.engine.journal import Journal
from minserve.engine.live_output import History
from minserve.engine.stats import EngineStats
from minserve.errors import InvalidRequestError, RankLostError
from minserve.models.finding.source import fingerprint
from minserve.outputs import OutputDelta
from minserve.planner.replica_load import ReplicaLoad, load_of
from minserve.request import Request

log = logging.getLogger(__name__)


class IterationNews(NamedTuple):
    """The news of an iteration.

    Attributes:
        declined: the ids of requests that are promised nothing now and have not begun.
        load: the engine's load after it.
    """

    deltas: list[OutputDelta]
    declined: list[str]
    load: ReplicaLoad


class RelayEngine(EngineBase):
    """An engine whose methods block and, but for `activity`, are not thread-safe."""

    def __init__(self, model: str = DEFAULT_MODEL, **settings: Any) -> None:
        super().__init__(model, **settings)
        self._journal = Journal.of(self._core)

    @property
    def has_work(self) -> bool:
        return self._core.has_work

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the model's files."""
        return fingerprint(self._loaded.source)

    @property
    def dtype(self) -> str:
        """The dtype of weights, and that of arithmetic where it differs."""
        return self._loaded.dtype

    @property
    def clock_s(self) -> float:
        """The time now, on the clock of arrivals and histories."""
        return self._core.clock()

    def warm_up(self) -> None:
        """Load what the first structure needs; chats are written as prompts elsewhere."""
        self._structures.warm_up()

    def add(self, request: Request, histories: Mapping[int, History]) -> None:
        """Queue outputs of a request.

        Args:
            request: the request, with its arrival on this engine's clock.
            histories: by index, what clients were told of the outputs that are to be run.

        Raises:
            InvalidRequestError: if it was checked against another model.
        """
        self._check_fits(request, histories)
        self._enqueue(Submission(None, request, histories))

    def abort(self, request_id: str) -> list[OutputDelta]:
        """End a request; an unknown one is ignored."""
        return self._core.abort(request_id)

    def complete(self, request_id: str) -> list[OutputDelta]:
        """End a request as if its outputs had come to their ends; an unknown one is ignored."""
        return self._core.complete(request_id)

    def withdraw(self, request_id: str) -> bool:
        """Forget a request without news, unless it has begun; return whether it was forgotten."""
        return self._core.withdraw(request_id)

    def step(self) -> IterationNews:
        """Run one iteration. An error in it ends the requests in flight, but not the engine.

        Raises:
            DeviceLostError: where no further iteration can succeed.
        """
        return IterationNews(self._iterate(), self._core.declined, self.load())

    def call_when_lost(self, call: Callable[[RankLostError], object]) -> None:
        """Have it told when a rank of this engine's group has ended, also while nothing runs.

        Args:
            call: called in another thread.
        """
        if self._loaded.keeper is not None:
            self._loaded.keeper.call_when_lost(call)

    def check_integrity(self) -> None:
        """Check the pool's books, on an engine that has been idle for `core.IDLE_S`.

        Raises:
            PoolCorruptedError: where they do not add up, which is a bug.
        """
        self._core.check_integrity()

    def load(self) -> ReplicaLoad:
        """Return how much there is to do."""
        return load_of(self._core.planner, self._core.view())

    def snapshot(self) -> EngineStats:
        """Return a copy of the counts so far."""
        return self._core.snapshot()

    def activity(self, since: Cursor | None) -> Activity:
        """Return what the engine did since a look; any thread may ask."""
        return self._journal.since(since)

    def _check_fits(self, request: Request, histories: Mapping[int, History]) -> None:
        params, prompt = request.params, request.prompt_token_ids
        tokens = [
            *prompt,
            *(token for one in histories.values() for token in one.token_ids),
            *params.logit_bias,
            *params.allowed_token_ids,
            *chain.from_iterable(request.bad_word_ids),
        ]
        fits = (
            prompt
            and histories
            and all(0 <= index < params.n for index in histories)
            and len(prompt) + (params.max_tokens or 0) <= self.max_model_len
            and min(tokens) >= 0
            and max((*tokens, *request.stop_token_ids)) < self.vocab_size
            and all(len(one.token_ids) < (params.max_tokens or 0) for one in histories.values())
            and all(len(one.token_ids) == len(one.times_s) for one in histories.values())
        )
        if not fits:
            raise InvalidRequestError("the request was checked against another model than this")
