"""`ProcessConfig`: which processes a server with one engine has."""

from __future__ import annotations

from dataclasses import dataclass

from minserve.config import ControllerConfig, EngineConfig, option
from minserve.errors import ConfigError

ENGINE_PROCESSES = ("auto", "own", "shared")


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
