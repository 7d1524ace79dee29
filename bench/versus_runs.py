"""The runs of `versus_vllm.py`: servers take turns, searches go on, disturbed runs come again."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from slo_servers import DISTURBED_CORES, await_quiet
from tqdm import tqdm
from versus_report import Run, Search, Store, key, search
from versus_servers import Cores, Server, Watch

from minserve.slo import SLO
from minserve.workload.client import Load, Tally, run_load
from minserve.workload.conversation import Conversation, Turn
from minserve.workload.report import Report
from minserve.workload.scenarios import Scenario
from minserve.workload.texts import fill
from minserve.workload.zero_load import ZeroLoad, measure_speed

# Hosts of virtual machines slow them down unseen: a lone request's time per token after a run,
# over the best one.
DISTURBED_SLOWNESS = 1.3
# A disturbed run is repeated, whatever came out.
ATTEMPTS = 3
WARM_UP_S = 8.0
LONE_TOKENS = 24
# Low rates are tried for longer: a share of few requests means little.
LEAST_REQUESTS, LONGEST_S = 24, 60.0
# The number that every prompt begins with, in tokens.
MARK_TOKENS = 7
NO_SLO = SLO(ttft=1e6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is measured.

    Attributes:
        seconds: of arrivals, per run.
        repeats: of each rate, with other seeds.
        tolerance: a search ends when its bracket is so narrow.
    """

    seconds: float
    repeats: int
    tolerance: float
    seed: int


class Bench:
    """All runs of one invocation.

    Args:
        servers: by label, running.
        speed: of the reference server when idle; slowdowns are multiples of it.
        count: tokens of a text.

    Attributes:
        searches: by scenario.
    """

    def __init__(
        self, effort: Effort, store: Store, servers: Mapping[str, Server],
        scenarios: Mapping[str, Scenario], speed: ZeroLoad, count: Callable[[str], int],
    ) -> None:  # fmt: skip
        self._effort, self._store, self._servers = effort, store, servers
        self._scenarios, self._speed, self._count = scenarios, speed, count
        self._lone_s: dict[str, float] = {}
        self.searches = {
            name: Search(first_rate(one, speed), effort.repeats, effort.tolerance)
            for name, one in scenarios.items()
        }

    def warm_up(self) -> None:
        """Some load for each server, then a lone request's time."""
        name, how = next(iter(self.searches.items()))
        for label, server in self._servers.items():
            trace = self._trace(name, how.start, WARM_UP_S, f"warm up {label}", repeat=-1)
            run_load(server.endpoint, trace, self._speed)
            self._lone_s[label] = min(self._lone_tpot(server) for _ in range(3))

    def measure(self) -> None:
        """Every server's capacity in every scenario; run by run the servers take turns."""
        with tqdm(total=len(self.searches) * len(self._servers), unit="capacity") as bar:
            for scenario, how in self.searches.items():
                searching = list(self._servers)
                while searching:
                    for label in list(searching):
                        _, wanted = search(self._store.of(label, scenario), how)
                        if wanted is None:
                            searching.remove(label)
                            bar.update()
                        else:
                            self._store.add(self._run(label, scenario, *wanted, bar))

    def _run(self, label: str, scenario: str, rate: float, repeat: int, bar: tqdm) -> Run:
        """One run, again where it was disturbed."""
        seconds = min(LONGEST_S, max(self._effort.seconds, LEAST_REQUESTS / rate))
        name = f"{label}, {scenario} at {key(rate)}/s"

        def show(tally: Tally) -> None:
            bar.set_postfix_str(f"{name}: {tally.attained} of {tally.done}")

        for attempt in range(ATTEMPTS):
            await_quiet()
            words = f"{key(rate)} {repeat} {attempt}"
            trace = self._trace(scenario, rate, seconds, words, repeat=repeat)
            load, cores = self._drive(self._servers[label], trace, show)
            for error, count in load.errors().items():
                tqdm.write(f"{name}: {count} times: {error}")
            run = self._judge(label, scenario, rate, repeat, seconds, load, cores)
            tqdm.write(
                f"{name}: {run.attainment:.0%} of {run.report['offered']} attained, "
                f"{run.attainment_mean:.0%} in the mean form"
            )
            if not run.disturbed:
                break
            tqdm.write(
                f"{name}: other work took {run.cores_elsewhere:.2f} cores, a lone request "
                f"{run.slowness:.2f} of its best time"
            )
        return run

    def _drive(
        self, server: Server, trace: Sequence[Conversation], show: Callable[[Tally], None]
    ) -> tuple[Load, Cores]:
        watch = Watch(server)
        load = run_load(server.endpoint, trace, self._speed, on_progress=show)
        if not load.complete:
            raise KeyboardInterrupt
        return load, watch.cores()

    def _judge(
        self, label: str, scenario: str, rate: float, repeat: int, seconds: float, load: Load,
        cores: Cores,
    ) -> Run:  # fmt: skip
        server = self._servers[label]
        lone_s = self._lone_tpot(server)
        self._lone_s[label] = min(lone_s, self._lone_s[label])
        slowness = lone_s / self._lone_s[label]
        report = Report.of(load.verdicts(), seconds)
        return Run(
            server=label,
            scenario=scenario,
            rate=rate,
            repeat=repeat,
            attainment=report.attainment,
            attainment_mean=report.attainment_mean,
            cores_elsewhere=cores.elsewhere,
            cores_server=cores.server,
            cores_client=cores.client,
            slowness=slowness,
            disturbed=cores.elsewhere > DISTURBED_CORES or slowness > DISTURBED_SLOWNESS,
            report=report.to_dict(),
        )

    def _trace(
        self, scenario: str, rate: float, seconds: float, words: str, *, repeat: int
    ) -> list[Conversation]:
        """Lengths and arrivals by scenario, rate and repeat; other texts for other words."""
        seed = self._effort.seed + repeat
        drawn = self._scenarios[scenario].draw(rate, seed=seed, seconds=seconds)
        filled = fill(drawn, lambda text: MARK_TOKENS + self._count(text), seed=seed)
        return marked(filled, f"{self._effort.seed} {scenario} {words}")

    def _lone_tpot(self, server: Server) -> float:
        """Seconds per token of a request to the idle server, which promises it nothing."""
        turn = Turn(slo=NO_SLO, prompt_tokens=4, output_tokens=LONE_TOKENS, text="Once upon a")
        load = run_load(
            server.endpoint, [Conversation(0.0, (turn,))], self._speed, slo_field=lambda _: None
        )
        [verdict] = load.verdicts()
        if verdict.tpot_s is None:
            raise server.failed(f"did not answer a lone request: {load.errors()}")
        return verdict.tpot_s


def first_rate(scenario: Scenario, speed: ZeroLoad) -> float:
    """Where searches begin: the reference server with one request after the other."""
    prefill_s = speed.zero_load_prefill_s(round(scenario.mean_prompt_tokens))
    return 1 / (prefill_s + scenario.mean_output_tokens * speed.decode_s)


def marked(workload: Sequence[Conversation], salt: str) -> list[Conversation]:
    """The same workload with a number before the first prompt of every conversation.

    Texts come again from run to run; a prefix cache must not find them.

    Args:
        salt: other numbers for the same workload.
    """
    rng = random.Random(salt)
    return [
        replace(one, turns=(_marked(one.turns[0], rng.randrange(10**6)), *one.turns[1:]))
        for one in workload
    ]


def _marked(turn: Turn, number: int) -> Turn:
    return replace(turn, text=f"{number:06d} {turn.text}")


def reference_speed(server: Server) -> ZeroLoad:
    """How fast an idle server is, in a quiet moment."""
    for _ in range(ATTEMPTS):
        await_quiet()
        watch = Watch(server)
        speed = asyncio.run(measure_speed(server.endpoint))
        if (elsewhere := watch.cores().elsewhere) <= DISTURBED_CORES:
            break
        tqdm.write(f"{server.variant.label} idle: other work took {elsewhere:.2f} cores")
    return speed
