"""A gigabyte served: seconds from process start to ready, and the memory that a second server adds.

python -m benchmarks.startup [--num 4000000] [--rounds 5] [--json]
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import typer
from embstore_client import EmbeddingClient

import embstore
from benchmarks.processes import serving
from benchmarks.show import Row, show

DIM = 64


def main(num: int = 4_000_000, rounds: int = 5, json: bool = False) -> None:
    """Start-up time and memory of a server over one large table."""
    with tempfile.TemporaryDirectory() as name:
        store = Path(name) / "store"
        embstore.open_store(store).publish("big", np.random.default_rng(0).standard_normal((num, DIM), np.float32))
        command = ("embstore", "serve", "--store", str(store), "--port", "0", "--log-level", "info")
        seconds = []
        for _ in range(1 + rounds):  # the first one brings the files into memory
            begin = time.perf_counter()
            with serving(command, Path(name) / "log"):
                seconds.append(time.perf_counter() - begin)
        with serving(command, Path(name) / "log-1") as first, serving(command, Path(name) / "log-2") as second:
            for server in (first, second):
                with EmbeddingClient(server.url, timeout_s=60) as client:
                    for start in range(0, num, 40_000):
                        client.lookup("big", np.arange(start, min(start + 40_000, num)))
            shared, own = second.resident_mb(), sum(second.private_mb())
    rows: list[Row] = [
        {"what": "seconds to ready, median", "value": round(statistics.median(seconds[1:]), 2)},
        {"what": "least and most", "value": f"{min(seconds[1:]):.2f} .. {max(seconds[1:]):.2f}"},
        {"what": "second server, resident MiB with shared pages", "value": round(shared)},
        {"what": "second server, MiB of its own", "value": round(own)},
    ]
    show({f"A table of {4 * DIM * num / 1e9:.2f} GB": rows}, as_json=json)


if __name__ == "__main__":
    typer.run(main)
