"""Tells whether an engine still works, and when a server whose engine does not should end."""

from __future__ import annotations

import asyncio
import logging

from minserve.server.engine_face import EngineFace

logger = logging.getLogger(__name__)

# Seconds between two looks, at most.
LOOK_S = 1.0


def problem_of(engine: EngineFace, watchdog_s: float) -> str | None:
    """Return what is wrong with an engine that does not work; ``None`` where it does.

    Args:
        watchdog_s: the seconds after which an iteration counts as hung.
    """
    if not engine.is_healthy:
        return "the engine has stopped working"
    if engine.iteration_s > watchdog_s:
        return f"no iteration has ended for {engine.iteration_s:.0f} s although there is work"
    return None


async def until_given_up(engine: EngineFace, watchdog_s: float, exit_s: float) -> None:
    """Return when an engine that is alone has not worked for so long that only a new process helps.

    With several replicas it never returns: a hung one is replaced by its controller.

    Args:
        watchdog_s: as in `problem_of`.
        exit_s: seconds for which the problem may last; 0 waits for ever.
    """
    if engine.replica_set is not None or exit_s == 0:
        await asyncio.Event().wait()
    look_s, lasted_s = min(LOOK_S, exit_s / 4, watchdog_s / 4), 0.0
    while lasted_s < exit_s:
        await asyncio.sleep(look_s)
        problem = problem_of(engine, watchdog_s)
        if problem is None:
            if lasted_s:
                logger.warning("the engine works again")
            lasted_s = 0.0
            continue
        if not lasted_s:
            logger.error("%s; the process ends if that lasts %g s more", problem, exit_s)
        # Counted in looks, not by a clock: a process that was stopped for a while is not hung.
        lasted_s += look_s
