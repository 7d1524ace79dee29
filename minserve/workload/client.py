"""Open-loop client: sends a workload to any OpenAI-compatible server and notes the answers.

A request goes out at its time, however many requests are open, and its latencies count from that
time. So a slow server (or client) cannot hide in requests that were sent late. A conversation's
next turn is due its delay after the last token of the answer to the turn before::

    due ──lag──► sent ──────► first token ─► ... ─► last token ──delay──► next turn's due
     └───────── TTFT ──────────────┘
"""

from __future__ import annotations

import asyncio
import errno
import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from minserve.errors import WorkloadError
from minserve.slo.objectives import Targets
from minserve.workload.answer import Answer, Ending
from minserve.workload.conversation import Conversation
from minserve.workload.endpoint import (
    Endpoint,
    open_session,
    raise_file_limit,
    too_few_files,
)
from minserve.workload.task_terms import TaskVerdict
from minserve.workload.turn_targets import Speed, targets_of
from minserve.workload.verdict import Verdict

DRAIN_S = 60.0
POLL_S = 0.1
# HTTP statuses with which a server refuses a request.
REFUSED = (429, 503)
LONGEST_ERROR = 500

SloField = Callable[[Answer], Any]


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """Counts of requests in a run: those due, and of these the open, answered and attained ones."""

    due: int
    open: int
    done: int
    attained: int


@dataclass(frozen=True, slots=True)
class _BegunConversation:
    """A conversation whose first turn was due.

    Attributes:
        due_s: time at which that was.
        answers: one for each turn that was due so far.
        finish_s: seconds from then to the deadline of all turns together; inf for none.
        task_id: unlike that of any other conversation.
    """

    conversation: Conversation
    due_s: float
    finish_s: float
    task_id: str
    answers: list[Answer] = field(default_factory=list)

    def new_answer(self, speed: Speed, due_s: float) -> Answer:
        """Return an empty answer to the next turn."""
        conversation, number = self.conversation, len(self.answers)
        turn, task, asked = conversation.turns[number], None, None
        if conversation.terms is None:
            targets = targets_of(turn, speed)
            asked = None if turn.asked is None else targets_of(turn, speed, turn.asked)
        else:
            slo, targets = conversation.terms.promise(conversation, number, speed, self.task_id)
            task = slo.task
        if task is not None:
            # Any time in the task is right for the client: the server shares it among the calls.
            targets = Targets(finish_s=self.due_s + self.finish_s - due_s)
        has_next = number + 1 < len(conversation.turns)
        return Answer(turn, targets, due_s, has_next=has_next, asked=asked, task=task)

    def task_verdict(self, start_s: float) -> TaskVerdict:
        """Return what became of the turns together.

        Args:
            start_s: time at which the workload began.
        """
        answers, num_calls = self.answers, len(self.conversation.turns)
        done = len(answers) == num_calls and answers[-1].ending is Ending.DONE
        took_s = answers[-1].last_heard_s - self.due_s if done else None
        return TaskVerdict(
            arrival_s=self.due_s - start_s,
            finish_s=self.finish_s,
            took_s=took_s,
            num_calls=num_calls,
            given_up=any(answer.in_vain for answer in answers),
        )


@dataclass(slots=True)
class Load:
    """A workload's answers so far.

    Attributes:
        start_s: time at which the workload began; NaN before.
        end_s: time at which the run ended or was cut short.
        answers: answers to the requests that were due, in this order. After a complete run also
            those of turns that were never due, because the turn before was not answered.
        complete: False if the run was interrupted.
        begun: the conversations whose first turn was due.
    """

    workload: Sequence[Conversation]
    start_s: float = math.nan
    end_s: float = math.nan
    answers: list[Answer] = field(default_factory=list)
    complete: bool = False
    begun: list[_BegunConversation] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Seconds from the start to the last due request; of a run cut short, to its end."""
        last = max((answer.due_s for answer in self.answers), default=self.start_s)
        return (last if self.complete else self.end_s) - self.start_s

    def verdicts(self) -> list[Verdict]:
        """Return the verdicts on the offered requests.

        After a run that was cut short, requests that were open and not yet late are left out,
        because their outcome is unknown.
        """
        return [answer.verdict(self.start_s) for answer in self.answers if self._is_decided(answer)]

    def task_verdicts(self) -> list[TaskVerdict]:
        """Return the verdicts on the offered tasks; there are none where conversations are no tasks.

        After a run that was cut short, tasks that were under way and not yet late are left out.
        """
        return [
            one.task_verdict(self.start_s)
            for one in self.begun
            if one.conversation.terms is not None
            and (
                self.complete
                or self.end_s > one.due_s + one.finish_s
                or one.task_verdict(self.start_s).took_s is not None
            )
        ]

    @property
    def num_undecided(self) -> int:
        """Number of requests that were open and not yet late when the run was cut short."""
        return sum(not self._is_decided(answer) for answer in self.answers)

    def _is_decided(self, answer: Answer) -> bool:
        cut = answer.ending is Ending.CUT and not self.complete
        return not cut or answer.is_hopeless(self.end_s)

    def errors(self) -> dict[str, int]:
        """Return the servers' errors on failed and refused requests, with the count of each."""
        found: dict[str, int] = {}
        for answer in self.answers:
            if answer.error is not None:
                found[answer.error] = found.get(answer.error, 0) + 1
        return dict(sorted(found.items(), key=lambda one: -one[1]))

    @property
    def num_short(self) -> int:
        """Number of answers that the server ended before the length that was asked for."""
        return sum(answer.was_short for answer in self.answers)


async def drive(
    endpoint: Endpoint,
    load: Load,
    speed: Speed,
    *,
    slo_field: SloField | None = None,
    on_progress: Callable[[LoadProgress], None] | None = None,
    drain_s: float = DRAIN_S,
) -> None:
    """Send a load's workload and collect the answers in the load.

    It ends when every request is answered, or when no open request can attain its SLO any more;
    these are cut off. If it is cancelled, the answers so far are kept.

    Args:
        load: a new load; every turn of its workload has a text.
        speed: turns slowdowns into seconds.
        slo_field: returns what a request sends as ``slo`` to a minserve; default: its targets.
        on_progress: called every tenth of a second.
        drain_s: seconds of silence after which an open answer is given up, if it has no last
            deadline, or if it is late but further turns depend on it.

    Raises:
        WorkloadError: for a turn without a text or with several outputs, or if this process may
            not open enough streams.
    """
    if any(turn.n > 1 for one in load.workload for turn in one.turns):
        raise WorkloadError(
            "a load test over HTTP asks for one output per request; simulate others"
        )
    if any(turn.text is None for one in load.workload for turn in one.turns):
        raise WorkloadError("the workload has turns without a text: a server needs prompts")
    raise_file_limit(len(load.workload))
    async with open_session(endpoint.url) as session:
        await _LoadDriver(session, endpoint, load, speed, slo_field, on_progress, drain_s).run()


def run_load(
    endpoint: Endpoint, workload: Sequence[Conversation], speed: Speed, **options: Any
) -> Load:
    """Run `drive` from outside asyncio and return its load.

    Ctrl-C ends the run and keeps what was measured; the load is then not ``complete``.

    Args:
        options: the keyword arguments of `drive`.
    """
    load = Load(workload)
    try:
        asyncio.run(drive(endpoint, load, speed, **options))
    except KeyboardInterrupt:
        if math.isnan(load.start_s):
            raise
    return load


class _LoadDriver:
    """A run: a task that starts conversations, a task for each of them, and a loop that watches."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        endpoint: Endpoint,
        load: Load,
        speed: Speed,
        slo_field: SloField | None,
        on_progress: Callable[[LoadProgress], None] | None,
        drain_s: float,
    ) -> None:
        self._session, self._endpoint, self._load, self._speed = session, endpoint, load, speed
        self._slo_field = slo_field or (
            lambda answer: endpoint.slo_field(answer.asked or answer.targets, answer.task)
        )
        self._on_progress = on_progress
        self._drain_s = drain_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._open: dict[int, Answer] = {}
        self._run_id = uuid.uuid4().hex[:12]
        self._num_waiting = 0  # turns that are going to be sent
        self._num_done = self._num_attained = 0

    async def run(self) -> None:
        load = self._load
        load.start_s = load.end_s = time.perf_counter() + POLL_S
        self._tasks.add(asyncio.create_task(self._start_conversations()))
        try:
            await self._watch()
            load.complete = True
        finally:
            load.end_s = max(load.start_s, time.perf_counter())
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            if load.complete:
                self._add_unsent()
            self._report()

    async def _start_conversations(self) -> None:
        for conversation in sorted(self._load.workload, key=lambda one: one.arrival_s):
            due_s = self._load.start_s + conversation.arrival_s
            await asyncio.sleep(due_s - time.perf_counter())
            self._num_waiting += 1
            self._tasks.add(asyncio.create_task(self._converse(conversation, due_s)))

    async def _converse(self, conversation: Conversation, due_s: float) -> None:
        """Send the turns of a conversation, each after the answer to the turn before."""
        said: list[str] = []
        terms, number = conversation.terms, len(self._load.begun)
        finish_s = math.inf if terms is None else terms.finish_s(conversation, self._speed)
        begun = _BegunConversation(conversation, due_s, finish_s, f"{self._run_id}-{number}")
        self._load.begun.append(begun)
        answers = begun.answers
        for turn in conversation.turns:
            if answers:
                due_s = answers[-1].token_times[-1] + turn.delay_s
                self._num_waiting += 1
                await asyncio.sleep(due_s - time.perf_counter())
            self._num_waiting -= 1
            answers.append(begun.new_answer(self._speed, due_s))
            self._load.answers.append(answers[-1])
            said.append(turn.text or "")
            await self._ask(answers[-1], said)
            if answers[-1].ending is not Ending.DONE or not answers[-1].token_times:
                return
            said.append(answers[-1].text)

    async def _ask(self, answer: Answer, said: Sequence[str]) -> None:
        endpoint = self._endpoint
        body = endpoint.body(said, answer.turn.output_tokens, self._slo_field(answer))
        self._open[id(answer)] = answer
        try:
            await ask(self._session, endpoint, answer, body)
        finally:
            del self._open[id(answer)]
        self._num_done += 1
        self._num_attained += answer.ending is Ending.DONE and answer.progress().attained

    async def _watch(self) -> None:
        """Report progress until every request is answered, or until no open one is worth waiting
        for.
        """
        while self._tasks:
            await asyncio.sleep(POLL_S)
            for task in [task for task in self._tasks if task.done()]:
                self._tasks.discard(task)
                task.result()
            self._report()
            # The task of a conversation exists for a moment before the conversation is in `begun`.
            begun = len(self._load.begun) == len(self._load.workload)
            if begun and not self._may_attain(time.perf_counter()):
                return

    def _may_attain(self, now: float) -> bool:
        """Return whether an open request, or a turn that follows it, may still attain its SLO."""
        return bool(self._num_waiting) or any(
            self._is_worth_waiting_for(answer, now) for answer in self._open.values()
        )

    def _is_worth_waiting_for(self, answer: Answer, now: float) -> bool:
        if answer.has_last_deadline and not answer.is_hopeless(now):
            return True
        # No deadline says when to give these answers up, so their silence decides.
        patient = answer.has_next or not answer.has_last_deadline
        return patient and now - answer.last_heard_s < self._drain_s

    def _add_unsent(self) -> None:
        """Add the turns that follow an unanswered one: they count as offered and missed."""
        for begun in self._load.begun:
            turns, answers = begun.conversation.turns, begun.answers
            for turn in turns[len(answers) :]:
                unsent = Answer(turn, targets_of(turn, self._speed), answers[-1].due_s)
                unsent.ending = Ending.NOT_SENT
                self._load.answers.append(unsent)

    def _report(self) -> None:
        if self._on_progress is not None:
            num_due = len(self._load.answers)
            self._on_progress(
                LoadProgress(num_due, len(self._open), self._num_done, self._num_attained)
            )


async def ask(
    session: aiohttp.ClientSession, endpoint: Endpoint, answer: Answer, body: Mapping[str, Any]
) -> None:
    """Send one request now, and note in its answer when its tokens come, or why none came.

    Raises:
        WorkloadError: if this process may not open enough streams.
    """
    answer.sent_s = time.perf_counter()
    try:
        async with session.post(endpoint.path, json=body) as response:
            await _read(response, answer)
    except (aiohttp.ClientError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise too_few_files() from None
        answer.fail(str(error) or type(error).__name__)


async def _read(response: aiohttp.ClientResponse, answer: Answer) -> None:
    """Read a response to its end."""
    if response.status != 200:
        answer.fail(f"{response.status}: {(await response.text()).strip()[:LONGEST_ERROR]}")
        if response.status in REFUSED:
            answer.ending = Ending.REJECTED
        return
    async for line in response.content:
        if line.startswith(b"data:"):
            answer.read_event(line[5:].strip(), time.perf_counter())
    answer.close()
