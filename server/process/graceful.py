"""How a server process begins to listen and how it ends: not in the middle of anything."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import structlog
import uvicorn

from server.process.acceptor import Acceptor
from server.process.listeners import log_addresses
from server.process.supervisor import Member

log = structlog.get_logger()
LINGER_SECONDS = 0.3
"""How long a connection accepted at the last moment may take to send its request."""
LOADED_SECONDS = 0.05
"""How often a worker that waits for its tables looks whether they are there."""


class DrainingServer(uvicorn.Server):
    """uvicorn, but the first signal drains and the process then ends with status 0; the second ends it at once.

    SIGTERM: readiness turns 503 and every reply asks to close its connection, for `drain_seconds`, while requests are
    still answered, so that a load balancer can look away. Then the listener closes and what is in flight ends.
    SIGINT does the same without the wait. (uvicorn alone closes the listener at once and dies of the signal.)

    A `member` of a group of workers listens when the group wants it to (`loaded` says that its tables are there),
    leaves a second signal to the supervisor, and drains when that is gone.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        drain_seconds: float,
        member: Member | None = None,
        loaded: Callable[[], bool] = lambda: True,
    ) -> None:
        super().__init__(config)
        self.drain_seconds, self.member, self.loaded = drain_seconds, member, loaded
        self.signal: int | None = None
        self.stop_at: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen, when it is time to, and say so."""
        member, loop = self.member, asyncio.get_running_loop()
        if member is not None:
            loop.add_reader(member.alive, self._orphaned, member)
        await super().startup([])
        while member is not None and self.signal is None and not member.may_listen(self.loaded()):
            await asyncio.sleep(LOADED_SECONDS)
        if member is not None and self.signal is not None:
            self.should_exit = True
            return
        self.servers = [await self._listen(listener) for listener in sockets or []]
        if member is not None:
            member.listening()
        else:
            log_addresses(sockets or [])

    async def _listen(self, listener: socket.socket) -> Any:
        """Accept connections: what uvicorn takes for an `asyncio.Server`."""
        loop = asyncio.get_running_loop()

        def connect() -> asyncio.Protocol:
            make: Any = self.config.http_protocol_class
            protocol: asyncio.Protocol = make(self.config, self.server_state, self.lifespan.state, loop)
            return protocol

        if self.member is not None:
            return Acceptor(listener, connect, self.member, self.server_state.connections)
        if listener.family == socket.AF_UNIX:
            return await loop.create_unix_server(connect, sock=listener, backlog=self.config.backlog)
        return await loop.create_server(connect, sock=listener, backlog=self.config.backlog)

    def _orphaned(self, member: Member) -> None:
        """The supervisor is gone, without a word: nobody would replace this worker or tell it to stop."""
        asyncio.get_running_loop().remove_reader(member.alive)
        log.error("supervisor exited; shutting down")
        self.handle_exit(signal.SIGTERM, None)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """What a signal does: it sets flags and nothing else, since it may interrupt anything."""
        if self.signal is not None:
            if self.member is None:
                self.should_exit = self.force_exit = True
            return
        self.signal = sig
        app: Any = self.config.app
        app.services.handler.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: has a signal come, and is its drain over?"""
        if self.member is not None:
            self.member.tick(self.loaded(), len(self.server_state.connections))
        if self.signal is not None and self.stop_at is None:
            seconds = 0.0 if self.signal == signal.SIGINT else self.drain_seconds
            self.stop_at = time.monotonic() + seconds
            log.info("draining", signal=signal.Signals(self.signal).name, seconds=seconds)
        if self.stop_at is not None and time.monotonic() >= self.stop_at:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen no more, hear out the connections that were just accepted, then close what is idle."""
        for server in self.servers:
            server.close()
        if self.servers and not self.force_exit:
            await asyncio.sleep(LINGER_SECONDS)
        await super().shutdown(sockets)
