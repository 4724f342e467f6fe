"""Requests as values that any engine can send."""

# Shapes: B ids of a table.

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import quote, urlencode

from numpy.typing import NDArray

from loadtest.errors import ScenarioError
from loadtest.scenario.model import Ask
from loadtest.workload.response_check import INFER_SIZE, JSON, MANY, OCTETS
from loadtest.workload.response_check import Expect as Expect


@dataclass(frozen=True, slots=True)
class Prepared:
    """One request, whole but for the server's address and the caller's API key.

    target: path and query, quoted; headers: in lower case, without host and content-length.
    """

    kind: str
    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    num_ids: int
    expect: Expect

    def wire(self, host: str, headers: Sequence[tuple[str, str]] = ()) -> bytes:
        """The request as bytes of HTTP/1.1; `headers` are further ones."""
        lines = [f"{self.method} {self.target} HTTP/1.1", f"host: {host}"]
        lines += [f"{name}: {value}" for name, value in (*self.headers, *headers)]
        return "\r\n".join([*lines, f"content-length: {len(self.body)}", "", ""]).encode() + self.body


def prepare(ask: Ask, ids: Sequence[NDArray[Any]]) -> Prepared:
    """A request for ids [B], one array for each table of the ask: int64, or strings as objects (not as octets)."""
    counts = tuple(len(ids_B) for ids_B in ids)
    build = {"octet": _octet, "json": _json, "infer": _infer}[ask.protocol]
    headers, body = build(ask, ids)
    return Prepared(ask.kind, "POST", _target(ask), headers, body, sum(counts), _expect(ask, counts))


@lru_cache(1024)
def _expect(ask: Ask, counts: tuple[int, ...]) -> Expect:
    pinned = ask.release if len(ask.tables) > 1 else ask.version
    return Expect(protocol=ask.protocol, tables=ask.tables, counts=counts, dtype=ask.dtype, pinned=pinned)


@lru_cache(1024)
def _target(ask: Ask) -> str:
    many, table = len(ask.tables) > 1, quote(ask.tables[0], safe="")
    if ask.protocol == "infer":
        version = ask.release if many else ask.version
        pinned = f"/versions/{quote(version, safe='')}" if version else ""
        return f"/v2/models/{MANY if many else table}{pinned}/infer"
    if many:
        return f"/v1/releases/{quote(ask.release, safe='')}/lookup" if ask.release else "/v1/lookup"
    pinned = f"/versions/{ask.version}" if ask.version else f"/labels/{quote(ask.label, safe='')}" if ask.label else ""
    query = urlencode(_options(ask)) if ask.protocol == "octet" else ""
    return f"/v1/tables/{table}{pinned}/lookup" + (f"?{query}" if query else "")


def _options(ask: Ask) -> dict[str, str]:
    """What is not as the server has it anyway."""
    defaults = {"dtype": "float32", "on_missing": "zero"}
    return {name: getattr(ask, name) for name, default in defaults.items() if getattr(ask, name) != default}


def _octet(ask: Ask, ids: Sequence[NDArray[Any]]) -> tuple[tuple[tuple[str, str], ...], bytes]:
    if ids[0].dtype == object:
        raise ScenarioError(
            f"asks: ids of {ask.tables[0]} are strings, octet carries integers: use json or infer (--protocol json)"
        )
    return (("content-type", OCTETS),), ids[0].astype("<i8", copy=False).tobytes()


def _json(ask: Ask, ids: Sequence[NDArray[Any]]) -> tuple[tuple[tuple[str, str], ...], bytes]:
    parts = [{"ids": ids_B.tolist(), **_options(ask)} for ids_B in ids]
    body = parts[0] if len(parts) == 1 else {"tables": dict(zip(ask.tables, parts, strict=True))}
    return (("content-type", JSON),), _json_bytes(body)


def _infer(ask: Ask, ids: Sequence[NDArray[Any]]) -> tuple[tuple[tuple[str, str], ...], bytes]:
    many = len(ask.tables) > 1
    inputs = dict(zip(ask.tables if many else ("ids",), ids, strict=True))
    body, head_size = _infer_body(inputs, ask.tables if many else ("embeddings",), _options(ask))
    return (("content-type", OCTETS), (INFER_SIZE, str(head_size))), body


def _infer_body(
    inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str], parameters: Mapping[str, str] | None = None
) -> tuple[bytes, int]:
    """Body of an inference call: ids [B] by input, int64 or strings, and binary outputs; and how much of it is JSON."""
    raw = {name: _tensor_bytes(ids_B) for name, ids_B in inputs.items()}
    tensors = [
        {
            "name": name,
            "shape": [len(inputs[name])],
            "datatype": "BYTES" if inputs[name].dtype == object else "INT64",
            "parameters": {"binary_data_size": len(data)},
        }
        for name, data in raw.items()
    ]
    wanted = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
    head = _json_bytes(
        {"inputs": tensors, "outputs": wanted} | ({"parameters": dict(parameters)} if parameters else {})
    )
    return b"".join((head, *raw.values())), len(head)


def _json_bytes(value: Any) -> bytes:
    """JSON without spaces."""
    return json.dumps(value, separators=(",", ":")).encode()


def _tensor_bytes(ids_B: NDArray[Any]) -> bytes:
    """Little-endian integers, or strings that each follow their length in 4 bytes."""
    if ids_B.dtype != object:
        return ids_B.astype("<i8", copy=False).tobytes()
    encoded = [text.encode() for text in ids_B.tolist()]
    return b"".join(len(data).to_bytes(4, "little") + data for data in encoded)
