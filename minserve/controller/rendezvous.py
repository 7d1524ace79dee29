"""The place where replicas and their controller find each other: the controller's TCPStore.

A replica takes the next epoch of its number, which announces it; then both open a `Channel` in
that epoch's own part of the store. A replica that was given up never comes back: its process
ends, and the next one has the next epoch.
"""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

from torch.distributed import (  # type: ignore[attr-defined]  # TCPStore is not in its exports
    DistStoreError,
    TCPStore,
)

from minserve.errors import ConfigError, ReplicaLostError, ReplicaRefusedError

_SIZE, _OPEN = "minserve/replicas", "minserve/open"
CONNECT_S, PROBE_S = 60.0, 2.0
# Seconds for an answer of the store that this process hosts.
STORE_S = 5.0


class Arrival(NamedTuple):
    """A replica that waits to be connected."""

    replica: int
    epoch: int


class Rendezvous:
    """The controller's side of the rendezvous.

    Args:
        host: the only address to listen on.
        port: 0 takes a free port.
        num_replicas: number of replicas that may register.

    Raises:
        ConfigError: if the address is taken or unknown.
    """

    def __init__(self, host: str, port: int, num_replicas: int) -> None:
        try:
            family, kind, proto, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM
            )[0]
            self._socket = socket.socket(family, kind, proto)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(address)
            self._socket.listen(1024)
        # UnicodeError: a name too long for any host.
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"the controller cannot listen on {host}:{port}: {why}; does another one run there?"
            ) from None
        self.host, self.port = host, self._socket.getsockname()[1]
        # Without a socket of ours, the store would listen on every interface.
        self.store = TCPStore(
            host,
            self.port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=self._socket.detach(),
        )
        self.store.set_timeout(timedelta(seconds=STORE_S))
        self._epochs = [self.store.add(_epoch(i), 0) for i in range(num_replicas)]
        self.store.set(_SIZE, str(num_replicas))

    def open(self) -> None:
        """Let the other replicas start: the first is up, so they find its profile of the device."""
        self.store.set(_OPEN, "")

    def arrivals(self) -> list[Arrival]:
        """Return the newest arrival of each replica since the last call; malformed entries are
        skipped.
        """
        told = self.store.multi_get([_epoch(i) for i in range(len(self._epochs))])
        found = []
        for replica, text in enumerate(told):
            epoch = int(text) if text.isdigit() and len(text) < 10 else 0
            if epoch > self._epochs[replica]:
                self._epochs[replica] = epoch
                found.append(Arrival(replica, epoch))
        return found


def is_open(host: str, port: int) -> bool:
    """Return whether a controller answers there and its first replica is up."""
    found: list[bool] = []

    def ask() -> None:
        with suppress(OSError, DistStoreError, RuntimeError):
            # A store that cannot connect complains on stderr, each time.
            socket.create_connection((host, port), timeout=PROBE_S).close()
            found.append(_connect(host, port, PROBE_S).check([_OPEN]))

    # A store waits for ever if a process takes the connection and does not answer.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(2 * PROBE_S)
    return found == [True]


class Meeting(NamedTuple):
    """A replica's side of the rendezvous: the store, and the epoch that belongs to the replica."""

    store: TCPStore
    epoch: int


def announce(host: str, port: int, replica: int) -> Meeting:
    """Register a replica of this number with a controller.

    Raises:
        ReplicaLostError: if no controller answers.
        ReplicaRefusedError: if the controller has no replica of this number.
    """
    try:
        store = _connect(host, port, CONNECT_S)
        size = int(store.get(_SIZE))
        if replica >= size:
            raise ReplicaRefusedError(f"there is no replica {replica}: the controller has {size}")
        epoch = store.add(_epoch(replica), 1)
    except (DistStoreError, RuntimeError) as error:
        raise ReplicaLostError(
            f"no controller answers on {host}:{port}: {str(error).splitlines()[0]}"
        ) from None
    return Meeting(store, epoch)


def _epoch(replica: int) -> str:
    return f"minserve/epoch/{replica}"


def _connect(host: str, port: int, timeout_s: float) -> TCPStore:
    return TCPStore(
        host,
        port,
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
    )


def local_address(host: str, port: int) -> str:
    """Return the address of this machine from which it reaches another one.

    Raises:
        ReplicaLostError: if no controller answers there.
    """
    with suppress(OSError), socket.create_connection((host, port), timeout=CONNECT_S) as probe:
        return probe.getsockname()[0]
    raise ReplicaLostError(f"no controller answers on {host}:{port}")
