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
from minserve.workload.conversation import Conversation, Turn
from minserve.workload.verdict import Cause, Verdict, cause_of_miss

# Called with all outputs of a turn.
Arrive = Callable[..., None]
Progressed = Callable[["OfferedLoad"], None]


@dataclass(slots=True)
class _Place:
    """A turn: its place in the workload, its due time, and the number of unfinished outputs."""

    conversation: int
    number: int
    due_s: float
    num_open: int = 0


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
        self.verdicts: list[Verdict] = []
        for number, conversation in enumerate(workload):
            self._offer(_Place(number, 0, conversation.arrival_s), None)

    def ended(self, seq: SimulatedSequence) -> None:
        """Note that an output has ended; the last output of a turn completes the answer."""
        place = self._places[seq.request.request_id]
        place.num_open -= 1
        if place.num_open:
            return
        seq, every = seq.siblings[0], [one.judged for one in seq.siblings]
        # The engine's clock began when it had the request; the client has waited since it was due.
        for progress in every:
            progress.arrival_s = place.due_s
        causes = [cause for one in every if (cause := cause_of_miss(one, done=True)) is not None]
        self._note(
            seq, place, causes[0] if causes else None, all(one.attained_mean for one in every)
        )
        turns = self._workload[place.conversation].turns
        if place.number + 1 < len(turns):
            due_s = self._loop.now + turns[place.number + 1].delay_s
            self._offer(_Place(place.conversation, place.number + 1, due_s), seq)

    def refused(self, seq: SimulatedSequence) -> None:
        """Note that a request is refused; later turns of its conversation are not sent either."""
        place = self._places[seq.request.request_id]
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
        turn = self._workload[place.conversation].turns[place.number]
        self._num_sent += 1
        said = [] if before is None else before.token_ids[: turn.shared_tokens]
        # The tokens that belong to one prompt alone equal those of no other prompt.
        prompt = (*said, *(self._num_sent,) * (turn.prompt_tokens - len(said)))
        room = self._max_model_len - turn.prompt_tokens
        judged_by, asked_for = (self._targets(turn, slo) for slo in (turn.slo, turn.asked_slo))
        request = Request(
            request_id=str(self._num_sent),
            prompt_token_ids=prompt,
            params=SamplingParams(
                n=turn.n, max_tokens=turn.output_tokens if self._tells_lengths else room
            ),
            seed=self._num_sent,
            arrival_s=self._loop.now,
            slo=turn.asked_slo,
            targets=asked_for,
        )
        self._lengths[request.request_id] = turn.output_tokens
        place.num_open = turn.n
        self._places[request.request_id] = place
        self._arrive(*outputs_of(request, turn, place.conversation, judged_by))

    def _targets(self, turn: Turn, slo: SLO) -> Targets:
        return slo.resolve(
            self._device.zero_load_prefill_s(turn.prompt_tokens),
            self._device.zero_load_decode_s(turn.prompt_tokens),
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
