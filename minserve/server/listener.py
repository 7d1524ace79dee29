"""Accepts connections, no more than the process can hold.

asyncio's own way of accepting writes a traceback for each attempt that finds no file descriptor,
as many as the backlog is long. Here such an attempt is one line, room is made, and a moment later
the next attempt follows.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket

from minserve.server.connections import ConnectionServer, plain_response
from minserve.server.errors import unavailable

logger = logging.getLogger(__name__)

# File descriptors that are left for everything but connections: model files, pipes, replicas.
RESERVED_FILES = 128
FEWEST_CONNECTIONS = 16
RETRY_S = 0.1


def allow_connections(wanted: int) -> int:
    """Raise the limit of open files as far as needed and allowed, and return how many fit.

    Args:
        wanted: the most connections at a time.

    Returns:
        The same number, or a lower one where the system allows no more.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + RESERVED_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        target = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    allowed = max(FEWEST_CONNECTIONS, soft - RESERVED_FILES)
    if allowed < wanted:
        logger.warning(
            "at most %d connections at a time instead of %d: the limit of open files is %d "
            "(ulimit -n)",
            allowed,
            wanted,
            soft,
        )
    return min(wanted, allowed)


class Listener:
    """Takes connections from a listening socket and hands them to the server.

    Where there are too many, the connection that has been idle for longest gives way. If all are
    busy, the new one is answered with 503.

    Args:
        sock: a listening socket that does not block; closed by `close`.
        most: connections at a time.
    """

    def __init__(self, sock: socket.socket, server: ConnectionServer, most: int) -> None:
        self._sock = sock
        self._server = server
        self._most = most
        self._connecting: set[asyncio.Task[None]] = set()
        self._task = asyncio.create_task(self._accept_all())

    async def close(self) -> None:
        """Accept nothing more."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._sock.close()

    async def _accept_all(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._sock)
            except ConnectionError:
                continue  # the client has gone again
            except OSError as error:  # mostly: no file descriptor is left
                self._server.log.warning("cannot accept a connection: %s", error.strerror)
                await asyncio.sleep(0 if self._server.make_room() else RETRY_S)
                continue
            if self._server.num_open >= self._most and not self._server.make_room():
                self._refuse(connection)
            else:
                task = loop.create_task(self._connect(connection))
                self._connecting.add(task)
                task.add_done_callback(self._connecting.discard)
            await asyncio.sleep(0)  # however many come, others have their turn in between

    async def _connect(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(self._server, connection)
        except OSError:
            connection.close()

    def _refuse(self, connection: socket.socket) -> None:
        error = unavailable(f"the server has {self._most} connections, and all are busy")
        self._server.log.warning("refused a connection: all %d are busy", self._most)
        with contextlib.suppress(OSError), connection:
            connection.send(plain_response(error))
            # What has come is read, or closing would reset the connection before the client reads.
            connection.recv(2**16)
