"""A replica's process with faults planted from outside: requests that kill it, halts, and holds.

A prompt of token ids that begins with `ABORT` or `HANG` and ends in a position makes the process
that runs the token of this position abort, or never come back from it.

A file ``MOMENT.halt`` in the folder that the environment names makes the process stop itself at
this moment of its life: then the file is renamed to ``MOMENT.PID``.

Two other files hold all processes while they are there: `STARTING` at their start, `MOST` at the
iteration that would bring a sequence beyond the number of tokens that the file says.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

FOLDER = "MINSERVE_TEST_HALTS"
MOST, STARTING = "most.hold", "starting.hold"
# Tokens at the beginning of such a prompt; a device is profiled with others.
ABORT, HANG = (504, 7, 504, 11), (505, 7, 505, 11)


def halt(moment: str) -> None:
    """Stop this process if that is wanted at this moment."""
    own = Path(os.environ[FOLDER])
    with suppress(FileNotFoundError):
        (own / f"{moment}.halt").rename(own / f"{moment}.{os.getpid()}")
        os.kill(os.getpid(), signal.SIGSTOP)


def most_tokens() -> float:
    with suppress(FileNotFoundError):
        return int((Path(os.environ[FOLDER]) / MOST).read_text())
    return math.inf


def wait(core: Any) -> None:
    """Wait while a sequence of a request may not go on; what a device is profiled with may."""
    sequences = [*core.waiting, *core.running]
    lengths = [len(seq.request.prompt_token_ids) + seq.num_output_tokens for seq in sequences]
    while max(lengths, default=0) > most_tokens():
        time.sleep(0.01)


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
    from minserve.engine.core import EngineCore
    from minserve.engine.device.runner import ModelRunner
    from minserve.engine.relay import RelayEngine

    before(RelayEngine, "__init__", lambda *_, **__: halt("loading"))
    before(RelayEngine, "profile", lambda *_, **__: halt("measuring"))
    before(replica_loop, "Channel", lambda *_, **__: halt("joining"))
    before(ModelRunner, "launch", kill)
    before(EngineCore, "step", wait)


if __name__ == "__main__":
    halt("starting")
    while (Path(os.environ[FOLDER]) / STARTING).exists():
        time.sleep(0.01)
    from minserve.controller import replica_process

    before(replica_process, "ReplicaSpec", lambda **_: plant())
    replica_process.exit_now(replica_process.main(*sys.argv[1:]))
