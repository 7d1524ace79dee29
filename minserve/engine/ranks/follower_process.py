"""The process of a rank other than 0, from its first instruction: it ends with rank 0.

As `minserve.controller.replica_process` it imports nothing slow before it is bound to its parent.
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
class RankSpec:
    """The settings of a rank's process.

    Attributes:
        size: the number of ranks of its group.
        settings: those of its engine's config that concern the model.
        host, port: address of the store of rank 0.
        line: a descriptor of its end of the line.
        memory: a descriptor of memory that all ranks share; ``None`` if they share none.
    """

    rank: int
    size: int
    settings: Mapping[str, Any]
    host: str
    port: int
    line: int
    memory: int | None

    def to_json(self) -> str:
        """Return the settings as JSON, for the command line of a process."""
        return json.dumps(asdict(self))


def main(spec: str, parent: str) -> int:
    """Run one rank and return its exit code.

    Args:
        spec: a `RankSpec` as JSON.
        parent: id of the process that started this one.
    """
    if not end_with(int(parent)):
        return EXIT_LOST
    ignore_signals()
    from minserve.engine.ranks.follower import run_rank

    return run_rank(RankSpec(**json.loads(spec)))


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    logging.shutdown()
    os._exit(code)  # threads of gloo may still wait for a rank that has gone
