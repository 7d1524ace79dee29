"""What a model's generation_config.json proposes for requests that leave sampling settings out."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from minserve.config import EngineConfig
from minserve.errors import InvalidRequestError, ModelLoadError
from minserve.models.finding.files import kind_of
from minserve.models.finding.json_file import read_json
from minserve.models.finding.source import ModelSource
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
    """Do as `read_sampling_defaults`; problems are named in the log."""
    defaults, problems = read_sampling_defaults(config, source)
    for problem in problems:
        log.warning("%s", problem)
    return defaults


def read_sampling_defaults(
    config: EngineConfig, source: ModelSource
) -> tuple[dict[str, Any], list[str]]:
    """Return fields of `SamplingParams` by name, for requests that leave them out.

    They are empty for a model without a generation_config.json, for GGUF files, and with the
    setting ``generation_config: off``. A value that makes no sense is left out. ``max_tokens``
    counts where a request sets no limit at all, and never refuses one: it is cut to what the
    model's length leaves.

    Returns:
        the fields, and in words what was left out and why.
    """
    path = source.config_dir / FILE
    if config.generation_config == "off" or source.gguf_file is not None or kind_of(path) is None:
        return {}, []
    try:
        values = read_json(path)
    except ModelLoadError as error:
        return {}, [f"{error}; its sampling settings are left out"]
    defaults: dict[str, Any] = {}
    problems = []
    for name, field in _FIELDS.items():
        value = values.get(name)
        if value is None:
            continue
        try:
            defaults[field] = getattr(SamplingParams(**{field: value}), field)
        except InvalidRequestError as error:
            problems.append(f"{path}: {name} is left out: {error}")
    return defaults, problems


def default_params(defaults: Mapping[str, Any]) -> SamplingParams:
    """Return the settings of a request that brings none.

    Args:
        defaults: from `load_sampling_defaults`.
    """
    # The `Intake` resolves ``None`` by the same defaults and by the room that the prompt leaves.
    limit = {"max_tokens": None} if "max_tokens" in defaults else {}
    return SamplingParams(**{**defaults, **limit})
