"""Several replicas behind one endpoint: nothing is lost, whatever happens to their processes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, start_cluster
from held import Hold
from waiting import PATIENCE_S, is_alive, wait_until

from minserve.controller.replica_process import ReplicaSpec
from minserve.engine.profile.profile_cache import Profile
from minserve.exit_codes import EXIT_REFUSED
from minserve.planner.predict.perf_model import BatchShape

NUM_TOKENS = 320
# Streams that are to be hit go no further until then.
HELD_AT = 100
LONG = {
    "prompt": "The quick brown fox",
    "max_tokens": NUM_TOKENS,
    "ignore_eos": True,
    "logprobs": 1,
}
WAYS = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 1.0, "seed": 5},
    "penalized": {"temperature": 0.8, "seed": 7, "presence_penalty": 1.0, "top_p": 0.9},
    "two outputs": {"temperature": 1.0, "seed": 9, "n": 2},
    "with an SLO": {"temperature": 0, "slo": {"ttft_ms": 60000, "tpot_ms": 60000}},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the replicas keep the profile of their device, which is rough at first."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the cluster."""
    return tmp_path_factory.mktemp("cluster")


@pytest.fixture(scope="module")
def cluster(tiny_llama_dir: Path, cache: Path, folder: Path) -> Iterator[Cluster]:
    # A replica is hung for so long before it is given up; one that is only slow must not be.
    flags = ("--replicas", "2", "--replica-timeout", "3", "--profile-seconds", "0.05")
    environment = {"XDG_CACHE_HOME": str(cache)}
    for own in start_cluster(tiny_llama_dir, folder, *flags, environment=environment):
        yield own
        pids = [one["pid"] for one in own.wait_until_up()]
        # SIGTERM comes now, and this one cannot hear that it has to end.
        os.kill(pids[1], signal.SIGSTOP)
    wait_until(lambda: not any(is_alive(pid) for pid in pids))


@pytest.fixture
def hold(folder: Path) -> Iterator[Hold]:
    """Holds the replicas of the cluster."""
    with Hold(folder) as hold:
        yield hold


@pytest.fixture(autouse=True)
def _all_up(cluster: Cluster) -> None:
    cluster.wait_until_up()


def test_idle_replicas_refine_one_profile_and_keep_it_when_they_are_restarted(
    cluster: Cluster, cache: Path
) -> None:
    def completeness() -> list[float]:
        told = re.findall(r"minserve:profile_completeness\{.*\} (\S+)", cluster.get("/metrics"))
        return list(map(float, told))

    def runs() -> Counter[tuple[BatchShape, float]]:
        """Every run of the profile that is kept."""
        (kept,) = (cache / "minserve" / "profiles").glob("*.json")
        found = Profile.from_dict(json.loads(kept.read_text())).runs
        return Counter((shape, seconds) for shape in found for seconds in found[shape])

    kept = [runs()]
    first = wait_until(lambda: all(known := completeness()) and known)
    assert len(first) == 2
    assert max(first) < 1.0
    wait_until(lambda: min(completeness()) > max(first))
    for number, other in ((0, 1), (1, 0)):
        before = cluster.replicas()
        cluster.post(f"/replicas/{number}/restart")
        after = cluster.replicas()
        assert after[number]["pid"] not in (None, before[number]["pid"])
        assert after[number]["lost"] == before[number]["lost"]
        assert after[other]["pid"] == before[other]["pid"]
        kept.append(runs())
    # What the first one measured is kept, and stays when the second one adds its own.
    assert kept[0] < kept[1] <= kept[2]


def test_the_page_is_told_of_each_replica(cluster: Cluster) -> None:
    for prompt in range(4):
        cluster.post("/v1/completions", {"prompt": [5, 6, 7 + prompt], "max_tokens": 4})

    def told() -> Any:
        with urllib.request.urlopen(
            f"{cluster.url}/page/feed?frames=1", timeout=PATIENCE_S
        ) as answer:
            replicas = json.loads(answer.read().removeprefix(b"data: "))["replicas"]
        # A replica that does not answer soon is left out of a frame.
        if not all(one["activity"] for one in replicas):
            return None
        lanes = [lane for one in replicas for lane in one["activity"]["lanes"]]
        return len(lanes) >= 4 and replicas

    replicas = wait_until(told)
    assert [(one["replica"], one["state"]) for one in replicas] == [("0", "up"), ("1", "up")]
    for one in replicas:
        lanes, iterations = one["activity"]["lanes"], one["activity"]["iterations"]
        assert bool(lanes) is bool(iterations)
        assert all(lane["state"] == "finished" for lane in lanes)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> dict[str, Any]:
    """What a stream of each way brings without any fault, alone on its replica."""
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda way: cluster.stream({**LONG, **way}), WAYS.values()))
    assert all(len(tokens) == NUM_TOKENS for outputs in found for _, tokens in outputs)
    return dict(zip(WAYS, found, strict=True))


@pytest.mark.parametrize(
    ("number", "how"), [(0, signal.SIGKILL), (1, signal.SIGSTOP)], ids=["killed", "hung"]
)
def test_streams_go_on_as_if_nothing_had_happened(
    cluster: Cluster,
    undisturbed: dict[str, Any],
    hold: Hold,
    number: int,
    how: signal.Signals,
) -> None:
    before, other = cluster.replicas(), 1 - number
    cluster.post(f"/replicas/{other}/drain")

    first = threading.Semaphore(1)

    def hit() -> None:
        """Once a stream is half-way: all are on this replica now, and go on on the other one."""
        if not first.acquire(blocking=False):
            return
        cluster.post(f"/replicas/{other}/resume")
        assert cluster.replicas()[number]["requests"] == len(WAYS)
        os.kill(before[number]["pid"], how)
        cluster.wait_until_lost(before[number])
        hold.release()

    bodies = [{**LONG, **way} for way in WAYS.values()]
    hold.at(0)
    with ThreadPoolExecutor(len(WAYS)) as pool:
        streams = pool.map(partial(cluster.stream, after=20, then=hit), bodies)
        # None may be over before all are there.
        wait_until(lambda: cluster.replicas()[number]["requests"] == len(WAYS))
        hold.at(HELD_AT)
        found = list(streams)
    assert dict(zip(WAYS, found, strict=True)) == undisturbed
    after = cluster.wait_until_up()
    assert after[number]["lost"] == before[number]["lost"] + 1
    assert after[number]["pid"] != before[number]["pid"]
    assert after[other]["pid"] == before[other]["pid"]


def test_without_any_replica_new_requests_get_503_and_those_in_flight_wait(
    cluster: Cluster, undisturbed: dict[str, Any], hold: Hold
) -> None:
    body = {**LONG, **WAYS["greedy"]}
    refused: list[int] = []

    def kill_all() -> None:
        with hold.starts():
            for one in cluster.replicas():
                os.kill(one["pid"], signal.SIGKILL)
            wait_until(lambda: not any(one["pid"] for one in cluster.replicas()))
            for path in ("/health", "/v1/completions"):
                with pytest.raises(urllib.error.HTTPError) as error:
                    cluster.get(path) if path == "/health" else cluster.post(path, body)
                refused.append(error.value.code)
        hold.release()

    hold.at(HELD_AT)
    assert cluster.stream(body, after=20, then=kill_all) == undisturbed["greedy"]
    assert refused == [503, 503]


def test_a_drained_replica_gets_nothing_until_it_is_resumed(cluster: Cluster) -> None:
    cluster.post("/replicas/0/drain")
    try:
        routed = cluster.replicas()[0]["routed"]
        assert cluster.replicas()[0]["state"] == "drained"
        for _ in range(3):
            cluster.post("/v1/completions", {**LONG, "max_tokens": 2})
        assert cluster.replicas()[0]["routed"] == routed
    finally:
        cluster.post("/replicas/0/resume")
    assert cluster.replicas()[0]["state"] == "up"


def test_draining_waits_for_what_runs(
    cluster: Cluster, undisturbed: dict[str, Any], hold: Hold
) -> None:
    body = {**LONG, **WAYS["greedy"]}
    threads = []

    def drain() -> None:
        number = cluster.busy()["replica"]
        threads.append(threading.Thread(target=cluster.post, args=(f"/replicas/{number}/drain",)))
        threads[0].start()
        wait_until(lambda: cluster.replicas()[number]["state"] == "draining")
        hold.release()

    hold.at(HELD_AT)
    assert cluster.stream(body, after=20, then=drain) == undisturbed["greedy"]
    threads[0].join(PATIENCE_S)
    (drained,) = [one for one in cluster.replicas() if one["state"] == "drained"]
    cluster.post(f"/replicas/{drained['replica']}/resume")


def test_health_counts_the_replicas(cluster: Cluster) -> None:
    assert cluster.get("/health") == {
        "status": "ok",
        "unfinished": 0,
        "replicas": {"up": 2},
    }


def test_metrics_are_told_for_each_replica(cluster: Cluster) -> None:
    cluster.post("/v1/completions", {**LONG, "max_tokens": 2})
    text = cluster.get("/metrics")
    for replica in ("0", "1"):
        assert f'minserve:replica_up{{replica="{replica}"}} 1.0' in text
        assert f'minserve:num_requests_running{{replica="{replica}"}}' in text
    routed = re.findall(r"minserve:routed_requests_total\{.*\} (\S+)", text)
    assert sum(map(float, routed)) == sum(one["routed"] for one in cluster.replicas())


def test_a_replica_of_another_model_length_is_refused_with_a_clear_line(
    cluster: Cluster, tiny_llama_dir: Path
) -> None:
    host, port = re.search(r"replicas meet at (\S+):(\d+)", cluster.log.read_text()).groups()
    spec = ReplicaSpec(
        index=1,
        store_host=host,
        store_port=int(port),
        settings={"model": str(tiny_llama_dir), "dtype": "float32", "num_blocks": 64,
                  "block_size": 16, "max_model_len": 64},
        profile_s=0.05,
        watchdog_s=60.0,
    )  # fmt: skip
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "minserve.controller.replica_process",
            spec.to_json(),
            str(os.getpid()),
        ],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert ended.returncode == EXIT_REFUSED, ended.stderr
    assert "its max_model_len is 64, that of the others 512" in ended.stderr
    assert cluster.replicas()[1]["state"] == "up"


def test_garbage_on_the_control_port_harms_nobody(cluster: Cluster) -> None:
    host, port = re.search(r"replicas meet at (\S+):(\d+)", cluster.log.read_text()).groups()
    for data in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(5000), b"\xff" * 1_000_000):
        with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as sock:
            try:
                sock.sendall(data)
            except OSError:
                continue
    cluster.lose(0)
    cluster.wait_until_up()


def test_unknown_replicas_and_verbs_are_refused(cluster: Cluster) -> None:
    for path in ("/replicas/7/drain", "/replicas/0/explode", "/replicas/x/drain"):
        with pytest.raises(urllib.error.HTTPError) as error:
            cluster.post(path)
        assert error.value.code == 404
