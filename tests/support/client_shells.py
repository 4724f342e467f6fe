"""Calls through either client, over a small server of the contract that answers in process."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
from embstore_client import AsyncEmbeddingClient, EmbeddingClient

Handler = Callable[[httpx.Request], httpx.Response]
WIDTH = 4
KNOWN = range(100)


def vector(key: Any) -> list[float]:
    """The vector of a key."""
    return [float(len(key) if isinstance(key, str) else key % 1000) + column / 8 for column in range(WIDTH)]


def contract(request: httpx.Request) -> httpx.Response:
    """A small server of the contract: integer ids under 100 and keys under four letters are known."""
    path, query = request.url.path, request.url.params
    content_type = request.headers.get("content-type")
    if path == "/readyz":
        return httpx.Response(200, text="ready")
    if path == "/v1/tables":
        return httpx.Response(200, json=[{"table": "item"}])
    body = json.loads(request.content) if content_type == "application/json" else {}
    if path in ("/v1/lookup", "/v1/releases/r-1/lookup"):
        tables = {}
        for table, asked in body["tables"].items():
            found = [key in KNOWN for key in asked["ids"]]
            vectors = [vector(key) if known else [0.0] * WIDTH for key, known in zip(asked["ids"], found, strict=True)]
            tables[table] = {
                "table": table,
                "version": 7,
                "embedding_dim": WIDTH,
                "dtype": "float32",
                "vectors": vectors,
            }
            if not all(found):
                tables[table]["found"] = found
        return httpx.Response(200, json={"release": "r-1", "tables": tables})
    if not path.startswith("/v1/tables/item/"):
        problem = {"status": 404, "code": "table_not_found", "detail": f"no {path}", "table": "other"}
        return httpx.Response(404, json=problem, headers={"content-type": "application/problem+json"})
    keys = body["ids"] if body else np.frombuffer(request.content, "<i8").tolist()
    on_missing = body["on_missing"] if body else query.get("on_missing", "zero")
    dtype = body["dtype"] if body else query.get("dtype", "float32")
    found = [len(key) < 4 if isinstance(key, str) else key in KNOWN for key in keys]
    if on_missing == "error" and not all(found):
        problem = {"status": 422, "code": "id_out_of_range", "detail": "an id is unknown", "table": "item"}
        return httpx.Response(422, json=problem, headers={"content-type": "application/problem+json"})
    rows = np.array([vector(k) if f else [0.0] * WIDTH for k, f in zip(keys, found, strict=True)], dtype=dtype)
    missing = found.count(False)
    bits = np.packbits(found, bitorder="little").tobytes() if missing else b""
    headers = {
        "content-type": "application/octet-stream",
        "x-embedding-version": "3" if "/versions/3/" in path else "7",
        "x-embedding-shape": f"{len(keys)},{WIDTH}",
        "x-embedding-dtype": dtype,
        "x-embedding-missing": str(missing),
        "x-request-id": "q-1",
    }
    return httpx.Response(200, content=rows.tobytes() + bits, headers=headers)


class Both:
    """Makes one call through either client, and gives what came of it."""

    def __init__(self, kind: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.kind = kind
        self.clock = clock

    def __call__(self, handler: Handler, call: Callable[[Any], Any], **options: Any) -> Any:
        if self.kind == "sync":
            with EmbeddingClient(transport=httpx.MockTransport(handler), **options) as client:
                client._core.clock = self.clock
                return call(client)

        async def run() -> Any:
            async with AsyncEmbeddingClient(transport=httpx.MockTransport(handler), **options) as client:
                client._core.clock = self.clock
                return await call(client)

        return asyncio.run(run())
