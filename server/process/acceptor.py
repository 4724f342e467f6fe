"""Workers share a listening socket, and the connections on it: clients keep theirs open for hours.

uvloop accepts whatever waits, so of the hundred connections that a client opens at a time the first worker to wake up
would get ninety, for good. Here a worker accepts one connection at each turn of its loop, and one that has more than
the others stands back for a moment first.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sized
from typing import Any

import structlog

from server.process.supervisor import Member

log = structlog.get_logger()
STAND_BACK_SECONDS = 0.002
FULL_SECONDS = 0.1
"""How long nothing is accepted after the system had no room for another connection."""


class Acceptor:
    """Accepts connections for one worker; has what uvicorn asks of an `asyncio.Server`."""

    def __init__(
        self, listener: socket.socket, connect: Callable[[], asyncio.Protocol], member: Member, connections: Sized
    ) -> None:
        self.sockets = (listener,)
        self._listener, self._connect, self._member, self._connections = listener, connect, member, connections
        self._loop = asyncio.get_running_loop()
        self._connecting: set[asyncio.Task[Any]] = set()
        listener.setblocking(False)
        self._loop.add_reader(listener, self._on_waiting)

    def close(self) -> None:
        """Accept no more."""
        if self._is_open():
            self._loop.remove_reader(self._listener)
            self._listener.close()

    async def wait_closed(self) -> None:
        """Nothing is left to wait for."""

    def _is_open(self) -> bool:
        return self._listener.fileno() >= 0

    def _on_waiting(self) -> None:
        """Connections wait: it is this worker's turn, or that of another for a moment."""
        if self._member.has_its_share(len(self._connections) + len(self._connecting)):
            self._later(STAND_BACK_SECONDS)
        else:
            self._accept()

    def _later(self, seconds: float) -> None:
        self._loop.remove_reader(self._listener)
        self._loop.call_later(seconds, self._resume)

    def _resume(self) -> None:
        """Whoever had fewer connections had the time to take this one."""
        if self._is_open():
            self._loop.add_reader(self._listener, self._on_waiting)
            self._accept()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return  # another worker was faster, or the client has changed its mind
        except OSError as error:
            log.error("a connection cannot be accepted", error=str(error))
            self._later(FULL_SECONDS)
            return
        connection.setblocking(False)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        task = self._loop.create_task(self._loop.connect_accepted_socket(self._connect, connection))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)
