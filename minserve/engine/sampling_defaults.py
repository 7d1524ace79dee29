"""What a model's generation_config.json proposes for requests that leave sampling settings out."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from minserve.config import EngineConfig
from minserve.errors import InvalidRequestError, ModelLoadError
from minserve.models.files import kind_of
from minserve.models.json_file import read_json
from minserve.models.source import ModelSource
from minserve.sampling_params import SamplingParams

log = logging.getLogger(__name__)

FILE = "generation_config.json"
# transformers' names of the settings that count, and the fields of `SamplingParams` that they set.
# ``do_sample`` is none of them, as in vLLM: it says what transformers' own `generate` does unasked,
# and clients of this API choose by the temperature.
_FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def load_sampling_defaults(config: EngineConfig, source: ModelSource) -> dict[str, Any]:
    """Return fields of `SamplingParams` by name, for requests that leave them out.

    They are empty for a model without a generation_config.json, for GGUF files, and with the
    setting ``generation_config: off``. A value that makes no sense is named in the log and left
    out. ``max_tokens`` counts where a request sets no limit at all, and never refuses one: it is
    cut to what the model's length leaves.
    """
    path = source.config_dir / FILE
    if config.generation_config == "off" or source.gguf_file is not None or kind_of(path) is None:
        return {}
    try:
        values = read_json(path)
    except ModelLoadError as error:
        log.warning("%s; its sampling settings are left out", error)
        return {}
    defaults: dict[str, Any] = {}
    for name, field in _FIELDS.items():
        value = values.get(name)
        if value is None:
            continue
        try:
            defaults[field] = getattr(SamplingParams(**{field: value}), field)
        except InvalidRequestError as error:
            log.warning("%s: %s is left out: %s", path, name, error)
    return defaults


def default_params(defaults: Mapping[str, Any]) -> SamplingParams:
    """Return the settings of a request that brings none.

    Args:
        defaults: from `load_sampling_defaults`.
    """
    # The `Intake` resolves ``None`` by the same defaults and by the room that the prompt leaves.
    limit = {"max_tokens": None} if "max_tokens" in defaults else {}
    return SamplingParams(**{**defaults, **limit})
