"""`read_json`: the objects in a model's JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minserve.errors import ModelLoadError
from minserve.models.finding.files import refuse_pointers, unreadable


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ModelLoadError: naming the file, if it cannot be read or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except PermissionError as error:
        raise unreadable(path, error) from None
    except (OSError, ValueError, RecursionError) as error:
        refuse_pointers([path])
        raise ModelLoadError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path}: holds no JSON object")
    return value
