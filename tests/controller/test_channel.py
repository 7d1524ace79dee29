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


@pytest.fixture
def patience_s() -> float:
    """Of this end."""
    return PATIENCE_S


@pytest.fixture
def echo(patience_s: float) -> Iterator[tuple[Channel, subprocess.Popen]]:
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


def test_messages_of_any_length_come_back_whole_and_in_order(echo) -> None:
    channel, _ = echo
    rng = random.Random(0)
    for length in (0, 1, FRAME - 9, FRAME - 8, FRAME - 7, 100_000, 3_000_000):
        data = rng.randbytes(length)
        channel.send(data)
        assert channel.receive() == data


def test_a_message_beyond_the_limit_is_not_sent(echo) -> None:
    channel, _ = echo
    with pytest.raises(ProtocolError, match="at most"):
        channel.send(bytes(MAX_MESSAGE + 1))


def test_a_killed_peer_is_lost(echo) -> None:
    channel, process = echo
    process.kill()
    with pytest.raises(ReplicaLostError):
        channel.receive()


@pytest.mark.parametrize("patience_s", [3.0])
def test_a_hung_peer_is_given_up_and_finds_the_door_closed_when_it_wakes(echo) -> None:
    channel, process = echo
    os.kill(process.pid, signal.SIGSTOP)

    def ask() -> None:
        channel.send(b"hello")
        channel.receive()

    with pytest.raises(ReplicaLostError, match="Timed out"):
        ask()
    os.kill(process.pid, signal.SIGCONT)
    assert process.wait(PATIENCE_S) != 0
    assert b"ReplicaLostError" in process.stderr.read()


def test_a_mailbox_tells_of_each_message_and_once_of_the_loss(echo) -> None:
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
