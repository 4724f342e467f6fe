"""One client on the server's machine: rows in the reply, or in shared memory, over TCP and over a Unix-domain socket.

python -m benchmarks.shared_memory [--num 200000] [--seconds 3] [--rounds 5] [--url http://127.0.0.1:8000] [--json]

One thread sends one request after the other on one connection and reads the vectors where they are then; the ids of
each request are others. Ways are measured in turns, and what is shown is the median. The server has the first core, the
client the others. `--url` (http:// or unix://) measures a server that runs already, over that address alone: its table
`item` must have the ids 0 to `num - 1`, and 64 floats an id.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import typer
from numpy.typing import NDArray

import embstore
from benchmarks.processes import cores, on_cores, serving
from benchmarks.show import Row, show

DIM, BATCHES, SIZES = 64, 64, (10, 1_000)
Way = Callable[[NDArray[np.int64]], NDArray[np.float32]]
"""Vectors [B, DIM] of ids [B]."""


class Connection:
    """A keep-alive connection, HTTP as little as it takes."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme == "unix":
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.connect(unquote(parts.path))
        else:
            self._socket = socket.create_connection((parts.hostname, parts.port))
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = bytearray(1 << 20)
        self._view = memoryview(self._buffer)

    def close(self) -> None:
        """Close it."""
        self._socket.close()

    def post(self, head: bytes, body: bytes | memoryview) -> memoryview:
        """The body of the reply, valid until the next call; RuntimeError where its status is not 200."""
        self._socket.sendall(b"%s%s" % (head, body))
        read, end, length = 0, -1, 0
        while end < 0 or read < end + length:
            count = self._socket.recv_into(self._view[read:])
            if not count:
                raise RuntimeError("the server closed the connection")
            read += count
            if end < 0 and (at := self._buffer.find(b"\r\n\r\n", 0, read)) >= 0:
                end, lines = at + 4, bytes(self._view[:at]).lower().split(b"\r\n")
                length = next(int(line[16:]) for line in lines if line.startswith(b"content-length: "))
        if not self._buffer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(bytes(self._view[:read]).decode("utf-8", "replace"))
        return self._view[end : end + length]


def head_of(path: str, length: int, **headers: object) -> bytes:
    """The head of a POST."""
    named = {"host": "localhost", "content-length": length} | {k.replace("_", "-"): v for k, v in headers.items()}
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in named.items()), "", ""]
    return "\r\n".join(lines).encode()


def octet_stream(connection: Connection, num_ids: int) -> Way:
    """The lookup call of our own, ids and rows as bytes."""
    head = head_of("/v1/tables/item/lookup", 8 * num_ids, content_type="application/octet-stream")

    def lookup(ids_B: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.frombuffer(connection.post(head, ids_B.data.cast("B")), np.float32).reshape(-1, DIM)

    return lookup


def infer_binary(connection: Connection, num_ids: int) -> Way:
    """The Open Inference Protocol with binary tensors in request and reply."""
    ids = {"name": "ids", "datatype": "INT64", "shape": [num_ids], "parameters": {"binary_data_size": 8 * num_ids}}
    asked = json.dumps({"inputs": [ids], "outputs": [{"name": "embeddings", "parameters": {"binary_data": True}}]})
    length = len(asked) + 8 * num_ids
    head = head_of("/v2/models/item/infer", length, inference_header_content_length=len(asked)) + asked.encode()

    def lookup(ids_B: NDArray[np.int64]) -> NDArray[np.float32]:
        body = connection.post(head, ids_B.data.cast("B"))
        return np.frombuffer(body[len(body) - 4 * DIM * num_ids :], np.float32).reshape(-1, DIM)

    return lookup


def infer_shared(connection: Connection, num_ids: int, memory: SharedMemory) -> Way:
    """The same with both tensors in the region named like its object: ids first, then the vectors."""
    ids_B = np.ndarray((num_ids,), np.int64, memory.buf)
    vectors_BD = np.ndarray((num_ids, DIM), np.float32, memory.buf, ids_B.nbytes)

    def place(offset: int, num_bytes: int) -> dict[str, Any]:
        where = {"region": memory.name, "offset": offset, "byte_size": num_bytes}
        return {"parameters": {f"shared_memory_{name}": value for name, value in where.items()}}

    tensors = {
        "inputs": [{"name": "ids", "datatype": "INT64", "shape": [num_ids], **place(0, ids_B.nbytes)}],
        "outputs": [{"name": "embeddings", **place(ids_B.nbytes, vectors_BD.nbytes)}],
    }
    body = json.dumps(tensors).encode()
    head = head_of("/v2/models/item/infer", len(body))

    def lookup(asked_B: NDArray[np.int64]) -> NDArray[np.float32]:
        ids_B[:] = asked_B
        connection.post(head, body)
        return vectors_BD

    return lookup


@contextmanager
def registered(url: str, num_bytes: int) -> Iterator[SharedMemory]:
    """A shared memory object that the server knows by its name."""
    memory, connection = SharedMemory(create=True, size=num_bytes), Connection(url)
    path = f"/v2/systemsharedmemory/region/{memory.name}"
    try:
        body = json.dumps({"key": memory.name, "byte_size": num_bytes}).encode()
        connection.post(head_of(f"{path}/register", len(body)), body)
        yield memory
        connection.post(head_of(f"{path}/unregister", 0), b"")
    finally:
        connection.close()
        memory.unlink()


def requests_per_s(way: Way, batches: list[NDArray[np.int64]], seconds: float) -> float:
    """Requests that one thread makes, and whose vectors it looks at, in a second."""
    begin, count = time.perf_counter(), 0
    while (now := time.perf_counter()) < begin + seconds:
        for ids_B in batches:
            way(ids_B)[-1, -1].item()
        count += len(batches)
    return count / (now - begin)


def measure(url: str, num: int, seconds: float, rounds: int) -> list[Row]:
    """A row for each number of ids: requests a second each way."""
    random, rows = np.random.default_rng(0), list[Row]()
    for num_ids in SIZES:
        batches = [random.integers(0, num, num_ids) for _ in range(BATCHES)]
        with ExitStack() as stack:
            memory = stack.enter_context(registered(url, (8 + 4 * DIM) * num_ids))
            connection = Connection(url)
            stack.callback(connection.close)
            ways = {
                "octet stream": octet_stream(connection, num_ids),
                "infer, binary": infer_binary(connection, num_ids),
                "infer, shared memory": infer_shared(connection, num_ids, memory),
            }
            expected = ways["octet stream"](batches[0]).copy()
            for name, way in ways.items():
                assert np.array_equal(way(batches[0]), expected), name
            found: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(rounds):
                for name, way in ways.items():
                    found[name].append(requests_per_s(way, batches, seconds))
        figures = {name: f"{statistics.median(rates):,.0f}" for name, rates in found.items()}
        rows.append({"over": urlsplit(url).scheme.replace("http", "tcp"), "ids": num_ids, **figures})
    return rows


def main(num: int = 200_000, seconds: float = 3.0, rounds: int = 5, url: str = "", json: bool = False) -> None:
    """Requests a second of one client."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        urls = [url]
        if not url:
            folder = Path(name)
            table_VD = np.random.default_rng(0).standard_normal((num, DIM), np.float32)
            embstore.open_store(folder / "store").publish("item", table_VD)
            flags = ("--store", str(folder / "store"), "--port", "0", "--uds", str(folder / "socket"), "--cache", "off")
            server = stack.enter_context(serving(("embstore", "serve", *flags), folder / "log", cores()[:1]))
            urls = [server.url, f"unix://{folder}/socket"]
        stack.enter_context(on_cores(cores()[1:]))
        rows = [row for one in urls for row in measure(one, num, seconds, rounds)]
    show({f"Requests a second of one client, {DIM} floats an id": rows}, as_json=json)


if __name__ == "__main__":
    if not os.path.isdir("/dev/shm"):
        sys.exit("there is no /dev/shm on this machine")
    typer.run(main)
