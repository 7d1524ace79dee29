"""What `noise.py` simulates: settings, how their devices scatter, and the jobs that measure them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

from reproduce_cases import attainment
from reproduce_jobs import Job, Result

from minserve.devices import Device, find_device
from minserve.simulator.simulation import Setup
from minserve.workload.capacity import find_capacity
from minserve.workload.conversation import Conversation, num_turns
from minserve.workload.scenarios import Scenario, find_scenario

GPU, CPU = "opt-6.7b-a100", "xeon-amx"
# SmolLM2 in bfloat16 on 2 cores of a Xeon with AMX, as `minserve profile` measured it.
CPU_PROFILE = Path(__file__).resolve().parent / "profiles" / "xeon-amx.json"
CPU_KV_TOKENS = 186_000
CPU_OVERHEAD_S = 0.002
# The loose pace over the tight one.
LOOSE = 2.0
# Factors on lengths: the CPU is about so much slower.
LENGTHS = MappingProxyType({GPU: 1.0, CPU: 0.1})
# Reasoning's answers would take minutes: a window has to be longer, and 5,000 iterations for each
# of them take too long to simulate.
REASONING_LENGTHS = MappingProxyType({GPU: 0.05, CPU: 0.02})
# Profiles of scenarios whose requests are longer than OPT can serve.
LONGER = MappingProxyType({"tools": "toolllama-7b-a100", "reasoning": "qwen2.5-7b-a100"})

# How a device behaves over time, as values of a simulation's setup.
KINDS = MappingProxyType(
    {
        "steady": {},
        "drifting": {"speed_steps": 2.0, "stall_every_s": 30.0},
        "slower": {"slowness": 1.3},
        "faster": {"slowness": 1 / 1.3},
    }
)

WINDOW_S = 120.0
# Of a run, at the least and at the most.
LEAST_REQUESTS, MOST_REQUESTS = 150, 600
# Of the search for a setting's noise-free capacity, which needs to be no more than roughly true.
COARSE, COARSE_STEP, COARSE_CUT = 0.1, 1.25, 0.75
SEARCH_REQUESTS = 1500

# Seconds of one core per output token, roughly.
COSTS_S = MappingProxyType({"dp": 1.4e-5, "edf": 1.2e-5, "others": 3.5e-6})


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Setting:
    """A scenario on a device.

    Attributes:
        device: `GPU`, where scenarios have their own lengths and paces, or `CPU`.
        tight: of the CPU, the tight pace as a slowdown of a lone request's; 0 on the GPU.
    """

    device: str
    tight: float
    scenario: str

    @property
    def name(self) -> str:
        """Readable, for tables."""
        return " ".join(
            part for part in (self.device, f"tight {self.tight:g}" * bool(self.tight), self.scenario)
            if part
        )  # fmt: skip

    @property
    def draws(self) -> Scenario:
        """Where its workloads come from."""
        lengths = LENGTHS[self.device]
        if self.scenario == "reasoning":
            lengths = REASONING_LENGTHS[self.device]
        paces = {"tight": self.tight, "loose": LOOSE * self.tight} if self.tight else {}
        return find_scenario(self.scenario).scaled(lengths, **paces)

    def setup(
        self, policy: str, weather: Weather, seed: int, *, clairvoyant: bool = False
    ) -> Setup:
        """For the simulator. Output lengths are learned, as a server without hints learns them."""
        on_cpu = {"kv_tokens": CPU_KV_TOKENS, "overhead_s": CPU_OVERHEAD_S}
        return Setup(
            device=_device(self.device, self.scenario),
            policy=policy,
            lengths="quantile",
            clairvoyant=clairvoyant,
            seed=seed,
            **(on_cpu if self.device == CPU else {}),
            **weather.changes,
        )

    def workload(
        self, rate: float, seconds: float, seed: int, *, most: int = MOST_REQUESTS
    ) -> list[Conversation]:
        """What arrives in so many seconds, but no fewer than `LEAST_REQUESTS`, and no more than
        the most.
        """
        return self.draws.draw(rate, seed=seed, num_requests=_number(rate, seconds, most))


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Weather:
    """How a device's times scatter.

    Attributes:
        kind: one of `KINDS`.
        noise: log-standard deviation of iterations' times.
    """

    kind: str = "steady"
    noise: float = 0.0

    @property
    def changes(self) -> dict[str, float]:
        """Of a simulation's setup."""
        return {"noise": self.noise, **KINDS[self.kind]}


QUIET = Weather()


@dataclass(frozen=True, slots=True, kw_only=True)
class Base(Job):
    """A setting's capacity with `dp` and without noise, coarsely: rates are multiples of it.

    Attributes:
        seconds: of each run.
        start: a rate to begin with.
    """

    setting: Setting
    seconds: float
    start: float

    @property
    def cost(self) -> float:
        number = _number(self.start, self.seconds, SEARCH_REQUESTS)
        return 5 * _run_s(self.setting, "dp", number)

    def run(self) -> Result:
        setting = self.setting

        def measure(rate: float, seed: int) -> float:
            workload = setting.workload(rate, self.seconds, seed, most=SEARCH_REQUESTS)
            return attainment(workload, setting.setup("dp", QUIET, seed), cut=COARSE_CUT)

        found = find_capacity(measure, self.start, tolerance=COARSE, step=COARSE_STEP)
        return {"capacity": None if found.rate is None else round(found.rate, 4)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run(Job):
    """A policy's attainment in one run.

    Attributes:
        rate: requests per second.
        seconds: in which requests arrive.
    """

    setting: Setting
    weather: Weather
    policy: str
    rate: float
    seed: int
    seconds: float

    @property
    def cost(self) -> float:
        return _run_s(self.setting, self.policy, _number(self.rate, self.seconds, MOST_REQUESTS))

    def run(self) -> Result:
        setting = self.setting
        workload = setting.workload(self.rate, self.seconds, self.seed)
        setup = setting.setup(self.policy, self.weather, self.seed)
        return {"attainment": attainment(workload, setup), "offered": num_turns(workload)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Noisy(Job):
    """The capacity of `dp` in windows of `WINDOW_S`.

    Attributes:
        clairvoyant: of a planner that is told the noise of each iteration in advance.
    """

    setting: Setting
    weather: Weather
    clairvoyant: bool = False

    @property
    def cost(self) -> float:
        return 8 * _run_s(self.setting, "dp", 600)

    def run(self) -> Result:
        setting = self.setting

        def measure(rate: float, seed: int) -> float:
            workload = setting.draws.draw(rate, seed=seed, seconds=WINDOW_S)
            setup = setting.setup("dp", self.weather, seed, clairvoyant=self.clairvoyant)
            return attainment(workload, setup, cut=COARSE_CUT)

        return find_capacity(measure, setting.draws.recorded_rate or 1.0).to_dict()


@cache
def _device(name: str, scenario: str) -> Device:
    return find_device(str(CPU_PROFILE) if name == CPU else LONGER.get(scenario, name))


def _number(rate: float, seconds: float, most: int) -> int:
    return max(LEAST_REQUESTS, min(most, round(rate * seconds)))


def _run_s(setting: Setting, policy: str, num_requests: int) -> float:
    """Seconds that a run takes, roughly: estimates and the order of jobs go by it."""
    tokens = {"coding": 40, "tools": 140, "mixed": 200, "reasoning": 250}
    each = tokens.get(setting.scenario, 250)
    if setting.device == CPU:
        # The fewer run at a time, the more iterations it takes.
        each = 100 if setting.scenario == "reasoning" else 0.1 * each + 20
        each *= 4.0 / setting.tight
    return num_requests * each * COSTS_S.get(policy, COSTS_S["others"])
