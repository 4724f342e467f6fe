"""What an HTTP lookup costs here: protocols, sizes, distributions, caches, idle and while a version is swapped in.

`python tests/bench/http_figures.py [--json] [--seconds 3]`

The server has one core and the generator another. For each row a closed loop of 8 connections finds what the server
can do without a cache (requests/s); then requests come as a Poisson process, 500 a second or at half of what the server
can do, whichever is less, and p50 / p99 of the latency from when each was due are shown: idle; while the table's label
goes to and fro between two versions, twice a second, each loaded, verified and swapped in; with the cache on and
empty (cold), and on and filled (hot). Ids are Zipf 1.05 or uniform. A star: generator lag.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from machine import show

import embstore
from embstore.bench.processes import on_cores, serving
from embstore.schemes import DHE
from loadtest.results.result import Result
from loadtest.run import worker_pool
from loadtest.run.session import load_test
from loadtest.scenario.model import Batch, Event, IdDistribution, Phase, RequestSpec, Scenario

NUM, DHE_NUM, DIM, DHE_BYTES = 200_000, 50_000, 64, 2 << 20
IDS = {"item": NUM, "dhe": DHE_NUM}
SIZES = (10, 100, 1_000, 4_096)
CONNECTIONS, HALF, RATE = 8, 0.5, 500.0
SWAP_SECONDS = 0.5


def scenario(url: str, table: str, protocol: str, size: int, keys: str, **options: Any) -> Scenario:
    """Lookups of one kind."""
    which = IdDistribution(kind="uniform") if keys == "uniform" else IdDistribution(kind="zipf", exponent=1.05)
    spec = RequestSpec(tables=(table,), protocol=protocol, batch=Batch(size=size), ids=which)  # type: ignore[arg-type]
    return Scenario(url=url, engine="raw", requests=(spec,), timeout=10, scrape=False, **options)


def capacity(url: str, *what: Any, seconds: float) -> float:
    """Replies a second that a closed loop gets."""
    phases = (Phase(seconds=0.5, warmup=True), Phase(seconds=seconds))
    run = worker_pool.run(scenario(url, *what, mode="closed", connections=CONNECTIONS, phases=phases), num_ids=IDS)
    _check(run)
    return run.total().ok / run.seconds


def at_rate(url: str, *what: Any, peak: float, seconds: float, events: tuple[Event, ...] = ()) -> Result:
    """Requests when they are due, of which the server can do `peak` a second; the first ones count too."""
    phases = (Phase(seconds=seconds, rate=min(HALF * peak, RATE)),)
    asked = scenario(url, *what, connections=64, phases=phases, events=events)
    run = load_test(asked, stop=threading.Event(), num_ids=IDS)
    _check(run)
    assert all(mark.ok for mark in run.marks), run.marks
    return run


def _check(run: Result) -> None:
    total = run.total()
    assert total.ok, "no request was answered"
    assert not total.failures, total.failures


def times(run: Result) -> str:
    """p50 / p99 of the latency in microseconds; a star where generator lag."""
    latency = run.total().latency
    return f"{latency.percentile(50) / 1e3:,.0f} / {latency.percentile(99) / 1e3:,.0f}{'*' * bool(run.invalid)}"


def forget(url: str, table: str) -> None:
    """Make the cache of a table cold: take it out of service and in again."""
    for call in ("unload", "load"):
        httpx.post(f"{url}/v2/repository/models/{table}/{call}", timeout=60).raise_for_status()


def swaps(store: Path, table: str, seconds: float) -> tuple[Event, ...]:
    """The label moves to the other of two versions again and again."""
    return tuple(
        Event(
            at=SWAP_SECONDS * (number + 0.5),
            kind="promote",
            store=str(store),
            table=table,
            label="latest",
            version=str(1 + number % 2),
        )
        for number in range(int(seconds / SWAP_SECONDS))
    )


@contextmanager
def server(store: Path, cache: str) -> Iterator[str]:
    """A server on the first core."""
    cores = sorted(os.sched_getaffinity(0))
    command = ["embstore", "serve", "--store", str(store), "--port", "0", "--cache", cache, "--poll-seconds", "0.2"]
    with serving([*command, "--keep-versions", "1"], store.parent / f"log-{cache}", cores[:1]) as running:
        yield running.url


def measure(folder: Path, seconds: float) -> list[dict[str, Any]]:
    """Every row."""
    store = embstore.open_store(folder / "store")
    for _ in range(2):
        store.publish("item", np.random.default_rng(0).standard_normal((NUM, DIM), dtype=np.float32))
        store.publish("dhe", DHE.from_budget(DHE_NUM, DIM, DHE_BYTES))
    protocols, distributions = ("octet", "json", "infer"), ("zipf", "uniform")
    combinations = [("item", p, size, keys) for p in protocols for size in SIZES for keys in distributions]
    combinations += [("dhe", "octet", size, "zipf") for size in SIZES]
    rows: dict[Any, dict[str, Any]] = {
        what: dict(zip(("table", "protocol", "ids", "ids"), what, strict=True)) for what in combinations
    }
    peaks = {}
    with server(folder / "store", "off") as url:
        for what, row in rows.items():
            peak = peaks[what] = capacity(url, *what, seconds=seconds / 2)
            events = swaps(folder / "store", what[0], seconds)
            row["requests/s"] = f"{peak:,.0f}"
            row["idle us"] = times(at_rate(url, *what, peak=peak, seconds=seconds))
            row["swap us"] = times(at_rate(url, *what, peak=peak, seconds=seconds, events=events))
            sys.stderr.write(f"{row}\n")
    with server(folder / "store", "on") as url:
        for what, row in rows.items():
            forget(url, what[0])
            row["cold us"] = times(at_rate(url, *what, peak=peaks[what], seconds=seconds))
            row["hot requests/s"] = f"{capacity(url, *what, seconds=seconds / 2):,.0f}"
            row["hot us"] = times(at_rate(url, *what, peak=peaks[what], seconds=seconds))
            sys.stderr.write(f"{row}\n")
    return list(rows.values())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seconds", type=float, default=3.0)
    asked = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder, on_cores(cores[1:] or cores):
        rows = measure(Path(folder), asked.seconds)
    show("HTTP lookups of 64 floats", rows, as_json=asked.json)


if __name__ == "__main__":
    main()
