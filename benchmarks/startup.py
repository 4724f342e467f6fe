"""A gigabyte served: seconds from process start to ready, and the memory a second server adds.

`python tests/bench/startup.py [--json]`
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np
from machine import show

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from embstore_client import EmbeddingClient
from support.serving import ServerProcess

import embstore

NUM, DIM, ROUNDS = 4_000_000, 64, 5


def ready_seconds(store: Path, port: int) -> float:
    """From the start of the process to the first 200 of /readyz."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "embstore", "serve", "--store", str(store), "--port", str(port)]
    process = subprocess.Popen([*command, "--log-level", "error"])
    try:
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=5).status_code == 200:
                    return time.perf_counter() - begin
            except httpx.TransportError:
                time.sleep(0.01)
    finally:
        process.terminate()
        process.wait()


def memory_mib(pid: int, what: str) -> float:
    """A line of smaps_rollup in MiB: Rss, Pss, Private_Clean + Private_Dirty as `Private`."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def main() -> None:
    """Publish a gigabyte, start servers, print."""
    with tempfile.TemporaryDirectory() as name:
        store = Path(name) / "store"
        embstore.open_store(store).publish("big", np.random.default_rng(0).standard_normal((NUM, DIM), np.float32))
        ready_seconds(store, 8098)
        seconds = [ready_seconds(store, 8098) for _ in range(ROUNDS)]
        servers = [ServerProcess(store, Path(name) / f"log{n}") for n in range(2)]
        for server in servers:
            server.wait_ready()
            with EmbeddingClient(server.url, timeout_s=60) as client:
                for start in range(0, NUM, NUM // 100):
                    client.lookup("big", np.arange(start, start + NUM // 100))
        second = servers[1].pid
        rows = [
            {"what": "1.02 GB table, seconds to ready, median", "value": round(statistics.median(seconds), 2)},
            {"what": "least and most", "value": f"{min(seconds):.2f} .. {max(seconds):.2f}"},
            {"what": "second server, resident MiB with shared pages", "value": round(memory_mib(second, "Rss"))},
            {"what": "second server, MiB of its own", "value": round(memory_mib(second, "Private"))},
        ]
        for server in servers:
            server.stop()
        show("A gigabyte", rows, as_json="--json" in sys.argv)


if __name__ == "__main__":
    main()
