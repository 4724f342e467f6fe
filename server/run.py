"""Run the server: uvicorn with our drain. SIGTERM: readiness says no, serving goes on for a moment, then it ends."""

from __future__ import annotations

import gc
import logging
import signal
import sys
import threading
from types import FrameType

import structlog
import uvicorn

from server.app import create_app
from server.settings import Settings

log = structlog.get_logger()


class DrainingServer(uvicorn.Server):
    """uvicorn, but the first signal drains and the process then ends with status 0; the second ends it at once."""

    def __init__(self, config: uvicorn.Config, settings: Settings) -> None:
        super().__init__(config)
        self.settings = settings

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """What a signal does; runs in the main thread between two steps of the loop."""
        app = self.config.app
        if app.draining:  # type: ignore[union-attr]
            self.should_exit = self.force_exit = True
            return
        app.draining = True  # type: ignore[union-attr]
        seconds = 0.0 if sig == signal.SIGINT else self.settings.drain_seconds
        log.info("draining", signal=signal.Signals(sig).name, seconds=seconds)
        timer = threading.Timer(seconds, self._stop)
        timer.daemon = True
        timer.start()

    def _stop(self) -> None:
        self.should_exit = True


def configure_logging(level: str) -> None:
    """One line per event on stderr: JSON for machines, aligned text on a terminal."""
    renderer = structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def serve(settings: Settings) -> int:
    """Serve until a signal; returns the exit code."""
    configure_logging(settings.log_level)
    config = uvicorn.Config(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=settings.keepalive_seconds,
        timeout_graceful_shutdown=settings.shutdown_seconds,
    )
    server = DrainingServer(config, settings)
    gc.collect()
    gc.freeze()
    log.info("starting", store=str(settings.store), address=f"http://{settings.host}:{settings.port}")
    try:
        server.run()
    except SystemExit as stopped:  # uvicorn could not listen, or start-up failed; it has said why
        return int(stopped.code or 0) or 1
    log.info("stopped")
    return 0
