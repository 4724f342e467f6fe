"""Metrics: every series of the contract from the start, counted exactly, summed over workers, clean for Prometheus."""

from __future__ import annotations

import mmap
import shutil
import subprocess
from collections.abc import Iterator
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from embstore import __version__
from server.metrics.families import (
    BATCHES,
    BREAKER_STATES,
    CACHE_OPERATIONS,
    CHOICES,
    IDS,
    PROTOCOLS,
    REASONS,
    RESULTS,
    SECONDS,
    STAGES,
    TIERS,
)
from server.metrics.recorder import Metrics, take_over
from server.metrics.shared_counters import SharedCounters
from server.tables.collector import VersionCollector

pytestmark = pytest.mark.slow

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(metrics: Metrics) -> Samples:
    """Every sample of the exposition, as Prometheus reads it."""
    text = generate_latest(metrics.registry).decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    """One sample of the contract; KeyError where there is none."""
    return samples[f"embstore_{name}", frozenset(labels.items())]


def workers(number: int) -> list[Metrics]:
    """The metrics of processes that share their cells."""
    memories = [mmap.mmap(-1, 1 << 17) for _ in range(number)]
    return [Metrics([SharedCounters(memory) for memory in memories], own) for own in range(number)]


def expected_at_start() -> Iterator[tuple[str, dict[str, str]]]:
    """Every series of the contract that does not depend on tables."""
    yield from (("stage_duration_seconds_count", {"stage": stage}) for stage in STAGES)
    yield from (("rejected_total", {"reason": reason}) for reason in REASONS)
    yield from (("cache_operation_duration_seconds_count", {"op": op}) for op in CACHE_OPERATIONS)
    yield from (("cache_errors_total", {"op": op}) for op in CACHE_OPERATIONS)
    yield from (("cache_breaker_state", {"state": state}) for state in BREAKER_STATES)
    yield from (("version_loads_total", {"result": result}) for result in ("ok", "failed"))
    names = ("lookup_ids_count", "inflight_requests", "queue_depth", "version_load_seconds_count", "swaps_total")
    yield from ((name, {}) for name in (*names, "batch_requests_count", "worker_restarts_total"))


def expected_of(table: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Every series of a table."""
    for protocol in PROTOCOLS:
        yield "lookup_duration_seconds_count", {"table": table, "protocol": protocol}
    for status in ("found", "missing"):
        yield "ids_total", {"table": table, "status": status}
    for tier, result in product(TIERS, RESULTS):
        yield "cache_ids_total", {"table": table, "tier": tier, "result": result}
    for batch, choice in product(BATCHES, CHOICES):
        yield "cache_choice", {"table": table, "batch": batch, "choice": choice}


def test_every_series_is_there_from_the_start() -> None:
    """All zero: those of a table from the moment it is added, the others from start-up."""
    metrics = Metrics()
    before = scrape(metrics)
    for name, labels in expected_at_start():
        assert value(before, name, **labels) == 0, name
    assert value(before, "build_info", version=__version__) == 1
    assert value(before, "workers") == 1
    assert not any(("table", "item") in labels for _, labels in before)
    metrics.lookups.add_table("item")
    metrics.lookups.add_table("item")
    after = scrape(metrics)
    for name, labels in expected_of("item"):
        assert value(after, name, **labels) == 0, name
    assert {key: number for key, number in after.items() if key in before} == before


def test_buckets_start_at_fifty_microseconds() -> None:
    """A fast lookup is told from a very fast one, and one bucket holds what no other does."""
    metrics = Metrics()
    metrics.lookups.add_table("item")
    for seconds in (50e-6, 51e-6, 0.0003, 99.0):
        metrics.lookups.count("item", "json", seconds, 1, 0)
    samples = scrape(metrics)
    bucket = {
        bound: value(samples, "lookup_duration_seconds_bucket", table="item", protocol="json", le=bound)
        for bound in ("5e-05", "0.0001", "0.0002", "0.00035", "1", "5", "+Inf")
    }
    assert bucket == {"5e-05": 1, "0.0001": 2, "0.0002": 2, "0.00035": 3, "1": 3, "5": 3, "+Inf": 4}
    assert value(samples, "lookup_duration_seconds_sum", table="item", protocol="json") == pytest.approx(99.000401)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2),
            st.sampled_from(["item", "user"]),
            st.sampled_from(PROTOCOLS),
            st.integers(0, 10_000_000),
            st.integers(0, 100_000),
            st.integers(0, 5),
        ),
        max_size=40,
    )
)
def test_whichever_worker_is_scraped_answers_for_all(lookups: list[tuple[int, str, str, int, int, int]]) -> None:
    """Counters, sums and every bucket are what all workers together counted, the same from each of them."""
    group = workers(3)
    for metrics in group:
        for table in ("item", "user"):
            metrics.lookups.add_table(table)
    for worker, table, protocol, micros, num_ids, missing in lookups:
        group[worker].lookups.count(table, protocol, micros / 1e6, num_ids + missing, missing)
    pages = [scrape(metrics) for metrics in group]
    assert pages[0] == pages[1] == pages[2]
    for table, protocol in product(("item", "user"), PROTOCOLS):
        micros_of = [one[3] for one in lookups if one[1:3] == (table, protocol)]
        for bound in SECONDS:
            found = value(pages[0], "lookup_duration_seconds_bucket", table=table, protocol=protocol, le=f"{bound:g}")
            assert found == sum(micros / 1e6 <= bound for micros in micros_of)
        count = value(pages[0], "lookup_duration_seconds_count", table=table, protocol=protocol)
        assert count == len(micros_of)
    for table in ("item", "user"):
        mine = [one for one in lookups if one[1] == table]
        assert value(pages[0], "ids_total", table=table, status="found") == sum(one[4] for one in mine)
        assert value(pages[0], "ids_total", table=table, status="missing") == sum(one[5] for one in mine)
    sizes = [one[4] + one[5] for one in lookups]
    for bound in IDS:
        assert value(pages[0], "lookup_ids_bucket", le=f"{bound:g}") == sum(size <= bound for size in sizes)
    assert value(pages[0], "lookup_ids_sum") == sum(sizes)
    assert value(pages[0], "workers") == 3


def count_everything(metrics: Metrics) -> None:
    """One of each."""
    lookups = metrics.lookups
    lookups.add_table("item")
    for reason in REASONS:
        lookups.reject(reason)
    for stage in STAGES:
        lookups.stage(stage, 0.002)
    for tier, result in product(TIERS, RESULTS):
        lookups.cache_count("item", tier, result, 5)
    for op in CACHE_OPERATIONS:
        lookups.cache_operation(op, 0.0004)
        lookups.cache_error(op)
    lookups.set_breaker("open")
    lookups.set_cache_choice("item", "16-127", "redis")
    lookups.count_batch(3, 70)
    lookups.inflight[0] += 2
    lookups.queue_depth[0] = 4
    metrics.loads["ok"].inc()
    metrics.load_seconds.observe(0.2)
    metrics.swaps.inc()


def test_two_workers_show_the_sum_of_everything() -> None:
    """Gauges too: what is in flight is what all of them have in flight; a state says how many are in it."""
    group = workers(2)
    for metrics in group:
        count_everything(metrics)
    group[1].lookups.set_breaker("half_open")
    samples = scrape(group[0])
    assert [value(samples, "rejected_total", reason=reason) for reason in REASONS] == [2] * len(REASONS)
    assert value(samples, "stage_duration_seconds_count", stage="encode") == 2
    assert value(samples, "stage_duration_seconds_sum", stage="encode") == 0.004
    assert value(samples, "cache_ids_total", table="item", tier="local", result="stale") == 10
    assert value(samples, "cache_operation_duration_seconds_bucket", op="ping", le="0.0005") == 2
    assert value(samples, "cache_errors_total", op="put") == 2
    states = [value(samples, "cache_breaker_state", state=state) for state in BREAKER_STATES]
    assert states == [0, 1, 1]
    choices = [value(samples, "cache_choice", table="item", batch="16-127", choice=choice) for choice in CHOICES]
    assert choices == [0, 0, 2]
    assert value(samples, "batch_requests_bucket", le="4") == 2
    assert value(samples, "batch_requests_bucket", le="2") == 0
    assert value(samples, "inflight_requests") == 4
    assert value(samples, "queue_depth") == 8
    assert value(samples, "version_loads_total", result="ok") == 2
    assert value(samples, "version_load_seconds_bucket", le="0.5") == 2
    assert value(samples, "swaps_total") == 2


def test_a_replaced_worker_goes_on_counting() -> None:
    """Over the cells of a worker that was killed counters go on; its gauges are zero and its end is counted."""
    memories = [mmap.mmap(-1, 1 << 17) for _ in range(2)]
    cells = [SharedCounters(memory) for memory in memories]
    sibling = Metrics(cells, 0)
    killed = Metrics([SharedCounters(memory) for memory in memories], 1)
    count_everything(killed)
    take_over(cells[1])
    between = scrape(sibling)
    assert value(between, "inflight_requests") == value(between, "queue_depth") == 0
    assert value(between, "cache_breaker_state", state="open") == 0
    assert value(between, "worker_restarts_total") == 1
    heir = Metrics([SharedCounters(memory) for memory in memories], 1)
    count_everything(heir)
    for page in (scrape(sibling), scrape(heir)):
        assert value(page, "rejected_total", reason="overloaded") == 2
        assert value(page, "cache_ids_total", table="item", tier="redis", result="hit") == 10
        assert value(page, "inflight_requests") == 2
        assert value(page, "worker_restarts_total") == 1


def test_words_outside_the_closed_sets_are_refused() -> None:
    """A label that nobody declared is a mistake in the program, not a new series."""
    lookups = Metrics().lookups
    lookups.add_table("item")
    with pytest.raises(KeyError):
        lookups.reject("because")
    with pytest.raises(KeyError):
        lookups.count("item", "carrier-pigeon", 0.1, 1, 0)
    with pytest.raises(ValueError, match="'ajar' is none of closed, half_open, open"):
        lookups.set_breaker("ajar")
    with pytest.raises(ValueError, match="'guess' is none of compute, local, redis"):
        lookups.set_cache_choice("item", "1-15", "guess")


def registry() -> Any:
    """What `watch` reads of a registry, with one table that serves and one version that failed."""
    table = SimpleNamespace(
        name="item",
        version=2,
        device="cpu",
        num_bytes=4096,
        scheme=SimpleNamespace(name="qr"),
        manifest=SimpleNamespace(created="2020-01-01T00:00:00+00:00"),
    )
    snapshot = SimpleNamespace(latest={"item": table}, loaded={("item", 2): table})
    status = {("item", 1): SimpleNamespace(state="failed"), ("item", 2): SimpleNamespace(state="ready")}
    return SimpleNamespace(snapshot=snapshot, status=lambda: status)


def test_versions_are_read_from_the_registry() -> None:
    """What is served, in which state, how old and how large."""
    metrics = Metrics()
    metrics.registry.register(VersionCollector(registry()))
    samples = scrape(metrics)
    assert value(samples, "version_info", table="item", version="2", scheme="qr") == 1
    states = [value(samples, "version_state", table="item", version="1", state=s) for s in ("ready", "failed")]
    assert states == [0, 1]
    assert value(samples, "version_age_seconds", table="item") > 5 * 365 * 86400
    assert value(samples, "table_bytes", table="item", version="2", device="cpu") == 4096


def test_prometheus_has_nothing_to_say_about_a_scrape() -> None:
    """promtool's linter is silent: names, units, help."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool (of Prometheus) is not installed")
    metrics = Metrics()
    metrics.registry.register(VersionCollector(registry()))
    count_everything(metrics)
    page = generate_latest(metrics.registry)
    done = subprocess.run([promtool, "check", "metrics"], input=page, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
