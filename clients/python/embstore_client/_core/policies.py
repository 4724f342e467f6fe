"""What a user may choose about retries and hedges."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Retries:
    """How often a request may be sent again, where that is safe and may help.

    Sent again: what was not answered (refused, reset, cut short), 429, 502, 503, and the 504 of a gateway. Not sent
    again: what the caller must change (4xx), what failed inside the server (500), what came too late, and answers that
    break the contract. A wait is random between 0 and a bound that doubles (full jitter); `Retry-After` is waited for.

    Attributes:
        max_attempts: of one request, the first included.
        budget: retries of a client stay under this share of its requests, so that they cannot double an overload.
        min_per_s: retries a second that are allowed besides, for clients that ask seldom.
        base_s, max_s: the bound of the first wait, and of any.
    """

    max_attempts: int = 3
    budget: float = 0.1
    min_per_s: float = 1.0
    base_s: float = 0.025
    max_s: float = 1.0

    def __post_init__(self) -> None:
        _whole("max_attempts", self.max_attempts)
        for name in ("budget", "min_per_s", "base_s", "max_s"):
            _between(name, getattr(self, name), 0.0, math.inf)


@dataclass(frozen=True, slots=True)
class Hedge:
    """When a slow request is sent a second time, the first answer winning.

    Attributes:
        percentile: of the client's recent latencies; a request that takes longer is sent once more, to another
            address where there is one.
        max_share: of all requests, at most so many are sent twice.
        min_samples: latencies to know before the first hedge.
        min_s, max_s: the wait before a hedge stays within these, whatever the percentile.
    """

    percentile: float = 95.0
    max_share: float = 0.05
    min_samples: int = 100
    min_s: float = 0.001
    max_s: float = 1.0

    def __post_init__(self) -> None:
        _between("percentile", self.percentile, 0.0, 100.0)
        _between("max_share", self.max_share, 0.0, 1.0)
        _whole("min_samples", self.min_samples)
        _between("min_s", self.min_s, 0.0, math.inf)
        _between("max_s", self.max_s, self.min_s, math.inf)

    def bounded(self, seconds: float) -> float:
        """`seconds`, within `min_s` and `max_s`."""
        return min(max(seconds, self.min_s), self.max_s)


def _whole(name: str, value: int) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def _between(name: str, value: float, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise ValueError(f"{name} must be a number from {least:g} to {most:g}, got {value!r}")
