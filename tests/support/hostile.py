"""Raw connections for tests of what no well-behaved client sends: bytes go out as given, replies are taken apart."""

# Shapes: B ids, D embedding_dim.

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

import numpy as np
import orjson
from numpy.typing import NDArray

import embstore
from support.serving import ServerProcess, serving

NUM, DIM, WIDE = 500, 8, 4096
TABLE_VD = np.arange(NUM * DIM, dtype=np.float32).reshape(NUM, DIM)
WIDE_VD = np.repeat(np.arange(16, dtype=np.float32)[:, None], WIDE, axis=1)
"""Every number of a row is the row's id; 16 KiB a row."""


def publish(folder: Path) -> Path:
    """A store with a small table `item` and one of huge rows, `wide`; its folder."""
    store = embstore.open_store(folder)
    store.publish_release({"item": embstore.Publication(TABLE_VD), "wide": embstore.Publication(WIDE_VD)})
    return folder


@contextmanager
def guarded(folder: Path, **limits: int) -> Iterator[ServerProcess]:
    """A server of these tables, with settings that differ from the defaults."""
    env = {f"EMBSTORE_{name.upper()}": str(value) for name, value in limits.items()}
    with serving(publish(folder / "store"), folder / "log", env=env) as server:
        yield server


class Answer(NamedTuple):
    """One reply, taken apart."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str:
        """The code of a problem; asserts that it is one."""
        assert self.headers["content-type"] == "application/problem+json", self
        problem = orjson.loads(self.body)
        assert (problem["status"], problem["instance"]) == (self.status, self.headers["x-request-id"])
        return str(problem["code"])

    @property
    def closes(self) -> bool:
        """The server says that this is the connection's last reply."""
        return self.headers.get("connection", "").lower() == "close"


class Truncated(AssertionError):
    """The connection ended before the reply was complete; `got` is what there was of it."""

    def __init__(self, got: bytes) -> None:
        super().__init__(f"the connection ended inside a reply, or before it: {got[:200]!r}, {len(got):,} bytes")
        self.got = got


class Wire:
    """One TCP connection to a server."""

    def __init__(self, server: ServerProcess, *, timeout: float = 20.0, receive_buffer: int | None = None) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.settimeout(timeout)
        address = urlsplit(server.url)
        assert address.port is not None
        self.socket.connect((address.hostname, address.port))
        self._got = bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def send(self, *parts: bytes) -> Self:
        """Send everything, in one segment where it fits."""
        self.socket.sendall(b"".join(parts))
        return self

    def try_send(self, data: bytes) -> bool:
        """Whether the server took it all; it may hang up in the middle."""
        try:
            self.socket.sendall(data)
        except OSError:
            return False
        return True

    def send_aside(self, data: bytes) -> threading.Thread:
        """Send from another thread, so that replies can be read meanwhile."""
        thread = threading.Thread(target=self.try_send, args=(data,))
        thread.start()
        return thread

    def half_close(self) -> Self:
        """Nothing more will be sent; replies are still read."""
        self.socket.shutdown(socket.SHUT_WR)
        return self

    def reset(self) -> None:
        """Go away rudely: RST, no FIN."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def close(self) -> None:
        """Go away."""
        self.socket.close()

    def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers of the next reply; its body is left."""
        lines = self._until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        version, status, _ = lines[0].split(" ", 2)
        assert version == "HTTP/1.1", lines
        headers: dict[str, str] = {}
        for line in lines[1:]:
            name, colon, value = line.partition(":")
            assert colon, lines
            assert name.lower() not in headers, lines
            headers[name.lower()] = value.strip()
        return int(status), headers

    def answer(self, *, head: bool = False) -> Answer:
        """The next reply; Truncated when the connection ends before it does. `head`: it answers a HEAD."""
        status, headers = self.head()
        if head or status in (100, 204, 304):
            return Answer(status, headers, b"")
        if headers.get("transfer-encoding") == "chunked":
            return Answer(status, headers, self._chunks())
        return Answer(status, headers, self.take(int(headers["content-length"])))

    def answers(self, count: int) -> list[Answer]:
        """The next replies."""
        return [self.answer() for _ in range(count)]

    def closed(self) -> bool:
        """Whether the server ends the connection with nothing more said; waits for it."""
        try:
            return not self._got and self.socket.recv(1) == b""
        except TimeoutError:
            return False
        except OSError:
            return True

    def last_words(self) -> list[Answer]:
        """Replies until the server hangs up, which it must."""
        found = []
        while not self.closed_after_reply():
            found.append(self.answer())
        return found

    def closed_after_reply(self) -> bool:
        """Whether the connection ends here, between two replies."""
        return not self._got and not self._more()

    def take(self, count: int) -> bytes:
        """So many bytes."""
        while len(self._got) < count:
            if not self._more():
                raise Truncated(bytes(self._got))
        taken = bytes(self._got[:count])
        del self._got[:count]
        return taken

    def _until(self, mark: bytes) -> bytes:
        while (at := self._got.find(mark)) < 0:
            if not self._more():
                raise Truncated(bytes(self._got))
        return self.take(at + len(mark))[: -len(mark)]

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self._until(b"\r\n"), 16):
            body += self.take(size)
            assert self.take(2) == b"\r\n"
        assert self.take(2) == b"\r\n"
        return body

    def _more(self) -> bool:
        try:
            data = self.socket.recv(1 << 18)
        except ConnectionResetError:
            return False
        self._got += data
        return bool(data)


def request(method: str, path: str, body: bytes | None = None, **headers: str | int) -> bytes:
    """A whole request; header names have underscores for dashes. No Content-Length where `body` is None."""
    lines = [f"{method} {path} HTTP/1.1", "Host: embstore"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if body is not None and not any(name.lower() == "content_length" for name in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + (body or b"")


def octets(ids: list[int]) -> bytes:
    """Ids as they go over the wire."""
    return np.array(ids, "<i8").tobytes()


def lookup(ids: list[int], table: str = "item", path: str = "lookup", **headers: str | int) -> bytes:
    """A whole lookup with octets for a body."""
    options: dict[str, Any] = {"Content_Type": "application/octet-stream"} | headers
    return request("POST", f"/v1/tables/{table}/{path}", octets(ids), **options)


def is_right(answer: Answer, ids: list[int], table_VD: NDArray[np.float32] = TABLE_VD) -> None:
    """Assert that these are the vectors of these ids, bit for bit."""
    assert answer.status == 200, answer
    assert answer.headers["x-embedding-shape"] == f"{len(ids)},{table_VD.shape[1]}"
    assert answer.body == table_VD[ids].tobytes()


def counted(server: ServerProcess) -> tuple[int, dict[str, int]]:
    """Lookups answered, and lookups refused by reason, since the start."""
    with Wire(server) as wire:
        text = wire.send(request("GET", "/metrics")).answer().body.decode()
    answered, rejected = 0, {}
    for line in text.splitlines():
        if line.startswith("embstore_lookup_duration_seconds_count{"):
            answered += int(float(line.split()[-1]))
        elif line.startswith("embstore_rejected_total{"):
            rejected[line.split('"')[1]] = int(float(line.split()[-1]))
    return answered, rejected


def open_files(server: ServerProcess) -> int:
    """Descriptors the server has open."""
    return len(list(Path(f"/proc/{server.pid}/fd").iterdir()))


def settles(value: Any, bound: float, seconds: float = 15.0) -> bool:
    """Whether `value()` comes down to `bound` within so many seconds."""
    end = time.monotonic() + seconds
    while value() > bound:
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@contextmanager
def unharmed(server: ServerProcess, *, memory_mib: float = 40.0, descriptors: int = 4) -> Iterator[None]:
    """Whatever happens inside, the server then answers rightly, has let go of files and memory and logged no error."""
    files, memory, failures = open_files(server), server.memory_mib(), len(_failures(server))
    yield
    with Wire(server) as wire:
        is_right(wire.send(lookup([3, 499, 0])).answer(), [3, 499, 0])
    assert settles(lambda: open_files(server), files + descriptors), f"{open_files(server)} files, {files} before"
    assert settles(server.memory_mib, memory + memory_mib), f"{server.memory_mib():.0f} MiB, {memory:.0f} before"
    assert _failures(server)[failures:] == []


def _failures(server: ServerProcess) -> list[str]:
    """Lines of the log that speak of a failure."""
    lines = server.log_path.read_text().splitlines()
    return [line for line in lines if '"level": "error"' in line or '"level":"error"' in line or "Traceback" in line]


class Background:
    """A thread that looks up all the time on one connection; `problems` and `seconds` say how that went."""

    def __init__(self, server: ServerProcess, pause: float = 0.005) -> None:
        self.server, self.pause = server, pause
        self.seconds: list[float] = []
        self.problems: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join(60)

    def _run(self) -> None:
        with Wire(self.server) as wire:
            for number in range(1 << 30):
                if self._stop.wait(self.pause):
                    return
                ids = [number % NUM, 7, number % 11]
                begin = time.monotonic()
                try:
                    is_right(wire.send(lookup(ids)).answer(), ids)
                except (AssertionError, OSError) as error:
                    self.problems.append(repr(error))
                    return
                self.seconds.append(time.monotonic() - begin)
