"""Times counted in buckets that widen with the time, after HdrHistogram: three digits are right at any scale."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

BITS = 10
HALF = 1 << BITS
"""Buckets between one power of two and the next: each is at most a 1,024th of its values wide."""


class Histogram:
    """Whole nanoseconds, from 0 up without a limit; a percentile is at most 0.1 % above the true one, never below it.

    Values below 2,048 have buckets of their own and are exact.
    """

    __slots__ = ("counts", "max", "min", "num", "total")

    def __init__(self, values: Iterable[int] = ()) -> None:
        self.counts: dict[int, int] = {}
        self.num = self.total = self.max = 0
        self.min: int | None = None
        for value in values:
            self.record(value)

    def record(self, value: int) -> None:
        """Count one value; a negative one (no clock goes back, but a schedule may) counts as 0."""
        if value < 0:
            value = 0
        shift = value.bit_length() - BITS - 1
        bucket = value if shift <= 0 else (shift << BITS) + (value >> shift)
        counts = self.counts
        counts[bucket] = counts.get(bucket, 0) + 1
        self.num += 1
        self.total += value
        if value > self.max:
            self.max = value
        if self.min is None or value < self.min:
            self.min = value

    def merge(self, other: Histogram) -> None:
        """Count everything that `other` counted, as if recorded here."""
        for bucket, count in other.counts.items():
            self.counts[bucket] = self.counts.get(bucket, 0) + count
        self.num += other.num
        self.total += other.total
        self.max = max(self.max, other.max)
        if other.min is not None:
            self.min = other.min if self.min is None else min(self.min, other.min)

    def percentile(self, percent: float) -> int:
        """The least value that `percent` % of all values do not exceed; 0 when nothing was counted."""
        if not 0 <= percent <= 100:
            raise ValueError(f"a percentile lies between 0 and 100, got {percent}")
        # a decimal: as a float, 99.9 % of 1,000 is more than 999
        wanted, seen = max(1, math.ceil(Fraction(str(percent)) * self.num / 100)), 0
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            if seen >= wanted:
                return min(last_of(bucket), self.max)
        return 0

    def mean(self) -> float:
        """The exact mean; 0 when nothing was counted."""
        return self.total / self.num if self.num else 0.0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Histogram) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]  # it changes

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` gives an equal histogram."""
        buckets = [[bucket, self.counts[bucket]] for bucket in sorted(self.counts)]
        return {"unit": "ns", "total": self.total, "min": self.min, "max": self.max, "buckets": buckets}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Histogram:
        """What `to_json` gave."""
        made = cls()
        made.counts = {int(bucket): int(count) for bucket, count in value["buckets"]}
        made.num = sum(made.counts.values())
        made.total, made.min, made.max = value["total"], value["min"], value["max"]
        return made


def last_of(bucket: int) -> int:
    """The largest value that is counted in a bucket."""
    if bucket < 2 * HALF:
        return bucket
    shift = (bucket >> BITS) - 1
    return ((bucket - (shift << BITS) + 1) << shift) - 1
