"""`embstore bench serve`: what a server answers, beside uvicorn that looks nothing up, on the same core.

The server has one core, the load another. Candidates take turns, and ratios are of the same round: a machine whose
speed drifts is slow for all of them. Throughput is a closed loop of 8 connections; latency and overload are open
loops, timed from when a request was due.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embstore.bench.load import Load, Target, check, plan
from embstore.bench.processes import Server, cores, ended_by_signals, serving
from embstore.errors import ConfigError, EmbstoreError
from embstore.schemes.base import Progress

TABLES = ("full", "full_int8", "qr", "memcom", "dhe")
RATIO = 16
OVERLOAD, OVERLOAD_CONNECTIONS, OVERLOAD_TIMEOUT = 3, 512, 5.0
LATENCY_CONNECTIONS = 64
HEALTH_RATE = 20.0


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the tables and of what is asked of them."""

    num_ids: int = 2_000_000
    dim: int = 64
    dhe_ids: int = 200_000
    dhe_bytes: int = 1_000_000
    num_requests: int = 2_000


@dataclass(frozen=True, kw_only=True)
class Row:
    """One candidate of one comparison, ratios being to `against`.

    `note` says why there are no figures, or what to doubt about them.
    """

    row: str
    candidate: str
    ids: int
    against: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values, figures beside the names."""
        plain = asdict(self)
        figures: dict[str, Any] = plain.pop("figures")
        return plain | figures


def measure(
    rows: Iterable[str] = (),
    *,
    seconds: float = 3.0,
    rounds: int = 5,
    sizes: Sizes | None = None,
    tool: str = "auto",
    progress: Progress | None = None,
) -> tuple[list[Row], str]:
    """Rows of these names (all), and what made the closed loops; a row that cannot be measured says why."""
    if unknown := sorted(set(rows) - set(ROWS)):
        raise ConfigError(f"no row is called {', '.join(unknown)}; there are {', '.join(ROWS)}")
    wanted = [name for name in ROWS if name in set(rows or ROWS)]
    found: list[Row] = []
    with ended_by_signals(), TemporaryDirectory(prefix="embstore-bench-") as name, ExitStack() as stack:
        bench = Bench(Path(name), sizes or Sizes(), seconds, rounds, tool, stack)
        if progress is not None:
            progress("publishing", 0, len(wanted))
        publish(bench.store, TABLES if any(row in wanted for row in ALL_TABLES) else ("full",), bench.sizes)
        for done, row in enumerate(wanted):
            about, find = ROWS[row]
            if progress is not None:
                progress(f"{row}: {about}", done, len(wanted))
            try:
                found += find(bench)
            except EmbstoreError as error:
                found.append(Row(row=row, candidate="", ids=0, note=str(error)))
    return found, bench.load.tool


class Bench:
    """A store in a folder, servers over it, and the loads on them."""

    def __init__(self, folder: Path, sizes: Sizes, seconds: float, rounds: int, tool: str, stack: ExitStack) -> None:
        self.folder, self.store, self.stack = folder, folder / "store", stack
        self.sizes, self.seconds, self.rounds = sizes, seconds, rounds
        self.all = cores()
        self.load = Load(tool, folder, self.all[-1:])
        self.started = 0
        self.limit: Server | None = None
        self.plain: Server | None = None
        self.saturation: float | None = None
        self.drawn: dict[tuple[int, int], NDArray[np.int64]] = {}

    # what is measured

    def octet(self, ids: int) -> list[Row]:
        """Every table beside the limit."""
        server = self.base()
        targets = [self.limited(ids), *(self.target(table, server, table, "octet", ids) for table in TABLES)]
        return self.compare(f"octet-{ids}", ids, targets)

    def json(self, ids: int) -> list[Row]:
        """JSON beside the limit, which sends the vectors as bytes."""
        return self.compare(
            f"json-{ids}", ids, [self.limited(ids), self.target("json", self.base(), "full", "json", ids)]
        )

    def infer(self, ids: int) -> list[Row]:
        """The Open Inference Protocol beside the limit and the plain lookup of the same ids."""
        server = self.base()
        targets = [self.target(kind, server, "full", kind, ids) for kind in ("octet", "infer")]
        return self.compare(f"infer-{ids}", ids, [self.limited(ids), *targets])

    def dhe_cache(self) -> list[Row]:
        """The expensive scheme with its vectors computed and remembered."""
        return self.cache("dhe-cache", "dhe", "on", (1_000,))

    def auto_cache(self) -> list[Row]:
        """What it costs to leave the choice to the server where nothing is won."""
        return self.cache("auto-cache", "full", "auto", (10, 1_000))

    def cache(self, row: str, table: str, mode: str, batches: Sequence[int]) -> list[Row]:
        """One table, cache off and in another mode."""
        found: list[Row] = []
        off = self.base()
        with self.serve("--cache", mode) as server:
            for ids in batches:
                names = {"cache off": off, f"cache {mode}": server}
                targets = [self.target(name, at, table, "octet", ids) for name, at in names.items()]
                found += self.compare(row, ids, targets, warm=max(1.0, self.seconds))
        return found

    def latency(self) -> list[Row]:
        """Percentiles at half of what the server can do, and at this rate those of the app that looks nothing up."""
        target = self.target("full", self.base(), "full", "octet", 1_000)
        rate = self.saturated(target) / 2
        return [self._latency(name, rate) for name in (self.limited(1_000), target)]

    def _latency(self, target: Target, rate: float) -> Row:
        options = {"connections": LATENCY_CONNECTIONS, "rate": rate, "warmup": min(1.0, self.seconds)}
        plans = [plan(target, seconds=self.seconds, seed=i, **options) for i in range(self.rounds)]
        reports = [self.load.raw([asked])[0] for asked in plans]
        p99 = [report["p99_us"] for report in reports]
        figures = {
            "rate": round(rate),
            "p50_us": statistics.median(report["p50_us"] for report in reports),
            "p99_us": statistics.median(p99),
            "p99_us_least": min(p99),
            "p99_us_most": max(p99),
            "lag_p99_us": statistics.median(report["lag_p99_us"] for report in reports),
            "errors": sum(sum(report["errors"].values()) for report in reports),
        }
        doubts = [report["bottleneck"] for report in reports if report["bottleneck"]]
        note = f"{len(doubts)} of {self.rounds} rounds: {doubts[0]}" if doubts else ""
        return Row(row="latency", candidate=target.name, ids=1_000, figures=_rounded(figures), note=note)

    def workers(self) -> list[Row]:
        """The same load on one worker and on two, and what the second costs in memory."""
        with self.serve("--workers", "1", on=self.all) as one, self.serve("--workers", "2", on=self.all) as two:
            servers = {"1 worker": one, "2 workers": two}
            targets = [self.target(name, server, "full", "octet", 1_000) for name, server in servers.items()]
            begin, cpu = time.monotonic(), _children_cpu()
            rows = self.compare("workers", 1_000, targets, on=self.all)
            generator = (_children_cpu() - cpu) / (time.monotonic() - begin)
            private = {"1 worker": max(one.private_mb()), "2 workers": min(two.private_mb()[1:] or [0.0])}
        for row in rows:
            row.figures["worker_mb"] = round(private[row.candidate], 1)
            row.figures["load_cores"] = round(generator, 2)
        return rows

    def overload(self) -> list[Row]:
        """More than the server can do: what it still does, and whether it says that it lives."""
        server = self.base()
        target = self.target("full", server, "full", "octet", 1_000)
        health = self.health(server)
        saturation = self.saturated(target)
        before, most = server.resident_mb(), {"connections": OVERLOAD_CONNECTIONS, "timeout": OVERLOAD_TIMEOUT}
        report, probe = self.load.raw(
            [
                plan(target, seconds=self.seconds, rate=OVERLOAD * saturation, **most),
                plan(health, seconds=self.seconds, rate=HEALTH_RATE, arrivals="constant", connections=2),
            ]
        )
        times = report["histograms"]
        figures = {
            "saturation": round(saturation),
            "offered": round(report["offered"] / self.seconds),
            "goodput": round(report["goodput"]),
            "of_saturation": round(report["goodput"] / saturation, 3),
            "p99_ms_from_due": round(report["p99_us"] / 1e3, 2),
            "p99_ms_from_sent": round(report["service_p99_us"] / 1e3, 2),
            "refused": sum(count for status, count in report["statuses"].items() if status in ("429", "503")),
            "retry_after": report["retry_after"],
            "errors": sum(report["errors"].values()),
            "health_max_ms": round(max(probe["histograms"][kind]["most"] for kind in ("latency", "refused")) / 1e6, 2),
            "health_failed": sum(probe["errors"].values()) + sum(n for s, n in probe["statuses"].items() if s != "200"),
            "lag_max_ms": round(times["lag"]["most"] / 1e6, 2),
            "rss_mb_before": round(before),
            "rss_mb_after": round(server.resident_mb()),
        }
        note = report["bottleneck"] or ""
        if report["errors"]:
            note = f"{note}; {report['errors']}".strip("; ")
        return [Row(row="overload", candidate="full", ids=1_000, figures=figures, note=note)]

    # how

    def compare(
        self, row: str, ids: int, targets: Sequence[Target], *, warm: float = 1.0, on: Sequence[int] | None = None
    ) -> list[Row]:
        """Requests a second of targets that take turns, and their ratio to the first in the same round."""
        for target in targets:
            check(target)
        for target in targets:
            self.load.closed(target, min(warm, self.seconds), on=on)
        rounds = [{t.name: self.load.closed(t, self.seconds, on=on) for t in targets} for _ in range(self.rounds)]
        first, found = targets[0].name, []
        for name in rounds[0]:
            rate = statistics.median(r[name] for r in rounds)
            ratios = [r[name] / r[first] for r in rounds]
            figures: dict[str, float] = {"requests_per_s": round(rate), "ids_per_s": round(rate * ids)}
            figures |= {"x": statistics.median(ratios), "x_least": min(ratios), "x_most": max(ratios)}
            found.append(Row(row=row, candidate=name, ids=ids, against=first, figures=_rounded(figures)))
        return found

    def saturated(self, target: Target) -> float:
        """Requests a second that a server can answer at most, measured once."""
        if self.saturation is None:
            check(target)
            self.load.closed(target, min(1.0, self.seconds))
            self.saturation = statistics.median(
                self.load.closed(target, self.seconds) for _ in range(min(3, self.rounds))
            )
        return self.saturation

    # servers and requests

    def limited(self, ids: int) -> Target:
        """The app that looks nothing up, sending what a lookup of so many ids sends."""
        if self.limit is None:
            factor = str(self.sizes.dim // 2)
            self.limit = self.stack.enter_context(self._start("embstore.bench.limit", factor))
        return self.target("limit", self.limit, "full", "octet", ids, path="/")

    def base(self) -> Server:
        """The server of most rows: cache off, one worker."""
        if self.plain is None:
            self.plain = self.stack.enter_context(self.serve("--cache", "off"))
        return self.plain

    def serve(self, *flags: str, on: Sequence[int] | None = None) -> AbstractContextManager[Server]:
        """A server with these flags, on its core unless told otherwise."""
        fixed = ("--store", str(self.store), "--port", "0", "--device", "cpu", "--drain-seconds", "0")
        return self._start("embstore", "serve", *fixed, *flags, on=on)

    def _start(self, *command: str, on: Sequence[int] | None = None) -> AbstractContextManager[Server]:
        self.started += 1
        return serving(command, self.folder / f"log-{self.started}", self.all[:1] if on is None else on)

    def target(self, name: str, server: Server, table: str, kind: str, ids: int, path: str = "") -> Target:
        """Requests of one kind for one table, drawn from the same ids for every server."""
        from loadtest.workload import prewritten as workload

        made = {"octet": workload.octet_requests, "json": workload.json_requests, "infer": workload.infer_requests}
        path = path or (f"/v2/models/{table}/infer" if kind == "infer" else f"/v1/tables/{table}/lookup")
        num_ids = self.sizes.dhe_ids if table == "dhe" else self.sizes.num_ids
        file = self.folder / f"requests-{server.process.pid}-{table}-{kind}-{ids}"
        if not file.exists():
            if (num_ids, ids) not in self.drawn:
                self.drawn[num_ids, ids] = workload.zipf_ids(num_ids, self.sizes.num_requests, ids)
            host = server.url.removeprefix("http://")
            workload.write_requests(file, made[kind](host, path, self.drawn[num_ids, ids]))
        return Target(name, server.url, file, reply_bytes=4 * ids * self.sizes.dim if kind == "octet" else None)

    def health(self, server: Server) -> Target:
        """What an orchestrator asks."""
        from loadtest.workload import prewritten as workload

        file, host = self.folder / "requests-health", server.url.removeprefix("http://")
        workload.write_requests(file, [workload.get_request(host, path) for path in ("/livez", "/readyz")])
        return Target("health", server.url, file)


ROWS: dict[str, tuple[str, Callable[[Bench], list[Row]]]] = {
    "octet-10": ("int64 ids in, float32 rows out, 10 ids", lambda bench: bench.octet(10)),
    "octet-1000": ("int64 ids in, float32 rows out, 1,000 ids", lambda bench: bench.octet(1_000)),
    "json-100": ("JSON, 100 ids", lambda bench: bench.json(100)),
    "infer-10": ("Open Inference Protocol, binary tensors, 10 ids", lambda bench: bench.infer(10)),
    "infer-1000": ("Open Inference Protocol, binary tensors, 1,000 ids", lambda bench: bench.infer(1_000)),
    "dhe-cache": ("dhe, ids of Zipf 1.05, cache off and on", Bench.dhe_cache),
    "auto-cache": ("full, cache off and left to the server", Bench.auto_cache),
    "latency": ("1,000 ids at half of saturation, timed from when they are due", Bench.latency),
    "workers": ("1 worker and 2 on all cores, the load on them too", Bench.workers),
    "overload": ("1,000 ids at 3 times saturation", Bench.overload),
}
ALL_TABLES = ("octet-10", "octet-1000", "dhe-cache")
"""Rows that need more tables than `full`."""


def publish(folder: Path, tables: Sequence[str], sizes: Sizes) -> None:
    """A store of random tables: `full` in float32 and int8, qr and memcom a sixteenth of it, dhe a network."""
    import embstore
    from embstore.schemes import DHE, QR, Full, MEmCom

    store, budget = embstore.open_store(folder), 4 * sizes.num_ids * sizes.dim // RATIO
    if "full" in tables or "full_int8" in tables:
        module = Full(sizes.num_ids, sizes.dim)
        for name, dtype in (("full", "float32"), ("full_int8", "int8")):
            if name in tables:
                store.publish(name, module, dtype=dtype)
        del module
    if "qr" in tables:
        store.publish("qr", QR.from_budget(sizes.num_ids, sizes.dim, budget))
    if "memcom" in tables:
        store.publish("memcom", MEmCom.from_budget(sizes.num_ids, sizes.dim, budget))
    if "dhe" in tables:
        store.publish("dhe", DHE.from_budget(sizes.dhe_ids, sizes.dim, sizes.dhe_bytes))


def _children_cpu() -> float:
    """Seconds of processor time that ended children took: loads, not servers, which still run."""
    times = os.times()
    return times.children_user + times.children_system


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: value if isinstance(value, int) else round(value, 3) for name, value in figures.items()}


def as_table(rows: list[Row], about: dict[str, Any]) -> Any:
    """For a terminal: candidates below each other, a candidate alone as a list of its figures; the machine last."""
    from rich.console import Group

    shown: list[Any] = []
    for name in dict.fromkeys(row.row for row in rows):
        some = [row for row in rows if row.row == name]
        shown += ["", f"{name}: {ROWS[name][0]}"]
        if some[0].figures:
            shown.append(_side_by_side(some) if some[0].against else _alone(some[0]))
        shown += [f"  {row.candidate} {row.note}".replace("   ", "  ") for row in some if row.note]
    return Group(*shown, "", ", ".join(f"{name} {value}" for name, value in about.items()))


def _side_by_side(rows: list[Row]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table, heads = Table(box=SIMPLE_HEAD), list(rows[0].figures)
    table.add_column("candidate")
    for head in ("ids", *heads):
        title = f"x {rows[0].against}" if head == "x" else head.replace("_per_s", "/s").replace("_", " ")
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(row.candidate, f"{row.ids:,}", *(f"{row.figures[head]:,}" for head in heads))
    return table


def _alone(row: Row) -> Any:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(justify="left")
    table.add_column(justify="right")
    for name, value in row.figures.items():
        table.add_row(f"  {name.replace('_', ' ')}", f"{value:,}")
    return table
