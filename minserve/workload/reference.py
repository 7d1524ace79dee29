"""`Reference`: an idle server's speed in a file, so that SLOs mean the same in every test.

SLOs that are slowdowns are multiples of a lone request's time. If that time were measured anew
on each server, a slower server would have looser SLOs, and so would a server tested in a slow
minute of its host. If the time is read from one file, the SLOs are the same seconds for all.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from minserve.errors import WorkloadError
from minserve.machine import machine_words
from minserve.workload.zero_load import ZeroLoad

FORMAT = "minserve zero load, 1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A measured speed, with the model, server, machine and time of the measurement.

    Attributes:
        model: its name on the server.
        server: words that say which server was measured.
        machine: words for the machine on which the client ran: `machine_words`.
        measured_at: ISO 8601, in UTC.
    """

    speed: ZeroLoad
    model: str
    server: str
    machine: str
    measured_at: str

    @classmethod
    def now(cls, speed: ZeroLoad, model: str, server: str) -> Reference:
        """Return a reference for a speed that was measured just now on this machine."""
        return cls(
            speed=speed,
            model=model,
            server=server,
            machine=machine_words(),
            measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    @classmethod
    def load(cls, path: str | Path, model: str | None = None) -> Reference:
        """Read a reference from a file.

        Args:
            model: the model that the speed must belong to; default: any model.

        Raises:
            WorkloadError: if the file cannot be read, or holds the speed of another model.
        """
        try:
            kept = json.loads(Path(path).read_text(encoding="utf-8"))
            found = cls.from_dict(kept)
        except OSError as error:
            raise WorkloadError(f"cannot read the zero load {path}: {error.strerror}") from None
        except (ValueError, TypeError, KeyError):
            raise WorkloadError(
                f"{path} holds no zero load; --save-zero-load writes such files"
            ) from None
        if model is not None and found.model != model:
            raise WorkloadError(
                f"the zero load in {path} is of the model {found.model!r}, not of {model!r}"
            )
        return found

    def save(self, path: str | Path) -> None:
        """Write the reference to a new file.

        Raises:
            WorkloadError: if the file exists or cannot be written.
        """
        text = json.dumps(self.to_dict(), indent=1) + "\n"
        try:
            # An existing file is never replaced: tests that used it could no longer be compared.
            with Path(path).open("x", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise WorkloadError(f"cannot write the zero load {path}: {error.strerror}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return the reference as JSON values."""
        return {
            "format": FORMAT,
            "model": self.model,
            "server": self.server,
            "machine": self.machine,
            "measured_at": self.measured_at,
            "zero_load": self.speed.to_dict(),
        }

    @classmethod
    def from_dict(cls, kept: Mapping[str, Any]) -> Reference:
        """Return the reference that `to_dict` gave.

        Raises:
            ValueError, TypeError, KeyError: if ``kept`` is something else.
        """
        if kept["format"] != FORMAT:
            raise ValueError(kept["format"])
        words = {name: kept[name] for name in ("model", "server", "machine", "measured_at")}
        if not all(isinstance(word, str) for word in words.values()):
            raise TypeError(words)
        speed = ZeroLoad.from_dict(kept["zero_load"])
        numbers = (speed.base_s, speed.per_token_s, speed.decode_s, speed.characters_per_token)
        if not all(0 <= number < math.inf for number in numbers) or not speed.characters_per_token:
            raise ValueError(numbers)
        return cls(speed=speed, **words)

    def __str__(self) -> str:
        return f"{self.model} of {self.server}, {self.measured_at}, {self.machine}"


def check_can_save(path: str | Path) -> None:
    """Check that a reference can be saved, before anything slow begins.

    Raises:
        WorkloadError: if `Reference.save` would raise it.
    """
    path = Path(path)
    if path.exists():
        raise WorkloadError(
            f"{path} exists already; read it with --zero-load, or name another to save to"
        )
    if not os.access(path.parent, os.W_OK):
        raise WorkloadError(f"cannot write the zero load {path}: no folder that can be written")
