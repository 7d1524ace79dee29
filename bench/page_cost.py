"""Measures what the server's page costs the engine: while nobody looks, and while somebody does.

An engine core decodes on a device that takes no time, so that only planning and applying are left: alone,
with its journal, and with a journal that is looked at. Turns alternate; figures are the least processor time of
all turns, in microseconds for one iteration. Then comes the time of a frame of the page's feed. The last line
is JSON, with a row for each number of sequences.

    .venv/bin/python bench/page_cost.py                    # two minutes
    .venv/bin/python bench/page_cost.py --sequences 8 --turns 3
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from minserve.activity import Cursor
from minserve.engine.batch import RunResult, Scheduled
from minserve.engine.block_pool import BlockPool
from minserve.engine.core import EngineCore
from minserve.engine.journal import Journal
from minserve.engine.speculation.proposal import SampledToken, Verified
from minserve.planner.policies.sarathi import SarathiPlanner
from minserve.request import Request
from minserve.request import Sequence as LiveSequence
from minserve.sampling_params import SamplingParams
from minserve.server.json_array import dump_json
from minserve.server.page.frames import activity_json
from minserve.slo.objectives import SLO
from minserve.tables import text_table
from shared.machine import machine
from shared.program import positive, run_program

ITERATIONS = 300
# Iterations whose news a frame tells, and so many before anything is measured.
NEWS, WARM_UP = 10, 20


class InstantDevice:
    """Samples one token for each sequence, at once."""

    device = "none"
    is_lost = False

    def launch(self, batch: Sequence[Scheduled]) -> InstantDevice:
        """Take a batch."""
        self._batch = batch
        return self

    def results(self) -> dict[str, RunResult]:
        """Return a token for each sequence that samples one."""
        token = Verified((SampledToken(7, None),), 0)
        return {one.seq.seq_id: RunResult(token if one.samples else None) for one in self._batch}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", type=positive, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--turns", type=positive, default=7)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    rows = [measure(num, args.turns) for num in args.sequences]
    print(text_table(list(rows[0]), [list(row.values()) for row in rows]))
    print(json.dumps({"rows": rows, "machine": machine()}))
    return 0


def measure(num_seqs: int, turns: int) -> dict[str, Any]:
    """Return the costs with so many sequences, in microseconds of processor time."""
    least = dict.fromkeys(("alone", "journal", "looked at", "first frame", "frame"), math.inf)
    for _ in range(turns):
        for name in ("alone", "journal", "looked at"):
            core = core_of(num_seqs)
            journal = None if name == "alone" else Journal.of(core)
            if journal is not None and name == "looked at":
                journal.since(None)
            run(core, WARM_UP)
            least[name] = min(least[name], timed(partial(run, core, ITERATIONS)) / ITERATIONS)
        assert journal is not None
        least["first frame"] = min(least["first frame"], timed(partial(look, journal, None)))
        cursor = look(journal, None)
        run(core, NEWS)
        least["frame"] = min(least["frame"], timed(partial(look, journal, cursor)))
    return {"sequences": num_seqs, **{name: round(cost, 1) for name, cost in least.items()}}


def core_of(num_seqs: int) -> EngineCore:
    """Return a core with so many long outputs under way, each with an SLO."""
    core = EngineCore(
        InstantDevice(),
        BlockPool(100 * num_seqs, 16),
        SarathiPlanner(),
        token_budget=4096,
        max_num_seqs=num_seqs,
        max_model_len=1500,
        clock=time.monotonic,
    )
    slo = SLO(ttft=500.0, tpot=100.0)
    for number in range(num_seqs):
        request = Request(
            request_id=str(number),
            prompt_token_ids=(5,) * 8,
            params=SamplingParams(max_tokens=1400),
            seed=1,
            arrival_s=time.monotonic(),
            slo=slo,
            targets=slo.resolve(1.0, 1.0),
        )
        core.add(LiveSequence(request), None)
    return core


def run(core: EngineCore, iterations: int) -> None:
    """Run so many iterations."""
    for _ in range(iterations):
        core.step()


def look(journal: Journal, since: Cursor | None) -> Cursor:
    """Make a frame of what has happened since a look, and return where the next one begins."""
    seen = journal.since(since)
    dump_json(activity_json(seen))
    return Cursor(seen.source, seen.tick)


def timed(work: Callable[[], object]) -> float:
    """Return the processor time of some work in microseconds."""
    began = time.process_time()
    work()
    return 1e6 * (time.process_time() - began)


if __name__ == "__main__":
    run_program(main)
