"""A rank other than 0: it meets its group, loads its share of the model, and follows."""

from __future__ import annotations

import logging

from minserve.config import EngineConfig
from minserve.engine.build import load_share
from minserve.engine.device.device_choice import choose_device
from minserve.engine.ranks.follower_process import RankSpec
from minserve.engine.ranks.following import follow
from minserve.engine.ranks.group import RankGroup, reach_store, report
from minserve.engine.ranks.line import LineEnd
from minserve.exit_codes import EXIT_FAULT, EXIT_LOST
from minserve.log_lines import set_up_logs

log = logging.getLogger(__name__)


def run_rank(spec: RankSpec) -> int:
    """Run a rank and return the exit code of its process."""
    set_up_logs("text")
    # What concerns all ranks is told by rank 0.
    logging.getLogger().setLevel(logging.ERROR)
    config = EngineConfig.create(**spec.settings)
    line = LineEnd(spec.line)
    try:
        store = reach_store(spec.host, spec.port)
    except RuntimeError as error:
        log.error("rank %d finds no rank 0: %s", spec.rank, error)
        return EXIT_LOST
    try:
        device = choose_device(config.device)
        group = RankGroup(spec.rank, spec.size, store, spec.host, device, spec.memory, None)
        follow(load_share(config, group), group, line)
        return EXIT_LOST
    except Exception as error:
        report(store, spec.rank, error)
        log.debug("rank %d has failed", spec.rank, exc_info=error)
        return EXIT_FAULT
