"""Rank 0 starts the other ranks of its group, on the GPUs or the cores of this machine."""

from __future__ import annotations

import os

import torch

from minserve.config import EngineConfig
from minserve.engine.ranks import shared_memory
from minserve.engine.ranks.follower_process import RankSpec
from minserve.engine.ranks.group import RankGroup, host_store, told_by
from minserve.engine.ranks.keeper import Keeper, RankProcess
from minserve.engine.ranks.leading import Leader
from minserve.engine.ranks.line import Line
from minserve.errors import ConfigError
from minserve.models.config import ModelConfig
from minserve.models.ranks import check_size

HOST = "127.0.0.1"
# The settings that concern the model; those of planning, text and promises are rank 0's alone.
SHARED_SETTINGS = (
    "model", "dtype", "quantization", "device", "max_model_len", "threads", "attention_backend",
    "cuda_graphs", "block_size", "kv_cache_gib", "num_blocks", "policy", "token_budget",
    "max_num_seqs", "chunked_prefill", "tensor_parallel", "speculator", "draft_model",
    "max_speculation", "kv_cache_dtype",
)  # fmt: skip


def start_group(
    config: EngineConfig, model_config: ModelConfig, device: torch.device
) -> tuple[RankGroup, Leader]:
    """Start the other ranks and wait until they are there, before they load.

    Raises:
        ConfigError: if the model cannot be divided, or there are too few GPUs.
        RankLostError: if one of them ends.
    """
    size = config.tensor_parallel
    check_size(model_config, size)
    gpus = visible_gpus(size) if device.type == "cuda" else []
    shared = device.type == "cpu" and shared_memory.is_supported()
    memory = shared_memory.create(size) if shared else None
    pipes = [os.pipe() for _ in range(1, size)]
    given = [end for end, _ in pipes] + ([] if memory is None else [memory])
    line, store = Line([end for _, end in pipes]), host_store(HOST)
    settings = {name: getattr(config, name) for name in SHARED_SETTINGS}
    processes = []
    for rank, (end, _) in enumerate(pipes, start=1):
        spec = RankSpec(
            rank=rank,
            size=size,
            settings=settings,
            host=HOST,
            port=store.port,
            line=end,
            memory=memory,
        )
        environment = {"TQDM_DISABLE": "1"}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[rank]
        files = [end] if memory is None else [end, memory]
        processes.append(RankProcess(rank, spec.to_json(), environment, files))
    keeper = Keeper(processes, told_by(store))
    try:
        group = RankGroup(0, size, store, HOST, device, memory, keeper)
    except BaseException:
        keeper.close()
        raise
    finally:
        for file in given:  # all ranks have theirs by now, or never will
            os.close(file)
    return group, Leader(group, line, keeper)


def most_queries(config: EngineConfig) -> int:
    """Return the most query tokens of a decode: the newest token, and drafts that it verifies."""
    drafts = config.draft_model is not None or config.speculator in ("draft", "ngram")
    return 1 + config.max_speculation if drafts else 1


def visible_gpus(size: int) -> list[str]:
    """Return the names of the GPUs that this process sees, as CUDA_VISIBLE_DEVICES has them.

    Raises:
        ConfigError: if there are fewer than ranks.
    """
    count = torch.cuda.device_count()
    if size > count:
        raise ConfigError(
            f"tensor_parallel {size}, but there are {count} GPUs here; each rank needs one of its own"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(number) for number in range(count)]
