"""The plan of `noise.py`: the grid of cells, and capacities by noise, as jobs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from parts.noise.cases import CPU, GPU, WINDOW_S, Base, Noisy, Run, Setting, Weather
from shared.simulated.jobs import Job, Measured

SCENARIOS = ("chatbot", "coding", "summarization", "mixed", "tools", "reasoning")
TIGHTS = (1.4, 1.7, 2.0, 2.7)
POLICIES = ("dp", "edf", "sarathi", "fcfs", "vllm")
LOADS = (0.25, 0.5, 0.75, 1.0, 1.25)
WEATHERS = (
    *(Weather(noise=noise) for noise in (0.0, 0.05, 0.1, 0.2, 0.4)),
    *(Weather(kind="drifting", noise=noise) for noise in (0.05, 0.2)),
    *(Weather(kind=kind, noise=0.1) for kind in ("slower", "faster")),
)
# Seconds of arrivals, on steady devices and on drifting ones. A window is several times as long as
# a request's life, which on the CPU, with its short answers, is a second or two; on drifting
# devices a window contains several speeds.
WINDOWS_S = MappingProxyType({GPU: (60.0, WINDOW_S), CPU: (20.0, 60.0)})
# The scenarios and noises of the capacities.
CAPACITY_SCENARIOS = SCENARIOS[:4]
CAPACITY_NOISES = (0.0, 0.05, 0.1, 0.2)

# The rates with which the searches for noise-free capacities begin, by device and tight pace, in
# the order of `SCENARIOS`. Only the search's time depends on them.
STARTS: Mapping[tuple[str, float], tuple[float, ...]] = MappingProxyType(
    {
        (GPU, 0.0): (4.4, 1.9, 3.4, 4.4, 11.0, 9.0),
        (CPU, 1.4): (9.5, 2.2, 6.0, 4.6, 4.5, 0.4),
        (CPU, 1.7): (10.5, 3.2, 7.0, 6.0, 13.0, 1.3),
        (CPU, 2.0): (11.8, 4.4, 8.0, 7.4, 22.0, 2.1),
        (CPU, 2.7): (12.8, 6.1, 8.5, 9.5, 29.0, 2.7),
    }
)
FILTERS = ("part", "device", "scenario", "tight", "kind", "noise", "load")


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class NoiseCell:
    """A setting under a load while its times scatter; all policies meet the same requests in it.

    Attributes:
        load: the rate as a multiple of the setting's noise-free capacity.
    """

    setting: Setting
    weather: Weather
    load: float

    @property
    def name(self) -> str:
        """A readable name, for tables."""
        weather = self.weather
        return f"{self.setting.name} {weather.kind} noise {weather.noise:g} load {self.load:g}"

    @property
    def values(self) -> dict[str, str | float]:
        """The values that filters compare."""
        return {
            "part": "grid",
            "device": self.setting.device,
            "scenario": self.setting.scenario,
            "tight": self.setting.tight,
            "kind": self.weather.kind,
            "noise": self.weather.noise,
            "load": self.load,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The settings of all measurements.

    Attributes:
        quick: half the settings, one seed.
        policies: the policies that are compared.
        only: by the name of a filter, the values that are measured; all values for a name that is
            missing. With any filter, no combination of the remaining values is left out.
        rates: noise-free capacities that are taken as given, by the name of a setting.
        bound: True to measure capacities of a clairvoyant planner too.
    """

    quick: bool = False
    policies: tuple[str, ...] = POLICIES
    only: Mapping[str, Sequence[str]] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    bound: bool = False

    @property
    def seeds(self) -> range:
        return range(1 if self.quick else 2)

    def cells(self) -> Iterator[NoiseCell]:
        """Yield one load for each setting and weather.

        Loads are chosen so that any two values of two axes meet, as in a Latin square.
        """
        loads = (0.5, 1.0) if self.quick else LOADS
        weathers = tuple(one for one in WEATHERS if not self.quick or _is_quick(one))
        for i, setting in self._settings():
            for j, weather in enumerate(weathers):
                for k, load in enumerate(loads):
                    cell = NoiseCell(setting=setting, weather=weather, load=load)
                    if self._wants(cell.values) if self.only else (i + j + k) % len(loads) == 0:
                        yield cell

    def capacities(self) -> Iterator[tuple[str, float, bool, Noisy]]:
        """Yield (scenario, noise, clairvoyant, job) of the capacities by noise, on the GPU."""
        for scenario in ("coding", "mixed") if self.quick else CAPACITY_SCENARIOS:
            setting = Setting(device=GPU, tight=0.0, scenario=scenario)
            for noise in (0.0, 0.1) if self.quick else CAPACITY_NOISES:
                values = {"part": "capacity", "device": GPU, "scenario": scenario, "noise": noise}
                if self._wants(values):
                    for told in (False, True) if self.bound else (False,):
                        weather = Weather(noise=noise)
                        job = Noisy(setting=setting, weather=weather, clairvoyant=told)
                        yield scenario, noise, told, job

    def capacity_of(self, setting: Setting, found: Measured) -> float | None:
        """Return a setting's noise-free capacity; ``None`` while it is unknown."""
        if setting.name in self.rates:
            return self.rates[setting.name]
        return (found(self.base(setting)) or {}).get("capacity")

    def base(self, setting: Setting) -> Base:
        """Return the job that measures a setting's noise-free capacity."""
        starts = STARTS[setting.device, setting.tight]
        return Base(
            setting=setting,
            seconds=WINDOWS_S[setting.device][1],
            start=starts[SCENARIOS.index(setting.scenario)],
        )

    def runs(self, cell: NoiseCell, found: Measured) -> dict[str, list[Run]]:
        """Return for each policy a run for each seed; nothing while the rate is unknown."""
        capacity = self.capacity_of(cell.setting, found)
        if capacity is None:
            return {}
        return {policy: self._runs(cell, capacity, policy) for policy in self.policies}

    def jobs(self, found: Measured) -> list[Job]:
        """Return all jobs that are known to be needed by now."""
        jobs: dict[Job, None] = dict.fromkeys(job for *_, job in self.capacities())
        for cell in self.cells():
            if cell.setting.name not in self.rates:
                jobs[self.base(cell.setting)] = None
            for each in self.runs(cell, found).values():
                jobs.update(dict.fromkeys(each))
        return list(jobs)

    def core_seconds(self) -> float:
        """Return the rough seconds of one core that everything takes."""
        seconds = sum(job.cost for job in self.jobs(lambda _: None))
        for cell in self.cells():
            rate = self.rates.get(cell.setting.name, self.base(cell.setting).start)
            for policy in self.policies:
                seconds += sum(run.cost for run in self._runs(cell, rate, policy))
        return seconds

    def _runs(self, cell: NoiseCell, capacity: float, policy: str) -> list[Run]:
        return [
            Run(
                setting=cell.setting,
                weather=cell.weather,
                policy=policy,
                rate=round(cell.load * capacity, 4),
                seed=seed,
                seconds=WINDOWS_S[cell.setting.device][cell.weather.kind == "drifting"],
            )
            for seed in self.seeds
        ]

    def _settings(self) -> Iterator[tuple[int, Setting]]:
        """Yield settings, each with the sum of its places on the axes of devices and scenarios."""
        for i, (device, tight) in enumerate(STARTS):
            for j, scenario in enumerate(SCENARIOS):
                one = Setting(device=device, tight=tight, scenario=scenario)
                if not self.quick or _is_quick_setting(one):
                    yield i + j, one

    def _wants(self, values: Mapping[str, str | float]) -> bool:
        """Return True if no filter excludes these values."""
        for name, wanted in self.only.items():
            value = values.get(name)
            text = f"{value:g}" if isinstance(value, float) else value
            if text not in wanted:
                return False
        return True


def _is_quick(weather: Weather) -> bool:
    if weather.kind == "steady":
        return weather.noise in (0.0, 0.1, 0.2, 0.4)
    return (weather.kind, weather.noise) == ("drifting", 0.05)


def _is_quick_setting(setting: Setting) -> bool:
    if setting.device == GPU:
        return setting.scenario in ("coding", "mixed", "tools")
    return setting.tight in (1.4, 2.0) and setting.scenario in ("coding", "mixed", "tools")
