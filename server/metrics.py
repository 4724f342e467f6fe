"""Every metric, declared once; the server passes the object, tests read its registry.

Labels come from closed sets: tables and versions that are loaded, protocols, states, reasons. Never an id.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import datetime
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
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
STATUSES = ("found", "missing")
REASONS = ("malformed", "not_found", "too_large", "id_out_of_range", "not_ready", "internal")
STATES = ("loading", "ready", "failed")


class LookupMetrics:
    """The series of one table and protocol, resolved once: a request only adds to them."""

    __slots__ = ("found", "missing", "num_ids", "seconds")

    def __init__(self, metrics: Metrics, table: str, protocol: str) -> None:
        self.seconds = metrics.lookup_seconds.labels(table, protocol)
        self.found = metrics.ids.labels(table, "found")
        self.missing = metrics.ids.labels(table, "missing")
        self.num_ids = metrics.lookup_ids

    def count(self, seconds: float, num_ids: int, missing: int) -> None:
        """One lookup of `num_ids` ids, `missing` of them not found."""
        self.seconds.observe(seconds)
        self.num_ids.observe(num_ids)
        self.found.inc(num_ids - missing)
        if missing:
            self.missing.inc(missing)


class Metrics:
    """All series of one server process, on the registry given."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self.lookup_seconds = Histogram(
            "embstore_lookup_duration_seconds",
            "Time from a complete request body to the first byte of its reply.",
            ["table", "protocol"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.lookup_ids = Histogram("embstore_lookup_ids", "Ids in one lookup.", buckets=IDS, registry=self.registry)
        self.ids = Counter("embstore_ids", "Ids looked up.", ["table", "status"], registry=self.registry)
        self.inflight = Gauge("embstore_inflight_requests", "Lookups being answered.", registry=self.registry)
        self.rejected = Counter(
            "embstore_rejected", "Lookups answered with an error.", ["reason"], registry=self.registry
        )
        self.load_seconds = Histogram(
            "embstore_version_load_seconds",
            "Time to verify, load and warm a version.",
            buckets=(0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800),
            registry=self.registry,
        )
        self.loads = Counter("embstore_version_loads", "Versions loaded.", ["result"], registry=self.registry)
        self.swaps = Counter("embstore_swaps", "Times the set of served versions changed.", registry=self.registry)
        self._lookups: dict[tuple[str, str], LookupMetrics] = {}
        for reason in REASONS:
            self.rejected.labels(reason)
        for result in ("ok", "failed"):
            self.loads.labels(result)

    def lookup(self, table: str, protocol: str) -> LookupMetrics:
        """The resolved series of a loaded table; the same object every time."""
        try:
            return self._lookups[table, protocol]
        except KeyError:
            return self._lookups.setdefault((table, protocol), LookupMetrics(self, table, protocol))

    def watch(self, tables: Registry) -> None:
        """Show the versions that a registry holds, and create every series of a table once it is there."""
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
