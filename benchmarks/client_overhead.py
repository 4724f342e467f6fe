"""What the Python client costs over bare httpx: the same lookups of 1,000 ids x 64 through both, in turns.

`python tests/bench/client_overhead.py [--json] [--rounds 100] [--calls 10]`

A round is some calls of one kind, then as many of each other kind; what is compared is a kind's round with bare
httpx's round beside it, so that a busy machine slows both. Bare httpx posts the ids and makes an array of the body:
what one would write without the client, with none of its checks.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import numpy as np
from machine import show

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from embstore_client import AsyncEmbeddingClient, EmbeddingClient, Hedge
from support.serving import serving

import embstore

NUM, DIM, IDS = 100_000, 64, 1_000
PATH = "/v1/tables/item/lookup"
HEADERS = {"content-type": "application/octet-stream", "accept": "application/octet-stream"}


Seconds = tuple[float, float]
"""Of a call: by the clock, and of this process's CPU time, which a busy machine disturbs less."""


def seconds_of(call: Callable[[], object], calls: int) -> Seconds:
    """Means of a round."""
    begin, cpu_begin = time.perf_counter(), time.process_time()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls, (time.process_time() - cpu_begin) / calls


async def async_seconds_of(call: Callable[[], Awaitable[object]], calls: int) -> Seconds:
    """Means of a round."""
    begin, cpu_begin = time.perf_counter(), time.process_time()
    for _ in range(calls):
        await call()
    return (time.perf_counter() - begin) / calls, (time.process_time() - cpu_begin) / calls


def sync_rounds(url: str, ids: np.ndarray, rounds: int, calls: int) -> dict[str, list[Seconds]]:
    """Seconds a call, one figure a round."""
    with (
        httpx.Client(base_url=url, timeout=10) as bare,
        EmbeddingClient(url, timeout_s=10) as client,
        EmbeddingClient(url, timeout_s=10, hedge=Hedge()) as hedged,
    ):

        def by_hand() -> np.ndarray:
            reply = bare.post(PATH, content=ids.tobytes(), headers=HEADERS).raise_for_status()
            return np.frombuffer(reply.content, np.float32).reshape(-1, DIM)

        kinds = {
            "bare httpx": by_hand,
            "client": lambda: client.lookup("item", ids),
            "client, hedged": lambda: hedged.lookup("item", ids),
        }
        for call in kinds.values():
            seconds_of(call, calls)
        figures: dict[str, list[Seconds]] = {kind: [] for kind in kinds}
        for _ in range(rounds):
            for kind, call in kinds.items():
                figures[kind].append(seconds_of(call, calls))
    return figures


async def async_rounds(url: str, ids: np.ndarray, rounds: int, calls: int) -> dict[str, list[Seconds]]:
    """Seconds a call, one figure a round."""
    async with (
        httpx.AsyncClient(base_url=url, timeout=10) as bare,
        AsyncEmbeddingClient(url, timeout_s=10) as client,
        AsyncEmbeddingClient(url, timeout_s=10, hedge=Hedge()) as hedged,
    ):

        async def by_hand() -> np.ndarray:
            reply = (await bare.post(PATH, content=ids.tobytes(), headers=HEADERS)).raise_for_status()
            return np.frombuffer(reply.content, np.float32).reshape(-1, DIM)

        kinds: dict[str, Callable[[], Awaitable[object]]] = {
            "bare httpx": by_hand,
            "client": lambda: client.lookup("item", ids),
            "client, hedged": lambda: hedged.lookup("item", ids),
        }
        for call in kinds.values():
            await async_seconds_of(call, calls)
        figures: dict[str, list[Seconds]] = {kind: [] for kind in kinds}
        for _ in range(rounds):
            for kind, call in kinds.items():
                figures[kind].append(await async_seconds_of(call, calls))
    return figures


def rows_of(shell: str, figures: dict[str, list[Seconds]]) -> list[dict[str, object]]:
    """A row a kind: microseconds a call, and how often bare httpx's, in the middle and at the quartiles."""
    rows: list[dict[str, object]] = []
    for kind, rounds in figures.items():
        row: dict[str, object] = {"shell": shell, "what": kind}
        for i, clock in enumerate(("wall", "cpu")):
            ratios = [mine[i] / bare[i] for mine, bare in zip(rounds, figures["bare httpx"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            row[f"{clock} us"] = round(statistics.median(seconds[i] for seconds in rounds) * 1e6)
            row[f"{clock}, over bare httpx"] = f"{middle:.3f} ({low:.3f} .. {high:.3f})"
        rows.append(row)
    return rows


def main() -> None:
    """Publish a table, serve it, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--calls", type=int, default=10)
    options = parser.parse_args()
    random = np.random.default_rng(0)
    ids = random.integers(0, NUM, IDS)
    with tempfile.TemporaryDirectory() as name:
        embstore.open_store(f"{name}/store").publish("item", random.standard_normal((NUM, DIM), np.float32))
        with serving(Path(name) / "store", Path(name) / "log") as server:
            figures = sync_rounds(server.url, ids, options.rounds, options.calls)
            async_figures = asyncio.run(async_rounds(server.url, ids, options.rounds, options.calls))
    rows = [*rows_of("sync", figures), *rows_of("async", async_figures)]
    show(f"Client over bare httpx, {IDS} ids x {DIM}, octets", rows, as_json=options.json)


if __name__ == "__main__":
    main()
