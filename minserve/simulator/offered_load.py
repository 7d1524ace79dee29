"""`OfferedLoad`: sends a workload's turns on the virtual clock and collects their verdicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minserve.planner.predict.perf_model import PerfModel
from minserve.request import Request
from minserve.sampling_params import SamplingParams
from minserve.simulator.events import EventLoop
from minserve.simulator.simulated_sequence import SimulatedSequence, outputs_of
from minserve.slo.objectives import SLO, Standing, Targets
from minserve.slo.task_call import TaskKey
from minserve.slo.task_table import TaskTable
from minserve.workload.conversation import Conversation, Turn
from minserve.workload.task_terms import TaskVerdict
from minserve.workload.verdict import Cause, Verdict, cause_of_miss

# The class of all tasks, by which a table of tasks learns what they take.
TASK_CLASS = "task"
# Called with all outputs of a turn.
Arrive = Callable[..., None]
Progressed = Callable[["OfferedLoad"], None]


@dataclass(slots=True)
class _Place:
    """A turn: its place in the workload, its due time, and the number of unfinished outputs.

    Attributes:
        in_vain: the task of which it is a call was given up.
    """

    conversation: int
    number: int
    due_s: float
    num_open: int = 0
    in_vain: bool = False


class OfferedLoad:
    """Sends turns when they are due, judges their answers, and sends the turns that follow.

    Args:
        device: the performance model whose times slowdowns are multiples of.
        max_model_len: longest sequence in tokens; limits the outputs of a request.
        lengths: filled with the true output lengths by request id, for an oracle.
        arrive: called with the outputs of each turn.
        progressed: called after each verdict.
        request_s: seconds that a turn takes to reach the engine, and its tokens to come back.
        tells_lengths: true if a turn's ``max_tokens`` is its true length.

    Attributes:
        verdicts: verdicts on the turns that ended, in the order in which they ended.
        task_verdicts: verdicts on the tasks that ended, where conversations are tasks.
    """

    def __init__(
        self,
        loop: EventLoop,
        workload: Sequence[Conversation],
        device: PerfModel,
        max_model_len: int,
        lengths: dict[str, int],
        arrive: Arrive,
        progressed: Progressed = lambda _: None,
        *,
        request_s: float = 0.0,
        tells_lengths: bool = False,
    ) -> None:
        self._loop, self._workload, self._device = loop, workload, device
        self._max_model_len, self._lengths = max_model_len, lengths
        self._arrive, self._progressed = arrive, progressed
        self._request_s, self._tells_lengths = request_s, tells_lengths
        self._places: dict[str, _Place] = {}
        self._num_sent = 0
        self._tasks = TaskTable()
        self.verdicts: list[Verdict] = []
        self.task_verdicts: list[TaskVerdict] = []
        for number, conversation in enumerate(workload):
            self._offer(_Place(number, 0, conversation.arrival_s), None)

    def ended(self, seq: SimulatedSequence) -> None:
        """Note that an output has ended; the last output of a turn completes the answer."""
        place = self._places[seq.request.request_id]
        place.num_open -= 1
        if place.num_open:
            return
        seq, every = seq.siblings[0], [one.judged for one in seq.siblings]
        if seq.request.task is not None:
            self._tasks.end(seq.request.task, self._loop.now, self._work_s(seq))
        # The engine's clock began when it had the request; the client has waited since it was due.
        for progress in every:
            progress.arrival_s = place.due_s
            progress.finish_by_s = place.due_s + progress.targets.finish_s
        causes = [cause for one in every if (cause := cause_of_miss(one, done=True)) is not None]
        self._note(
            seq, place, causes[0] if causes else None, all(one.attained_mean for one in every)
        )
        turns = self._workload[place.conversation].turns
        if place.number + 1 < len(turns):
            due_s = self._loop.now + turns[place.number + 1].delay_s
            self._offer(
                _Place(place.conversation, place.number + 1, due_s, in_vain=place.in_vain), seq
            )
        else:
            self._judge_task(place, self._loop.now)

    def refused(self, seq: SimulatedSequence) -> None:
        """Note that a request is refused; later turns of its conversation are not sent either."""
        place = self._places[seq.request.request_id]
        if seq.request.task is not None:
            self._tasks.cancel(seq.request.task, self._loop.now)
        self._judge_task(place, None)
        self._note(seq, place, Cause.REJECTED, attained_mean=False)
        for turn in self._workload[place.conversation].turns[place.number + 1 :]:
            self._add(
                Verdict(
                    name=turn.slo.name,
                    arrival_s=self._loop.now,
                    cause=Cause.NOT_SENT,
                    attained_mean=False,
                    prompt_tokens=turn.prompt_tokens,
                )
            )

    def _offer(self, place: _Place, before: SimulatedSequence | None) -> None:
        self._loop.at(place.due_s + self._request_s, lambda: self._send(place, before))

    def _send(self, place: _Place, before: SimulatedSequence | None) -> None:
        conversation = self._workload[place.conversation]
        turn = conversation.turns[place.number]
        self._num_sent += 1
        said = [] if before is None else before.token_ids[: turn.shared_tokens]
        # The tokens that belong to one prompt alone equal those of no other prompt.
        prompt = (*said, *(self._num_sent,) * (turn.prompt_tokens - len(said)))
        room = self._max_model_len - turn.prompt_tokens
        slo, asked_for, judged_by = self._promise(conversation, place)
        request = Request(
            request_id=str(self._num_sent),
            prompt_token_ids=prompt,
            params=SamplingParams(
                n=turn.n, max_tokens=turn.output_tokens if self._tells_lengths else room
            ),
            seed=self._num_sent,
            arrival_s=self._loop.now,
            slo=slo,
            targets=asked_for,
        )
        if slo.task is not None:
            key = TaskKey("", "", slo.task.id)
            call = self._tasks.begin(key, slo.task, TASK_CLASS, request.arrival_s)
            place.in_vain |= call.given_up
            request = request.in_task(call)
        self._lengths[request.request_id] = turn.output_tokens
        place.num_open = turn.n
        self._places[request.request_id] = place
        self._arrive(*outputs_of(request, turn, place.conversation, judged_by))

    def _targets(self, turn: Turn, slo: SLO) -> Targets:
        return slo.resolve(
            self._device.zero_load_prefill_s(turn.prompt_tokens),
            self._device.zero_load_decode_s(turn.prompt_tokens),
        )

    def _promise(self, conversation: Conversation, place: _Place) -> tuple[SLO, Targets, Targets]:
        """Return what a turn asks for, the same in seconds, and what it is judged by."""
        turn, terms = conversation.turns[place.number], conversation.terms
        if terms is None:
            asked = turn.asked_slo
            return asked, self._targets(turn, asked), self._targets(turn, turn.slo)
        slo, targets = terms.promise(
            conversation, place.number, self._device, str(place.conversation)
        )
        if slo.task is None:
            return slo, targets, targets
        # How the server shares the task's time among its calls is its own affair.
        due_s = conversation.arrival_s + slo.task.finish
        return slo, targets, Targets(finish_s=due_s - place.due_s)

    def _work_s(self, seq: SimulatedSequence) -> float:
        """Return the seconds that a turn takes on the idle device."""
        num_prompt, turn = seq.num_prompt_tokens, seq.turn
        prefill_s = self._device.zero_load_prefill_s(max(1, num_prompt - turn.shared_tokens))
        return prefill_s + turn.output_tokens * self._device.zero_load_decode_s(num_prompt)

    def _judge_task(self, place: _Place, ended_s: float | None) -> None:
        """Note the verdict on a task.

        Args:
            ended_s: when its last call ended; ``None`` if that is not going to be.
        """
        conversation = self._workload[place.conversation]
        if conversation.terms is None:
            return
        self.task_verdicts.append(
            TaskVerdict(
                arrival_s=conversation.arrival_s,
                finish_s=conversation.terms.finish_s(conversation, self._device),
                took_s=None if ended_s is None else ended_s - conversation.arrival_s,
                num_calls=len(conversation.turns),
                given_up=place.in_vain,
            )
        )

    def _note(
        self, seq: SimulatedSequence, place: _Place, cause: Cause | None, attained_mean: bool
    ) -> None:
        del self._lengths[seq.request.request_id], self._places[seq.request.request_id]
        every = [one.judged for one in seq.siblings]
        self._add(
            Verdict(
                name=seq.turn.slo.name,
                arrival_s=place.due_s,
                cause=cause,
                attained_mean=attained_mean,
                best_effort=any(one.standing is Standing.BEST_EFFORT for one in seq.siblings),
                prompt_tokens=seq.num_prompt_tokens,
                output_tokens=sum(one.num_output_tokens for one in seq.siblings),
                ttft_s=max((t for one in every if (t := one.ttft_s) is not None), default=None),
                tpot_s=max(
                    (t for one in every if (t := one.mean_tpot_s) is not None), default=None
                ),
                finish_s=max((t for one in every if (t := one.finish_s) is not None), default=None),
            )
        )

    def _add(self, verdict: Verdict) -> None:
        self.verdicts.append(verdict)
        self._progressed(self)


def first_longer(workload: Sequence[Conversation], longest: int) -> Turn | None:
    """Return the first turn whose prompt and output together have more tokens than ``longest``."""
    turns = (turn for conversation in workload for turn in conversation.turns)
    return next((t for t in turns if t.prompt_tokens + t.output_tokens > longest), None)
