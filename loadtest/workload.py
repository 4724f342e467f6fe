"""Requests as production sends them: long-tailed ids, the same for the same seed, as complete bytes of HTTP/1.1."""

# Shapes: R requests, B ids in each.

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def zipf_ids(
    num_ids: int, num_requests: int, ids_per_request: int, *, exponent: float = 1.05, seed: int = 0
) -> NDArray[np.int64]:
    """Ids [R, B] in `[0, num_ids)`: the k-th most frequent with probability ~ k ** -exponent, in no spatial order."""
    if num_ids < 1 or num_requests < 0 or ids_per_request < 0 or exponent < 0:
        raise ValueError("sizes must not be negative, num_ids at least 1, the exponent not below 0")
    generator = np.random.default_rng(seed)
    shares = np.cumsum(np.arange(1, num_ids + 1, dtype=np.float64) ** -exponent)
    ranks = np.searchsorted(shares / shares[-1], generator.random((num_requests, ids_per_request)))
    scattered = generator.permutation(num_ids)
    return scattered[np.minimum(ranks, num_ids - 1)].astype(np.int64)


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
    bodies = [json.dumps({"ids": ids.tolist()}, separators=(",", ":")).encode() for ids in ids_RB]
    return [post_request(host, path, body, "application/json") for body in bodies]


def infer_requests(host: str, path: str, ids_RB: NDArray[np.int64]) -> list[bytes]:
    """Inference calls of the Open Inference Protocol with binary tensors both ways."""
    made = []
    for ids in ids_RB:
        raw = ids.astype("<i8").tobytes()
        tensor = {
            "name": "ids",
            "shape": [len(ids)],
            "datatype": "INT64",
            "parameters": {"binary_data_size": len(raw)},
        }
        asked = {"name": "embeddings", "parameters": {"binary_data": True}}
        head = json.dumps({"inputs": [tensor], "outputs": [asked]}, separators=(",", ":")).encode()
        size = f"Inference-Header-Content-Length: {len(head)}"
        made.append(post_request(host, path, head + raw, "application/octet-stream", size))
    return made


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
