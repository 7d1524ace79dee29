"""`Line`: orders of numbers from rank 0 to all others, through pipes of this machine.

An order tells what to do and, on a CPU, holds the packed inputs as well. On GPUs the line runs
beside the stream of the device: what a pass needs to know on the host is there before the device
has come to it, and neither end waits for a device. Pipes, because they take some microseconds:
gloo's small broadcasts, one behind the other, wait for TCP's delayed acknowledgements, 40 ms.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Numbers in front of an order's payload.
HEAD = 8


class Verb(IntEnum):
    """What the ranks are to do together.

    FORWARD: a pass over packed inputs.
    REPLAY: a recorded pass.
    LOGITS: the head, over hidden states that follow.
    """

    FORWARD = 1
    REPLAY = 2
    LOGITS = 3


class Order(NamedTuple):
    """What rank 0 has the others do.

    Attributes:
        numbers: `HEAD` - 1 of them, whose meaning is the verb's; unused ones are 0.
        payload: int64, flat.
    """

    verb: Verb
    numbers: tuple[int, ...]
    payload: Tensor


class Line:
    """Rank 0's end of the line.

    Args:
        files: an end of a pipe to each other rank, which will be closed with the line.
    """

    def __init__(self, files: Sequence[int]) -> None:
        self._pipes = [Connection(file, readable=False) for file in files]

    def send(self, verb: Verb, numbers: Sequence[int], payload: Tensor | None = None) -> None:
        """Send an order; ``payload`` is int64, flat, on the host.

        Raises:
            OSError: if a rank has gone.
        """
        order = np.zeros(HEAD + (0 if payload is None else payload.numel()), np.int64)
        order[0] = verb
        order[1 : 1 + len(numbers)] = numbers
        if payload is not None:
            order[HEAD:] = payload.numpy()
        data = order.tobytes()
        for pipe in self._pipes:
            pipe.send_bytes(data)


class LineEnd:
    """The end of the line at another rank.

    Args:
        file: an end of a pipe.
    """

    def __init__(self, file: int) -> None:
        self._pipe = Connection(file, writable=False)

    def receive(self) -> Order:
        """Wait for the next order.

        Raises:
            EOFError: if rank 0 has gone.
        """
        order = torch.frombuffer(bytearray(self._pipe.recv_bytes()), dtype=torch.int64)
        verb, *numbers = order[:HEAD].tolist()
        return Order(Verb(verb), tuple(numbers), order[HEAD:])
