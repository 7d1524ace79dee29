"""Objects as frames on a pipe between a process and its own child: the length, then a pickle.

Only the two ends of an inherited pipe use it. Nothing that comes from a socket is unpickled.
"""

from __future__ import annotations

import pickle
import struct
from typing import Any, BinaryIO

LENGTH = struct.Struct("<Q")


def pack(value: Any) -> bytes:
    """Return the frame of an object."""
    data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    return LENGTH.pack(len(data)) + data


def unpack(data: bytes) -> Any:
    """Return the object of a frame, whose length was taken off."""
    return pickle.loads(data)


def read(stream: BinaryIO) -> Any:
    """Wait for the next frame and return its object.

    Raises:
        EOFError: if the other end has gone.
    """
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        raise EOFError
    (length,) = LENGTH.unpack(head)
    data = stream.read(length)
    if len(data) < length:
        raise EOFError
    return unpack(data)
