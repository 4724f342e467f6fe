"""What a server answers over HTTP, beside uvicorn that looks nothing up, on the same core.

    python -m benchmarks.serve [--rows octet-10] [--seconds 3] [--rounds 5] [--json]

The server has the first core, the generator the others. Candidates take turns, and ratios are of the same round: a
machine whose speed drifts is slow for all of them. Throughput is a closed loop of 8 connections; latency and overload
are open loops, timed from when a request was due. Ids are Zipf 1.05 where nothing else is said.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from benchmarks.grid import grid
from benchmarks.load import Target, at_rate, closed, run
from benchmarks.processes import ended_by_signals, probe
from benchmarks.servers import TABLES, Servers, Sizes, publish
from benchmarks.show import Row, show
from embstore.errors import ConfigError, EmbstoreError
from loadtest.scenario.model import Phase

OVERLOAD, OVERLOAD_CONNECTIONS, OVERLOAD_TIMEOUT_S = 3, 512, 5.0


def beside_limit(servers: Servers, batch: int, *targets: Target) -> list[Row]:
    """Targets beside the app that looks nothing up."""
    return compare(servers, [servers.limit(batch), *targets])


def octet(servers: Servers, batch: int) -> list[Row]:
    """Every table, int64 ids in, float32 rows out."""
    return beside_limit(servers, batch, *(servers.target(table, batch) for table in TABLES))


def protocols(servers: Servers, batch: int) -> list[Row]:
    """The same rows of one table by each protocol; the limit sends them as bytes."""
    targets = {name: servers.target("full", batch, protocol=name) for name in ("octet", "json", "infer")}
    return beside_limit(servers, batch, *targets.values())


def cache(servers: Servers, table: str, mode: str, *batches: int) -> list[Row]:
    """One table, cache off and in another mode."""
    rows: list[Row] = []
    with servers.started("--cache", mode) as other:
        for batch in batches:
            off = servers.target(table, batch, name="cache off")
            on = servers.target(table, batch, name=f"cache {mode}", server=other)
            rows += compare(servers, [off, on], warmup=max(1.0, servers.seconds))
    return rows


def latency(servers: Servers) -> list[Row]:
    """Percentiles at half of what the server can do, beside those of the app that looks nothing up at this rate."""
    rate = servers.saturation() / 2
    rows: list[Row] = []
    for target in (servers.limit(1_000), servers.target("full", 1_000)):
        rounds = [
            at_rate(target, rate, servers.seconds, warmup=min(1.0, servers.seconds), seed=seed)
            for seed in range(servers.rounds)
        ]
        p50, p99 = ([r.total().latency.percentile(p) / 1e3 for r in rounds] for p in (50, 99))
        row: Row = {"candidate": target.name, "requests/s": round(rate), "p50 us": round(statistics.median(p50))}
        row |= {"p99 us": round(statistics.median(p99)), "p99 us, range": f"{min(p99):,.0f} .. {max(p99):,.0f}"}
        lag = statistics.median(r.total().lag.percentile(99) for r in rounds) / 1e3
        rows.append(row | {"generator lag p99 us": round(lag), "note": "; ".join(rounds[0].invalid)})
    return rows


def workers(servers: Servers) -> list[Row]:
    """The same load on one worker and on two, all cores for both and for the load; what the second costs in memory."""
    with (
        servers.started("--workers", "1", on=servers.cores) as one,
        servers.started("--workers", "2", on=servers.cores) as two,
    ):
        names = {"1 worker": one, "2 workers": two}
        targets = [servers.target("full", 1_000, name=n, server=s, on=servers.cores) for n, s in names.items()]
        rows = compare(servers, targets)
        private = [max(one.private_mb()), min(two.private_mb()[1:] or [0.0])]
    for row, worker_mb in zip(rows, private, strict=True):
        row["private MB of a worker"] = round(worker_mb, 1)
    return rows


def overload(servers: Servers) -> list[Row]:
    """More than the server can do: what it still does, and whether its probes are answered."""
    server, target, saturation = servers.base(), servers.target("full", 1_000), servers.saturation()
    before, phases = server.resident_mb(), (Phase(seconds=servers.seconds, rate=OVERLOAD * saturation),)
    with ThreadPoolExecutor(1) as pool:
        probing = pool.submit(probe, server.url, servers.seconds + 1, target.on)  # 1: until the generator has begun
        options = {"connections": OVERLOAD_CONNECTIONS, "timeout": OVERLOAD_TIMEOUT_S}
        result = run(target, may_fail=True, phases=phases, **options)
        slowest, failed = probing.result()
    total = result.total()
    return [
        {
            "saturation, requests/s": round(saturation),
            "due": round(total.offered / result.seconds),
            "answered": round(result.goodput),
            "of saturation": round(result.goodput / saturation, 3),
            "p99 ms from due": round(total.latency.percentile(99) / 1e6, 2),
            "p99 ms from sent": round(total.service.percentile(99) / 1e6, 2),
            "refused": sum(n for status, n in total.statuses.items() if status in (429, 503)),
            "with Retry-After": total.retry_after,
            "errors": total.errors.total(),
            "slowest probe ms": round(1e3 * slowest, 2),
            "failed probes": failed,
            "RSS MB before / after": f"{before:,.0f} / {server.resident_mb():,.0f}",
            "note": "; ".join([*result.invalid, *map(str, total.errors.items())]),
        }
    ]


def compare(servers: Servers, targets: Sequence[Target], warmup: float = 1.0) -> list[Row]:
    """Requests a second of targets that take turns, and their ratio to the first in the same round.

    load: the share of a core that the generator used; near 1 it was the limit, and ratios come too close to 1.
    """
    for target in targets:
        closed(target, min(warmup, servers.seconds))
    rounds = [[closed(target, servers.seconds) for target in targets] for _ in range(servers.rounds)]
    rows: list[Row] = []
    for at, target in enumerate(targets):
        rate, ratios = statistics.median(r[at].goodput for r in rounds), [r[at].goodput / r[0].goodput for r in rounds]
        row: Row = {"candidate": target.name, "ids": target.batch, "requests/s": round(rate)}
        row |= {"ids/s": round(rate * target.batch), f"x {targets[0].name}": round(statistics.median(ratios), 3)}
        busy = statistics.median(r[at].generator.busy for r in rounds)
        rows.append(row | {"range": f"{min(ratios):.3f} .. {max(ratios):.3f}", "load": f"{busy:.0%}"})
    return rows


ROWS: dict[str, tuple[str, Callable[[Servers], list[Row]]]] = {
    "octet-10": ("every table, octets, 10 ids", lambda servers: octet(servers, 10)),
    "octet-1000": ("every table, octets, 1,000 ids", lambda servers: octet(servers, 1_000)),
    "protocols-10": ("octets, JSON, Open Inference, 10 ids", lambda servers: protocols(servers, 10)),
    "protocols-100": ("octets, JSON, Open Inference, 100 ids", lambda servers: protocols(servers, 100)),
    "protocols-1000": ("octets, JSON, Open Inference, 1,000 ids", lambda servers: protocols(servers, 1_000)),
    "dhe-cache": ("dhe, cache off and on", lambda servers: cache(servers, "dhe", "on", 1_000)),
    "auto-cache": ("full, cache off and left to the server", lambda servers: cache(servers, "full", "auto", 10, 1_000)),
    "latency": ("1,000 ids at half of saturation", latency),
    "workers": ("1 worker and 2, 1,000 ids", workers),
    "overload": ("1,000 ids at 3 times saturation", overload),
    "grid": ("latency by protocol, size and distribution: idle, while versions are swapped, cache cold and hot", grid),
}
ALL_TABLES = {"octet-10", "octet-1000", "dhe-cache", "grid"}
"""Rows that need more tables than `full`."""


def measure(names: Sequence[str], sizes: Sizes, seconds: float, rounds: int) -> dict[str, list[Row]]:
    """Tables of these names (all), by title; one that cannot be measured is a row that says why."""
    if unknown := sorted(set(names) - set(ROWS)):
        raise ConfigError(f"there is no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    if not 0.05 <= seconds <= 3600:
        raise ConfigError(f"--seconds must be between 0.05 and 3600, got {seconds:g}")
    if rounds < 1:
        raise ConfigError(f"--rounds must be at least 1, got {rounds}")
    found: dict[str, list[Row]] = {}
    with ended_by_signals(), TemporaryDirectory(prefix="embstore-bench-") as folder, ExitStack() as stack:
        servers = Servers(Path(folder), sizes, seconds, rounds, stack)
        publish(servers.store, sizes, TABLES if ALL_TABLES.intersection(names or ROWS) else ("full",))
        for name, (about, rows) in ROWS.items():
            if name not in (names or ROWS):
                continue
            sys.stderr.write(f"{name}: {about}\n")
            try:
                found[f"{name}: {about}"] = rows(servers)
            except EmbstoreError as error:
                found[f"{name}: {about}"] = [{"failed": str(error)}]
    return found


def main(
    rows: Annotated[list[str] | None, typer.Option(help="Only this row; may be repeated.")] = None,
    seconds: Annotated[float, typer.Option(help="Length of every single measurement.")] = 3,
    rounds: Annotated[int, typer.Option(help="How often the candidates take turns.")] = 5,
    num_ids: Annotated[int, typer.Option(help="Ids of the tables; dhe has 200,000 at most.")] = 2_000_000,
    dim: Annotated[int, typer.Option(help="Floats in a vector.")] = 64,
    json: bool = False,
) -> None:
    """The server on one core, load on the others: throughput, latency, caches, workers, overload."""
    sizes = Sizes(num_ids=num_ids, dim=dim, dhe_ids=min(num_ids, 200_000))
    try:
        tables = measure(rows or (), sizes, seconds, rounds)
    except EmbstoreError as error:
        sys.stderr.write(f"benchmarks.serve: {error}\n")
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    show(tables, as_json=json, about={"seconds": seconds, "rounds": rounds, "num_ids": num_ids, "dim": dim})
    if any("failed" in row for found in tables.values() for row in found):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
