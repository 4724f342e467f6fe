"""Private parts of uvicorn and redis-py that the server overrides or uses: each is what it was when they were pinned.

A release that moves one of them fails here, by name and with the file to look at, before it fails under load.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import uvicorn
from redis.asyncio.connection import (
    AbstractConnection,
    Connection,
    SSLConnection,
    UnixDomainSocketConnection,
    parse_url,
)
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

PROTOCOL, CYCLE, SERVER = "server/http/protocol.py", "server/http/cycle.py", "server/process/graceful.py"
REDIS = "server/cache/redis_connection.py"
METHODS: list[tuple[Callable[..., Any], str, str]] = [
    (HttpToolsProtocol.connection_made, "self, transport", PROTOCOL),
    (HttpToolsProtocol.connection_lost, "self, exc", PROTOCOL),
    (HttpToolsProtocol.eof_received, "self", PROTOCOL),
    (HttpToolsProtocol.shutdown, "self", PROTOCOL),
    (HttpToolsProtocol.data_received, "self, data", PROTOCOL),
    (HttpToolsProtocol.on_message_begin, "self", PROTOCOL),
    (HttpToolsProtocol.on_url, "self, url", PROTOCOL),
    (HttpToolsProtocol.on_header, "self, name, value", PROTOCOL),
    (HttpToolsProtocol.on_headers_complete, "self", PROTOCOL),
    (HttpToolsProtocol.on_body, "self, body", PROTOCOL),
    (HttpToolsProtocol.on_message_complete, "self", PROTOCOL),
    (HttpToolsProtocol.on_response_complete, "self", PROTOCOL),
    (HttpToolsProtocol.resume_writing, "self", PROTOCOL),
    (HttpToolsProtocol._start_asgi_task, "self, cycle, app", PROTOCOL),
    (HttpToolsProtocol._unset_keepalive_if_required, "self", PROTOCOL),
    (HttpToolsProtocol._unsupported_upgrade_warning, "self", PROTOCOL),
    (FlowControl.pause_reading, "self", PROTOCOL),
    (FlowControl.resume_reading, "self", PROTOCOL),
    (uvicorn.Server.startup, "self, sockets", SERVER),
    (uvicorn.Server.shutdown, "self, sockets", SERVER),
    (uvicorn.Server.on_tick, "self, counter", SERVER),
    (uvicorn.Server.handle_exit, "self, sig, frame", SERVER),
    (uvicorn.Server.run, "self, sockets", "server/process/serve.py"),
    (AbstractConnection._close, "self", REDIS),
    (parse_url, "url", REDIS),
]
PROTOCOL_ATTRIBUTES = (
    "config loop parser transport flow scope headers cycle pipeline expect_100_continue timeout_keep_alive_task "
    "server_state"
)
CYCLE_ATTRIBUTES = "keep_alive response_complete disconnected more_body message_event"


def broken(owner: str, name: str, file: str) -> str:
    """What to say when a part is not what it was."""
    return f"{owner} has changed: {name} is not what {file} relies on; read both before you raise the pin"


async def protocol() -> HttpToolsProtocol:
    """uvicorn's protocol as its server makes it."""
    config = uvicorn.Config(asgi, log_config=None)
    config.load()
    return HttpToolsProtocol(config, ServerState(), {}, asyncio.get_running_loop())


async def asgi(scope: Any, receive: Any, send: Any) -> None:
    """An app that nobody asks."""


@pytest.mark.parametrize(("method", "arguments", "file"), METHODS, ids=[method.__qualname__ for method, *_ in METHODS])
def test_a_method_takes_the_arguments_that_it_took(method: Callable[..., Any], arguments: str, file: str) -> None:
    """What is overridden or called has the parameters of the pinned release."""
    found = ", ".join(inspect.signature(method).parameters)
    assert found == arguments, broken(method.__module__, f"{method.__qualname__}({found})", file)


@pytest.mark.parametrize("name", PROTOCOL_ATTRIBUTES.split())
def test_a_protocol_has_the_attributes_that_lookups_share(name: str) -> None:
    """What our protocol reads and sets is there from the start."""
    assert hasattr(asyncio.run(protocol()), name), broken("uvicorn", f"HttpToolsProtocol.{name}", PROTOCOL)


def test_a_message_begins_with_a_url_headers_and_a_scope_of_its_own() -> None:
    """A request that is no lookup is handed to uvicorn with its head already read: what it is put into is new."""

    async def begin() -> HttpToolsProtocol:
        begun = await protocol()
        begun.on_message_begin()
        return begun

    begun = asyncio.run(begin())
    assert (begun.url, begun.headers) == (b"", []), broken("uvicorn", "on_message_begin", PROTOCOL)
    assert begun.scope["headers"] is begun.headers, broken("uvicorn", "scope['headers']", PROTOCOL)


@pytest.mark.parametrize("name", ["read_paused", "write_paused"])
def test_flow_control_says_what_is_paused(name: str) -> None:
    """Whether a client is read from, and whether it takes its replies."""

    async def made() -> FlowControl:
        return FlowControl(asyncio.Transport())

    assert getattr(asyncio.run(made()), name) is False, broken("uvicorn", f"FlowControl.{name}", PROTOCOL)


@pytest.mark.parametrize("name", CYCLE_ATTRIBUTES.split())
def test_a_cycle_has_the_attributes_that_an_exchange_stands_in_for(name: str) -> None:
    """uvicorn reads these of whatever answers on a connection, and the server reads them of uvicorn's."""
    nothing: dict[str, Any] = dict.fromkeys(list(inspect.signature(RequestResponseCycle).parameters))
    assert hasattr(RequestResponseCycle(**nothing), name), broken("uvicorn", f"RequestResponseCycle.{name}", CYCLE)


def test_status_lines_are_bytes_that_end_their_line() -> None:
    """Replies begin with uvicorn's status lines."""
    assert STATUS_LINE[200] == b"HTTP/1.1 200 OK\r\n", broken("uvicorn", "STATUS_LINE", PROTOCOL)


@pytest.mark.parametrize("name", ["server_state", "should_exit", "force_exit", "config"])
def test_a_server_has_the_flags_that_drain_it(name: str) -> None:
    """The signal handler sets flags of uvicorn's."""
    assert hasattr(uvicorn.Server(uvicorn.Config(asgi)), name), broken("uvicorn", f"Server.{name}", SERVER)


@pytest.mark.parametrize("kind", [Connection, SSLConnection, UnixDomainSocketConnection])
def test_a_redis_connection_has_a_writer_and_takes_our_options(kind: type[Any]) -> None:
    """Its transport is taken over after the login, so it is made with what keeps it quiet."""
    made = kind(protocol=2, driver_info=None, socket_timeout=None, socket_connect_timeout=1.0, retry=None)
    assert made._writer is None, broken("redis-py", f"{kind.__name__}._writer", REDIS)


def test_a_redis_tls_connection_keeps_its_context() -> None:
    """Certificates are read once, and handed to every later connection."""
    assert hasattr(SSLConnection(), "ssl_context"), broken("redis-py", "SSLConnection.ssl_context", REDIS)


def test_a_redis_url_names_the_class_of_its_connections() -> None:
    """The pool that would read the class from the URL is not used."""
    assert parse_url("rediss://host")["connection_class"] is SSLConnection, broken("redis-py", "parse_url", REDIS)
