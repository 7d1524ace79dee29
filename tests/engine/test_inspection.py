"""What is said of a model before its weights are read is true of the loaded model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minserve import Engine
from minserve.config import EngineConfig
from minserve.engine.inspection import inspect_model, weight_bytes
from minserve.models.finding.source import find_model, load_config
from minserve.models.layers import WeightFormat, WeightPlacement
from minserve.models.ranks import ALONE, Ranks
from minserve.models.registry import build_model
from minserve.models.tensor_check import check_tensors, share_of
from minserve.models.weights.loader import open_checkpoint

CPU = torch.device("cpu")


def tensors_of(value: Any, seen: dict[int, Any]) -> dict[int, int]:
    """Bytes of every tensor's memory that an object reaches, by address."""
    if id(value) in seen:
        return {}
    seen[id(value)] = value
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()}
    if isinstance(value, (list, tuple)):
        inside = list(value)
    elif callable(value) and getattr(value, "__closure__", None):
        inside = [cell.cell_contents for cell in value.__closure__]
    elif type(value).__module__.startswith("minserve.models"):
        slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
        inside = [getattr(value, name, None) for name in slots]
        inside += list(getattr(value, "__dict__", {}).values())
    else:
        return {}
    return {place: size for one in inside for place, size in tensors_of(one, seen).items()}


# A rank's part in the file's own dtype may be a view of the mapped file, all of which counts here.
@pytest.mark.parametrize(
    ("dtype", "ranks"),
    [(torch.float32, ALONE), (torch.bfloat16, ALONE), (torch.float64, Ranks(1, 2))],
    ids=["float32", "bfloat16", "second of two ranks"],
)
@pytest.mark.parametrize("model", ["smollm2", "tiny_llama_dir", "tiny_opt_dir"])
def test_the_bytes_of_weights_are_those_of_the_loaded_model(model, dtype, ranks, request):
    source = find_model(model if model == "smollm2" else str(request.getfixturevalue(model)))
    config = load_config(source)
    placement = WeightPlacement(CPU, dtype, dtype, WeightFormat.DENSE)
    with open_checkpoint(source, progress=False) as checkpoint:
        report = share_of(check_tensors(checkpoint, config), config, ranks)
        loaded = build_model(checkpoint, config, placement, ranks=ranks)
    said = weight_bytes(report, placement)
    if hasattr(loaded, "rope"):
        del loaded.rope  # a table, and no weights
    found = sum(tensors_of(loaded, {}).values())
    assert found > 0
    assert abs(said - found) <= 0.02 * found  # norms stay in float32
    assert report.shape == loaded.shape


@pytest.mark.parametrize(
    ("form", "factor"),
    [
        (WeightFormat.ONEDNN, 2),
        (WeightFormat.FBGEMM_FP16, 2),
        (WeightFormat.ONEDNN_AND_FP16, 4),
        (WeightFormat.FBGEMM_INT8, 1),
    ],
)
def test_packed_forms_count_what_each_weight_takes(tiny_llama_dir, form, factor):
    source = find_model(str(tiny_llama_dir))
    placement = WeightPlacement(CPU, torch.bfloat16, torch.bfloat16, form)
    with open_checkpoint(source, progress=False) as checkpoint:
        report = check_tensors(checkpoint, load_config(source))
    linears = sum(
        rows * shape[1]
        for name, shape in report.wanted.items()
        if len(shape) == 2 and "embed" not in name
        for rows in shape[:1]
    )
    assert report.num_linear == linears
    assert weight_bytes(report, placement) == linears * factor + 2 * (
        report.num_parameters - linears
    )


def test_each_rank_of_a_group_has_a_part_of_the_memory(tiny_llama_dir):
    def inspect(ranks):
        return inspect_model(
            EngineConfig.create(str(tiny_llama_dir), device="cpu", tensor_parallel=ranks)
        )

    whole, half = inspect(1).facts["memory"], inspect(2).facts["memory"]
    assert half["ranks"] == 2
    assert half["kv_per_token"] == whole["kv_per_token"] / 2
    assert half["weights"] == pytest.approx(whole["weights"] / 2, rel=0.05)
    (problem,) = inspect(3).problems
    assert "cannot be divided among 3 ranks" in problem


def test_what_is_said_is_what_an_engine_has(tiny_llama_dir):
    settings = {"dtype": "float32", "device": "cpu", "num_blocks": 8, "block_size": 16}
    found = inspect_model(EngineConfig.create(str(tiny_llama_dir), **settings))
    assert not found.problems
    assert not found.warnings
    engine = Engine(str(tiny_llama_dir), threads=1, **settings)
    core, shape = engine._core, engine._core.runner.model.shape
    facts = found.facts
    assert facts["model"]["name"] == engine.model_name
    assert facts["architecture"]["layers"] == shape.num_layers
    assert facts["architecture"]["context_served"] == shape.max_positions
    assert facts["runs_as"]["dtype"] == engine._loaded.dtype == "float32"
    assert facts["tokenizer"]["vocabulary"] == engine.tokenizer.vocab_size
    assert {
        one["id"] for one in facts["tokenizer"]["stop_tokens"]
    } == engine.tokenizer.eos_token_ids
    kv = sum(t.nbytes for layer in core.runner.kv for t in (layer.key, layer.value))
    assert facts["memory"]["kv_per_token"] == kv / (8 * 16)
