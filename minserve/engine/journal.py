"""`Journal`: keeps what an engine core did lately, a little and of bounded size, for who looks at it.

While nobody looks, it notes one line for each iteration and one for each output that ends. The single
tokens of an output are noted only from the first look on, until nobody has looked for `WATCHED_S`;
what ran before is told as a whole.
"""

from __future__ import annotations

import math
import threading
import uuid
from collections import Counter, deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, NamedTuple

from minserve.activity import (
    NO_TOKENS,
    Activity,
    BatchTokens,
    ClassEnds,
    Cursor,
    IterationRecord,
    Mark,
)
from minserve.engine.batch import Scheduled
from minserve.engine.lane_log import LaneLog
from minserve.engine.sequence_table import SequenceTable
from minserve.planner.plan import IterationPlan
from minserve.request import Sequence
from minserve.slo.attainment import Outcome
from minserve.slo.objectives import Standing

if TYPE_CHECKING:
    from minserve.engine.core import EngineCore

# What is kept at most: iterations, and lanes of outputs under way and ended together.
NUM_ITERATIONS = 240
NUM_LANES = 48
# Of the outputs that wait and have never run, those that are told.
NUM_WAITING = 16
# Seconds in which ends are counted together, for which such counts are kept, and their number.
SPAN_S = 5.0
KEPT_S = 900.0
NUM_ENDS = 2000
# Seconds after a look in which single tokens are noted.
WATCHED_S = 10.0


class NoJournal:
    """Keeps nothing: the journal of a core that nobody looks at."""

    def batch(self, batch: SequenceOf[Scheduled], tokens: BatchTokens) -> None:
        """Note what a batch holds that is about to run."""

    def iteration(self, plan: IterationPlan, began_s: float, seconds: float) -> None:
        """Note that the batch has run and its results are applied."""

    def ended(self, seq: Sequence, counted: tuple[str, Outcome] | None) -> None:
        """Note that an output has ended.

        Args:
            counted: the class and outcome by which the engine's counts have it, if they do.
        """


class _InBatch(NamedTuple):
    """A sequence of the batch that has a lane, as it was before the batch ran.

    Attributes:
        num_prefill: prefill tokens that run; 0 for a decode.
        due_s: deadline of its next token; inf without one.
    """

    seq: Sequence
    lane: LaneLog
    num_prefill: int
    num_output_tokens: int
    due_s: float


class Journal(NoJournal):
    """Written by the core's thread; any thread may read it.

    Args:
        table: the outputs under way.
        clock: the core's.
    """

    def __init__(self, table: SequenceTable, clock: Callable[[], float]) -> None:
        self._table, self._clock = table, clock
        self._source = uuid.uuid4().hex
        self._guard = threading.Lock()
        self._tick = 0
        self._iterations: deque[tuple[int, IterationRecord]] = deque(maxlen=NUM_ITERATIONS)
        self._lanes: dict[str, LaneLog] = {}
        # Ids of the lanes that have ended, the oldest first: they make room for others.
        self._ended: deque[str] = deque()
        self._ends: dict[tuple[float, str], tuple[int, ClassEnds]] = {}
        self._watched_until_s = -math.inf
        self._is_watched = False
        self._parts: list[_InBatch] = []
        self._tokens = NO_TOKENS
        self._num_seqs = 0

    @classmethod
    def of(cls, core: EngineCore) -> Journal:
        """Return a new journal, which the core tells from now on."""
        core.journal = journal = cls(core.table, core.clock)
        return journal

    # --- what the core tells ---

    def batch(self, batch: SequenceOf[Scheduled], tokens: BatchTokens) -> None:
        """Note what a batch holds that is about to run."""
        self._tokens, self._num_seqs = tokens, len(batch)
        if self._is_watched:
            self._parts = [
                _InBatch(
                    seq,
                    lane,
                    0 if seq.is_decoding else num_tokens,
                    seq.num_output_tokens,
                    math.inf if seq.progress is None else seq.progress.due_s,
                )
                for seq, num_tokens, _ in batch
                if (lane := self._lane_of(seq)) is not None
            ]

    def iteration(self, plan: IterationPlan, began_s: float, seconds: float) -> None:
        """Note that the batch has run and its results are applied."""
        came_s = began_s + seconds
        record = IterationRecord(began_s, seconds, plan.predicted_s, self._num_seqs, self._tokens)
        with self._guard:
            self._tick = tick = self._tick + 1
            self._iterations.append((tick, record))
            for seq, lane, num_prefill, num_before, due_s in self._parts:
                if num_prefill:
                    lane.add(tick, Mark(True, began_s, came_s, num_prefill, None))
                if num_new := seq.num_output_tokens - num_before:
                    slack_s = None if due_s == math.inf else due_s - came_s
                    lane.add(tick, Mark(False, came_s, came_s, num_new, slack_s))
            self._parts.clear()
            is_watched = came_s < self._watched_until_s
            if self._is_watched and not is_watched:
                # From here on they would have gaps.
                self._lanes = {name: one for name, one in self._lanes.items() if not one.is_live}
            self._is_watched = is_watched

    def ended(self, seq: Sequence, counted: tuple[str, Outcome] | None) -> None:
        """Note that an output has ended."""
        with self._guard:
            self._tick += 1
            if (lane := self._lane_of(seq)) is not None:
                lane.end(self._tick, None if counted is None else counted[1])
                self._ended.append(seq.seq_id)
            if counted is not None:
                self._count(*counted)

    def _lane_of(self, seq: Sequence) -> LaneLog | None:
        """Return a sequence's lane; ``None`` where all lanes are of other outputs under way.

        The core's thread alone calls it, and it changes what is kept in one step.
        """
        seq_id, lanes = seq.seq_id, self._lanes
        lane = lanes.get(seq_id)
        if lane is not None and lane.is_live:
            return lane
        if lane is None and len(lanes) >= NUM_LANES and not self._ended:
            return None
        lanes = dict(lanes)
        if lane is not None:
            # It was here before, and comes again.
            del lanes[seq_id]
            self._ended.remove(seq_id)
        if len(lanes) >= NUM_LANES:
            del lanes[self._ended.popleft()]
        lanes[seq_id] = lane = LaneLog(seq, self._tick + 1, self._clock())
        self._lanes = lanes
        return lane

    def _count(self, name: str, outcome: Outcome) -> None:
        now = self._clock()
        key = (now // SPAN_S * SPAN_S, name)
        _, old = self._ends.pop(key, (0, ClassEnds(*key, 0, 0)))
        attained = outcome is Outcome.ATTAINED
        new = old._replace(num_ended=old.num_ended + 1, num_attained=old.num_attained + attained)
        self._ends[key] = (self._tick, new)
        # Those that changed last are at the end.
        while (first := next(iter(self._ends)))[0] < now - KEPT_S or len(self._ends) > NUM_ENDS:
            del self._ends[first]

    # --- what others ask ---

    def since(self, cursor: Cursor | None) -> Activity:
        """Return what has changed since a look, or all that is kept. Any thread may ask.

        Args:
            cursor: of the look before; ``None``, or that of another process, asks for all.
        """
        is_whole = cursor is None or cursor.source != self._source
        after = 0 if cursor is None or is_whole else cursor.tick
        with self._guard:
            # Lists first: the core changes its own meanwhile.
            waiting, running = self._table.waiting.copy(), self._table.running.copy()
            iterations: deque[IterationRecord] = deque()
            for tick, record in reversed(self._iterations):
                if tick <= after:
                    break
                iterations.appendleft(record)
            lanes, now = self._lanes, self._clock()
            told = [
                lane.since(after) for lane in lanes.values() if lane.is_live or lane.tick > after
            ]
            others = [seq for seq in running if seq.seq_id not in lanes][: NUM_LANES - len(lanes)]
            others += [seq for seq in waiting if seq.seq_id not in lanes][:NUM_WAITING]
            told += [LaneLog(seq, 0, now).since(-1) for seq in others]
            self._watched_until_s = now + WATCHED_S
            return Activity(
                source=self._source,
                tick=self._tick,
                is_whole=is_whole,
                now_s=now,
                waiting=_by_standing(waiting),
                running=_by_standing(running),
                iterations=tuple(iterations),
                lanes=tuple(told),
                ends=tuple(one for tick, one in self._ends.values() if tick > after),
            )


def _by_standing(sequences: SequenceOf[Sequence]) -> dict[Standing, int]:
    counts = Counter(seq.standing for seq in sequences)
    return {standing: counts[standing] for standing in Standing}
