"""Lookups joined into one launch against each by itself, on the event loop or in a pool of threads; no HTTP.

    python -m benchmarks.batching [--seconds 1] [--clients 16] [--device cpu] [--json]

16 clients of one event loop ask for 10, 100 or 1,000 uniform ids each, again and again.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
import uvloop
from numpy.typing import NDArray

import embstore
from benchmarks.show import Row, show
from embstore import schemes
from embstore.parallel import num_cores
from embstore.table import Fetched, Table
from server.lookup.batcher import DynamicBatcher, batching_pays

NUM, DIM = 200_000, 64
Ids = NDArray[np.int64]
Way = Callable[[Ids], Awaitable[Fetched]]


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


async def lookups_a_second(way: Way, batches: list[Ids], clients: int, seconds: float) -> tuple[float, float]:
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


async def compare(name: str, table: Table, num_ids: int, clients: int, seconds: float) -> Row:
    """One row: lookups a second inline, and the other ways' as ratios to it."""
    random = np.random.default_rng(1)
    batches = [random.integers(0, NUM, num_ids) for _ in range(64)]
    requests, pool = Requests(), ThreadPoolExecutor(num_cores())
    batcher, loop = DynamicBatcher(lookups=requests), asyncio.get_running_loop()

    async def inline(ids: Ids) -> Fetched:
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


def main(
    seconds: Annotated[float, typer.Option(help="Of each way, table and size.")] = 1.0,
    clients: int = 16,
    device: str = "cpu",
    json: bool = False,
) -> None:
    """Lookups joined into one launch against each by itself."""
    with tempfile.TemporaryDirectory() as folder:
        loaded = tables(Path(folder) / "store", device)
        rows = [
            uvloop.run(compare(name, table, num_ids, clients, seconds))
            for name, table in loaded.items()
            for num_ids in (10, 100, 1000)
        ]
        found = {
            "Joined lookups, times those of inline ones": rows,
            "One launch of 2 x 1,000 ids against two": [
                {"table": name, "joining pays": batching_pays(table)} for name, table in loaded.items()
            ],
        }
    show(found, as_json=json)


if __name__ == "__main__":
    typer.run(main)
