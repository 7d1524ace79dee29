"""`AsyncEngine`: it works with asyncio, and runs its core in a thread of its own."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any

from minserve.activity import Activity, Cursor
from minserve.config import DEFAULT_MODEL
from minserve.engine.base import PROBE_S, EngineBase, Submission
from minserve.engine.core import IDLE_S
from minserve.engine.delta_queue import DeltaQueue
from minserve.engine.intake import check_room
from minserve.engine.journal import Journal
from minserve.engine.stats import EngineStats
from minserve.errors import EngineStoppedError, GenerationError, MinserveError
from minserve.outputs import OutputDelta
from minserve.prompts import BadWordIds, Prompt
from minserve.request import FinishReason
from minserve.sampling_params import SamplingParams
from minserve.slo.objectives import SLO

log = logging.getLogger(__name__)

# Seconds between two looks at whether a plan takes too long.
WATCH_S = 1.0
# Seconds for which an engine that stops waits for the iteration under way.
LAST_ITERATION_S = 5.0


class RequestHandle(DeltaQueue):
    """A request in flight: iterate over it for its deltas, and `abort` it to stop it.

    Iteration ends when all ``n`` outputs have finished; a failure is the last delta of
    its output, with ``finish_reason`` ERROR and ``error`` set.
    """

    def __init__(self, engine: AsyncEngine, submission: Submission) -> None:
        super().__init__(len(submission.sequences))
        self._engine, self._unfinished = engine, len(submission.sequences)
        self._watch = engine._intake.tasks.watch(submission.request)
        self.request_id = submission.request.request_id
        self.prompt = submission.text
        self.prompt_token_ids = submission.request.prompt_token_ids
        self.targets = submission.request.targets
        self.replica = None

    def abort(self) -> None:
        """Stop the request and free its KV within an iteration. Does nothing if it ended."""
        self._engine._abort(self.request_id)

    def complete(self) -> None:
        """End its outputs as if they had come to their ends, since nothing more of them is wanted."""
        self._engine._complete(self.request_id)


class AsyncEngine(EngineBase):
    """An asyncio engine. The core runs in a thread of its own; all methods belong to one loop.

    Example:
        >>> engine = AsyncEngine("smollm2")
        >>> await engine.start()
        >>> async for delta in engine.generate("Hello", SamplingParams(max_tokens=8)):
        ...     print(delta.text, end="")
    """

    def __init__(self, model: str = DEFAULT_MODEL, **settings: Any) -> None:
        super().__init__(model, **settings)
        self._handles: dict[str, RequestHandle] = {}
        self._num_unfinished = 0
        self._submitted_s = time.monotonic()
        self._inbox: deque[tuple[str, Any]] = deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._watch: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._accepting = False
        self._journal = Journal.of(self._core)
        self._stats = self._core.snapshot()

    @property
    def num_unfinished(self) -> int:
        """Outputs waiting or running."""
        return self._num_unfinished

    @property
    def iteration_s(self) -> float:
        """Seconds that the current iteration has taken so far.

        Without one, it is the time for which none has begun although there is work.
        """
        if self._step_began is None and self._num_unfinished:
            return time.monotonic() - max(self._step_ended, self._submitted_s)
        return super().iteration_s

    @property
    def is_healthy(self) -> bool:
        """True while requests are accepted and the core's thread lives."""
        return self._accepting and self._thread is not None and self._thread.is_alive()

    def stats(self) -> EngineStats:
        """The counts up to the end of the newest iteration.

        Any thread may ask, even while an iteration runs. A request's own counts are in it
        before its last delta is out. It is shared and never changes: leave it so.
        """
        return self._stats

    @property
    def replica_set(self) -> None:
        """Always ``None``, since there is this engine alone."""
        return None

    def stats_by_replica(self) -> Mapping[str, EngineStats]:
        """Return `stats` under the number 0, for callers that also serve several engines."""
        return {"0": self._stats}

    async def activity_by_replica(self, since: Mapping[str, Cursor]) -> Mapping[str, Activity]:
        """Return what the engine did lately under the number 0, as `stats_by_replica` does.

        Args:
            since: what was seen before, by the same number; without it all that is kept.
        """
        return {"0": self._journal.since(since.get("0"))}

    async def start(self) -> None:
        """Start the core's thread, unless it runs.

        A device that was never profiled is measured for a few seconds first (`profile`).
        """
        if self._thread is not None:
            return
        if self.perf_model is None:
            await asyncio.to_thread(self.profile, PROBE_S)
        self._stats = self._core.snapshot()
        loop = asyncio.get_running_loop()
        self._thread = threading.Thread(
            target=self._run, args=(loop,), name="minserve-core", daemon=True
        )
        self._thread.start()
        self._watch = asyncio.create_task(self._watch_plans())
        self._accepting = True

    async def stop(self, timeout_s: float = 0.0) -> None:
        """Accept nothing more, wait for what runs, then abort the rest with `EngineStoppedError`.

        The iteration that runs then has `LAST_ITERATION_S` to end. A thread that hangs is left
        behind: end the process by ``os._exit``, since the interpreter's own end may crash on it.
        """
        self._accepting = False
        if self._thread is None:
            return
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            log.warning("aborting %d unfinished outputs", self._num_unfinished)
        self._tell("stop", None)
        await asyncio.to_thread(self._thread.join, LAST_ITERATION_S)
        if self._watch is not None:
            self._watch.cancel()
        if self._thread.is_alive():
            log.error("the iteration under way does not end; its thread is left behind")
            self._fail_all([], EngineStoppedError("the engine is shutting down, and hangs"))
            return
        await asyncio.sleep(0)
        self._thread = None

    def submit(
        self,
        prompts: SequenceOf[Prompt],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        slo: SLO | str | None = None,
        age_s: float = 0.0,
        bad_word_ids: BadWordIds | None = None,
        client: str = "",
    ) -> list[RequestHandle]:
        """Queue requests, all or none; checking and counting are one step.

        Args:
            prompts: texts and chats are tokenized here, which takes a second for a megabyte;
                `prompts.process` does it in another thread or process.
            priority: lower runs earlier.
            cache_salt: cached prefixes are shared only between requests of equal salt.
            slo: the latency asked for, as an `SLO` or a class's name; default: the engine's.
                One that cannot be kept and asks to be refused ends its handle's first
                output with `SLOUnattainableError`.
            age_s: seconds since the requests arrived, which count for their SLOs.
            bad_word_ids: of the params' bad words, where they are tokenized already.
            client: whose they are; tasks are told apart by it, so that equal ids do no harm.

        Raises:
            InvalidSLOError: for an unknown class, or a task that began with another budget.
            SLOUnattainableError: if their task was given up, and they ask to be refused then.
            InvalidRequestError: if one of them cannot be served.
            QueueFullError: if they would exceed ``max_queue`` outputs.
            EngineStoppedError: if the engine is not running.
        """
        if not self.is_healthy:
            raise EngineStoppedError("the engine is not running")
        check_room(len(prompts) * params.n, self._num_unfinished, self.config.max_queue)
        submissions = [
            self._prepare(p, params, priority, cache_salt, slo, age_s, bad_word_ids)
            for p in prompts
        ]
        handles = []
        for submission in self._join(submissions, client):
            handle = RequestHandle(self, submission)
            self._handles[handle.request_id] = handle
            handles.append(handle)
            self._num_unfinished += len(submission.sequences)
            self._tell("add", submission)
        self._submitted_s = time.monotonic()
        self._idle.clear()
        return handles

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Any
    ) -> AsyncIterator[OutputDelta]:
        """`submit` one prompt and yield its deltas; leaving the loop early aborts it.

        Raises:
            GenerationError: if running it failed.
        """
        await self.start()
        # In a thread, so that no other stream waits for it.
        tokenized = await asyncio.to_thread(self.prompts.process, prompt)
        (handle,) = self.submit([tokenized], params or self.default_sampling_params, **options)
        try:
            async for delta in handle:
                delta.raise_if_failed()
                yield delta
        finally:
            handle.abort()

    def _abort(self, request_id: str) -> None:
        if request_id in self._handles:
            self._tell("abort", request_id)

    def _complete(self, request_id: str) -> None:
        if request_id in self._handles:
            self._tell("complete", request_id)

    def _tell(self, verb: str, what: Any) -> None:
        with self._wake:
            self._inbox.append((verb, what))
            self._wake.notify()

    async def _watch_plans(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            self.interrupt_hung_plan()

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        """Do the work of the core's thread. If the core itself breaks, every request is told."""
        try:
            self._serve(loop)
            self._core.drain()
            self.keep_profile()
        except Exception as error:
            log.exception("the engine core is broken; restart the process")
            failure = GenerationError(f"the engine broke: {error!r}")
            loop.call_soon_threadsafe(self._fail_all, self._core.take_untold(), failure)

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take in news, step, publish, until told to stop."""
        stop = False
        while not stop:
            self._wait()
            deltas, stop = self._take_in()
            try:
                if not stop:
                    deltas += self._iterate()
            finally:
                # A whole one in place of the last, so that readers need no lock.
                self._stats = self._core.snapshot()
                if deltas:
                    loop.call_soon_threadsafe(self._publish, deltas)

    def _wait(self) -> None:
        """Wait until there is something to do.

        In the meantime the pool's books are checked, and a rough profile is refined.
        """
        since = time.monotonic()
        if self._sleep(IDLE_S):
            return
        self._core.check_integrity()
        while True:
            rest_s = self.refine(time.monotonic() - since, self._has_business)
            self._stats = self._core.snapshot()
            if self._sleep(rest_s):
                return

    def _sleep(self, seconds: float | None) -> bool:
        """Wait for so many seconds, or for ever; return whether there is something to do."""
        with self._wake:
            return self._wake.wait_for(self._has_business, seconds)

    def _has_business(self) -> bool:
        return bool(self._inbox) or self._core.has_work

    def _take_in(self) -> tuple[list[OutputDelta], bool]:
        """Carry out what the loop's side asked for since the last iteration."""
        deltas: list[OutputDelta] = []
        while self._inbox:
            verb, what = self._inbox.popleft()
            if verb == "add":
                deltas += self._take_up(what)
            elif verb == "abort":
                deltas += self._core.abort(what)
            elif verb == "complete":
                deltas += self._core.complete(what)
            else:
                stopped = EngineStoppedError("the engine is shutting down")
                return deltas + self._core.abort_all(stopped), True
        return deltas, False

    def _take_up(self, submission: Submission) -> list[OutputDelta]:
        """Queue a request; where that fails, return its end."""
        try:
            self._enqueue(submission)
        except Exception as error:
            log.exception("a request could not be queued; it ends with an error")
            failure = GenerationError(f"the request could not be queued: {error!r}")
            return [
                OutputDelta(
                    request_id=submission.request.request_id,
                    index=seq.index,
                    finish_reason=FinishReason.ERROR,
                    error=failure,
                )
                for seq in submission.sequences
            ]
        return []

    def _fail_all(self, untold: list[OutputDelta], failure: MinserveError) -> None:
        """On the loop, end every request in flight, and accept no more.

        Args:
            untold: the deltas that were still to be published.
        """
        self._accepting = False
        self._publish(untold)
        self._publish(
            [
                OutputDelta(request_id=request_id, finish_reason=FinishReason.ERROR, error=failure)
                for request_id, handle in self._handles.items()
                for _ in range(handle._unfinished)
            ]
        )

    def _publish(self, deltas: list[OutputDelta]) -> None:
        """On the loop, hand each delta to its request."""
        for delta in deltas:
            handle = self._handles.get(delta.request_id)
            if handle is None:
                continue
            handle._watch.note(delta)
            handle.put(delta)
            if delta.finish_reason is not None:
                self._num_unfinished -= 1
                handle._unfinished -= 1
                if not handle._unfinished:
                    del self._handles[delta.request_id]
        if not self._num_unfinished:
            self._idle.set()
