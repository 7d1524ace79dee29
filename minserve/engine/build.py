"""`load_engine` makes a loaded engine core from settings."""

from __future__ import annotations

import logging
import os
import re
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from minserve.config import EngineConfig
from minserve.engine.block_pool import BlockPool
from minserve.engine.core import EngineCore
from minserve.engine.device.cuda_graphs import CudaRecorder
from minserve.engine.device.graph_recording import free_beside_graphs, limits_of, record_all
from minserve.engine.device.kv_cache import allocate_kv_cache, choose_num_blocks
from minserve.engine.device.own_thread import apart
from minserve.engine.device.paged_model import PagedModel
from minserve.engine.device.runner import ModelRunner
from minserve.engine.device.thread_count import ThreadCount
from minserve.engine.model_tokenizer import load_model_tokenizer
from minserve.engine.profile.profile_cache import dtype_words
from minserve.engine.sampling.sampler import Sampler
from minserve.engine.simulated import load_simulated_core
from minserve.engine.speculation.draft_model_proposer import MOST_DECODE_TOKENS, DraftModelProposer
from minserve.engine.speculation.proposer import NgramProposer, Proposer
from minserve.engine.text.tokenizer import Tokenizer, has_tokenizer
from minserve.errors import ConfigError
from minserve.kernels.attention import (
    DETERMINISTIC,
    AttentionBackend,
    LayerKV,
    choose_attention_backend,
    make_attention_backend,
)
from minserve.machine import Machine
from minserve.models.base import CausalLM, ModelShape
from minserve.models.config import ModelConfig
from minserve.models.deterministic_layers import DeterministicPlacement
from minserve.models.draft_model import check_vocabulary, load_draft_model
from minserve.models.finding.source import (
    EMBEDDED_DRAFT,
    ModelSource,
    find_model,
    load_config,
)
from minserve.models.layers import WeightPlacement
from minserve.models.registry import build_model
from minserve.models.tensor_check import require_tensors
from minserve.models.weights.loader import open_checkpoint
from minserve.planner.policies.registry import make_planner, make_safe_planner
from minserve.planner.predict.lengths import make_length_estimator

log = logging.getLogger(__name__)

# The first exists where a GPU can be used, and the second tells its driver's version.
NVIDIA_DEVICE, NVIDIA_DRIVER = Path("/dev/nvidiactl"), Path("/proc/driver/nvidia/version")
# Share of a CPU's free memory that a second form of the weights, faster for few rows, may take.
SECOND_FORM_SHARE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedEngine:
    """A core that is ready to step, and what its callers need around it.

    Attributes:
        source: where the model's files are.
        dtype: the dtype of the weights, and that of arithmetic where it differs.
    """

    core: EngineCore
    tokenizer: Tokenizer
    source: ModelSource
    dtype: str
    max_model_len: int
    vocab_size: int


def load_engine(config: EngineConfig) -> LoadedEngine:
    """Load the model and allocate its cache. Blocks for as long as reading the weights takes.

    Raises:
        ModelLoadError, UnsupportedModelError: where the model cannot be read.
        ConfigError: where a setting does not fit the model or the machine.
        BackendUnavailableError: where the attention backend asked for cannot run here.
    """
    if config.executor == "simulated":
        return _load_simulated_engine(config)
    started = time.perf_counter()
    device = choose_device(config.device)
    token_budget = config.budget_on(device.type)
    threads = _set_num_threads(config, device)
    source = find_model(config.model)
    # All that may be wrong with the files is found before weights are read, which takes long.
    model_config = load_config(source)
    tokenizer = load_model_tokenizer(config, source)
    draft_source = find_draft_model(config, model_config, tokenizer)
    attention = choose_attention_backend(config.attention_backend, device)
    model, placement = _load_model(config, source, model_config, device, attention)
    if config.deterministic:
        attention = DETERMINISTIC
    parts = _PartMaker(attention, config.block_size, placement)
    proposer = _make_proposer(config, model, draft_source, parts)
    runner = ModelRunner(model, *parts.of(model.shape))
    runner.threads = threads
    runner.sampler = Sampler(fused=runner.backend.in_triton, one_by_one=config.deterministic)
    num_blocks, max_model_len = apart(
        device, lambda: _make_ready(config, runner, proposer, placement)
    )
    core = EngineCore(
        runner,
        BlockPool(num_blocks, config.block_size, prefix_caching=config.prefix_caching),
        make_planner(
            config.policy,
            chunked_prefill=config.chunked_prefill,
            lengths=make_length_estimator(config.length_estimator),
            best_effort_share=config.best_effort_share,
        ),
        token_budget=token_budget,
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        clock=time.monotonic,
        proposer=proposer,
        safe_planner=make_safe_planner(chunked_prefill=config.chunked_prefill),
        plans_ahead=device.type == "cuda",
        launches_ahead=device.type == "cuda",
    )
    dtype = dtype_words(placement.linear_dtype, placement.dtype)
    if model.packed_form:
        dtype = f"{model.packed_form} in {dtype}"
    draft = "" if draft_source is None else f", draft model {draft_source.name}"
    log.info(
        "%s on %s: %s, %s attention%s, %d KV blocks of %d tokens, ready in %.1f s",
        source.name, device, dtype, attention, draft, num_blocks, config.block_size,
        time.perf_counter() - started,
    )  # fmt: skip
    return LoadedEngine(
        core=core,
        tokenizer=tokenizer,
        source=source,
        dtype=dtype,
        max_model_len=max_model_len,
        vocab_size=model.shape.vocab_size,
    )


def _load_simulated_engine(config: EngineConfig) -> LoadedEngine:
    source = find_model(config.model)
    core, tokenizer, max_model_len = load_simulated_core(config, source)
    return LoadedEngine(
        core=core,
        tokenizer=tokenizer,
        source=source,
        dtype="simulated",
        max_model_len=max_model_len,
        vocab_size=tokenizer.vocab_size,
    )


def _load_model(
    config: EngineConfig,
    source: ModelSource,
    model_config: ModelConfig,
    device: torch.device,
    attention: str,
) -> tuple[CausalLM, WeightPlacement]:
    """Read the model's weights, and return with them where and in which form they are.

    Raises:
        ConfigError: where the model allows no sequences of the length that is asked for.
        ModelLoadError: where the files do not hold the model's tensors; before any is read.
    """
    longest = longest_sequence(config, model_config)
    with open_checkpoint(source) as checkpoint:
        require_tensors(checkpoint, model_config)
        twice = device.type == "cpu" and has_room_twice(checkpoint.num_parameters())
        placement = choose_placement(config, device, fused=attention != "torch", twice=twice)
        checkpoint.rounded_to = placement.read_dtype
        checkpoint.keeps_packed = placement.packed
        model = build_model(checkpoint, model_config, placement, longest)
        model.packed_form = checkpoint.form if placement.packed else ""
        return model, placement


def choose_placement(
    config: EngineConfig, device: torch.device, *, fused: bool = False, twice: bool = False
) -> WeightPlacement:
    """Return where the weights are kept and in which form; the arguments are those of `choose`.

    Raises:
        ConfigError: where the device cannot run what the settings ask for.
    """
    kind = DeterministicPlacement if config.deterministic else WeightPlacement
    return kind.choose(
        device, config.dtype, fused=fused, twice=twice, quantization=config.quantization
    )


def _make_ready(
    config: EngineConfig,
    runner: ModelRunner,
    proposer: Proposer | None,
    placement: WeightPlacement,
) -> tuple[int, int]:
    """Warm the models up, give them their KV caches and record their CUDA graphs.

    Returns:
        The number of KV blocks, and the most tokens of a sequence.

    Raises:
        ConfigError: where the cache does not hold what the settings ask for.
    """
    longest = runner.model.shape.max_positions
    with_graphs = (
        config.cuda_graphs and placement.device.type == "cuda" and runner.backend.supports_graphs
    )
    # A decode of the model has the newest token, and the drafted ones that it verifies.
    models: dict[PagedModel, int] = {runner: 1 if proposer is None else 1 + proposer.max_tokens}
    if isinstance(proposer, DraftModelProposer):
        models[proposer.model] = MOST_DECODE_TOKENS
        runner.drafts_by_chance = True
    num_blocks = _allocate_kv_cache(config, models, proposer, placement, longest, with_graphs)
    _log_limits(models, placement.device)
    capacity = num_blocks * config.block_size
    if config.max_model_len is not None and config.max_model_len > capacity:
        raise ConfigError(
            f"max_model_len {config.max_model_len} does not fit the KV cache of {capacity} tokens; "
            "give it more memory or lower max_model_len"
        )
    max_model_len = min(longest, capacity)
    if with_graphs:
        record_all(limits_of(config, models, max_model_len), CudaRecorder(placement.device))
    return num_blocks, max_model_len


def _allocate_kv_cache(
    config: EngineConfig,
    models: Mapping[PagedModel, int],
    proposer: Proposer | None,
    placement: WeightPlacement,
    longest: int,
    with_graphs: bool,
) -> int:
    """Give the models their KV caches, and return the number of blocks of each.

    Args:
        models: each with the most query tokens of one of its decodes.
        longest: the most tokens of a sequence.

    Raises:
        ConfigError: where not a single block fits.
    """
    if placement.device.type == "cuda":
        torch.cuda.empty_cache()  # so that the dry run's peak does not hold what loading left
        # A prompt that may not be split runs as a whole, whatever the budget.
        budget = config.budget_on("cuda")
        most = budget if config.chunked_prefill else max(budget, longest)
        num_tokens = min(most, config.max_num_seqs * longest)
        for one, max_queries in models.items():
            one.dry_run(num_tokens, longest, config.max_num_seqs, max_queries)
        if proposer is not None:
            proposer.rehearse(config.max_num_seqs)
    else:
        for one in models:
            one.dry_run(8, longest)
    free_bytes = None
    if with_graphs and config.num_blocks is None and config.kv_cache_gib is None:
        recorder = CudaRecorder(placement.device)
        limits = limits_of(config, models, longest)
        free_bytes = free_beside_graphs(limits, recorder, placement.device)
    num_blocks = choose_num_blocks(
        config,
        [one.model.shape for one in models],
        placement.dtype,
        placement.device,
        free_bytes=free_bytes,
    )
    for one in models:
        one.kv = allocate_kv_cache(
            one.backend,
            one.model.shape.num_layers,
            num_blocks,
            config.block_size,
            placement.dtype,
            placement.device,
        )
    return num_blocks


def _log_limits(models: Iterable[PagedModel], device: torch.device) -> None:
    """Log in one line how a container's limits were met, if there are any."""
    kv_bytes = None
    if device.type == "cpu":
        kv_bytes = sum(kv.key.nbytes + kv.value.nbytes for one in models for kv in one.kv)
    if words := Machine.look().limit_words(torch.get_num_threads(), kv_bytes):
        log.info("%s", words)


class _PartMaker(NamedTuple):
    """Makes what a `PagedModel` needs beside its model."""

    attention: str
    block_size: int
    placement: WeightPlacement

    def of(self, shape: ModelShape) -> tuple[AttentionBackend, list[LayerKV], int, torch.device]:
        """Return a backend, a KV cache of one block for now, the block size and the device."""
        backend = make_attention_backend(
            self.attention, shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.scale
        )
        device = self.placement.device
        kv = backend.allocate(1, self.block_size, self.placement.dtype, device)
        return backend, [kv] * shape.num_layers, self.block_size, device


def find_draft_model(
    config: EngineConfig, model_config: ModelConfig, tokenizer: Tokenizer, *, download: bool = True
) -> ModelSource | None:
    """Return where the draft model is that the settings ask for; ``None`` if they ask for none.

    Args:
        model_config: of the model for which it drafts.
        tokenizer: of that model.
        download: as for `find_model`.

    Raises:
        ConfigError: where its vocabulary is not the model's.
        ModelLoadError: where there is no such model.
    """
    if config.draft_model is None and config.speculator != "draft":
        return None
    source = find_model(config.draft_model or EMBEDDED_DRAFT, download=download)
    check_vocabulary(source, load_config(source), model_config.vocab_size)
    if has_tokenizer(source) and not Tokenizer.load(source).has_vocabulary_of(tokenizer):
        raise ConfigError(
            f"the draft model {source.name} has another vocabulary than the model: the same "
            "token id means different texts"
        )
    return source


def _make_proposer(
    config: EngineConfig, model: CausalLM, draft_source: ModelSource | None, parts: _PartMaker
) -> Proposer | None:
    """Return the proposer that the settings ask for; a draft model is loaded."""
    if draft_source is None:
        return NgramProposer(config.max_speculation) if config.speculator == "ngram" else None
    draft = load_draft_model(draft_source, model, parts.placement)
    paged = PagedModel(draft.model, *parts.of(draft.model.shape))
    return DraftModelProposer(
        config.max_speculation, paged, model.shape.vocab_size, draft.head_token_ids
    )


def choose_device(name: str) -> torch.device:
    """Return the device of a setting; ``auto`` takes a GPU where torch can use one.

    A GPU that torch cannot use is named in one line of the log.

    Raises:
        ConfigError: where a GPU is asked for and there is none that torch can use.
    """
    if name == "cpu":
        return torch.device("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says the same in several lines
        if torch.cuda.is_available():
            return torch.device("cuda")
    problem = _why_no_gpu()
    if name == "cuda":
        raise ConfigError(
            f"device cuda was asked for, but {problem or 'torch sees no CUDA device'}; "
            "or use --device cpu"
        )
    if problem is not None:
        log.warning("%s; running on the CPU", problem)
    return torch.device("cpu")


def _why_no_gpu() -> str | None:
    """Return why torch cannot use the NVIDIA GPU of this machine.

    ``None`` stands for a machine without one, or one that is hidden on purpose.
    """
    if not NVIDIA_DEVICE.exists() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    try:
        found = re.search(r"Kernel Module.*?\s(\d[\d.]+)", NVIDIA_DRIVER.read_text())
    except OSError:
        found = None
    driver = f"the NVIDIA driver {found[1]}" if found else "the NVIDIA driver"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA in it; install one built for CUDA"
    return (
        f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, cannot use {driver}; "
        "update the driver, or install a torch built for an older CUDA"
    )


def has_room_twice(num_parameters: int) -> bool:
    """Return whether a second form of weights in half precision takes little of the free memory."""
    second_form = 2 * num_parameters
    return second_form <= SECOND_FORM_SHARE * Machine.look().free_memory


def _set_num_threads(config: EngineConfig, device: torch.device) -> ThreadCount | None:
    """Give torch's operations on the CPU as many threads as this process may keep busy.

    Returns:
        On a CPU, what adapts that number before each pass.
    """
    machine = Machine.look()
    if device.type != "cpu":
        # Little runs on the CPU then, but torch does not know of quotas.
        if machine.cpu_quota is not None:
            torch.set_num_threads(min(torch.get_num_threads(), machine.num_threads))
        return None
    if config.threads is not None:
        machine.warn_of(config.threads, f"--threads {config.threads}")
    torch.set_num_threads(config.threads or machine.num_threads)
    # How work is divided among threads may show in the last bits.
    adapts = not config.deterministic
    return ThreadCount(torch.get_num_threads(), machine.cores, adapts=adapts)


def longest_sequence(config: EngineConfig, model: ModelConfig) -> int:
    """Return the most tokens of a sequence, by the settings and the model."""
    if config.max_model_len is None:
        return model.max_positions
    if config.max_model_len > model.most_positions:
        raise ConfigError(
            f"max_model_len {config.max_model_len}: this model allows at most "
            f"{model.most_positions} tokens"
        )
    return config.max_model_len
