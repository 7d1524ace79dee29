"""Ports for programs that have to be told one before they listen on it."""

from __future__ import annotations

import os
import random
import socket
from contextlib import ExitStack, suppress
from pathlib import Path

HOST = "127.0.0.1"
# Workers of one run must not choose alike.
_RANDOM = random.Random(os.urandom(16))


def unused_port(num: int = 1) -> int:
    """The first of so many ports in a row on which nobody listens.

    The system gives them to nobody who asks for any port, so that none of the many servers and
    clients beside this test can have taken one by the time that it is listened on.
    """
    while True:
        port = _RANDOM.randrange(10_000, _first_given() - num)
        with ExitStack() as stack, suppress(OSError):
            for one in range(port, port + num):
                stack.enter_context(socket.socket()).bind((HOST, one))
            return port


def _first_given() -> int:
    """The lowest port that the system gives to whoever asks for any."""
    with suppress(OSError):
        told = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
        return max(11_000, int(told[0]))
    return 32_768
