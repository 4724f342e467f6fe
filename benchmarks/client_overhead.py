"""What the Python client costs over bare httpx: the same lookups of 1,000 ids x 64 through both, in turns.

    python -m benchmarks.client_overhead [--rounds 100] [--calls 10] [--json]

A round is some calls of one kind, then as many of each other kind; a kind's round is compared with bare httpx's round
beside it, so that a busy machine slows both. Bare httpx posts the ids and makes an array of the body: what one would
write without the client, with none of its checks.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from inspect import isawaitable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import typer
from embstore_client import AsyncEmbeddingClient, EmbeddingClient, Hedge
from numpy.typing import NDArray

import embstore
from benchmarks.processes import serving
from benchmarks.show import Row, show

NUM, DIM, IDS = 100_000, 64, 1_000
PATH = "/v1/tables/item/lookup"
HEADERS = {"content-type": "application/octet-stream", "accept": "application/octet-stream"}
BARE = "bare httpx"

Call = Callable[[], object]
"""A lookup; of the clients for asyncio what it gives is awaited."""
Seconds = tuple[float, float]
"""Of a call: by the clock, and of this process's CPU time, which a busy machine disturbs less."""


async def seconds_a_call(call: Call, calls: int) -> Seconds:
    """Means of a round."""
    begin, cpu_begin = time.perf_counter(), time.process_time()
    for _ in range(calls):
        given = call()
        if isawaitable(given):
            await given
    return (time.perf_counter() - begin) / calls, (time.process_time() - cpu_begin) / calls


async def take_turns(kinds: Mapping[str, Call], rounds: int, calls: int) -> dict[str, list[Seconds]]:
    """Seconds a call of each kind, one figure a round; the first round warms up."""
    figures: dict[str, list[Seconds]] = {kind: [] for kind in kinds}
    for _ in range(1 + rounds):
        for kind, call in kinds.items():
            figures[kind].append(await seconds_a_call(call, calls))
    return {kind: found[1:] for kind, found in figures.items()}


def vectors_of(reply: httpx.Response) -> NDArray[np.float32]:
    """A reply's body as an array."""
    return np.frombuffer(reply.raise_for_status().content, np.float32).reshape(-1, DIM)


async def measure(url: str, ids: NDArray[np.int64], rounds: int, calls: int) -> list[Row]:
    """The blocking clients, then those for asyncio."""
    post: dict[str, Any] = {"url": PATH, "content": ids.tobytes(), "headers": HEADERS}
    with httpx.Client(base_url=url) as bare, EmbeddingClient(url) as client, EmbeddingClient(url, hedge=Hedge()) as two:
        kinds: dict[str, Call] = {BARE: lambda: vectors_of(bare.post(**post))}
        kinds |= {"client": lambda: client.lookup("item", ids), "client, hedged": lambda: two.lookup("item", ids)}
        blocking = await take_turns(kinds, rounds, calls)
    async with (
        httpx.AsyncClient(base_url=url) as bare_later,
        AsyncEmbeddingClient(url) as later,
        AsyncEmbeddingClient(url, hedge=Hedge()) as later_two,
    ):

        async def by_hand() -> object:
            return vectors_of(await bare_later.post(**post))

        kinds = {BARE: by_hand, "client": lambda: later.lookup("item", ids)}
        kinds["client, hedged"] = lambda: later_two.lookup("item", ids)
        waiting = await take_turns(kinds, rounds, calls)
    return [*rows_of("sync", blocking), *rows_of("async", waiting)]


def rows_of(api: str, figures: Mapping[str, list[Seconds]]) -> list[Row]:
    """A row a kind: microseconds a call, and the ratio to bare httpx's, median and quartiles."""
    rows: list[Row] = []
    for kind, rounds in figures.items():
        row: Row = {"api": api, "what": kind}
        for i, clock in enumerate(("wall", "cpu")):
            ratios = [mine[i] / max(bare[i], 1e-9) for mine, bare in zip(rounds, figures[BARE], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            row[f"{clock} us"] = round(statistics.median(seconds[i] for seconds in rounds) * 1e6)
            row[f"{clock}, over bare httpx"] = f"{middle:.3f} ({low:.3f} .. {high:.3f})"
        rows.append(row)
    return rows


def main(rounds: int = 100, calls: int = 10, json: bool = False) -> None:
    """What the Python client costs over bare httpx."""
    random = np.random.default_rng(0)
    ids = random.integers(0, NUM, IDS)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        embstore.open_store(store).publish("item", random.standard_normal((NUM, DIM), np.float32))
        command = ("embstore", "serve", "--store", str(store), "--port", "0")
        with serving(command, Path(folder) / "log") as server:
            rows = asyncio.run(measure(server.url, ids, max(2, rounds), calls))
    show({f"Client over bare httpx, {IDS} ids x {DIM}, octets": rows}, as_json=json)


if __name__ == "__main__":
    typer.run(main)
