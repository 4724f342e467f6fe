"""Percentiles of a histogram as a curve, and as the text that HdrHistogram's plotter reads (`.hgrm`)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from loadtest.results.histogram import HALF, Histogram, last_of

TICKS_PER_HALF = 5
"""Points for each halving of the distance to 100 %: what HdrHistogram's own writers take."""


class Point(NamedTuple):
    """`seen` values are at most `value`; `level` is the share that was asked for, at most seen / all."""

    value: int
    level: float
    seen: int


def steps(histogram: Histogram) -> list[tuple[int, int]]:
    """For every bucket in use, in order: its largest value (never above the largest seen), and how many it counts."""
    return [(min(last_of(at), histogram.max), histogram.counts[at]) for at in sorted(histogram.counts)]


def curve(histogram: Histogram) -> Iterator[Point]:
    """Points ever closer to 100 %, as HdrHistogram takes them, and 100 % itself at the end; none of nothing."""
    seen = tick = 0
    for value, count in steps(histogram):
        seen += count
        while True:
            halvings, part = divmod(tick, TICKS_PER_HALF)
            whole = 2 * TICKS_PER_HALF << halvings
            level = whole - 2 * TICKS_PER_HALF + part  # of `whole`: in integers, since rounding would skip a value
            if seen * whole < level * histogram.num:
                break
            yield Point(value, level / whole, seen)
            if seen == histogram.num:
                yield Point(value, 1.0, seen)
                return
            tick += 1


def to_hgrm(histogram: Histogram) -> str:
    """The whole file, values in milliseconds with every nanosecond that is known."""
    lines = [f"{'Value':>12} {'Percentile':>14} {'TotalCount':>10} {'1/(1-Percentile)':>14}", ""]
    for value, level, seen in curve(histogram):
        odds = f" {1 / (1 - level):14.2f}" if level < 1 else ""
        lines.append(f"{value / 1e6:12.6f} {level:14.12f} {seen:10d}{odds}")
    mean = histogram.mean()
    spread = sum(count * (value - mean) ** 2 for value, count in steps(histogram))
    deviation = math.sqrt(spread / histogram.num) if histogram.num else 0.0
    halves = max(1, histogram.max.bit_length() - HALF.bit_length() + 1)
    lines += [
        f"#[Mean    = {mean / 1e6:12.6f}, StdDeviation   = {deviation / 1e6:12.6f}]",
        f"#[Max     = {histogram.max / 1e6:12.6f}, Total count    = {histogram.num:12d}]",
        f"#[Buckets = {halves:12d}, SubBuckets     = {2 * HALF:12d}]",
    ]
    return "\n".join(lines) + "\n"
