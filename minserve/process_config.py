"""`ProcessConfig` and `ControllerConfig`: which processes a server has."""

from __future__ import annotations

from dataclasses import dataclass

from minserve.config import EngineConfig, option
from minserve.errors import ConfigError

ENGINE_PROCESSES = ("auto", "own", "shared")
ROUTERS = ("slo", "least-loaded", "round-robin")


@dataclass(frozen=True, kw_only=True)
class ControllerConfig:
    """Settings of several replicas and what stands in front of them.

    Raises:
        ConfigError: where a value is outside its range.
    """

    replicas: int = option(
        1, "engines behind this endpoint, each a process of its own", group="replicas"
    )
    router: str = option(
        "slo",
        "which replica gets a request. slo: one that can keep its SLO, with the most prefill budget "
        "left, counting the prefix that it holds; least-loaded: with the fewest requests; "
        "round-robin: the next one",
        group="replicas",
        choices=ROUTERS,
    )
    hop_limit: int = option(
        2, "times that a request is moved on to a replica that may keep its SLO", group="replicas"
    )
    replica_timeout: float = option(
        5.0, "a replica that is silent for so many seconds is given up", group="replicas"
    )
    control_host: str = option(
        "127.0.0.1", "address that replicas meet the controller at", group="replicas"
    )
    control_port: int = option(
        0, "port that replicas meet the controller at; 0 takes a free one", group="replicas"
    )

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ConfigError(f"replicas must be at least 1, not {self.replicas}")
        if self.hop_limit < 0:
            raise ConfigError(f"hop_limit must not be below 0, not {self.hop_limit}")
        if not 1 <= self.replica_timeout < float("inf"):
            raise ConfigError(
                f"replica_timeout must be at least 1 second, not {self.replica_timeout}"
            )
        if not 0 <= self.control_port <= 65535:
            raise ConfigError(f"control_port must be between 0 and 65535, not {self.control_port}")
        if self.router not in ROUTERS:
            raise ConfigError(f"router must be one of {', '.join(ROUTERS)}, not {self.router!r}")


@dataclass(frozen=True, kw_only=True)
class ProcessConfig:
    """Where the engine of a server runs. Several replicas have a process each anyway.

    Raises:
        ConfigError: where a value is outside its range.
    """

    engine_process: str = option(
        "auto",
        "own: the engine has a process of its own, beside that of HTTP; shared: both are in one; "
        "auto: own on a GPU, which must not wait for HTTP, and shared on a CPU",
        group="processes",
        choices=ENGINE_PROCESSES,
    )

    def __post_init__(self) -> None:
        if self.engine_process not in ENGINE_PROCESSES:
            raise ConfigError(
                f"engine_process must be one of {', '.join(ENGINE_PROCESSES)}, not "
                f"{self.engine_process!r}"
            )

    def check_fits(self, controller: ControllerConfig, engine: EngineConfig) -> None:
        """Check that replicas and ranks leave the choice that was made.

        Raises:
            ConfigError: where they do not.
        """
        if self.engine_process != "shared":
            return
        for number, words in ((controller.replicas, "replicas"), (engine.tensor_parallel, "ranks")):
            if number > 1:
                raise ConfigError(
                    f"engine_process shared is for one engine in one process, not for {number} "
                    f"{words}; leave out one of the two"
                )
