"""Run the server: uvicorn with our drain. SIGTERM: readiness says no, serving goes on for a moment, then it ends.

Tables are read and their digests checked by a thread from the first moment on, while this one still imports torch
and the rest: a gigabyte takes as long to digest as torch takes to import.
"""

from __future__ import annotations

import gc
import logging
import pkgutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import structlog

from embstore.errors import ConfigError, StoreError
from embstore.store.local import FileStore
from server.process.listeners import listening
from server.settings import EMBEDDED, Settings
from server.tables.preloader import Preloader

if TYPE_CHECKING:
    from server.process.supervisor import Member

log = structlog.get_logger()
SWITCH_SECONDS = 2e-4
"""How long a thread that looks at the store may keep the event loop waiting; Python's own default is 5 ms."""
STOP_SECONDS = 10.0
"""What a worker may take to end beside draining and shutting down, before it is killed."""


def serve(settings: Settings) -> int:
    """Serve until a signal; returns the exit code. EmbstoreError when the address cannot be listened on."""
    configure_logging(settings.log_level)
    log.info("starting", store=str(settings.store), workers=settings.workers)
    with listening(settings) as listeners:
        warn_of_no_tables(settings.store)
        if settings.workers == 1:
            code = run_server(settings, listeners, Preloader(settings.store))
        else:
            code = run_workers(settings, listeners)
    if code == 0:
        log.info("stopped")
    return code


def warn_of_no_tables(store: Path) -> None:
    """Say that there is nothing to serve yet, and where it is looked for: a wrong path would be waited for forever."""
    files = FileStore(store)
    try:
        if files.tables():
            return
        there = "the store has no tables yet" if files.exists() else "there is no such folder"
    except StoreError:
        return  # the thread that watches the store meets it too, and logs it
    log.warning("nothing to serve yet: waiting for tables", store=str(files.root.absolute()), reason=there)


def run_server(
    settings: Settings,
    listeners: list[socket.socket],
    preloader: Preloader,
    member: Member | None = None,
    control: Path | None = None,
) -> int:
    """Answer requests until a signal, alone or as one of several workers; returns the exit code."""
    import uvicorn

    from server.app import create_app
    from server.http.protocol import LookupProtocol
    from server.process.graceful import DrainingServer

    app = create_app(settings, preloader, member.metrics if member else None, control)
    config = uvicorn.Config(
        app,
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
    server = DrainingServer(
        config,
        drain_seconds=settings.drain_seconds,
        member=member,
        loaded=app.is_loaded,
    )
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        server.run(sockets=listeners)
    except SystemExit as error:  # start-up failed, and uvicorn has logged why; or a signal came before it was over
        return 1 if error.code else 0
    return 0


def run_workers(settings: Settings, listeners: list[socket.socket]) -> int:
    """Keep several processes answering until a signal; returns the exit code."""
    from server.process.supervisor import Supervisor

    if settings.device == "cuda":
        raise ConfigError(
            f"workers is {settings.workers} and device is cuda: one process owns the GPU, set workers = 1"
        )
    settings = settings.model_copy(update={"device": "cpu"})

    import_everything()
    gc.collect()
    gc.freeze()
    stop_seconds = settings.drain_seconds + settings.shutdown_seconds + STOP_SECONDS
    with _shared_redis(settings) as shared, TemporaryDirectory(prefix="embstore-") as control:

        def work(member: Member) -> int:
            configure_logging(shared.log_level, worker=member.number)
            return run_server(shared, listeners, Preloader(shared.store), member, Path(control))

        return Supervisor(work, listeners, settings.workers, stop_seconds=stop_seconds).run()


@contextmanager
def _shared_redis(settings: Settings) -> Iterator[Settings]:
    """Settings for the workers: an embedded Valkey is started here, once, and they get its address."""
    if settings.redis != EMBEDDED:
        yield settings
        return
    from server.cache.redis_cache import start_embedded

    valkey = start_embedded()
    try:
        yield settings.model_copy(update={"redis": valkey.connection_url})
    finally:
        valkey.stop()


def import_everything() -> None:
    """Whatever a worker would import, compiled loops included: once, and in memory that all of them share."""
    import embstore.kernels.cpu
    import embstore.schemes

    for package in (embstore.schemes, embstore.kernels.cpu):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            import_module(module.name)
    for name in ("server.app", "server.process.graceful", "server.http.protocol", "uvicorn.lifespan.on", "uvloop"):
        import_module(name)


def configure_logging(level: str, **always: object) -> None:
    """One line per event on stderr: JSON for machines, aligned text on a terminal; with what is `always` the same."""
    renderer = structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            lambda _, __, event: {**always, **event},
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),  # a line in one write: processes share the file
    )
    logging.basicConfig(handlers=[_ToStructlog()], level=logging.WARNING, force=True)


class _ToStructlog(logging.Handler):
    """What libraries log, as events of ours: one shape of line for everything."""

    def emit(self, record: logging.LogRecord) -> None:
        write = log.error if record.levelno >= logging.ERROR else log.warning
        write(record.getMessage(), logger=record.name, exc_info=record.exc_info)
