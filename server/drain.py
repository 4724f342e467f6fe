"""How a server process ends: not in the middle of anything."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from types import FrameType
from typing import Any

import structlog
import uvicorn

log = structlog.get_logger()
LINGER_SECONDS = 0.3
"""How long a connection accepted at the last moment may take to send its request."""


class DrainingServer(uvicorn.Server):
    """uvicorn, but the first signal drains and the process then ends with status 0; the second ends it at once.

    SIGTERM: readiness turns 503 and every reply asks to close its connection, for `drain_seconds`, while requests are
    still answered, so that a load balancer can look away. Then the listener closes and what is in flight ends.
    SIGINT does the same without the wait. (uvicorn alone closes the listener at once and dies of the signal.)
    """

    def __init__(self, config: uvicorn.Config, *, drain_seconds: float) -> None:
        super().__init__(config)
        self.drain_seconds = drain_seconds
        self.signal: int | None = None
        self.stop_at: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen, and say where: with port 0 nobody else knows."""
        await super().startup(sockets)
        for server in self.servers:
            for listener in server.sockets:
                host, port = listener.getsockname()[:2]
                log.info("listening", address=f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """What a signal does: it sets flags and nothing else, since it may interrupt anything."""
        if self.signal is not None:
            self.should_exit = self.force_exit = True
            return
        self.signal = sig
        app: Any = self.config.app
        app.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: has a signal come, and is its drain over?"""
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
        if not self.force_exit:
            await asyncio.sleep(LINGER_SECONDS)
        await super().shutdown(sockets)
