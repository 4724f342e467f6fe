"""From values to places on a plot: linear and logarithmic axes with ticks at round values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from embstore.common.units import clock_text, seconds_text, time_text

_STEPS_OF_TIME = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """One axis. label: what it shows, with its unit; ticks: where it has a line and a text."""

    label: str
    low: float
    high: float
    ticks: tuple[float, ...]
    text: Callable[[float], str]
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value lies: 0 at the low end, 1 at the high end; values beyond them lie on them."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def over_time(high: float, most_ticks: int = 12) -> Scale:
    """Seconds since the measurement began."""
    step = next((step for step in _STEPS_OF_TIME if high <= most_ticks * step), _STEPS_OF_TIME[-1])
    text = _moment if high < 120 else clock_text
    return Scale(label="since the measurement began", low=0.0, high=high, ticks=_multiples(high, step), text=text)


def from_zero(values: Iterable[float], label: str, text: Callable[[float], str], least: float = 0.0) -> Scale:
    """From 0 to a little more than the largest value, and to `least` at least."""
    most = max(values, default=0.0) or least or 1.0
    most = max(most, least)
    step = _round_up(most / 5)
    high = step * math.ceil(most * 1.02 / step)
    return Scale(label=label, low=0.0, high=high, ticks=_multiples(high, step), text=text)


def between(low: float, high: float, label: str, text: Callable[[float], str]) -> Scale:
    """From a round value at or below `low` to one at or above `high`."""
    step = _round_up(max(high - low, 1e-6) / 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(round(n * step, 10) for n in range(first, max(last, first + 1) + 1))
    return Scale(label=label, low=ticks[0], high=ticks[-1], ticks=ticks, text=text)


def of_names(names: Sequence[str], label: str) -> Scale:
    """A place for each name: the n-th is around n."""
    ticks = tuple(float(n) for n in range(len(names)))
    return Scale(label=label, low=-0.5, high=len(names) - 0.5, ticks=ticks, text=lambda n: names[round(n)])


def of_shares(label: str) -> Scale:
    """From nothing to everything."""
    return Scale(label=label, low=0.0, high=1.0, ticks=(0.0, 0.25, 0.5, 0.75, 1.0), text=lambda x: f"{x:.0%}")


def of_times(values: Iterable[float], label: str) -> Scale:
    """Nanoseconds, logarithmic, a round value below the least of them and one above the largest."""
    known = [value for value in values if value > 0] or [1e6]
    low, high = _round_down(min(known)), _round_up(max(known) * 1.02)
    if high <= low * 2:
        low, high = low / 2, high * 2
        low, high = _round_down(low), _round_up(high)
    decades = math.log10(high / low)
    factors = (1, 2, 5) if decades < 3 else (1, 3) if decades < 4 else (1,)
    ticks = [f * 10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for f in factors]
    inside = tuple(tick for tick in ticks if low * 0.999 <= tick <= high * 1.001)
    return Scale(label=label, low=low, high=high, ticks=inside, text=_round_time, log=True)


def of_percentiles(num: int) -> Scale:
    """Percentiles by 1 / (1 - p), so that each further nine takes the same room, as far as `num` values reach."""
    high = max(10.0, float(num))
    ticks = (1.0, 2.0, *(10.0**n for n in range(1, math.floor(math.log10(high)) + 1)))
    return Scale(label="percentile", low=1.0, high=high, ticks=ticks, text=_percent, log=True)


def _multiples(high: float, step: float) -> tuple[float, ...]:
    return tuple(round(n * step, 10) for n in range(math.floor(high / step + 1e-9) + 1))


def _round_up(value: float) -> float:
    """1, 2 or 5 times a power of ten, the next from `value` up."""
    size = 10.0 ** math.floor(math.log10(value))
    return next(size * factor for factor in (1, 2, 5, 10) if size * factor >= value * 0.999999)


def _round_down(value: float) -> float:
    size = 10.0 ** math.floor(math.log10(value))
    return next(size * factor for factor in (5, 2, 1) if size * factor <= value * 1.000001)


def _moment(seconds: float) -> str:
    return "0" if seconds == 0 else seconds_text(seconds)


def _round_time(ns: float) -> str:
    """The text of a tick: no zeros that say nothing."""
    number, unit = time_text(ns).split(" ")
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number} {unit}"


def _percent(odds: float) -> str:
    share = 100 * (1 - 1 / odds)
    return f"{share:.10f}".rstrip("0").rstrip(".") + " %"
