"""Every metric, declared once: kind, help, labels, buckets. `docs/reference/metrics.md` is made of it.

Labels come from closed sets: tables that are loaded, protocols, stages, reasons. Never an id.
"""

from __future__ import annotations

from typing import NamedTuple

from prometheus_client.core import GaugeMetricFamily

SECONDS = (
    *(50e-6, 100e-6, 200e-6, 350e-6, 500e-6, 750e-6),
    *(1e-3, 1.5e-3, 2e-3, 3e-3, 5e-3, 7.5e-3),
    *(10e-3, 20e-3, 50e-3, 100e-3, 250e-3, 1.0, 2.5, 5.0),
)
LOAD_SECONDS = (0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800)
IDS = tuple(1 << k for k in range(17))
REQUESTS = tuple(1 << k for k in range(9))
PROTOCOLS = ("octet-stream", "json", "open-inference")
REASONS = (
    *("malformed", "not_found", "too_large", "id_out_of_range", "not_ready", "draining", "internal"),
    *("overloaded", "deadline", "unauthorized", "disconnected"),
)
STAGES = ("queue", "decode", "lookup", "encode")
TIERS = ("local", "redis")
RESULTS = ("hit", "miss", "error", "stale")
CACHE_OPERATIONS = ("get", "put", "ping")
BREAKER_STATES = ("closed", "half_open", "open")
BATCHES = ("1-15", "16-127", "128-1023", "1024+")
CHOICES = ("compute", "local", "redis")
STATUSES = ("found", "missing")
LOADS = ("ok", "failed")


class Family(NamedTuple):
    """One metric: its kind, help, labels, and a histogram's buckets."""

    kind: str
    help: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()


FAMILIES = {
    "embstore_lookup_duration_seconds": Family(
        "histogram",
        "Request duration, from the end of the header to the reply being written to the connection.",
        ("table", "protocol"),
        SECONDS,
    ),
    "embstore_stage_duration_seconds": Family(
        "histogram", "Duration of one stage of a request, for a sample of requests.", ("stage",), SECONDS
    ),
    "embstore_lookup_ids": Family("histogram", "Ids per lookup.", (), IDS),
    "embstore_ids": Family("counter", "Ids looked up.", ("table", "status")),
    "embstore_rejected": Family("counter", "Rejected lookups, by reason.", ("reason",)),
    "embstore_inflight_requests": Family("gauge", "Lookups in flight."),
    "embstore_queue_depth": Family("gauge", "Queued lookups."),
    "embstore_batch_requests": Family("histogram", "Requests per device batch.", (), REQUESTS),
    "embstore_batch_ids": Family("histogram", "Ids per device batch.", (), IDS),
    "embstore_cache_ids": Family("counter", "Cache requests, in ids, by tier and result.", ("table", "tier", "result")),
    "embstore_cache_operation_duration_seconds": Family(
        "histogram", "Duration of one Redis operation.", ("op",), SECONDS
    ),
    "embstore_cache_errors": Family("counter", "Failed Redis operations.", ("op",)),
    "embstore_cache_breaker_state": Family("gauge", "Workers per Redis circuit-breaker state.", ("state",)),
    "embstore_cache_choice": Family(
        "gauge", "Workers per chosen lookup path, by batch-size class.", ("table", "batch", "choice")
    ),
    "embstore_version_load_seconds": Family(
        "histogram", "Duration of verifying, loading and warming a version.", (), LOAD_SECONDS
    ),
    "embstore_version_loads": Family("counter", "Version loads, by result.", ("result",)),
    "embstore_swaps": Family("counter", "Changes of the set of served versions."),
    "embstore_worker_restarts": Family("counter", "Workers that exited unexpectedly and were replaced."),
}
GAUGES = tuple(name for name, family in FAMILIES.items() if family.kind == "gauge")
SCRAPED = {
    "embstore_build_info": Family("gauge", "1 for the version of this program.", ("version",)),
    "embstore_workers": Family("gauge", "Worker processes."),
    "embstore_version_info": Family("gauge", "1 for each version now serving.", ("table", "version", "scheme")),
    "embstore_version_state": Family("gauge", "1 for the state a version is in.", ("table", "version", "state")),
    "embstore_version_age_seconds": Family("gauge", "Age of the version now serving.", ("table",)),
    "embstore_table_bytes": Family("gauge", "Size of a loaded version.", ("table", "version", "device")),
}
"""What is not counted but known when it is asked for; of versions, what the worker that answers knows."""


def scraped(name: str) -> GaugeMetricFamily:
    """One of SCRAPED, without samples."""
    family = SCRAPED[name]
    return GaugeMetricFamily(name, family.help, labels=family.labels)
