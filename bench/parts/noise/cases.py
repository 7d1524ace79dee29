"""The simulations of `noise.py`: settings, how their devices scatter, and jobs to measure them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

from minserve.devices import Device, find_device
from minserve.simulator.simulation import Setup
from minserve.workload.capacity import find_capacity
from minserve.workload.conversation import Conversation, num_turns
from minserve.workload.scenarios import Scenario, find_scenario
from shared.simulated.cases import attainment
from shared.simulated.jobs import Job, Result

GPU, CPU = "opt-6.7b-a100", "xeon-amx"
# SmolLM2 in bfloat16 on 2 cores of a Xeon with AMX, as `minserve profile` measured it.
CPU_PROFILE = Path(__file__).resolve().parents[2] / "profiles" / "xeon-amx.json"
CPU_KV_TOKENS = 186_000
CPU_OVERHEAD_S = 0.002
# The loose pace divided by the tight one.
LOOSE = 2.0
# Factors on lengths: the CPU is slower by about this factor.
LENGTHS = MappingProxyType({GPU: 1.0, CPU: 0.1})
# Full answers of reasoning would take minutes. A window would have to be even longer, and 5,000
# iterations for each answer take too long to simulate.
REASONING_LENGTHS = MappingProxyType({GPU: 0.05, CPU: 0.02})
# Profiles for scenarios whose requests are longer than OPT can serve.
LONGER = MappingProxyType({"tools": "toolllama-7b-a100", "reasoning": "qwen2.5-7b-a100"})

# The behaviour of a device over time, as values of a simulation's setup.
KINDS = MappingProxyType(
    {
        "steady": {},
        "drifting": {"speed_steps": 2.0, "stall_every_s": 30.0},
        "slower": {"slowness": 1.3},
        "faster": {"slowness": 1 / 1.3},
    }
)

WINDOW_S = 120.0
# The number of requests of a run, at the least and at the most.
LEAST_REQUESTS, MOST_REQUESTS = 150, 600
# For the search for a setting's noise-free capacity, which need only be roughly right.
COARSE, COARSE_STEP, COARSE_CUT = 0.1, 1.25, 0.75
SEARCH_REQUESTS = 1500

# Seconds of one core per output token, roughly.
COSTS_S = MappingProxyType({"dp": 1.4e-5, "edf": 1.2e-5, "others": 3.5e-6})


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Setting:
    """A scenario on a device.

    Attributes:
        device: `GPU`, on which scenarios have their own lengths and paces, or `CPU`.
        tight: on the CPU, the tight pace as a multiple of a lone request's; 0 on the GPU.
    """

    device: str
    tight: float
    scenario: str

    @property
    def name(self) -> str:
        """A readable name, for tables."""
        return " ".join(
            part for part in (self.device, f"tight {self.tight:g}" * bool(self.tight), self.scenario)
            if part
        )  # fmt: skip

    @property
    def draws(self) -> Scenario:
        """The scenario from which its workloads are drawn."""
        lengths = LENGTHS[self.device]
        if self.scenario == "reasoning":
            lengths = REASONING_LENGTHS[self.device]
        paces = {"tight": self.tight, "loose": LOOSE * self.tight} if self.tight else {}
        return find_scenario(self.scenario).scaled(lengths, **paces)

    def setup(
        self, policy: str, weather: Weather, seed: int, *, clairvoyant: bool = False
    ) -> Setup:
        """Return a setup for the simulator, in which output lengths are learned, without hints."""
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
        """Return the workload of so many seconds, within limits on the number of requests.

        It has at least `LEAST_REQUESTS` and at most ``most`` requests.
        """
        return self.draws.draw(rate, seed=seed, num_requests=_number(rate, seconds, most))


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Weather:
    """The way in which a device's times scatter.

    Attributes:
        kind: one of `KINDS`.
        noise: log-standard deviation of iterations' times.
    """

    kind: str = "steady"
    noise: float = 0.0

    @property
    def changes(self) -> dict[str, float]:
        """The values of a simulation's setup that it changes."""
        return {"noise": self.noise, **KINDS[self.kind]}


QUIET = Weather()


@dataclass(frozen=True, slots=True, kw_only=True)
class Base(Job):
    """A setting's capacity with `dp` and without noise, roughly: rates are multiples of it.

    Attributes:
        seconds: time in which a run's requests arrive.
        start: the rate with which the search begins.
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
    """The attainment of a policy in a single run.

    Attributes:
        rate: requests per second.
        seconds: time in which requests arrive.
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
        clairvoyant: true for a planner that is told the noise of each iteration in advance.
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
    """Return the rough seconds of a run, for estimates and for the order of jobs."""
    tokens = {"coding": 40, "tools": 140, "mixed": 200, "reasoning": 250}
    each = tokens.get(setting.scenario, 250)
    if setting.device == CPU:
        # The fewer requests run at a time, the more iterations a run takes.
        each = 100 if setting.scenario == "reasoning" else 0.1 * each + 20
        each *= 4.0 / setting.tight
    return num_requests * each * COSTS_S.get(policy, COSTS_S["others"])
