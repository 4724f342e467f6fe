"""A server of HTTP that answers as told: for load tests, which must count right what no good server does."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path

CLOSE, RESET, SILENCE = "close", "reset", "silence"
Answer = bytes | str | list[bytes | str]
Answers = Callable[[int], Answer]

NUM_IDS, DIM = 100, 4
ROWS = 10
ABOUT = json.dumps({"tables": [{"table": "item", "num_ids": NUM_IDS}]}).encode()


def reply(body: bytes, status: str = "200 OK", **headers: object) -> bytes:
    """A whole reply; underscores in the names of headers stand for dashes."""
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode() + body


def rows(num: int = ROWS, *, said: int | None = None, version: str = "1") -> bytes:
    """The reply to an octet lookup of `num` ids; `said`: how many its header says that it has."""
    shape = f"{num if said is None else said},{DIM}"
    headers = {"x_embedding_shape": shape, "x_embedding_dtype": "float32", "x_embedding_version": version}
    return reply(bytes(4 * DIM * num), content_type="application/octet-stream", **headers)


class Scripted(socketserver.ThreadingTCPServer):
    """Answers the k-th request as told: bytes at once, a list of bytes bit by bit, or one of the words above.

    What a load test asks beforehand, whether the server lives and which tables it has, it answers well, uncounted.
    """

    request_queue_size = 128
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, answer: Answers, port: int = 0, context: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", port), Talk)
        self.answer, self.numbers, self.turn, self.context = answer, itertools.count(), threading.Lock(), context

    def next_answer(self) -> Answer:
        """One at a time: an answer that takes long holds all others up, as in a server with one thread."""
        with self.turn:
            return self.answer(next(self.numbers))


class Talk(socketserver.BaseRequestHandler):
    """One connection."""

    server: Scripted

    def handle(self) -> None:
        connection: socket.socket = self.request
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.server.context is not None:
                connection = self.server.context.wrap_socket(connection, server_side=True)
            with connection, connection.makefile("rb") as file:
                self._talk(connection, file)

    def _talk(self, connection: socket.socket, file: BufferedReader) -> None:
        while file.peek(1)[:1] in (b"G", b"P") and (target := _read_request(file)):
            if target in (b"/livez", b"/v1/tables"):
                connection.sendall(reply(ABOUT))
                continue
            answer = self.server.next_answer()
            if answer == RESET:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if answer in (RESET, CLOSE):
                return
            for piece in answer if isinstance(answer, list) else [answer] * (answer != SILENCE):
                if isinstance(piece, str):
                    return
                connection.sendall(piece)
                time.sleep(0.002 * isinstance(answer, list))
        with contextlib.suppress(OSError):
            connection.sendall(reply(b"", "400 Bad Request"))


def _read_request(file: BufferedReader) -> bytes:
    """The target of the next request, read whole; empty when there is none."""
    first, length = file.readline(), 0
    while (line := file.readline()) not in (b"\r\n", b""):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    file.read(length)
    return first.split(b" ")[1] if first else b""


@contextlib.contextmanager
def scripted(answer: Answers, context: ssl.SSLContext | None = None) -> Iterator[str]:
    """The address of a server that answers like this."""
    with Scripted(answer, context=context) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"{'http' if context is None else 'https'}://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join(10)


def server_context(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """TLS for 127.0.0.1 with a certificate that signs itself, and the file of that certificate."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    kind = ["-x509", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-days", "2"]
    names = ["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", "req", *kind, *names, *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context, certificate


if __name__ == "__main__":  # a process of its own, for tests that kill it
    Scripted(lambda _: rows(), int(sys.argv[1])).serve_forever(0.02)
