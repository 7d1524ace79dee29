"""The model class of each architecture."""

from __future__ import annotations

from minserve.models.base import CausalLM, TensorSource
from minserve.models.config import LlamaConfig, ModelConfig
from minserve.models.layers import WeightPlacement
from minserve.models.llama import Llama
from minserve.models.opt import OPT


def build_model(
    checkpoint: TensorSource,
    config: ModelConfig,
    placement: WeightPlacement,
    max_positions: int | None = None,
) -> CausalLM:
    """Read a model's weights into the class of its family.

    Args:
        max_positions: the longest sequence that is served; by default the model's own. Some
            kinds of RoPE scaling depend on it.

    Raises:
        ModelLoadError: if a tensor is missing or wrong.
    """
    longest = max_positions or config.max_positions
    model: CausalLM
    if isinstance(config, LlamaConfig):
        model = Llama(checkpoint, config, placement, longest)
    else:
        model = OPT(checkpoint, config, placement, longest)
    model.linear_dtype = placement.linear_dtype
    return model
