"""`SimulatedSequence`: a sequence whose output's length is known before it is made."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from minserve.engine.batch import RunResult
from minserve.engine.live_output import LENGTH_END, End
from minserve.engine.speculation.proposal import SampledToken, Verified
from minserve.outputs import OutputDelta, TokenLogprob
from minserve.request import Request, Sequence
from minserve.slo.attainment import Progress
from minserve.slo.objectives import Targets
from minserve.workload.conversation import Turn


@dataclass(eq=False, slots=True)
class SimulatedSequence(Sequence):
    """A sequence whose output's length is known to the simulator, not to the planner.

    To the engine core it is its own output (`minserve.engine.live_output.Output`): it has no
    client, so that nothing is told before its end.

    Attributes:
        turn: the turn of which it is an output.
        conversation: number of the turn's conversation.
        siblings: all outputs of the turn, this one among them; set by the code that makes them.
        hops: number of times that it was moved on to another replica.
        tried: numbers of the replicas that could not promise its SLO; the siblings share the set.
        num_left: output tokens that are still to come.
        num_thinking_left: of these, tokens until the thinking ends.
        judged: how it stands against what its turn is judged by, if the server was asked for
            something else; otherwise its own `progress`.
        next_token: the result of a pass that samples its next token without drafts: all its
            tokens are equal.
        seq: the sequence itself, for it is its own output.
    """

    turn: Turn = field(kw_only=True)
    conversation: int = 0
    siblings: list[SimulatedSequence] = field(default_factory=list)
    hops: int = 0
    tried: set[int] = field(default_factory=set)
    num_left: int = 0
    num_thinking_left: int = 0
    judged: Progress = field(init=False)
    next_token: RunResult = field(init=False)
    seq: SimulatedSequence = field(init=False)

    def __post_init__(self) -> None:
        # With ``slots=True`` the decorator makes a new class, which a plain `super` does not find.
        Sequence.__post_init__(self)
        assert self.progress is not None, "every turn has an SLO"
        self.judged = self.progress
        self.seq = self
        self.siblings = self.siblings or [self]
        self.num_left = self.turn.output_tokens
        self.num_thinking_left = self.turn.thinking_tokens
        self.next_token = RunResult(Verified((SampledToken(self.request.seed, None),), 0))

    def as_new(self) -> SimulatedSequence:
        """Return the first output of the same request with nothing done, to be asked for again."""
        targets = self.judged.targets
        first, *others = outputs_of(self.request, self.turn, self.conversation, targets)
        for one in (first, *others):
            one.hops, one.tried = self.hops, self.tried
        return first

    def append(self, tokens: SequenceOf[SampledToken], now: float) -> tuple[int, End | None]:
        """Append tokens up to the length that the output will have."""
        tokens = tokens[: self.num_left]
        token_ids, progress, judged = self.token_ids, self.slo_progress, self.judged
        for token in tokens:
            token_ids.append(token.token_id)
            progress.add_token(now)
            if judged is not progress:
                judged.add_token(now)
            if self.num_thinking_left:
                self.num_thinking_left -= 1
                if not self.num_thinking_left:
                    progress.end_stage()
                    if judged is not progress:
                        judged.end_stage()
        num = len(tokens)
        self.num_left -= num
        return num, None if self.num_left else LENGTH_END

    def add_prompt_logprobs(self, logprobs: SequenceOf[TokenLogprob]) -> None:
        """Do nothing: no simulated request asks for them."""

    def news(self) -> None:
        """Return nothing, since there is no client."""

    def last_news(self, end: End, error: Exception | None) -> OutputDelta:
        """Return a delta that says how the output ended."""
        return OutputDelta(
            self.request.request_id, self.index, finish_reason=end.reason, error=error
        )


def outputs_of(
    request: Request, turn: Turn, conversation: int, judged_by: Targets | None = None
) -> list[SimulatedSequence]:
    """Return new sequences for all outputs of a turn, as siblings.

    Args:
        judged_by: what they are judged by, if that is not what the server is asked for.
    """
    seqs = [
        SimulatedSequence(request, index, turn=turn, conversation=conversation)
        for index in range(turn.n)
    ]
    for seq in seqs:
        seq.siblings, seq.tried = seqs, seqs[0].tried
        if judged_by is not None and judged_by != request.targets:
            seq.judged = Progress(judged_by, request.arrival_s)
    return seqs
