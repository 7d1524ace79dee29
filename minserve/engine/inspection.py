"""`inspect_model`: all that can be known of a model without reading its weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from minserve.chat_formats import NONE, find_reasoning_format, find_tool_format
from minserve.config import EngineConfig
from minserve.engine.build import (
    choose_placement,
    find_draft_model,
    has_room_twice,
    longest_sequence,
)
from minserve.engine.device.device_choice import choose_device
from minserve.engine.device.kv_cache import bytes_per_block
from minserve.engine.model_tokenizer import load_model_tokenizer
from minserve.engine.profile.profile_cache import dtype_words
from minserve.engine.ranks.starting import visible_gpus
from minserve.engine.sampling_defaults import read_sampling_defaults
from minserve.engine.text.tokenizer import Tokenizer
from minserve.errors import ConfigError, MinserveError
from minserve.kernels.attention import choose_attention_backend
from minserve.kernels.kv_quantization import check_kv_cache_dtype
from minserve.machine import GIB, Machine
from minserve.models.config import ModelConfig
from minserve.models.draft_model import check_draft_tensors
from minserve.models.finding.source import ModelSource, find_model, load_config
from minserve.models.layers import WeightFormat, WeightPlacement
from minserve.models.ranks import Ranks
from minserve.models.tensor_check import (
    TensorReport,
    check_tensors,
    refuse_misfits,
    share_of,
    unread_words,
)
from minserve.models.weights.checkpoint import Checkpoint
from minserve.models.weights.loader import open_checkpoint

_TIED_HEAD = "lm_head.weight"


@dataclass(slots=True)
class Inspection:
    """What was found out about a model.

    Attributes:
        facts: by section, values by name, ready for JSON. Sizes are in bytes. A section that an
            error kept from being found out is missing.
        warnings: what a user should know and what does not keep the model from being served.
        problems: why the model would not be served, in the order in which an engine would find
            out; empty if it would be served.
    """

    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @contextmanager
    def _step(self) -> Iterator[None]:
        """Keep an error of this step as a problem, so that the next steps go on."""
        try:
            yield
        except MinserveError as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))


def inspect_model(config: EngineConfig) -> Inspection:
    """Look at a model as an engine with these settings would, without reading its weights.

    Nothing is downloaded: a hub id is looked for in the cache on this disk.
    """
    found = Inspection()
    with found._step():
        source = find_model(config.model, download=False)
        found.facts["model"] = {"name": source.name, "path": str(_path(source))}
        model: ModelConfig | None = None
        with found._step():
            model = load_config(source)
            found.facts["architecture"] = _architecture(model)
        tokenizer: Tokenizer | None = None
        with found._step():
            tokenizer, given = _load_tokenizer(config, source, found)
            found.facts["tokenizer"] = _tokenizer(tokenizer, model, found)
            found.facts["tokenizer"]["chat_template_given"] = given
            found.facts["chats"] = _chats(config, tokenizer)
        with found._step():
            defaults, problems = read_sampling_defaults(config, source)
            found.facts["sampling_defaults"] = defaults
            found.warnings += problems
        with found._step(), open_checkpoint(source, progress=False) as checkpoint:
            found.facts["model"] |= _files(source, checkpoint)
            found.facts["weights"] = _stored(checkpoint)
            if model is not None:
                _look_at_weights(config, model, checkpoint, found)
        with found._step():
            if model is not None and tokenizer is not None:
                _look_at_draft(config, model, tokenizer, found)
    return found


def _look_at_draft(
    config: EngineConfig, model: ModelConfig, tokenizer: Tokenizer, found: Inspection
) -> None:
    """Add the draft model that the settings ask for.

    Raises:
        ConfigError: where it does not fit the model.
        ModelLoadError: where it cannot be read.
    """
    source = find_draft_model(config, model, tokenizer, download=False)
    if source is None:
        return
    width = getattr(model, "word_embed_proj_dim", None) or model.hidden_size
    with open_checkpoint(source, progress=False) as checkpoint:
        report = check_draft_tensors(checkpoint, load_config(source), width)
        refuse_misfits(checkpoint, report)
    found.facts["draft_model"] = {
        "name": source.name,
        "path": str(_path(source)),
        "parameters": report.num_parameters,
    }


def _look_at_weights(
    config: EngineConfig, model: ModelConfig, checkpoint: Checkpoint, found: Inspection
) -> None:
    """Add what follows from tensors and settings together.

    Raises:
        ConfigError: where a setting does not fit the model or the machine.
        ModelLoadError: where the files do not hold the model's tensors.
    """
    report = check_tensors(checkpoint, model)
    found.facts["weights"]["parameters"] = report.num_parameters
    if report.unread:
        found.warnings.append(unread_words(report))
    with found._step():
        refuse_misfits(checkpoint, report)
    longest = longest_sequence(config, model)
    device = choose_device(config.device)
    twice = device.type == "cpu" and has_room_twice(checkpoint.num_parameters())
    attention = choose_attention_backend(config.attention_backend, device)
    check_kv_cache_dtype(config.kv_cache_dtype, attention, device)
    placement = choose_placement(config, device, fused=attention != "torch", twice=twice)
    found.facts["runs_as"] = {
        "device": device.type,
        "dtype": dtype_words(placement.linear_dtype, placement.dtype),
        "weight_format": placement.format.value,
        "max_model_len": longest,
    }
    size = config.tensor_parallel
    if device.type == "cuda":
        visible_gpus(size)
    # Where a model does not divide evenly, the last rank has most.
    share = report if size == 1 else share_of(report, model, Ranks(size - 1, size))
    memory = _memory(share, placement, longest, config)
    if placement.packed:
        quantized, octets = checkpoint.packed_size()
        memory["weights"] -= (quantized * placement.dtype.itemsize - octets) // size
    found.facts["memory"] = memory
    needed = memory["weights"] + memory["kv_per_token"]
    if memory["free"] is not None and needed > memory["free"]:
        where = "on this machine" if size == 1 else "for each rank"
        found.warnings.append(
            f"the weights take {memory['weights'] / GIB:.2f} GiB, and {memory['free'] / GIB:.2f} GiB "
            f"are free {where}: it would probably not start"
        )


def _path(source: ModelSource) -> Path:
    return source.gguf_file or source.weights_file or source.config_dir


def _files(source: ModelSource, checkpoint: Checkpoint) -> dict[str, Any]:
    files = checkpoint.files()
    kinds = {".safetensors": "safetensors", ".bin": "torch's pickle"}
    form = "GGUF" if source.gguf_file else kinds.get(files[0].suffix, files[0].suffix)
    return {
        "form": form,
        "files": [str(path) for path in files],
        "size": sum(path.stat().st_size for path in files),
    }


def _architecture(model: ModelConfig) -> dict[str, Any]:
    """Return the numbers of a configuration that people ask for."""
    heads = model.num_attention_heads
    rope = getattr(model, "rope_parameters", {})
    return {
        "model_type": model.model_type,
        "layers": model.num_hidden_layers,
        "hidden_size": model.hidden_size,
        "heads": heads,
        "kv_heads": getattr(model, "num_key_value_heads", heads),
        "head_size": getattr(model, "head_dim", model.hidden_size // heads),
        "vocabulary": model.vocab_size,
        "context": model.max_position_embeddings,
        "context_served": model.max_positions,
        "context_at_most": model.most_positions,
        "rope_type": rope.get("rope_type"),
        "sliding_window": getattr(model, "sliding_window", None),
        "tied_embeddings": model.tie_word_embeddings,
    }


def _stored(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the number of stored elements, and how many there are in which form."""
    sizes: Counter[str] = Counter()
    for name in checkpoint.names():
        header = checkpoint.header(name)
        sizes[header.dtype] += math.prod(header.shape)
    return {"stored": dict(sizes.most_common())}


def _load_tokenizer(
    config: EngineConfig, source: ModelSource, found: Inspection
) -> tuple[Tokenizer, str | None]:
    """Load the tokenizer, without the chat template of the settings where that is a problem.

    Returns:
        the tokenizer, and the setting that its chat template follows.

    Raises:
        ModelLoadError: where it cannot be read.
    """
    try:
        return load_model_tokenizer(config, source), config.chat_template
    except ConfigError as error:
        found.problems.append(str(error))
        return load_model_tokenizer(replace(config, chat_template=None), source), None


def _tokenizer(
    tokenizer: Tokenizer, model: ModelConfig | None, found: Inspection
) -> dict[str, Any]:
    """Return what there is to know of a model's tokenizer."""
    warnings = found.warnings
    for name, problem in tokenizer.broken_chat_templates().items():
        warnings.append(f"the chat template {name!r} does not compile, so chats fail: {problem}")
    stops = sorted(tokenizer.eos_token_ids)
    if not stops:
        warnings.append("no token ends an output: outputs end at max_tokens or a stop string alone")
    if model is not None and tokenizer.vocab_size > model.vocab_size:
        warnings.append(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model embeddings for "
            f"{model.vocab_size}: is it another model's? Prompts with other tokens are refused"
        )
    return {
        "kind": tokenizer.kind,
        "vocabulary": tokenizer.vocab_size,
        "chat_template": tokenizer.has_chat_template,
        "chat_templates": list(tokenizer.chat_template_names),
        "stop_tokens": [{"id": i, "text": tokenizer.token_text(i)} for i in stops],
    }


def _chats(config: EngineConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return how the model calls tools and thinks."""
    template = tokenizer.template_facts(with_tools=True)
    tools = find_tool_format(config.tool_format, template.text, shows_tools=template.shows_tools)
    thinking = find_reasoning_format(
        config.reasoning_format,
        tokenizer.chat_template,
        lambda text: tokenizer.token_of(text) is not None,
    )
    return {
        "tool_format": tools.name,
        "tools_described": tools.is_described,
        "reasoning_format": None if thinking is None else thinking.name,
        "thinking_markers": None if thinking is None else [thinking.begin, thinking.end],
        "thinking_separated": thinking is not None and config.reasoning_format != NONE,
    }


def _memory(
    report: TensorReport, placement: WeightPlacement, longest: int, config: EngineConfig
) -> dict[str, Any]:
    """Return the bytes that weights and KV take, and those that are free, for each rank.

    Args:
        report: of the share of a rank.
    """
    per_token = bytes_per_block(report.shape, 1, placement.dtype, config.kv_cache_dtype)
    on_cpu = placement.device.type == "cpu"
    return {
        "ranks": config.tensor_parallel,
        "weights": weight_bytes(report, placement),
        "weight_forms": 2 if placement.format is WeightFormat.ONEDNN_AND_FP16 else 1,
        "kv_per_token": per_token,
        "kv_per_sequence": per_token * longest,
        "free": Machine.look().shared_by(config.tensor_parallel).free_memory
        if on_cpu
        else _free_on_gpu(placement.device),
    }


def _free_on_gpu(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0]


def weight_bytes(report: TensorReport, placement: WeightPlacement) -> int:
    """Return the bytes of a model's weights in the form in which they would be kept."""
    stored = placement.weight_dtype.itemsize
    per_linear = {
        WeightFormat.DENSE: placement.dtype.itemsize,
        WeightFormat.ONEDNN: stored,
        WeightFormat.FBGEMM_FP16: torch.float16.itemsize,
        WeightFormat.ONEDNN_AND_FP16: stored + torch.float16.itemsize,
        WeightFormat.FBGEMM_INT8: torch.int8.itemsize,
    }[placement.format]
    # A head that is tied to the embeddings is packed once more, unless both stay plain tensors.
    tied = 0 if _TIED_HEAD in report.wanted else report.num_embedding
    others = report.num_parameters - (report.num_linear - tied)
    shared = tied if placement.format is WeightFormat.DENSE else 0
    return (report.num_linear - shared) * per_linear + others * stored
