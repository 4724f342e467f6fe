"""Requests as production sends them: long-tailed ids, the same for the same seed, as complete bytes of HTTP/1.1."""

# Shapes: R requests, B ids in each.

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtest.scenario.model import Keys
from loadtest.workload.ids import key_stream


def zipf_ids(
    num_ids: int, num_requests: int, ids_per_request: int, *, exponent: float = 1.05, seed: int = 0
) -> NDArray[np.int64]:
    """Ids [R, B] in `[0, num_ids)`: the k-th most frequent with probability ~ k ** -exponent, in no spatial order."""
    if num_ids < 1 or num_requests < 0 or ids_per_request < 0 or exponent < 0:
        raise ValueError("sizes must not be negative, num_ids at least 1, the exponent not below 0")
    keys = key_stream(Keys(kind="zipf", exponent=exponent), num_ids, seed)
    return keys.draw(num_requests * ids_per_request, 0.0).reshape(num_requests, ids_per_request)


def get_request(host: str, path: str) -> bytes:
    """A GET without a body."""
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()


def post_request(host: str, path: str, body: bytes, content_type: str, *headers: str) -> bytes:
    """A POST; `headers` are whole lines without their end."""
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", f"Content-Type: {content_type}", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def octet_requests(host: str, path: str, ids_RB: NDArray[np.int64]) -> list[bytes]:
    """Lookups whose body is nothing but little-endian int64 ids."""
    return [post_request(host, path, ids.astype("<i8").tobytes(), "application/octet-stream") for ids in ids_RB]


def json_requests(host: str, path: str, ids_RB: NDArray[np.int64]) -> list[bytes]:
    """Lookups in JSON."""
    bodies = [json_bytes({"ids": ids.tolist()}) for ids in ids_RB]
    return [post_request(host, path, body, "application/json") for body in bodies]


def infer_requests(host: str, path: str, ids_RB: NDArray[np.int64]) -> list[bytes]:
    """Inference calls of the Open Inference Protocol with binary tensors both ways."""
    made = []
    for ids in ids_RB:
        body, head_size = infer_body({"ids": ids}, ("embeddings",))
        size = f"Inference-Header-Content-Length: {head_size}"
        made.append(post_request(host, path, body, "application/octet-stream", size))
    return made


def json_bytes(value: Any) -> bytes:
    """JSON without spaces."""
    return json.dumps(value, separators=(",", ":")).encode()


def infer_body(
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
    asked = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
    head = json_bytes({"inputs": tensors, "outputs": asked} | ({"parameters": dict(parameters)} if parameters else {}))
    return b"".join((head, *raw.values())), len(head)


def _tensor_bytes(ids_B: NDArray[Any]) -> bytes:
    """Little-endian integers, or strings that each follow their length in 4 bytes."""
    if ids_B.dtype != object:
        return ids_B.astype("<i8", copy=False).tobytes()
    encoded = [text.encode() for text in ids_B.tolist()]
    return b"".join(len(data).to_bytes(4, "little") + data for data in encoded)


def write_requests(path: Path, requests: Iterable[bytes]) -> None:
    """A file of requests one after the other, and `<file>.sizes` with a line for the length of each."""
    with path.open("wb") as file, _sizes(path).open("w") as sizes:
        for request in requests:
            file.write(request)
            sizes.write(f"{len(request)}\n")


def read_requests(path: Path) -> list[bytes]:
    """What `write_requests` wrote."""
    with path.open("rb") as file:
        return [file.read(int(line)) for line in _sizes(path).read_text().splitlines()]


def _sizes(path: Path) -> Path:
    return path.with_name(path.name + ".sizes")
