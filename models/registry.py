"""The model class of each architecture."""

from __future__ import annotations

from minserve.models.base import CausalLM, TensorSource
from minserve.models.config import LlamaConfig, ModelConfig
from minserve.models.layers import WeightPlacement
from minserve.models.llama import Llama
from minserve.models.opt import OPT
from minserve.models.ranks import ALONE, Ranks, check_size


def build_model(
    checkpoint: TensorSource,
    config: ModelConfig,
    placement: WeightPlacement,
    max_positions: int | None = None,
    ranks: Ranks = ALONE,
) -> CausalLM:
    """Read a model's weights, or one rank's part of them, into the class of its family.

    Args:
        max_positions: the longest sequence that is served; by default the model's own. Some
            kinds of RoPE scaling depend on it.
        ranks: the group that runs the model, and this process's place in it.

    Raises:
        ConfigError: if the model cannot be divided among so many ranks.
        ModelLoadError: if a tensor is missing or wrong.
    """
    longest = max_positions or config.max_positions
    check_size(config, ranks.size)
    model: CausalLM
    if isinstance(config, LlamaConfig):
        model = Llama(checkpoint, config, placement, longest, ranks)
    else:
        model = OPT(checkpoint, config, placement, longest, ranks)
    model.linear_dtype = placement.linear_dtype
    return model
