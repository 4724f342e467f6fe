"""A little HTTP server on real sockets that does to each request what it is told: answers, refuses, stalls, cuts."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from embstore_client import AsyncEmbeddingClient, EmbeddingClient

WIDTH = 4
GIVE_UP_S = 10.0
Act = Callable[["Exchange"], None]


class Exchange:
    """One request on one connection."""

    def __init__(self, server: ScriptedServer, connection: socket.socket, number: int, head: str, body: bytes) -> None:
        self.server, self.connection, self.number, self.body = server, connection, number, body
        self.path = head.split(" ")[1]
        lines = head.split("\r\n")[1:]
        self.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}

    def reply(self, status: int, headers: dict[str, Any], body: bytes) -> None:
        """A whole answer."""
        lines = [f"HTTP/1.1 {status} -", *(f"{name}: {value}" for name, value in headers.items())]
        self.connection.sendall("\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode() + body)

    def rows(self) -> tuple[dict[str, Any], bytes]:
        """The right answer: each id's row is the id itself, `WIDTH` times."""
        ids = np.frombuffer(self.body, "<i8")
        headers = {
            "content-type": "application/octet-stream",
            "x-embedding-version": 7,
            "x-embedding-shape": f"{len(ids)},{WIDTH}",
            "x-embedding-dtype": "float32",
            "x-embedding-missing": 0,
        }
        return headers, np.repeat(ids.astype("<f4"), WIDTH).tobytes()


def answer(exchange: Exchange) -> None:
    """The right answer."""
    exchange.reply(200, *exchange.rows())


def refuse(status: int, code: str = "", **headers: Any) -> Act:
    """An error with a problem document, or with a page where there is no code."""
    body = b'{"code": "%s"}' % code.encode() if code else b"<h1>no</h1>"
    kind = "application/problem+json" if code else "text/html"
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda exchange: exchange.reply(status, {"content-type": kind} | named, body)


def after(seconds: float, act: Act) -> Act:
    """Something, later."""

    def late(exchange: Exchange) -> None:
        time.sleep(seconds)
        act(exchange)

    return late


def hang_up(exchange: Exchange) -> None:
    """The connection ends without an answer."""
    exchange.connection.shutdown(socket.SHUT_RDWR)


def reset_in_the_body(exchange: Exchange) -> None:
    """Half of the right answer, then a reset."""
    exchange.connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nhalf")
    exchange.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    exchange.connection.close()


def too_short(exchange: Exchange) -> None:
    """An answer that is whole for HTTP, and lacks a row."""
    headers, body = exchange.rows()
    exchange.reply(200, headers, body[: -WIDTH * 4])


def stall(exchange: Exchange) -> None:
    """Nothing, until the client has closed the connection; the server then knows that it did."""
    exchange.connection.settimeout(GIVE_UP_S)
    with suppress(OSError):
        if exchange.connection.recv(1) == b"":
            exchange.server.given_up.append(exchange.number)


def trickle(exchange: Exchange) -> None:
    """A head that never ends, a byte at a time."""
    exchange.connection.sendall(b"HTTP/1.1 200 OK\r\nx: ")
    end = time.monotonic() + GIVE_UP_S
    with suppress(OSError):
        while time.monotonic() < end:
            exchange.connection.sendall(b"x")
            time.sleep(0.02)


class ScriptedServer:
    """Does `acts` one after the other, a request each, then `answer`s whatever comes."""

    def __init__(self, *acts: Act, port: int = 0, uds: Path | None = None) -> None:
        self.acts = list(acts)
        self.seen: list[Exchange] = []
        self.given_up: list[int] = []
        self.connections = 0
        self._lock = threading.Lock()
        self._open: list[socket.socket] = []
        if uds is None:
            self._listener = socket.create_server(("127.0.0.1", port))
            self.port = self._listener.getsockname()[1]
            self.url = f"http://127.0.0.1:{self.port}"
        else:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(uds))
            self._listener.listen()
            self.url = f"unix://{uds}"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        """Refuse and reset from now on."""
        for connection in [self._listener, *self._open]:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        for thread in self._threads:
            thread.join(GIVE_UP_S)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                self._open.append(connection)
                self._threads.append(threading.Thread(target=self._serve, args=(connection,), daemon=True))
                self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError), connection:
            buffer = b""
            while True:
                while b"\r\n\r\n" not in buffer:
                    received = connection.recv(65536)
                    if not received:
                        return
                    buffer += received
                raw_head, _, buffer = buffer.partition(b"\r\n\r\n")
                head = raw_head.decode("latin-1")
                length = int(head.lower().partition("content-length: ")[2].partition("\r\n")[0] or 0)
                while len(buffer) < length:
                    buffer += connection.recv(65536)
                with self._lock:
                    number = len(self.seen)
                    exchange = Exchange(self, connection, number, head, buffer[:length])
                    self.seen.append(exchange)
                buffer = buffer[length:]
                (self.acts[number] if number < len(self.acts) else answer)(exchange)


@contextmanager
def scripted(*acts: Act, port: int = 0, uds: Path | None = None) -> Iterator[ScriptedServer]:
    """A server for one test."""
    server = ScriptedServer(*acts, port=port, uds=uds)
    try:
        yield server
    finally:
        server.close()


class Either:
    """One call, or several in turn, through one client of either kind."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, base_url: Any, *calls: Callable[[Any], Any], **options: Any) -> list[Any]:
        """What each call returned or raised, in order."""
        if self.kind == "sync":
            with EmbeddingClient(base_url, **options) as client:
                return [outcome_of(lambda call=call: call(client)) for call in calls]

        async def run() -> list[Any]:
            async with AsyncEmbeddingClient(base_url, **options) as client:
                outcomes = []
                for call in calls:
                    try:
                        outcomes.append(await call(client))
                    except Exception as error:
                        outcomes.append(error)
                return outcomes

        return asyncio.run(run())


def outcome_of(call: Callable[[], Any]) -> Any:
    """What it returns, or raises."""
    try:
        return call()
    except Exception as error:
        return error


def item_one(client: Any) -> Any:
    """A lookup of one id."""
    return client.lookup("item", [1])


class Recorder:
    """An observer that keeps what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, dict[str, Any]]] = []

    def headers(self) -> dict[str, str]:
        return {}

    def __getattr__(self, event: str) -> Callable[..., None]:
        return lambda **facts: self.heard.append((event, facts))

    def of(self, event: str, *names: str) -> list[Any]:
        """The facts of one kind of event: one of them plain, several as tuples."""
        found = [tuple(facts[name] for name in names) for kind, facts in self.heard if kind == event]
        return [facts[0] for facts in found] if len(names) == 1 else found
