"""`Channel`: sends bytes between the controller and one replica, over torch.distributed.

Each pair has its own gloo group of two ranks, so that one dead replica breaks no other
replica's group, and a new process joins under the next epoch. A killed peer is noticed within
milliseconds, since its connection closes. A hung peer is noticed by its silence: if no message
comes for longer than the channel's patience, the waiting end closes the pair. Should the peer
wake later, it finds the pair closed. So no message of a replica that was given up can arrive.

A message travels in a frame of fixed size, and the rest of a longer message in a second piece.
"""

from __future__ import annotations

import logging
import queue
import struct
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo, Store

from minserve.errors import ProtocolError, ReplicaLostError

log = logging.getLogger(__name__)

CONTROLLER, REPLICA = 0, 1
FRAME = 4096
# Room enough: a prompt of a million tokens takes 5 MB.
MAX_MESSAGE = 64 * 2**20
_LENGTH = struct.Struct("<Q")
_NEVER = timedelta(days=30)


class Channel:
    """An end of the connection. Opening it blocks until the other end has joined.

    Args:
        store: the store in which the two ends meet; of this pair and epoch alone.
        rank: `CONTROLLER` or `REPLICA`.
        address: IP address of the interface that this end listens on.
        patience_s: longest silence of the other end, in seconds; inf waits for ever.
        join_s: seconds that the other end may take to join.

    Raises:
        ReplicaLostError: if the other end has not joined by then.
    """

    def __init__(
        self, store: Store, rank: int, *, address: str, patience_s: float, join_s: float
    ) -> None:
        self._peer = 1 - rank
        self._patience = _NEVER if patience_s == float("inf") else timedelta(seconds=patience_s)
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # not in torch's stubs
        # Without this, gloo would listen on whatever address the host's name resolves to.
        options._devices = [ProcessGroupGloo.create_device(hostname=address)]
        options._timeout = timedelta(seconds=join_s)
        options._threads = 1
        store.set_timeout(timedelta(seconds=join_s))
        try:
            self._group = ProcessGroupGloo(store, rank, 2, options)
        except RuntimeError as error:
            raise ReplicaLostError(f"the other end did not come: {error}") from None

    def send(self, data: bytes) -> None:
        """Send one message; blocks until it is out. Only one thread may call it at a time.

        Raises:
            ProtocolError: for a message longer than `MAX_MESSAGE` bytes.
            ReplicaLostError: if the other end has gone.
        """
        if len(data) > MAX_MESSAGE:
            raise ProtocolError(
                f"a message of {len(data)} bytes; at most {MAX_MESSAGE} can be sent"
            )
        head = bytearray(FRAME)
        _LENGTH.pack_into(head, 0, len(data))
        first = data[: FRAME - _LENGTH.size]
        head[_LENGTH.size : _LENGTH.size + len(first)] = first
        self._send(head)
        if len(data) > len(first):
            self._send(bytearray(data[len(first) :]))

    def receive(self) -> bytes:
        """Wait for the next message and return it. Only one thread may call it at a time.

        Raises:
            ProtocolError: for a message whose frame says that it is longer than `MAX_MESSAGE`
                bytes.
            ReplicaLostError: if the other end has gone, or was silent for too long.
        """
        head = self._receive(FRAME)
        (length,) = _LENGTH.unpack_from(head)
        if length > MAX_MESSAGE:
            raise ProtocolError(f"a message of {length} bytes; at most {MAX_MESSAGE} are taken")
        first = head[_LENGTH.size : _LENGTH.size + length]
        return first if length == len(first) else first + self._receive(length - len(first))

    def close(self) -> None:
        """Close the connection; nothing may be sent or received any more."""
        del self._group

    def _send(self, data: bytearray) -> None:
        try:
            tensor = torch.frombuffer(data, dtype=torch.uint8)
            self._group.send([tensor], self._peer, 0).wait(self._patience)  # type: ignore[attr-defined]  # not in torch's stubs
        except RuntimeError as error:
            raise ReplicaLostError(f"the connection is lost: {_first_line(error)}") from None

    def _receive(self, num_bytes: int) -> bytes:
        buffer = torch.empty(num_bytes, dtype=torch.uint8)
        try:
            self._group.recv([buffer], self._peer, 0).wait(self._patience)  # type: ignore[attr-defined]  # not in torch's stubs
        except RuntimeError as error:
            raise ReplicaLostError(f"the connection is lost: {_first_line(error)}") from None
        return buffer.numpy().tobytes()


class Mailbox:
    """A channel with one thread that sends and one that receives, so that no caller waits.

    Args:
        received: called with each message, in the receiving thread.
        lost: called once, in one of the threads, with the error after which nothing can arrive.
    """

    def __init__(
        self,
        channel: Channel,
        received: Callable[[bytes], object],
        lost: Callable[[Exception], object],
        *,
        name: str,
    ) -> None:
        self._channel, self._received, self._lost = channel, received, lost
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._guard = threading.Lock()
        self._open = True
        self._num_at_work = 2
        self._threads = [
            threading.Thread(target=self._work, args=(work,), name=f"{name}-{verb}", daemon=True)
            for verb, work in (("send", self._send_all), ("receive", self._receive_all))
        ]

    def start(self) -> None:
        """Start both threads."""
        for thread in self._threads:
            thread.start()

    @property
    def is_sending(self) -> bool:
        """True while a message waits behind the one that is being sent."""
        return not self._outbox.empty()

    def post(self, data: bytes) -> None:
        """Put a message in the queue to be sent; after the connection is lost it is dropped."""
        self._outbox.put(data)

    def close(self) -> None:
        """Send what was posted and no more; ``received`` and ``lost`` are no longer called."""
        with self._guard:
            self._open = False
        self._outbox.put(None)

    def join(self, timeout_s: float) -> None:
        """Wait, after `close`, until what was posted is sent and the other end has gone.

        A process that ends while its threads are inside gloo would be aborted.

        Args:
            timeout_s: longest wait for both threads together, in seconds.
        """
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self, work: Callable[[], None]) -> None:
        """Send or receive until the end; the last thread to end closes the channel."""
        try:
            work()
        except Exception as error:
            self._give_up(error)
        with self._guard:
            self._num_at_work -= 1
        if not self._num_at_work:
            self._channel.close()

    def _send_all(self) -> None:
        while (data := self._outbox.get()) is not None:
            self._channel.send(data)

    def _receive_all(self) -> None:
        while self._open:
            self._received(self._channel.receive())

    def _give_up(self, error: Exception) -> None:
        with self._guard:
            was_open, self._open = self._open, False
        self._outbox.put(None)
        if was_open:
            self._lost(error)


def pair_store(store: Store, replica: int, epoch: int) -> Store:
    """Return the part of a store in which one epoch of one replica meets the controller."""
    return PrefixStore(f"minserve/replica/{replica}/{epoch}", store)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
