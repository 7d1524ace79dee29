"""Other checkouts of this project, to be measured beside this one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OWN = Path(__file__).resolve().parents[2]


@contextmanager
def importable(checkout: Path) -> Iterator[Path]:
    """Yield a folder from which the package of a checkout can be imported, as it is installed."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, "minserve")
        package.mkdir()
        for part in (*(checkout / "minserve").iterdir(), checkout / "kernels", checkout / "models"):
            (package / part.name).symlink_to(part)
        yield Path(folder)
