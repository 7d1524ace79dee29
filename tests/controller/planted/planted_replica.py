"""A replica's process with faults planted from outside: requests that kill it, and halts.

A prompt of token ids that begins with `ABORT` or `HANG` and ends in a position makes the process
that runs the token of this position abort, or never come back from it.

A file ``MOMENT.halt`` in the folder that the environment names makes the process stop itself at
this moment of its life: then the file is renamed to ``MOMENT.PID``.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

FOLDER = "MINSERVE_TEST_HALTS"
# Tokens at the beginning of such a prompt; a device is profiled with others.
ABORT, HANG = (504, 7, 504, 11), (505, 7, 505, 11)


def halt(moment: str) -> None:
    """Stop this process if that is wanted at this moment."""
    own = Path(os.environ[FOLDER])
    with suppress(FileNotFoundError):
        (own / f"{moment}.halt").rename(own / f"{moment}.{os.getpid()}")
        os.kill(os.getpid(), signal.SIGSTOP)


def before(owner: Any, name: str, action: Callable[..., None]) -> None:
    """Make a function do something else first, with the same arguments."""
    real = getattr(owner, name)

    def planted(*args: Any, **kwargs: Any) -> Any:
        action(*args, **kwargs)
        return real(*args, **kwargs)

    setattr(owner, name, planted)


def kill(_: Any, batch: Any) -> None:
    """Do what a request in the batch asks for."""
    for item in batch:
        prompt = item.seq.request.prompt_token_ids
        deed = tuple(prompt[:4])
        if deed in (ABORT, HANG) and item.start <= prompt[-1] < item.end:
            if deed == ABORT:
                os.abort()
            threading.Event().wait()


def plant() -> None:
    from minserve.controller import replica_loop
    from minserve.engine.device.runner import ModelRunner
    from minserve.engine.relay import RelayEngine

    before(RelayEngine, "__init__", lambda *_, **__: halt("loading"))
    before(RelayEngine, "profile", lambda *_, **__: halt("measuring"))
    before(replica_loop, "Channel", lambda *_, **__: halt("joining"))
    before(ModelRunner, "launch", kill)


if __name__ == "__main__":
    halt("starting")
    from minserve.controller import replica_process

    before(replica_process, "ReplicaSpec", lambda **_: plant())
    replica_process.exit_now(replica_process.main(*sys.argv[1:]))
