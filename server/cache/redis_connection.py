"""One connection to Redis that carries one request at a time and cannot give anybody another one's reply.

redis-py opens it (addresses, TLS, logging in); from then on the bytes are read here. A request that does not end well -
too late, cancelled, more bytes or other bytes than were asked for - ends the connection with it: its reply may still be
on the way, and whoever came next would read it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, NamedTuple

import hiredis
from redis.asyncio.connection import AbstractConnection, Connection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from embstore.errors import ConfigError

LATE_S = 0.001
"""A deadline noticed later than this was noticed by a busy event loop: the reply may be there, unread."""
_MORE = object()
# The pool's own arguments, and those that would change how bytes are read.
_NOT_OURS = ("max_connections", "timeout", "decode_responses", "encoding", "health_check_interval", "retry_on_timeout")


class Answer(NamedTuple):
    """Replies in the order of the commands, and what went wrong, if something did, before all were there."""

    replies: list[Any]
    trouble: str | None


class Opener:
    """Makes connections to one URL (redis://, rediss://, unix://); ConfigError where redis-py does not take it."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        try:
            asked: dict[str, Any] = dict(parse_url(url))
            self._kind = asked.pop("connection_class", Connection)
            self._arguments = {name: value for name, value in asked.items() if name not in _NOT_OURS}
            self._arguments |= {
                "protocol": 2,  # no push messages between replies
                "driver_info": None,  # no command that a user with few rights may not send
                "socket_timeout": None,
                "socket_connect_timeout": timeout_s,
                "retry": Retry(NoBackoff(), 0),
            }
            self._tls = getattr(self.connection(), "ssl_context", None)  # certificates are read once
        except (RedisError, ValueError, TypeError, OSError) as error:
            raise ConfigError(f"the Redis URL cannot be used: {error}") from error

    def connection(self) -> AbstractConnection:
        """A connection that is not connected yet."""
        connection: AbstractConnection = self._kind(**self._arguments)
        if tls := getattr(self, "_tls", None):
            connection.ssl_context = tls  # type: ignore[attr-defined]
        return connection


class RedisConnection(asyncio.Protocol):
    """A connection; `closed` once it is of no use any more."""

    def __init__(self, lost: Callable[[RedisConnection], None]) -> None:
        self.closed = False
        self._lost = lost
        self._reader = hiredis.Reader(notEnoughData=_MORE)
        self._waiter: asyncio.Future[str | None] | None = None
        self._replies: list[Any] = []
        self._wanted = 0
        self._due = 0.0
        self._hopeful = False
        self._timer: asyncio.TimerHandle | None = None
        self._connection: AbstractConnection | None = None
        self._transport: asyncio.WriteTransport | None = None

    @classmethod
    async def open(cls, opener: Opener, lost: Callable[[RedisConnection], None]) -> RedisConnection:
        """Connect and log in; `lost` is called once, when the connection ends. RedisError or OSError if not."""
        opened = opener.connection()
        connection = cls(lost)
        try:
            async with asyncio.timeout(opener.timeout_s):
                await opened.connect()  # type: ignore[no-untyped-call]
            writer = opened._writer
            if writer is None or writer.transport.is_closing():
                raise ConnectionResetError("closed as soon as it was opened")
            connection._transport, connection._connection = writer.transport, opened
            writer.transport.set_protocol(connection)
        except BaseException:
            opened._close()  # type: ignore[no-untyped-call]
            raise
        return connection

    async def ask(self, command: bytes, num_replies: int, timeout_s: float) -> Answer:
        """Send commands that have so many replies, all in one piece, and wait for the replies, no longer than this."""
        assert self._waiter is None, "one request at a time"
        if self.closed or self._transport is None:
            return Answer([], "the connection is closed")
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[str | None] = loop.create_future()
        replies: list[Any] = []
        self._waiter, self._replies, self._wanted = waiter, replies, num_replies
        self._hopeful = True
        self._due = loop.time() + timeout_s
        self._timer = loop.call_at(self._due, self._expire)
        ended = False
        try:
            self._transport.write(command)
            trouble = await waiter
            ended = trouble is None
        finally:
            self._timer.cancel()
            self._waiter = None
            if not ended:
                self.close()
        return Answer(replies, trouble)

    def close(self) -> None:
        """End it at once: what was sent but has not left is dropped, what comes is not read."""
        self._end("the connection was closed")

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(f"connection lost: {exc}" if exc else "Redis closed the connection")

    def data_received(self, data: bytes) -> None:
        if self._waiter is None or self._waiter.done():
            self._end("unexpected bytes")
            return
        self._hopeful = True
        try:
            self._reader.feed(data)
            while (reply := self._reader.gets()) is not _MORE:
                self._replies.append(reply)
        except (hiredis.HiredisError, ValueError, MemoryError) as error:
            self._end(f"not a reply: {error}")
            return
        if len(self._replies) < self._wanted:
            return
        if len(self._replies) > self._wanted or self._reader.has_data():
            self._replies.clear()
            self._end("more replies than commands")
        else:
            self._waiter.set_result(None)

    def _expire(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        if now - self._due > LATE_S and self._hopeful:
            self._hopeful = False  # until there is more
            self._due = now + LATE_S
            self._timer = loop.call_at(self._due, self._expire)
        else:
            self._end("no reply in time")

    def _end(self, trouble: str) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(trouble)
        if self.closed:
            return
        self.closed = True
        if self._transport is not None:
            self._transport.abort()
        if self._connection is not None:
            self._connection._close()  # type: ignore[no-untyped-call]
        self._lost(self)
