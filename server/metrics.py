"""Every metric, declared once; the server passes the object, tests read its registry.

Labels come from closed sets: tables and versions that are loaded, protocols, states, reasons. Never an id.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable
from datetime import datetime
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from server.tables import Registry

SECONDS = (
    *(50e-6, 100e-6, 200e-6, 350e-6, 500e-6, 750e-6),
    *(1e-3, 1.5e-3, 2e-3, 3e-3, 5e-3, 7.5e-3),
    *(10e-3, 20e-3, 50e-3, 100e-3, 250e-3, 1.0),
)
IDS = tuple(float(1 << k) for k in range(17))
PROTOCOLS = ("octet-stream", "json")
REASONS = ("malformed", "not_found", "too_large", "id_out_of_range", "not_ready", "draining", "internal")
STATES = ("loading", "ready", "failed")


class Distribution:
    """A histogram that only the event loop adds to: a list of counts and a sum, a quarter of a microsecond.

    prometheus_client's own takes a lock and walks its buckets, 2 us a time; it still writes what is scraped.
    """

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value in the first bucket that holds it."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def add_to(self, family: HistogramMetricFamily, labels: list[str]) -> None:
        """Its cumulative buckets as one series of `family`."""
        bounds = [*(f"{bound:g}" for bound in self.bounds), "+Inf"]
        family.add_metric(labels, list(zip(bounds, accumulate(self.counts), strict=True)), self.sum)


class TableCounts:
    """What is counted of one table's lookups."""

    __slots__ = ("found", "missing", "seconds")

    def __init__(self) -> None:
        self.seconds = {protocol: Distribution(SECONDS) for protocol in PROTOCOLS}
        self.found = 0
        self.missing = 0


class Lookups(Collector):
    """Everything counted on the request path; touched by the event loop alone, read at scrape time."""

    def __init__(self) -> None:
        self.tables: dict[str, TableCounts] = {}
        self.num_ids = Distribution(IDS)
        self.rejected = dict.fromkeys(REASONS, 0)
        self.inflight = 0
        self.caches: dict[str, dict[str, int]] = {}
        self.cache_errors = {"get": 0, "put": 0}

    def add_table(self, table: str) -> None:
        """Create every series of a table, all zero; nothing to do when they are there."""
        self.tables.setdefault(table, TableCounts())
        self.caches.setdefault(table, {"hit": 0, "miss": 0})

    def count(self, table: str, protocol: str, seconds: float, num_ids: int, missing: int) -> None:
        """One lookup of `num_ids` ids, `missing` of them not found."""
        counts = self.tables[table]
        counts.seconds[protocol].observe(seconds)
        counts.found += num_ids - missing
        counts.missing += missing
        self.num_ids.observe(num_ids)

    def collect(self) -> Iterable[Metric]:
        """The families, for prometheus_client."""
        seconds = HistogramMetricFamily(
            "embstore_lookup_duration_seconds",
            "Time from the head of a request to its reply being handed to the connection.",
            labels=["table", "protocol"],
        )
        ids = CounterMetricFamily("embstore_ids", "Ids looked up.", labels=["table", "status"])
        for table, counts in self.tables.copy().items():
            for protocol, distribution in counts.seconds.items():
                distribution.add_to(seconds, [table, protocol])
            ids.add_metric([table, "found"], counts.found)
            ids.add_metric([table, "missing"], counts.missing)
        sizes = HistogramMetricFamily("embstore_lookup_ids", "Ids in one lookup.", labels=[])
        self.num_ids.add_to(sizes, [])
        rejected = CounterMetricFamily("embstore_rejected", "Lookups answered with an error.", labels=["reason"])
        for reason, number in self.rejected.items():
            rejected.add_metric([reason], number)
        inflight = GaugeMetricFamily("embstore_inflight_requests", "Lookups being answered.", value=self.inflight)
        cache = CounterMetricFamily("embstore_cache_ids", "Ids asked of the cache.", labels=["table", "tier", "result"])
        for table, results in self.caches.copy().items():
            for result, number in results.items():
                cache.add_metric([table, "redis", result], number)
        errors = CounterMetricFamily("embstore_cache_errors", "Cache operations that failed.", labels=["op"])
        for op, number in self.cache_errors.items():
            errors.add_metric([op], number)
        yield from (seconds, ids, sizes, rejected, inflight, cache, errors)


class Metrics:
    """All series of one server process, on the registry given."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self.lookups = Lookups()
        self.registry.register(self.lookups)
        self.load_seconds = Histogram(
            "embstore_version_load_seconds",
            "Time to verify, load and warm a version.",
            buckets=(0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800),
            registry=self.registry,
        )
        self.loads = Counter("embstore_version_loads", "Versions loaded.", ["result"], registry=self.registry)
        self.swaps = Counter("embstore_swaps", "Times the set of served versions changed.", registry=self.registry)
        for result in ("ok", "failed"):
            self.loads.labels(result)

    def watch(self, tables: Registry) -> None:
        """Show the versions that a registry holds."""
        self.registry.register(_Versions(tables))


class _Versions(Collector):
    """Gauges of versions, read from the registry at scrape time: nothing to keep in step."""

    def __init__(self, tables: Registry) -> None:
        self.tables = tables

    def collect(self) -> Iterable[Metric]:
        info = GaugeMetricFamily(
            "embstore_version_info", "1 for each version now serving.", labels=["table", "version", "scheme"]
        )
        state = GaugeMetricFamily(
            "embstore_version_state", "1 for the state a version is in.", labels=["table", "version", "state"]
        )
        age = GaugeMetricFamily("embstore_version_age_seconds", "Age of the version now serving.", labels=["table"])
        size = GaugeMetricFamily(
            "embstore_table_bytes", "Bytes a loaded version holds.", labels=["table", "version", "device"]
        )
        snapshot = self.tables.snapshot
        for table in snapshot.latest.values():
            assert table.manifest is not None
            info.add_metric([table.name, str(table.version), table.scheme.name], 1)
            created = datetime.fromisoformat(table.manifest.created).timestamp()
            age.add_metric([table.name], max(0.0, time.time() - created))
        for table in snapshot.loaded.values():
            size.add_metric([table.name, str(table.version), table.device], table.num_bytes)
        for (name, version), status in self.tables.status().items():
            for known in STATES:
                state.add_metric([name, str(version), known], float(status.state == known))
        yield from (info, state, age, size)
