"""The model class of each architecture."""

from __future__ import annotations

from minserve.models.base import CausalLM, TensorSource
from minserve.models.config import LlamaConfig, ModelConfig
from minserve.models.layers import WeightPlacement
from minserve.models.llama import Llama
from minserve.models.opt import OPT


def build_model(
    checkpoint: TensorSource, config: ModelConfig, placement: WeightPlacement
) -> CausalLM:
    """Read a model's weights into the class of its family.

    Raises:
        ModelLoadError: if a tensor is missing or wrong.
    """
    model: CausalLM
    if isinstance(config, LlamaConfig):
        model = Llama(checkpoint, config, placement)
    else:
        model = OPT(checkpoint, config, placement)
    model.linear_dtype = placement.linear_dtype
    return model
