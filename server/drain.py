"""How a server process ends: not in the middle of anything."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
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

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen, and say where: with port 0 nobody else knows."""
        await super().startup(sockets)
        for server in self.servers:
            for listener in server.sockets:
                host, port = listener.getsockname()[:2]
                log.info("listening", address=f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """What a signal does; runs in the main thread between two steps of the loop."""
        app: Any = self.config.app
        if app.draining:
            self.should_exit = self.force_exit = True
            return
        app.draining = True
        seconds = 0.0 if sig == signal.SIGINT else self.drain_seconds
        log.info("draining", signal=signal.Signals(sig).name, seconds=seconds)
        timer = threading.Timer(seconds, self._stop)
        timer.daemon = True
        timer.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen no more, hear out the connections that were just accepted, then close what is idle."""
        for server in self.servers:
            server.close()
        if not self.force_exit:
            await asyncio.sleep(LINGER_SECONDS)
        await super().shutdown(sockets)

    def _stop(self) -> None:
        self.should_exit = True
