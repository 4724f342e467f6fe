"""Infer requests and replies as the protocol has them, and an `Inference` over a small store: for tests of both."""

from __future__ import annotations

import asyncio
import json
import struct
import time
from collections.abc import Awaitable, Callable
from inspect import isawaitable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

import embstore
from embstore.table import Fetched, Table
from server.api.codecs.tensors import DTYPES
from server.api.lookup import LookupHandler
from server.api.shared_memory import Regions
from server.http.auth import ApiKeys
from server.http.buffer_pool import Buffers
from server.http.limits import Limits
from server.http.messages import Reply, Request
from server.http.routing import INFER, Route
from server.tables.snapshot import Snapshot

LENGTH = b"inference-header-content-length"
MAX = 1000
Tensors = dict[str, tuple[str, Any]]


def body_of(tensors: Tensors, binary: set[str], columns: bool = False, **more: Any) -> tuple[dict[bytes, bytes], bytes]:
    """Headers and body of a request; the inputs in `binary` go as bytes after the JSON, shapes are [n] or [n, 1]."""
    inputs, chunks = [], []
    for name, (datatype, values) in tensors.items():
        entry: dict[str, Any] = {"name": name, "datatype": datatype, "shape": [len(values), 1][: 1 + columns]}
        if name in binary:
            if datatype == "BYTES":
                data = b"".join(struct.pack("<I", len(raw := v.encode())) + raw for v in values)
            else:
                data = np.array(values, DTYPES[datatype]).tobytes()
            entry["parameters"] = {"binary_data_size": len(data)}
            chunks.append(data)
        else:
            entry["data"] = [[v] for v in values] if columns else list(values)
        inputs.append(entry)
    head = json.dumps({"inputs": inputs, **more}).encode()
    headers = {LENGTH: b"%d" % len(head)} if chunks else {}
    return headers, head + b"".join(chunks)


def outputs_of(reply: Reply) -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON of a reply and its outputs by name, read as the protocol says."""
    body = b"".join(bytes(part) for part in reply.body)
    at = len(body)
    for line in reply.head.split(b"\r\n"):
        if line.startswith(LENGTH):
            at = int(line.split(b": ")[1])
    head = json.loads(body[:at])
    found = {}
    for output in head["outputs"]:
        dtype = {"FP32": "<f4", "FP16": "<f2", "BOOL": "?"}[output["datatype"]]
        size = output.get("parameters", {}).get("binary_data_size")
        data = np.array(output["data"], dtype) if size is None else np.frombuffer(body[at : at + size], dtype)
        at += size or 0
        found[output["name"]] = data.reshape(output["shape"])
    assert at == len(body)
    return head, found


class Service:
    """Looks up in the table itself; `later`: what it gives has to be awaited. `in_threads`: how much was done there."""

    def __init__(self, later: bool = False) -> None:
        self.later, self.in_threads = later, 0

    async def do(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """In a thread."""
        self.in_threads += 1
        return await asyncio.to_thread(work, *arguments)

    def lookup(self, table: Table, keys: Any, on_missing: str, out: Any = None) -> Fetched | Awaitable[Fetched]:
        """Vectors."""
        return self._give(table.fetch(keys, on_missing, out))

    def lookup_bags(self, table: Table, keys: Any, on_missing: str, bags: Any) -> Fetched | Awaitable[Fetched]:
        """Pooled vectors."""
        return self._give(table.fetch_bags(keys, bags, on_missing))

    def _give(self, fetched: Fetched) -> Fetched | Awaitable[Fetched]:
        async def later() -> Fetched:
            return fetched

        return later() if self.later else fetched


class Counts:
    """What was counted."""

    def __init__(self) -> None:
        self.counted: list[tuple[Any, ...]] = []
        self.inflight = [0]

    def stage(self, stage: str, seconds: float) -> None:
        """Time in one stage."""

    def count(self, table: str, protocol: str, seconds: float, num_ids: int, missing: int) -> None:
        """One lookup."""
        assert seconds > 0
        self.counted.append((table, protocol, num_ids, missing))


VECTORS = np.arange(40, dtype=np.float32).reshape(10, 4) / 8
NAMES = ["", "a", "ä", "sku-3", "9"]


def published(folder: Path) -> Snapshot:
    """Integer and string ids, and a table whose name looks like a part of another; all in release 1."""
    store = embstore.open_store(folder)
    publications = {name: embstore.Publication(VECTORS * k) for k, name in enumerate(["item", "item.found"], 1)}
    release = store.publish_release(publications | {"tag": embstore.Publication(VECTORS[:5], ids=NAMES)})
    latest = {name: store.load(name, num_threads=1) for name in release.tables}
    loaded = {(name, table.version): table for name, table in latest.items()}
    return Snapshot(latest, {}, loaded, {release.id: latest}, dict.fromkeys(loaded, release.id))


def answer(
    snapshot: Snapshot,
    model: str,
    headers: dict[bytes, bytes],
    body: bytes,
    *,
    version: int | None = None,
    service: Service | None = None,
    counts: Counts | None = None,
    max_reply_bytes: int = 1 << 20,
    regions: Regions | None = None,
) -> Reply:
    """What the lookup handler answers; a refusal is raised."""
    limits = Limits(
        max_ids=MAX,
        max_body_bytes=1 << 20,
        max_reply_bytes=max_reply_bytes,
        max_connections=1,
        request_seconds=1,
        keepalive_seconds=1,
        shutdown_seconds=1,
    )
    here: Any = SimpleNamespace(snapshot=snapshot, started=True)
    health: Any = SimpleNamespace(draining=False)
    keys = ApiKeys([], [], host="127.0.0.1")
    parts: Any = (
        service or Service(),
        counts or Counts(),
        health,
        keys,
        Buffers(),
        limits,
        regions or Regions(keys, 0),
    )
    request = Request(b"POST", Route(INFER, model, version), headers, body, b"1", time.perf_counter())
    reply = _Raising(here, *parts).answer(request)
    if not isawaitable(reply):
        return reply

    async def wait() -> Reply:
        return await reply

    return asyncio.run(wait())


class _Raising(LookupHandler):
    """A handler whose refusals can be caught."""

    def refuse(self, request: Request, error: Exception) -> Reply:  # noqa: ARG002
        """Raise instead."""
        raise error
