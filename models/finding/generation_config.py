"""`read_generation_config`: what a model's folder says of how to generate text with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minserve.errors import ModelLoadError
from minserve.models.finding.json_file import read_json

FILE = "generation_config.json"
# What to do about a broken one, at the end of an error.
ADVICE = "; correct it, or start with --generation-config off"


def read_generation_config(path: Path) -> dict[str, Any]:
    """Return the entries of a generation_config.json.

    Raises:
        ModelLoadError: if it cannot be read, with what to do about it.
    """
    try:
        return read_json(path)
    except ModelLoadError as error:
        raise ModelLoadError(f"{error}{ADVICE}") from error
