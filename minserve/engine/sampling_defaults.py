"""What a model's generation_config.json proposes for requests that leave sampling settings out."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from minserve.config import EngineConfig
from minserve.errors import InvalidRequestError
from minserve.models.finding.files import kind_of
from minserve.models.finding.generation_config import FILE, read_generation_config
from minserve.models.finding.source import ModelSource
from minserve.sampling_params import GENERATION_CONFIG_FIELDS, SamplingParams

log = logging.getLogger(__name__)


def load_sampling_defaults(config: EngineConfig, source: ModelSource) -> dict[str, Any]:
    """Do as `read_sampling_defaults`; problems are named in the log.

    Raises:
        ModelLoadError: as there.
    """
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

    Raises:
        ModelLoadError: if the file cannot be read.
    """
    path = source.config_dir / FILE
    if config.generation_config == "off" or source.gguf_file is not None or kind_of(path) is None:
        return {}, []
    values = read_generation_config(path)
    defaults: dict[str, Any] = {}
    problems = []
    for name, field in GENERATION_CONFIG_FIELDS.items():
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
