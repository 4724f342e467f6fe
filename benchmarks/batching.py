"""Lookups joined into one launch against each by itself, on the event loop or in a pool of threads; no HTTP.

`python tests/bench/join.py [--seconds 1] [--clients 16] [--device cpu] [--json]`

16 clients of one event loop ask for 10, 100 or 1,000 uniform ids each, again and again. Then what telling ids of a
joined batch apart costs and saves: eight requests of 1,000 ids, popular ones more often (Zipf, exponent 1.05).
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from machine import show

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import embstore
from embstore import schemes
from embstore.parallel import num_cores
from embstore.table import Fetched, Table
from server.lookup.batcher import DynamicBatcher, batching_pays, compose_batch

NUM, DIM = 200_000, 64
Way = Callable[[Any], Awaitable[Fetched]]


def tables(folder: Path, device: str) -> dict[str, Table]:
    """A plain table, one that reads two rows an id, one that computes a lot."""
    modules = {
        "full": schemes.Full(NUM, DIM),
        "qr": schemes.QR(NUM, DIM, num_buckets=2_000),
        "dhe": schemes.DHE(NUM, DIM, num_hashes=128, hidden=(128, 128)).eval(),
    }
    store = embstore.open_store(folder)
    for name, module in modules.items():
        store.publish(name, module)
    return {name: store.load(name, device=device, num_threads=1) for name in modules}


async def lookups_a_second(way: Way, batches: list[Any], clients: int, seconds: float) -> tuple[float, float]:
    """How many there were, and the 99th percentile of what one took, in milliseconds."""
    took: list[float] = []
    end = time.perf_counter() + seconds

    async def client(at: int) -> None:
        while (begin := time.perf_counter()) < end:
            await way(batches[at % len(batches)])
            took.append(time.perf_counter() - begin)
            at += 1

    begin = time.perf_counter()
    await asyncio.gather(*(client(17 * n) for n in range(clients)))
    return len(took) / (time.perf_counter() - begin), 1e3 * float(np.quantile(took, 0.99))


class Requests:
    """Counts requests of a launch."""

    def __init__(self) -> None:
        self.num_requests: list[int] = []

    def count_batch(self, num_requests: int, num_ids: int) -> None:  # noqa: ARG002
        self.num_requests.append(num_requests)


async def compare(name: str, table: Table, num_ids: int, clients: int, seconds: float) -> dict[str, Any]:
    """One row: lookups a second inline, and the other ways' as ratios to it."""
    random = np.random.default_rng(1)
    batches = [random.integers(0, NUM, num_ids) for _ in range(64)]
    requests, pool = Requests(), ThreadPoolExecutor(num_cores())
    batcher, loop = DynamicBatcher(lookups=requests), asyncio.get_running_loop()

    async def inline(ids: Any) -> Fetched:
        await asyncio.sleep(0)
        return table.fetch(ids)

    ways: dict[str, Way] = {
        "inline": inline,
        "joined": lambda ids: batcher.fetch(table, ids, "zero"),
        "threads": lambda ids: loop.run_in_executor(pool, table.fetch, ids),
    }
    rates: dict[str, list[float]] = {way: [] for way in ways}
    slowest: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(3):  # in turns: what else the machine does hits all alike
        for way, fetch in ways.items():
            rate, p99_ms = await lookups_a_second(fetch, batches, clients, seconds / 3)
            rates[way].append(rate)
            slowest[way].append(p99_ms)
    batcher.close()
    pool.shutdown()
    base = statistics.median(rates["inline"])
    return {
        "table": name,
        "ids": num_ids,
        "inline/s": f"{base:,.0f}",
        "joined": f"{statistics.median(rates['joined']) / base:.2f}",
        "threads": f"{statistics.median(rates['threads']) / base:.2f}",
        "p99 ms inline, joined, threads": ", ".join(f"{statistics.median(slowest[way]):.2f}" for way in ways),
        "requests a launch": f"{statistics.mean(requests.num_requests or [0]):.1f}",
    }


def telling_apart(name: str, table: Table) -> dict[str, Any]:
    """One row: a joined batch as it is, and with every id composed once."""
    random = np.random.default_rng(2)
    weights = np.arange(1, NUM + 1) ** -1.05
    parts = [(random.choice(NUM, 1000, p=weights / weights.sum()), np.empty((1000, DIM), np.float32)) for _ in range(8)]
    rows_S = np.concatenate([rows_B for rows_B, _ in parts])
    num_unique = len(np.unique(rows_S))

    def once() -> None:
        unique_U, at_S = np.unique(rows_S, return_inverse=True)
        vectors_UD = np.empty((len(unique_U), DIM), np.float32)
        compose_batch(table, [(unique_U, vectors_UD)])
        for n, (_, vectors_BD) in enumerate(parts):
            np.take(vectors_UD, at_S[1000 * n : 1000 * (n + 1)], axis=0, out=vectors_BD, mode="clip")

    all_us, once_us = median_us(lambda: compose_batch(table, parts)), median_us(once)
    return {
        "table": name,
        "ids": len(rows_S),
        "distinct": num_unique,
        "all us": f"{all_us:,.0f}",
        "each once us": f"{once_us:,.0f}",
        "ratio": f"{once_us / all_us:.2f}",
    }


def median_us(work: Callable[[], None]) -> float:
    """Microseconds, of 21 calls."""
    took = []
    for _ in range(21):
        begin = time.perf_counter()
        work()
        took.append(time.perf_counter() - begin)
    return 1e6 * statistics.median(took)


def main() -> None:
    """Publish, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each way, table and size")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        loaded = tables(Path(folder) / "store", given.device)
        rows = [
            uvloop.run(compare(name, table, num_ids, given.clients, given.seconds))
            for name, table in loaded.items()
            for num_ids in (10, 100, 1000)
        ]
        show("Joined lookups, times those of inline ones", rows, as_json=given.json)
        show("Ids of a joined batch told apart", [telling_apart(*one) for one in loaded.items()], as_json=given.json)
        pays = [{"table": name, "joining pays": batching_pays(table)} for name, table in loaded.items()]
        show("One launch of 2 x 1,000 ids against two", pays, as_json=given.json)


if __name__ == "__main__":
    main()
