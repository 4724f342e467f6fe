"""Conditions on what a load test measures, as people write them: `p99>10ms`, `error_rate>0.1%`, `status_503>0`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from embstore.common.units import NS, rate_text, share_text, time_text

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
ERRORS = ("timeout", "connect", "closed", "reset", "tls", "protocol", "truncated", "mislabelled", "unanswered")
OF_TIME = re.compile(r"(?:(service|queued|lag)_)?(?:p(\d+(?:\.\d+)?)|(max|mean))")
_SHAPE = re.compile(r"\s*([A-Za-z][\w.]*)\s*(>=|<=|>|<)\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(\S*)\s*")
_POSSIBLE = (
    "p50, p99, p99.9 (any percentile), max, mean, the same after service_, queued_ or lag_, error_rate, goodput, "
    "offered, status_503 (any status), " + ", ".join(f"error_{kind}" for kind in ERRORS)
)


class ConditionError(ValueError):
    """Text that is no condition; the message is one line and says what is possible."""


@dataclass(frozen=True)
class Condition:
    """A figure of a run against a limit.

    metric: times (`p99`, `max`, `service_p99`, `lag_p99`, ...) in nanoseconds, `error_rate` as a share, `goodput` and
        `offered` as requests a second, `status_NNN` and `error_KIND` as a number of requests.
    """

    metric: str
    op: str
    limit: float

    def __str__(self) -> str:
        """As one would write it; `parse` gives an equal condition."""
        return f"{self.metric}{self.op}{self._text(self.limit)}"

    def met_by(self, value: float) -> bool:
        """Whether a figure is on that side of the limit."""
        return OPERATORS[self.op](value, self.limit)

    def sure(self, value: float) -> bool:
        """Whether the figure of a run with a late generator is surely on its side of the limit.

        A generator that is late, and then sends at once what was due meanwhile, makes times longer and failures more,
        never the other way round, and successes fewer.
        """
        if self.metric.startswith(("lag_", "offered")):
            return True
        success = self.metric == "goodput" or self.metric.startswith("status_2")
        return self.met_by(value) == self.op.startswith(">" if success else "<")

    def describe(self, value: float) -> str:
        """A figure in its unit: `p99 is 12.3 ms`."""
        return f"{self.metric} is " + ("infinite: no 2xx reply" if value == float("inf") else self._text(value, " "))

    def _text(self, value: float, gap: str = "") -> str:
        if OF_TIME.fullmatch(self.metric):
            if gap:
                return time_text(value)
            unit = next((unit for unit in ("s", "ms") if value >= NS[unit]), "us")
            return f"{value / NS[unit]:.12g}{unit}"
        if self.metric == "error_rate":
            return share_text(value) if gap else f"{100 * value:.12g}%"
        if self.metric in ("goodput", "offered"):
            return rate_text(value) if gap else f"{value:.12g}/s"
        return f"{value:,.0f}" if gap else f"{value:.12g}"


def parse(text: str) -> Condition:
    """A condition from text; ConditionError says what is wrong and what is possible."""
    found = _SHAPE.fullmatch(text)
    if not found:
        raise ConditionError(f"{text!r} is no condition: write a figure, one of > >= < <=, and a limit, like p99>10ms")
    metric, op, number, unit = found[1].lower(), found[2], float(found[3]), found[4]
    return Condition(metric, op, number * _scale(text, metric, number, unit))


def _scale(text: str, metric: str, number: float, unit: str) -> float:
    """What one unit is worth; ConditionError for a figure that there is not, or a unit that it does not have."""
    if number < 0:
        raise ConditionError(f"{text!r}: a limit cannot be below 0")
    if found := OF_TIME.fullmatch(metric):
        if found[2] and not 0 <= float(found[2]) <= 100:
            raise ConditionError(f"{text!r}: a percentile lies between 0 and 100, got {found[2]}")
        if unit not in NS:
            wrong = f"not {unit!r}" if unit else f"{number:g} of what?"
            raise ConditionError(f"{text!r}: {metric} is a time in us, ms or s, {wrong}")
        return NS[unit]
    if metric == "error_rate":
        if unit not in ("", "%"):
            raise ConditionError(f"{text!r}: error_rate is a share, like 0.1% or 0.001, not {unit!r}")
        scale = 0.01 if unit else 1.0
        if number * scale > 1:
            raise ConditionError(f"{text!r}: error_rate is at most 100%; 1 is everything, 1% a hundredth")
        return scale
    if metric in ("goodput", "offered"):
        if unit not in ("", "/s"):
            raise ConditionError(f"{text!r}: {metric} is a number a second, like 500/s, not {unit!r}")
        return 1.0
    name, _, what = metric.partition("_")
    if name == "status" and not (what.isdecimal() and 100 <= int(what) <= 599):
        raise ConditionError(f"{text!r}: a status lies between 100 and 599, like status_503")
    if name == "error" and what not in ERRORS:
        raise ConditionError(f"{text!r}: {what!r} is no kind of error; there are {', '.join(ERRORS)}")
    if name not in ("status", "error"):
        raise ConditionError(f"{text!r}: there is no figure {metric!r}; there are {_POSSIBLE}")
    if unit:
        raise ConditionError(f"{text!r}: {metric} is a number of requests, not {unit!r}")
    return 1.0
