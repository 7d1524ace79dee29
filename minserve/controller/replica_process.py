"""A replica's process from its first instruction: it ends with its parent, whatever happens.

This module imports nothing slow, because a process is bound to its parent only once it has asked
for that. Before, its process group does it: it has one of its own, and when the parent ends, the
system lets each stopped process of such a group go on, with a signal that ends it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from minserve.exit_codes import EXIT_LOST
from minserve.process_ends import end_with, ignore_signals


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSpec:
    """The settings of a replica's process.

    Attributes:
        store_host, store_port: address of the controller's rendezvous.
        settings: of the replica's engine.
        profile_s: longest time for measuring the device, if no profile of it is stored.
        watchdog_s: longest iteration in seconds. The replica tells the controller of a longer
            one, which gives the replica up.
        log_format: how it writes its log; see `minserve.log_lines`.
        is_alone: no other replica tells the console the same.
    """

    index: int
    store_host: str
    store_port: int
    settings: Mapping[str, Any]
    profile_s: float
    watchdog_s: float
    log_format: str = "text"
    is_alone: bool = False

    def to_json(self) -> str:
        """Return the settings as JSON, for the command line of a process."""
        return json.dumps(asdict(self))


def main(spec: str, parent: str) -> int:
    """Run one replica and return its exit code, which says whether another try is worthwhile.

    Args:
        spec: a `ReplicaSpec` as JSON.
        parent: id of the process that started this one.
    """
    if not end_with(int(parent)):
        return EXIT_LOST
    # Only the controller decides when a replica stops.
    ignore_signals()
    from minserve.controller.replica_loop import run_replica

    return run_replica(ReplicaSpec(**json.loads(spec)))


def exit_now(code: int) -> None:
    """End the process: threads of gloo may still wait for a peer that will never send again."""
    logging.shutdown()
    os._exit(code)


if __name__ == "__main__":
    exit_now(main(*sys.argv[1:]))
