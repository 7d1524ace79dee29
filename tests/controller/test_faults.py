"""Faults planted in replicas, and processes that are stopped or killed at any moment of their life."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, announced, launch
from held import planted_in
from planted_replica import ABORT, HANG
from waiting import PATIENCE_S, is_alive, wait_until

from minserve.process_ends import is_stopped

MOMENTS = ("starting", "loading", "measuring", "joining")
NEIGHBOURS = [
    {"prompt": list(range(10 + number, 40 + number)), "max_tokens": 300, "ignore_eos": True,
     "temperature": 0, "logprobs": 1}
    for number in range(4)
]  # fmt: skip


@pytest.fixture(scope="module")
def halts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder whose files make replicas halt."""
    return tmp_path_factory.mktemp("halts")


@pytest.fixture(scope="module")
def planted(
    tiny_llama_dir: Path, halts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """Two replicas. In the end their controller is stopped and killed, which they must not outlive,
    while one of them serves and the other one is stopped before it can know of its parent.
    """
    log = tmp_path_factory.mktemp("planted") / "log"
    process = launch(
        log, tiny_llama_dir, "--replicas", "2", "--watchdog-s", "4", "--replica-timeout", "3",
        module="planted_serve", environment=planted_in(halts),
    )  # fmt: skip
    try:
        cluster = announced(process, log)
        yield cluster
        serving, killed = cluster.wait_until_up()
        (halts / "starting.halt").touch()
        os.kill(killed["pid"], signal.SIGKILL)
        pids = [serving["pid"], halted(halts, "starting")]
        os.kill(process.pid, signal.SIGSTOP)
        process.kill()
        process.wait()
        wait_until(lambda: not any(is_alive(pid) for pid in pids))
    finally:
        process.kill()
        process.wait()


def halted(halts: Path, moment: str) -> int:
    """The id of the process that has stopped itself at this moment."""
    (found,) = wait_until(lambda: list(halts.glob(f"{moment}.[0-9]*")))
    pid = int(found.suffix[1:])
    wait_until(lambda: is_stopped(pid))
    found.unlink()
    return pid


@pytest.fixture(scope="module")
def undisturbed(planted: Cluster) -> list[Any]:
    """What the streams bring without any fault."""
    planted.wait_until_up()
    with ThreadPoolExecutor(len(NEIGHBOURS)) as pool:
        return list(pool.map(planted.stream, NEIGHBOURS))


@pytest.fixture
def _streams(planted: Cluster, undisturbed: list[Any]) -> Iterator[None]:
    """Streams on both replicas, half-way; in the end each is what it is without any fault."""
    planted.wait_until_up()
    met = threading.Barrier(len(NEIGHBOURS) + 1)
    with ThreadPoolExecutor(len(NEIGHBOURS)) as pool:
        found = pool.map(lambda body: planted.stream(body, after=20, then=met.wait), NEIGHBOURS)
        met.wait()
        yield
        assert list(found) == undisturbed


@pytest.mark.usefixtures("_streams")
@pytest.mark.parametrize(
    ("deed", "position"), [(ABORT, 24), (HANG, 3)], ids=["crash in decode", "hang in prefill"]
)
def test_a_request_that_kills_costs_two_processes_and_no_neighbour(
    planted: Cluster, deed: tuple[int, ...], position: int
) -> None:
    before = sum(one["lost"] for one in planted.replicas())
    body = {"prompt": [*deed, *range(20, 30), position], "max_tokens": 40, "ignore_eos": True}
    assert "this request ends the process that runs it" in planted.error_of(body)
    assert sum(one["lost"] for one in planted.replicas()) == before + 2


@pytest.mark.usefixtures("_streams")
def test_a_replica_comes_up_at_whatever_moment_of_its_start_it_is_stopped_or_killed(
    planted: Cluster, halts: Path
) -> None:
    # All now: each process is stopped at the first moment that none before it was stopped at.
    for moment in MOMENTS:
        (halts / f"{moment}.halt").touch()
    os.kill(planted.replicas()[1]["pid"], signal.SIGKILL)
    for number, moment in enumerate(MOMENTS):
        pid = halted(halts, moment)
        # The others stay as they are, until they are given up.
        if number % 2:
            os.kill(pid, signal.SIGKILL)
    planted.wait_until_up()


@pytest.mark.usefixtures("_streams")
def test_draining_and_restarting_come_to_their_end_though_the_process_is_hit(
    planted: Cluster,
) -> None:
    pid = planted.replicas()[1]["pid"]
    restarting = threading.Thread(target=planted.post, args=("/replicas/1/restart",))
    restarting.start()
    wait_until(lambda: (one := planted.replicas()[1])["state"] != "up" or one["pid"] != pid)
    with suppress(ProcessLookupError):  # on a busy machine it may have ended
        os.kill(pid, signal.SIGSTOP)
    restarting.join(PATIENCE_S)
    planted.post("/replicas/1/drain")
    pid = planted.replicas()[1]["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: planted.replicas()[1]["pid"] != pid)
    planted.wait_until_up()
