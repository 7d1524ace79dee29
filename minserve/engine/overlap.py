"""Two iterations on a device at once: the one that runs, and the next one, queued behind it.

The next batch's tokens are the ones that the sampler has just chosen. They stay on the device, so
that its forward pass is launched before the host has read them; the host reads and applies them
while that pass runs, and only then has the next tokens chosen (N+ is the choice of batch N's)::

    step     ... begin .......... │ end ................................ │ begin ...
    host         plan C, launch C │ wait for B, apply B, launch C+, tell │ plan D, launch D │ ...
    device   B ─────────── B+ ──── C ─────────────────────────── C+ ────── D ─────────── D+ ...

What of the next batch depends on the tokens (penalties, structures, seeds, log probabilities) is
work of the choice, which knows them. An output may end with the tokens that were read. Then its row
of the next batch is surplus: no token is chosen for it, and its blocks are freed when that batch is
over. Ends by ``max_tokens`` are known ahead, and leave no such row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from minserve.engine.batch import BatchRunner, Scheduled
from minserve.engine.block_pool import HoldWish
from minserve.engine.launch import Launch
from minserve.planner.plan import IterationPlan
from minserve.request import Sequence, SequenceState


@dataclass(slots=True)
class Iteration:
    """An iteration that the device has.

    Attributes:
        plan: what was planned for it.
        batch: what it runs of the engine's sequences.
        launch: the batch on the device.
        began_s: when it began, with the planning that it waited for; where it followed another one,
            when that had ended.
        away_s: seconds between two steps in which it ran, or had ended already: nobody looked.
        leaving: sequences of the batch that ended meanwhile. The device may still write to their
            blocks, which are freed, or held as wished, when the batch is over.
    """

    plan: IterationPlan
    batch: list[Scheduled]
    launch: Launch
    began_s: float
    away_s: float = 0.0
    leaving: list[tuple[Sequence, HoldWish | None]] = field(default_factory=list)

    @property
    def live(self) -> list[Scheduled]:
        """The part of the batch whose sequences have not ended."""
        return [item for item in self.batch if item.seq.state is SequenceState.RUNNING]

    def go_on(self, runner: BatchRunner, before: Iteration, now: float) -> int:
        """Let the batch sample, now that the iteration before it is over and applied.

        Args:
            now: when that was over.

        Returns:
            the tokens that run in vain, since their sequences have ended.
        """
        live = self.live
        num_surplus = sum(one.num_tokens for one in self.batch) - sum(
            one.num_tokens for one in live
        )
        self.began_s, self.batch = now, live
        if before.launch.failure is None or not live:
            self.launch.sample(live)
        else:
            # It has run behind tokens that were never right.
            self.launch = Launch(runner, live)
        return num_surplus

    def took_s(self, ended_s: float, waited_s: float) -> float:
        """Return how many seconds it took, as far as that can be told.

        Whoever reads a stream slowly lets time pass between two steps, which is not the device's.
        Where the batch may have ended meanwhile, it counts as having taken what was predicted, or
        as near to that as can be.

        Args:
            ended_s: when its end was seen.
            waited_s: for how long it was waited for.
        """
        longest = ended_s - self.began_s
        if self.away_s <= waited_s:
            return longest
        return min(longest, max(longest - self.away_s, self.plan.predicted_s or 0.0))

    def runs(self, seq: Sequence) -> bool:
        """Return whether a sequence is in the batch."""
        return any(item.seq is seq for item in self.batch)


def can_follow(plan: IterationPlan, before: Iteration) -> bool:
    """Return whether a plan for the next iteration may be launched while one runs.

    It may not in these cases, in which the present order is kept: read, apply, launch.

    - Tokens are drafted, in either iteration: how many of them will be accepted is not known, and a
      proposer reads the text.
    - A sequence starts behind a prefill: the blocks that this computes may be its cached prefix.
    - Log probabilities of a prompt are asked for: they are worked out when the batch has ended.

    Args:
        plan: one that holds in the state to come (`minserve.engine.lookahead.confirm`).
        before: the iteration that runs.
    """
    if before.launch.failed or any(
        (plan.speculation, plan.catch_up, before.plan.speculation, before.plan.catch_up)
    ):
        return False
    prefills = [item.seq for item in before.batch if not item.seq.is_decoding]
    if prefills and plan.start:
        return False
    return all(seq.request.params.prompt_logprobs is None for seq in prefills)


class Overlap:
    """The iterations that the device has: none, one, or two where one follows the other.

    Args:
        release: takes a sequence's blocks back.
    """

    def __init__(self, release: Callable[[Sequence, HoldWish | None], None]) -> None:
        self._release = release
        self._iterations: list[Iteration] = []
        self._left_s = 0.0

    def __len__(self) -> int:
        return len(self._iterations)

    @property
    def first(self) -> Iteration | None:
        """The iteration that ends next."""
        return self._iterations[0] if self._iterations else None

    @property
    def leaving(self) -> list[Sequence]:
        """The sequences that have ended and whose blocks are still to be freed."""
        return [seq for one in self._iterations for seq, _ in one.leaving]

    def leave(self, now: float) -> None:
        """Note that a step ends here."""
        self._left_s = now

    def enter(self, now: float) -> None:
        """Note that a step begins here."""
        if self._iterations:
            self._iterations[0].away_s = now - self._left_s

    def add(self, iteration: Iteration) -> None:
        """Take an iteration that was launched now."""
        self._iterations.append(iteration)

    def release(self, seq: Sequence, wish: HoldWish | None = None) -> None:
        """Take back the blocks of a sequence that has ended: now, or when the device is done with it."""
        for iteration in reversed(self._iterations):
            if iteration.runs(seq):
                iteration.leaving.append((seq, wish))
                return
        self._release(seq, wish)

    def pop(self) -> Iteration:
        """Take out the first iteration, which is over."""
        iteration = self._iterations.pop(0)
        self._free(iteration)
        return iteration

    def drop(self) -> None:
        """Forget all iterations: their results will not be asked for.

        Whatever is launched from now on runs behind them.
        """
        while self._iterations:
            self._free(self._iterations.pop())

    def _free(self, iteration: Iteration) -> None:
        for seq, wish in iteration.leaving:
            self._release(seq, wish)
        iteration.leaving.clear()
