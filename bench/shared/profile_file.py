"""A performance model as a file, for servers whose device is simulated."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minserve.planner.predict.perf_model import PerfModel


@contextmanager
def profile_file(model: PerfModel, name: str) -> Iterator[Path]:
    """Yield a performance model as a file that ``--profile`` takes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.json"
        path.write_text(json.dumps({"key": {"model": name}, "model": model.to_dict()}))
        yield path
