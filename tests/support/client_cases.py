"""Answers to the client's requests: golden ones, and those of a small server whose versions change on request."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from urllib.parse import parse_qsl, unquote

import numpy as np
from embstore_client._core.plan import Plan
from embstore_client._core.protocol import Reply, Request
from numpy.typing import NDArray

# Golden: two rows of two float32, ids 1.0 -2.0 / 0.5 0.0, little-endian, written out by hand.
GOLDEN_ROWS = bytes.fromhex("0000803f 000000c0 0000003f 00000000")


def octets(body: bytes, **headers: str) -> Reply:
    """A right answer of two found rows, unless `headers` say otherwise (None leaves one out)."""
    given_headers = {
        "content-type": "application/octet-stream",
        "x-embedding-version": "7",
        "x-embedding-shape": "2,2",
        "x-embedding-dtype": "float32",
        "x-embedding-missing": "0",
    }
    given_headers |= {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(200, {name: value for name, value in given_headers.items() if value is not None}, body)


def entry(**fields: Any) -> dict[str, Any]:
    """The same rows as one table's part of a JSON answer; `...` leaves a field out."""
    right = {
        "table": "item",
        "version": 7,
        "embedding_dim": 2,
        "dtype": "float32",
        "vectors": [[1.0, -2.0], [0.5, 0.0]],
    }
    return {name: value for name, value in (right | fields).items() if value is not ...}


def as_json(document: Any, **headers: str) -> Reply:
    """An answer that is this document."""
    return Reply(200, {"content-type": "application/json", **headers}, json.dumps(document).encode())


# A small server

WIDTH = 3


def known(key: int | str) -> bool:
    """Every seventh id, and every key of seven letters, is unknown."""
    return len(key) != 7 if isinstance(key, str) else key % 7 != 6


def vector(table: str, version: int, key: int | str) -> list[float]:
    """What a version of a table has for a key: no other version, table or key has the same; all types hold it."""
    number = len(key) if isinstance(key, str) else key
    return [float(version), float(number % 100), float(len(table))] if known(key) else [0.0] * WIDTH


def vectors(table: str, version: int, keys: Iterable[int | str]) -> NDArray[np.float32]:
    """The vectors of several keys."""
    return np.array([vector(table, version, key) for key in keys], np.float32).reshape(-1, WIDTH)


def pooled(rows: NDArray[np.float32], offsets: Sequence[int]) -> NDArray[np.float32]:
    """The sum of each bag."""
    ends = [*offsets[1:], len(rows)]
    return np.array([rows[a:b].sum(axis=0) for a, b in zip(offsets, ends, strict=True)], "f4").reshape(-1, WIDTH)


def encoded(rows: NDArray[np.float32], dtype: str) -> bytes:
    """Rows as a reply has them; int8 with codes 0 to 255 of a row's own range."""
    if dtype == "bfloat16":
        return (rows.view(np.uint32) >> 16).astype("<u2").tobytes()
    if dtype == "int8":
        bias = rows.min(axis=1, initial=np.inf, keepdims=True)
        scale = (rows.max(axis=1, initial=-np.inf, keepdims=True) - bias) / np.float32(255)
        codes = np.rint((rows - bias) / np.where(scale > 0, scale, 1)).astype(np.uint8)
        return np.hstack([codes, np.hstack([scale, bias]).astype("<f4").view(np.uint8)]).tobytes()
    return rows.astype(dtype).tobytes()


class Fake:
    """Answers requests; `version` is what every label names now, and the release's name.

    `swaps[i]` is the version from request i on, counted from 0.
    """

    def __init__(self, version: int = 1, swaps: dict[int, int] | None = None) -> None:
        self.version, self.swaps = version, swaps or {}
        self.requests: list[Request[Any]] = []
        self.sizes: list[int] = []

    def send(self, request: Request[Any]) -> Reply:
        """The reply to one request."""
        self.version = self.swaps.get(len(self.requests), self.version)
        self.requests.append(request)
        path, _, query = request.target.partition("?")
        parts = [unquote(part) for part in path.split("/")[1:]]
        if parts[0] == "v2":
            return self._infer(parts, request)
        return self._lookup(parts, dict(parse_qsl(query)), request)

    def _lookup(self, parts: list[str], options: dict[str, Any], request: Request[Any]) -> Reply:
        table = parts[2]
        version = int(parts[4]) if parts[3] == "versions" else self.version
        if dict(request.headers)["content-type"] == "application/json":
            options = json.loads(request.body)
        keys = options.get("ids", np.frombuffer(request.body, "<i8").tolist() if "ids" not in options else None)
        self.sizes.append(max(len(keys), len(options.get("offsets", []))))
        found = [known(key) for key in keys]
        rows = vectors(table, version, keys)
        if "offsets" in options:
            rows = pooled(rows, options["offsets"])
        dtype = options.get("dtype", "float32")
        bits = b"" if all(found) else np.packbits(found, bitorder="little").tobytes()
        headers = {
            "content-type": "application/octet-stream",
            "x-embedding-version": str(version),
            "x-embedding-shape": f"{len(rows)},{WIDTH}",
            "x-embedding-dtype": dtype,
            "x-embedding-missing": str(found.count(False)),
            "x-embedding-release": f"{version}",
            "x-request-id": f"q{len(self.requests)}",
        }
        return Reply(200, headers, encoded(rows, dtype) + bits)

    def _infer(self, parts: list[str], request: Request[Any]) -> Reply:
        version = int(parts[4]) if parts[3] == "versions" else self.version
        at = int(dict(request.headers)["inference-header-content-length"])
        head = json.loads(request.body[:at])
        inputs: dict[str, list[Any]] = {}
        for given in head["inputs"]:
            data = request.body[at : at + given["parameters"]["binary_data_size"]]
            at += len(data)
            inputs[given["name"]] = _elements(given["datatype"], data)
            assert given["shape"] == [len(inputs[given["name"]])]
        assert at == len(request.body)
        outputs, buffers = [], []
        tables = [name for name in inputs if not name.endswith((".offsets", ".weights"))]
        self.sizes.append(sum(len(inputs[name]) for name in tables))
        dtype = head["parameters"]["dtype"]
        for table in tables:
            rows, found = vectors(table, version, inputs[table]), [known(key) for key in inputs[table]]
            if f"{table}.offsets" in inputs:
                rows = pooled(rows, inputs[f"{table}.offsets"])
            facts = {"version": version, "missing": found.count(False)}
            kind = {"float32": "FP32", "float16": "FP16"}[dtype]
            for name, datatype, shape, data, more in (
                (table, kind, list(rows.shape), encoded(rows, dtype), facts),
                (f"{table}.found", "BOOL", [len(found)], np.array(found, np.bool_).tobytes(), {}),
            ):
                parameters = more | {"binary_data_size": len(data)}
                outputs.append({"name": name, "datatype": datatype, "shape": shape, "parameters": parameters})
                buffers.append(data)
        return infer_reply(str(version), outputs, buffers, **{"x-request-id": f"q{len(self.requests)}"})


def infer_reply(
    release: str, outputs: list[dict[str, Any]], buffers: list[bytes], extra: bytes = b"", **headers: str
) -> Reply:
    """A binary reply of model `embstore`."""
    document = {"model_name": "embstore", "model_version": release, "outputs": outputs}
    if release:
        document["parameters"] = {"release": release}
    head = json.dumps(document).encode() + extra
    given = {"content-type": "application/octet-stream", "inference-header-content-length": str(len(head))}
    return Reply(200, given | headers, head + b"".join(buffers))


def carry(plan: Any, send: Callable[[Request[Any]], Reply], rounds: int = 2) -> Any:
    """What a plan comes to; at most two rounds of requests."""
    for _ in range(rounds):
        plan = plan.merge([request.parse(send(request)) for request in plan.requests])
        if not isinstance(plan, Plan):
            return plan
    raise AssertionError(f"not done after {rounds} rounds")


def _elements(datatype: str, data: bytes) -> list[Any]:
    if datatype != "BYTES":
        return np.frombuffer(data, {"INT64": "<i8", "FP32": "<f4"}[datatype]).tolist()
    keys, at = [], 0
    while at < len(data):
        (size,) = struct.unpack_from("<I", data, at)
        keys.append(data[at + 4 : at + 4 + size].decode())
        at += 4 + size
    return keys
