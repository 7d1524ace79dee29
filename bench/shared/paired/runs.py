"""The turns of a comparison (`turns.py`): runs servers one at a time and judges them."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from tqdm import tqdm

from minserve.progress_bar import progress_bar
from minserve.slo.objectives import SLO
from minserve.workload.client import Load, LoadProgress, run_load
from minserve.workload.conversation import Conversation, Turn
from minserve.workload.reference import Reference
from minserve.workload.report import Report
from minserve.workload.scenarios import SCENARIOS
from minserve.workload.zero_load import ZeroLoad, measure_speed
from shared.cpu_time import Cores, Watch, await_quiet, busy_process
from shared.paired.turns import Cell, Result, Slot, TurnStore, schedule
from shared.prompt_texts import with_texts
from shared.servers import Served

WARM_UP_S = 8.0
# Seconds before a turn: vLLM's worker spins for a second after its last work.
SETTLE_S = 2.0
LONE_TOKENS = 24
# The fastest of them counts: one slow request does not mean that the machine is slower.
LONE_REQUESTS = 2
NO_SLO = SLO(ttft=1e6)
# Seconds for a turn's pause, last answers and lone requests; for a reference of one server.
TURN_EXTRA_S, REFERENCE_S = 10.0, 20.0
# The server with the faster idle speed is the one that is faster for a prompt of so many tokens.
TYPICAL_PROMPT = 100
# An idle server that takes more cores than this would slow the measured server down.
IDLE_CORES = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """The amount of measurement.

    seconds: time of arrivals in each turn.
    pairs: number of pairs in each cell.
    lengths: factor on all lengths.
    rounds: measurements of the idle speed, forth and back over all servers.
    """

    seconds: float
    pairs: int
    lengths: float
    seed: int
    rounds: int = 2


class PairedBenchmark:
    """All turns of one run of this program.

    Args:
        servers: running servers by label.
        count: returns the tokens of a text.
    """

    def __init__(
        self, effort: Effort, store: TurnStore, servers: Mapping[str, Served],
        count: Callable[[str], int],
    ) -> None:  # fmt: skip
        self._effort, self._store, self._servers, self._count = effort, store, servers, count
        self._workload: tuple[Cell, int, list[Conversation]] | None = None

    def run(self, cells: Sequence[Cell]) -> bool:
        """Run every turn that the store lacks. Ctrl-C ends it; what was measured is kept.

        Returns:
            whether it came to its end.
        """
        try:
            if self._store.reference is None:
                self._store.reference = best_reference(self._servers, self._effort.rounds)
                self._store.save()
            print(f"SLOs by the zero load of {self._store.reference}", file=sys.stderr)
            self._warm_up(cells[0])
            self._measure(cells)
        except KeyboardInterrupt:
            return False
        return True

    def _warm_up(self, cell: Cell) -> None:
        """Put some load on each server before measurements count."""
        for label, server in self._servers.items():
            workload = self._draw(cell, -1, WARM_UP_S, f"warm up {label} {time.time()}")
            self._drive(server, workload, lambda _: None)

    def _measure(self, cells: Sequence[Cell]) -> None:
        slots = schedule(cells, list(self._servers), self._effort.pairs)
        missing = self._store.missing(slots)
        with progress_bar(total=len(slots), initial=len(slots) - len(missing), unit="turn") as bar:
            for slot in missing:
                self._store.add(self._turn(slot, bar))
                bar.update()

    def _turn(self, slot: Slot, bar: tqdm) -> Result:
        server, cell = self._servers[slot.system], slot.cell
        workload = self._same_for_all(cell, slot.pair)

        def show(tally: LoadProgress) -> None:
            bar.set_postfix_str(
                f"{slot.system}, {cell.name}: {tally.attained} of {tally.done}", refresh=False
            )

        time.sleep(SETTLE_S)
        # Without the busy process, because this measures the machine's own speed.
        before = self._lone_s(server)
        with busy_process() if cell.busy else nullcontext() as beside:
            watch = Watch(self._servers, slot.system, beside)
            load = self._drive(server, workload, show)
            cores = watch.cores()
        after = self._lone_s(server)
        self._warn(slot, load, cores)
        report = Report.of(load.verdicts(), self._effort.seconds)
        return Result(
            cell=cell.name,
            pair=slot.pair,
            system=slot.system,
            attainment=report.attainment,
            attainment_mean=report.attainment_mean,
            lone_before_s=before,
            lone_after_s=after,
            cores_server=cores.server,
            cores_client=cores.client,
            cores_idle=cores.idle,
            cores_elsewhere=cores.elsewhere,
            send_lag_p99_s=report.send_lag_s.p99,
            report=report.to_dict(),
        )

    def _warn(self, slot: Slot, load: Load, cores: Cores) -> None:
        name = f"{slot.system}, {slot.cell.name}, pair {slot.pair}"
        for error, count in load.errors().items():
            tqdm.write(f"{name}: {count} times: {error}", file=sys.stderr)
        if cores.idle > IDLE_CORES:
            tqdm.write(f"{name}: idle servers took {cores.idle:.2f} cores", file=sys.stderr)

    def _drive(
        self, server: Served, workload: Sequence[Conversation], show: Callable[[LoadProgress], None]
    ) -> Load:
        """Send a workload to a server.

        Raises:
            KeyboardInterrupt: if Ctrl-C cut it short.
        """
        assert self._store.reference is not None
        speed = self._store.reference.speed
        load = run_load(server.endpoint, workload, speed, on_progress=show)
        if not load.complete:
            raise KeyboardInterrupt
        return load

    def _same_for_all(self, cell: Cell, pair: int) -> list[Conversation]:
        """Return the requests of a pair, the same for all servers; each pair has other requests."""
        if self._workload is None or self._workload[:2] != (cell, pair):
            salt = f"{self._effort.seed} {cell.name} {pair}"
            self._workload = (cell, pair, self._draw(cell, pair, self._effort.seconds, salt))
        return self._workload[2]

    def _draw(self, cell: Cell, pair: int, seconds: float, salt: str) -> list[Conversation]:
        seed = self._effort.seed + pair
        scenario = SCENARIOS[cell.scenario].scaled(
            self._effort.lengths, tight=cell.tight, loose=cell.loose
        )
        drawn = scenario.draw(cell.rate, seed=seed, seconds=seconds)
        return with_texts(drawn, self._count, seed=seed, salt=salt)

    def _lone_s(self, server: Served) -> float:
        """Return the seconds per token of a request to the idle server, without an SLO.

        Raises:
            SystemExit: if the server does not answer it.
        """
        return min(self._lone_request_s(server) for _ in range(LONE_REQUESTS))

    def _lone_request_s(self, server: Served) -> float:
        turn = Turn(slo=NO_SLO, prompt_tokens=4, output_tokens=LONE_TOKENS, text="Once upon a")
        load = run_load(
            server.endpoint, [Conversation(0.0, (turn,))], ZeroLoad(0.0, 0.0, 0.0),
            slo_field=lambda _: None,
        )  # fmt: skip
        if not load.complete:
            raise KeyboardInterrupt
        [verdict] = load.verdicts()
        if verdict.tpot_s is None:
            raise server.failed(f"did not answer a lone request: {load.errors()}")
        return verdict.tpot_s


def best_reference(servers: Mapping[str, Served], rounds: int) -> Reference:
    """Return the best idle speed of all servers, each measured alone.

    The prompts' speed is that of the fastest server with prompts, the time per token that of the
    fastest server in decoding.

    Args:
        rounds: measurements, forth and back over all servers; the best of each counts.
    """
    forth = list(servers)
    order = [label for i in range(rounds) for label in (forth if i % 2 == 0 else forth[::-1])]
    found: list[tuple[str, ZeroLoad]] = []
    for label in progress_bar(order, desc="speed of the idle servers", unit="server", leave=False):
        await_quiet()
        found.append((label, asyncio.run(measure_speed(servers[label].endpoint))))
    return best_of(found, next(iter(servers.values())).endpoint.model)


def best_of(found: Sequence[tuple[str, ZeroLoad]], model: str) -> Reference:
    """Return the best speed as a reference.

    Args:
        found: labels of servers and their speeds.
        model: the model's name on the servers.
    """
    prompts = min(found, key=lambda one: one[1].zero_load_prefill_s(TYPICAL_PROMPT))
    tokens = min(found, key=lambda one: one[1].decode_s)
    speed = ZeroLoad(
        prompts[1].base_s, prompts[1].per_token_s, tokens[1].decode_s,
        prompts[1].characters_per_token,
    )  # fmt: skip
    return Reference.now(speed, model, f"prompts of {prompts[0]}, tokens of {tokens[0]}")
