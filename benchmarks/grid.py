"""What an HTTP lookup costs by protocol, size and distribution, idle and under what happens to a server.

For each combination a closed loop of 8 connections finds what the server can do without a cache (requests/s); then
requests come as a Poisson process, 500 a second or at half of what the server can do, whichever is less, and p50 / p99
of the latency from when each was due are shown: idle; while the table's label goes to and fro between two versions,
twice a second, each loaded, verified and swapped in; with the cache on and empty (cold), and on and filled (hot).
A star: the generator was late itself, so the figures are upper bounds.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import httpx

from benchmarks.load import Target, at_rate, percentiles, requests_per_s
from benchmarks.servers import Servers
from benchmarks.show import Row
from loadtest.scenario.model import Event, Protocol

Combination = tuple[str, Protocol, int, Literal["zipf", "uniform"]]
"""Table, protocol, ids of a request, distribution of ids."""
SIZES = (10, 100, 1_000, 4_096)
PROTOCOLS: tuple[Protocol, ...] = ("octet", "json", "infer")
COMBINATIONS: tuple[Combination, ...] = (
    *(("full", protocol, size, ids) for protocol in PROTOCOLS for size in SIZES for ids in ("zipf", "uniform")),
    *(("dhe", "octet", size, "zipf") for size in SIZES),
)
RATE, SWAP_SECONDS = 500.0, 0.5


def grid(servers: Servers, combinations: tuple[Combination, ...] = COMBINATIONS) -> list[Row]:
    """A row a combination; tables are those that `servers` publishes."""
    flags, seconds = ("--keep-versions", "1", "--poll-seconds", "0.2"), servers.seconds
    found: list[tuple[Target, float, Row]] = []
    with servers.started("--cache", "off", *flags) as server:
        for table, protocol, size, distribution in combinations:
            target = servers.target(table, size, server=server, protocol=protocol, distribution=distribution)
            row: Row = {"table": table, "protocol": protocol, "ids": size, "distribution": distribution}
            peak = requests_per_s(target, seconds / 2)
            rate, events = min(RATE, peak / 2), swaps(servers.store, table, seconds)
            row["requests/s"] = round(peak)
            row["idle us"] = percentiles(at_rate(target, rate, seconds))
            row["swap us"] = percentiles(at_rate(target, rate, seconds, events=events))
            found.append((target, rate, row))
    with servers.started("--cache", "on", *flags) as server:
        for target, rate, row in found:
            cached = replace(target, url=server.url)
            forget(server.url, target.table)
            row["cold us"] = percentiles(at_rate(cached, rate, seconds))
            row["hot requests/s"] = round(requests_per_s(cached, seconds / 2))
            row["hot us"] = percentiles(at_rate(cached, rate, seconds))
    return [row for _, _, row in found]


def forget(url: str, table: str) -> None:
    """Make the cache of a table cold: take it out of service and in again."""
    for call in ("unload", "load"):
        httpx.post(f"{url}/v2/repository/models/{table}/{call}", timeout=60).raise_for_status()


def swaps(store: Path, table: str, seconds: float) -> tuple[Event, ...]:
    """The label moves to the other of two versions again and again."""
    moves = {"kind": "promote", "store": str(store), "table": table, "label": "latest"}
    times = [SWAP_SECONDS * (number + 0.5) for number in range(int(seconds / SWAP_SECONDS))]
    return tuple(Event(at=at, version=str(1 + number % 2), **moves) for number, at in enumerate(times))  # type: ignore[arg-type]
