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
    """Yield a performance model as a file that ``--profile`` takes.

    Coefficients of 0 are left out: an older checkout may not know them.
    """
    values = model.to_dict()
    values["pieces"] = [
        {name: value for name, value in piece.items() if value or name == "tokens"}
        for piece in values["pieces"]
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.json"
        path.write_text(json.dumps({"key": {"model": name}, "model": values}))
        yield path
