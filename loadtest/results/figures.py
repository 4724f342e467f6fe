"""What a condition looks at: one figure of some requests."""

from __future__ import annotations

from loadtest.results.histogram import Histogram
from loadtest.results.tally import Tally
from loadtest.scenario.conditions import OF_TIME, Condition


def figure(condition: Condition, total: Tally, seconds: float) -> float:
    """The condition's figure of requests that were due in so many seconds.

    A latency or service time without a single 2xx reply is infinite, not 0.
    """
    metric = condition.metric
    if found := OF_TIME.fullmatch(metric):
        return _time(total, found[1] or "latency", found[2], found[3])
    if metric == "error_rate":
        return total.error_rate
    if metric in ("goodput", "offered"):
        count = total.ok if metric == "goodput" else total.offered
        return count / seconds if seconds else 0.0
    name, _, what = metric.partition("_")
    return total.errors[what] if name == "error" else total.statuses[int(what)]


def _time(total: Tally, name: str, percent: str | None, other: str | None) -> float:
    histogram: Histogram = getattr(total, name)
    if not histogram.num:
        return float("inf") if name in ("latency", "service") else 0.0
    if percent is not None:
        return histogram.percentile(float(percent))
    return histogram.max if other == "max" else histogram.mean()
