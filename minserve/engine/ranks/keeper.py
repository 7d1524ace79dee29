"""`Keeper`: starts the other ranks of a group on this machine, and notices when one of them ends.

Each has a thread here that starts it and waits for its end. So it belongs to a thread that lives as
long as this process does, which is what Linux binds its life to, and an end is noticed at once, also
while nothing runs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from minserve.errors import RankLostError
from minserve.process_ends import is_fault, is_stopped, num_oom_kills, words_of

log = logging.getLogger(__name__)

# The module that is a rank's process.
MODULE = "minserve.engine.ranks.follower_process"
# Seconds between looks at whether a process is stopped, and for which one may be.
LOOK_S, STOPPED_S = 0.25, 5.0
# Seconds from a broken connection to the news of the process that has ended.
NEWS_S = 2.0


class RankProcess(NamedTuple):
    """How to start a rank.

    Attributes:
        spec: its settings, in JSON.
        environment: variables beside those of this process.
        files: descriptors that it is given.
    """

    rank: int
    spec: str
    environment: Mapping[str, str]
    files: Sequence[int]


class Keeper:
    """Keeps the other ranks of one group. It ends them when it is no longer referred to.

    Attributes:
        lost: why the group is beyond use; ``None`` as long as it is not.
        reports: asked why a rank has ended, if it told; by its number.
    """

    def __init__(self, processes: Sequence[RankProcess], reports: Callable[[int], str]) -> None:
        self._state = _State(reports)
        for one in processes:
            threading.Thread(
                target=_keep, args=(one, self._state), name=f"rank-{one.rank}", daemon=True
            ).start()
        self._finalizer = weakref.finalize(self, self._state.end)

    @property
    def lost(self) -> RankLostError | None:
        return self._state.lost

    @property
    def pids(self) -> list[int]:
        """The ids of the processes that run."""
        return [one.pid for one in self._state.running.values()]

    def check(self) -> None:
        """Ask whether the group is beyond use.

        Raises:
            RankLostError: if it is, or in a fork; each time another one, whose traceback is its own.
        """
        if self._state.is_fork:
            raise RankLostError(
                "this process is a fork, and the ranks are its parent's; start an engine of its own",
                by_fault=False,
            )
        if self._state.lost is not None:
            raise self._state.lost.again()

    def give_up(self, error: RankLostError) -> None:
        """Count the group as lost, for the first reason that is told, and end its ranks."""
        self._state.lose(error)

    def reason_of(self, error: Exception) -> RankLostError:
        """Return why a group whose work failed is lost, with the error that this rank met.

        A connection may break moments before it is known whose process has ended.
        """
        self._state.news.wait(NEWS_S)
        self.give_up(
            RankLostError(
                f"a pass over the model failed on rank 0: {type(error).__name__}: {error}",
                by_fault=True,
            )
        )
        assert self._state.lost is not None, "it was given up just now"
        return self._state.lost.again()

    def call_when_lost(self, call: Callable[[RankLostError], object]) -> None:
        """Have the loss told to a function, in a thread of the keeper."""
        self._state.listen(call)

    def close(self) -> None:
        """End all ranks."""
        self._finalizer()


class _State:
    """What the threads know. They must not hold the keeper itself, which ends unreferenced."""

    def __init__(self, reports: Callable[[int], str]) -> None:
        self.reports = reports
        self.running: dict[int, subprocess.Popen[bytes]] = {}
        self.lost: RankLostError | None = None
        self.listeners: list[Callable[[RankLostError], object]] = []
        # Set once the group is lost or closed.
        self.news = threading.Event()
        self._guard = threading.Lock()
        self._closed = False
        self._owner = os.getpid()

    @property
    def is_fork(self) -> bool:
        """True in a fork of the process that started the ranks: they do not belong to it."""
        return os.getpid() != self._owner

    def add(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        with self._guard:
            self.running[rank] = process
            if self._closed:
                process.kill()

    def listen(self, call: Callable[[RankLostError], object]) -> None:
        with self._guard:
            self.listeners.append(call)
            lost = self.lost
        if lost is not None:
            call(lost)

    def end(self) -> None:
        """Kill all processes: there is nothing that they would have to put in order."""
        if self.is_fork:
            return
        with self._guard:
            self._closed = True
            for process in self.running.values():
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
        self.news.set()

    def lose(self, error: RankLostError) -> None:
        with self._guard:
            if self._closed or self.lost is not None:
                return
            self.lost = error
            listeners = list(self.listeners)
        self.end()
        for call in listeners:
            call(error)


def _keep(one: RankProcess, state: _State) -> None:
    """Start a process and wait for its end, which is the end of its group."""
    kills_before = num_oom_kills()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", MODULE, one.spec, str(os.getpid())],
            stdin=subprocess.DEVNULL,
            env={**os.environ, **one.environment},
            pass_fds=tuple(one.files),
            # A group of its own, see `replica_process`.
            process_group=0,
        )
    except OSError as error:
        state.lose(RankLostError(f"rank {one.rank} cannot be started: {error}", by_fault=True))
        return
    state.add(one.rank, process)
    code = _wait(process)
    why = words_of(code)
    if told := state.reports(one.rank):
        why = f"{why}: {told}"
    lost = RankLostError(
        f"rank {one.rank} has ended ({why})", by_fault=is_fault(code, kills_before)
    )
    state.lose(lost)


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Wait for the end of a process and return its exit code; kill one that stays stopped."""
    file = os.pidfd_open(process.pid) if hasattr(os, "pidfd_open") else None
    stopped_s = 0.0
    while process.poll() is None:
        if file is None:
            time.sleep(LOOK_S)
        else:
            select.select([file], [], [], LOOK_S)
        stopped_s = stopped_s + LOOK_S if is_stopped(process.pid) else 0.0
        if stopped_s > STOPPED_S:
            log.warning("a rank was stopped for %g s; its group is ended", STOPPED_S)
            process.kill()
    if file is not None:
        os.close(file)
    return process.wait()
