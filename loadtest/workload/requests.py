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
from loadtest.scenario.model import RequestSpec
from loadtest.workload.response_check import INFER_SIZE, JSON, MANY, OCTETS, ResponseCheck


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """One request, whole but for the server's address and the caller's API key.

    target: path and query, quoted; headers: in lower case, without host and content-length.
    """

    kind: str
    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    num_ids: int
    expect: ResponseCheck

    def wire(self, host: str, headers: Sequence[tuple[str, str]] = ()) -> bytes:
        """The request as bytes of HTTP/1.1; `headers` are further ones."""
        lines = [f"{self.method} {self.target} HTTP/1.1", f"host: {host}"]
        lines += [f"{name}: {value}" for name, value in (*self.headers, *headers)]
        return "\r\n".join([*lines, f"content-length: {len(self.body)}", "", ""]).encode() + self.body


def prepare(spec: RequestSpec, ids: Sequence[NDArray[Any]]) -> PreparedRequest:
    """A request for ids [B], one array for each table of the spec: int64, or strings as objects (not as octets)."""
    counts = tuple(len(ids_B) for ids_B in ids)
    build = {"octet": _octet, "json": _json, "infer": _infer}[spec.protocol]
    headers, body = build(spec, ids)
    return PreparedRequest(spec.kind, "POST", _target(spec), headers, body, sum(counts), _expect(spec, counts))


@lru_cache(1024)
def _expect(spec: RequestSpec, counts: tuple[int, ...]) -> ResponseCheck:
    pinned = spec.release if len(spec.tables) > 1 else spec.version
    return ResponseCheck(protocol=spec.protocol, tables=spec.tables, counts=counts, dtype=spec.dtype, pinned=pinned)


@lru_cache(1024)
def _target(spec: RequestSpec) -> str:
    many, table = len(spec.tables) > 1, quote(spec.tables[0], safe="")
    if spec.protocol == "infer":
        version = spec.release if many else spec.version
        pinned = f"/versions/{quote(version, safe='')}" if version else ""
        return f"/v2/models/{MANY if many else table}{pinned}/infer"
    if many:
        return f"/v1/releases/{quote(spec.release, safe='')}/lookup" if spec.release else "/v1/lookup"
    pinned = (
        f"/versions/{spec.version}" if spec.version else f"/labels/{quote(spec.label, safe='')}" if spec.label else ""
    )
    query = urlencode(_options(spec)) if spec.protocol == "octet" else ""
    return f"/v1/tables/{table}{pinned}/lookup" + (f"?{query}" if query else "")


def _options(spec: RequestSpec) -> dict[str, str]:
    """What is not as the server has it anyway."""
    defaults = {"dtype": "float32", "on_missing": "zero"}
    return {name: getattr(spec, name) for name, default in defaults.items() if getattr(spec, name) != default}


def _octet(spec: RequestSpec, ids: Sequence[NDArray[Any]]) -> tuple[tuple[tuple[str, str], ...], bytes]:
    if ids[0].dtype == object:
        raise ScenarioError(
            f"requests: ids of {spec.tables[0]} are strings, octet carries integers: use json or infer (--protocol)"
        )
    return (("content-type", OCTETS),), ids[0].astype("<i8", copy=False).tobytes()


def _json(spec: RequestSpec, ids: Sequence[NDArray[Any]]) -> tuple[tuple[tuple[str, str], ...], bytes]:
    parts = [{"ids": ids_B.tolist(), **_options(spec)} for ids_B in ids]
    body = parts[0] if len(parts) == 1 else {"tables": dict(zip(spec.tables, parts, strict=True))}
    return (("content-type", JSON),), _json_bytes(body)


def _infer(spec: RequestSpec, ids: Sequence[NDArray[Any]]) -> tuple[tuple[tuple[str, str], ...], bytes]:
    many = len(spec.tables) > 1
    inputs = dict(zip(spec.tables if many else ("ids",), ids, strict=True))
    body, head_size = _infer_body(inputs, spec.tables if many else ("embeddings",), _options(spec))
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
