"""Lookups sent by the load test's generator from cores of its own: the one place where benchmarks make scenarios."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.processes import cores, on_cores
from embstore.errors import EmbstoreError
from loadtest.errors import LoadError
from loadtest.results.result import Result
from loadtest.run.session import load_test
from loadtest.scenario.model import Batch, IdDistribution, Phase, Protocol, RequestSpec, Scenario

CONNECTIONS, OPEN_CONNECTIONS = 8, 64
WARMUP_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is loaded: lookups of `batch` ids of one table of a server. `name` is what tables of figures call it."""

    name: str
    url: str
    table: str
    num_ids: int
    batch: int
    protocol: Protocol = "octet"
    distribution: Literal["zipf", "uniform"] = "zipf"
    on: Sequence[int] = field(default_factory=lambda: cores()[1:])
    """Cores of the generator; all of them where it is empty."""


def scenario(target: Target, **options: Any) -> Scenario:
    """Lookups of one kind; `options` are fields of Scenario."""
    ids = IdDistribution(kind=target.distribution, exponent=1.05)
    request = RequestSpec(tables=(target.table,), protocol=target.protocol, batch=Batch(size=target.batch), ids=ids)
    given: dict[str, Any] = {"url": target.url, "engine": "raw", "scrape": False, "timeout": 10, "requests": (request,)}
    return Scenario(**(given | options))


def run(target: Target, *, may_fail: bool = False, **options: Any) -> Result:
    """Make the load; EmbstoreError when it cannot be made or, unless `may_fail`, a request got no 2xx reply."""
    try:
        with on_cores(target.on):
            result = load_test(
                scenario(target, **options), stop=threading.Event(), num_ids={target.table: target.num_ids}
            )
    except LoadError as error:
        raise EmbstoreError(f"{target.name}: the load failed: {error}") from error
    total, wrong = result.total(), [mark for mark in result.marks if not mark.ok]
    if not total.ok:
        raise EmbstoreError(f"{target.name}: no request was answered: {dict(total.failures)}")
    if not may_fail and (total.failures or wrong):
        raise EmbstoreError(f"{target.name}: not every request was answered: {dict(total.failures)} {wrong or ''}")
    return result


def closed(target: Target, seconds: float, *, warmup: float = WARMUP_SECONDS, **options: Any) -> Result:
    """A closed loop: CONNECTIONS callers (unless told otherwise) that each wait for their reply."""
    phases = (Phase(seconds=warmup, warmup=True), Phase(seconds=seconds))
    given: dict[str, Any] = {"mode": "closed", "connections": CONNECTIONS, "phases": phases}
    return run(target, **(given | options))


def at_rate(target: Target, rate: float, seconds: float, *, warmup: float = 0.0, **options: Any) -> Result:
    """An open loop: Poisson arrivals at `rate` requests/s; latency runs from when a request was due."""
    phases = [Phase(seconds=seconds, rate=rate)]
    if warmup:
        phases.insert(0, Phase(seconds=warmup, rate=rate, warmup=True))
    given: dict[str, Any] = {"connections": OPEN_CONNECTIONS, "phases": tuple(phases)}
    return run(target, **(given | options))


def requests_per_s(target: Target, seconds: float, **options: Any) -> float:
    """Replies a second of a closed loop."""
    return closed(target, seconds, **options).goodput


def percentiles(result: Result) -> str:
    """p50 / p99 of the latency in microseconds; a star where the generator is to be doubted: then upper bounds."""
    latency = result.total().latency
    return f"{latency.percentile(50) / 1e3:,.0f} / {latency.percentile(99) / 1e3:,.0f}{'*' * bool(result.invalid)}"
