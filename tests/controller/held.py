"""Replicas that go no further than a test lets them: what is to be in flight is in flight."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PLANTED = Path(__file__).parent / "planted"
sys.path.append(str(PLANTED))
from planted_replica import FOLDER, MOST, STARTING  # noqa: E402 - the folder has to be known first


def planted_in(folder: Path) -> dict[str, str]:
    """The environment in which the replicas of ``planted_serve`` look into this folder."""
    return {"PYTHONPATH": str(PLANTED), FOLDER: str(folder)}


class Hold:
    """Holds the replicas that look into a folder; at the end of its context it lets them go on."""

    def __init__(self, folder: Path) -> None:
        self._most, self._starting = folder / MOST, folder / STARTING

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def at(self, num_tokens: int) -> Hold:
        """Let no sequence grow beyond so many tokens, prompt and output."""
        # At once, so that nobody reads a part of it.
        written = self._most.with_suffix(".new")
        written.write_text(str(num_tokens))
        written.replace(self._most)
        return self

    def release(self) -> None:
        """Let all sequences go on."""
        self._most.unlink(missing_ok=True)

    @contextmanager
    def starts(self) -> Iterator[None]:
        """Let no process that starts meanwhile come up."""
        self._starting.touch()
        try:
            yield
        finally:
            self._starting.unlink()
