"""The processes behind one endpoint: those of replicas, or that of a lone engine."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from minserve.config import EngineConfig
from minserve.errors import ConfigError
from minserve.process_config import ControllerConfig, ProcessConfig
from minserve.server_config import ServerConfig

if TYPE_CHECKING:
    from minserve.controller.controller import Controller
    from minserve.controller.processes import Watcher

log = logging.getLogger(__name__)

# Environment variables that torchrun sets in each process that it starts.
RANK, WORLD_SIZE, LOCAL_RANK = "RANK", "WORLD_SIZE", "LOCAL_RANK"
MASTER_ADDR, MASTER_PORT = "MASTER_ADDR", "MASTER_PORT"
# The share of free memory that the KV caches of all replicas on a CPU take, and its upper bound.
KV_SHARE, MOST_KV_GIB = 0.25, 4.0
POLL_S = 0.5


def under_torchrun(config: ControllerConfig) -> ControllerConfig:
    """Return the settings, completed by torchrun's environment where there is one.

    Raises:
        ConfigError: if the flags and torchrun give different numbers of replicas.
    """
    if WORLD_SIZE not in os.environ:
        return config
    world = int(os.environ[WORLD_SIZE])
    if config.replicas not in (1, world):
        raise ConfigError(
            f"--replicas {config.replicas}, but torchrun starts {world} processes; leave it out"
        )
    port = config.control_port or int(os.environ[MASTER_PORT]) + 1
    return replace(config, replicas=world, control_host=os.environ[MASTER_ADDR], control_port=port)


def is_follower() -> bool:
    """Return True in a process of torchrun that has no controller."""
    return int(os.environ.get(RANK, 0)) > 0


def follow(config: ControllerConfig, settings: Mapping[str, Any], server: ServerConfig) -> int:
    """Keep this process's replica running until a signal comes or the controller ends it."""
    ((own, environment),) = share_device(EngineConfig.create(**settings), [int(os.environ[RANK])])
    watcher = create_watcher(
        config,
        {**settings, **own},
        server,
        int(os.environ[RANK]),
        environment,
        config.control_port,
    )
    asyncio.run(_follow(watcher, server.shutdown_timeout))
    return 0


async def _follow(watcher: Watcher, drain_s: float) -> None:
    """Run a watcher until its controller ends it, or until a signal comes.

    After a signal, the controller first has time to drain.

    Raises:
        ReplicaLostError, ReplicaRefusedError: if the replica cannot be started.
    """
    from minserve.controller.processes import STOP_S
    from minserve.controller.rendezvous import is_open

    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    spec = watcher.spec

    async def run() -> None:
        log.info("replica %d waits for the first one to be up", spec.index)
        while not await asyncio.to_thread(is_open, spec.store_host, spec.store_port):
            await asyncio.sleep(POLL_S)
        # Only the controller knows which replicas have joined.
        await watcher.run(lambda: watcher.has_lived)

    running, waiting = asyncio.create_task(run()), asyncio.create_task(ended.wait())
    await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
    if running.done():
        running.result()
    await watcher.stop(drain_s + STOP_S)
    running.cancel()


def is_apart(processes: ProcessConfig, config: EngineConfig) -> bool:
    """Return whether a lone engine has a process of its own.

    One of several ranks has: a controller starts it again where it has lost a rank.
    """
    if config.tensor_parallel > 1:
        return True
    if processes.engine_process == "auto":
        return has_gpus(config)
    return processes.engine_process == "own"


def has_gpus(config: EngineConfig) -> bool:
    """Return whether an engine with these settings runs on a GPU."""
    import torch

    if config.executor != "model" or config.device == "cpu":
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the engine says what is wrong with a GPU
        return torch.cuda.is_available()


def create_controller(
    config: ControllerConfig, settings: Mapping[str, Any], server: ServerConfig
) -> Controller:
    """Return a controller, not yet started, with watchers for the replicas of this machine.

    A lone replica on a CPU has all of the machine, as an engine in this process would.

    Raises:
        ConfigError: if the port is taken or there are too few GPUs.
    """
    from minserve.controller.controller import Controller
    from minserve.controller.rendezvous import Rendezvous

    engine_config = EngineConfig.create(**settings)
    indices = [int(os.environ[RANK])] if RANK in os.environ else list(range(config.replicas))
    alone: list[tuple[dict[str, Any], dict[str, str]]] = [({}, {})]
    is_lone_on_cpu = config.replicas == 1 and not has_gpus(engine_config)
    shares = alone if is_lone_on_cpu else share_device(engine_config, indices)
    rendezvous = Rendezvous(config.control_host, config.control_port, config.replicas)
    log.info("replicas meet at %s:%d", rendezvous.host, rendezvous.port)
    watchers = [
        create_watcher(config, {**settings, **own}, server, index, environment, rendezvous.port)
        for index, (own, environment) in zip(indices, shares, strict=True)
    ]
    return Controller(engine_config, config, rendezvous, watchers)


def create_watcher(
    config: ControllerConfig,
    settings: Mapping[str, Any],
    server: ServerConfig,
    index: int,
    environment: Mapping[str, str],
    port: int,
) -> Watcher:
    """Return a watcher of one replica's process."""
    from minserve.controller.processes import Watcher
    from minserve.controller.replica_process import ReplicaSpec

    spec = ReplicaSpec(
        index=index,
        store_host=config.control_host,
        store_port=port,
        settings=settings,
        profile_s=server.profile_seconds,
        watchdog_s=server.watchdog_s,
        log_format=server.log_format,
        is_alone=config.replicas == 1,
    )
    return Watcher(spec, environment, config.replica_timeout)


def share_device(
    config: EngineConfig, indices: list[int]
) -> list[tuple[dict[str, Any], dict[str, str]]]:
    """Return the settings and the environment of each replica of this machine.

    Each rank of a replica has its own GPU; on a CPU all ranks share cores and memory evenly.

    Raises:
        ConfigError: if there are more ranks than GPUs.
    """
    import torch

    from minserve.machine import GIB, Machine

    num, each = int(os.environ.get("LOCAL_WORLD_SIZE", len(indices))), config.tensor_parallel
    first = int(os.environ.get(LOCAL_RANK, 0))
    if has_gpus(config):
        count = torch.cuda.device_count()
        if num * each > count:
            wanted = f"{num} replicas" if each == 1 else f"{num} x {each} ranks (replicas x ranks)"
            raise ConfigError(f"{wanted}, but this machine has {count} GPUs")
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(i) for i in range(count)]
        return [
            ({}, {"CUDA_VISIBLE_DEVICES": ",".join(gpus[(first + i) * each :][:each])})
            for i in range(len(indices))
        ]
    own: dict[str, Any] = {}
    machine = Machine.look()
    threads = config.threads or max(1, machine.num_threads // (num * each))
    own["threads"] = threads
    if config.executor == "model":
        setting = f"--replicas {num}" + (f" --tensor-parallel {each}" if each > 1 else "")
        machine.warn_of(threads * num * each, setting)
    if config.kv_cache_gib is None and config.num_blocks is None:
        most = min(machine.free_memory / GIB * KV_SHARE, MOST_KV_GIB)
        own["kv_cache_gib"] = most / (num * each)
    return [(own, {"OMP_NUM_THREADS": str(threads)}) for _ in indices]
