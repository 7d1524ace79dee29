"""Bytes between two processes, over sockets, and what happens when one of them goes."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch.distributed import TCPStore
from waiting import PATIENCE_S

from minserve.controller.channel import (
    CONTROLLER,
    FRAME,
    MAX_MESSAGE,
    Channel,
    Mailbox,
    pair_store,
)
from minserve.errors import ProtocolError, ReplicaLostError

# The other end sends back what it gets.
ECHO = """
import sys
from torch.distributed import TCPStore
from minserve.controller.channel import REPLICA, Channel, pair_store
store = TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False, wait_for_workers=False)
channel = Channel(
    pair_store(store, 0, 1), REPLICA, address="127.0.0.1", patience_s=float("inf"), join_s=60
)
while True:
    channel.send(channel.receive())
"""


@contextmanager
def echoing(patience_s: float = PATIENCE_S) -> Iterator[tuple[Channel, subprocess.Popen]]:
    """This end, with its patience, and the process that is the other one."""
    sock = socket.create_server(("127.0.0.1", 0))
    port = sock.getsockname()[1]
    store = TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=sock.detach()
    )
    process = subprocess.Popen([sys.executable, "-c", ECHO, str(port)], stderr=subprocess.PIPE)
    try:
        yield (
            Channel(
                pair_store(store, 0, 1),
                CONTROLLER,
                address="127.0.0.1",
                patience_s=patience_s,
                join_s=60,
            ),
            process,
        )
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def echo() -> Iterator[tuple[Channel, subprocess.Popen]]:
    with echoing() as found:
        yield found


def test_messages_of_any_length_come_back_whole_and_in_order_until_the_peer_is_killed(
    echo: tuple[Channel, subprocess.Popen],
) -> None:
    channel, process = echo
    rng = random.Random(0)
    for length in (0, 1, FRAME - 9, FRAME - 8, FRAME - 7, 100_000, 3_000_000):
        data = rng.randbytes(length)
        channel.send(data)
        assert channel.receive() == data
    with pytest.raises(ProtocolError, match="at most"):
        channel.send(bytes(MAX_MESSAGE + 1))
    # Nothing was sent of that one.
    channel.send(b"hello")
    assert channel.receive() == b"hello"
    process.kill()
    with pytest.raises(ReplicaLostError):
        channel.receive()


def test_a_hung_peer_is_given_up_and_finds_the_door_closed_when_it_wakes() -> None:
    def ask() -> None:
        channel.send(b"hello")
        channel.receive()

    with echoing(patience_s=0.5) as (channel, process):
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(ReplicaLostError, match="Timed out"):
            ask()
        os.kill(process.pid, signal.SIGCONT)
        assert process.wait(PATIENCE_S) != 0
        assert b"ReplicaLostError" in process.stderr.read()


def test_a_mailbox_tells_of_each_message_and_once_of_the_loss(
    echo: tuple[Channel, subprocess.Popen],
) -> None:
    channel, process = echo
    came, lost = [], []
    all_there, gone = threading.Event(), threading.Event()

    def received(data: bytes) -> None:
        came.append(data)
        if len(came) == 100:
            all_there.set()

    mailbox = Mailbox(
        channel, received, lambda error: (lost.append(error), gone.set()), name="echo"
    )
    mailbox.start()
    for number in range(100):
        mailbox.post(str(number).encode())
    assert all_there.wait(PATIENCE_S)
    assert came == [str(number).encode() for number in range(100)]
    process.kill()
    assert gone.wait(PATIENCE_S)
    mailbox.post(b"to nobody")
    mailbox.join(PATIENCE_S)
    assert [type(error) for error in lost] == [ReplicaLostError]
