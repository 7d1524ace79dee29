"""`load_engine` makes a loaded engine core from settings."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from minserve.config import EngineConfig
from minserve.engine.block_pool import BlockPool
from minserve.engine.core import EngineCore
from minserve.engine.device.cuda_graphs import CudaRecorder
from minserve.engine.device.device_choice import choose_device, set_num_threads
from minserve.engine.device.graph_recording import free_beside_graphs, limits_of, record_all
from minserve.engine.device.kv_cache import allocate_kv_cache, choose_num_blocks
from minserve.engine.device.own_thread import apart
from minserve.engine.device.paged_model import PagedModel
from minserve.engine.device.runner import ModelRunner
from minserve.engine.model_tokenizer import load_model_tokenizer
from minserve.engine.profile.profile_cache import dtype_words
from minserve.engine.ranks.group import RankGroup
from minserve.engine.ranks.keeper import Keeper
from minserve.engine.ranks.starting import most_queries, start_group
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
from minserve.kernels.kv_quantization import check_kv_cache_dtype
from minserve.machine import Machine
from minserve.models.base import CausalLM, ModelShape
from minserve.models.config import ModelConfig
from minserve.models.deterministic_layers import DeterministicPlacement
from minserve.models.draft_model import check_vocabulary, lend_embeddings, load_draft_model
from minserve.models.finding.source import (
    EMBEDDED_DRAFT,
    ModelSource,
    find_model,
    load_config,
)
from minserve.models.layers import WeightPlacement
from minserve.models.ranks import ALONE
from minserve.models.registry import build_model
from minserve.models.tensor_check import require_tensors
from minserve.models.weights.loader import open_checkpoint
from minserve.planner.policies.registry import make_planner, make_safe_planner
from minserve.planner.predict.lengths import make_length_estimator

log = logging.getLogger(__name__)

# Share of a CPU's free memory that a second form of the weights, faster for few rows, may take.
SECOND_FORM_SHARE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedEngine:
    """A core that is ready to step, and what its callers need around it.

    Attributes:
        source: where the model's files are.
        dtype: the dtype of the weights, and that of arithmetic where it differs.
        keeper: who keeps the other ranks of a group.
    """

    core: EngineCore
    tokenizer: Tokenizer
    source: ModelSource
    dtype: str
    max_model_len: int
    vocab_size: int
    keeper: Keeper | None = None


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
    threads = set_num_threads(config, device)
    source = find_model(config.model)
    # All that may be wrong with the files is found before weights are read, which takes long.
    model_config = load_config(source)
    tokenizer = load_model_tokenizer(config, source)
    draft_source = find_draft_model(config, model_config, tokenizer)
    loaded = _load_models(config, source, model_config, draft_source, device)
    runner, num_blocks, max_model_len = loaded.runner, loaded.num_blocks, loaded.max_model_len
    runner.threads = threads
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
        proposer=loaded.proposer,
        safe_planner=make_safe_planner(chunked_prefill=config.chunked_prefill),
        plans_ahead=device.type == "cuda",
        launches_ahead=device.type == "cuda",
    )
    dtype = _dtype_words(runner)
    num_ranks = config.tensor_parallel
    kv_form = "" if config.kv_cache_dtype == "auto" else f" in {config.kv_cache_dtype}"
    draft = "" if draft_source is None else f", draft model {draft_source.name}"
    log.info(
        "%s on %s: %s, %s attention%s, %d KV blocks of %d tokens%s, ready in %.1f s",
        source.name, str(device) if num_ranks == 1 else f"{num_ranks} ranks on {device}", dtype,
        runner.backend.name, draft, num_blocks, config.block_size, kv_form,
        time.perf_counter() - started,
    )  # fmt: skip
    return LoadedEngine(
        core=core,
        tokenizer=tokenizer,
        source=source,
        dtype=dtype,
        max_model_len=max_model_len,
        vocab_size=runner.model.shape.vocab_size,
        keeper=loaded.keeper,
    )


def _dtype_words(runner: ModelRunner) -> str:
    """Return the form and dtype of the weights, and the dtype of arithmetic where it differs."""
    model = runner.model
    dtype = dtype_words(model.placement.linear_dtype, model.placement.dtype)
    return f"{model.packed_form} in {dtype}" if model.packed_form else dtype


class _LoadedModels(NamedTuple):
    """Models that are ready to run, with the size of their KV cache."""

    runner: ModelRunner
    proposer: Proposer | None
    num_blocks: int
    max_model_len: int
    keeper: Keeper | None


def _load_models(
    config: EngineConfig,
    source: ModelSource,
    model_config: ModelConfig,
    draft_source: ModelSource | None,
    device: torch.device,
) -> _LoadedModels:
    """Load the models, with the other ranks where a group of them is asked for."""
    group = leader = None
    if config.tensor_parallel > 1:
        group, leader = start_group(config, model_config, device)
    try:
        runner, parts = _load_share(config, source, model_config, device, group)
        proposer = _make_proposer(config, runner.model, draft_source, parts)
        models: dict[PagedModel, int] = {runner: most_queries(config)}
        if isinstance(proposer, DraftModelProposer):
            models[proposer.model] = MOST_DECODE_TOKENS
            runner.drafts_by_chance = True
        num_blocks, max_model_len = apart(
            device, lambda: _make_ready(config, models, proposer, parts.placement, group)
        )
    except BaseException:
        if leader is not None:
            leader.keeper.close()
        raise
    runner.company = leader
    keeper = None if leader is None else leader.keeper
    return _LoadedModels(runner, proposer, num_blocks, max_model_len, keeper)


def load_share(config: EngineConfig, group: RankGroup) -> ModelRunner:
    """Load this rank's share of a model, while rank 0 and all others load theirs.

    Raises:
        MinserveError: as `load_engine` does.
    """
    device = choose_device(config.device)
    threads = set_num_threads(config, device)
    source = find_model(config.model)
    runner, parts = _load_share(config, source, load_config(source), device, group)
    runner.threads = threads
    draft_source = _draft_source(config)
    if draft_source is not None:
        lend_embeddings(draft_source, runner.model)
    models: dict[PagedModel, int] = {runner: most_queries(config)}
    apart(device, lambda: _make_ready(config, models, None, parts.placement, group))
    return runner


def _load_share(
    config: EngineConfig,
    source: ModelSource,
    model_config: ModelConfig,
    device: torch.device,
    group: RankGroup | None,
) -> tuple[ModelRunner, _PartMaker]:
    """Load the model, or in a group this rank's share of it."""
    attention = choose_attention_backend(config.attention_backend, device)
    check_kv_cache_dtype(config.kv_cache_dtype, attention, device)
    model, placement = _load_model(config, source, model_config, device, attention, group)
    if config.deterministic:
        attention = DETERMINISTIC
    parts = _PartMaker(attention, config.kv_cache_dtype, config.block_size, placement)
    runner = ModelRunner(model, *parts.of(model.shape))
    runner.sampler = Sampler(fused=runner.backend.in_triton, one_by_one=config.deterministic)
    return runner, parts


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
    group: RankGroup | None,
) -> tuple[CausalLM, WeightPlacement]:
    """Read the model's weights, and return with them where and in which form they are.

    Raises:
        ConfigError: where the model allows no sequences of the length that is asked for.
        ModelLoadError: where the files do not hold the model's tensors; before any is read.
    """
    longest = longest_sequence(config, model_config)
    with open_checkpoint(source, progress=group is None or group.rank == 0) as checkpoint:
        require_tensors(checkpoint, model_config)
        twice = device.type == "cpu" and has_room_twice(checkpoint.num_parameters())
        if group is not None:
            twice = group.agree(int(twice)) == 1
        placement = choose_placement(config, device, fused=attention != "torch", twice=twice)
        checkpoint.rounded_to = placement.read_dtype
        checkpoint.keeps_packed = placement.packed
        ranks = ALONE if group is None else group.ranks
        model = build_model(checkpoint, model_config, placement, longest, ranks)
        model.packed_form = checkpoint.form if placement.packed else ""
    if group is not None:
        group.agree(0)  # who has loaded waits here, and not in a sum, which has no such patience
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
    models: Mapping[PagedModel, int],
    proposer: Proposer | None,
    placement: WeightPlacement,
    group: RankGroup | None,
) -> tuple[int, int]:
    """Warm the models up, give them their KV caches and record their CUDA graphs.

    Args:
        models: the target model first, each with the most query tokens of one of its decodes.

    Returns:
        The number of KV blocks, and the most tokens of a sequence.

    Raises:
        ConfigError: where the cache does not hold what the settings ask for.
    """
    target = next(iter(models))
    longest = target.model.shape.max_positions
    with_graphs = (
        config.cuda_graphs and placement.device.type == "cuda" and target.backend.supports_graphs
    )
    num_blocks = _allocate_kv_cache(
        config, models, proposer, placement, longest, with_graphs, group
    )
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
    group: RankGroup | None,
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
    if group is not None:
        num_blocks = group.agree(num_blocks)
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
        kv_bytes = sum(part.nbytes for one in models for kv in one.kv for part in kv.parts)
    if words := Machine.look().limit_words(torch.get_num_threads(), kv_bytes):
        log.info("%s", words)


class _PartMaker(NamedTuple):
    """Makes what a `PagedModel` needs beside its model."""

    attention: str
    kv_cache_dtype: str
    block_size: int
    placement: WeightPlacement

    def of(self, shape: ModelShape) -> tuple[AttentionBackend, list[LayerKV], int, torch.device]:
        """Return a backend, a KV cache of one block for now, the block size and the device."""
        heads = shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.scale
        backend = make_attention_backend(self.attention, *heads, self.kv_cache_dtype)
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
    source = _draft_source(config, download=download)
    if source is None:
        return None
    check_vocabulary(source, load_config(source), model_config.vocab_size)
    if has_tokenizer(source) and not Tokenizer.load(source).has_vocabulary_of(tokenizer):
        raise ConfigError(
            f"the draft model {source.name} has another vocabulary than the model: the same "
            "token id means different texts"
        )
    return source


def _draft_source(config: EngineConfig, *, download: bool = True) -> ModelSource | None:
    if config.draft_model is None and config.speculator != "draft":
        return None
    return find_model(config.draft_model or EMBEDDED_DRAFT, download=download)


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


def has_room_twice(num_parameters: int) -> bool:
    """Return whether a second form of weights in half precision takes little of the free memory."""
    second_form = 2 * num_parameters
    return second_form <= SECOND_FORM_SHARE * Machine.look().free_memory


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
