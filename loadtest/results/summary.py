"""What a load test found, in its key figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from embstore.common.units import share_text, time_text
from loadtest.results.figures import figure
from loadtest.results.histogram import Histogram
from loadtest.results.result import Result
from loadtest.results.server_metrics import view
from loadtest.results.tally import Tally
from loadtest.results.validity import decides, only_generator_lag
from loadtest.scenario.conditions import Condition, parse

PERCENTILES = (50.0, 90.0, 99.0, 99.9)
MISSING_SHARE = 0.1
"""Report threshold: share of ids that the server does not have."""
QUEUED_SHARE = 0.01
"""Report threshold: share of requests that waited for a free connection."""


def to_summary(result: Result) -> dict[str, Any]:
    """The figures of a run as plain values: times in milliseconds, shares between 0 and 1, rates a second.

    A time is None where no 2xx reply was counted. upper_bounds: all that is wrong with the run is a late generator.
    """
    total, span = result.total(), result.seconds
    server = view(result.samples)
    return {
        "name": result.scenario.name,
        "url": result.scenario.url,
        "mode": result.scenario.mode,
        "seconds": span,
        "partial": result.partial,
        "invalid": list(result.invalid),
        "upper_bounds": only_generator_lag(result),
        "warnings": warnings(result, total) + missing(server),
        "total": figures(total, span),
        "kinds": {kind: figures(result.total(kind=kind), span) for kind in result.kinds()},
        "phases": [
            {"name": name, "begin": begin, "end": end, **figures(tally, length)}
            for name, begin, end, tally, length in phases(result)
        ],
        "errors": dict(total.failures.most_common()),
        "retry_after": total.retry_after,
        "versions": [asdict(seen) for seen in result.versions],
        "events": [asdict(mark) for mark in result.marks],
        "server": server,
        "generator": asdict(result.generator)
        | {
            "lag_p99_ms": _ms(total.lag, 99),
            "queued": total.queued.num,
            "queued_p99_ms": _ms(total.queued, 99),
        },
        "fail_if": [_judged(parse(text), result, total) for text in result.scenario.fail_if],
    }


def figures(tally: Tally, seconds: float) -> dict[str, Any]:
    """What some requests came to, that were due in so many seconds."""
    per_s = 1 / seconds if seconds else 0.0
    return {
        "offered": tally.offered,
        "offered_per_s": tally.offered * per_s,
        "ok": tally.ok,
        "ok_per_s": tally.ok * per_s,
        "bytes_per_s": tally.num_bytes * per_s,
        "error_rate": tally.error_rate,
        "latency_ms": _times(tally.latency),
        "service_ms": _times(tally.service),
    }


def phases(result: Result) -> list[tuple[str, float, float, Tally, float]]:
    """Name, begin, end, tally and counted seconds of every phase that was reached; of a partial run the last is cut.

    A second belongs to the phase in which it begins.
    """
    found = []
    for name, begin, end in result.windows():
        until = min(end, result.seconds) if result.partial else end
        counted = min(math.ceil(until), result.seconds) - math.ceil(begin)
        if counted > 0:
            found.append((name, begin, until, result.total(since=begin, until=until), float(counted)))
    return found


def warnings(result: Result, total: Tally) -> list[str]:
    """What a reader should know before trusting a figure; unlike `invalid`, the figures still stand."""
    found = []
    if result.partial:
        found.append(f"interrupted: {result.seconds:.4g} s of {result.scenario.seconds:.4g} s were measured")
    if not total.ok:
        found.append("not one 2xx reply: there are no latencies")
    elif failed := total.failures.total():
        share = share_text(total.error_rate)
        found.append(f"latencies are those of 2xx replies; {failed:,} requests ({share}) got none")
    short = [f"p{p:g}" for p in PERCENTILES if 0 < total.ok < round(100 / (100 - p))]
    if short:
        found.append(f"{total.ok:,} replies are too few for {', '.join(short)}: the slowest one decides")
    if total.offered and total.queued.num > QUEUED_SHARE * total.offered:
        share, wait = share_text(total.queued.num / total.offered), time_text(total.queued.percentile(99))
        found.append(f"{share} of the requests found no connection free; p99 of that wait is {wait}, in the latency")
    failed_events = [mark.name for mark in result.marks if not mark.ok]
    if failed_events:
        found.append(f"events that failed: {', '.join(failed_events)}")
    return found


def missing(server: Mapping[str, Any]) -> list[str]:
    """A warning where the server did not have many of the ids: the load is then another one than people mean."""
    found, lost = (server.get("ids", {}).get(status, 0.0) for status in ("found", "missing"))
    if lost <= MISSING_SHARE * (found + lost):
        return []
    share = share_text(lost / (found + lost))
    return [f"the server did not have {share} of the ids: ids.file and ids.column name a file of those there are"]


def _judged(condition: Condition, result: Result, total: Tally) -> dict[str, Any]:
    """verdict: `inconclusive` where generator lag may be why a condition holds, `invalid` where the run is."""
    value = figure(condition, total, result.seconds)
    holds = condition.met_by(value)
    verdict = (
        ("fail" if holds else "pass")
        if decides(result, condition, value)
        else "inconclusive"
        if only_generator_lag(result)
        else "invalid"
    )
    return {
        "condition": str(condition),
        "found": condition.describe(value),
        "holds": holds,
        "verdict": verdict,
    }


def _times(histogram: Histogram) -> dict[str, float | None]:
    times = {f"p{p:g}": _ms(histogram, p) for p in PERCENTILES}
    if not histogram.num:
        return times | {"max": None, "mean": None}
    return times | {"max": histogram.max / 1e6, "mean": histogram.mean() / 1e6}


def _ms(histogram: Histogram, percent: float) -> float | None:
    return histogram.percentile(percent) / 1e6 if histogram.num else None
