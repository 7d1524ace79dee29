"""Measures for how long a device waits for the host between two batches of decodes.

All is real but the device: planner, block pool, text, the packing of inputs, and the choice of tokens
among a few. The device stands still until a batch is queued, then takes a set time for its pass and for its
choice of tokens; time itself is this thread's processor time, put forward where the device is waited for. Two orders are compared in alternating turns: launched when the results
of the batch before are applied (``after``), and behind that batch while it runs (``behind``). A device
that takes no time shows all that the host does. Figures are milliseconds of one iteration that a tenth of
all iterations undercut, so that other programs of the machine change little. The last line is JSON.

    .venv/bin/python bench/host_time.py                          # a minute
    .venv/bin/python bench/host_time.py --sequences 8 --turns 1
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from minserve.engine.batch import RunResult, Scheduled
from minserve.engine.device.batch_tensors import (
    BatchLayout,
    Chunk,
    fill_in,
    place,
    unknown_token,
)
from minserve.engine.relay import RelayEngine
from minserve.engine.sampling.sampler import Sampler
from minserve.engine.speculation.verification import PendingTokens
from minserve.sampling_params import SamplingParams
from minserve.tables import text_table
from shared.machine import machine
from shared.program import positive, run_program

# Between two batches of 64 decodes, in milliseconds.
GOAL_MS = 0.15
# Iterations of a turn, and those before them that do not count.
ITERATIONS, WARM_UP = 60, 10
# Of a batch's time, what the pass takes; the rest is the choice of tokens.
PASS_SHARE = 0.9
# Tokens that the stand-in chooses among, the same for every draw: few, as a device does that arithmetic.
FIRST_TOKEN, NUM_TOKENS = 256, 64
CPU = torch.device("cpu")
PARAMS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=1000, ignore_eos=True),
    "penalties": SamplingParams(
        temperature=0.0, repetition_penalty=1.1, max_tokens=1000, ignore_eos=True
    ),
}


class HostClock:
    """This thread's processor time, and what it has waited for the device."""

    def __init__(self) -> None:
        self._waited_s = time.monotonic() - time.thread_time()

    def __call__(self) -> float:
        return time.thread_time() + self._waited_s

    def wait_until(self, at: float) -> None:
        """Put the time forward to a moment, unless that has passed."""
        self._waited_s += max(0.0, at - self())


class StandInBatch:
    """A batch that is queued on the stand-in."""

    def __init__(self, device: StandIn, seq_ids: Sequence[str]) -> None:
        self._device, self._seq_ids = device, seq_ids
        self._pending: PendingTokens | None = None
        self._ends_at = 0.0

    def sample(self, batch: Sequence[Scheduled]) -> None:
        """Choose tokens for the sequences of a batch."""
        self._seq_ids = [item.seq.seq_id for item in batch if item.samples]
        seqs = [item.seq for item in batch if item.samples]
        if seqs:
            logits = self._device.logits[: len(seqs)]
            self._pending = self._device.sampler.launch(logits, seqs, [None] * len(seqs))
        self._ends_at = self._device.queue(1.0 - PASS_SHARE)

    def newest_tokens(self) -> tuple[dict[str, int], Tensor]:
        """Return the chosen tokens, and the row of each sequence."""
        assert self._pending is not None, "a batch of decodes"
        rows = {seq_id: row for row, seq_id in enumerate(self._seq_ids)}
        return rows, self._pending.ids.clamp(min=0)

    def results(self) -> Mapping[str, RunResult]:
        """Wait for the tokens."""
        self._device.clock.wait_until(self._ends_at)
        if self._pending is None:
            return {seq_id: RunResult() for seq_id in self._seq_ids}
        tokens = self._pending.results()
        return {seq_id: RunResult(one) for seq_id, one in zip(self._seq_ids, tokens, strict=True)}


class StandIn:
    """A device that packs its inputs and chooses tokens, and takes a set time for all else.

    Attributes:
        seconds: of a batch.
        idle_s: seconds for which it had nothing to do.
    """

    device = "a stand-in"
    is_lost = False

    def __init__(self, clock: HostClock, block_size: int, num_seqs: int) -> None:
        self.clock = clock
        self.sampler = Sampler()
        self.seconds = self.idle_s = 0.0
        self.logits = torch.full((num_seqs, FIRST_TOKEN + NUM_TOKENS), -100.0)
        self.logits[:, FIRST_TOKEN:] = torch.randn(num_seqs, NUM_TOKENS)
        self._block_size = block_size
        self._free_at = clock()

    def queue(self, share: float) -> float:
        """Take work of a share of a batch's time, and return when it will be done."""
        now = self.clock()
        self.idle_s += max(0.0, now - self._free_at)
        self._free_at = max(now, self._free_at) + share * self.seconds
        return self._free_at

    def launch(self, batch: Sequence[Scheduled]) -> StandInBatch:
        """Queue a batch with its choice of tokens."""
        launched = self._launch(batch, {}, None)
        launched.sample(batch)
        return launched

    def follow(self, batch: Sequence[Scheduled], before: StandInBatch) -> StandInBatch:
        """Queue a batch behind another one."""
        return self._launch(batch, *before.newest_tokens())

    def _launch(
        self, batch: Sequence[Scheduled], unread: Mapping[str, int], newest: Tensor | None
    ) -> StandInBatch:
        chunks = []
        for item in batch:
            row = unread.get(item.seq.seq_id)
            tokens = (
                item.seq.token_ids[item.start : item.end] if row is None else [unknown_token(row)]
            )
            chunks.append(Chunk(tokens, item.start, item.seq.block_table))
        layout = BatchLayout.of(chunks)
        host, _ = place(chunks, layout, self._block_size, CPU)
        if newest is not None:
            fill_in(layout.split(host).token_ids, newest)
        self.queue(PASS_SHARE)
        return StandInBatch(self, [item.seq.seq_id for item in batch if item.samples])


def measure(
    engine: RelayEngine, num_seqs: int, params: SamplingParams, device_ms: float, behind: bool
) -> list[tuple[float, float]]:
    """Return the seconds of each iteration of a turn: the device's wait, and the host's work."""
    core, clock = engine._core, HostClock()
    core.clock = clock
    core.runner = device = StandIn(clock, core.pool.block_size, num_seqs)
    core.plans_ahead, core.launches_ahead = True, behind
    rng = random.Random(0)
    for _ in range(num_seqs):
        prompt = [FIRST_TOKEN + rng.randrange(NUM_TOKENS) for _ in range(64)]
        submission = engine._prepare(prompt, params)
        engine._enqueue(submission)
    while core.waiting or not all(seq.is_decoding for seq in core.running):
        core.step()
    device.seconds = device_ms / 1e3
    found = []
    for _ in range(WARM_UP + ITERATIONS):
        idle_s, began = device.idle_s, time.thread_time()
        core.step()
        found.append((device.idle_s - idle_s, time.thread_time() - began))
    for request_id in core.table.request_ids:
        core.abort(request_id)
    core.drain()
    return found[WARM_UP:]


def compare(
    engine: RelayEngine, num_seqs: int, kind: str, device_ms: float, turns: int
) -> dict[str, Any]:
    """Return a row: both orders, in alternating turns."""
    found: dict[str, list[tuple[float, float]]] = {"after": [], "behind": []}
    for _ in range(turns):
        for name, one in found.items():
            one += measure(engine, num_seqs, PARAMS[kind], device_ms, name == "behind")
    row: dict[str, Any] = {"sequences": num_seqs, "tokens": kind, "device_ms": device_ms}
    for name, one in found.items():
        for what, seconds in zip(("waits_ms", "host_ms"), zip(*one, strict=True), strict=True):
            row[f"{name}_{what}"] = round(statistics.quantiles(seconds, n=10)[0] * 1e3, 3)
    return row


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="whose tokenizer gives the text")
    parser.add_argument("--sequences", type=positive, default=64)
    parser.add_argument("--turns", type=positive, default=5)
    parser.add_argument("--policy", default="dp")
    parser.add_argument(
        "--device-ms", type=float, nargs="+", default=[0.0, 2.0, 6.0], help="time of a batch"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    torch.set_num_threads(1)
    engine = RelayEngine(
        args.model,
        executor="simulated",
        profile="opt-6.7b-a100",
        policy=args.policy,
        max_num_seqs=args.sequences,
        num_blocks=100 * args.sequences,
    )
    rows = [
        compare(engine, args.sequences, kind, device_ms, args.turns)
        for kind in PARAMS
        for device_ms in args.device_ms
    ]
    print(text_table(list(rows[0]), [list(row.values()) for row in rows]))
    # A host that is slower than the device is waited for in any order.
    waits = [row["behind_waits_ms"] for row in rows if row["device_ms"] > row["behind_host_ms"]]
    told = {
        "rows": rows,
        "policy": args.policy,
        "goal_ms": GOAL_MS,
        "goal_met": max(waits) <= GOAL_MS if waits else None,
        "machine": machine(),
    }
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    run_program(main)
