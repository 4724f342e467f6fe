"""Sockets that the server listens on, made before anything is loaded for them: TCP, and a Unix-domain socket's file.

A socket file outlives a server that was killed. One that nobody listens on is replaced; a living server's is not.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

import structlog

from embstore.errors import ConfigError, EmbstoreError
from server.settings import Settings

log = structlog.get_logger()
BACKLOG = 2048
MAX_PATH_BYTES = 107
"""What `sockaddr_un.sun_path` of Linux holds beside its final NUL."""


@contextmanager
def listening(settings: Settings) -> Iterator[list[socket.socket]]:
    """Listening sockets for as long as the server lives; EmbstoreError says why there are none."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(listen_unix(settings.uds, int(settings.uds_mode, 8)))] if settings.uds else []
        if settings.uses_tcp:
            listeners.append(stack.enter_context(listen_tcp(settings.host, settings.port)))
        yield listeners


def listen_tcp(host: str, port: int) -> socket.socket:
    """A socket that listens on the address; EmbstoreError says why there is none."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        raise EmbstoreError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    return listener


@contextmanager
def listen_unix(path: Path, mode: int) -> Iterator[socket.socket]:
    """A socket that listens on a file with these permissions; the file is removed at the end.

    Raises:
        ConfigError: the path is too long for a socket.
        EmbstoreError: another server listens there, or something else than a socket is there, or it cannot be made.
    """
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise ConfigError(f"uds: a socket's path has at most {MAX_PATH_BYTES} bytes, got {path}")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        remove_stale(path)
        listener.bind(os.fspath(path))
        path.chmod(mode)  # before anybody can connect
        made = _identity(path)
        listener.listen(BACKLOG)
        if _identity(path) != made:  # who looked before this listened took it for stale
            raise OSError(errno.EADDRINUSE, "another server has begun to listen on this socket")
    except OSError as error:
        listener.close()
        raise EmbstoreError(f"cannot listen on {path}: {error.strerror or error}") from error
    try:
        yield listener
    finally:
        listener.close()
        with suppress(OSError):  # somebody else has removed it
            if _identity(path) == made:
                path.unlink()


def remove_stale(path: Path) -> None:
    """Remove the socket file of a server that is gone; OSError when something else is there, or the server lives."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(errno.EEXIST, "there is a file that is no socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:  # so many wait to be accepted that there is no room for one more
            pass
    raise OSError(errno.EADDRINUSE, "another server listens on this socket")


def log_addresses(listeners: Sequence[socket.socket]) -> None:
    """Say where the server listens: with port 0 nobody else knows."""
    for listener in listeners:
        log.info("listening", address=address_of(listener))


def address_of(listener: socket.socket) -> str:
    """The base URL of a listening socket, as the client takes it."""
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return f"unix://{quote(os.path.abspath(name))}"
    host, port = name[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _identity(path: Path) -> tuple[int, int, int]:
    """Tells a socket file from one that another server has put in its place; numbers of inodes alone are reused."""
    found = path.lstat()
    return found.st_dev, found.st_ino, found.st_mtime_ns
