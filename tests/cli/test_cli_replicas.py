"""``minserve serve --replicas N``: who runs where, before anything runs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from waiting import PATIENCE_S

from minserve.cli.replicas import (
    create_controller,
    is_apart,
    is_follower,
    share_device,
    under_torchrun,
)
from minserve.config import EngineConfig
from minserve.errors import ConfigError
from minserve.machine import GIB, Machine
from minserve.process_config import ControllerConfig, ProcessConfig
from minserve.server_config import ServerConfig

TORCHRUN = {"WORLD_SIZE": "3", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3",
            "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"}  # fmt: skip


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody started these tests with torchrun, or for some GPUs."""
    for name in (*TORCHRUN, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def tell(monkeypatch: pytest.MonkeyPatch, environment: Mapping[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def have_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """A machine with so many."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


# --- torchrun ---


def test_without_torchrun_the_settings_stay_as_they_are() -> None:
    config = ControllerConfig(replicas=5, control_port=4000)
    assert under_torchrun(config) == config
    assert not is_follower()


def test_torchrun_says_how_many_and_where_they_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    tell(monkeypatch, TORCHRUN)
    config = under_torchrun(ControllerConfig(hop_limit=7))
    # Torchrun itself listens on its own port.
    assert config == ControllerConfig(
        replicas=3, control_host="10.0.0.7", control_port=29501, hop_limit=7
    )


def test_a_port_that_was_given_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    tell(monkeypatch, TORCHRUN)
    assert under_torchrun(ControllerConfig(control_port=4000)).control_port == 4000


def test_the_last_port_has_none_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tell(monkeypatch, {**TORCHRUN, "MASTER_PORT": "65535"})
    with pytest.raises(ConfigError, match="control_port"):
        under_torchrun(ControllerConfig())
    assert under_torchrun(ControllerConfig(control_port=4000)).control_port == 4000


def test_a_number_of_replicas_other_than_torchruns_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tell(monkeypatch, TORCHRUN)
    with pytest.raises(ConfigError, match="--replicas 4, but torchrun starts 3 processes"):
        under_torchrun(ControllerConfig(replicas=4))
    assert under_torchrun(ControllerConfig(replicas=3)).replicas == 3


def test_all_processes_but_the_first_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in ("0", "1", "2"):
        monkeypatch.setenv("RANK", rank)
        assert is_follower() == (rank != "0")


# --- GPUs ---


def gpus(shares: list[tuple[dict[str, Any], dict[str, str]]]) -> list[str]:
    assert all(settings == {} for settings, _ in shares)
    return [environment["CUDA_VISIBLE_DEVICES"] for _, environment in shares]


def test_each_replica_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    have_gpus(monkeypatch, 4)
    assert gpus(share_device(EngineConfig(), [0, 1, 2])) == ["0", "1", "2"]
    assert gpus(share_device(EngineConfig(device="cuda"), [0, 1, 2, 3])) == ["0", "1", "2", "3"]


def test_of_torchruns_processes_each_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    have_gpus(monkeypatch, 2)
    # The second of two processes on the second of two machines.
    tell(monkeypatch, {**TORCHRUN, "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1",
                       "LOCAL_WORLD_SIZE": "2"})  # fmt: skip
    assert gpus(share_device(EngineConfig(), [3])) == ["1"]


def test_gpus_that_are_hidden_from_the_command_are_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # torch counts only those that can be seen.
    have_gpus(monkeypatch, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-8932f937")
    assert gpus(share_device(EngineConfig(), [0, 1])) == ["5", "GPU-8932f937"]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert gpus(share_device(EngineConfig(), [1])) == ["GPU-8932f937"]


def test_more_replicas_than_gpus_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    have_gpus(monkeypatch, 2)
    with pytest.raises(ConfigError, match="3 replicas, but this machine has 2 GPUs") as error:
        share_device(EngineConfig(), [0, 1, 2])
    assert "\n" not in str(error.value)
    # Torchrun's processes are one each, and together too many.
    tell(monkeypatch, TORCHRUN)
    with pytest.raises(ConfigError, match="3 replicas, but this machine has 2 GPUs"):
        share_device(EngineConfig(), [0])


def test_each_rank_of_each_replica_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    have_gpus(monkeypatch, 8)
    config = EngineConfig(tensor_parallel=4)
    assert gpus(share_device(config, [0, 1])) == ["0,1,2,3", "4,5,6,7"]
    with pytest.raises(ConfigError, match=r"3 x 4 ranks .*, but this machine has 8 GPUs"):
        share_device(config, [0, 1, 2])
    tell(monkeypatch, {**TORCHRUN, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})
    assert gpus(share_device(config, [3])) == ["4,5,6,7"]


def test_the_ranks_of_a_cpu_divide_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    have_gpus(monkeypatch, 0)
    machine = Machine(processors=8, cores=8, cpu_quota=None, memory_limit=None, free_memory=8 * GIB)
    monkeypatch.setattr(Machine, "look", lambda: machine)
    shares = share_device(EngineConfig(tensor_parallel=2), [0, 1])
    assert shares == [({"threads": 2, "kv_cache_gib": 0.5}, {"OMP_NUM_THREADS": "2"})] * 2


def test_a_simulated_device_takes_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    have_gpus(monkeypatch, 1)
    config = EngineConfig(executor="simulated", profile="opt-6.7b-a100")
    shares = share_device(config, list(range(8)))
    assert len(shares) == 8
    assert all("CUDA_VISIBLE_DEVICES" not in environment for _, environment in shares)


# --- CPUs ---


@pytest.mark.parametrize("num_gpus", [0, 1])
@pytest.mark.parametrize("num", [1, 2, 64])
def test_on_a_cpu_cores_and_kv_memory_are_divided(
    monkeypatch: pytest.MonkeyPatch, num_gpus: int, num: int
) -> None:
    have_gpus(monkeypatch, num_gpus)
    shares = share_device(EngineConfig(device="cpu" if num_gpus else "auto"), list(range(num)))
    assert len(shares) == num
    for settings, environment in shares:
        assert settings.keys() == {"threads", "kv_cache_gib"}
        assert settings["threads"] >= 1
        assert environment == {"OMP_NUM_THREADS": str(settings["threads"])}
    assert sum(settings["threads"] for settings, _ in shares) <= max(num, os.cpu_count())
    total_gib = sum(settings["kv_cache_gib"] for settings, _ in shares)
    assert 0 < total_gib <= min(4.0, psutil.virtual_memory().total / 2**30 / 4) + 1e-6


def test_torchruns_processes_divide_a_cpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    have_gpus(monkeypatch, 0)
    # Each asks for itself alone, and must leave the others their share.
    tell(monkeypatch, {**TORCHRUN, "LOCAL_WORLD_SIZE": "64"})
    ((settings, _),) = share_device(EngineConfig(), [0])
    assert settings["threads"] * 64 <= max(64, os.cpu_count())
    assert settings["kv_cache_gib"] * 64 <= 4.0 + 1e-6


def test_what_was_given_is_not_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    have_gpus(monkeypatch, 0)
    for given in ({"num_blocks": 10}, {"kv_cache_gib": 0.5}):
        config = EngineConfig(threads=3, **given)
        assert share_device(config, [0, 1]) == [({"threads": 3}, {"OMP_NUM_THREADS": "3"})] * 2


def test_a_containers_cores_and_memory_are_divided(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    have_gpus(monkeypatch, 0)
    machine = Machine(
        processors=64, cores=32, cpu_quota=4.5, memory_limit=4 * GIB, free_memory=2 * GIB
    )
    monkeypatch.setattr(Machine, "look", lambda: machine)
    for num, threads in ((1, 4), (2, 2), (4, 1)):
        settings, _ = share_device(EngineConfig(), list(range(num)))[0]
        assert settings == {"threads": threads, "kv_cache_gib": 0.5 / num}
    assert not caplog.records
    share_device(EngineConfig(), list(range(6)))
    assert "--replicas 6: 6 threads, but a cgroup limits" in caplog.text


# --- the command ---


def test_a_taken_control_port_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        ended = subprocess.run(
            [
                sys.executable, "-m", "minserve", "serve", "--replicas", "2", "--port", "0",
                "--control-port", str(port), "--executor", "simulated",
                "--profile", "opt-6.7b-a100",
            ],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )  # fmt: skip
    assert ended.returncode == 1
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith("minserve: error: ")
    assert f"127.0.0.1:{port}" in line


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"replicas": 0}, "replicas must be at least 1, not 0"),
        ({"replicas": -1}, "replicas"),
        ({"hop_limit": -1}, "hop_limit"),
        ({"replica_timeout": 0.0}, "replica_timeout"),
        ({"replica_timeout": float("inf")}, "replica_timeout"),
        ({"replica_timeout": float("nan")}, "replica_timeout"),
        ({"control_port": -1}, "control_port"),
        ({"control_port": 65536}, "control_port"),
        ({"router": "magic"}, "router must be one of slo, least-loaded, round-robin"),
    ],
    ids=str,
)
def test_settings_out_of_their_range_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ControllerConfig(**settings)


def test_settings_at_the_ends_of_their_range_are_taken() -> None:
    for settings in ({"replicas": 1}, {"hop_limit": 0}, {"control_port": 65535}):
        assert ControllerConfig(**settings)


# --- the process of a lone engine ---

SIMULATED = EngineConfig(executor="simulated", profile="opt-6.7b-a100")


@pytest.mark.parametrize(
    ("choice", "num_gpus", "config", "apart"),
    [
        ("auto", 0, EngineConfig(), False),
        ("auto", 1, EngineConfig(), True),
        ("auto", 1, EngineConfig(device="cuda"), True),
        ("auto", 1, EngineConfig(device="cpu"), False),
        ("auto", 1, SIMULATED, False),
        ("own", 0, EngineConfig(), True),
        ("own", 0, SIMULATED, True),
        ("shared", 1, EngineConfig(), False),
        # The controller starts it again where it has lost a rank.
        ("auto", 0, EngineConfig(tensor_parallel=2), True),
        # It is refused where the engine is loaded, in this process.
        ("auto", 0, EngineConfig(device="cuda"), False),
    ],
)
def test_an_engine_on_a_gpu_has_a_process_of_its_own(
    monkeypatch: pytest.MonkeyPatch, choice: str, num_gpus: int, config: EngineConfig, apart: bool
) -> None:
    have_gpus(monkeypatch, num_gpus)
    assert is_apart(ProcessConfig(engine_process=choice), config) is apart


def test_one_process_for_several_replicas_or_ranks_is_refused() -> None:
    shared, two_ranks = ProcessConfig(engine_process="shared"), EngineConfig(tensor_parallel=2)
    with pytest.raises(ConfigError, match="one engine in one process, not for 2 replicas"):
        shared.check_fits(ControllerConfig(replicas=2), EngineConfig())
    with pytest.raises(ConfigError, match="one engine in one process, not for 2 ranks"):
        shared.check_fits(ControllerConfig(), two_ranks)
    shared.check_fits(ControllerConfig(), EngineConfig())
    for choice in ("own", "auto"):
        ProcessConfig(engine_process=choice).check_fits(ControllerConfig(replicas=2), two_ranks)
    with pytest.raises(ConfigError, match="engine_process must be one of auto, own, shared"):
        ProcessConfig(engine_process="mine")


@pytest.mark.parametrize(
    ("num_gpus", "replicas", "settings", "environment", "alone"),
    [
        (0, 1, {}, {}, True),
        (3, 1, {}, {"CUDA_VISIBLE_DEVICES": "0"}, True),
        (3, 2, {}, {"CUDA_VISIBLE_DEVICES": "0"}, False),
    ],
)
def test_a_lone_engine_on_a_cpu_has_the_whole_machine(
    monkeypatch: pytest.MonkeyPatch,
    tiny_llama_dir: Path,
    num_gpus: int,
    replicas: int,
    settings: dict[str, Any],
    environment: dict[str, str],
    alone: bool,
) -> None:
    have_gpus(monkeypatch, num_gpus)
    config, given = ControllerConfig(replicas=replicas), {"model": str(tiny_llama_dir)}
    controller = create_controller(config, given, ServerConfig())
    watcher = controller._watchers[0]
    assert watcher.spec.settings == {**given, **settings}
    assert watcher.spec.is_alone is alone
    assert environment.items() <= watcher._environment.items()
    assert ("OMP_NUM_THREADS" in watcher._environment) == ("OMP_NUM_THREADS" in os.environ)
