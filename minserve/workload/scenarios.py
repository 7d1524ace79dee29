"""`Scenario`: the workloads of the SLOs-Serve evaluation (arXiv 2504.08784), at any rate.

`recordings` tells what each workload is made of, and how it differs from the paper's own. The
promises are its classes (`minserve.slo.objectives.preset_classes`), for an A100; `Scenario.scaled` fits
lengths and paces to other devices.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType

from minserve.errors import WorkloadError
from minserve.slo.objectives import MAX_SLOWDOWN, SLO, DecodeStage
from minserve.workload import recordings
from minserve.workload.arrivals import check_burstiness, gamma_arrivals, recorded_arrivals
from minserve.workload.conversation import Conversation, Turn
from minserve.workload.recordings import Chain, Recording, scaled
from minserve.workload.report import percentile
from minserve.workload.texts import fill

# Of the outputs of a class, for the pace that follows from a deadline.
PACED_QUANTILE = 0.9
# Classes with a longer TPOT than this have the loose pace.
TIGHT_TPOT_S = 0.050


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A source of workloads of one kind.

    Attributes:
        help: one line about it.
        num_requests: default number of requests of a workload.
        sources: recordings that run at the same time, each with the same share of requests.
        lengths: factor on all lengths.
        tight, loose: the paces of 50 and 100 ms as multiples of a lone request's time per
            token; ``None`` keeps the milliseconds.
        tool_time_s: mean seconds that a tool takes; the times are exponentially distributed.
        burstiness: shape of Gamma distributed gaps, where 1 is Poisson; ``None`` keeps recorded
            times where there are any, and means 1 elsewhere.
        drawn_as: name of the scenario whose requests are drawn for the same seed; empty for its own.
        ttft_share: if it is set, the server is not told of deadlines of whole answers. It is asked
            for a TTFT of this share of the deadline, and for the TPOT by which an output of the
            class then ends in time that is longer than nine of ten (`PACED_QUANTILE`).
    """

    name: str
    help: str
    num_requests: int
    sources: tuple[Callable[[], Recording], ...]
    lengths: float = 1.0
    tight: float | None = None
    loose: float | None = None
    tool_time_s: float = 1.0
    burstiness: float | None = None
    drawn_as: str = ""
    ttft_share: float | None = None

    def scaled(
        self,
        lengths: float = 1.0,
        *,
        tight: float | None = None,
        loose: float | None = None,
        tool_time: float | None = None,
    ) -> Scenario:
        """Return this scenario for another device.

        Args:
            lengths: factor on all lengths; no length falls below 1 token.
            tight, loose: TPOTs instead of 50 and 100 ms, as multiples of a lone request's TPOT.
            tool_time: mean seconds that a tool takes.

        Raises:
            WorkloadError: for a factor or time out of range.
        """
        if not 0 < lengths < math.inf:
            raise WorkloadError(f"the factor on lengths must be above 0, not {lengths}")
        for name, slowdown in (("tight", tight), ("loose", loose)):
            if slowdown is not None and not 1 <= slowdown <= MAX_SLOWDOWN:
                raise WorkloadError(
                    f"the {name} pace must be at least 1 lone request's time per token, "
                    f"not {slowdown}"
                )
        if tool_time is not None and not 0 <= tool_time < math.inf:
            raise WorkloadError(f"the time of tools must be 0 seconds or more, not {tool_time}")
        return replace(
            self,
            lengths=self.lengths * lengths,
            tight=self.tight if tight is None else tight,
            loose=self.loose if loose is None else loose,
            tool_time_s=self.tool_time_s if tool_time is None else tool_time,
        )

    def with_arrivals(self, burstiness: float) -> Scenario:
        """Return this scenario with Gamma distributed gaps of the given shape; 1 is Poisson.

        Raises:
            WorkloadError: for a shape out of range.
        """
        check_burstiness(burstiness)
        return replace(self, burstiness=burstiness)

    @property
    def classes(self) -> dict[str, SLO]:
        """The classes of its requests, by name."""
        calls = (call for source in self.sources for chain in source().chains for call in chain)
        slos = {call.slo.name: call.slo for call in calls}
        return {name: self._slo(slo) for name, slo in slos.items()}

    @property
    def mean_prompt_tokens(self) -> float:
        """Mean tokens of a request's prompt."""
        return self._mean(lambda turn: turn.prompt_tokens)

    @property
    def mean_output_tokens(self) -> float:
        """Mean tokens of a request's output, thinking included."""
        return self._mean(lambda turn: turn.output_tokens)

    @property
    def recorded_rate(self) -> float | None:
        """Mean requests per second of its recordings with arrival times; ``None`` without any."""
        timed = [recording for source in self.sources if (recording := source()).times]
        if not timed:
            return None
        return statistics.fmean(len(one.times) / one.period_s for one in timed)

    def draw(
        self,
        rate: float,
        *,
        seed: int,
        num_requests: int | None = None,
        seconds: float | None = None,
        texts: bool = False,
    ) -> list[Conversation]:
        """Return a workload; the same arguments give the same workload.

        The number of requests is exact, and so is the rate, which is requests divided by the time
        in which conversations arrive. Chains of calls are never cut: with chains, the number of
        requests is the nearest sum of whole chains. Later calls of the last chains come after that
        time.

        Args:
            rate: requests (turns) per second over the whole workload.
            num_requests: number of requests; or
            seconds: time in which all conversations arrive, in [0, seconds).
            texts: give the prompts as texts too, with 4 characters per token; `texts.fill` with a
                tokenizer counts real tokens instead.

        Returns:
            conversations in order of time.

        Raises:
            WorkloadError: for a rate, number or time out of range.
        """
        count = self._count(rate, num_requests, seconds)
        parts = []
        for i, (source, share) in enumerate(
            zip(self.sources, _shares(count, len(self.sources)), strict=True)
        ):
            if share:
                rng = random.Random(f"{seed} {self.drawn_as or self.name} {i}")
                parts.append((source(), *_pick(source(), share, rng), rng))
        num_drawn = sum(len(chain) for _, _, chains, _ in parts for chain in chains)
        span_s = num_drawn / rate if seconds is None else seconds
        workload = [one for part in parts for one in self._conversations(*part, span_s)]
        workload.sort(key=lambda conversation: conversation.arrival_s)
        return fill(workload, seed=seed) if texts else workload

    def _count(self, rate: float, num_requests: int | None, seconds: float | None) -> int:
        if not 0 < rate < math.inf:
            raise WorkloadError(f"the rate must be above 0 requests per second, not {rate}")
        if num_requests is not None and seconds is not None:
            raise WorkloadError("give a number of requests or seconds, not both")
        if seconds is not None:
            if not 0 < seconds < math.inf:
                raise WorkloadError(f"seconds must be above 0, not {seconds}")
            return max(1, round(rate * seconds))
        count = self.num_requests if num_requests is None else num_requests
        if count < 1:
            raise WorkloadError(f"the number of requests must be at least 1, not {count}")
        return count

    def _conversations(
        self,
        recording: Recording,
        first: int,
        chains: list[Chain],
        rng: random.Random,
        span_s: float,
    ) -> list[Conversation]:
        if recording.times and self.burstiness is None:
            times = recorded_arrivals(
                recording.times, recording.period_s, first, len(chains), span_s
            )
        else:
            shape = 1.0 if self.burstiness is None else self.burstiness
            times = gamma_arrivals(len(chains), span_s, rng, burstiness=shape)
        return [
            Conversation(time, self._turns(chain, rng))
            for time, chain in zip(times, chains, strict=True)
        ]

    def _turns(self, chain: Chain, rng: random.Random) -> tuple[Turn, ...]:
        turns: list[Turn] = []
        said, paced = 0, _fixed_paces(self)
        for call in chain:
            thinking = scaled(call.thinking_tokens, self.lengths) if call.thinking_tokens else 0
            answer = scaled(call.output_tokens - call.thinking_tokens, self.lengths)
            turn = Turn(
                slo=self._slo(call.slo),
                prompt_tokens=said + scaled(call.new_tokens, self.lengths),
                output_tokens=thinking + answer,
                shared_tokens=said,
                delay_s=rng.expovariate(1 / self.tool_time_s) if said and self.tool_time_s else 0.0,
                thinking_tokens=thinking,
                asked=paced.get(call.slo.name),
            )
            said = turn.prompt_tokens + turn.output_tokens
            turns.append(turn)
        return tuple(turns)

    def _slo(self, slo: SLO) -> SLO:
        if slo.stages:
            return replace(slo, stages=tuple(self._stage(stage) for stage in slo.stages))
        slowdown = self._slowdown(slo.tpot)
        return slo if slowdown is None else replace(slo, tpot=None, tpot_slowdown=slowdown)

    def _stage(self, stage: DecodeStage) -> DecodeStage:
        slowdown = self._slowdown(stage.tpot)
        return stage if slowdown is None else replace(stage, tpot=None, tpot_slowdown=slowdown)

    def _slowdown(self, tpot_s: float | None) -> float | None:
        if tpot_s is None:
            return None
        return self.tight if tpot_s <= TIGHT_TPOT_S else self.loose

    def _mean(self, of: Callable[[Turn], int]) -> float:
        """Return a mean over all turns; sources have equal weight, as in a drawn workload."""
        rng = random.Random(0)
        return statistics.fmean(
            statistics.fmean(of(t) for chain in source().chains for t in self._turns(chain, rng))
            for source in self.sources
        )


@cache
def _fixed_paces(scenario: Scenario) -> dict[str, SLO]:
    """Return what the server is asked for instead of a deadline, by class."""
    share = scenario.ttft_share
    if share is None:
        return {}
    calls = [call for source in scenario.sources for chain in source().chains for call in chain]
    found = {}
    for name, slo in scenario.classes.items():
        if slo.finish is not None:
            own = [scaled(c.output_tokens, scenario.lengths) for c in calls if c.slo.name == name]
            usual = percentile(own, PACED_QUANTILE)
            tpot_s = (1.0 - share) * slo.finish / usual
            found[name] = SLO(ttft=share * slo.finish, tpot=tpot_s, name=name)
    return found


def find_scenario(name: str) -> Scenario:
    """Return the scenario of that name.

    Raises:
        WorkloadError: if there is no such scenario.
    """
    if name not in SCENARIOS:
        raise WorkloadError(f"no scenario {name!r}; there are {', '.join(SCENARIOS)}")
    return SCENARIOS[name]


def _shares(count: int, parts: int) -> list[int]:
    """Split a number into whole parts that differ by at most 1."""
    return [count // parts + (i < count % parts) for i in range(parts)]


def _pick(recording: Recording, count: int, rng: random.Random) -> tuple[int, list[Chain]]:
    """Pick chains with about `count` calls together.

    Returns:
        the index of the first chain, and the chains. With arrival times they are a part of
        the recording, which continues with its beginning after its end. Without times they are
        dealt like cards: no chain comes twice before each came once.
    """
    chains = recording.chains
    if recording.times:
        first = rng.randrange(len(chains))
        return first, [chains[(first + i) % len(chains)] for i in range(count)]
    picked: list[Chain] = []
    deck: list[Chain] = []
    missing = count
    while True:
        deck = deck or rng.sample(chains, len(chains))
        chain = deck.pop()
        # The last chain is kept if the total is nearer to the wanted number with it than without.
        if picked and abs(missing - len(chain)) >= missing:
            return 0, picked
        picked.append(chain)
        missing -= len(chain)


def _scenarios(*all_of_them: Scenario) -> Mapping[str, Scenario]:
    return MappingProxyType({scenario.name: scenario for scenario in all_of_them})


SCENARIOS = _scenarios(
    Scenario(
        name="chatbot",
        help="chat: long prompts and answers, even arrivals of a recorded trace",
        num_requests=1391,
        sources=(recordings.chatbot,),
    ),
    Scenario(
        name="coding",
        help="code completion: long prompts, short answers at a tight pace, in recorded bursts",
        num_requests=559,
        sources=(recordings.coding,),
    ),
    Scenario(
        name="summarization",
        help="papers to summarize, first token soon; Poisson",
        num_requests=1000,
        sources=(recordings.summarization,),
    ),
    Scenario(
        name="mixed",
        help="chatbot, coding and summarization at once, a third of the requests each",
        num_requests=3 * 559,
        sources=(recordings.chatbot, recordings.coding, recordings.summarization),
    ),
    Scenario(
        name="tools",
        help="chained calls of a model that uses tools; chains arrive Poisson",
        num_requests=720,
        sources=(recordings.tools,),
    ),
    Scenario(
        name="reasoning",
        help="short questions, long thinking at a tight pace, then an answer; Poisson",
        num_requests=1000,
        sources=(recordings.reasoning,),
    ),
    Scenario(
        name="deadlines",
        help="chat, and as many edits, summaries and reports that are due as a whole after 5 to "
        "60 s; chats arrive evenly, the others Poisson",
        num_requests=1200,
        sources=(recordings.chatbot, recordings.deadlines),
    ),
    Scenario(
        name="deadlines_fixed",
        help="the same requests, but the server is asked for a TTFT and a TPOT per class that "
        "follow from the deadlines, by which alone they are judged",
        num_requests=1200,
        sources=(recordings.chatbot, recordings.deadlines),
        drawn_as="deadlines",
        ttft_share=0.1,
    ),
)
