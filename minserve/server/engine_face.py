"""`EngineFace`: all that the server knows of an engine, whether it is one or several replicas.

`minserve.engine.async_engine.AsyncEngine` and `minserve.controller.controller.Controller` have it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from minserve.activity import Activity, Cursor
from minserve.config import EngineConfig
from minserve.outputs import OutputDelta, ReplicaReport
from minserve.prompts import BadWordIds, Prompt
from minserve.sampling_params import SamplingParams
from minserve.slo.objectives import SLO, Targets
from minserve.slo.task_table import TaskOutcome

if TYPE_CHECKING:
    from minserve.engine.stats import EngineStats
    from minserve.engine.text.inputs import PromptProcessor
    from minserve.engine.text.tokenizer import Tokenizer


class Handle(Protocol):
    """A request in flight. Iterating over it gives the news of its outputs until all have ended."""

    @property
    def request_id(self) -> str: ...

    @property
    def prompt(self) -> str | None:
        """The prompt's text; ``None`` where it was given as token ids."""

    @property
    def prompt_token_ids(self) -> Sequence[int]: ...

    @property
    def targets(self) -> Targets | None:
        """The request's SLO in seconds; ``None`` without one."""

    @property
    def replica(self) -> int | None:
        """The number of the replica that has the request, or had it last; ``None`` without replicas."""

    def __aiter__(self) -> AsyncIterator[OutputDelta]: ...

    def waiting(self, most: int) -> Sequence[OutputDelta]:
        """Take up to so many of the deltas that iteration would give without waiting."""

    def abort(self) -> None:
        """Stop the request and free its KV. Does nothing if the request has ended."""

    def complete(self) -> None:
        """`abort` the request, since its client has the whole answer."""


class RoutingCounts(Protocol):
    """What a router has counted since the start."""

    @property
    def num_hops(self) -> int:
        """Requests moved on because their replica could not promise their SLO."""

    @property
    def num_resumed(self) -> int:
        """Requests that went on elsewhere because their replica was lost."""


class ReplicaSet(Protocol):
    """The replicas behind an engine, and the orders that an operator may give them."""

    @property
    def routing(self) -> RoutingCounts: ...

    def replicas(self) -> list[ReplicaReport]:
        """The state of each replica, in the order of their numbers; may be called from any thread."""

    async def drain(self, number: int) -> None:
        """Send a replica nothing more; returns when it has nothing left."""

    async def resume(self, number: int) -> None:
        """Send requests to a drained replica again."""

    async def restart(self, number: int) -> None:
        """Drain a replica, end its process, and wait for the next one."""


class EngineFace(Protocol):
    """What serves requests. All methods belong to one event loop, unless they say otherwise."""

    @property
    def config(self) -> EngineConfig: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def prompts(self) -> PromptProcessor:
        """Turns prompts into token ids. It can be sent to another process."""

    @property
    def model_name(self) -> str: ...

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and its output together."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def slo_classes(self) -> Mapping[str, SLO]:
        """The SLO classes, by name."""

    @property
    def default_slo(self) -> SLO | None:
        """The SLO of requests that bring none."""

    @property
    def sampling_defaults(self) -> Mapping[str, Any]:
        """Fields of `SamplingParams` that the model sets, for requests that leave them out."""

    @property
    def thinking_marker(self) -> str | None:
        """The text that ends this model's thinking, such as ``</think>``; or ``None``."""

    @property
    def replica_set(self) -> ReplicaSet | None:
        """The replicas behind it; ``None`` where the engine is a single one."""

    @property
    def num_unfinished(self) -> int:
        """Outputs waiting or running."""

    @property
    def is_healthy(self) -> bool:
        """True while requests are accepted and something is there to run them."""

    @property
    def iteration_s(self) -> float:
        """Seconds that the current iteration has taken so far."""

    @property
    def task_outcomes(self) -> Mapping[TaskOutcome, int]:
        """The number of agents' tasks by outcome since the start."""

    def stats_by_replica(self) -> Mapping[str, EngineStats]:
        """The counts of each replica, by its number as text; a single engine has number 0.

        May be called from any thread. The counts are shared: read them only.
        """

    async def activity_by_replica(self, since: Mapping[str, Cursor]) -> Mapping[str, Activity]:
        """What each replica did since a look, by its number as text; a single engine has number 0.

        Args:
            since: what was seen before; a replica that is missing in it tells all that it keeps.

        Returns:
            without a replica that does not answer soon.
        """

    async def start(self) -> None:
        """Begin to accept requests."""

    async def stop(self, timeout_s: float = 0.0) -> None:
        """Accept nothing more, wait so many seconds for what runs, and abort the rest."""

    def submit(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        slo: SLO | str | None = None,
        age_s: float = 0.0,
        bad_word_ids: BadWordIds | None = None,
        client: str = "",
    ) -> Sequence[Handle]:
        """Queue requests, all or none; see `minserve.engine.async_engine.AsyncEngine.submit`."""
