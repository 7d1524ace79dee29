"""The servers and runs of `replicas.py`: real processes and sockets around simulated devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from minserve.devices import Device, find_device
from minserve.simulator.simulation import BLOCK_SIZE, Setup, simulate
from minserve.workload.capacity import find_capacity
from minserve.workload.client import Load, LoadProgress, run_load
from minserve.workload.conversation import Conversation
from minserve.workload.endpoint import Endpoint
from minserve.workload.report import Report
from minserve.workload.scenarios import SCENARIOS, Scenario
from minserve.workload.server_process import ServerProcess, minserve_command
from shared.profile_file import profile_file
from shared.prompt_texts import with_texts

PROFILES = {"chatbot": "opt-6.7b-a100", "coding": "opt-6.7b-a100", "tools": "toolllama-7b-a100"}
ROUTERS = ("slo", "least-loaded", "round-robin")
MODEL = "smollm2"  # its tokenizer counts tokens
MAX_NUM_SEQS = 256
# Paces of the scenarios, in seconds.
TIGHT_S, LOOSE_S = 0.050, 0.100


@dataclass(frozen=True, slots=True)
class ReplicaCase:
    """The setting of one capacity."""

    scenario: str
    replicas: int
    router: str

    @property
    def name(self) -> str:
        return f"{self.scenario}, {self.replicas} x, {self.router}"


@dataclass(frozen=True, slots=True)
class Slowed:
    """A device and a scenario in slow motion: every time is a multiple of the real one.

    The host's own work (planning, routing, HTTP, and the client on the same cores) then weighs
    less, as it would if each replica had its own cores.

    Args:
        factor: times are multiplied by it, and rates are divided by it.
    """

    scenario: Scenario
    device: Device
    factor: float

    @classmethod
    def of(cls, scenario: str, factor: float) -> Slowed:
        device = find_device(PROFILES[scenario])
        lone_s = device.perf_model().zero_load_decode_s(1)
        own = SCENARIOS[scenario]
        return cls(
            own.scaled(
                tight=TIGHT_S / lone_s,
                loose=LOOSE_S / lone_s,
                tool_time=factor * own.tool_time_s,
            ),
            replace(device, pieces=tuple(piece.slowed(factor) for piece in device.pieces)),
            factor,
        )

    def setup(self, case: ReplicaCase) -> Setup:
        """Return the same setting for the simulator."""
        return Setup(
            device=self.device,
            replicas=case.replicas,
            router=case.router,
            lengths="told",
            max_num_seqs=MAX_NUM_SEQS,
        )

    def flags(self, case: ReplicaCase, profile: Path) -> list[str]:
        """Return the flags of ``minserve serve``."""
        device = self.device
        assert device.kv_tokens is not None
        return [
            "--model", MODEL, "--executor", "simulated", "--profile", str(profile),
            "--policy", "dp", "--replicas", str(case.replicas), "--router", case.router,
            "--block-size", str(BLOCK_SIZE), "--num-blocks", str(device.kv_tokens // BLOCK_SIZE),
            "--max-model-len", str(device.max_model_len),
            "--max-num-seqs", str(MAX_NUM_SEQS), "--replica-timeout", "30",
        ]  # fmt: skip


def expected_capacity(slowed: Slowed, case: ReplicaCase, seconds: float, tolerance: float) -> float:
    """Return the simulator's capacity, with which a search begins and the result is compared."""

    def attainment(rate: float, repeat: int) -> float:
        workload = slowed.scenario.draw(rate, seed=repeat, seconds=seconds)
        outcome = simulate(workload, slowed.setup(case))
        return Report.of(outcome.verdicts, seconds).attainment

    start = case.replicas * 2.0 / slowed.factor
    return find_capacity(attainment, start, tolerance=tolerance).rate or start


def texts_of(
    slowed: Slowed, count: Callable[[str], int], rate: float, seconds: float, seed: int, salt: str
) -> list[Conversation]:
    """Return a workload of texts that are in no cache."""
    drawn = slowed.scenario.draw(rate, seed=seed, seconds=seconds)
    return with_texts(drawn, count, seed=seed, salt=salt)


def drive(
    endpoint: Endpoint,
    slowed: Slowed,
    workload: list[Conversation],
    show: Callable[[LoadProgress], None],
) -> Load:
    """Send a workload and return its load.

    Raises:
        KeyboardInterrupt: if Ctrl-C cut it short.
    """
    load = run_load(endpoint, workload, slowed.device.perf_model(), on_progress=show)
    if not load.complete:
        raise KeyboardInterrupt
    return load


@contextmanager
def served(slowed: Slowed, case: ReplicaCase) -> Iterator[ServerProcess]:
    """Run a server for this case while the context lasts."""
    with (
        profile_file(slowed.device.perf_model(), slowed.device.name) as profile,
        ServerProcess(minserve_command(*slowed.flags(case, profile))) as server,
    ):
        yield server


def figures(load: Load, seconds: float) -> Mapping[str, float]:
    """Return the figures of one run."""
    report = Report.of(load.verdicts(), seconds)
    return {
        "attainment": report.attainment,
        "offered": report.to_dict()["offered"],
        "send_lag_p99_s": report.send_lag_s.p99,
    }
