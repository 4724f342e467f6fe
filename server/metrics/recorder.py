"""What the server counts with, and the registry that shows it; one object, passed to whoever counts.

Every series is there from the start, a table's from the moment it is loaded. What is counted lies in memory that all
workers of a server can read, so whichever of them is scraped answers for all (`server.metrics.shared_counters`).
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate, product

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from embstore import __version__
from server.metrics.families import (
    BATCHES,
    BREAKER_STATES,
    CACHE_OPERATIONS,
    CHOICES,
    FAMILIES,
    GAUGES,
    IDS,
    LOADS,
    PROTOCOLS,
    REASONS,
    RESULTS,
    SECONDS,
    STAGES,
    STATUSES,
    TIERS,
    Family,
    scraped,
)
from server.metrics.shared_counters import SharedCounters


class Counter:
    """A number that grows, written by one thread."""

    def __init__(self, cells: SharedCounters, name: str, labels: tuple[str, ...] = ()) -> None:
        self._number = cells.numbers(name, labels)

    def inc(self, amount: float = 1.0) -> None:
        """Add to it."""
        self._number[0] += amount


class Distribution:
    """A histogram, written by one thread: a count for each bucket, not cumulative, and the sum of what was seen."""

    __slots__ = ("bounds", "numbers")

    def __init__(self, cells: SharedCounters, name: str, labels: tuple[str, ...] = ()) -> None:
        self.bounds = FAMILIES[name].bounds
        self.numbers = cells.numbers(name, labels, len(self.bounds) + 2)

    def observe(self, value: float) -> None:
        """Count a value in the first bucket that holds it."""
        numbers = self.numbers
        numbers[bisect_left(self.bounds, value)] += 1.0
        numbers[-1] += value


class Lookups:
    """Everything counted on the request path. The event loop calls these, any thread where that is said."""

    def __init__(self, cells: SharedCounters) -> None:
        self._cells = cells
        self._lock = threading.Lock()
        self._tables: dict[tuple[str, str], tuple[memoryview[float], memoryview[float], memoryview[float]]] = {}
        self._cache_ids: dict[tuple[str, str, str], memoryview[float]] = {}
        self._choices: dict[tuple[str, str], dict[str, memoryview[float]]] = {}
        self._ids = Distribution(cells, "embstore_lookup_ids").numbers
        self._rejected = {reason: cells.numbers("embstore_rejected", (reason,)) for reason in REASONS}
        self._stages = {stage: Distribution(cells, "embstore_stage_duration_seconds", (stage,)) for stage in STAGES}
        self._batch_requests = Distribution(cells, "embstore_batch_requests")
        self._batch_ids = Distribution(cells, "embstore_batch_ids")
        self._operations = {
            op: Distribution(cells, "embstore_cache_operation_duration_seconds", (op,)) for op in CACHE_OPERATIONS
        }
        self._errors = {op: cells.numbers("embstore_cache_errors", (op,)) for op in CACHE_OPERATIONS}
        self._breaker = {state: cells.numbers("embstore_cache_breaker_state", (state,)) for state in BREAKER_STATES}
        self.inflight = cells.numbers("embstore_inflight_requests")
        self.queue_depth = cells.numbers("embstore_queue_depth")

    def add_table(self, table: str) -> None:
        """Create every series of a table, all zero; nothing to do when they are there. Any thread."""
        for tier, result in product(TIERS, RESULTS):
            self._cache_ids[table, tier, result] = self._cells.numbers("embstore_cache_ids", (table, tier, result))
        for batch in BATCHES:
            self._choices[table, batch] = {
                choice: self._cells.numbers("embstore_cache_choice", (table, batch, choice)) for choice in CHOICES
            }
        found, missing = (self._cells.numbers("embstore_ids", (table, status)) for status in STATUSES)
        for protocol in PROTOCOLS:
            seconds = Distribution(self._cells, "embstore_lookup_duration_seconds", (table, protocol)).numbers
            self._tables[table, protocol] = seconds, found, missing

    def count(self, table: str, protocol: str, seconds: float, num_ids: int, missing: int) -> None:
        """One lookup of `num_ids` ids, `missing` of them not found."""
        buckets, found, lost = self._tables[table, protocol]
        buckets[bisect_left(SECONDS, seconds)] += 1.0
        buckets[-1] += seconds
        if missing:
            found[0] += num_ids - missing
            lost[0] += missing
        else:
            found[0] += num_ids
        sizes = self._ids
        sizes[bisect_left(IDS, num_ids)] += 1.0
        sizes[-1] += num_ids

    def reject(self, reason: str) -> None:
        """One request that gets no vectors; `reason` is one of REASONS."""
        self._rejected[reason][0] += 1.0

    def stage(self, stage: str, seconds: float) -> None:
        """Time that one request was in one of STAGES."""
        self._stages[stage].observe(seconds)

    def count_batch(self, num_requests: int, num_ids: int) -> None:
        """One batch of requests. Always the same thread."""
        self._batch_requests.observe(num_requests)
        self._batch_ids.observe(num_ids)

    def cache_count(self, table: str, tier: str, result: str, num_ids: int) -> None:
        """Ids that a tier of the cache was asked for, and how that went. Any thread."""
        number = self._cache_ids[table, tier, result]
        with self._lock:
            number[0] += num_ids

    def cache_operation(self, op: str, seconds: float) -> None:
        """Time of one Redis operation, one of CACHE_OPERATIONS."""
        self._operations[op].observe(seconds)

    def cache_error(self, op: str) -> None:
        """One Redis operation that failed."""
        self._errors[op][0] += 1.0

    def set_breaker(self, state: str) -> None:
        """The state that the breaker of Redis is in now: one of BREAKER_STATES."""
        _choose(self._breaker, state)

    def set_cache_choice(self, table: str, batch: str, choice: str) -> None:
        """What lookups of this many ids do now: one of CHOICES for one of BATCHES."""
        _choose(self._choices[table, batch], choice)


class Metrics:
    """All series of one server process: it writes to its own cells and shows the sum of everybody's.

    `cells` are those of all workers, `own` the index of this one's; without, the process stands alone.
    """

    def __init__(self, cells: Sequence[SharedCounters] | None = None, own: int = 0) -> None:
        self._cells = [SharedCounters()] if cells is None else list(cells)
        mine = self._cells[own]
        mine.reset(GAUGES)
        self.lookups = Lookups(mine)
        self.load_seconds = Distribution(mine, "embstore_version_load_seconds")
        self.swaps = Counter(mine, "embstore_swaps")
        self.loads = {result: Counter(mine, "embstore_version_loads", (result,)) for result in LOADS}
        Counter(mine, "embstore_worker_restarts")
        self.registry = CollectorRegistry()
        self.registry.register(_Counted(self._cells))


def take_over(cells: SharedCounters) -> None:
    """What the cells of a worker that has ended say from now on: nothing in flight, and one restart more."""
    cells.reset(GAUGES)
    cells.numbers("embstore_worker_restarts")[0] += 1.0


def _choose(numbers: dict[str, memoryview[float]], chosen: str) -> None:
    """One for the chosen, zero for the others."""
    if chosen not in numbers:
        raise ValueError(f"{chosen!r} is none of {', '.join(numbers)}")
    for name, number in numbers.items():
        number[0] = float(name == chosen)


class _Counted(Collector):
    """What all workers counted, summed at scrape time."""

    def __init__(self, cells: list[SharedCounters]) -> None:
        self.cells = cells

    def collect(self) -> Iterable[Metric]:
        sums: dict[str, dict[tuple[str, ...], list[float]]] = {name: {} for name in FAMILIES}
        for cells in self.cells:
            for (name, labels), numbers in cells.read().items():
                series = sums[name]
                before = series.get(labels)
                series[labels] = [a + b for a, b in zip(before, numbers, strict=True)] if before else numbers
        for name, family in FAMILIES.items():
            yield _metric(name, family, sums[name])
        build = scraped("embstore_build_info")
        build.add_metric([__version__], 1)
        workers = scraped("embstore_workers")
        workers.add_metric([], len(self.cells))
        yield from (build, workers)


def _metric(name: str, family: Family, series: dict[tuple[str, ...], list[float]]) -> Metric:
    """A family as prometheus_client writes it."""
    if family.kind == "histogram":
        bounds = [*(f"{bound:g}" for bound in family.bounds), "+Inf"]
        histogram = HistogramMetricFamily(name, family.help, labels=family.labels)
        for labels, (*counts, total) in series.items():
            histogram.add_metric(labels, list(zip(bounds, accumulate(counts), strict=True)), total)
        return histogram
    kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    single = kind(name, family.help, labels=family.labels)
    for labels, (value,) in series.items():
        single.add_metric(labels, value)
    return single
