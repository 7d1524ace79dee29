"""Which class serves which architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minserve.errors import UnsupportedModelError
from minserve.models.base import CausalLM
from minserve.models.layers import Placement
from minserve.models.llama import Llama
from minserve.models.opt import OPT

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from minserve.models.loader import Checkpoint

FAMILIES: dict[str, type[CausalLM]] = {"llama": Llama, "opt": OPT}


def build_model(checkpoint: Checkpoint, config: PretrainedConfig, placement: Placement) -> CausalLM:
    """Read a model's weights into the class of its family.

    Raises:
        UnsupportedModelError: for another family.
        ModelLoadError: where a tensor is missing or wrong.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedModelError(
            f"architecture {config.model_type!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    return family(checkpoint, config, placement)
