"""`apart`: work on a GPU before the thread that will run batches begins.

torch gives every thread that multiplies matrices on a GPU a cuBLAS handle, whose workspace takes tens
of MiB, and creating it takes milliseconds. When a thread ends, the next one that needs a handle
gets its. So what is done beforehand (dry runs, recordings, profiles) runs in threads that end with it:
then the thread that runs batches takes over a handle that is warm, and no memory is taken twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch

T = TypeVar("T")


def apart(device: torch.device, work: Callable[[], T]) -> T:
    """Do work, for a GPU in a thread of its own, which ends with it; return its result.

    Raises:
        whatever the work raises.
    """
    return _in_own_thread(work) if device.type == "cuda" else work()


def _in_own_thread(work: Callable[[], T]) -> T:
    done: Future[T] = Future()
    # Which GPU is the current one is a matter of each thread.
    index = torch.cuda.current_device() if torch.cuda.is_available() else None

    def run() -> None:
        try:
            if index is not None:
                torch.cuda.set_device(index)
            done.set_result(work())
        except BaseException as error:  # told to who waits, whatever it is
            done.set_exception(error)

    # A daemon, so that Ctrl-C ends the process.
    thread = threading.Thread(target=run, name="minserve-before", daemon=True)
    thread.start()
    try:
        return done.result()
    finally:
        if done.done():
            thread.join()
