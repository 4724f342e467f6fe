"""The server's own view of a load test, out of the metrics that were scraped meanwhile."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

from loadtest.results.result import Sample

MAX_SAMPLES = 600
"""Of longer runs every n-th sample is drawn: nobody sees more in a plot."""
DURATION = "embstore_lookup_duration_seconds"
_SERIES = re.compile(r"([A-Za-z_:][\w:]*)(?:\{(.*)\})?")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_ESCAPED = {"n": "\n", "\\": "\\", '"': '"'}

Curve = list[tuple[float, float]]
"""A value at each of some moments, seconds since the measurement began."""


def thinned(samples: Sequence[Sample]) -> Sequence[Sample]:
    """At most about `MAX_SAMPLES` of them, the last always."""
    step = -(-len(samples) // MAX_SAMPLES)
    return samples if step <= 1 else [*samples[:-1:step], samples[-1]]


@lru_cache(maxsize=1 << 14)
def series(name: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Name and labels of a series as servers print it."""
    found = _SERIES.fullmatch(name)
    if not found:
        return name, ()
    labels = _LABEL.findall(found[2] or "")
    return found[1], tuple((label, re.sub(r"\\(.)", _unescape, value)) for label, value in labels)


def _unescape(found: re.Match[str]) -> str:
    return _ESCAPED.get(found[1], found[0])


def totals(sample: Sample, name: str, by: str = "") -> dict[str, float]:
    """Values of all series of a name, summed by one of their labels (under the empty name without)."""
    found: dict[str, float] = defaultdict(float)
    for text, value in sample.values.items():
        if text.startswith(name) and series(text)[0] == name:
            found[dict(series(text)[1]).get(by, "")] += value
    return dict(found)


def gauge(samples: Sequence[Sample], name: str) -> Curve:
    """What a gauge said; empty when the server has none of that name."""
    found = [(sample.at, totals(sample, name)) for sample in samples]
    return [(at, values[""]) for at, values in found if values]


def rates(samples: Sequence[Sample], name: str, by: str = "") -> dict[str, Curve]:
    """How fast a counter grew, a second, in the middle between each sample and the next, by one of its labels."""
    found: dict[str, Curve] = defaultdict(list)
    for at, seconds, grown in _growth(samples, name, by):
        for label, value in grown.items():
            found[label].append((at, value / seconds))
    return dict(found)


def increase(samples: Sequence[Sample], name: str, by: str = "") -> dict[str, float]:
    """How much a counter grew over all samples, restarts of the server counted, by one of its labels."""
    found: dict[str, float] = defaultdict(float)
    for _, _, grown in _growth(samples, name, by):
        for label, value in grown.items():
            found[label] += value
    return dict(found)


def _growth(samples: Sequence[Sample], name: str, by: str) -> list[tuple[float, float, dict[str, float]]]:
    found = []
    known = [(sample.at, values) for sample in samples if (values := totals(sample, name, by))]
    for (since, before), (at, after) in pairwise(known):
        if at > since:
            found.append(((since + at) / 2, at - since, _grown(before, after)))
    return found


def _grown(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Where anything is smaller than it was, a server began anew, and everything from 0."""
    if any(after.get(label, 0.0) < was for label, was in before.items()):
        return dict(after)
    return {label: value - before.get(label, 0.0) for label, value in after.items()}


def percentile(buckets: Mapping[str, float], percent: float) -> float | None:
    """Seconds that `percent` % of what a histogram counted took at most, by a straight line inside of a bucket.

    buckets: upper bound as text -> how many are at most that. None when nothing was counted, or beyond the last bound.
    """
    bounds = sorted((float(bound), count) for bound, count in buckets.items())
    if not bounds or bounds[-1][1] <= 0:
        return None
    wanted = percent / 100 * bounds[-1][1]
    low, below = 0.0, 0.0
    for bound, count in bounds:
        if count >= wanted and count > below:
            return None if bound == float("inf") else low + (bound - low) * (wanted - below) / (count - below)
        low, below = bound, count
    return None


def latency(samples: Sequence[Sample], percent: float) -> Curve:
    """The server's own percentile between each sample and the next; moments without a lookup are left out."""
    found = []
    for at, _, grown in _growth(samples, DURATION + "_bucket", "le"):
        value = percentile(grown, percent)
        if value is not None:
            found.append((at, value))
    return found


def hit_share(samples: Sequence[Sample]) -> dict[str, Curve]:
    """Share of the ids that each tier of the cache had, over time; tiers without requests are left out."""
    found: dict[str, Curve] = {}
    for tier in sorted({label for sample in samples for label in totals(sample, "embstore_cache_ids_total", "tier")}):
        requested = _of_tier(samples, tier)
        curve = []
        for at, _, grown in _growth(requested, "embstore_cache_ids_total", "result"):
            if total := sum(grown.values()):
                curve.append((at, grown.get("hit", 0.0) / total))
        if curve:
            found[tier] = curve
    return found


def _of_tier(samples: Sequence[Sample], tier: str) -> list[Sample]:
    def belongs(name: str) -> bool:
        return name.startswith("embstore_cache_ids_total") and dict(series(name)[1]).get("tier") == tier

    return [Sample(at=one.at, values={n: v for n, v in one.values.items() if belongs(n)}) for one in samples]


def view(samples: Sequence[Sample]) -> dict[str, Any]:
    """What the server counted from the first sample to the last, as plain values; empty without two samples.

    Seconds, and shares between 0 and 1; what the server does not export is left out.
    """
    if len(samples) < 2:
        return {}
    buckets = increase(samples, DURATION + "_bucket", "le")
    hits = {
        tier: results.get("hit", 0.0) / requested
        for tier in hit_share(samples)
        if (
            requested := sum(
                (results := increase(_of_tier(samples, tier), "embstore_cache_ids_total", "result")).values()
            )
        )
    }
    found: dict[str, Any] = {
        "samples": len(samples),
        "lookups": increase(samples, DURATION + "_count").get(""),
        "p50_ms": _ms(percentile(buckets, 50)),
        "p99_ms": _ms(percentile(buckets, 99)),
        "ids": increase(samples, "embstore_ids_total", "status"),
        "rejected": {reason: n for reason, n in increase(samples, "embstore_rejected_total", "reason").items() if n},
        "cache_hits": hits,
        "inflight_max": _most(gauge(samples, "embstore_inflight_requests")),
        "queue_depth_max": _most(gauge(samples, "embstore_queue_depth")),
        "swaps": increase(samples, "embstore_swaps_total").get(""),
        "worker_restarts": increase(samples, "embstore_worker_restarts_total").get(""),
        "memory_max_bytes": _most(gauge(samples, "process_resident_memory_bytes")),
        "table_bytes_max": _most(gauge(samples, "embstore_table_bytes")),
    }
    return {name: value for name, value in found.items() if value is not None and value != {}}


def _most(curve: Curve) -> float | None:
    return max((value for _, value in curve), default=None)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds
