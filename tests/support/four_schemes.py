"""A server of four schemes, each under all three kinds of ids, and what its vectors must be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

import embstore
from embstore.schemes import QR, Full, Hash, MEmCom
from embstore.schemes.base import Scheme
from support.serving import ServerProcess, serving

NUM, DIM = 500, 24
OCTETS = {"Content-Type": "application/octet-stream"}


def _modules() -> dict[str, Scheme]:
    generator = torch.Generator().manual_seed(7)
    memcom = MEmCom(NUM, DIM, num_buckets=60, bias=True, generator=generator)
    memcom.scale_bias.data.normal_(0.5, 0.3, generator=generator)
    return {
        "full": Full(NUM, DIM, generator=generator),
        "hash": Hash(NUM, DIM, num_buckets=50, seed=3, generator=generator),
        "qr": QR(NUM, DIM, num_buckets=40, generator=generator),
        "memcom": memcom,
    }


MODULES = _modules()
SPARSE_IDS = [(-1) ** row * (row * 0x9E3779B97F4A7C15 % (1 << 62)) for row in range(NUM)]
NAMES = [f"sku-{row:x}" if row else "" for row in range(NUM)]
KEYS: dict[str, list[Any]] = {"dense": list(range(NUM)), "int64": SPARSE_IDS, "string": NAMES}


@contextmanager
def four_schemes(folder: Path) -> Iterator[ServerProcess]:
    """All four schemes, each under all three kinds of ids, published as one release."""
    store = embstore.open_store(folder / "store")
    store.publish_release(
        {
            f"{scheme}-{kind}": embstore.Publication(module, ids=None if kind == "dense" else keys)
            for scheme, module in MODULES.items()
            for kind, keys in KEYS.items()
        }
    )
    with serving(folder / "store", folder / "log") as running:
        yield running


def expected(scheme: str, rows: Any) -> np.ndarray:
    """What the trainer's module says."""
    with torch.no_grad():
        return MODULES[scheme](torch.as_tensor(rows)).numpy()


def post(server: ServerProcess, table: str, body: Any, **headers: str) -> httpx.Response:
    """A JSON lookup."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(
        f"{server.url}/v1/tables/{table}/lookup",
        content=content,
        headers={"Content-Type": "application/json"} | headers,
        timeout=30,
    )
