"""Measures decode steps of one model on several ranks, and the share of their collectives.

For each shape the same decodes run on one rank that has all threads (on GPUs: one GPU) and on a
group of ranks that share them (one GPU each), in turns. On CPUs two kinds of collectives take
turns: those in shared memory, which groups use, and gloo's. The time in collectives is that of
rank 0, waiting for a slower rank included; on a GPU each is timed alone, behind an idle device.
Where other programs keep the cores busy, a rank waits until the other has a core again. What the
sums themselves take is told by the share of work: processor time of rank 0, without its waits.
The last shape is a draft model's, alone on the threads of rank 0: whether drafts are faster there.

    .venv/bin/python bench/tensor_parallel.py
    .venv/bin/python bench/tensor_parallel.py --shapes llama-3.1-8b --ranks 2     # two GPUs

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from minserve import Engine
from minserve.blocks import blocks_for
from minserve.engine.device.runner import model_runner
from minserve.engine.profile.profile_design import ProfileBatch
from minserve.engine.profile.workbench import Workbench
from minserve.engine.ranks import keeper, shared_memory
from minserve.engine.ranks.leading import Leader
from minserve.engine.ranks.shared_memory import SharedMemoryRanks
from minserve.machine import machine_words
from minserve.tables import text_table
from shared.program import names, positive, run_program
from shared.synthetic_models import SHAPES, random_weights, write_shape

EMBEDDED = "smollm2"
DRAFT_SHAPE = "draft-2-layers"
CONTEXT = 256
BATCHES = (1, 32)
BLOCK_SIZE = 32
# As many as the largest batch needs, whatever the shape.
NUM_BLOCKS = max(BATCHES) * blocks_for(CONTEXT + 1, BLOCK_SIZE) + 1
ROUNDS = 3
STEPS = 5
COLLECTIVES = ("all_reduce", "gather", "broadcast")


class Times(NamedTuple):
    """Seconds: those of the clock on the wall, and the processor's of this thread."""

    wall_s: float = 0.0
    work_s: float = 0.0

    @classmethod
    def now(cls) -> Times:
        return cls(time.perf_counter(), time.thread_time())

    def more(self, since: Times) -> Times:
        """Return these and the seconds since then."""
        now = Times.now()
        return Times(
            self.wall_s + now.wall_s - since.wall_s, self.work_s + now.work_s - since.work_s
        )


class Clock:
    """Times an engine's collectives, and the waits for other ranks in them, while it is a context.

    A wait is known only where ranks share memory. CUDA graphs are out of use meanwhile: what is in
    them is not called, and cannot be timed.
    """

    def __init__(self, engine: Engine) -> None:
        self._runner = model_runner(engine._core.runner)
        self._graphs = self._runner.graphs
        company = self._runner.company
        self._ranks = company.ranks if isinstance(company, Leader) else None
        self.calls, self.total, self.waits = 0, Times(), Times()

    def __enter__(self) -> None:
        self.calls, self.total, self.waits = 0, Times(), Times()
        if self._ranks is None:
            return
        self._runner.graphs = None
        for name in COLLECTIVES:
            setattr(self._ranks, name, self._timed(getattr(self._ranks, name)))
        if isinstance(self._ranks, SharedMemoryRanks):
            vars(self._ranks)["_wait"] = self._timed_wait(self._ranks._wait)

    def __exit__(self, *_: object) -> None:
        self._runner.graphs = self._graphs
        if self._ranks is not None:
            for name in (*COLLECTIVES, "_wait"):
                vars(self._ranks).pop(name, None)  # the class's own is there again

    def _timed(self, collective: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def timed(tensor: Tensor) -> Tensor:
            _wait_for(tensor)
            since = Times.now()
            result = collective(tensor)
            _wait_for(tensor)
            self.total = self.total.more(since)
            self.calls += 1
            return result

        return timed

    def _timed_wait(self, wait: Callable[[int, int], None]) -> Callable[[int, int], None]:
        def timed(other: int, count: int) -> None:
            since = Times.now()
            wait(other, count)
            self.waits = self.waits.more(since)

        return timed


def _wait_for(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


@contextmanager
def loaded(model: str, num_ranks: int, threads: int, *, gloo: bool = False) -> Iterator[Engine]:
    """Yield an engine, whose ranks end with the context."""
    random = model != EMBEDDED
    with (
        mock.patch.object(shared_memory, "is_supported", return_value=SHARES and not gloo),
        mock.patch.object(
            keeper, "MODULE", "parts.tensor_parallel.random_rank" if random else keeper.MODULE
        ),
        random_weights("auto") if random else nullcontext(),
    ):
        engine = Engine(
            model, tensor_parallel=num_ranks, threads=threads, max_model_len=512,
            max_num_seqs=max(BATCHES), num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE,
            prefix_caching=False,
        )  # fmt: skip
    try:
        yield engine
    finally:
        if engine._loaded.keeper is not None:
            engine._loaded.keeper.close()


SHARES = shared_memory.is_supported()


def step_ms(engine: Engine, clock: Clock, batch: int) -> dict[str, float]:
    """Return the milliseconds of a decode step, and what of other ones collectives take."""
    bench, decodes = Workbench(engine._core, seed=0), ProfileBatch(decodes=(CONTEXT,) * batch)
    bench.time(decodes)
    plain = [bench.time(decodes) for _ in range(STEPS)]
    steps = Times()
    with clock:
        for _ in range(STEPS):
            since = Times.now()
            bench.time(decodes)
            steps = steps.more(since)
    total, waits = clock.total, clock.waits
    return {
        "ms": round(1e3 * min(plain), 2),
        "collectives": clock.calls / STEPS,
        "collectives_ms": round(1e3 * total.wall_s / STEPS, 2),
        "waiting_ms": round(1e3 * waits.wall_s / STEPS, 2),
        "share": round(total.wall_s / steps.wall_s, 3),
        "share_of_work": round((total.work_s - waits.work_s) / (steps.work_s - waits.work_s), 3),
    }


def measure(
    model: str, num_ranks: int, threads: int, threads_alone: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """Return the figures of each way to run a model, by batch; of each the best round."""
    ways: dict[str, dict[str, Any]] = {
        "1 rank": {"num_ranks": 1, "threads": threads_alone},
        f"{num_ranks} ranks": {"num_ranks": num_ranks, "threads": threads},
    }
    if SHARES and not torch.cuda.is_available():
        ways[f"{num_ranks} ranks, gloo"] = {**ways[f"{num_ranks} ranks"], "gloo": True}
    found: dict[str, dict[str, Any]] = {}
    for _ in range(rounds):
        for way, settings in ways.items():
            with loaded(model, **settings) as engine:
                clock = Clock(engine)
                for batch in BATCHES:
                    now = step_ms(engine, clock, batch)
                    best = found.setdefault(way, {}).get(str(batch))
                    if best is None or now["ms"] < best["ms"]:
                        found[way][str(batch)] = now
    return found


def print_rows(model: str, found: dict[str, dict[str, Any]]) -> None:
    """Print the figures of one model."""
    rows = [
        (
            way,
            batch,
            one["ms"],
            one["collectives_ms"],
            one["waiting_ms"],
            f"{one['share']:.1%}",
            f"{one['share_of_work']:.1%}",
        )
        for way, figures in found.items()
        for batch, one in figures.items()
    ]
    print(model)
    print(
        text_table(
            ("", "decodes", "ms a step", "in collectives", "waiting", "share", "of work"), rows
        ),
        flush=True,
    )


def main() -> int:
    """Measure all shapes; returns 2 where there are too few GPUs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", type=names, default=[EMBEDDED, "llama-300m", DRAFT_SHAPE],
        help=f"{EMBEDDED}, {DRAFT_SHAPE}, or shapes with random weights: {', '.join(SHAPES)}",
    )  # fmt: skip
    parser.add_argument("--ranks", type=positive, default=2)
    parser.add_argument("--threads", type=positive, default=1, help="of each rank, on a CPU")
    parser.add_argument("--rounds", type=positive, default=ROUNDS, help="of which the best counts")
    parser.add_argument("--dry", action="store_true", help="a tiny shape, one round")
    args = parser.parse_args()
    if args.dry:
        args.shapes, args.rounds = ["tiny-llama"], 1
    gpus = torch.cuda.device_count()
    if 0 < gpus < args.ranks:
        print(json.dumps({"skipped": f"{gpus} GPU, and {args.ranks} ranks need one each"}))
        return 0
    # The ranks find this folder too.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH")))
    )
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for shape in args.shapes:
            model = shape
            if shape != EMBEDDED:
                model = str(write_shape(Path(folder) / shape, shape, tokenizer=True))
            # A draft model that is not divided has the threads of rank 0.
            alone = args.threads * (1 if shape == DRAFT_SHAPE else args.ranks)
            results[shape] = measure(model, args.ranks, args.threads, alone, args.rounds)
            print_rows(shape, results[shape])
    device = torch.cuda.get_device_name() if gpus else machine_words()
    print(json.dumps({"device": device, "ranks": args.ranks, "ms": results}))
    return 0


if __name__ == "__main__":
    run_program(main)
