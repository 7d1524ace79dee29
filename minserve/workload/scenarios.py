"""`Scenario`: the workloads of the SLOs-Serve evaluation (arXiv 2504.08784), at any rate.

What each is made of, and how far from the paper's own, is told in `recordings`. The promises
are its classes (`minserve.slo.preset_classes`), for an A100; `Scenario.scaled` fits lengths
and paces to other devices.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from minserve.errors import WorkloadError
from minserve.slo import MAX_SLOWDOWN, SLO, DecodeStage
from minserve.workload import recordings
from minserve.workload.arrivals import check_burstiness, gamma_arrivals, recorded_arrivals
from minserve.workload.conversation import Conversation, Turn
from minserve.workload.recordings import Chain, Recording, scaled
from minserve.workload.texts import fill

# Classes with a longer TPOT have the loose one.
TIGHT_TPOT_S = 0.050


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A workload to draw from.

    Attributes:
        help: one line.
        num_requests: how many are drawn where nothing else is said.
        sources: recordings that are laid over each other, each with as many requests.
        lengths: factor on all lengths.
        tight, loose: the paces of 50 and 100 ms as multiples of a lone request's time per
            token; ``None`` keeps the milliseconds.
        tool_time_s: mean of what a tool takes, exponentially distributed.
        burstiness: of Gamma distributed gaps, 1 being Poisson; ``None`` keeps recorded times
            where there are any, and is 1 elsewhere.
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

    def scaled(
        self,
        lengths: float = 1.0,
        *,
        tight: float | None = None,
        loose: float | None = None,
        tool_time: float | None = None,
    ) -> Scenario:
        """The same for another device.

        Args:
            lengths: what all lengths are multiplied by; none falls below 1 token.
            tight, loose: TPOTs instead of 50 and 100 ms, as slowdowns of a lone request's.
            tool_time: mean seconds that a tool takes.

        Raises:
            WorkloadError: for a factor or time that is none.
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
        """The same with Gamma distributed gaps of this shape, 1 being Poisson.

        Raises:
            WorkloadError: for a shape out of range.
        """
        check_burstiness(burstiness)
        return replace(self, burstiness=burstiness)

    @property
    def classes(self) -> dict[str, SLO]:
        """Its classes of requests, by name."""
        calls = (call for source in self.sources for chain in source().chains for call in chain)
        slos = {call.slo.name: call.slo for call in calls}
        return {name: self._slo(slo) for name, slo in slos.items()}

    @property
    def mean_prompt_tokens(self) -> float:
        """Per request."""
        return self._mean(lambda turn: turn.prompt_tokens)

    @property
    def mean_output_tokens(self) -> float:
        """Per request, thinking included."""
        return self._mean(lambda turn: turn.output_tokens)

    def draw(
        self,
        rate: float,
        *,
        seed: int,
        num_requests: int | None = None,
        seconds: float | None = None,
        texts: bool = False,
    ) -> list[Conversation]:
        """A workload; the same for the same arguments.

        The number of requests is exact, and with it the rate: requests divided by the time
        in which conversations arrive. Chains of calls are never cut: their number is the
        nearest that whole chains give. Later calls of the last chains come after that time.

        Args:
            rate: requests (turns) per second over the whole.
            num_requests: in all; or
            seconds: during which all conversations arrive, in [0, seconds).
            texts: with prompts as texts, at 4 characters a token; `texts.fill` counts with a
                tokenizer instead.

        Returns:
            in order of time.

        Raises:
            WorkloadError: for a rate, number or time that is none.
        """
        count = self._count(rate, num_requests, seconds)
        parts = []
        for i, (source, share) in enumerate(
            zip(self.sources, _shares(count, len(self.sources)), strict=True)
        ):
            if share:
                rng = random.Random(f"{seed} {self.name} {i}")
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
        said = 0
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
        """Over all turns of each source; sources count alike, as they do in what is drawn."""
        rng = random.Random(0)
        return statistics.fmean(
            statistics.fmean(of(t) for chain in source().chains for t in self._turns(chain, rng))
            for source in self.sources
        )


def find_scenario(name: str) -> Scenario:
    """The scenario of that name.

    Raises:
        WorkloadError: if there is none.
    """
    if name not in SCENARIOS:
        raise WorkloadError(f"no scenario {name!r}; there are {', '.join(SCENARIOS)}")
    return SCENARIOS[name]


def _shares(count: int, parts: int) -> list[int]:
    """A number in as equal whole parts as can be."""
    return [count // parts + (i < count % parts) for i in range(parts)]


def _pick(recording: Recording, count: int, rng: random.Random) -> tuple[int, list[Chain]]:
    """Chains with about `count` calls together.

    Returns:
        the index of the first one, and the chains: a stretch of the recording where it has
        times, going on with its beginning at its end; else dealt from it like cards, none
        twice before all of them.
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
        # The last one is taken where that comes nearer than leaving it.
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
)
