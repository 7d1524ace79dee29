"""Replicas of several machines: two torchrun agents on loopback stand for two of them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
from cluster import Cluster, announced, launch
from unused_ports import unused_port
from waiting import PATIENCE_S

BODY = {
    "prompt": "The quick brown fox",
    "max_tokens": 240,
    "ignore_eos": True,
    "temperature": 0,
    "logprobs": 1,
}


@pytest.fixture
def machines(tiny_llama_dir: Path, tmp_path: Path) -> Iterator[tuple[Cluster, list]]:
    """The endpoint of the first machine, and both agents."""
    logs = [tmp_path / f"machine-{rank}.log" for rank in range(2)]
    # The controller takes the next one.
    port = unused_port(2)
    agents = [
        launch(
            log,
            tiny_llama_dir,
            torchrun=["--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(rank),
                      "--master-addr", "127.0.0.1", "--master-port", str(port)],
        )
        for rank, log in enumerate(logs)
    ]  # fmt: skip
    try:
        yield announced(agents[0], logs[0]), agents
    finally:
        for agent in agents:
            for process in _family(agent.pid):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            agent.wait()


def test_replicas_of_two_machines_serve_one_endpoint_and_outlive_each_other(
    machines: tuple[Cluster, list],
) -> None:
    cluster, agents = machines
    before = cluster.wait_until_up()
    own, other = (
        {process.pid for process in _family(agent.pid)} for agent in (agents[0], agents[1])
    )
    assert before[0]["pid"] in own
    assert before[1]["pid"] in other

    undisturbed = cluster.stream(BODY)
    for replica in before:
        kill = partial(cluster.lose, replica["replica"])
        cluster.wait_until_up()
        assert cluster.stream(BODY, after=20, then=kill) == undisturbed
    after = cluster.wait_until_up()
    assert [one["lost"] for one in after] == [1, 1]

    everyone = [process for agent in agents for process in _family(agent.pid)]

    def stop() -> None:
        for agent in agents:
            agent.send_signal(signal.SIGTERM)

    # What runs may end, although torchrun sends the signal to everyone.
    assert cluster.stream(BODY, after=20, then=stop) == undisturbed
    assert not psutil.wait_procs(everyone, timeout=PATIENCE_S)[1]


def _family(pid: int) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []
