"""Run the server: uvicorn with our drain. SIGTERM: readiness says no, serving goes on for a moment, then it ends.

Tables are read and their digests checked by a thread from the first moment on, while this one still imports torch
and the rest: a gigabyte takes as long to digest as torch takes to import.
"""

from __future__ import annotations

import gc
import logging
import socket
import sys

import structlog

from embstore.errors import EmbstoreError
from server.preread import Preread
from server.settings import Settings

log = structlog.get_logger()


def serve(settings: Settings) -> int:
    """Serve until a signal; returns the exit code. EmbstoreError when the address cannot be listened on."""
    configure_logging(settings.log_level)
    log.info("starting", store=str(settings.store))
    listener = bind(settings.host, settings.port)
    preread = Preread(settings.store)
    import uvicorn
    from prometheus_client import disable_created_metrics

    from server.app import create_app
    from server.drain import DrainingServer
    from server.protocol import LookupProtocol

    disable_created_metrics()  # type: ignore[no-untyped-call]  # a start time beside every counter says nothing
    config = uvicorn.Config(
        create_app(settings, preread),
        loop="uvloop",
        http=LookupProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=settings.keepalive_seconds,
        timeout_graceful_shutdown=settings.shutdown_seconds,
    )
    gc.collect()
    gc.freeze()
    try:
        DrainingServer(config, drain_seconds=settings.drain_seconds).run(sockets=[listener])
    except SystemExit:  # start-up failed, and uvicorn has logged why
        return 1
    log.info("stopped")
    return 0


def bind(host: str, port: int) -> socket.socket:
    """A socket on the address, before anything is loaded for it; EmbstoreError says why there is none."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        raise EmbstoreError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    return listener


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
    logging.basicConfig(handlers=[_ToStructlog()], level=logging.WARNING, force=True)


class _ToStructlog(logging.Handler):
    """What libraries log, as events of ours: one shape of line for everything."""

    def emit(self, record: logging.LogRecord) -> None:
        write = log.error if record.levelno >= logging.ERROR else log.warning
        write(record.getMessage(), logger=record.name, exc_info=record.exc_info)
